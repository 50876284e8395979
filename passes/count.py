"""Count passes: how many traversals of a whole fiber of a rank a cascade needs, whatever its mapping.

The definition is FuseMax's (arXiv 2406.10491, section III): another pass begins where elements must be visited again
after all of them were. With d(value) the number of traversals of k that must have ended before the value exists: a
reduction over k of what reads some tensor along k has d = d(argument) + 1, anything else the d of what it reads; the
count is the greatest d of a reduction, or d + 1 of an output that is indexed by k.

A state is counted component by component: FlashAttention's maximum does not wait for what its values wait for.
Counted per bound instance: in ``O[k, f]``, where O was made by reducing over its own k, that inner k is another one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ..ir.cascade import Access, Cascade, Einsum, Expr, Output, Reduce, children, free_ranks, live_einsums, tensors_read
from ..ir.verify import reduced_ranks, scan_step

# The ranks of a tensor through which the counted rank's coordinate comes in.
Carrying = frozenset[str]
Lookup = Callable[[str, Carrying], int]


def count_passes(c: Cascade) -> dict[str, int]:
    """The number of passes over each rank that is reduced or scanned, in order of first appearance.

    Softmax as written has ``{"k": 3}``: a maximum, a sum, and the output along k.
    """
    found = _depths(c)
    return {
        rank: max((d + (rank in o.ranks and o.name in c.outputs) for o, d in depths), default=0)
        for rank, depths in found.items()
    }


def traversals(c: Cascade) -> dict[str, dict[str, int]]:
    """For each rank that is reduced or scanned: the traversal of it in which each tensor that iterates it is made.

    Softmax as written has ``{"k": {"M": 1, "P": 2, "L": 2, "Y": 3}}``. Tensors that no output needs are left out.
    """
    inside = {o.name: reduced_ranks((e.expr,)) for e in c.einsums for o in e.outputs}
    return {
        rank: {o.name: d + (rank in o.ranks) for o, d in depths if rank in o.ranks or rank in inside[o.name]}
        for rank, depths in _depths(c).items()
    }


def needed(c: Cascade) -> frozenset[str]:
    """The tensors that the outputs depend on, themselves included."""
    live = live_einsums(c.einsums, c.outputs)
    return frozenset((*c.outputs, *(n for e in live for n in (*(o.name for o in e.outputs), *tensors_read(e.expr)))))


def _depths(c: Cascade) -> dict[str, list[tuple[Output, int]]]:
    """For each rank that is reduced or scanned, d of every tensor that the outputs need."""
    live = needed(c)
    einsums = tuple(e for e in c.einsums if any(o.name in live for o in e.outputs))
    scanned = {s.rank for e in einsums if (s := scan_step(e)) is not None}
    wanted = reduced_ranks(e.expr for e in einsums) | scanned
    return {r: _depths_over(c, einsums, r) for r in c.ranks if r in wanted}


def _depths_over(c: Cascade, einsums: tuple[Einsum, ...], rank: str) -> list[tuple[Output, int]]:
    own = {o.name: frozenset({rank} & set(o.ranks)) for e in einsums for o in e.outputs}
    asked: dict[str, set[Carrying]] = {name: {carrying} for name, carrying in own.items()}

    def ask(tensor: str, carrying: Carrying) -> int:
        if tensor in asked:
            asked[tensor].add(carrying)
        return 0

    # Backwards, in which ways each tensor is read; then forwards, its depth in each of them.
    parts = [(e, _parts(c, e)) for e in einsums]
    for e, made in reversed(parts):
        for name, expr in made.items():
            for carrying in asked[name]:
                _depth(c, e, expr, rank, carrying, ask)
    depths: dict[tuple[str, Carrying], int] = {}
    for e, made in parts:
        for name, expr in made.items():
            for carrying in asked[name]:
                value = _depth(c, e, expr, rank, carrying, lambda t, s: depths.get((t, s), 0))
                depths[name, carrying] = value
    return [(o, depths[o.name, own[o.name]]) for e in einsums for o in e.outputs]


def _parts(c: Cascade, e: Einsum) -> dict[str, Expr]:
    """What each output of an Einsum depends on: of a state, the arguments that reach its component."""
    m = c.monoid_of.get(e.expr.op) if isinstance(e.expr, Reduce) else None
    if m is None or not isinstance(e.expr, Reduce) or len(e.outputs) == 1:
        return {o.name: e.expr for o in e.outputs}
    size = len(m.identity)
    reached = {p: frozenset({i % size}) for i, p in enumerate(m.params)}
    for name, value in m.body:
        reached[name] = frozenset().union(*(reached.get(t, frozenset()) for t in tensors_read(value)))
    found: dict[str, Expr] = {}
    for i, (o, result) in enumerate(zip(e.outputs, m.results, strict=True)):
        mine = reached[result] | {i}
        found[o.name] = replace(e.expr, args=tuple(a for j, a in enumerate(e.expr.args) if j in mine))
    return found


def _reads_along(e: Expr, rank: str) -> bool:
    """Whether an expression reads some tensor along a rank: else a reduction over the rank visits no fiber of it."""
    match e:
        case Access():
            return rank in free_ranks(e)
        case Reduce(ranks=ranks) if rank in ranks:
            return False
        case _:
            return any(_reads_along(k, rank) for k in children(e))


def _depth(c: Cascade, e: Einsum, expr: Expr, rank: str, carrying: Carrying, lookup: Lookup) -> int:
    """Traversals of ``rank`` that must have ended before the expression has a value.

    ``carrying`` holds the ranks in scope whose coordinate stems from the counted rank.
    """
    match expr:
        case Reduce(ranks=ranks, args=args):
            if rank not in ranks:
                return max(_depth(c, e, a, rank, carrying - set(ranks), lookup) for a in args)
            outside = carrying - {rank}
            if not any(_reads_along(a, rank) for a in args):
                return max(_depth(c, e, a, rank, outside, lookup) for a in args)
            if any(free_ranks(a) & outside for a in args):
                # The argument varies with the outer coordinate, so this is another instance of the rank.
                return max(_depth(c, e, a, rank, outside, lookup) for a in args)
            return 1 + max(_depth(c, e, a, rank, outside | {rank}, lookup) for a in args)
        case Access(tensor=tensor, indices=indices):
            inner = max((_depth(c, e, i, rank, carrying, lookup) for i in indices), default=0)
            if tensor in c.param_of or tensor in (o.name for o in e.outputs):
                return inner
            source = c.einsum_of[tensor]
            own = next(o.ranks for o in source.outputs if o.name == tensor)
            reads = frozenset(r for r, i in zip(own, indices, strict=True) if free_ranks(i) & carrying)
            scan = scan_step(source)
            if scan is not None and scan.rank == rank and rank not in reads:
                # The last entry of a scan, read from outside it, exists only when the scan has gone along the rank.
                return max(inner, lookup(tensor, reads | {rank}) + 1)
            return max(inner, lookup(tensor, reads))
        case _:
            return max((_depth(c, e, k, rank, carrying, lookup) for k in children(expr)), default=0)
