"""Sums about an extreme: none can go about the -inf that a maximum begins with, and keeps under a mask."""

from __future__ import annotations

import numpy as np
import pytest
from test_random import plainly
from test_tile import interpret

import castile
from castile.ir.evaluate import evaluate
from castile.ir.mapping import GAUGES
from castile.passes.derive import derive
from castile.passes.tiling import Tiling

INF = np.inf
ROWS = ([1, 0, 2, 4, 5], [5, 4, 3, 2, 1], [1, -INF, 2, 4, 6], [-INF, -INF, 1, 2, 3])

# What is summed, and whether it is finite where some X are -inf.
SUMS = {
    "(X[k] - M) ** 2": False,
    "(X[k] - min[k](X[k])) ** 2": False,
    "V[k] * (V[k] - M) ** 2": True,
    "(V[k] - max[k](where(k > 3, X[k], -inf))) ** 2": True,
    "P[k] * log(P[k])": False,
    "where(P[k] > 0, P[k] * log(P[k]), 0.0)": True,
    "where(P[k] / L > 0, P[k] / L * log(P[k] / L), 0.0)": True,
}


@pytest.mark.parametrize("gauge", GAUGES)
@pytest.mark.parametrize("name", SUMS)
def test_sums_about_an_extreme(name: str, gauge: str) -> None:
    c = castile.parse(f"""
def f(X: f32[k], V: f32[k]) -> O:
    M = max[k](X[k])
    P[k] = exp(X[k] - M)
    L = sum[k](P[k])
    O = sum[k]({name})
""")
    d = derive(c, gauge=gauge)
    assert d.passes["k"] == 1
    for row in ROWS:
        given = {"X": np.array(row, float), "V": np.arange(5.0)}
        want = evaluate(c, given)["O"]
        assert np.isfinite(want) == (SUMS[name] or np.isfinite(row).all())
        if np.isfinite(want):
            with plainly():
                np.testing.assert_allclose(evaluate(d.cascade, given)["O"], want, rtol=1e-9)
            np.testing.assert_allclose(interpret(d, given, Tiling(2, 2, 2))["O"], want, rtol=1e-6)


def test_a_comparison_with_0_keeps_that_an_exponential_may_vanish() -> None:
    c = castile.parse("""
def f(X: f32[k], w: f32) -> (A, B, C):
    M = max[k](X[k])
    A = sum[k](where(exp(X[k] - M) > 0, 1.0, 2.0))
    B = sum[k](where(w * exp(X[k] - M) < 0, 1.0, 2.0))
    C = sum[k](where(w * exp(X[k] - M) <= 0, 1.0, 2.0))
""")
    for w in (-1.0, 0.0, 1.0):
        given = {"X": np.array([1.0, -INF, 3.0]), "w": np.array(w)}
        with plainly():
            assert evaluate(derive(c).cascade, given) == evaluate(c, given)
