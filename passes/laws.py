"""Test the laws of a user's monoid: that it associates, and that its identity is one.

The laws are the writer's promise; everything that splits a reduction rests on them. They are tried on the elements that
a cascade really reduces and on states made of them, with zeros and infinities among them. Two results agree if they
differ by no more than rounding explains, by the same analysis that judges kernels (`ir.rounding`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ..ir.cascade import Cascade, Einsum, Monoid, Output, Reduce, free_ranks, literal_value, walk
from ..ir.dtypes import DTYPES
from ..ir.errors import CastileError
from ..ir.evaluate import combine_states, evaluate_values
from ..ir.scalar import Value, array_type
from ..ir.types import TypeChecker, tensor_types

Array = npt.NDArray[Any]
State = list[Value]

# How far beyond the bound two orders may lie: the bound is an estimate to first order.
SLACK = 4.0

# The share of elements that have a zero, an infinity or a masked value in a component.
ODD = 0.3


@dataclass(frozen=True, slots=True)
class Breach:
    """A law that does not hold: of which states, and what the two sides give.

    ``excused`` is true where an element is infinite: what arithmetic makes of infinities (NaN in one order only, say)
    is no error of the combination, but worth knowing.
    """

    monoid: str
    law: str
    states: tuple[tuple[float, ...], ...]
    left: tuple[float, ...]
    right: tuple[float, ...]
    excused: bool

    def __str__(self) -> str:
        names = "abc"[: len(self.states)]
        given = ", ".join(f"{n} = {_shown(s)}" for n, s in zip(names, self.states, strict=True))
        return f"{self.law}: with {given} one side is {_shown(self.left)}, the other {_shown(self.right)}"


def _shown(state: Sequence[float]) -> str:
    return "(" + ", ".join(f"{x:.9g}" for x in state) + ")"


def monoid_uses(c: Cascade) -> Iterator[tuple[Einsum, Reduce]]:
    """Every reduction by a monoid of the cascade, with its Einsum."""
    for e in c.einsums:
        for node in walk(e.expr):
            if isinstance(node, Reduce) and node.op in c.monoid_of:
                yield e, node


def breaches(c: Cascade, use: Reduce, inputs: Mapping[str, Any], rng: np.random.Generator, count: int) -> list[Breach]:
    """Laws that the monoid of one reduction breaks on these inputs, at most one breach of each law.

    ``inputs`` are as for `evaluate`; ``count`` states are tried, each made of one to four elements.
    """
    m = c.monoid_of[use.op]
    types = TypeChecker(tensor_types(c), c.monoid_of).state_types(use)
    elements = _elements(c, use, types, inputs, rng, count)

    def combine(a: State, b: State) -> State:
        with np.errstate(all="ignore"):
            return combine_states(m, types, a, b, track=True)

    def drawn(states: State) -> State:
        order = rng.integers(0, count, count)
        return [v.apply(lambda x: x[order]) for v in states]

    pairs = combine(elements, drawn(elements))
    triples = combine(pairs, drawn(elements))
    pool = [elements, pairs, triples]
    found = []
    for a, b, d in [(pool[i], drawn(pool[j]), drawn(pool[k])) for i, j, k in ((0, 0, 0), (0, 1, 0), (1, 2, 1))]:
        found.append(_compare(m, "associativity", (a, b, d), combine(combine(a, b), d), combine(a, combine(b, d))))
    empty = _identity(m, types, count)
    # A masked element contributes nothing, so it may come back as the empty state: identities leave it out.
    present = ~np.any([v.flag() & np.ones(count, bool) for v in elements], axis=0)
    for states, where in zip(pool, (present, None, None), strict=True):
        found.append(_compare(m, "left identity", (states,), combine(empty, states), states, where))
        found.append(_compare(m, "right identity", (states,), combine(states, empty), states, where))
    breached = [b for b in found if b is not None]
    # What is not excused comes first, and one of each law is enough.
    return list({b.law: b for b in sorted(breached, key=lambda b: b.excused, reverse=True)}.values())


def _identity(m: Monoid, types: Sequence[str], count: int) -> State:
    """The empty state; as in the oracle, its 0 and -inf count as masked."""
    state = []
    for value, dtype in zip(m.identity, types, strict=True):
        array = np.full(count, literal_value(value)).astype(array_type(dtype))
        state.append(Value(array, np.isin(array, (0.0, -np.inf)) if array.dtype.kind == "f" else None, np.zeros(count)))
    return state


def _elements(
    c: Cascade, use: Reduce, types: Sequence[str], inputs: Mapping[str, Any], rng: np.random.Generator, count: int
) -> State:
    """Elements that the cascade reduces, one an entry, some with a zero, an infinity or a masked value in them."""
    given = _arguments(c, use, inputs)
    order = rng.integers(0, max(1, len(given[0].array)), count)
    state = []
    for argument, value, dtype in zip(use.args, given, types, strict=True):
        if not len(value.array):
            value = Value(rng.standard_normal(count))
        array = np.broadcast_to(value.array, given[0].array.shape)[order % len(value.array)].astype(array_type(dtype))
        masked = np.zeros(count, bool) if value.masked is None else value.masked[order % len(value.array)].copy()
        if literal_value(argument) is None and DTYPES[dtype].is_float:
            odd = rng.random(count) < ODD
            array = np.where(odd, rng.choice([-np.inf, np.inf, 0.0, -40.0, 40.0], count), array)
            # An element is masked only where the cascade masks.
            may_be = value.masked is not None
            masked = np.where(odd, may_be & (array == -np.inf) & (rng.random(count) < 0.5), masked)
        state.append(Value(array, masked, np.zeros(count)))
    return state


def _arguments(c: Cascade, use: Reduce, inputs: Mapping[str, Any]) -> list[Value]:
    """The values of a reduction's arguments, flattened; standard normal where they mean nothing outside their guard."""
    ranks = tuple(r for r in c.ranks if any(r in free_ranks(a) for a in use.args))
    names = [f"argument{n}" for n in range(len(use.args))]
    extra = tuple(Einsum((Output(n, ranks),), a) for n, a in zip(names, use.args, strict=True))
    try:
        values = evaluate_values(replace(c, einsums=c.einsums + extra, outputs=tuple(names)), inputs)
    except CastileError:
        return [Value(np.random.default_rng(0).standard_normal(64)) for _ in use.args]
    return [v.apply(np.ravel) for v in values.values()]


