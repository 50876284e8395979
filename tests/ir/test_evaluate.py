"""The oracle where others can say the same, and the parts of its meaning that design.md spells out."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy import inf, nan

from castile.ir.cascade import Cascade
from castile.ir.errors import CastileError, EvaluationError, InputError
from castile.ir.evaluate import evaluate, evaluate_values
from castile.ir.parse import parse

RNG = np.random.default_rng(0)


def run(text: str, at: Any = None, **inputs: Any) -> Any:
    """The first result of a cascade given by its statements, with a signature for the inputs."""
    found = evaluate(parse(text), inputs, at)
    return next(iter(found.values()))


def one(expression: str, params: str, **inputs: Any) -> Any:
    """The value of a scalar expression."""
    return run(f"def f({params}) -> Y:\n    Y = {expression}", **inputs)[()]


def close(a: Any, b: Any) -> None:
    np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)


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


# Types


@pytest.mark.parametrize(
    ("expression", "params", "inputs", "want"),
    [
        ("a * a", "a: i32", {"a": 1 << 20}, 0),
        ("a + 1", "a: i32", {"a": 2**31 - 1}, -(2**31)),
        ("a + a", "a: i8", {"a": 127}, 254),  # narrow integers compute in i32
        ("i8(a + a)", "a: i8", {"a": 127}, -2),
        ("u8(a)", "a: i32", {"a": -1}, 255),
        ("a - 1", "a: u32", {"a": 0}, 2**32 - 1),
        ("a - b", "a: u32, b: i32", {"a": 0, "b": 1}, -1),  # u32 with a signed type is i64
        ("-a", "a: u32", {"a": 1}, 2**32 - 1),
        ("~a", "a: u32", {"a": 0}, 2**32 - 1),
        ("~a", "a: i32", {"a": 5}, -6),
        ("a << 31", "a: i32", {"a": 3}, -(2**31)),
        ("a << 40", "a: i32", {"a": 3}, 0),
        ("a >> 1", "a: i32", {"a": -3}, -2),
        ("a >> 1", "a: u32", {"a": 2**32 - 1}, 2**31 - 1),
        ("a // b", "a: i64, b: i64", {"a": -7, "b": 2}, -4),
        ("a % b", "a: i64, b: i64", {"a": -7, "b": 3}, 2),
        ("a % b", "a: i64, b: i64", {"a": 7, "b": -3}, -2),
        ("a // b", "a: i32, b: i32", {"a": -(2**31), "b": -1}, -(2**31)),
        ("abs(a)", "a: i64", {"a": -(2**63)}, -(2**63)),
        ("a ** 3", "a: i32", {"a": 1 << 11}, 0),
        ("a / b", "a: i64, b: i64", {"a": 7, "b": 2}, 3.5),
        ("round(a) & 3", "a: i64", {"a": (1 << 60) + 7}, 3),  # of an integer, itself
        ("floor(a) + 1", "a: i64", {"a": (1 << 60) + 1}, (1 << 60) + 2),
        ("round(a)", "a: f64", {"a": 2.5}, 2.0),
        ("round(a)", "a: f64", {"a": -3.5}, -4.0),
        ("a // b", "a: f64, b: f64", {"a": -7.5, "b": 2.0}, -4.0),
        ("a + b", "a: bool, b: bool", {"a": True, "b": True}, 2),
        ("a & b", "a: bool, b: bool", {"a": True, "b": False}, False),
        ("~a", "a: bool", {"a": True}, False),
        ("a < b", "a: i8, b: f64", {"a": 3, "b": 3.5}, True),
        ("i32(a)", "a: f64", {"a": -3.9}, -3),
        ("i32(a)", "a: f64", {"a": 1e300}, 2**31 - 1),
        ("i32(a)", "a: f64", {"a": nan}, 0),
        ("i64(a)", "a: f64", {"a": inf}, 2**63 - 1),
        ("i64(a)", "a: f64", {"a": -inf}, -(2**63)),
        ("u8(a)", "a: f64", {"a": -5.0}, 0),
        ("u8(a)", "a: f64", {"a": 300.0}, 255),
        ("bool(a)", "a: f64", {"a": nan}, True),
        ("bool(a)", "a: i64", {"a": 1 << 62}, True),
        ("f32(a)", "a: bool", {"a": True}, 1.0),
        ("f8e4m3(a)", "a: f64", {"a": 460.0}, 448.0),
        ("f8e5m2(a)", "a: f64", {"a": 1e9}, inf),
        ("1 << 62", "a: f32", {"a": 0.0}, 1 << 62),
        ("where(a > 0, 1, 2.5)", "a: f32", {"a": 1.0}, 1.0),
        ("0.1 + 0.2", "a: f32", {"a": 0.0}, 0.1 + 0.2),
    ],
)
def test_types(expression: str, params: str, inputs: dict[str, Any], want: Any) -> None:
    got = one(expression, params, **inputs)
    assert got == want
    assert isinstance(got, np.floating) == isinstance(want, float)
    assert isinstance(got, np.bool_) == isinstance(want, bool)


def test_not_a_number_comes_out_of_what_makes_none() -> None:
    for expression in ("f8e4m3(a * 1000.0)", "sqrt(-a)", "log(-a)", "a % 0.0", "a * inf - a * inf"):
        assert np.isnan(one(expression, "a: f64", a=3.0)), expression


def test_declared_types_convert() -> None:
    text = "def f(X: f64[n]) -> (A, B, C):\n    A[n]: i8 = X[n]\n    B[n]: bf16 = X[n]\n    C[n]: u32 = i64(X[n])"
    got = evaluate(parse(text), {"X": [1.7, -300.0, 1.00390625]})
    np.testing.assert_array_equal(got["A"], [1, -128, 1])
    np.testing.assert_array_equal(got["B"], [1.703125, -300.0, 1.0])
    np.testing.assert_array_equal(got["C"], [1, 2**32 - 300, 1])


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


# Inputs


GEMV = (
    "def gemv(A: bf16[m, k], x: f32[k], s: f32, i: i8[m], keep: bool[m]) -> Y:\n    Y[m] = s * sum[k](A[m, k] * x[k])"
)
GOOD: dict[str, Any] = {"A": np.ones((2, 3)), "x": np.ones(3), "s": 2.0, "i": [1, 2], "keep": [True, False]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"A": None}, "`A` is missing"),
        ({"Z": 1.0}, "`gemv` has no parameter `Z`"),
        ({"A": np.ones(3)}, "`A` has 1 axis, not 2"),
        ({"x": np.ones(4)}, "rank `k` has two extents: 3 by axis 1 of `A`, 4 by axis 0 of `x`"),
        ({"s": np.ones(1)}, "`s` has 1 axis, not 0"),
        ({"x": "abc"}, "`x` is no array of real numbers"),
        ({"x": ["a", "b", "c"]}, "`x` is no array of real numbers"),
        ({"x": [[1.0], [2.0, 3.0]]}, "`x` is no array of numbers"),
        ({"x": np.array([None, 1.0, 2.0])}, "`x` is no array of real numbers"),
        ({"x": np.ones(3, complex)}, "`x` is no array of real numbers"),
        ({"x": np.ones(3, "datetime64[s]")}, "`x` is no array of real numbers"),
        ({"x": np.zeros(3, [("a", "f4")])}, "`x` is no array of real numbers"),
        ({"s": object()}, "`s` is no array of real numbers"),
        ({"s": {}}, "`s` is no array of real numbers"),
        ({"i": [1.5, 2.0]}, "`i` holds values that are no integers"),
        ({"i": [nan, 2.0]}, "`i` holds values that are no integers"),
        ({"i": [1, 128]}, "`i` holds values outside i8"),
        ({"i": np.array([1, 2**64 - 1], np.uint64)}, "`i` holds values outside i8"),
        ({"keep": [0, 2]}, "`keep` holds values outside bool"),
    ],
)
def test_inputs_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    inputs = {k: v for k, v in {**GOOD, **change}.items() if v is not None}
    with pytest.raises(InputError) as caught:
        evaluate(parse(GEMV), inputs)
    assert message in str(caught.value)
    assert caught.value.hint or (caught.value.expected and caught.value.got)


def test_inputs_that_are_no_mapping() -> None:
    with pytest.raises(InputError, match="inputs map parameter names"):
        evaluate(parse(GEMV), [1.0])  # type: ignore[arg-type]


def test_inputs_of_every_kind() -> None:
    c = parse(GEMV)
    want = evaluate(c, GOOD)["Y"]
    torch = pytest.importorskip("torch")
    others: dict[str, list[Any]] = {
        "A": [np.ones((2, 3), np.float16), np.ones((2, 3), ml_dtypes.bfloat16), np.ones((2, 3), int), torch.ones(2, 3),
              torch.ones(2, 3, dtype=torch.bfloat16, requires_grad=True), torch.ones(3, 2).T, [[1, 1, 1], [1, 1, 1]]],
        "s": [2, np.float32(2), torch.tensor(2.0), np.array(2.0), True + 1],
        "i": [np.array([1.0, 2.0]), torch.tensor([1, 2]), np.array([1, 2], np.uint64)],
        "keep": [[1, 0], np.array([1.0, 0.0]), torch.tensor([True, False])],
    }  # fmt: skip
    for name, values in others.items():
        for value in values:
            np.testing.assert_array_equal(evaluate(c, {**GOOD, name: value})["Y"], want)


def test_inputs_are_rounded_to_narrow_types() -> None:
    text = "def f(A: bf16[n], B: f8e4m3[n], C: f32[n]) -> Y:\n    Y[n] = A[n] + B[n] + C[n]"
    x = np.array([0.1])
    a, b = x.astype(ml_dtypes.bfloat16), x.astype(ml_dtypes.float8_e4m3fn)
    assert run(text, A=x, B=x, C=x) == a.astype(float) + b.astype(float) + x


@pytest.mark.parametrize(
    ("at", "message"),
    [
        ({"m": [0]}, "gives no coordinates for rank `n`"),
        ({"m": [0], "n": [0], "k": [0]}, "no output has rank `k`"),
        ({"m": [0, 1], "n": [0, 1, 2]}, "the coordinates of `m` do not fit"),
        ({"m": [0.5], "n": [0]}, "the coordinates of `m` do not fit"),
        ({"m": [[0]], "n": [0]}, "the coordinates of `m` do not fit"),
        ({"m": [True], "n": [0]}, "the coordinates of `m` do not fit"),
        ({"m": [2], "n": [0]}, "a coordinate of `m` lies outside its extent"),
        ({"m": [-1], "n": [0]}, "a coordinate of `m` lies outside its extent"),
        ([0, 0], "`at` does not fit the outputs"),
        ([[0, 0, 0]], "`at` does not fit the outputs"),
        ([[0, 0], [0]], "`at` is no array"),
        ("mn", "`at` does not fit the outputs"),
        ({"m": "a", "n": 0}, "the coordinates of `m` do not fit"),
    ],
)
def test_samples_that_do_not_fit(at: Any, message: str) -> None:
    c = parse("def f(A: f32[m, k], B: f32[k, n]) -> C:\n    C[m, n] = sum[k](A[m, k] * B[k, n])")
    with pytest.raises(InputError) as caught:
        evaluate(c, {"A": np.ones((2, 3)), "B": np.ones((3, 4))}, at)
    assert message in str(caught.value)


def test_samples_of_every_kind() -> None:
    c = parse(
        "def f(A: f32[m], B: f32[n]) -> (C, D, s):\n    C[m, n] = A[m] * B[n]\n    D[n] = B[n]\n    s = sum[m](A[m])"
    )
    inputs = {"A": np.arange(3.0), "B": np.arange(4.0) + 1}
    for at in ({"m": [1, 2], "n": 3}, {"n": [3, 3], "m": np.array([1, 2], np.uint8)}, [[1, 3], [2, 3]]):
        got = evaluate(c, inputs, at)
        assert list(got) == ["C", "D", "s"]
        np.testing.assert_array_equal(got["C"], [4, 8])
        np.testing.assert_array_equal(got["D"], [4, 4])
        np.testing.assert_array_equal(got["s"], [3, 3])
    for at in ({"m": [], "n": []}, np.zeros((0, 2), int), {"m": [], "n": [1]}):
        assert [v.shape for v in evaluate(c, inputs, at).values()] == [(0,), (0,), (0,)]


# Size and depth


def test_samples_of_a_deep_cascade() -> None:
    """A sample recurses through every Einsum, far deeper than Python's own limit."""
    lines = [f"    X{i + 1}[k] = X{i}[k] + 1" for i in range(2000)]
    c = parse("def f(X0: f32[k]) -> X2000:\n" + "\n".join(lines))
    assert evaluate(c, {"X0": np.zeros(3)}, {"k": [1]})["X2000"] == 2000


