"""The oracle: what a cascade means, in float64 NumPy. Written to be right, not fast.

Floats are computed exactly as far as float64 goes and rounded only where the text rounds: in casts and outputs of types
narrower than f32. Integers wrap in the type in which they are computed. `scalar` holds the meaning of operations and of
the masked flag; this file adds ranks, tensors, reductions, scans and monoids.

A tensor is computed box by box, so memory stays bounded; with ``at``, only what the sampled outputs need is computed.
"""

from __future__ import annotations

import math
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from . import rounding
from .cascade import Access, Call, Cascade, Cast, Const, Einsum, Expr, Extent, Monoid, Param, Rank, Reduce
from .dtypes import DTYPES
from .errors import EvaluationError, InputError
from .extents import resolve, shape_of
from .ops import REDUCTIONS
from .scalar import Array, Scalars, Value, array_type, common, convert, narrowed, needed
from .types import TypeChecker, compute_type, settle, tensor_types
from .verify import scan_step

Box = tuple[tuple[int, int], ...]

# Elements of the largest temporary array, and bytes of the boxes that sampling keeps.
BLOCK = 1 << 22
KEPT_BYTES = 1 << 29


@dataclass(frozen=True, slots=True)
class Scope:
    """The ranks in scope: for each the axis along which it runs, and its coordinates there."""

    axes: Mapping[str, tuple[int, Array]]
    shape: tuple[int, ...]

    @classmethod
    def over(cls, ranks: Sequence[str], box: Box) -> Scope:
        return cls({}, ()).extend(ranks, [np.arange(a, b, dtype=np.int64) for a, b in box])

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def coordinate(self, rank: str) -> Array:
        axis, values = self.axes[rank]
        return values.reshape(tuple(-1 if i == axis else 1 for i in range(self.ndim)))

    def extend(self, ranks: Sequence[str], values: Sequence[Array]) -> Scope:
        axes = dict(self.axes)
        axes.update({r: (self.ndim + i, v) for i, (r, v) in enumerate(zip(ranks, values, strict=True))})
        return Scope(axes, self.shape + tuple(len(v) for v in values))


def evaluate(c: Cascade, inputs: Mapping[str, Any], at: Any = None) -> dict[str, Array]:
    """Compute the outputs of a cascade in float64.

    ``inputs`` maps each parameter's name to a NumPy array, a torch tensor or a number; values are rounded to the
    declared type where that is narrower than f32. ``at`` chooses a sample of output coordinates: a mapping from rank to
    N integers (or one), or an integer array ``[N, ranks]`` in the order of the outputs' ranks; the results then have
    shape ``[N]``, in memory bounded by some hundred MB.

    Returns ``{output: array}`` in the order of the signature: float64, int64 for integer and bool for boolean outputs.
    Raises `InputError` for inputs that do not fit, `EvaluationError` for a read outside a tensor.
    """
    return {name: value.array for name, value in evaluate_values(c, inputs, at).items()}


def evaluate_values(
    c: Cascade, inputs: Mapping[str, Any], at: Any = None, *, track: bool = False, numerics: str | None = None
) -> dict[str, Value]:
    """As `evaluate`, with each output's masked flags and, if ``track``, the error bounds of `bound.error_bound`."""
    values = read_inputs(c, inputs)
    extents = resolve(c, {}, {n: v.shape for n, v in values.items()})
    oracle = Oracle(c, values, extents, track=track, numerics=numerics or c.numerics)
    with np.errstate(all="ignore"):
        if at is None:
            return {name: oracle.full(name) for name in c.outputs}
        points = sample_points(c, at, extents)
        return {name: oracle.sample(name, points) for name in c.outputs}


