"""Sums over one rank that need the same values, joined into one stream, so that these are computed once.

    dK[k, d] = sum[q](P(q, k) * Q[q, d])      becomes     dK[k, d], dV[k, f] = sums_2[q](P(q, k) * Q[q, d],
    dV[k, f] = sum[q](A(q, k) * dO[q, f])                                                A(q, k) * dO[q, f])

where A and P are inner reductions, or read some, that run inside of the loop over q. What one sum varies with and the
other does not is taken as one tile: d and f have to fit on chip.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from ..ir.cascade import Access, Call, Cascade, Const, Einsum, Monoid, Reduce, tensors_read
from ..ir.dtypes import DTYPES
from ..ir.types import TypeChecker, settle, tensor_types
from .fuse import ON_CHIP, is_map
from .phases import bracket
from .step import Step, Take


def join(c: Cascade, fused: Collection[str], extents: Mapping[str, int]) -> tuple[Cascade, dict[str, Step]]:
    """The cascade with such sums joined, and the steps of the streams that they make by their first output.

    ``fused`` names the reductions that are computed in the loops that read them.
    """
    inner = _inside(c, fused)
    checker = TypeChecker(tensor_types(c), c.monoid_of)
    groups: list[list[Einsum]] = []
    for e in c.einsums:
        if e.name in fused or not inner[e.name] or not _is_sum(e, checker):
            continue
        for group in groups:
            if all(_alike(e, x, extents) and inner[e.name] & inner[x.name] for x in group) and _apart(c, [*group, e]):
                group.append(e)
                break
        else:
            groups.append([e])
    steps: dict[str, Step] = {}
    for group in groups:
        if len(group) > 1:
            c, step = _joined(c, group)
            steps[group[0].name] = step
    return c, steps


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


def _joined(c: Cascade, group: list[Einsum]) -> tuple[Cascade, Step]:
    """The cascade with one Einsum for the group, in an order that keeps sources before readers."""
    name = f"sums_{len(group)}"
    while name in c.monoid_of:
        name += "_"
    old, new = [f"a_{e.name}" for e in group], [f"b_{e.name}" for e in group]
    body = tuple((e.name, Call("add", (Access(a), Access(b)))) for e, a, b in zip(group, old, new, strict=True))
    monoid = Monoid(name, (Const(0.0),) * len(group), (*old, *new), tuple(e.name for e in group), body)
    exprs = [e.expr for e in group if isinstance(e.expr, Reduce)]
    stream = Einsum(tuple(e.output for e in group), Reduce(name, exprs[0].ranks, tuple(x.arg for x in exprs)))
    step = tuple(Take(e.name, "sum", Access(a), x.arg) for e, a, x in zip(group, old, exprs, strict=True))
    waiting = [stream if e is group[0] else e for e in c.einsums if e is group[0] or e not in group]
    made = {p.name for p in c.params}
    order: list[Einsum] = []
    while waiting:
        # A scan reads its own tensor.
        ready = next(e for e in waiting if set(tensors_read(e.expr)) <= made | {o.name for o in e.outputs})
        waiting.remove(ready)
        order.append(ready)
        made |= {o.name for o in ready.outputs}
    return replace(c, einsums=tuple(order), monoids=(*c.monoids, monoid)), step
