"""The oracle where others can say the same, and the parts of its meaning that design.md spells out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from evaluated import close, run
from numpy import inf, nan

from castile.ir.cascade import Cascade
from castile.ir.errors import CastileError, EvaluationError
from castile.ir.evaluate import Oracle, evaluate
from castile.ir.parse import parse

RNG = np.random.default_rng(0)


# What NumPy, SciPy and torch say


@pytest.mark.parametrize(
    ("spec", "ranks", "sizes"),
    [
        ("mk,kn->mn", ("mk", "kn"), (3, 5, 7)),
        ("mk,nk->nm", ("mk", "nk"), (3, 5, 7)),
        ("bij,bjk,bk->bi", ("bij", "bjk", "bk"), (2, 3, 5, 7)),
        ("i,j->ij", ("i", "j"), (3, 5)),
        ("ij->", ("ij",), (3, 5)),
        ("ijk,ljk->il", ("ijk", "ljk"), (3, 5, 2, 7)),
        ("i,i,i->", ("i", "i", "i"), (5,)),
        ("ik,kj->ij", ("ik", "kj"), (3, 0, 5)),
        ("ik,kj->ij", ("ik", "kj"), (0, 3, 5)),
        ("ab,bc,cd,de->ae", ("ab", "bc", "cd", "de"), (2, 3, 4, 5, 6)),
    ],
)
def test_contractions_are_those_of_einsum(spec: str, ranks: tuple[str, ...], sizes: tuple[int, ...]) -> None:
    letters = list(dict.fromkeys("".join(ranks)))
    extents = dict(zip(letters, sizes, strict=True))
    arrays = [RNG.standard_normal([extents[r] for r in t]) for t in ranks]
    out = spec.split("->")[1]
    summed = [r for r in letters if r not in out]
    product = " * ".join(f"T{i}[{', '.join(t)}]" for i, t in enumerate(ranks))
    params = ", ".join(f"T{i}: f64[{', '.join(t)}]" for i, t in enumerate(ranks))
    body = f"sum[{', '.join(summed)}]({product})" if summed else product
    left = f"Y[{', '.join(out)}]" if out else "Y"
    got = run(f"def f({params}) -> Y:\n    {left} = {body}", **{f"T{i}": a for i, a in enumerate(arrays)})
    close(got, np.einsum(spec, *arrays))


SOFTMAX = """
def softmax(X: f64[m, n]) -> (Y, Z):
    M[m] = max[n](X[m, n])
    E[m, n] = exp(X[m, n] - M[m])
    L[m] = sum[n](E[m, n])
    Y[m, n] = E[m, n] / L[m]
    Z[m] = log(L[m]) + M[m]
"""


@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4])
def test_softmax_is_scipys(scale: float) -> None:
    special = pytest.importorskip("scipy.special")
    x = RNG.standard_normal((5, 33)) * scale + 100
    got = evaluate(parse(SOFTMAX), {"X": x})
    close(got["Y"], special.softmax(x, 1))
    close(got["Z"], special.logsumexp(x, 1))


@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_torchs(causal: bool) -> None:
    torch = pytest.importorskip("torch")
    q, k, v = (torch.randn(2, 3, n, 4, dtype=torch.float64) for n in (7, 7, 7))
    mask = "where(i >= k, S[b, h, i, k], -inf)" if causal else "S[b, h, i, k]"
    text = f"""
def attention(Q: f64[b, h, i, d], K: f64[b, h, k, d], V: f64[b, h, k, d]) -> O:
    S[b, h, i, k] = 0.5 * sum[d](Q[b, h, i, d] * K[b, h, k, d])
    X[b, h, i, k] = {mask}
    P[b, h, i, k] = exp(X[b, h, i, k] - max[k](X[b, h, i, k]))
    O[b, h, i, d] = sum[k](P[b, h, i, k] / sum[k](P[b, h, i, k]) * V[b, h, k, d])