def read_inputs(c: Cascade, inputs: Mapping[str, Any]) -> dict[str, Array]:
    """The inputs as float64, int64 or bool arrays that hold only values of the declared types."""
    if not isinstance(inputs, Mapping):
        raise InputError("inputs map parameter names to arrays", expected="a dict", got=type(inputs).__name__)
    names = ", ".join(p.name for p in c.params) or "none"
    for p in c.params:
        if p.name not in inputs:
            raise InputError(f"`{p.name}` is missing", hint=f"the parameters of `{c.name}` are {names}")
    for extra in inputs:
        if extra not in c.param_of:
            raise InputError(f"`{c.name}` has no parameter `{extra}`", hint=f"its parameters are {names}")
    return {p.name: _read(p, inputs[p.name]) for p in c.params}


def _read(p: Param, given: Any) -> Array:
    if hasattr(given, "detach"):
        tensor = given.detach().cpu()
        given = tensor.double().numpy() if tensor.dtype.is_floating_point else tensor.numpy()
    array = np.asarray(given)
    if array.dtype.kind not in "fiub":
        try:
            # ml_dtypes' formats have kind V; anything else that is no number fails here.
            array = array.astype(np.float64) if array.dtype.kind == "V" else np.asarray(None, np.float64)[()]
        except (TypeError, ValueError):
            array = np.asarray(np.nan)
        if array.shape != np.shape(given):
            raise InputError(f"`{p.name}` is no array of numbers", expected=p.dtype, got=str(np.asarray(given).dtype))
    row = DTYPES[p.dtype]
    if row.is_float:
        return convert(array, p.dtype)
    if array.dtype.kind == "f" and not bool(np.all(np.isfinite(array) & (array == np.floor(array)))):
        raise InputError(f"`{p.name}` holds values that are no integers", expected=p.dtype, got=str(array.dtype))
    low, high = (row.lowest, row.highest) if row.kind != "bool" else (0, 1)
    if array.size and (array.min() < low or array.max() > high):
        raise InputError(
            f"`{p.name}` holds values outside {p.dtype}",
            expected=f"{low} to {high}",
            got=f"{array.min()} to {array.max()}",
        )
    return array.astype(array_type(p.dtype))


def sample_points(c: Cascade, at: Any, extents: Mapping[str, int]) -> dict[str, Array]:
    """The sampled coordinates, one array ``[N]`` for each rank of the outputs. Raises `InputError`."""
    ranks = tuple(dict.fromkeys(i.name for name in c.outputs for i in c.indices_of(name) if isinstance(i, Rank)))
    listed = ", ".join(ranks)
    if isinstance(at, Mapping):
        given = {str(r): np.atleast_1d(np.asarray(v)) for r, v in at.items()}
    else:
        table = np.asarray(at)
        if table.ndim != 2 or table.shape[1] != len(ranks):
            expected = f"a mapping over {listed}, or integers of shape [N, {len(ranks)}]"
            raise InputError("`at` does not fit the outputs", expected=expected, got=f"shape {table.shape}")
        given = {r: table[:, i] for i, r in enumerate(ranks)}
    for r in (*ranks, *given):
        if r not in given or r not in ranks:
            what = f"`at` gives no coordinates for rank `{r}`" if r in ranks else f"no output has rank `{r}`"
            raise InputError(what, rank=r, hint=f"the outputs' ranks are {listed}")
    count = max((len(v) for v in given.values() if v.ndim == 1), default=1)
    for r, v in given.items():
        if v.dtype.kind not in "iu" or v.ndim != 1 or len(v) not in (1, count):
            raise InputError(
                f"the coordinates of `{r}` do not fit", rank=r, expected=f"{count} integers", got=f"{v.dtype} {v.shape}"
            )
        if v.size and (v.min() < 0 or v.max() >= extents[r]):
            raise InputError(
                f"a coordinate of `{r}` lies outside its extent",
                rank=r,
                expected=f"0 to {extents[r] - 1}",
                got=f"{v.min()} to {v.max()}",
            )
    return {r: np.broadcast_to(v.astype(np.int64), (count,)) for r, v in given.items()}