def test_deep_expressions() -> None:
    for deep in ("exp(" * 98 + "X[k]" + ")" * 98, "-" * 98 + "X[k]", "X[k]" + " + 1" * 98):
        c = parse(f"def f(X: f64[k]) -> Y:\n    Y[k] = {deep}")
        assert evaluate(c, {"X": np.zeros(2)}, {"k": [1]})["Y"].shape == (1,)
        assert evaluate(c, {"X": np.zeros(2)})["Y"].shape == (2,)


def test_a_large_sample_takes_little_memory() -> None:
    """One element of a product of large matrices, and of attention over many keys, in well under a second each."""
    n = 2000
    a = RNG.standard_normal((n, n)).astype(np.float32)
    c = parse(
        "def f(A: f32[m, k], B: f32[k, n]) -> C:\n    D[m, n] = sum[k](A[m, k] * B[k, n])\n    C[m, n] = exp(D[m, n])"
    )
    got = evaluate(c, {"A": a, "B": a}, {"m": [7], "n": [1999]})["C"]
    close(got, np.exp(np.sum(a[7].astype(float) * a[:, 1999])))


def test_what_is_too_large_to_hold_is_refused() -> None:
    c = parse("def f(A: f32[m], B: f32[n]) -> C:\n    C[m, n] = A[m] * B[n]")
    wide = np.broadcast_to(np.float32(1), 1 << 20)
    with pytest.raises(EvaluationError, match="too many to hold") as caught:
        evaluate(c, {"A": wide, "B": wide})
    assert "sample" in caught.value.hint
    assert evaluate(c, {"A": wide, "B": wide}, {"m": [1 << 19], "n": [3]})["C"] == 1


