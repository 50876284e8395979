"""Reductions of the cascade, tile by tile, into accumulators."""

from __future__ import annotations

from dataclasses import replace
from math import inf, prod

from ..ir.cascade import Access, Call, Cast, Const, Expr, Reduce, walk
from ..ir.dtypes import DTYPES
from ..ir.ops import REDUCTIONS
from ..ir.tile import Dot, Fold, Map, Tile
from ..ir.types import compute_type, settle
from .fuse import VECTOR
from .phases import bracket, without
from .tile_products import Products, mask_of


class Reductions(Products):
    """Writes reductions by themselves."""

    def _fold_monoid(self, e: Reduce, guard: Expr | None) -> list[Expr]:
        """The components of a monoid's reduction."""
        raise NotImplementedError

    def _reduce(self, e: Reduce, guard: Expr | None) -> Expr:
        if guard is not None and self._reads_inside(e):
            guard = None
        key = (e, guard)
        for frame in self.frames:
            if key in frame.made:
                return frame.made[key]
        frame = self.frames[-1]
        plain = e.op in REDUCTIONS and e.op != "argmax"
        held = self._hold(e) if plain and (len(self.frames) == 1 or self._fits(e)) else None
        e = held or self._unshadowed(e)
        self.bound += e.ranks
        frame.made[key] = self._reduced(e, guard, held is not None)
        del self.bound[len(self.bound) - len(e.ranks) :]
        return frame.made[key]

    def _fits(self, e: Reduce) -> bool:
        """Whether a reduction inside a loop may take all of its ranks at once: results of other reductions would have
        to be kept for each of these, unless it contracts them or has few."""
        if not any(isinstance(n, Reduce) for n in walk(e.arg)):
            return True
        mask, inside = mask_of(e.arg) if e.op == "sum" else (None, e.arg)
        if e.op == "sum" and self._fallen_apart(replace(e, args=(inside,)), None, mask) is not None:
            return True
        scope = self._varies(e.arg) & frozenset().union(*(f.ranks for f in self.frames)) - {*e.ranks}
        rows = [r for r in scope if self.sizes.get(r, 1) > 1]
        extents = [self.extents.get(self.origin.get(r, r), 1) for r in e.ranks]
        return len(rows) < 2 or prod(extents) <= VECTOR

    def _reduced(self, e: Reduce, guard: Expr | None, held: bool = False) -> Expr:
        if e.op in self.c.monoid_of:
            return self._fold_monoid(e, guard)[0]
        if e.op == "argmax":
            return self._argmax(e, guard)
        dtype = self._reduced_type(e)
        depends = self._outer(e, guard) - set(e.ranks)
        start = self._identity(e, dtype)
        depth = len(self.frames)
        if held and (whole := self._sum_of_bytes(e, e.ranks) if guard is None else None) is not None:
            return whole if self.checker.infer(whole) == dtype else Cast(dtype, whole)
        total = self._tile(e.op, depends, dtype)
        if held:
            self._reduce_tile(e, guard, total, start, accumulate=False)
            return Access(total.name)
        self.frames[-1].ops.append(Map(total, start))
        for phase in self._phases(e.ranks, bracket(e.op, e.arg)):
            self._open(e.ranks, 1 if self.counts.keys() & set(e.ranks) else self.tiling.stream, bool(phase.known))
            if self.tiling.apart and phase.lower is None:
                self.aligned |= set(e.ranks)
            inner = replace(e, args=(without(e.arg, phase.known, e.ranks),))
            self._reduce_tile(inner, guard, total, start, accumulate=True)
            self._close(e.ranks, phase)
        assert len(self.frames) == depth
        return Access(total.name)

    def _reduce_tile(self, e: Reduce, guard: Expr | None, total: Tile, start: Expr, accumulate: bool) -> None:
        """Reduce the tile of the ranks at hand into another one."""
        over = tuple(r for r in e.ranks if self.sizes[r] > 1)
        if not over:
            joined = Call(REDUCTIONS[e.op].combine, (Access(total.name), self.value(e.arg, guard)))
            self.frames[-1].ops.append(Map(total, joined))
            return
        if e.op == "sum" and guard is None and accumulate and self._sum_apart(e, total, over):
            return
        if accumulate and guard is None and (whole := self._sum_of_bytes(e, over, total)) is not None:
            if whole != Access(total.name):
                self.frames[-1].ops.append(Map(total, Call("add", (Access(total.name), whole))))
            return
        mask, inside = mask_of(e.arg) if e.op == "sum" and self._reads_inside(e.arg) else (None, e.arg)
        pair = None
        if e.op == "sum" and DTYPES[total.dtype].is_float:
            # Where a loop's bounds know a condition, a term may vary with less than the sum.
            pair = self._factors(replace(e, args=(inside,)), guard, total.axes, mask)
        if pair is not None:
            dot = Dot(total, pair.left, pair.right, over, accumulate, pair.operand, pair.annihilates)
            self.frames[-1].ops.append(dot)
            return
        value = self.value(e.arg, guard)
        if e.op not in ("any", "all") and settle(self.checker.infer(value)) == "bool":
            value = Cast("i32", value)
        if guard is not None:
            value = Call("where", (guard, value, start))
        self.frames[-1].ops.append(Fold(total, e.op, over, value, accumulate=accumulate))

    def _identity(self, e: Reduce, dtype: str) -> Expr:
        row = DTYPES[dtype]
        if e.op in ("max", "min") and row.is_integer:
            value = row.lowest if e.op == "max" else row.highest
            return Call("neg", (Const(-value),)) if value < 0 else Const(value)
        identity = REDUCTIONS[e.op].identity
        if isinstance(identity, bool):
            return Const(identity)
        assert identity is not None
        if identity == -inf:
            return Call("neg", (Const(inf),))
        return Const(float(identity)) if row.is_float else Const(int(identity))

    def _argmax(self, e: Reduce, guard: Expr | None) -> Expr:
        """The place of the first greatest: value and place go together, tile by tile; a NaN wins and stays."""
        dtype = settle(compute_type(settle(self.checker.infer(e.arg))))
        depends = self._outer(e, guard)
        low = self._identity(Reduce("max", e.ranks, e.args), dtype)
        best, place = self._tile("best", depends, dtype), self._tile("place", depends, "i64")
        self.frames[-1].ops += [Map(best, low), Map(place, Const(0))]
        self._open(e.ranks, self.tiling.stream)
        value = self.value(e.arg, guard)
        if guard is not None:
            value = Call("where", (guard, value, low))
        here, at = self._tile("top", depends, dtype), self._tile("at", depends, "i64")
        ops = self.frames[-1].ops
        over = tuple(r for r in e.ranks if self.sizes[r] > 1)
        ops += [Fold(here, "max", over, value), Fold(at, "argmax", over, value)]
        b, h = Access(best.name), Access(here.name)
        better: Expr = Call("or", (Call("gt", (h, b)), Call("and", (Call("ne", (h, h)), Call("eq", (b, b))))))
        ops.append(Map(place, Call("where", (better, Access(at.name), Access(place.name)))))
        ops.append(Map(best, Call("where", (better, h, b))))
        self._close(e.ranks)
        return Access(place.name)
