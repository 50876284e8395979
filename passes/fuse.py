"""What runs together: reductions inside the loops that read them, maps after what they read.

A reduction is computed again by each reader that fuses it, so it is fused only where no reader repeats it: along output
ranks that it lacks, a reader would, unless the rank fits on chip and is one tile.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from math import prod

from ..ir.cascade import Access, Cascade, Cast, Einsum, Expr, Rank, Reduce, tensors_read, walk
from ..ir.ops import REDUCTIONS
from ..ir.verify import scan_step

# A rank of at most this extent is kept whole in one tile, so that what does not vary along it is computed once.
ON_CHIP = 256

# What the size of a rank that is kept on chip entire is a multiple of.
VECTOR = 16

# Rows from which on a kernel that has no other ranks to share out keeps every thread busy.
ROWS_ENOUGH = 8


def fusible(c: Cascade, extents: Mapping[str, int]) -> dict[str, tuple[tuple[str, ...], Expr]]:
    """The reductions to compute in the loops that read them: no reader repeats them, and each reduces a rank of theirs.

    A reader would repeat a reduction along output ranks that it does not have; ranks that fit on chip do not count.
    """
    found: dict[str, tuple[tuple[str, ...], Expr]] = {}
    readers: dict[str, list[Einsum]] = {}
    through: dict[str, set[str]] = {}
    for e in c.einsums:
        sources = set(tensors_read(e.expr))
        for t in list(sources):
            sources |= through.get(t, set())
        if is_map(e) and e.name not in c.outputs:
            through[e.name] = sources
            continue
        for t in sources:
            readers.setdefault(t, []).append(e)
    for e in c.einsums:
        plain = (
            len(e.outputs) == 1 and e.reductions and all(n.op in REDUCTIONS and n.op != "argmax" for n in e.reductions)
        )
        if not plain or e.name in c.outputs or scan_step(e) is not None or not readers.get(e.name):
            continue
        mine = set(e.output.ranks)
        good = all(
            scan_step(r) is None
            and {x for n in r.reductions for x in n.ranks} & mine
            and all(extents.get(x, ON_CHIP + 1) <= ON_CHIP for x in set(r.ranks) - mine)
            for r in readers[e.name]
        )
        if good:
            found[e.name] = (e.output.ranks, e.expr)
    return found


def nominal_extents(c: Cascade) -> dict[str, int]:
    """Extents to judge fusion by where none are given: ranks that fit on chip 64, all others 2048.

    A rank is taken to fit on chip if it is contracted inside a loop that reduces the result again (a head dimension),
    or if a stream carries a value along it that its extremes do not have (the values of attention).
    """
    small: set[str] = set()
    for e in c.einsums:
        if len(e.outputs) > 1:
            narrow = min((set(o.ranks) for o in e.outputs), key=len)
            small |= {r for o in e.outputs for r in o.ranks} - narrow
        elif isinstance(e.expr, Reduce) and e.expr.op == "sum" and set(e.output.ranks) & _reduced_by_readers(c, e.name):
            small |= set(e.expr.ranks)
    return {r: 64 if r in small else 2048 for r in c.ranks}


def _reduced_by_readers(c: Cascade, name: str) -> set[str]:
    """The ranks over which those that read a tensor, through maps or not, reduce."""
    names = {name}
    found: set[str] = set()
    for e in c.einsums:
        if names & set(tensors_read(e.expr)):
            if is_map(e):
                names.add(e.name)
            found |= {r for n in e.reductions for r in n.ranks}
    return found


def epilogues(c: Cascade, e: Einsum) -> list[Einsum]:
    """The output maps that read an Einsum's results, element for element, and nothing that comes after it."""
    if scan_step(e) is not None:
        return []
    own = {o.name: tuple(Rank(r) for r in o.ranks) for o in e.outputs}
    place = c.einsums.index(c.einsum_of[e.name])
    before = {p.name for p in c.params} | {o.name for x in c.einsums[:place] for o in x.outputs} | set(own)
    found = []
    for m in c.einsums[place + 1 :]:
        reads = [n for n in walk(m.expr) if isinstance(n, Access)]
        mine = [n for n in reads if n.tensor in own]
        good = is_map(m) and m.name in c.outputs and mine and all(n.indices == own[n.tensor] for n in mine)
        if good and set(m.output.ranks) <= set(e.ranks) and {n.tensor for n in reads} <= before:
            found.append(m)
    return found


