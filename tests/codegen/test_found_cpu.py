"""Kernels for the CPU as `castile.compile` gives them, where they were wrong once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import castile

GRADIENTS = """
def backward(Q: f32[b, q, d], K: f32[b, k, d], V: f32[b, k, f], dO: f32[b, q, f], D: f32[b, q]) -> (dQ, dK, dV):
    P[b, q, k]  = exp(sum[d](Q[b, q, d] * K[b, k, d]))
    dS[b, q, k] = P[b, q, k] * (sum[f](dO[b, q, f] * V[b, k, f]) - D[b, q])
    dQ[b, q, d] = sum[k](dS[b, q, k] * K[b, k, d])
    dK[b, k, d] = sum[q](dS[b, q, k] * Q[b, q, d])
    dV[b, k, f] = sum[q](P[b, q, k] * dO[b, q, f])
"""
ATTENTION = """
def attention(Q: f32[q, d], K: f32[k, d], V: f32[k, f], B: f32[q, k]) -> O:
    S[q, k] = 0.25 * sum[d](Q[q, d] * K[k, d]) + B[q, k]
    M[q]    = max[k](S[q, k])
    P[q, k] = exp(S[q, k] - M[q])
    O[q, f] = sum[k](P[q, k] * V[k, f]) / sum[k](P[q, k])
