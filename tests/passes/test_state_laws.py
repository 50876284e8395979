"""Every derived state is a monoid: merging associates, and the empty state changes nothing, in float64 and float32."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from corpus import derived, float_tensors, inputs, streamed
from test_trees import rng_of
from trees import Machine, Merge

from castile.ir.cascade import Cascade, Einsum, Reduce
from castile.ir.mapping import GAUGES
from castile.ir.types import TypeChecker, tensor_types
from castile.passes.laws import monoid_uses

Array = np.ndarray[Any, Any]
State = list[Array]

# States tried for each law; each is made of one to four elements of the cascade's own.
STATES = 50
# What two orders may differ by, as a part of the greatest value that a component takes.
SLACK = {"f64": 1e-10, "f32": 3e-5}


def elements(c: Cascade, e: Einsum, use: Reduce, given: dict[str, Any], rng: np.random.Generator, to: str) -> State:
    """Elements that the cascade really reduces, one an entry."""
    machine = Machine(c, given, rng, to)
    with np.errstate(all="ignore"):
        machine.run()
    ranks = tuple(dict.fromkeys((*e.ranks, *use.ranks)))
    scope = {r: np.arange(machine.extents[r]) for r in ranks}
    full = [len(v) for v in scope.values()]
    with np.errstate(all="ignore"):
        found = [np.broadcast_to(machine.at(a, scope), full).ravel() for a in use.args]
    chosen = rng.integers(0, len(found[0]), STATES)
    return [x[chosen] for x in found]


def same(a: State, b: State, scale: list[float], slack: float) -> bool:
    return all(
        np.all((np.abs(x.astype(float) - y) <= slack * s) | (x == y) | (np.isnan(x) & np.isnan(y)))
        for x, y, s in zip(a, b, scale, strict=True)
    )


def shuffled(state: State, rng: np.random.Generator) -> State:
    order = rng.permutation(STATES)
    return [x[order] for x in state]


def threes(one: State, two: State, four: State, rng: np.random.Generator) -> list[tuple[State, State, State]]:
    return [
        (one, shuffled(one, rng), shuffled(one, rng)),
        (one, shuffled(two, rng), shuffled(four, rng)),
        (four, shuffled(two, rng), two),
    ]


@pytest.mark.parametrize("precision", SLACK)
@pytest.mark.parametrize("gauge", GAUGES)
@pytest.mark.parametrize("name", streamed())
def test_merging_associates_and_the_empty_state_is_neutral(name: str, gauge: str, precision: str) -> None:
    d = derived(name, "full", gauge)
    c = d.cascade
    checker = TypeChecker(tensor_types(c), c.monoid_of)
    own = {s.monoid.name for s in d.streams if s.monoid is not None}
    for by in (1.0, 30.0):
        rng = rng_of("laws", name, gauge, precision, by)
        given = {n: np.asarray(v) * by if n in float_tensors(c) else v for n, v in inputs(name).items()}
        for e, use in monoid_uses(c):
            if use.op not in own:
                continue
            merge = Merge(c.monoid_of[use.op], checker.state_types(use), precision)
            empty = [np.broadcast_to(x, (STATES,)) for x in merge.identity()]
            one = elements(c, e, use, given, rng, precision)

            two = merge(one, shuffled(one, rng))
            four = merge(two, shuffled(two, rng))
            scale = [float(np.max(np.abs(x[np.isfinite(x.astype(float))]), initial=1e-30)) for x in four]
            if any(n.startswith("a_d") for n, _ in merge.m.body):
                # Sums about a mean are 0 on paper: what they round by is that of the values that they are made of.
                scale = [max(scale)] * len(scale)
            for a in (one, two, four):
                assert same(merge(empty, a), a, scale, SLACK[precision]), (e.name, "left identity")
                assert same(merge(a, empty), a, scale, SLACK[precision]), (e.name, "right identity")
            for a, b, x in threes(one, two, four, rng):
                left, right = merge(merge(a, b), x), merge(a, merge(b, x))
                assert same(left, right, scale, 8 * SLACK[precision]), (e.name, "associativity")
