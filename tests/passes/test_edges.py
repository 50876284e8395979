"""Derived streams where arithmetic is thin: masked rows, infinities under masks, huge scores, large offsets."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from test_trees import rng_of
from trees import tree_evaluate

import castile
from castile.ir.cascade import Cascade
from castile.ir.evaluate import evaluate
from castile.ir.mapping import GAUGES, Mapping
from castile.passes.derive import Derivation, derive

PRECISIONS = ("f64", "f32")

MASKED = {
    "attention": """
def f(S: f32[q, k], V: f32[k, f], keep: bool[q, k]) -> O:
    X[q, k] = where(keep[q, k], S[q, k], -inf)
    M[q] = max[k](X[q, k])
    P[q, k] = exp(X[q, k] - M[q])
    L[q] = sum[k](P[q, k])
    O[q, f] = sum[k](P[q, k] / L[q] * V[k, f])
""",
    "powers of two": """
def f(S: f32[q, k], V: f32[k, f], keep: bool[q, k]) -> O:
    X[q, k] = where(keep[q, k], S[q, k], -inf)
    P[q, k] = exp2(1.25 * X[q, k] - max[k](1.25 * X[q, k]))
    O[q, f] = sum[k](P[q, k] * V[k, f]) / sum[k](P[q, k])
""",
    "scaled after the mask, by what is positive": """
def f(S: f32[q, k], V: f32[k, f], keep: bool[q, k]) -> O:
    X[q, k] = abs(V[0, 0]) * where(keep[q, k], S[q, k], -inf)
    P[q, k] = exp(X[q, k] - max[k](X[q, k]))
    O[q, f] = sum[k](P[q, k] * V[k, f]) / sum[k](P[q, k])
""",
    "scaled after the mask, by what turns out to be positive": """
def f(S: f32[q, k], V: f32[k, f], keep: bool[q, k]) -> O:
    X[q, k] = where(keep[q, k], S[q, k], -inf)
    P[q, k] = exp((X[q, k] - max[k](X[q, k])) / (V[0, 0] + 9.0))
    O[q, f] = sum[k](P[q, k] * V[k, f]) / sum[k](P[q, k])
""",
    "row sum of a product, centred": """
def f(S: f32[q, k], V: f32[k, f], keep: bool[q, k]) -> O:
    X[q, k] = where(keep[q, k], S[q, k], -inf)
    M[q] = max[k](X[q, k])
    P[q, k] = exp(X[q, k] - M[q])
    A[q, k] = P[q, k] / sum[k](P[q, k])
    D[q] = sum[k](A[q, k] * S[q, k])
    O[q, f] = sum[k](A[q, k] * (S[q, k] - D[q]) * V[k, f])
""",
    "dropout of a centred product": """
def f(S: f32[q, k], V: f32[k, f], keep: bool[q, k]) -> O:
    M[q] = max[k](S[q, k])
    P[q, k] = exp(S[q, k] - M[q])
    A[q, k] = P[q, k] / sum[k](P[q, k])
    D[q] = sum[k](where(keep[q, k], A[q, k] * S[q, k], 0.0))
    O[q, f] = sum[k](A[q, k] * (where(keep[q, k], S[q, k], 0.0) - D[q]) * V[k, f])
""",
    "masked mean and variance": """
def f(S: f32[q, k], V: f32[k, f], keep: bool[q, k]) -> (mu, var):
    n[q] = maximum(sum[k](where(keep[q, k], 1.0, 0.0)), 1.0)
    mu[q] = sum[k](where(keep[q, k], S[q, k], 0.0)) / n[q]
    var[q] = sum[k](where(keep[q, k], (S[q, k] - mu[q]) ** 2, 0.0)) / n[q]
