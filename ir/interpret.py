"""A NumPy interpreter of tile programs: so that a mapping can be tested without a compiler.

It runs every grid point and loop as the program says, on the active coordinates only, with values in the tiles' own
types: float tiles of f32 or narrower hold float32, so what it computes has a kernel's rounding, not the oracle's.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .cascade import Access, Call, Cast, Const, Expr, Extent, Rank, Reduce, literal_value
from .dtypes import DTYPES, round_to, rounds, wrap
from .errors import EvaluationError
from .ops import OPS, REDUCTIONS
from .scalar import Array, array_type, common, convert
from .tile import Dot, Fold, For, Load, Map, Op, Store, Tile, TileKernel, lacking_ranks
from .types import TypeChecker, computed_in, settle


def held(dtype: str) -> Any:
    """The NumPy type in which a tile's values are held: f32 for narrower floats, as kernels compute."""
    return array_type(dtype) if dtype == "f64" or not DTYPES[dtype].is_float else np.float32


@dataclass(frozen=True, slots=True)
class Span:
    """The active coordinates of a rank in scope."""

    start: int
    stop: int

    def coordinates(self) -> Array:
        return np.arange(self.start, self.stop, dtype=np.int64)


def run_kernel(k: TileKernel, arrays: dict[str, Array], extents: Mapping[str, int]) -> None:
    """Run a kernel on arrays, writing its outputs in place. Inputs are float64 or integer arrays; outputs likewise."""
    always, extents = lacking_ranks(k), {**extents, **k.fixed}
    tiles = [range(0, max(extents[g.rank], 1 if g.rank in always else 0), g.size) for g in k.grid]
    with np.errstate(all="ignore"):
        for place in itertools.product(*tiles):
            spans = {g.rank: Span(a, min(a + g.size, extents[g.rank])) for g, a in zip(k.grid, place, strict=True)}
            spans.update({h.rank: Span(0, extents[h.of]) for h in k.held})
            _Run(k, arrays, extents, spans).ops(k.body)


