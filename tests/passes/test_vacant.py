"""Where ranks are empty: what is left of a cascade there means without flags what the oracle says with them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from corpus import NAMES, example, inputs
from test_random import disagreement

import castile
from castile.ir.cascade import Cascade, Reduce, walk
from castile.ir.errors import CastileError
from castile.ir.evaluate import evaluate
from castile.ir.extents import resolve
from castile.ir.mapping import ALTERNATIVES
from castile.ir.samples import random_inputs
from castile.passes.derive import derive
from castile.passes.vacant import vacated

# Values of a cascade of `X: f32[k]` and `W: f32[k, n]`.
VALUES = (
    "max[k](expm1(X[k]))",
    "max[k](X[k] - max[k](X[k]))",
    "exp(max[k](X[k]) - max[k](X[k]))",
    "sqrt(sum[k](X[k] ** 2)) / sqrt(sum[k](X[k] ** 2))",
    "sum[k](X[k]) / sum[k](X[k] ** 2) + 1",
    "sum[k](X[k] ** 2) / extent(k)",
    "sum[k](X[k] * rsqrt(sum[k](X[k] ** 2)))",
    "sum[k, n](W[k, n] / max[k](X[k]))",
    "min[k](X[k]) - prod[k](X[k])",
    "f32(any[k](X[k] > 0.0)) - f32(all[k](X[k] > 0.0))",
    "max[k](i16(X[k])) + min[k](i64(X[k])) + sum[k](i8(X[k]))",
)

MONOID = """
@monoid(identity=(-inf, 0.0, 1))
def state(m, l, c, n, s, d) -> (M, L, C):
    M = maximum(m, n)
    L = l * exp(m - M) + s * exp(n - M)
    C = c * d

def f(X: f32[k], W: f64[n]) -> (M, L, C, A):
    (M, L[n], C) = state[k](X[k], X[k] * W[n], i32(2))
    A[n] = L[n] / L[n] + exp(M)
"""


def agrees(c: Cascade, given: dict[str, Any], empty: set[str]) -> None:
    """What is left computes what the oracle says, in every form, and reduces nothing over the empty ranks."""
    left = vacated(c, empty)
    assert left != c
    assert castile.parse(str(left)) == left
    assert not any(isinstance(n, Reduce) and empty & set(n.ranks) for e in left.einsums for n in walk(e.expr))
    for level, gauge in ALTERNATIVES:
        d = derive(left, level, gauge)
        streams = {s.monoid.name for s in d.streams if s.monoid is not None}
        assert not disagreement(c, d.cascade, given, empty=False, streams=streams), f"{level} {gauge}"


@pytest.mark.parametrize("value", VALUES)
def test_reductions_of_nothing(value: str) -> None:
    c = castile.parse(f"def f(X: f32[k], W: f32[k, n]) -> O:\n    O = {value}\n")
    agrees(c, {"X": np.ones(0), "W": np.ones((0, 3))}, {"k"})


def test_the_empty_state_of_a_monoid() -> None:
    agrees(castile.parse(MONOID), {"X": np.ones(0), "W": np.ones(2)}, {"k"})


def test_what_has_no_text_of_its_own_stays() -> None:
    c = castile.parse("def f(X: f32[n, k]) -> I:\n    I[n] = argmax[k](X[n, k])\n")
    assert vacated(c, {"k"}) == c
    c = castile.parse("def f(X: f32[n]) -> O:\n    O = sum[k](X[2 * k + 1])\n")
    assert vacated(c, set()) is c


@pytest.mark.parametrize("name", NAMES)
def test_examples(name: str) -> None:
    c = example(name)
    extents = resolve(c, {}, {n: np.shape(x) for n, x in inputs(name).items()})
    for rank in extents:
        try:
            given = random_inputs(c, {**extents, rank: 0}, 1)
            evaluate(c, given)
        except CastileError:  # indices have nothing to point at
            continue
        sizes = resolve(c, {}, {n: np.shape(x) for n, x in given.items()})
        empty = {r for r, n in sizes.items() if n == 0}
        if vacated(c, empty) != c:
            agrees(c, given, empty)