""",
}


@cache
def masked(name: str, gauge: str) -> tuple[Cascade, Derivation]:
    c = castile.parse(MASKED[name])
    return c, derive(c, gauge=gauge)


def drawn(rng: np.random.Generator, queries: int = 4, keys: int = 7) -> dict[str, Any]:
    keep = rng.random((queries, keys)) < 0.6
    keep[1] = False
    keep[2] = True
    keep[:, 3] = False
    return {
        "S": np.float32(rng.standard_normal((queries, keys))),
        "V": np.float32(rng.standard_normal((keys, 2))),
        "keep": keep,
    }


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("gauge", GAUGES)
@pytest.mark.parametrize("name", MASKED)
def test_rows_that_are_wholly_masked(name: str, gauge: str, precision: str) -> None:
    c, d = masked(name, gauge)
    slack = 1e-12 if precision == "f64" else 1e-5
    for seed in range(6):
        rng = rng_of(name, gauge, precision, seed)
        given = drawn(rng)
        want = evaluate(c, given)
        for output, got in tree_evaluate(d.cascade, given, rng, precision).items():
            assert np.isfinite(want[output]).all()
            np.testing.assert_allclose(got, want[output], rtol=slack, atol=slack, err_msg=output)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("gauge", GAUGES)
def test_what_a_mask_leaves_out_may_be_infinite(gauge: str, precision: str) -> None:
    """Key 3 is masked for every query: its value and its score do not matter, whatever they are."""
    c, d = masked("attention", gauge)
    for seed, odd in enumerate((np.inf, -np.inf, np.nan)):
        rng = rng_of(gauge, precision, seed)
        given = drawn(rng)
        given["keep"][2, 3] = False
        want = evaluate(c, given)["O"]
        given["V"][3] = odd
        given["S"][:, 3] = odd
        got = tree_evaluate(d.cascade, given, rng, precision)["O"]
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


GATHERED = """
def f(S: f32[q, j], I: i32[q, j], D: f32[q], W: f32[k]) -> O:
    M[q] = max[j](S[q, j])
    P[q, j] = exp(S[q, j] - M[q])
    L[q] = sum[j](P[q, j])
    O[k] = W[k] * {}
"""


@pytest.mark.parametrize("gauge", GAUGES)
@pytest.mark.parametrize(
    "value",
    [
        "sum[q, j](where(I[q, j] == k, P[q, j] / L[q] * D[q], 0.0))",
        "sum[q](where(I[q, 0] == k, D[q] * sum[j](where(I[q, j] == k, P[q, j] / L[q], 0.0)), 0.0))",
    ],
)
def test_what_a_query_did_not_choose_may_be_infinite(value: str, gauge: str) -> None:
    """Data leave a term out of the sum of exponentials that is divided and not out of the divisor."""
    c = castile.parse(GATHERED.format(value))
    d = derive(c, gauge=gauge)
    chosen = np.array([[0, 0], [1, 1]])
    for odd in (np.nan, np.inf, -np.inf):
        for name in ("S", "D"):
            given = {"S": np.zeros((2, 2)), "I": chosen, "D": np.ones(2), "W": np.full(2, 3.0)}
            given[name][0] = odd
            assert evaluate(c, given)["O"][1] == 3
            assert tree_evaluate(d.cascade, given, rng_of(value, gauge, name), "f64")["O"][1] == 3


TOGETHER = """
def f(X: f32[n, k], V: f32[k], s: f32[n], w: f32[n]) -> O:
    M[n] = max[k](X[n, k])
    T[n] = maximum(s[n], M[n])
    P[n, k] = exp(X[n, k] - T[n])
    O[n] = w[n] * (sum[k](P[n, k] * V[k]) * exp(s[n] - T[n]) - sum[k](P[n, k]))
"""


@pytest.mark.parametrize("gauge", GAUGES)
def test_a_sum_of_exponentials_all_of_which_are_0(gauge: str) -> None:
    """Two sums, brought to the greater of their scales: where the data are -inf there is no greater one."""
    c = castile.parse(TOGETHER)
    given = {"X": np.array([[-np.inf] * 3, [0.0] * 3]), "V": np.full(3, 2.0), "s": np.zeros(2), "w": np.full(2, 3.0)}
    assert evaluate(c, given)["O"].tolist() == [0, 9]
    got = tree_evaluate(derive(c, gauge=gauge).cascade, given, rng_of(gauge), "f64")["O"]
    np.testing.assert_allclose(got, [0, 9], rtol=1e-12)


SCALED = """
def f(S: f32[q, j], I: i32[q, j], D: f32[q], W: f32[k], scale: f32) -> O:
    P[q, j] = exp(S[q, j] - max[j](S[q, j]))
    A[q, j] = P[q, j] / sum[j](P[q, j])
    O[k] = {}
