"""Expressions over tiles for those of a cascade: loads, and costly values that several read."""

from __future__ import annotations

from dataclasses import replace

from ..ir.cascade import Access, Call, Cast, Const, Expr, Extent, Rank, Reduce, free_ranks, literal_value, walk
from ..ir.extents import LARGEST_EXTENT
from ..ir.interval import interval
from ..ir.ops import OPS
from ..ir.tile import Load
from ..ir.types import compute_type
from .inline import renamed
from .tile_scope import Scope


class Values(Scope):
    """Writes values: what a cascade reads becomes loads where they belong."""

    def _reduce(self, e: Reduce, guard: Expr | None) -> Expr:
        """A reduction, written where it belongs."""
        raise NotImplementedError

    def value(self, e: Expr, guard: Expr | None) -> Expr:
        """An expression over tiles for one of the cascade; loads and inner reductions are written where they belong."""
        match e:
            case Const() | Rank() | Extent():
                return e
            case Access():
                return self._access(e, guard)
            case Cast(arg=arg):
                return replace(e, arg=self.value(arg, guard))
            case Reduce():
                return self._reduce(e, guard)
            case Call(op="where", args=(condition, a, b)):
                test = self.value(condition, guard)
                yes = self.value(a, guarded(guard, test))
                no = self.value(b, guarded(guard, Call("not", (test,))))
                return replace(e, args=(test, yes, no))
            case Call(op=op, args=args):
                made = replace(e, args=tuple(self.value(a, guard) for a in args))
                return self._shared(made) if OPS[op].cost[0] == "special" else made

    def _shared(self, e: Expr) -> Expr:
        """A costly value over tiles, computed once for all that read it."""
        depends = self._depends(e)
        frame = self.frames[self._frame_of(depends, e)]
        if e not in frame.made:
            frame.made[e] = self._map("f", e)
        return frame.made[e]

    def _access(self, e: Access, guard: Expr | None, dtype: str | None = None) -> Expr:
        """A tile with a tensor's elements, in the type that it computes in unless another is given."""
        if not e.indices and e.tensor in self.local:
            return self.local[e.tensor]
        if e.tensor in self.results:
            return self.results[e.tensor]
        if not e.indices and e.tensor in self.c.param_of:
            return e
        indices = tuple(self.value(i, guard) for i in e.indices)
        source = Access(e.tensor, indices)
        # What the tensor's own ranks index, or what is limited by its form, lies inside it whatever guards the read.
        plain = self._inside(e)
        held = None if plain else guard
        depends = self._depends(source) | (self._depends(held) if held is not None else frozenset())
        level = self._frame_of(depends | free_ranks(source), source, *([held] if held is not None else []))
        if dtype is None:
            dtype = self.types[e.tensor]
            dtype = dtype if dtype == "bool" else compute_type(dtype)
        key = (source, held, dtype)
        if not plain:
            # What the bounds of a loop say of a read holds inside it alone.
            level = max([level, *(i for i, f in enumerate(self.frames) if f.known)])
        if e.tensor == self.e.name:
            # A scan reads what an earlier step stored: never kept from one step to the next.
            level = len(self.frames) - 1
        frame = self.frames[level]
        if key in frame.made and e.tensor != self.e.name:
            return frame.made[key]
        tile = self._tile(e.tensor, depends, dtype, level)
        frame.ops.append(Load(tile, source, held))
        frame.made[key] = Access(tile.name)
        return frame.made[key]

    def _inside(self, e: Access) -> bool:
        """Whether every index stays inside its axis whatever a condition says, so that none is needed around the read.

        It is the axis's own, or one that its rank's extent keeps in bounds, or limited by its form; or the cascade
        reads there under no condition.
        """
        e = self._meant(e)
        if e in self.inside:
            return True
        axes = enumerate(zip(e.indices, self.c.indices_of(e.tensor), strict=True)) if e.indices else ()
        return all(i == j or (e.tensor, axis, i) in self.bounded or within(i, j) for axis, (i, j) in axes)

    def _meant(self, e: Access) -> Access:
        """A read with the ranks that stand under another name, whose extents they have, where it keeps them apart."""
        found = renamed(e, self.origin)
        assert isinstance(found, Access)
        return found if len(free_ranks(found)) == len(free_ranks(e)) else e

    def _reads_inside(self, e: Expr) -> bool:
        """Whether all that an expression reads lies inside its tensor whatever guards it."""
        return all(self._inside(n) for n in walk(e) if isinstance(n, Access))


def guarded(guard: Expr | None, test: Expr) -> Expr:
    """A test that holds under a guard, if there is one."""
    return test if guard is None else Call("and", (guard, test))


def within(index: Expr, declared: Expr) -> bool:
    """Whether an index is limited by its form to the axis's literal size."""
    span = interval(index, dict.fromkeys(free_ranks(index), (0, LARGEST_EXTENT - 1)))
    size = literal_value(declared)
    return span is not None and isinstance(size, int) and span[0] >= 0 and span[1] < size
