"""Where forms are known to differ from the oracle (docs/algebra.md, section 13): what fails here may be good news."""

from __future__ import annotations

import numpy as np
import pytest
from test_random import plainly

import castile
from castile.ir.bound import error_bound
from castile.ir.evaluate import evaluate
from castile.passes.derive import derive


@pytest.mark.parametrize(
    ("value", "want", "found"),
    [
        ("max[k](expm1(X[k]))", -np.inf, -1),
        ("max[k](X[k] - max[k](X[k]))", -np.inf, 0),
        ("sqrt(sum[k](X[k] ** 2)) / sqrt(sum[k](X[k] ** 2))", 0, 1),
    ],
)
def test_functions_of_what_an_empty_rank_is_reduced_to(value: str, want: float, found: float) -> None:
    c = castile.parse(f"def f(X: f32[k]) -> O:\n    O = {value}\n")
    given = {"X": np.ones(0)}
    assert evaluate(c, given)["O"] == want
    assert evaluate(derive(c).cascade, given)["O"] == found


@pytest.mark.parametrize(("value", "found"), [("X[k] - X[k]", 0), ("X[k] * 0.0", 0), ("X[k] / X[k]", 1)])
def test_what_is_no_number_cancels(value: str, found: float) -> None:
    c = castile.parse(f"def f(X: f32[k]) -> O:\n    O[k] = {value}\n")
    given = {"X": np.array([np.nan, np.inf])}
    assert np.isnan(evaluate(c, given)["O"]).all()
    assert (evaluate(derive(c).cascade, given)["O"] == found).all()


def test_nothing_is_demanded_of_a_sum_whose_parts_overflow() -> None:
    c = castile.parse("def f(X: f32[k]) -> O:\n    O = sum[k](X[k])\n")
    assert error_bound(c, {"X": np.array([3e38, 3e38, -3e38])})["O"] == np.inf
    assert error_bound(c, {"X": np.array([1e38, 1e38, -1e38])})["O"] < 1e33


def test_a_sum_about_a_maximum_of_nothing_is_about_0() -> None:
    c = castile.parse("def f(X: f32[k], V: f32[k]) -> O:\n    O = sum[k]((V[k] - max[k](X[k])) ** 2)\n")
    given = {"X": np.full(3, -np.inf), "V": np.ones(3)}
    assert evaluate(c, given)["O"] == np.inf
    with plainly():
        assert evaluate(derive(c).cascade, given)["O"] == 3


UNSIZED = """
def f(X: f32[t, 8], n: i32[t]) -> Y:
    Q[t, d] = 2.0 * X[t, d]
    S[t, d] = where(d < n[t], Q[t, (d + 4) % 8], -inf)
    P[t, d] = exp(S[t, d] - max[d](S[t, d]))
    Y[t, d] = P[t, d] / sum[d](P[t, d])
"""


def test_extents_of_indices_alone_run_as_written() -> None:
    d = derive(castile.parse(UNSIZED))
    assert "only indices say how large d is" in d.barriers[0].reason
    assert all(e in d.cascade.einsums for e in castile.parse(UNSIZED).einsums[:2])