class Oracle(Scalars):
    """One evaluation: the inputs, the extents, and what has been computed so far."""

    def __init__(
        self,
        c: Cascade,
        inputs: Mapping[str, Array],
        extents: Mapping[str, int],
        *,
        track: bool = False,
        numerics: str = "standard",
    ) -> None:
        self.c = c
        self.extents = extents
        self.numerics = numerics
        self.types = tensor_types(c)
        super().__init__(TypeChecker(self.types, c.monoid_of), {}, track)
        self.whole: dict[str, Value] = {n: self.exact(a) for n, a in inputs.items()}
        self.boxes: OrderedDict[tuple[str, Box], Value] = OrderedDict()
        self.kept_bytes = 0

    # Tensors

    def full(self, name: str) -> Value:
        """A whole tensor; everything before it is computed whole too, in order."""
        for e in self.c.einsums:
            if name in self.whole:
                break
            if e.name not in self.whole:
                self.whole.update(self._compute(e, {}))
        return self.whole[name]

    def sample(self, name: str, points: Mapping[str, Array]) -> Value:
        """A tensor at some coordinates, one box of one element each."""
        ranks = [i.name for i in self.c.indices_of(name) if isinstance(i, Rank)]
        count = len(next(iter(points.values()))) if points else 1
        found = []
        with _deep(len(self.c.einsums)):
            for n in range(count):
                box = tuple((int(points[r][n]), int(points[r][n]) + 1) for r in ranks)
                found.append(self.fetch(name, box).apply(lambda a: a.reshape(())))
        empty = np.zeros(0, array_type(self.types[name]))
        array = np.array([v.array for v in found], empty.dtype) if found else empty
        masked = np.array([bool(v.masked) for v in found], bool)
        return Value(array, masked, np.array([v.error for v in found], float) if self.track else None)

    def fetch(self, name: str, box: Box) -> Value:
        """The part of a tensor inside a box, computed on demand and kept while there is room."""
        if name in self.whole:
            where = tuple(slice(a, b) for a, b in box)
            shape = self.whole[name].array.shape
            return self.whole[name].apply(lambda a: a[where] if a.shape == shape else a)
        key = (name, box)
        if key in self.boxes:
            self.boxes.move_to_end(key)
            return self.boxes[key]
        e = self.c.einsum_of[name]
        ranks = next(o.ranks for o in e.outputs if o.name == name)
        computed = self._compute(e, dict(zip(ranks, box, strict=True)))
        for o in e.outputs:
            own = box if o.name == name else tuple(self._span(r, ranks, box) for r in o.ranks)
            self._keep((o.name, own), computed[o.name])
        return computed[name]

    def _span(self, rank: str, ranks: tuple[str, ...], box: Box) -> tuple[int, int]:
        return box[ranks.index(rank)] if rank in ranks else (0, self.extents[rank])

    def _keep(self, key: tuple[str, Box], value: Value) -> None:
        self.boxes[key] = value
        self.kept_bytes += value.array.nbytes
        while self.kept_bytes > KEPT_BYTES and len(self.boxes) > 1:
            _, old = self.boxes.popitem(last=False)
            self.kept_bytes -= old.array.nbytes

    # Einsums

    def _compute(self, e: Einsum, spans: Mapping[str, tuple[int, int]]) -> dict[str, Value]:
        """All outputs of an Einsum over the given spans of its ranks; a rank without a span is computed whole."""
        box = tuple(spans.get(r, (0, self.extents[r])) for r in e.ranks)
        if len(e.outputs) > 1:
            return self._state(e, box)
        if scan_step(e) is not None:
            return {e.name: self._scan(e, box)}
        return {e.name: self._blocks(e, box)}

    def _blocks(self, e: Einsum, box: Box) -> Value:
        """Evaluate over a box of the output, in blocks small enough that temporaries fit."""
        shape = tuple(b - a for a, b in box)
        inner = max((math.prod(self.extents[r] for r in red.ranks) for red in e.reductions), default=1)
        room = max(1, BLOCK // max(1, inner))
        if math.prod(shape) <= room:
            return self._einsum(e, box)
        pieces = [(sub, self._einsum(e, sub)) for sub in _split(box, room)]
        return _assemble(shape, box, pieces)

    def _einsum(self, e: Einsum, box: Box) -> Value:
        scope = Scope.over(e.output.ranks, box)
        return self._store(self.at(e.expr, scope, None), self.types[e.name], scope.shape)

    def _store(self, value: Value, dtype: str, shape: tuple[int, ...]) -> Value:
        """A value as a tensor of its dtype and shape; f32 is no rounding point."""
        if array_type(dtype) is not value.array.dtype.type or DTYPES[dtype].bits < 32:
            value = self.cast(value, dtype)
        if value.masked is not None and not value.masked.any():
            value = Value(value.array, None, value.error)
        return value.apply(lambda a: np.array(np.broadcast_to(a, shape)))

    def _state(self, e: Einsum, box: Box) -> dict[str, Value]:
        """A monoid of several components: each output is folded over the ranks that it has."""
        assert isinstance(e.expr, Reduce)
        spans = dict(zip(e.ranks, box, strict=True))
        scope = Scope.over(e.ranks, box)
        state = self._fold(e.expr, scope, None)
        result: dict[str, Value] = {}
        for o, value in zip(e.outputs, state, strict=True):
            # The verifier has seen that a component does not vary along ranks that its output lacks.
            first = tuple(slice(None) if r in o.ranks else slice(0, 1) for r in e.ranks)
            kept = [r for r in e.ranks if r in o.ranks]
            order = [kept.index(r) for r in o.ranks]
            sizes = [spans[r][1] - spans[r][0] for r in kept]
            part = value.apply(lambda a, first=first: a[first])
            if any(n == 0 for r, n in zip(e.ranks, scope.shape, strict=True) if r not in o.ranks):
                part = self._identity(self.c.monoid_of[e.expr.op], scope.ndim)[len(result)]
            full = tuple(n if r in o.ranks else 1 for r, n in zip(e.ranks, scope.shape, strict=True))
            part = part.apply(
                lambda a, full=full, sizes=sizes, order=order: np.broadcast_to(a, full).reshape(sizes).transpose(order)
            )
            result[o.name] = self._store(part, self.types[o.name], tuple(sizes[i] for i in order))
        return result

    def _scan(self, e: Einsum, box: Box) -> Value:
        """Step along the scanned rank from its beginning; entries are kept, so a step may reach back any distance."""
        scan = scan_step(e)
        assert scan is not None
        full: Box = tuple((0, self.extents[r]) for r in e.output.ranks)
        shape = tuple(b for _, b in full)
        array = np.zeros(shape, array_type(self.types[e.name]))
        state = Value(array, np.zeros(shape, bool), np.zeros(shape) if self.track else None)
        self.whole[e.name] = state
        try:
            steps = range(shape[scan.axis])
            for t in steps if scan.direction > 0 else reversed(steps):
                sub = tuple((t, t + 1) if i == scan.axis else span for i, span in enumerate(full))
                _write(state, sub, full, self._blocks(e, sub))
        finally:
            del self.whole[e.name]
        where = tuple(slice(a, b) for a, b in box)
        assert state.masked is not None
        return Value(
            array[where],
            state.masked[where] if state.masked.any() else None,
            None if state.error is None else state.error[where],
        )

    # Expressions

    def at(self, e: Expr, scope: Scope, guard: Array | None) -> Value:
        """The value of an expression over a scope; ``guard`` says where it is needed, None everywhere."""
        match e:
            case Const():
                return self.literal(e, scope.ndim)
            case Rank(name=name):
                return self.exact(scope.coordinate(name))
            case Extent(rank=rank):
                return self.exact(np.full((1,) * scope.ndim, self.extents[rank], np.int64))
            case Cast(dtype=name, arg=arg):
                return self.cast(self.at(arg, scope, guard), name)
            case Access():
                return self._access(e, scope, guard)
            case Reduce():
                return self._reduce(e, scope, guard)
            case Call(op="where", args=(condition, a, b)):
                chosen = self.at(condition, scope, guard)
                left = self.at(a, scope, narrowed(guard, chosen.array))
                right = self.at(b, scope, narrowed(guard, ~chosen.array))
                return self.select(e, chosen, left, right)
            case Call():
                return self.call(e, [self.at(a, scope, guard) for a in e.args], guard)

    def _access(self, e: Access, scope: Scope, guard: Array | None) -> Value:
        if not e.indices:
            return self.fetch(e.tensor, ()).apply(lambda a: a.reshape((1,) * scope.ndim))
        parts = [self.at(i, scope, guard) for i in e.indices]
        indices = [p.array for p in parts]
        shape = np.broadcast_shapes(*(i.shape for i in indices))
        sizes = self.whole[e.tensor].array.shape if e.tensor in self.whole else shape_of(self.c, e.tensor, self.extents)
        inside = np.ones((1,) * scope.ndim, bool)
        for axis, (index, size) in enumerate(zip(indices, sizes, strict=True)):
            good = (index >= 0) & (index < size)
            if scope.size and needed(~good, guard):
                raise self._outside(e, axis, size, index, ~good if guard is None else ~good & guard)
            inside = inside & good
        if not scope.size or not needed(inside, guard):
            return self.exact(np.zeros(shape, array_type(self.types[e.tensor])))
        if guard is None:
            box = tuple((int(i.min()), int(i.max()) + 1) for i in indices)
        else:
            live = inside & guard
            whole = np.broadcast_shapes(live.shape, shape)
            spans = [np.broadcast_to(i, whole)[np.broadcast_to(live, whole)] for i in indices]
            box = tuple((int(s.min()), int(s.max()) + 1) for s in spans)
        part = self.fetch(e.tensor, box)
        part_shape = tuple(b - a for a, b in box)
        local = tuple(np.clip(i - a, 0, b - a - 1) for i, (a, b) in zip(indices, box, strict=True))
        value = part.apply(lambda a: np.broadcast_to(a, part_shape)[local])
        if self.track and any(bool(p.slack().any()) for p in parts):
            # A wrong index reads anything.
            unsure = sum((p.slack() > 0).astype(float) for p in parts) > 0
            value = Value(value.array, value.masked, np.where(unsure, np.inf, value.slack()))
        return value

    def _outside(self, e: Access, axis: int, size: int, index: Array, bad: Array) -> EvaluationError:
        value = int(np.broadcast_to(index, bad.shape)[bad].flat[0])
        return EvaluationError(
            f"`{e.tensor}` is read at {value} along axis {axis}, which has extent {size}",
            hint=f"guard the read: where(index in bounds, {e.tensor}[index], 0)",
            loc=e.loc,
        )

    # Reductions

    def _reduce(self, e: Reduce, scope: Scope, guard: Array | None) -> Value:
        if e.op in self.c.monoid_of:
            return self._fold(e, scope, guard)[0]
        if e.op == "argmax" and self.extents[e.ranks[0]] == 0 and scope.size:
            raise EvaluationError(f"argmax over rank `{e.ranks[0]}`, which is empty", rank=e.ranks[0], loc=e.loc)
        total: Value | None = None
        for coordinates in self._pieces(e, scope):
            inner = scope.extend(e.ranks, coordinates)
            part = self._reduce_piece(e, inner, _widen(guard, len(e.ranks)))
            total = part if total is None else self._join(e, total, part)
        assert total is not None
        return Value(self.wrapped(e, total.array), total.masked, total.error)

    def _pieces(self, e: Reduce, scope: Scope) -> Iterator[list[Array]]:
        """The reduced coordinates, cut along the first rank so that a piece fits a block. At least one piece comes."""
        first, *rest = (self.extents[r] for r in e.ranks)
        step = max(1, 4 * BLOCK // max(1, scope.size * math.prod(rest)))
        if e.op == "argmax":
            step = max(first, 1)
        for start in range(0, max(first, 1), step):
            head = np.arange(start, min(first, start + step), dtype=np.int64)
            yield [head, *(np.arange(n, dtype=np.int64) for n in rest)]

    def _reduce_piece(self, e: Reduce, scope: Scope, guard: Array | None) -> Value:
        count = len(e.ranks)
        axes = tuple(range(scope.ndim - count, scope.ndim))
        tail = scope.shape[scope.ndim - count :]
        if e.op == "sum" and (product := self._contract(e, scope, guard, axes)) is not None:
            return product
        value = self.at(e.arg, scope, guard).apply(lambda a: np.broadcast_to(a, a.shape[:-count] + tail))
        array = value.array
        if array.dtype == bool and e.op not in ("any", "all"):
            array = array.astype(np.int64)
        masked = self._reduced_flags(e, value, array, axes)
        if math.prod(array.shape) == 0:
            result = np.full(array.shape[:-count], self._empty(e, array.dtype))
        else:
            result = np.asarray(REDUCTIONS[e.op].numpy(array, axis=axes if e.op != "argmax" else axes[0]))
        if masked is not None:
            annihilated = {"prod": 0.0}.get(e.op)
            result = result if annihilated is None else np.where(masked, annihilated, result)
        if not self.track:
            return Value(result, masked)
        error = self._reduced_error(
            e, array, np.broadcast_to(value.slack(), array.shape), result, axes, math.prod(tail)
        )
        return Value(result, masked, rounding.settle(result, error, self.dtype(e), masked))

    def _reduced_flags(self, e: Reduce, value: Value, array: Array, axes: tuple[int, ...]) -> Array | None:
        """What a mask left out is nothing: a sum of nothing is the flagged 0, a maximum of nothing the flagged -inf."""
        if e.op in ("argmax", "any", "all") or (value.masked is None and math.prod(array.shape[a] for a in axes)):
            return None
        flags = np.broadcast_to(value.flag(), array.shape)
        if e.op == "prod":
            return np.asarray(np.any(flags & (array == 0), axes))
        gone = np.all(flags, axes)
        if e.op == "sum":
            gone = gone | np.any(flags & (array == -np.inf), axes)
        return np.asarray(gone)

    def _empty(self, e: Reduce, dtype: np.dtype[Any]) -> Any:
        """The identity: what a reduction over nothing gives."""
        identity = REDUCTIONS[e.op].identity
        if dtype.kind == "i" and e.op in ("max", "min"):
            row = DTYPES[settle(compute_type(self.checker.infer(e.arg)))]
            return row.lowest if e.op == "max" else row.highest
        return dtype.type(identity or 0) if dtype.kind != "b" else bool(identity)

    def _reduced_error(self, e: Reduce, x: Array, error: Array, y: Array, axes: tuple[int, ...], terms: int) -> Array:
        dtype = self.dtype(e)
        match e.op:
            case "sum":
                return rounding.sum_error(np.sum(np.abs(x), axes), np.sum(error, axes), terms, dtype)
            case "prod":
                return rounding.prod_error(x, error, y, axes, terms, dtype)
            case "argmax":
                return rounding.argmax_error(x.astype(float), error, axes[0]) if x.size else np.zeros(y.shape)
            case _:
                return np.asarray(np.max(error, axes, initial=0.0))

    def _join(self, e: Reduce, a: Value, b: Value) -> Value:
        """Two pieces of one built-in reduction."""
        combine = {
            "sum": np.add,
            "prod": np.multiply,
            "max": np.maximum,
            "min": np.minimum,
            "any": np.logical_or,
            "all": np.logical_and,
        }
        masked = None
        if a.masked is not None or b.masked is not None:
            masked = a.flag() | b.flag() if e.op == "prod" else a.flag() & b.flag()
        error = None
        if self.track:
            error = np.maximum(a.slack(), b.slack()) if e.op in ("max", "min") else a.slack() + b.slack()
            if e.op == "prod":
                error = rounding.call_error(
                    "mul", [a.array, b.array], [a.slack(), b.slack()], a.array * b.array, self.dtype(e)
                )
        return Value(np.asarray(combine[e.op](a.array, b.array)), masked, error)

    def _contract(self, e: Reduce, scope: Scope, guard: Array | None, axes: tuple[int, ...]) -> Value | None:
        """A sum of products without the array of products, by np.einsum; None where that does not apply."""
        factors = _factors(e.arg)
        types = [self.dtype(f) for f in factors]
        if len(factors) < 2 or not scope.size or not all(DTYPES[t].is_float for t in types):
            return None
        values = [self.at(f, scope, guard) for f in factors]
        arrays = [v.array for v in values]
        if any(scope.shape[a] != 1 and all(x.shape[a] == 1 for x in arrays) for a in axes):
            return None
        flagged = any(v.masked is not None for v in values)
        if (flagged or self.track) and not all(bool(np.isfinite(x).all()) for x in arrays):
            return None
        kept = [a for a in range(scope.ndim) if a not in axes]
        result = _contract_arrays(arrays, kept)
        masked = None
        if flagged:
            live = [np.broadcast_to(~v.flag(), x.shape).astype(float) for v, x in zip(values, arrays, strict=True)]
            masked = _contract_arrays(live, kept) == 0
        if not self.track:
            return Value(result, masked)
        magnitudes = [np.abs(x) for x in arrays]
        magnitude = _contract_arrays(magnitudes, kept)
        wide = [m + np.where(np.isfinite(v.slack()), v.slack(), 1e300) for m, v in zip(magnitudes, values, strict=True)]
        inherited = np.maximum(_contract_arrays(wide, kept) - magnitude, 0.0)
        if all(not v.slack().any() for v in values):
            inherited = np.zeros_like(magnitude)
        terms = math.prod(scope.shape[a] for a in axes)
        error = rounding.sum_error(magnitude, inherited, terms, self.dtype(e), self._narrow(factors, types))
        return Value(result, masked, rounding.settle(result, error, self.dtype(e), masked))

    def _narrow(self, factors: list[Expr], types: list[str]) -> float:
        """The rounding that the numerics mode allows on an operand of a contraction (design, section 2)."""
        if self.numerics == "strict":
            return 0.0
        halves = [DTYPES[t].unit_roundoff for t in types if DTYPES[t].bits <= 16]
        wide = [t for t, f in zip(types, factors, strict=True) if DTYPES[t].bits > 16 and not isinstance(f, Const)]
        if halves and wide:
            return 2 * max(2.0**-11 if h < 2.0**-11 else min(h, 2.0**-8) for h in halves)
        return 2.0**-10 if self.numerics == "fast" and "f64" not in types else 0.0

    # Monoids

    def _identity(self, m: Monoid, ndim: int) -> list[Value]:
        """The empty state: as nothing went into it, its 0 and -inf count as masked."""
        values = [self.expr(i, ndim) for i in m.identity]
        return [
            Value(v.array, np.isin(v.array, (0.0, -np.inf)) if v.array.dtype.kind == "f" else None, v.error)
            for v in values
        ]

    def _fold(self, e: Reduce, scope: Scope, guard: Array | None) -> list[Value]:
        """A user monoid: from the identity, one element after another in the order of the ranks."""
        m = self.c.monoid_of[e.op]
        types = self.checker.state_types(e)
        state = [
            Value(common(v.array, np.zeros(1, array_type(t)))[0], v.masked, v.error)
            for v, t in zip(self._identity(m, scope.ndim), types, strict=True)
        ]
        count = len(e.ranks)
        first = (..., *(0 for _ in range(count)))
        for place in np.ndindex(*(self.extents[r] for r in e.ranks)):
            inner = scope.extend(e.ranks, [np.array([p]) for p in place])
            element = [self.at(a, inner, _widen(guard, count)).apply(lambda a: a[first]) for a in e.args]
            state = combine_states(m, types, state, element, track=self.track)
        return state


def combine_states(
    m: Monoid, types: tuple[str, ...], state: Sequence[Value], element: Sequence[Value], *, track: bool = False
) -> list[Value]:
    """One application of a monoid to two states whose arrays broadcast against each other."""
    names = dict(zip(m.params, [*state, *element], strict=True))
    tensors = dict(zip(m.params, types + types, strict=True))
    scalars = Scalars(TypeChecker(tensors, {}), names, track)
    ndim = max((v.array.ndim for v in names.values()), default=0)
    for name, value in m.body:
        tensors[name] = scalars.dtype(value)
        names[name] = scalars.expr(value, ndim)
    return [names[r] for r in m.results]


def _factors(e: Expr) -> list[Expr]:
    """The factors of a product, left to right."""
    if isinstance(e, Call) and e.op == "mul":
        return _factors(e.args[0]) + _factors(e.args[1])
    return [e]


def _widen(guard: Array | None, count: int) -> Array | None:
    return None if guard is None else guard.reshape(guard.shape + (1,) * count)


def _contract_arrays(arrays: list[Array], kept: list[int]) -> Array:
    """Multiply arrays that share axes and sum those not kept; axes of size 1 are dropped and put back."""
    operands: list[Any] = []
    ndim = arrays[0].ndim
    sizes: dict[int, int] = {}
    for a in arrays:
        axes = [i for i in range(ndim) if a.shape[i] != 1]
        sizes.update({i: a.shape[i] for i in axes})
        operands += [a.reshape([a.shape[i] for i in axes]), axes]
    result = np.einsum(*operands, [i for i in kept if i in sizes], optimize="greedy")
    return np.asarray(result).reshape([sizes.get(i, 1) for i in kept])


def _assemble(shape: tuple[int, ...], box: Box, pieces: list[tuple[Box, Value]]) -> Value:
    """One value from the values of sub-boxes."""
    first = pieces[0][1]
    masked = np.zeros(shape, bool) if any(v.masked is not None for _, v in pieces) else None
    whole = Value(np.empty(shape, first.array.dtype), masked, None if first.error is None else np.zeros(shape))
    for sub, value in pieces:
        _write(whole, sub, box, value)
    return whole


def _write(target: Value, sub: Box, box: Box, value: Value) -> None:
    """Write a value into the part of a larger one that covers the sub-box."""
    where = tuple(slice(a - o, b - o) for (a, b), (o, _) in zip(sub, box, strict=True))
    target.array[where] = value.array
    if target.masked is not None:
        target.masked[where] = value.flag().reshape((1,) * len(sub)) if value.masked is None else value.masked
    if target.error is not None:
        target.error[where] = value.slack()


def _split(box: Box, room: int) -> Iterator[Box]:
    """Cut a box into boxes of at most ``room`` elements, along its leading axes."""
    sizes = [b - a for a, b in box]
    cuts = []
    for axis, (a, b) in enumerate(box):
        step = max(1, min(b - a, room // max(1, math.prod(sizes[axis + 1 :]))))
        cuts.append(list(pairwise([*range(a, b, step), b])))
    for place in np.ndindex(*(len(c) for c in cuts)):
        yield tuple(c[i] for c, i in zip(cuts, place, strict=True))


@contextmanager
def _deep(einsums: int) -> Iterator[None]:
    """Sampling recurses from an output to what it needs: room for a cascade of many Einsums."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(max(limit, 1000 + 40 * einsums))
    try:
        yield
    finally:
        sys.setrecursionlimit(limit)