"""


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "value",
    [
        "sum[q, j](where(I[q, j] == k, A[q, j] * scale * D[q], 0.0))",
        "sum[q, j](where(I[q, j] == k, A[q, j] / (1 - scale) * D[q], 0.0))",
        "sum[q](where(q > k, P[q, 0] * scale, 0.0))",
    ],
)
def test_a_scale_may_be_infinite_where_nothing_is_scaled(value: str, odd: float) -> None:
    c = castile.parse(SCALED.format(value))
    chosen = np.array([[0, 0], [0, 0]])
    given = {"S": np.zeros((2, 2)), "I": chosen, "D": np.ones(2), "scale": odd, "W": np.ones(2)}
    assert evaluate(c, given)["O"][1] == 0
    assert tree_evaluate(derive(c).cascade, given, rng_of(value, odd), "f64")["O"][1] == 0


HUGE = """
def f(X: f32[n, k], V: f32[k]) -> (lse, Y):
    M[n] = max[k](X[n, k])
    P[n, k] = exp(X[n, k] - M[n])
    L[n] = sum[k](P[n, k])
    lse[n] = M[n] + log(L[n])
    Y[n] = sum[k](P[n, k] / L[n] * V[k])
"""


@pytest.mark.parametrize("gauge", GAUGES)
@pytest.mark.parametrize("centre", [1e5, -1e5, 3e4, 0.0, 1e6, -1e7, 1e8, 7e8, -1e12, 1e30])
def test_scores_of_any_size(gauge: str, centre: float) -> None:
    """What is subtracted from an exponent is subtracted exactly: a few rounding steps of the result are left."""
    c = castile.parse(HUGE)
    d = derive(c, gauge=gauge)
    for seed in range(4):
        rng = rng_of(gauge, centre, seed)
        spread = 1e5 - abs(centre) if seed % 2 else 8.0
        x = np.float32(centre + rng.standard_normal((3, 40)) * max(spread / 4, 2.0))
        given = {"X": x, "V": np.float32(rng.standard_normal(40))}
        want, got = evaluate(c, given), tree_evaluate(d.cascade, given, rng, "f32")
        np.testing.assert_allclose(got["lse"], want["lse"], rtol=3e-7, atol=1e-6)
        np.testing.assert_allclose(got["Y"], want["Y"], rtol=0, atol=2e-5)


CENTRED = """
def f(X: f32[n, k], Z: f32[n, k], W: f32[k, j]) -> (var, G, r, wvar):
    mu[n] = sum[k](X[n, k]) / extent(k)
    mz[n] = sum[k](Z[n, k]) / extent(k)
    var[n] = sum[k]((X[n, k] - mu[n]) ** 2) / extent(k)
    vz[n] = sum[k]((Z[n, k] - mz[n]) ** 2) / extent(k)
    G[n, j] = sum[k]((X[n, k] - mu[n]) * rsqrt(var[n]) * W[k, j])
    r[n] = sum[k]((X[n, k] - mu[n]) * (Z[n, k] - mz[n])) / extent(k) * rsqrt(var[n] * vz[n])
    M[n] = max[k](Z[n, k])
    E[n, k] = exp(Z[n, k] - M[n])
    m[n] = sum[k](E[n, k] * X[n, k]) / sum[k](E[n, k])
    wvar[n] = sum[k](E[n, k] * (X[n, k] - m[n]) ** 2) / sum[k](E[n, k])
"""


@pytest.mark.parametrize("gauge", GAUGES)
@pytest.mark.parametrize(
    ("offset", "scale"), [(1e3, 1.0), (1e4, 1.0), (-1e4, 1.0), (1e4, 30.0), (0.0, 1e4), (0.0, 30.0)]
)
def test_centred_sums_survive_offsets(gauge: str, offset: float, scale: float) -> None:
    """In float32, one pass: the expanded formulas would have lost every digit."""
    c = castile.parse(CENTRED)
    d = derive(c, gauge=gauge)
    assert d.passes["k"] == 1
    for seed in range(3):
        rng = rng_of(gauge, offset, scale, seed)
        x, z = (np.float32(rng.standard_normal((3, 33)) * scale + offset) for _ in range(2))
        given = {"X": x, "Z": z, "W": np.float32(rng.standard_normal((33, 2)))}
        want, got = evaluate(c, given), tree_evaluate(d.cascade, given, rng, "f32")
        # Merging in a random order rounds each mean some 33 times; offset / spread of it reaches the differences.
        lost = 33 * 2.0**-24 * (1 + abs(offset) / scale)
        for output, value in got.items():
            size = np.maximum(np.abs(want[output]), 1.0 if output in ("G", "r") else 1e-30)
            assert np.all(np.abs(value - want[output]) <= (lost * 4 + 1e-4) * size), output


GUARDED = """
def f(X: f32[k], place: i32[k], T: f32[n]) -> (Y, Z):
    Y[k] = where((place[k] >= 0) & (place[k] < extent(n)), where(T[place[k]] > 0.0, X[k], 0.0), 0.0)
    Z = sum[k](where((place[k] >= 0) & (place[k] < extent(n)), where(T[place[k]] > 0.0, X[k], 0.0), 0.0))