def test_reductions_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is computed in many small blocks is what is computed at once."""
    from castile.ir import blocks

    text = """
def f(X: f32[a, b, c], keep: bool[a, b, c], I: i32[a, b, c]) -> (S, P, M, N, G, H, A, B, D):
    S[a] = sum[b, c](exp(where(keep[a, b, c], X[a, b, c], -inf)))
    P[a] = prod[b, c](X[a, b, c])
    M[a] = max[b, c](where(keep[a, b, c], X[a, b, c], -inf))
    N[a] = min[c](sum[b](X[a, b, c]))
    G[a] = sum[b, c](I[a, b, c] * 1000000007)
    H[a] = argmax[c](X[a, 0, c])
    A[a] = any[b, c](keep[a, b, c])
    B[a] = all[b](any[c](keep[a, b, c]))
    D[a, c] = max[b](X[a, b, c]) - min[b](X[a, b, c])
"""
    c = parse(text)
    inputs = {
        "X": RNG.standard_normal((3, 5, 7)).astype(np.float32),
        "keep": RNG.random((3, 5, 7)) < 0.3,
        "I": RNG.integers(-9, 9, (3, 5, 7)),
    }
    inputs["keep"][1] = False
    want = evaluate_values(c, inputs, track=True)
    for block in (1, 3, 16):
        monkeypatch.setattr(blocks, "BLOCK", block)
        got = evaluate_values(c, inputs, track=True)
        for name in want:
            close(got[name].array, want[name].array)
            np.testing.assert_array_equal(*np.broadcast_arrays(got[name].flag(), want[name].flag()))
            a, b = np.broadcast_arrays(got[name].slack(), want[name].slack())
            np.testing.assert_allclose(a, b, rtol=0.5, atol=1e-30)


def test_results_come_in_the_order_of_the_signature() -> None:
    c = parse("def f(x: f32) -> (B, A):\n    A = x\n    B = x + 1")
    assert list(evaluate(c, {"x": 1.0})) == ["B", "A"]


def test_inputs_are_not_changed() -> None:
    c = parse("def f(X: bf16[n]) -> Y:\n    Y[n] = X[n] * 2")
    x = np.array([0.1, 0.2])
    kept = x.copy()
    y = evaluate(c, {"X": x})["Y"]
    y += 1
    np.testing.assert_array_equal(x, kept)


def test_every_error_is_castiles() -> None:
    assert issubclass(EvaluationError, CastileError)
    assert isinstance(parse(SOFTMAX), Cascade)
