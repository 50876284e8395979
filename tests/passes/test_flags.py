"""Flags written out: the same meaning in plain numbers, of what the algebra does not follow and of whole cascades."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from test_random import disagreement, excused, plainly

import castile
from castile.ir.errors import CastileError
from castile.ir.evaluate import evaluate
from castile.ir.mapping import ALTERNATIVES
from castile.passes.derive import derive
from castile.passes.extent import keeps_extents
from castile.passes.flags import followable, written_out

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "ir"))

from strategies import random_case

ATTENTION = """
def f(S: f32[q, k], V: f32[k], n: i32[q]) -> O:
    X[q, k] = where(k < n[q], S[q, k], -inf)
    P[q, k] = exp(X[q, k] - max[k](X[q, k]))
    A[q, k] = P[q, k] / sum[k](P[q, k])
    O[q] = sum[k](A[q, k] * V[k])
"""


def test_a_cascade_with_its_flags_written_out() -> None:
    c = castile.parse(ATTENTION)
    assert (
        str(written_out(c))
        == """\
def f(S: f32[q, k], V: f32[k], n: i32[q]) -> O:
    X[q, k] = where(k < n[q], S[q, k], -inf)
    X_masked[q, k] = ~(k < n[q])
    P[q, k] = exp(where(X_masked[q, k], -inf, X[q, k] - max[k](X[q, k])))
    A[q, k] = where(X_masked[q, k], 0.0, P[q, k] / sum[k](P[q, k]))
    O[q] = sum[k](where(X_masked[q, k], 0.0, A[q, k] * V[k]))
"""
    )
    assert followable(c) is c  # the algebra follows all of it


def test_a_state_with_its_flags() -> None:
    c = castile.parse("""
@monoid(identity=0.0)
def last(a, b) -> c:
    c = b - a

def f(X: f32[q, k], n: i32[q]) -> O:
    O[q] = 1.0 / last[k](where(k < n[q], X[q, k], -inf))
""")
    assert (
        str(followable(c))
        == """\
@monoid(identity=0.0)
def last(a, b) -> c:
    c = b - a

@monoid(identity=(0.0, False, True))
def last_flagged(a, a_masked, a_zero, b, b_masked, b_zero) -> (c, c_masked, c_zero):
    c = where(b_masked, -inf, b - a)
    c_zero = b_zero & a_zero
    c_masked = b_masked

def f(X: f32[q, k], n: i32[q]) -> O:
    (T_last[q], T_last_masked[q], T_last_zero[q]) = last_flagged[k](where(k < n[q], X[q, k], -inf), ~(k < n[q]), False)
    O[q] = 1.0 / where(T_last_masked[q], -inf, where(T_last_zero[q], 0.0, T_last[q]))
"""
    )


@pytest.mark.parametrize("change", [written_out, followable])
def test_random_cascades_mean_the_same(change: object) -> None:
    found = []
    for seed in range(400):
        case = random_case(seed)
        c, made = case.cascade, change(case.cascade)  # type: ignore[operator]
        if made == c or not keeps_extents(c, made, {}):
            continue
        try:
            evaluate(c, case.inputs)
        except CastileError:
            continue  # a guarded read that the cascade itself has out of bounds
        assert castile.parse(str(made)) == made
        text = disagreement(c, made, case.inputs, 0 in case.extents.values())
        found += [f"seed {seed}: {text}"] if text and not excused(seed, text) else []
    assert not found, "\n".join(found)


def test_flags_that_nest_are_not_written_out_without_end() -> None:
    e = "where(k < 3, X[k], -inf)"
    for i in range(24):
        e = f"({e} * X[k] + where(k > {i}, X[k], -inf))"
    c = castile.parse(f"def f(X: f32[k]) -> O:\n    O[k] = {e}\n")
    assert len(str(written_out(c))) < 40 * len(str(c))


# What only flags told once: masks past a step, a minimum or a product over a rank, and a scan.
PAST = {
    "a minimum over a rank": "min[k](exp(where(k > 9, X[k], -inf)))",
    "a product over a rank": "prod[k](exp(where(k > 9, X[k], -inf)))",
    "a step": "floor(sum[k](exp(where(k > 9, X[k], -inf))))",
    "a user's monoid": "plus[k](exp(where(k > 9, X[k], -inf)))",
    "a scan": "H[extent(k) - 1]",
    "a rounding of what is masked twice": "f16(exp(where(v > 0, where(v > 1, -inf, X[0]), -inf)))",
}


@pytest.mark.parametrize("name", PAST)
def test_masks_pass(name: str) -> None:
    c = castile.parse(f"""
@monoid(identity=0.0)
def plus(a, b) -> c:
    c = a + b

def f(X: f32[k], v: f32) -> O:
    H[k] = where(k > 0, H[k - 1], 0.0) * 0.5 + exp(where(k > 9, X[k], -inf))
    O = {PAST[name]} * v
""")
    given = {"X": np.ones(3), "v": np.array(np.inf)}
    want = evaluate(c, given)["O"]
    for level, gauge in ALTERNATIVES:
        with plainly():
            assert evaluate(derive(c, level, gauge).cascade, given)["O"] == want or not np.isfinite(want)


def test_a_row_without_a_key_is_0_where_only_indices_say_how_long_it_is() -> None:
    c = castile.parse("""
def f(X: f32[t, 8], n: i32[t]) -> Y:
    Q[t, d] = 2.0 * X[t, d]
    S[t, d] = where(d < n[t], Q[t, (d + 4) % 8], -inf)
    P[t, d] = exp(S[t, d] - max[d](S[t, d]))
    Y[t, d] = P[t, d] / sum[d](P[t, d])
""")
    made = derive(c)
    assert made.form == "as written"
    with plainly():
        got = evaluate(made.cascade, {"X": np.ones((3, 8)), "n": np.array([0, 2, 8])})["Y"]
    np.testing.assert_allclose(got[:, 0], [0.0, 0.5, 0.125])


def test_masks_written_out_leave_ranks_their_extents() -> None:
    """What masks a read of the only index that says how large a rank is reads it elsewhere."""
    c = castile.parse("""
def f(X: f32[5], Z: f32[9], v: f32) -> Y:
    Y[p] = exp(where(p > 1, v, -inf)) * (X[p] / Z[2 * p])
""")
    assert str(written_out(c)).endswith("\n    p_extent[p] = X[p]\n    p_extent2[p] = Z[2 * p]\n")
    given = {"X": np.ones(5), "Z": np.arange(9.0), "v": np.array(0.0)}
    for level, gauge in ALTERNATIVES:
        with plainly():
            got = evaluate(derive(c, level, gauge).cascade, given)["Y"]
        np.testing.assert_allclose(got, [0, 0, 1 / 4, 1 / 6, 1 / 8])


def test_a_flag_that_a_guard_lets_be_read_is_asked_under_it() -> None:
    text = """
@monoid(identity=0.0)
def plus(a, b) -> c:
    c = a + b

def f(X: f32[k], v: f32) -> O:
    A[k] = plus[j](where(j < k, X[k], -inf) + 0.0 * X[j])
    O[k] = exp(where(k >= 1, A[k - 1] * v, 0.0))
"""
    c, given = castile.parse(text), {"X": np.ones(4), "v": np.array(0.5)}
    for level, gauge in ALTERNATIVES:
        with plainly():
            got = evaluate(derive(c, level, gauge).cascade, given)["O"]
        np.testing.assert_allclose(got, evaluate(c, given)["O"])
