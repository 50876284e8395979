"""Derived forms of what is no number: rows of -inf, NaN among the best, scales of nothing, exponentials too large."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from test_trees import rng_of
from trees import tree_evaluate

import castile
from castile.ir.evaluate import evaluate
from castile.ir.mapping import GAUGES, Mapping
from castile.passes.derive import derive

# A log-sum-exp that rids itself of -inf by hand, and what reads it elsewhere than where it is computed.
SHIFTED = """
def f(X: f32[m, k], V: f32[k]) -> (Y, Z, W, U):
    T[m] = max[k](X[m, k])
    F[m] = where(T[m] == -inf, 0.0, T[m])
    P[m, k] = exp(X[m, k] - F[m])
    D[m] = sum[k](P[m, k])
    L[m] = F[m] + log(D[m])
    N[m] = sum[k](P[m, k] * V[k])
    Y[m] = where(m > 0, L[m - 1], -inf)
    Z[m] = where(m > 0, N[m - 1] / (D[m - 1] + 1e-9), 0.5)
    W[m] = where(m > 0, exp(F[m - 1]) * N[m - 1], 0.5)
    U[m] = where(m > 0, N[m - 1] / D[m - 1], 0.5)
"""


@pytest.mark.parametrize("gauge", GAUGES)
@pytest.mark.parametrize("level", ["none", "defer", "full"])
def test_rows_without_a_number_read_elsewhere(level: str, gauge: str) -> None:
    c = castile.parse(SHIFTED)
    rng = np.random.default_rng(0)
    x = np.float32(rng.standard_normal((6, 9)))
    x[1:3] = -np.inf
    x[3] -= 60.0
    x[4] += 60.0
    inputs: dict[str, object] = {"X": x, "V": np.float32(rng.standard_normal(9))}
    want = evaluate(c, inputs)
    derived = derive(c, level, gauge).cascade
    compiled = castile.compile(c, "cpu", mapping=Mapping(form=level, gauge=gauge))(**inputs)
    for (name, y), made in zip(want.items(), compiled, strict=True):
        np.testing.assert_allclose(evaluate(derived, inputs)[name], y, rtol=1e-9, err_msg=name)
        np.testing.assert_allclose(tree_evaluate(derived, inputs, rng_of("shifted"))[name], y, rtol=1e-9, err_msg=name)
        np.testing.assert_allclose(made, y, rtol=1e-4, err_msg=name)


BEST = {
    "as they are": "X[t, e]",
    "in another order": "exp(X[t, e])",
}


@pytest.mark.parametrize("level", ["none", "defer", "full"])
@pytest.mark.parametrize("value", BEST.values(), ids=BEST.keys())
def test_the_best_three_of_what_may_be_no_number(value: str, level: str) -> None:
    c = castile.parse(f"""
def f(X: f32[t, e]) -> (A, B, C, P, Q, R):
    A[t] = argmax[e]({value})
    P[t] = max[e]({value})
    Y[t, e] = where(e == A[t], -inf, {value})
    B[t] = argmax[e](Y[t, e])
    Q[t] = max[e](Y[t, e])
    Z[t, e] = where(e == B[t], -inf, Y[t, e])
    C[t] = argmax[e](Z[t, e])
    R[t] = max[e](Z[t, e])
""")
    for n in (1, 2, 4):
        x = np.float32(list(itertools.product((1.0, 2.0, np.nan, -np.inf, np.inf), repeat=n)))
        want = evaluate(c, {"X": x})
        derived = tree_evaluate(derive(c, level).cascade, {"X": x}, rng_of(value))
        compiled = castile.compile(c, "cpu", mapping=Mapping(form=level))(X=x)
        for (name, y), made in zip(want.items(), compiled, strict=True):
            np.testing.assert_allclose(derived[name], y, rtol=1e-12, err_msg=name)
            np.testing.assert_allclose(made, y, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("factor", ["s[m]", "s[m] ** 2", "sqrt(abs(s[m]))", "exp(X[m, 0]) * abs(s[m])"])
def test_a_factor_of_zero_makes_all_places_equal(factor: str) -> None:
    c = castile.parse(f"def f(X: f32[m, k], s: u8[m]) -> Y:\n    Y[m] = argmax[k](X[m, k] * {factor})\n")
    inputs: dict[str, object] = {"X": np.float32([[1, 3, 2], [1, 3, 2]]), "s": np.uint8([0, 2])}
    np.testing.assert_array_equal(evaluate(derive(c).cascade, inputs)["Y"], [0, 1])


# Scales of what has not begun, and of rows that masks leave empty, are no numbers.
SCALES = {
    "about a sum, under an extended exponent": """
def f(v: f32[b]) -> Y:
    M = max[b](v[b])
    L = sum[b](exp(v[b] - M))
    Y = sum[b]((L - v[b]) ** 2)
""",
    "of sums of masked rows": """
def f(X: f32[a, b], keep: bool[a, b]) -> Y:
    S[a, b] = where(keep[a, b], X[a, b], -inf)
    M[a] = max[b](S[a, b])
    L[a] = sum[b](exp(S[a, b] - M[a]))
    T = max[a](L[a])
    Y = sum[a](exp(L[a] - T) * L[a])
""",
}


@pytest.mark.parametrize("gauge", GAUGES)
@pytest.mark.parametrize("text", SCALES.values(), ids=SCALES.keys())
def test_scales_of_nothing(text: str, gauge: str) -> None:
    c = castile.parse(text)
    rng = np.random.default_rng(0)
    keep = rng.random((7, 5)) > 0.5
    keep[2:4] = False
    v, x = np.float32(rng.standard_normal(40)), np.float32(rng.standard_normal((7, 5)))
    given: dict[str, object] = {"v": v, "X": x, "keep": keep}
    inputs = {p.name: given[p.name] for p in c.params}
    want = evaluate(c, inputs)["Y"]
    derived = derive(c, gauge=gauge).cascade
    np.testing.assert_allclose(evaluate(derived, inputs)["Y"], want, rtol=1e-9)
    for seed in range(5):
        np.testing.assert_allclose(tree_evaluate(derived, inputs, rng_of(seed))["Y"], want, rtol=1e-9)
    tiles = dict.fromkeys(c.ranks, 2)
    made = castile.compile(c, "cpu", mapping=Mapping(form="full", gauge=gauge, tiles=tiles))(**inputs)
    np.testing.assert_allclose(made, want, rtol=1e-4)


@pytest.mark.parametrize("offset", [0, 60, -100])
@pytest.mark.parametrize("gauge", GAUGES)
@pytest.mark.parametrize("level", ["none", "defer", "full"])
def test_a_maximum_stays_beside_the_squares_that_it_keeps_small(level: str, gauge: str, offset: int) -> None:
    c = castile.parse("""
def f(X: f32[a, b]) -> N:
    M[a] = max[b](X[a, b])
    E[a, b] = exp(X[a, b] - M[a])
    mean[a] = sum[b](E[a, b]) / extent(b)
    N[a] = sum[b]((E[a, b] - mean[a]) ** 2) / extent(b)
""")
    inputs: dict[str, object] = {"X": np.float32(3 * np.random.default_rng(0).standard_normal((2, 64)) + offset)}
    made = castile.compile(c, "cpu", mapping=Mapping(form=level, gauge=gauge))(**inputs)
    np.testing.assert_allclose(made, evaluate(c, inputs)["N"], 1e-5)