"""
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
    close(run(text, Q=q, K=k, V=v), want.numpy())


def test_a_convolution_is_torchs() -> None:
    torch = pytest.importorskip("torch")
    x, w = torch.randn(2, 3, 11, dtype=torch.float64), torch.randn(5, 3, 3, dtype=torch.float64)
    text = (
        "def conv(x: f64[n, c, i], w: f64[o, c, r]) -> Y:\n    Y[n, o, p] = sum[c, r](x[n, c, 2 * p + r] * w[o, c, r])"
    )
    close(run(text, x=x, w=w), torch.nn.functional.conv1d(x, w, stride=2).numpy())


# Data that are infinite or not numbers


def test_minus_infinity_as_data_gives_nan_as_torch_does() -> None:
    torch = pytest.importorskip("torch")
    x = np.array([[-inf, -inf], [-inf, 1.0], [inf, 1.0], [nan, 1.0], [1e308, -1e308]])
    got = evaluate(parse(SOFTMAX), {"X": x})["Y"]
    np.testing.assert_array_equal(got, torch.softmax(torch.tensor(x), 1).numpy())


MASKED = """
def f(X: f64[m, n], keep: bool[m, n], V: f64[n]) -> (O, L, M, Z):
    S[m, n] = where(keep[m, n], X[m, n], -inf)
    M[m] = max[n](S[m, n])
    P[m, n] = exp(S[m, n] - M[m])
    L[m] = sum[n](P[m, n])
    A[m, n] = P[m, n] / L[m]
    O[m] = sum[n](A[m, n] * V[n])
    Z[m] = M[m] + log(L[m])
"""


def test_a_wholly_masked_row_gives_zero() -> None:
    keep = np.array([[True, True, True], [True, False, False], [False, False, False]])
    x = RNG.standard_normal((3, 3))
    got = evaluate(parse(MASKED), {"X": x, "keep": keep, "V": np.array([1.0, 2.0, 3.0])})
    assert got["O"][2] == 0
    assert got["L"][2] == 0
    assert got["M"][2] == got["Z"][2] == -inf
    assert got["O"][1] == 1.0


@pytest.mark.parametrize("hidden", [inf, -inf, nan, 1e308])
def test_what_a_mask_hides_is_never_seen(hidden: float) -> None:
    keep = np.array([[True, False, False], [False, False, False]])
    x = np.array([[1.0, hidden, hidden], [hidden, hidden, hidden]])
    got = evaluate(parse(MASKED), {"X": x, "keep": keep, "V": np.array([5.0, hidden, nan])})
    np.testing.assert_array_equal(got["O"], [5.0, 0.0])


@pytest.mark.parametrize(
    ("kept", "want"),
    [
        ("S + b", 0.0),  # adding keeps the mask
        ("S * 2.0", 0.0),
        ("S / 2.0 - 1.0", 0.0),
        ("minimum(S, 50.0)", 0.0),  # so does a cap from above
        ("f32(bf16(S))", 0.0),
        ("log(exp(S))", 0.0),
        ("maximum(S, -100.0)", 1.0),  # from below it is a number like any other
        ("tanh(S / 50.0) * 50.0", 1.0),
    ],
)
def test_what_keeps_a_mask(kept: str, want: float) -> None:
    text = f"""
def f(X: f64[n], b: f64) -> O:
    M = max[n]({kept.replace("S", "where(X[n] > 9.0, X[n], -inf)")})
    O = sum[n](exp({kept.replace("S", "where(X[n] > 9.0, X[n], -inf)")} - M)) / extent(n)
"""
    assert run(text, X=np.zeros(3), b=np.float64(2.0)) == want


def test_minus_infinity_is_a_mask_only_as_a_literal_branch() -> None:
    text = """
def f(X: f64[n], low: f64) -> O:
    S[n] = where(X[n] > 9.0, X[n], {})
    O = sum[n](exp(S[n] - max[n](S[n])))
"""
    assert run(text.format("-inf"), X=np.zeros(3), low=-inf) == 0
    assert np.isnan(run(text.format("low"), X=np.zeros(3), low=-inf))


def test_empty_reductions_give_their_identity() -> None:
    text = """
def f(X: f64[n], I: u8[n], B: bool[n]) -> (s, p, h, l, i, a, b):
    s = sum[n](X[n])
    p = prod[n](X[n])
    h = max[n](X[n])
    l = min[n](X[n])
    i = max[n](I[n])
    a = any[n](B[n])
    b = all[n](B[n])