"""


@pytest.mark.parametrize("level", ["none", "defer", "full"])
def test_a_condition_reads_only_where_those_around_it_let_it(level: str) -> None:
    c = castile.parse(GUARDED)
    given = {"X": np.ones(4), "place": np.array([0, 5, -7, 1]), "T": np.array([1.0, -1.0])}
    want, got = evaluate(c, given), evaluate(derive(c, level).cascade, given)
    assert want["Y"].tolist() == got["Y"].tolist() == [1, 0, 0, 0]
    assert want["Z"] == got["Z"] == 1


ROUNDED = """
def f(S: {1}[q, k], V: f32[k, f], keep: bool[q, k]) -> O:
    X[q, k]: {0} = where(keep[q, k], S[q, k], -inf)
    M[q] = max[k](X[q, k])
    P[q, k] = exp(X[q, k] - M[q])
    O[q, f] = sum[k](P[q, k] / sum[k](P[q, k]) * V[k, f])
"""


@pytest.mark.parametrize("gauge", GAUGES)
@pytest.mark.parametrize("dtype", ["f64", "f32", "bf16", "f16", "f8e5m2"])
def test_a_mask_passes_a_rounding(dtype: str, gauge: str) -> None:
    c = castile.parse(ROUNDED.format(dtype, "f64" if dtype == "f64" else "f32"))
    rng = rng_of(dtype, gauge)
    given = drawn(rng)
    want, got = evaluate(c, given)["O"], tree_evaluate(derive(c, gauge=gauge).cascade, given, rng, "f64")["O"]
    assert not want[1].any()
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9)


WIDTHS = """
def f(A: i32[j], B: i32[j], D: i8[j]) -> (Y1, Y2, Y3, Y4, Y5, Y6, Y7, Y8):
    Y1[j] = A[j] - (B[j] + j)
    Y2[j] = (A[j] + j) + (B[j] - j)
    Y3[j] = (A[j] + j) * 3
    Y4[j] = (A[j] + j) * 3 - 3 * j
    Y5[j] = f32((A[j] + j) + B[j])
    Y6[j] = where((A[j] + j) + (B[j] - j) > 2147483647, 1, 0)
    Y7[j] = (A[j] + j) - (j - 2147483647)
    Y8[j] = (D[j] + j) * 1000000000 - j * 1000000000
"""


@pytest.mark.parametrize("level", ["none", "full"])
def test_integers_keep_the_width_in_which_they_were_added(level: str) -> None:
    c = castile.parse(WIDTHS)
    a = np.array([2**31 - 1, -(2**31), 5, 2**31 - 1], "i4")
    given = {"A": a, "B": a[::-1].copy(), "D": np.array([127, -128, 3, 100], "i1")}
    want, got = evaluate(c, given), evaluate(derive(c, level).cascade, given)
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)


@pytest.mark.parametrize("level", ["none", "full"])
@pytest.mark.parametrize("bias", ["-1.0 * k", "2.0 * k"])
def test_a_float_that_equals_a_coordinate_is_no_index(bias: str, level: str) -> None:
    text = f"""
def f(X: f32[k]) -> Y:
    T[k] = {bias}
    Y = sum[k](where(2 * k < extent(k), X[2 * k], X[k]) * T[k])