def _compare(
    m: Monoid, law: str, states: Sequence[State], left: State, right: State, where: Array | None = None
) -> Breach | None:
    """A disagreement of two sides where they are to agree, or None."""
    count = len(left[0].array)
    wrong, excused = np.zeros(count, bool), np.zeros(count, bool)
    infinite = np.zeros(count, bool)
    for state in states:
        for v in state:
            infinite |= ~np.isfinite(v.array.astype(np.float64)) & ~v.flag()
    for a, b in zip(left, right, strict=True):
        x, y = (np.broadcast_to(v.array, count).astype(np.float64) for v in (a, b))
        with np.errstate(all="ignore"):
            allowed = SLACK * (np.broadcast_to(a.slack(), count) + np.broadcast_to(b.slack(), count))
            apart = ~((x == y) | (np.isnan(x) & np.isnan(y)) | (np.abs(x - y) <= allowed))
        excused |= apart & infinite
        wrong |= apart & ~infinite
    if where is not None:
        wrong, excused = wrong & where, excused & where
    bad = np.flatnonzero(wrong) if wrong.any() else np.flatnonzero(excused)
    if not len(bad):
        return None

    def at(state: State) -> tuple[float, ...]:
        return tuple(float(np.broadcast_to(v.array, count)[bad[0]]) for v in state)

    return Breach(m.name, law, tuple(map(at, states)), at(left), at(right), not wrong.any())