"""
# Products of which one operand is computed, in f64.
WIDE = (
    "sum[k]((A[m, k] + c[m]) * B[k, n])",
    "sum[k](where(A[m, k] > 0, A[m, k], 0.0) * B[k, n])",
    "sum[k](A[m, k] * (B[k, n] * B[k, n]))",
    "sum[k](exp(A[m, k]) * B[k, n]) / sum[k](exp(A[m, k]))",
)
# A batch that lies last, or where it may lie; `b` is the batch.
BATCHES = (
    "def f(X: f32[k, b]) -> y:\n    y[b] = sum[k](X[k, b])\n",
    "def f(W: f32[k, m], X: f32[k, b]) -> y:\n    y[m, b] = sum[k](W[k, m] * X[k, b])\n",
    "def f(W: f32[m, k], X: f32[k, b]) -> y:\n    y[m, b] = sum[k](W[m, k] * X[k, b])\n",
    "def f(X: f32[k, h, b]) -> y:\n    y[h, b] = sum[k](X[k, h, b])\n",
    "def f(X: f32[k, b]) -> y:\n    M[b] = max[k](X[k, b])\n    E[k, b] = exp(X[k, b] - M[b])\n"
    "    y[k, b] = E[k, b] / sum[k](E[k, b])\n",
)


def drawn(c: castile.Cascade, extents: dict[str, int], kind: type[np.floating[Any]] = np.float32) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    shapes = {p.name: [extents[i.name] for i in p.indices] for p in c.params}  # type: ignore[union-attr]
    return {name: rng.standard_normal(shape).astype(kind) for name, shape in shapes.items()}


@pytest.mark.parametrize("queries", [17, 64])
@pytest.mark.parametrize("keys", [5, 16])
def test_gradients_of_few_keys(queries: int, keys: int) -> None:
    """Rows of queries that both a strip and what comes after it multiply."""
    c = castile.parse(GRADIENTS)
    inputs = drawn(c, {"b": 2, "q": queries, "k": keys, "d": 8, "f": 8})
    for name in ("Q", "K"):
        inputs[name] *= 0.1
    want = castile.evaluate(c, inputs)
    for name, got in zip(want, castile.compile(c, "cpu")(**inputs), strict=True):
        np.testing.assert_allclose(got, want[name], 1e-4, 1e-4, err_msg=name)


@pytest.mark.parametrize("least", [-1e30, -1e38, float(np.finfo(np.float32).min)])
@pytest.mark.parametrize("numerics", ["standard", "strict"])
def test_a_mask_that_adds_the_least_number(least: float, numerics: str) -> None:
    """A row of it alone averages all values: the scale beside it must not leave it infinite."""
    c = castile.parse(ATTENTION)
    inputs = drawn(c, {"q": 9, "k": 47, "d": 16, "f": 16})
    inputs["B"] = np.where(inputs["B"] > 0, 0.0, least).astype(np.float32)
    inputs["B"][3] = least
    got = castile.compile(c, "cpu", numerics=numerics)(**inputs)
    np.testing.assert_allclose(got[3], inputs["V"].mean(0), 1e-4, 1e-5)
    np.testing.assert_allclose(got, castile.evaluate(c, inputs)["O"], 1e-4, 1e-5)


@pytest.mark.parametrize("value", WIDE)
def test_products_in_f64_are_in_f64(value: str) -> None:
    c = castile.parse(f"def f(A: f64[m, k], B: f64[k, n], c: f64[m]) -> Y:\n    Y[m, n] = {value}\n")
    inputs = drawn(c, {"m": 33, "k": 47, "n": 16}, np.float64)
    np.testing.assert_allclose(castile.compile(c, "cpu")(**inputs), castile.evaluate(c, inputs)["Y"], 1e-12, 1e-12)


def test_a_sum_of_nothing_over_nothing_is_no_number() -> None:
    c = castile.parse(
        "def f(X: f32[q, k], K: bool[q, k], L: f32[q]) -> (A, B, C):\n"
        "    A[q] = sum[k](where(K[q, k], X[q, k], 0.0)) / L[q]\n"
        "    B[q] = sum[k](where(K[q, k], X[q, k], 0.0)) / sum[k](where(K[q, k], 1.0, 0.0))\n"
        "    C[q] = sum[k](where(K[q, k], X[q, k] / L[q], 0.0))\n"
    )
    chosen = np.array([[1, 0, 1], [0, 0, 0]], bool)
    a, b, within = castile.compile(c, "cpu")(X=np.ones((2, 3), np.float32), K=chosen, L=np.array([2, 0], np.float32))
    np.testing.assert_array_equal(a, [1, np.nan])
    np.testing.assert_array_equal(b, [1, np.nan])
    np.testing.assert_array_equal(within, [1, 0])


@pytest.mark.parametrize("text", BATCHES)
def test_strict_numerics_wherever_the_batch_lies(text: str) -> None:
    c = castile.parse(text)
    extents = {"k": 3000, "m": 7, "h": 3, "b": 80}
    inputs, kernel = drawn(c, extents), castile.compile(c, "cpu", numerics="strict")
    whole = kernel(**inputs)
    for count in (1, 2, 17, 64):
        part = {n: x[..., :count] if n == "X" else x for n, x in inputs.items()}
        np.testing.assert_array_equal(kernel(**part), whole[..., :count])


@pytest.mark.filterwarnings("ignore:Accessing the data pointer")
def test_a_tensor_without_memory_is_refused() -> None:
    torch = pytest.importorskip("torch")
    fake = pytest.importorskip("torch._subclasses.fake_tensor")
    k = castile.compile(castile.parse("def f(X: f32[m]) -> Y:\n    Y[m] = 2.0 * X[m]\n"), "cpu")
    x = torch.ones(3)
    assert [k(X=x).tolist() for _ in range(3)] == [[2.0] * 3] * 3
    with fake.FakeTensorMode():
        empty = torch.empty(3)
    with pytest.raises(castile.CastileError, match="has no memory"):
        k(X=empty)
    assert k(X=torch.empty(0)).shape == (0,)


def test_a_kernel_is_its_own_copy() -> None:
    import copy
    import pickle

    k = castile.compile(castile.parse("def f(X: f32[m]) -> Y:\n    Y[m] = 2.0 * X[m]\n"), "cpu")
    assert copy.deepcopy({"kernel": k})["kernel"] is k
    with pytest.raises(TypeError, match="keep its cascade"):
        pickle.dumps(k)


@pytest.mark.parametrize("gauge", ["maximum", "exponent"])
@pytest.mark.parametrize("score", ["sqrt(X[n, k])", "log(X[n, k])", "log1p(X[n, k])", "log2(X[n, k] ** 2 + 1.0)"])
def test_a_maximum_of_what_has_no_value_where_maxima_begin(score: str, gauge: str) -> None:
    c = castile.parse(
        f"def f(X: f32[n, k]) -> Y:\n    S[n, k] = {score}\n    M[n] = max[k](S[n, k])\n"
        "    L[n] = sum[k](exp(S[n, k] - M[n]))\n    Y[n] = M[n] + log(L[n])\n"
    )
    inputs = {"X": np.random.default_rng(0).uniform(0.1, 2, (3, 37)).astype(np.float32)}
    got = castile.compile(c, "cpu", mapping=castile.Mapping(gauge=gauge))(**inputs)
    np.testing.assert_allclose(got, castile.evaluate(c, inputs)["Y"], 1e-5)


@pytest.mark.parametrize("value", ["A[m]", "A[m] + 1", "2 * A[m]"])
def test_whole_numbers_as_f64_are_exact(value: str) -> None:
    """Declaring a result f64 converts as `f64(x)` does, not by way of f32."""
    c = castile.parse(f"def f(A: i64[m]) -> X:\n    X[m]: f64 = {value}\n")
    inputs = {"A": np.array([2**40 + 1, 2**24 + 1, -(2**33) - 7])}
    assert castile.compile(c, "cpu")(**inputs).tolist() == castile.evaluate(c, inputs)["X"].tolist()


@pytest.mark.parametrize("columns", [5, 16, 70])
def test_long_columns_are_added_in_blocks(columns: int) -> None:
    """Each number that joins a long sum of its like is rounded the same way: one at a time, sixteen times as much."""
    X = np.full((1 << 18, columns), 0.1, np.float32)
    k = castile.compile(castile.parse("def f(X: f32[m, n]) -> Y:\n    Y[n] = sum[m](X[m, n])\n"), "cpu")
    np.testing.assert_allclose(k(X=X), X.astype(np.float64).sum(0), 5e-5)
