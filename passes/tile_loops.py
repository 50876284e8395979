"""The loops of streamed ranks: bounded by brackets, cut into pieces, or held on chip entire."""

from __future__ import annotations

from dataclasses import replace
from math import prod

from ..ir.cascade import Access, Call, Const, Expr, Extent, Rank, Reduce, free_ranks, walk
from ..ir.dtypes import DTYPES
from ..ir.tile import Fold, For, HeldRank, Map
from ..ir.verify import scan_step
from .fuse import ON_CHIP, VECTOR
from .inline import renamed
from .phases import ALL, Phase, phases, tile_end
from .split import Piece
from .step import Take
from .tile_scope import Frame
from .tile_values import Values


class Loops(Values):
    """Opens and closes loops."""

    def _open(self, ranks: tuple[str, ...], size: int, known: bool = False) -> None:
        wanted = {r: self.tiling.ranks.get(self.origin.get(r, r), size) if size > 1 else 1 for r in ranks}
        if size > 1 and all(n == 1 for n in wanted.values()):
            # Tiles of one element would leave nothing to reduce.
            wanted[ranks[-1]] = 2
        for r in ranks:
            self.sizes[r] = wanted[r]
            self.looped.add(r)
            self.frames.append(Frame({r}, known))

    def _close(self, ranks: tuple[str, ...], phase: Phase = ALL) -> None:
        meets: list[str] = []
        for x in (self.value(x, None) for x in phase.meets or ()):
            meets += [x.tensor] if isinstance(x, Access) and x.tensor in self.own else []
        for r in reversed(ranks):
            frame = self.frames.pop()
            lower = phase.lower
            upper = phase.upper
            if (origin := self.origin.get(r)) is not None:
                # Nothing but this says how far a rank goes that stands for another.
                whole = Extent(origin)
                upper = whole if upper in (None, whole) else Call("minimum", (upper, whole))
            if self.piece is not None and r == self.piece.rank:
                lower, upper = self.piece.bounds(self._length(self.piece, self.sizes[r]), lower, upper)
            own = phase.own if r == ranks[-1] else (None, None)
            pair = (meets[0], meets[1]) if r == ranks[-1] and len(meets) == 2 else None
            loop = For(r, self.sizes[r], tuple(frame.ops), lower, upper, phase.name, own=own, meets=pair)
            self.frames[-1].ops.append(loop)
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
        tiled = {r for r in scope if r not in self.held and self.sizes[r] > 1}

        def one(r: str, last: bool) -> Expr:
            return Rank(r) if r in tiled else end(r, last)

        found = phases(conditions, ranks[0], data, end, min(self.tiling.align, self._stream_size(ranks[0])), one)

        def known(e: Expr | None) -> Expr | None:
            return None if e is None else self.value(e, None)

        loops = [
            replace(p, lower=known(p.lower), upper=known(p.upper), own=(known(p.own[0]), known(p.own[1])))
            for p in found
        ]
        return self._meeting(ranks[0], conditions, loops) if self.tiling.meet else loops

    def _meeting(self, rank: str, conditions: frozenset[Expr], loops: list[Phase]) -> list[Phase]:
        """The loops cut to where data that must be equal can be, if there is much to do in them.

        Of documents, ``where(a[q] == b[k], …)``, a tile of q knows the least and the greatest: it meets none before the
        first k with ``least <= b[k] <= greatest``, nor after the last.
        """
        nested = [n for n in self.e.reductions if n is not self.e.expr]
        nested += [n for s in self.step or () if isinstance(s, Take) for n in walk(s.element) if isinstance(n, Reduce)]
        pairs = [p for c in sorted(conditions, key=repr) if (p := self._equal(c, rank)) is not None]
        if not nested or not pairs:
            return loops
        (mine, theirs), ops = pairs[0], self.frames[-1].ops
        held = self.value(mine, None)
        over = tuple(r for r in self._depends(held) if self.sizes[r] > 1)
        ends = []
        for op in ("min", "max"):
            end: Expr = held
            if over:
                tile = self._tile(op, self._depends(held) - set(over), self.types[mine.tensor])
                ops.append(Fold(tile, op, over, held))
                end = Access(tile.name)
            ends.append(end)
        first, last = (self._tile(name, (), "i64") for name in ("first", "last"))
        ops += [Map(first, Extent(self.origin.get(rank, rank))), Map(last, Const(0))]
        lower, upper = loops[0].lower, loops[-1].upper
        self._open((rank,), self.tiling.stream)
        found = self.value(theirs, None)
        meets = Call("and", (Call("ge", (found, ends[0])), Call("le", (found, ends[1]))))
        for tile, op, place in ((first, "min", Rank(rank)), (last, "max", Call("add", (Rank(rank), Const(1))))):
            value = Call("where", (meets, place, Access(tile.name)))
            self.frames[-1].ops.append(Fold(tile, op, (rank,), value, accumulate=True))
        self._close((rank,), Phase("all", lower, upper))
        low, high = Access(first.name), Access(last.name)
        return [
            replace(
                p,
                lower=low if p.lower is None else Call("maximum", (p.lower, low)),
                upper=high if p.upper is None else Call("minimum", (p.upper, high)),
                meets=(mine, theirs) if over else None,
            )
            for p in loops
        ]

    def _equal(self, c: Expr, rank: str) -> tuple[Access, Access] | None:
        """The two sides of a condition that integers are equal, of which but one, the second, varies with a rank."""
        match c:
            case Call(op="eq", args=(Access() as a, Access() as b)):
                for mine, theirs in ((a, b), (b, a)):
                    others = free_ranks(theirs) - {rank}
                    whole = all(self.types[x.tensor] in ("i32", "i64") and self._inside(x) for x in (mine, theirs))
                    if rank in free_ranks(theirs) and rank not in free_ranks(mine) and whole:
                        return (mine, theirs) if all(self.sizes.get(r, 1) == 1 for r in others) else None
        return None

    def _stream_size(self, r: str) -> int:
        return self.tiling.ranks.get(self.origin.get(r, r), self.tiling.stream)

    def _hold(self, e: Reduce) -> Reduce | None:
        """The reduction over ranks that are held on chip entire; None where it has to be a loop."""
        sizes = [self.extents.get(self.origin.get(r, r), 0) for r in e.ranks]
        inside = self.tiling.hold and len(self.frames) > 1 and all(1 < n <= ON_CHIP for n in sizes)
        resident = len(self.frames) == 1 and len(sizes) == 1 and 1 < sizes[0] <= self.tiling.resident
        resident = resident and (is_row(e) or self._stream_size(e.ranks[0]) >= sizes[0])
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
