"""Compiled softmax of scores of every magnitude is within the bound, under both gauges."""

from __future__ import annotations

import numpy as np
import pytest

import castile
from castile.ir.bound import judge
from castile.ir.mapping import GAUGES, Mapping

TEXT = """
def f(X: f32[n, k], V: f32[k]) -> (Y, lse, O):
    M[n] = max[k](X[n, k])
    P[n, k] = {exp}(X[n, k] - M[n])
    L[n] = sum[k](P[n, k])
    Y[n, k] = P[n, k] / L[n]
    lse[n] = {log}(L[n]) + M[n]
    O[n] = sum[k](Y[n, k] * V[k])
"""


@pytest.mark.parametrize("gauge", GAUGES)
@pytest.mark.parametrize(("exp", "log"), [("exp", "log"), ("exp2", "log2")])
def test_scores_of_any_size(exp: str, log: str, gauge: str) -> None:
    c = castile.parse(TEXT.format(exp=exp, log=log))
    k = castile.compile(c, target="cpu", mapping=Mapping("full", gauge, {}, {}, {}))
    rng = np.random.default_rng(0)
    for size in (0.0, 1e3, 1e5, 1e6, -1e7, 1e8, 7e8, -1e9, 1e12, -1e30):
        given = {"X": np.float32(size + 4 * rng.standard_normal((5, 133))), "V": np.float32(rng.standard_normal(133))}
        results = dict(zip(c.outputs, k(**given), strict=True))
        wrong = [f"{size:g}: {j}" for j in judge(c, given, results) if not j.ok]
        assert not wrong