def stored(c: Cascade, e: Einsum, absorbed: set[str]) -> set[str]:
    """Which of an Einsum's tensors somebody outside its kernel reads."""
    readers = {t for x in c.einsums if x.name not in absorbed for t in tensors_read(x.expr)}
    names = {o.name for o in e.outputs}
    return names & (readers | set(c.outputs)) or (names if not absorbed else set())


def is_map(e: Einsum) -> bool:
    return len(e.outputs) == 1 and not e.reductions and scan_step(e) is None


def converted(e: Einsum, types: Mapping[str, str]) -> Expr:
    """A map's value as its tensor would hold it."""
    return Cast(types[e.name], e.expr) if e.output.dtype is not None else e.expr


def is_row_reduction(e: Einsum) -> bool:
    """Whether an Einsum is one reduction by a built-in monoid, read along a row."""
    plain = len(e.outputs) == 1 and isinstance(e.expr, Reduce) and e.expr.op in REDUCTIONS
    return plain and scan_step(e) is None


def rows_enough(e: Einsum, extents: Mapping[str, int]) -> bool:
    """Whether an Einsum has rows enough to keep all threads busy, so that what follows each may stay with it."""
    if scan_step(e) is not None or not e.reductions:
        return False
    return prod(extents.get(r, 1) for r in e.ranks) >= ROWS_ENOUGH


def cheapest_first(
    c: Cascade, wanted: Collection[str] = (), tied: Mapping[str, Sequence[str]] | None = None
) -> tuple[Einsum, ...]:
    """The Einsums in an order that keeps sources before readers and else puts small iteration spaces first.

    So a norm's statistics come before the contraction that they scale, and what joins the two is an epilogue of it.
    Output maps that nobody reads, nor wants for a step, come last, when it is known whose rows they belong to.
    ``tied`` is as in `in_order`.
    """
    read = {t for x in c.einsums for t in tensors_read(x.expr)} | set(wanted)
    last = {x.name for x in c.einsums if is_map(x) and x.name in c.outputs and x.name not in read}

    def cost(x: Einsum) -> tuple[bool, int]:
        return x.name in last, len({*x.ranks, *(r for n in x.reductions for r in n.ranks)})

    return in_order(c, c.einsums, tied, cost)


def in_order(
    c: Cascade,
    einsums: Iterable[Einsum],
    tied: Mapping[str, Sequence[str]] | None = None,
    cost: Callable[[Einsum], tuple[bool, int]] = lambda _: (False, 0),
) -> tuple[Einsum, ...]:
    """Einsums with sources before readers; of those that could be next the cheapest, else the first, comes next.

    ``tied`` names what is made with an Einsum, and comes right after it.
    """
    tied = tied or {}
    waiting = list(einsums)
    named = {x.name: x for x in waiting}
    later = {name for names in tied.values() for name in names}
    made = {p.name for p in c.params}
    order: list[Einsum] = []
    while waiting:
        found: list[list[Einsum]] = []
        for x in waiting:
            together = [x, *(named[name] for name in tied.get(x.name, ()))]
            # A scan reads its own tensor.
            if x.name not in later and all(set(tensors_read(y.expr)) <= made | _names(y) for y in together):
                found.append(together)
        best = min(found, key=lambda together: cost(together[0]))
        order += best
        waiting = [x for x in waiting if x not in best]
        made = made.union(*map(_names, best))
    return tuple(order)


def _names(x: Einsum) -> set[str]:
    return {o.name for o in x.outputs}
