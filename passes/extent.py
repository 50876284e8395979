"""Extents of a cascade that was made from another: the same ranks must keep the same sizes.

A rank that no parameter has takes the largest extent with which what the text reads stays in bounds. A text that reads
less may say another extent, and then means another thing.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import replace

from ..ir.cascade import Access, Call, Cascade, Const, Einsum, Expr, Extent, Output, Rank, free_ranks, walk
from ..ir.errors import CastileError
from ..ir.extents import Binding, bindings, extent_of, resolve
from ..ir.ops import OPS
from ..ir.print import print_expr
from ..ir.types import tensor_types
from .fresh import fresh
from .transpose import Names

# The extents with which two cascades are compared: far apart, and larger than any window written out in a text.
SAMPLES = ((211, 13), (307, -7))


def sizes(c: Cascade) -> tuple[dict[str, Expr], dict[str, tuple[str, int]]]:
    """Extents that are others: ``{"j": extent(k)}`` where j only reads along k, and the parameters' axes read so."""
    known: dict[str, Expr] = {}
    axes: dict[str, tuple[str, int]] = {}
    for b in bindings(c):
        if b.param is not None or not b.within or not all(isinstance(u.index, Rank) for u in b.within):
            continue
        found = {c.indices_of(u.tensor)[u.axis] for u in b.within}
        index = found.pop()
        if not found and isinstance(index, Rank | Const):
            known[b.rank] = known.get(index.name, Extent(index.name)) if isinstance(index, Rank) else index
        first = b.within[0]
        if first.tensor in c.param_of and all((u.tensor, u.axis) == (first.tensor, first.axis) for u in b.within):
            axes[b.rank] = (first.tensor, first.axis)
    return known, axes


def changed_extent(c: Cascade, made: Cascade, names: Names) -> str | None:
    """A rank of a cascade made from ``c`` that would have another extent than in it, or none; None if all agree."""
    for start, step in SAMPLES:
        given = {b.rank: start + step * i for i, b in enumerate(bindings(c)) if b.param is not None}
        before = resolve(c, _fitting(c, given))
        try:
            own = [b.rank for b in bindings(made) if b.param is not None]
        except CastileError as error:
            return error.rank
        known = {r: _size(r, before, names) for r in own}
        try:
            after = resolve(made, {r: n for r, n in known.items() if n is not None})
        except CastileError as error:
            return error.rank
        for r, n in after.items():
            if n != before.get(names.copies.get(r, r), n):
                return r
    return None


def _fitting(c: Cascade, given: dict[str, int]) -> dict[str, int]:
    """Extents no larger than those of the axes along which their ranks read."""
    reads = [
        (index.name, axis.name)
        for e in c.einsums
        for n in walk(e.expr)
        if isinstance(n, Access)
        for index, axis in zip(n.indices, c.indices_of(n.tensor), strict=True)
        if isinstance(index, Rank) and isinstance(axis, Rank) and {index.name, axis.name} <= given.keys()
    ]
    fitting: dict[str, int] = dict(given)
    before: dict[str, int] = {}
    while fitting != before:
        before = dict(fitting)
        for small, large in reads:
            fitting[small] = min(fitting[small], fitting[large])
    return fitting


def _size(rank: str, before: dict[str, int], names: Names) -> int | None:
    origin = names.copies.get(rank, rank)
    if origin in before:
        return before[origin]
    index = names.sizes.get(rank, Rank(rank))
    return int(index.value) if isinstance(index, Const) else extent_of(index, before)


def keeps_extents(c: Cascade, derived: Cascade, instances: Mapping[str, str]) -> bool:
    """Whether ranks that only indices bound get their extents from the same indices as before."""
    before = {b.rank: b for b in bindings(c)}
    try:
        after = bindings(derived)
    except CastileError:
        return False
    found = {b.rank: _places(c, b, instances) for b in before.values()}
    return all(
        b.param is not None or _places(derived, b, instances) == found.get(instances.get(b.rank, b.rank)) for b in after
    )


def with_extents(c: Cascade, made: Cascade) -> Cascade:
    """``made`` with reads that nothing needs but the extents of ranks, where it has put those under conditions.

    Y[p] = X[p] * Z[p]   ->   Y[p] = where(z, 0.0, X[p] * Z[p]);  p_extent[p] = X[p]
    """
    if keeps_extents(c, made, {}):
        return made
    taken = {*tensor_types(made), *made.ranks, *(m.name for m in made.monoids)}
    lost = {(b.rank, u) for b in bindings(c) if b.param is None for u in b.within if not u.guarded}
    lost -= {(b.rank, u) for b in _known(made) for u in b.within}
    reads = []
    for rank, u in sorted(lost, key=lambda x: (x[0], x[1].tensor, x[1].axis, print_expr(x[1].index))):
        places = [Const(0) if isinstance(i, Const) else i for i in c.indices_of(u.tensor)]
        places[u.axis] = u.index
        access = Access(u.tensor, tuple(places))
        ranks = tuple(r for r in c.ranks if r in free_ranks(access))
        reads.append(Einsum((Output(fresh(f"{rank}_extent", taken), ranks),), access))
    return replace(made, einsums=(*made.einsums, *reads))


def _known(c: Cascade) -> tuple[Binding, ...]:
    try:
        return bindings(c)
    except CastileError:
        return ()


def _places(c: Cascade, b: Binding, instances: Mapping[str, str]) -> set[tuple[str, tuple[int, ...]]]:
    """The indices that bound a rank and the axes that they read, by values at two probes, whatever the spelling."""
    found = set()
    for u in b.within:
        axis = c.indices_of(u.tensor)[u.axis]
        size = instances.get(axis.name, axis.name) if isinstance(axis, Rank) else print_expr(axis)
        found.add((size, tuple(_probe(u.index, salt, instances) for salt in (3, 7))))
    return found


def _probe(e: Expr, salt: int, instances: Mapping[str, str]) -> int:
    match e:
        case Const(value=value):
            return int(value)
        case Rank(name=name) | Extent(rank=name):
            return zlib.crc32(f"{instances.get(name, name)}{salt}".encode()) % 10007
        case Call(op=op, args=args):
            return int(OPS[op].numpy(*(_probe(a, salt, instances) for a in args)))
        case _:
            return -1
