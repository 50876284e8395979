"""The loops of streamed ranks: bounded by brackets, cut into pieces, or held on chip entire."""

from __future__ import annotations

from dataclasses import replace
from math import prod

from ..ir.cascade import Access, Call, Const, Expr, Extent, Rank, Reduce, free_ranks, walk
from ..ir.dtypes import DTYPES
from ..ir.tile import For, HeldRank, Map
from ..ir.verify import scan_step
from .fuse import ON_CHIP, VECTOR
from .inline import renamed
from .phases import ALL, Phase, phases, tile_end
from .split import Piece
from .tile_scope import Frame
from .tile_values import Values


class Loops(Values):
    """Opens and closes loops."""

    def _open(self, ranks: tuple[str, ...], size: int, known: bool = False) -> None:
        for r in ranks:
            # A tile of one element would leave nothing to reduce.
            wanted = self.tiling.ranks.get(self.origin.get(r, r), size)
            self.sizes[r] = max(2, wanted) if size > 1 else 1
            self.looped.add(r)
            self.frames.append(Frame({r}, known))

    def _close(self, ranks: tuple[str, ...], phase: Phase = ALL) -> None:
        for r in reversed(ranks):
            frame = self.frames.pop()
            lower = phase.lower
            upper = Extent(self.origin[r]) if r in self.origin and phase.upper is None else phase.upper
            if self.piece is not None and r == self.piece.rank:
                lower, upper = self.piece.bounds(self._length(self.piece, self.sizes[r]), lower, upper)
            self.frames[-1].ops.append(For(r, self.sizes[r], tuple(frame.ops), lower, upper, phase.name))
            del self.sizes[r]
            self.aligned.discard(r)

    def _phases(self, ranks: tuple[str, ...], conditions: frozenset[Expr]) -> list[Phase]:
        """The loops over reduced ranks; brackets bound them where only one rank is reduced."""
        if len(ranks) != 1 or not conditions:
            return [ALL]
        scope = {r for f in self.frames for r in f.ranks}

        def end(r: str, last: bool) -> Expr:
            extent = Extent(self.origin.get(r, r))
            if r not in scope or r in self.held:
                return Call("sub", (extent, Const(1))) if last else Const(0)
            return tile_end(r, self.sizes[r], last, extent)

        reads = [n for c in conditions for n in walk(c) if isinstance(n, Access)]
        single = {r for r in scope if r not in self.held and self.sizes[r] == 1}
        wide = {n.tensor for n in reads if not free_ranks(n) <= single}
        data = {n.tensor for n in reads if n.tensor not in wide and DTYPES[self.types[n.tensor]].is_integer}
        found = phases(conditions, ranks[0], data, end, min(self.tiling.align, self._stream_size(ranks[0])))
        return [
            replace(
                p,
                lower=None if p.lower is None else self.value(p.lower, None),
                upper=None if p.upper is None else self.value(p.upper, None),
            )
            for p in found
        ]

    def _stream_size(self, r: str) -> int:
        return self.tiling.ranks.get(self.origin.get(r, r), self.tiling.stream)

    def _hold(self, e: Reduce) -> Reduce | None:
        """The reduction over ranks that are held on chip entire; None where it has to be a loop."""
        sizes = [self.extents.get(self.origin.get(r, r), 0) for r in e.ranks]
        inside = self.tiling.hold and len(self.frames) > 1 and all(1 < n <= ON_CHIP for n in sizes)
        resident = len(self.frames) == 1 and len(sizes) == 1 and 1 < sizes[0] <= self.tiling.resident and is_row(e)
        if self._scanned() or self._pieces(e) or not (resident or (inside and prod(sizes) <= 4 * ON_CHIP)):
            return None
        names: dict[str, str] = {}
        for r, n in zip(e.ranks, sizes, strict=True):
            taken = self.looped | {x for f in self.frames for x in f.ranks} - set(self.held)
            name, i = r, 0
            while name in taken or name in self.bound:
                i += 1
                name = f"{r}_{i}"
            if name not in self.held:
                of = self.origin.get(r, r)
                self.held[name] = HeldRank(name, -(-n // VECTOR) * VECTOR, of)
                self.sizes[name] = self.held[name].size
                self.origin[name] = of
                self.frames[0].ranks.add(name)
            names[r] = name
        return replace(e, ranks=tuple(names.values()), args=tuple(renamed(a, names) for a in e.args))

    def _length(self, piece: Piece, size: int) -> Expr:
        """A tile with the length of a piece, made before the loops."""
        frame = self.frames[0]
        key = ("length", size)
        if key not in frame.made:
            length = self._tile("length", (), "i64", 0)
            frame.ops.append(Map(length, piece.length(size)))
            frame.made[key] = Access(length.name)
        return frame.made[key]

    def _pieces(self, e: Reduce) -> bool:
        """Whether a reduction is one in pieces, or merges some."""
        cut = self.piece is not None and self.piece.rank in e.ranks and len(self.frames) == 1
        return cut or any(r in self.counts for r in e.ranks)

    def _scanned(self) -> bool:
        return scan_step(self.e) is not None

    def _unshadowed(self, e: Reduce) -> Reduce:
        """A reduction whose ranks are not in scope already: another name loops over the same extent."""
        names: dict[str, str] = {}
        for r in e.ranks:
            if any(r in f.ranks for f in self.frames):
                self.count += 1
                names[r] = f"{r}_{self.count}"
                self.origin[names[r]] = self.origin.get(r, r)
        return replace(e, ranks=tuple(names.get(r, r) for r in e.ranks), args=tuple(renamed(a, names) for a in e.args))

    def _outer(self, e: Reduce, guard: Expr | None) -> frozenset[str]:
        """The ranks in scope with which a reduction varies."""
        scope = frozenset().union(*(f.ranks for f in self.frames))
        found = free_ranks(e) & scope
        return found | (self._depends(guard) if guard is not None else frozenset())


def is_row(e: Reduce) -> bool:
    """Whether what is reduced lies along memory in some tensor, and across it in none."""
    rank = e.ranks[0]
    places = [n.indices for n in walk(e) if isinstance(n, Access) and rank in free_ranks(n)]
    across = any(rank in free_ranks(i) for p in places for i in p[:-1])
    return not across and any(p[-1] == Rank(rank) for p in places)