class _Run:
    """One grid point: the spans of the ranks in scope and the tiles made so far."""

    def __init__(
        self, k: TileKernel, arrays: dict[str, Array], extents: Mapping[str, int], spans: dict[str, Span]
    ) -> None:
        self.k = k
        self.arrays = arrays
        self.extents = extents
        self.spans = spans
        self.tiles: dict[str, tuple[Tile, Array]] = {}
        self.types = {p.name: p.dtype for p in k.tensors}
        self.checker = TypeChecker(self.types, {})

    def ops(self, body: tuple[Op, ...]) -> None:
        for op in body:
            match op:
                case For():
                    self._for(op)
                case Load():
                    self._put(op.tile, self._load(op))
                case Map(tile=tile, expr=expr):
                    self._put(tile, self.expr(expr, tile.axes))
                case Fold():
                    self._fold(op)
                case Dot():
                    self._dot(op)
                case Store():
                    self._store(op)

    def _for(self, op: For) -> None:
        lower = 0 if op.lower is None else int(self.expr(op.lower, ()).reshape(()))
        upper = self.extents[op.rank] if op.upper is None else int(self.expr(op.upper, ()).reshape(()))
        lower, upper = max(0, lower), min(upper, self.extents.get(op.rank, upper))
        starts = range(lower - lower % op.size, upper, op.size)
        for start in reversed(starts) if op.reverse else starts:
            span = Span(max(start, lower), min(start + op.size, upper))
            if span.stop > span.start:
                self.spans[op.rank] = span
                self.ops(op.body)
        self.spans.pop(op.rank, None)

    def shape(self, axes: tuple[str, ...]) -> tuple[int, ...]:
        return tuple(self.spans[a].stop - self.spans[a].start for a in axes)

    def _put(self, tile: Tile, value: Array) -> None:
        if DTYPES[tile.dtype].is_float:
            value = value.astype(np.float64)
            value = round_to(value, tile.dtype) if rounds(tile.dtype) else value
        elif value.dtype.kind == "f" or DTYPES[tile.dtype].kind == "bool":
            value = convert(value, tile.dtype)
        else:
            value = wrap(value.astype(np.int64), tile.dtype)
        self.types[tile.name] = tile.dtype
        full = np.broadcast_to(value, self.shape(tile.axes)).astype(held(tile.dtype))
        self.tiles[tile.name] = (tile, full)

    def _load(self, op: Load) -> Array:
        source = self.arrays[op.source.tensor]
        shape = self.shape(op.tile.axes)
        indices = [np.broadcast_to(self.expr(i, op.tile.axes), shape) for i in op.source.indices]
        if not indices:
            return source.reshape((1,) * len(shape))
        live = np.ones(shape, bool) if op.guard is None else np.broadcast_to(self.expr(op.guard, op.tile.axes), shape)
        for axis, index in enumerate(indices):
            bad = live & ((index < 0) | (index >= source.shape[axis]))
            if bad.any():
                raise EvaluationError(f"`{op.source.tensor}` is read at {int(index[bad][0])} along axis {axis}")
        safe = tuple(np.where(live, i, 0) for i in indices)
        if not live.any():
            return np.full(shape, op.other, source.dtype)
        return np.where(live, source[safe], np.asarray(op.other).astype(source.dtype))

    def _fold(self, op: Fold) -> None:
        axes = op.tile.axes + op.over
        shape = self.shape(axes)
        value = np.broadcast_to(self.expr(op.expr, axes), shape)
        if value.dtype == bool and op.op not in ("any", "all"):
            value = value.astype(np.int64)
        over = tuple(range(len(op.tile.axes), len(axes)))
        if op.op == "argmax":
            place = np.argmax(value, axis=over[0]) if math.prod(shape) else np.zeros(shape[:-1], np.int64)
            self._put(op.tile, place + self.spans[op.over[0]].start)
            return
        row = REDUCTIONS[op.op]
        if math.prod(shape) == 0:
            result = np.full(shape[: len(op.tile.axes)], row.identity)
        else:
            result = np.asarray(row.numpy(value, axis=over))
        if op.accumulate:
            result = OPS[row.combine].numpy(*common(self.tiles[op.tile.name][1], result))
        self._put(op.tile, result)

    def _dot(self, op: Dot) -> None:
        axes = op.tile.axes + op.over
        order = {a: i for i, a in enumerate(axes)}
        operands: list[Any] = []
        for name in (op.left, op.right):
            tile, value = self.tiles[name]
            if op.operand is not None:
                value = round_to(value.astype(np.float64), op.operand)
            wide = value.astype(np.float64 if op.tile.dtype == "f64" else held(op.tile.dtype))
            operands += [wide, [order[a] for a in tile.axes]]
        out = list(range(len(op.tile.axes)))
        if op.annihilates and not np.isfinite(operands[2]).all():
            spaces = [self._named(n, axes) for n in (op.left, op.right)]
            products = np.where(spaces[0] == 0, 0.0, spaces[0] * spaces[1])
            result = np.sum(products, axis=tuple(range(len(out), len(axes))))
        else:
            result = np.einsum(*operands, out)
        if op.accumulate:
            result = self.tiles[op.tile.name][1] + result
        self._put(op.tile, np.asarray(result))

    def _store(self, op: Store) -> None:
        shape = self.shape(op.axes)
        target = self.arrays[op.target.tensor]
        dtype = self.types[op.target.tensor]
        value = self.expr(op.expr, op.axes)
        if DTYPES[dtype].is_float and value.dtype.kind == "f":
            value = value.astype(np.float64)
            value = round_to(value, dtype) if rounds(dtype) else value
        else:
            value = convert(value, dtype)
        indices = tuple(np.broadcast_to(self.expr(i, op.axes), shape) for i in op.target.indices)
        target[indices if indices else ()] = np.broadcast_to(value, shape)

    # Expressions

    def expr(self, e: Expr, axes: tuple[str, ...]) -> Array:
        """The value over the axes, size 1 where it does not vary."""
        ones = (1,) * len(axes)
        match e:
            case Const(value=value, kind=kind):
                dtype: Any = {"int": np.int64, "float": np.float32, "bool": bool}[kind]
                if kind == "int" and value > 2**63 - 1:
                    value -= 2**64  # the least i64 is the negative of this, in two's complement
                return np.full(ones, value, dtype)
            case Rank(name=name):
                if name not in axes:
                    # A grid rank with tiles of one, or a loop's: its only coordinate.
                    return np.full(ones, self.spans[name].start, np.int64)
                where = tuple(-1 if a == name else 1 for a in axes)
                return self.spans[name].coordinates().reshape(where)
            case Extent(rank=rank):
                return np.full(ones, self.extents[rank], np.int64)
            case Access(tensor=name):
                return self._named(name, axes)
            case Cast(dtype=dtype, arg=arg):
                cast: Array = convert(self._operand(arg, axes, dtype), dtype).astype(held(dtype))
                return cast
            case Call(op="where", args=(condition, a, b)):
                within = settle(self.checker.infer(e))
                left, right = common(self._operand(a, axes, within), self._operand(b, axes, within))
                return np.where(self.expr(condition, axes), left, right)
            case Call(args=args):
                within = computed_in(e, settle(self.checker.infer(e)), [self.checker.infer(a) for a in args])
                return self._call(e, [self._operand(a, axes, within) for a in args])
            case Reduce():
                raise EvaluationError("a tile program's expressions hold no reductions", loc=e.loc)

    def _operand(self, e: Expr, axes: tuple[str, ...], within: str) -> Array:
        """The value of an operand; a literal is one of the type in which the operation is done."""
        value = literal_value(e)
        if within == "f64" and isinstance(value, float):
            return np.full((1,) * len(axes), value)
        return self.expr(e, axes)

    def _named(self, name: str, axes: tuple[str, ...]) -> Array:
        if name not in self.tiles:
            return self.arrays[name].reshape((1,) * len(axes)).astype(held(self.types[name]))
        tile, value = self.tiles[name]
        order = [tile.axes.index(a) for a in axes if a in tile.axes]
        shape = tuple(self.shape((a,))[0] if a in tile.axes else 1 for a in axes)
        held_array: Array = value.transpose(order).reshape(shape)
        return held_array

    def _call(self, e: Call, args: list[Array]) -> Array:
        op = OPS[e.op]
        dtype = settle(self.checker.infer(e))
        wide = held(dtype)
        if op.rule in ("divide", "real"):
            args = [a.astype(wide) for a in args]
        elif op.rule in ("arith", "same"):
            args = [a.astype(np.int64) if a.dtype == bool else a for a in args]
        if op.rule == "power":
            args = [args[0], args[1].astype(args[0].dtype)]
        elif op.arity == 2:
            args = list(common(*args)) if args[0].dtype.kind != "f" or args[1].dtype.kind != "f" else args
        if op.name in ("floordiv", "mod") and args[1].dtype.kind == "i":
            args[1] = np.where(args[1] == 0, 1, args[1])
        if op.rule == "integer":
            args[1] = np.clip(args[1], 0, 63)
        result = np.asarray(op.numpy(*args))
        if result.dtype.kind in "iu":
            return wrap(result.astype(np.int64), dtype)
        return result.astype(wide) if result.dtype.kind == "f" else result


def loops(body: tuple[Op, ...]) -> Iterator[For]:
    """The loops of a body, outermost first."""
    for op in body:
        if isinstance(op, For):
            yield op
            yield from loops(op.body)