"""
    x = np.arange(7.0) - 2
    want = sum((x[2 * k] if 2 * k < 7 else x[k]) * (-k if "-" in bias else 2 * k) for k in range(7))
    assert evaluate(derive(castile.parse(text), level).cascade, {"X": x})["Y"] == want


# Integers whose opposite i64 does not hold, and numbers beside them that no float tells from each other.
EXTREME = (
    "where(b[m], -9223372036854775807 - 1, 0) < 0",
    "where(b[m], -9223372036854775807 - 1, -4) >= 5",
    "where(b[m], -9223372036854775807 - 1, 16777217) == 16777216",
    "where(b[m], i[m], -9223372036854775807 - 1) < i[0]",
    "-9223372036854775807 - 1 < i[m]",
    "i[m] <= 9223372036854775806",
    "i[m] - 1 >= 4611686018427387905",
    "where(any[m](b[m]), max[m](where(m > 90, i[m], -9223372036854775807 - 1)), 3) < 0",
    "x[m] <= -9223372036854775808.0",
)


@pytest.mark.parametrize("level", ["none", "full"])
def test_comparisons_of_the_least_integer(level: str) -> None:
    lines = [f"    Y{n}[m] = {condition}\n" for n, condition in enumerate(EXTREME)]
    outputs = ", ".join(f"Y{n}" for n in range(len(EXTREME)))
    c = castile.parse(f"def f(b: bool[m], i: i64[m], x: f32[m]) -> ({outputs}):\n" + "".join(lines))
    i = np.array([-(2**63), 1 - 2**63, 0, 2**62, 2**62 + 1, 2**62 + 2, 2**63 - 1])
    inputs: dict[str, object] = {"b": np.arange(7) % 2 == 0, "i": i, "x": i.astype(np.float32)}
    want = evaluate(c, inputs)
    derived = evaluate(derive(c, level).cascade, inputs)
    compiled = castile.compile(c, "cpu", mapping=Mapping(form=level))(**inputs)
    for n, (name, y) in enumerate(want.items()):
        np.testing.assert_array_equal(derived[name], y, EXTREME[n])
        np.testing.assert_array_equal(compiled[n], y, EXTREME[n])


# What a condition lets be read leaves a maximum with it, and conditions that read come after those that let them.
UNDER_GUARDS = (
    "max[n](where(2 * j + 1 < extent(k), x[2 * j + 1] ** 2 * z[j, n], 0.0))",
    "min[n](where(2 * j + 1 < extent(k), exp(x[2 * j + 1]) * z[j, n], 0.0))",
    "max[n](where((2 * j + 1 < extent(k)) & (n > 0), -exp2(x[2 * j + 1]) * z[j, n], 0.0))",
    "where(any[n](where(2 * j + 1 < extent(k), x[2 * j + 1] > z[j, n], False)), 1.0, 2.0)",
    "where(any[n](z[j, n] > 0.0) & where(2 * j + 1 < extent(k), x[2 * j + 1] > z[j, 0], False), 1.0, 2.0)",
)


@pytest.mark.parametrize("level", ["none", "full"])
@pytest.mark.parametrize("body", UNDER_GUARDS)
def test_reads_stay_under_what_guards_them(body: str, level: str) -> None:
    c = castile.parse(f"def f(x: f32[k], z: f32[j, n]) -> Y:\n    Y[j] = {body}\n")
    z = np.random.default_rng(0).standard_normal((4, 5)).astype(np.float32)
    inputs: dict[str, object] = {"x": np.float32([0.5, -0.25, 1.5]), "z": z}
    found = evaluate(derive(c, level).cascade, inputs)  # which refuses a read outside a tensor
    np.testing.assert_allclose(found["Y"], evaluate(c, inputs)["Y"], rtol=1e-12)


# A bool counts as i32, and that beside u32 is i64.
COUNTED = (
    "A[m] - b[m]",
    "A[m] * (b[m] * -3)",
    "A[m] * -b[m]",
    "A[m] * (b[m] + b[m] - 5)",
    "(b[m] + 65535) * (b[m] + 65535)",
)


@pytest.mark.parametrize("level", ["none", "full"])
def test_bools_in_arithmetic_of_integers(level: str) -> None:
    lines = [f"    Y{n}[m] = {e}\n" for n, e in enumerate(COUNTED)]
    outputs = ", ".join(f"Y{n}" for n in range(len(COUNTED)))
    c = castile.parse(f"def f(A: u32[m], b: bool[m]) -> ({outputs}):\n" + "".join(lines))
    inputs: dict[str, object] = {"A": np.uint32([0, 1, 3, 2**32 - 1]), "b": np.array([True, True, False, True])}
    derived = evaluate(derive(c, level).cascade, inputs)
    compiled = castile.compile(c, "cpu", mapping=Mapping(form=level))(**inputs)
    for made, (name, y), text in zip(compiled, evaluate(c, inputs).items(), COUNTED, strict=True):
        np.testing.assert_array_equal(derived[name], y, text)
        np.testing.assert_array_equal(made, y, text)