"""
    got = evaluate(parse(text), {"X": np.zeros(0), "I": np.zeros(0, int), "B": np.zeros(0, bool)})
    assert [v[()] for v in got.values()] == [0, 1, -inf, inf, -(2**31), False, True]


def test_the_first_of_equals_is_the_argmax() -> None:
    text = "def f(X: f64[m, n]) -> Y:\n    Y[m] = argmax[n](X[m, n])"
    x = np.array([[1, 3, 3], [2, 2, 2], [-inf, -inf, -inf], [0, nan, nan], [5, nan, 9]])
    np.testing.assert_array_equal(run(text, X=x), [1, 0, 0, 1, 1])
    with pytest.raises(EvaluationError, match="empty"):
        run(text, X=np.zeros((2, 0)))
    assert run(text, X=np.zeros((0, 0))).shape == (0,)


# Scans and monoids


@pytest.mark.parametrize(
    ("statement", "dtype", "want"),
    [
        ("H[t] = where(t > 0, H[t - 1], 0) + X[t]", "f32", [1, 2, 3]),
        ("H[t] = where(t > 0, H[t - 1] + 1, 0)", "i64", [0, 1, 2]),
        ("H[t] = where(t > 0, ~H[t - 1], X[t] > 5.0)", "bool", [False, True, False]),
        ("H[t] = where(t > 0, H[t - 1] + H[t - 1], X[t] > 0.0)", "i32", [1, 2, 4]),
        ("H[t] = where(t > 0, H[t - 1] / 2, 1)", "f32", [1, 0.5, 0.25]),
        ("H[t]: u8 = where(t > 0, H[t - 1] * 16, 3)", "u8", [3, 48, 0]),
        ("H[t] = where(t + 1 < extent(t), H[t + 1], 0) + X[t]", "f32", [3, 2, 1]),
        ("H[t] = where(t > 1, H[t - 2], 0) + X[t]", "f32", [1, 1, 2]),
        ("H[t] = bf16(where(t > 0, H[t - 1], 0.0) + 1.00390625)", "bf16", [1.0, 2.0, 3.0]),
    ],
)
def test_scans(statement: str, dtype: str, want: list[Any]) -> None:
    from castile.ir.types import tensor_types

    c = parse(f"def f(X: f32[t]) -> H:\n    {statement}")
    assert tensor_types(c)["H"] == dtype
    np.testing.assert_array_equal(evaluate(c, {"X": np.ones(3)})["H"], want)
    assert evaluate(c, {"X": np.ones(0)})["H"].shape == (0,)


def test_a_scan_is_sampled_along_its_span_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A state too large to hold is computed only for the sampled heads, and no further than the sampled step."""
    from castile.ir import evaluate as module

    text = """
def f(K: f64[b, t, d], V: f64[b, t, e], a: f64[t]) -> O:
    H[b, t, d, e] = where(t > 0, a[t] * H[b, t - 1, d, e], 0) + K[b, t, d] * V[b, t, e]
    O[b, t, e] = sum[d](H[b, t, d, e])
"""
    c = parse(text)
    inputs = {"K": RNG.random((5, 9, 3)), "V": RNG.random((5, 9, 7)), "a": RNG.random(9)}
    whole = evaluate(c, inputs)["O"]
    monkeypatch.setattr(module, "SCAN_BYTES", 0)
    made = []
    empty = module.Oracle._empty
    monkeypatch.setattr(module.Oracle, "_empty", lambda self, dtype, box: made.append(box) or empty(self, dtype, box))
    at = {"b": [4, 0], "t": [8, 3], "e": [6, 2]}
    close(evaluate(c, inputs, at)["O"], whole[at["b"], at["t"], at["e"]])
    assert ((4, 5), (0, 9), (0, 3), (6, 7)) in made
    assert ((0, 1), (0, 4), (0, 3), (2, 3)) in made


MONOIDS = """
@monoid(identity=(-inf, 0.0))
def lse(m, l, n, s) -> (M, L):
    M = maximum(m, n)
    L = l * exp(m - M) + s * exp(n - M)

def f(X: f64[q, k], W: f64[k, f]) -> (M, L):
    (M[q], L[f, q]) = lse[k](X[q, k], W[k, f])
"""


@pytest.mark.parametrize("shape", [(3, 5, 4), (3, 0, 4), (3, 5, 0), (0, 5, 4)])
def test_components_of_a_state_have_their_own_ranks(shape: tuple[int, int, int]) -> None:
    q, k, f = shape
    x, w = RNG.standard_normal((q, k)), RNG.random((k, f))
    got = evaluate(parse(MONOIDS), {"X": x, "W": w})
    m = x.max(1, initial=-inf)
    np.testing.assert_array_equal(got["M"], m)
    close(got["L"], np.einsum("qk,kf->fq", np.exp(x - np.where(k, m, 0)[:, None]), w))


