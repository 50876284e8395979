"""Reductions cut into pieces that run apart, and the merges that put these together.

`partial` cuts a cascade for its user; this cuts the Einsums of a derived one for a mapping. Of a split rank ``k``,

    L[q], O[q, f] = attend[k](…)     becomes    L_pieces[k_piece, q], O_pieces[k_piece, q, f] = attend[k](…)
                                                L[q], O[q, f] = attend[k_piece](L_pieces[…], O_pieces[…])

where the kernel of the first lets each coordinate of ``k_piece`` see its own stretch of ``k``: a state is an element of
its own monoid, so the second is the same reduction.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod

from ..ir.cascade import (
    Access,
    Call,
    Cascade,
    Const,
    Einsum,
    Expr,
    Extent,
    Output,
    Rank,
    Reduce,
    children,
    free_ranks,
    is_minus_infinity,
    rebuild,
)
from ..ir.errors import InputError
from ..ir.tile import For, TileKernel
from ..ir.verify import scan_step
from .few_rows import least, rows_apart
from .fresh import fresh


@dataclass(frozen=True, slots=True)
class Piece:
    """One reduction in pieces: ``count`` stretches of ``rank``, told apart by the grid's rank ``name``.

    ``components`` gives, by the name of a stacked tensor, the component of the state that it holds.
    """

    rank: str
    name: str
    count: int
    components: Mapping[str, str]

    def length(self, size: int) -> Expr:
        """The length of a stretch, a multiple of the tile ``size``."""
        whole = size * self.count
        tiles = Call("floordiv", (Call("add", (Extent(self.rank), Const(whole - 1))), Const(whole)))
        return Call("mul", (tiles, Const(size)))

    def bounds(self, length: Expr, lower: Expr | None, upper: Expr | None) -> tuple[Expr, Expr]:
        """The bounds of a loop, within those given, for the piece at hand."""
        first = Call("mul", (Rank(self.name), length))
        last = Call("add", (first, length))
        upper = Extent(self.rank) if upper is None else upper
        return first if lower is None else Call("maximum", (lower, first)), Call("minimum", (upper, last))


# Results of a reduction for each coordinate of its rank from which on it stays whole beside others that have fewer: its
# results are programs enough, and to write and merge pieces of them would take longer than all else.
MANY_ROWS = 256


def split(
    c: Cascade, splits: Mapping[str, int], user: Collection[str], extents: Mapping[str, int] | None = None
) -> tuple[Cascade, dict[str, Piece]]:
    """The cascade with the reductions over each rank of ``splits`` in that many pieces, and these by first output.

    With ``extents``, a reduction of many results for the length of its rank stays whole, such as a product of large
    matrices beside sums of columns, unless there is no other. ``user`` names the monoids that the cascade's author
    wrote. Raises `InputError` for a rank over which nothing is reduced that could be cut.
    """
    pieces: dict[str, Piece] = {}
    for rank, count in splits.items():
        if count == 1:
            continue
        before = len(pieces)
        if extents is not None:
            few = {r: extents.get(r, 1) for r in c.ranks}
            c = _Splitter(c, rank, count, user, pieces, few).run()
        if len(pieces) == before:
            c = _Splitter(c, rank, count, user, pieces).run()
        if len(pieces) == before:
            raise InputError(
                f"the mapping splits rank `{rank}`, over which `{c.name}` reduces nothing that could be cut",
                rank=rank,
                expected="1",
                got=str(count),
                hint="split a rank that a sum, an extreme or a stream goes over; see castile explain",
            )
    return c, pieces


# Turns of a loop that make a piece worth its merge, and coordinates that make a kernel worth a second one.
LEAST_TURNS, LEAST_WORK = 4, 1 << 17


def default_splits(
    kernels: Iterable[TileKernel], tiles: Mapping[str, int], extents: Mapping[str, int], units: int
) -> dict[str, int]:
    """In how many pieces, a power of two, loops over a long rank should run, so that few programs keep ``units``
    processors busy: no more than that takes, as pieces are merged."""
    found: dict[str, int] = {}
    kernels = list(kernels)
    for k, apart in zip(kernels, rows_apart(kernels), strict=True):
        loops = {op.rank: op.size for op in k.body if isinstance(op, For) and op.size > 1}
        sizes = [(extents.get(g.rank, 1), tiles.get(g.rank, g.size)) for g in k.grid]
        sizes = [(n, least(size) if g.rank in apart else size) for g, (n, size) in zip(k.grid, sizes, strict=True)]
        programs = prod(-(-extent // size) for extent, size in sizes)
        if len(loops) != 1 or not 0 < programs < units:
            continue
        ((rank, size),) = loops.items()
        length = extents.get(rank, 0)
        turns = -(-length // tiles.get(rank, size)) // LEAST_TURNS
        if turns > 1 and length * prod(extent for extent, _ in sizes) >= LEAST_WORK:
            found[rank] = min(1 << turns.bit_length() - 1, 1 << (-(-units // programs) - 1).bit_length())
    return found


class _Splitter:
    """Cuts the reductions over one rank: of few results, where ``extents`` are given."""

    def __init__(
        self,
        c: Cascade,
        rank: str,
        count: int,
        user: Collection[str],
        pieces: dict[str, Piece],
        extents: Mapping[str, int] | None = None,
    ) -> None:
        self.extents = extents
        self.c = c
        self.rank = rank
        self.count = count
        self.user = user
        self.pieces = pieces
        self.taken = {*c.param_of, *c.ranks, *c.monoid_of, *(o.name for e in c.einsums for o in e.outputs)}
        self.name = fresh(f"{rank}_piece", self.taken)

    def run(self) -> Cascade:
        einsums: list[Einsum] = []
        for e in self.c.einsums:
            einsums += self._einsum(e)
        return replace(self.c, einsums=tuple(einsums))

    def _einsum(self, e: Einsum) -> Iterator[Einsum]:
        if scan_step(e) is not None or self.rank in e.ranks or e.name in self.pieces:
            yield e
        elif isinstance(e.expr, Reduce) and self._cut(e.expr, e.ranks):
            yield from self._apart(e)
        elif len(e.outputs) == 1:
            found: list[Einsum] = []
            e = replace(e, expr=self._hoisted(e.expr, e, found))
            for x in found:
                yield from self._apart(x)
            yield e
        else:
            yield e

    def _cut(self, x: Reduce, rows: Iterable[str]) -> bool:
        """Whether a reduction with a result for each of some rows is cut."""
        few = self.extents is None or prod(self.extents[r] for r in rows) <= MANY_ROWS * self.extents[self.rank]
        return self.rank in x.ranks and x.op != "argmax" and few

    def _hoisted(self, x: Expr, e: Einsum, found: list[Einsum]) -> Expr:
        """The expression with its reductions over the rank as tensors; what a condition guards stays where it is."""
        if isinstance(x, Reduce):
            free = free_ranks(x)
            rows = tuple(r for r in e.ranks if r in free)
            if not self._cut(x, rows):
                return x
            made = Einsum((Output(fresh(f"{e.name}_{x.op}", self.taken), rows),), x)
            found.append(made)
            return Access(made.name, tuple(map(Rank, made.output.ranks)))
        if isinstance(x, Call) and x.op == "where":
            return x
        kids = children(x)
        return rebuild(x, tuple(self._hoisted(k, e, found) for k in kids)) if kids else x

    def _apart(self, e: Einsum) -> tuple[Einsum, Einsum]:
        """The pieces of a reduction, and their merge."""
        assert isinstance(e.expr, Reduce)
        stacked = tuple(Output(fresh(f"{o.name}_pieces", self.taken), (self.name, *o.ranks)) for o in e.outputs)
        components = {s.name: o.name for s, o in zip(stacked, e.outputs, strict=True)}
        self.pieces[stacked[0].name] = Piece(self.rank, self.name, self.count, components)
        args = tuple(Access(s.name, tuple(map(Rank, s.ranks))) for s in stacked)
        merge = Reduce(e.expr.op, (self.name,), tuple(self._elements(e.expr.op, args)))
        return Einsum(stacked, e.expr), replace(e, expr=merge)

    def _elements(self, op: str, args: Iterable[Expr]) -> Iterator[Expr]:
        """States as elements. What a mask left out is still left out: a state of nothing is no -inf that data gave."""
        monoid = self.c.monoid_of.get(op) if op in self.user else None
        for i, x in enumerate(args):
            start = monoid.identity[i] if monoid is not None else None
            masked = start is not None and is_minus_infinity(start)
            yield Call("where", (Call("eq", (x, start)), start, x)) if masked and start is not None else x
