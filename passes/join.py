"""Sums over one rank that need the same values, joined into one stream, so that these are computed once.

    dK[k, d] = sum[q](P(q, k) * Q[q, d])      becomes     dK[k, d], dV[k, f] = sums_2[q](P(q, k) * Q[q, d],
    dV[k, f] = sum[q](A(q, k) * dO[q, f])                                                A(q, k) * dO[q, f])

where A and P are inner reductions, or read some, that run inside of the loop over q. What one sum varies with and the
other does not is taken as one tile: d and f have to fit on chip.

A sum over k instead, which needs the same values for a row of q, is *scattered*: wherever the loop over q comes by, it
adds its share to the row's place in memory, so that k runs inside the kernel and no longer in parallel.

    dQ[q, d] = sum[k](P(q, k) * K[k, d])
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from math import prod

from ..ir.cascade import Access, Call, Cascade, Const, Einsum, Monoid, Reduce, tensors_read
from ..ir.dtypes import DTYPES
from ..ir.types import TypeChecker, settle, tensor_types
from .fuse import ON_CHIP, VECTOR, in_order, is_map
from .phases import bracket
from .step import Step, Take


@dataclass(frozen=True, slots=True)
class Scatter:
    """Sums over ``rank`` that are added up in memory by a stream over another rank, by their names."""

    rank: str
    sums: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Joined:
    """A cascade with sums joined; the steps of the streams that they make, and what these scatter, by the first output
    of each."""

    cascade: Cascade
    steps: Mapping[str, Step]
    scatters: Mapping[str, Scatter]


def join(
    c: Cascade, fused: Collection[str], extents: Mapping[str, int], scatter: bool = False, cut: Collection[str] = ()
) -> Joined:
    """Join the sums of a cascade, and with ``scatter`` those over another rank, unless one of the two ranks is ``cut``
    into pieces.

    ``fused`` names the reductions that are computed in the loops that read them.
    """
    inner = _inside(c, fused)
    types = tensor_types(c)
    checker = TypeChecker(types, c.monoid_of)
    groups: list[list[Einsum]] = []
    alone = [e for e in c.einsums if e.name not in fused and inner[e.name] and _is_sum(e, checker)]
    for e in alone:
        for group in groups:
            if all(_alike(e, x, extents) and inner[e.name] & inner[x.name] for x in group) and _apart(c, [*group, e]):
                group.append(e)
                break
        else:
            groups.append([e])
    steps: dict[str, Step] = {}
    scatters: dict[str, Scatter] = {}
    taken = {e.name for group in groups if len(group) > 1 for e in group}
    for group in groups:
        if len(group) == 1:
            continue
        crossing: list[Einsum] = []
        for e in alone if scatter else ():
            whole = types[e.name] == settle(checker.infer(e.expr)) and e.name not in taken
            shares = all(inner[e.name] & inner[x.name] for x in group)
            same = not crossing or _summed(e) == _summed(crossing[0])
            free = not set(cut) & {_summed(e), _summed(group[0])}
            if whole and shares and same and free and _crosses(e, group, extents) and _apart(c, [*group, *crossing, e]):
                crossing.append(e)
        taken |= {e.name for e in crossing}
        c, step = _joined(c, group, crossing)
        steps[group[0].name] = step
        if crossing:
            scatters[group[0].name] = Scatter(_summed(crossing[0]), tuple(e.name for e in crossing))
    return Joined(c, steps, scatters)


def _summed(e: Einsum) -> str:
    assert isinstance(e.expr, Reduce)
    return e.expr.ranks[0]


def _crosses(e: Einsum, group: list[Einsum], extents: Mapping[str, int]) -> bool:
    """Whether a sum has a row for each coordinate that the group sums over, and sums over one of the group's rows, of
    the same elements; what varies with less than all rows has to fit on chip in whole."""
    assert isinstance(e.expr, Reduce)
    rows = set.intersection(*(set(x.ranks) for x in group))
    chip = set().union(*(x.ranks for x in group)) - rows
    over, streamed = _summed(e), _summed(group[0])
    first = group[0].expr
    assert isinstance(first, Reduce)
    small = all(1 < extents.get(r, ON_CHIP + 1) <= ON_CHIP for r in chip)
    return (
        over in rows
        and (rows - {over}) | {streamed} <= set(e.ranks)
        and set(e.ranks) <= (rows - {over}) | {streamed} | chip
        and bracket("sum", e.expr.arg) == bracket("sum", first.arg)
        and small
        and prod(-(-extents[r] // VECTOR) * VECTOR for r in chip) <= ON_CHIP * ON_CHIP
    )


def _inside(c: Cascade, fused: Collection[str]) -> dict[str, frozenset[str]]:
    """The fused reductions that each Einsum computes on its way, by its first output."""
    needed: dict[str, frozenset[str]] = {}
    handed: dict[str, frozenset[str]] = {}
    for e in c.einsums:
        needed[e.name] = frozenset().union(*(handed.get(t, frozenset()) for t in tensors_read(e.expr)))
        if e.name in fused:
            handed[e.name] = needed[e.name] | {e.name}
        elif is_map(e):
            handed[e.name] = needed[e.name]
        # What is stored hands on nothing: its readers compute none of it again.
    return needed


def _is_sum(e: Einsum, checker: TypeChecker) -> bool:
    if len(e.outputs) != 1 or not isinstance(e.expr, Reduce) or e.expr.op != "sum" or len(e.expr.ranks) != 1:
        return False
    kind = settle(checker.infer(e.expr))
    return DTYPES[kind].is_float and settle(checker.infer(e.expr.arg)) == kind


def _alike(e: Einsum, x: Einsum, extents: Mapping[str, int]) -> bool:
    """Whether two sums go over the same coordinates, for the same rows but for ranks that fit on chip."""
    assert isinstance(e.expr, Reduce)
    assert isinstance(x.expr, Reduce)
    same = e.expr.ranks == x.expr.ranks and bracket("sum", e.expr.arg) == bracket("sum", x.expr.arg)
    apart = set(e.ranks) ^ set(x.ranks)
    return same and all(1 < extents.get(r, ON_CHIP + 1) <= ON_CHIP for r in apart)


def _apart(c: Cascade, group: list[Einsum]) -> bool:
    """Whether none of the sums needs another's result."""
    names = {e.name for e in group}
    behind: set[str] = set()
    for e in c.einsums:
        if (names | behind) & set(tensors_read(e.expr)):
            behind |= {o.name for o in e.outputs}
    return not names & behind


def _joined(c: Cascade, group: list[Einsum], crossing: list[Einsum]) -> tuple[Cascade, Step]:
    """The cascade with one Einsum for the group and what it scatters right after it, in an order that keeps sources
    before readers."""
    name = f"sums_{len(group)}"
    while name in c.monoid_of:
        name += "_"
    old, new = [f"a_{e.name}" for e in group], [f"b_{e.name}" for e in group]
    body = tuple((e.name, Call("add", (Access(a), Access(b)))) for e, a, b in zip(group, old, new, strict=True))
    monoid = Monoid(name, (Const(0.0),) * len(group), (*old, *new), tuple(e.name for e in group), body)
    exprs = [e.expr for e in group if isinstance(e.expr, Reduce)]
    stream = Einsum(tuple(e.output for e in group), Reduce(name, exprs[0].ranks, tuple(x.arg for x in exprs)))
    step = tuple(Take(e.name, "sum", Access(a), x.arg) for e, a, x in zip(group, old, exprs, strict=True))
    rest = [stream if e is group[0] else e for e in c.einsums if e is group[0] or e not in group]
    order = in_order(c, rest, {stream.name: [e.name for e in crossing]})
    return replace(c, einsums=order, monoids=(*c.monoids, monoid)), step