def test_elements_take_the_type_of_the_state() -> None:
    text = """
@monoid(identity=0.0)
def latest(a, b) -> c:
    c = abs(b)

def f(I: i64[k]) -> Y:
    Y = latest[k](I[k])
"""
    assert run(text, I=np.array([1, -(2**33)])) == 2.0**33


# Indices


def test_the_untaken_branch_is_never_read_out_of_bounds() -> None:
    text = "def f(X: f32[n], t: i32[m]) -> Y:\n    Y[m] = where((t[m] >= 0) & (t[m] < extent(n)), X[t[m]], 7.0)"
    np.testing.assert_array_equal(run(text, X=[1.0, 2.0], t=[0, -5, 1, 2**31 - 1]), [1, 7, 2, 7])
    text = "def f(X: f32[n]) -> Y:\n    Y[n] = where(n % 2 == 0, 1 // (n - 1 + n % 2), 0) + 0 * X[n]"
    np.testing.assert_array_equal(run(text, X=np.zeros(4)), [-1, 0, 1, 0])
    text = "def f(X: f32[n, k]) -> Y:\n    Y[n] = where(extent(k) > 0, argmax[k](X[n, k]), -1)"
    np.testing.assert_array_equal(run(text, X=np.zeros((2, 0))), [-1, -1])


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("Y[n] = X[n] + X[n - 1 + 0 * n]", "`X` is read at -1 along axis 0, which has extent 3"),
        ("Y[m] = X[t[m]]", "`X` is read at 3 along axis 0"),
        ("Y[m] = X[1 << 62] + 0 * t[m]", f"`X` is read at {1 << 62} along axis 0"),
        ("Y[m] = t[m] // (t[m] - 3)", "an integer is divided by zero in `//`"),
        ("Y[m] = t[m] % (t[m] - 3)", "an integer is divided by zero in `%`"),
        ("Y[m] = t[m] << (t[m] + 61)", "shifts by less than 0 or more than 63 bits"),
        ("Y[m] = t[m] >> (t[m] - 9)", "shifts by less than 0 or more than 63 bits"),
    ],
)
def test_what_means_nothing_is_an_error(body: str, message: str) -> None:
    c = parse(f"def f(X: f32[n], t: i64[m]) -> Y:\n    {body}")
    for at in (None, [[0], [1], [2]]):
        with pytest.raises(EvaluationError) as caught:
            evaluate(c, {"X": np.ones(3), "t": np.array([0, 1, 3])}, at)
        assert message in str(caught.value)
        assert "hint:" in str(caught.value)
        assert caught.value.loc is not None


def test_dead_statements_are_not_computed() -> None:
    text = "def f(X: f32[n]) -> Y:\n    A[n] = X[n + 5 + 0 * n]\n    B[n] = A[n] // 0\n    Y[n] = X[n]"
    np.testing.assert_array_equal(run(text, X=[1.0, 2.0]), [1, 2])


def test_results_come_in_the_order_of_the_signature() -> None:
    c = parse("def f(x: f32) -> (B, A):\n    A = x\n    B = x + 1")
    assert list(evaluate(c, {"x": 1.0})) == ["B", "A"]


def test_every_error_is_castiles() -> None:
    assert issubclass(EvaluationError, CastileError)
    assert isinstance(parse(SOFTMAX), Cascade)


def test_samples_of_a_row_share_its_reductions(monkeypatch: pytest.MonkeyPatch) -> None:
    c = parse("def softmax(X: f32[m, n]) -> Y:\n    Y[m, n] = exp(X[m, n]) / sum[n](exp(X[m, n]))\n")
    x = RNG.standard_normal((3, 50))
    whole = evaluate(c, {"X": x})["Y"]
    rows: list[object] = []
    reduce = Oracle.reduce

    def counted(self: Oracle, *args: Any) -> Any:
        rows.append(args)
        return reduce(self, *args)

    monkeypatch.setattr(Oracle, "reduce", counted)
    m, n = np.arange(90) % 3, np.arange(90) % 50
    close(evaluate(c, {"X": x}, at={"m": m, "n": n})["Y"], whole[m, n])
    assert len(rows) == 3
