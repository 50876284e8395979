"""The oracle: what a cascade means, in float64 NumPy. Written to be right, not fast.

Floats are computed exactly as far as float64 goes and rounded only where the text rounds: in casts and outputs of types
narrower than f32. Integers wrap in the type in which they are computed. `scalar` holds the meaning of operations and of
the masked flag, `reduce` that of reductions; this file adds tensors, ranks and scans.

A tensor is computed box by box, so memory stays bounded; with ``at``, only what the sampled outputs need is computed.
"""

from __future__ import annotations

import math
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np

from . import rounding
from .blocks import squares, tiles
from .cascade import (
    Access,
    Cascade,
    Einsum,
    Expr,
    Extent,
    Rank,
    Reduce,
    children,
    free_ranks,
    literal_value,
    live_einsums,
    substitute,
    tensors_read,
    walk,
)
from .dtypes import DTYPES, rounds
from .errors import EvaluationError, attach
from .extents import resolve, shape_of
from .inputs import read_inputs as read_inputs
from .inputs import sample_points
from .reduce import Reductions
from .reduce import combine_states as combine_states
from .scalar import Array, Box, Scope, Value, array_type, needed, projected
from .types import TypeChecker, tensor_types
from .verify import Scan, scan_step

T = TypeVar("T")

# Bytes of the boxes that sampling keeps, reductions of one element that it does, and bytes of a scan that it computes
# whole; elements of the largest tensor.
KEPT_BYTES = 1 << 29
KEPT_ROWS = 1 << 12
SCAN_BYTES = 1 << 27
MAX_ELEMENTS = 1 << 31


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
    points = {} if at is None else sample_points(c, at, extents)
    try:
        if at is not None:
            return deeply(c, lambda: {name: oracle.sample(name, points) for name in c.outputs})
        with np.errstate(all="ignore"):
            return {name: oracle.full(name) for name in c.outputs}
    except EvaluationError as error:
        raise (attach(error, c.source) if c.source is not None else error) from None


class Oracle(Reductions):
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
        self.monoids = c.monoid_of
        self.types = tensor_types(c)
        super().__init__(TypeChecker(self.types, c.monoid_of), {}, track)
        self.whole = {n: self._input(n, a) for n, a in inputs.items()}
        self.shapes = {n: a.shape for n, a in inputs.items()}
        self.shapes.update({o.name: shape_of(c, o.name, extents) for e in c.einsums for o in e.outputs})
        self.live = live_einsums(c.einsums, c.outputs)
        self.terms = _terms(c, extents)
        self.running: dict[str, tuple[tuple[int, ...], Value]] = {}
        self.boxes: OrderedDict[tuple[str, Box], Value] = OrderedDict()
        self.kept_bytes = 0
        # By identity, as hashing a tree costs; the reduction is kept, so its identity stays its own.
        self.rows: dict[tuple[int, tuple[tuple[str, int], ...], int, int], tuple[Reduce, Value]] = {}

    # Tensors

    def _input(self, name: str, array: Array) -> Value:
        """An input; a kernel holds an f32 one in f32, whatever it is made from."""
        inexact = self.track and self.types[name] == "f32"
        return Value(array, None, rounding.held(array)) if inexact else self.exact(array)

    def full(self, name: str) -> Value:
        """An output, whole; what the outputs need before it is computed whole too, in order."""
        for e in self.live:
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
        for n in range(count):
            box = tuple((int(points[r][n]), int(points[r][n]) + 1) for r in ranks)
            found.append(self.fetch(name, box).apply(lambda a: a.reshape(())))
        array = np.array([v.array for v in found], array_type(self.types[name]))
        masked = np.array([bool(v.masked) for v in found], bool)
        return Value(array, masked, np.array([v.error for v in found], float) if self.track else None)

    def fetch(self, name: str, box: Box) -> Value:
        """The part of a tensor inside a box, computed on demand and kept while there is room."""
        if name in self.running:
            origin, value = self.running[name]
            there = tuple(slice(a - o, b - o) for (a, b), o in zip(box, origin, strict=True))
            return value.apply(lambda a: a[there])
        if name in self.whole:
            where = tuple(slice(a, b) for a, b in box)
            # An input's error is one 0 for all of it, which no slice may cut away.
            return self.whole[name].apply(lambda a: a[where] if a.shape == self.shapes[name] else a)
        key = (name, box)
        if key in self.boxes:
            self.boxes.move_to_end(key)
            return self.boxes[key]
        e = self.c.einsum_of[name]
        ranks = next(o.ranks for o in e.outputs if o.name == name)
        if scan_step(e) is not None and 8 * math.prod(self.shapes[name]) <= SCAN_BYTES:
            self.whole.update(self._compute(e, {}))
            return self.fetch(name, box)
        computed = self._compute(e, dict(zip(ranks, box, strict=True)), name)[name]
        self.boxes[key] = computed
        self.kept_bytes += computed.array.nbytes
        while self.kept_bytes > KEPT_BYTES and len(self.boxes) > 1:
            _, old = self.boxes.popitem(last=False)
            self.kept_bytes -= old.array.nbytes
        return computed

    def opened(self, e: Access) -> Expr | None:
        source = self.c.einsum_of.get(e.tensor)
        if source is None or len(source.outputs) > 1 or source.reductions or e.tensor in tensors_read(source.expr):
            return None
        if source.output.dtype not in (None, "f32", "f64"):
            return None
        return substitute(source.expr, dict(zip(source.output.ranks, e.indices, strict=True)))

    # Einsums

    def _compute(self, e: Einsum, spans: Mapping[str, tuple[int, int]], only: str = "") -> dict[str, Value]:
        """The outputs of an Einsum, or only one, over spans of its ranks; a rank without a span is computed whole."""
        boxes = {o.name: tuple(spans.get(r, (0, self.extents[r])) for r in o.ranks) for o in e.outputs}
        for name, box in boxes.items():
            if math.prod(b - a for a, b in box) > MAX_ELEMENTS:
                shape = " x ".join(str(b - a) for a, b in box)
                hint = "evaluate a sample of the outputs: evaluate(c, inputs, at={rank: coordinates})"
                raise EvaluationError(f"`{name}` has {shape} elements, too many to hold", hint=hint, loc=e.loc)
        before, self.summed = self.summed, self.terms[e.name]
        try:
            if len(e.outputs) > 1:
                return self._state(e, {n: b for n, b in boxes.items() if only in ("", n)})
            if (scan := scan_step(e)) is not None:
                return {e.name: self._scan(e, scan, spans)}
            return {e.name: self._blocks(e, boxes[e.name])}
        except EvaluationError as error:
            error.einsum = error.einsum or e.name
            raise
        finally:
            self.summed = before

    def _blocks(self, e: Einsum, box: Box) -> Value:
        """Evaluate over a box of the output, in blocks small enough that temporaries fit."""
        shape = tuple(b - a for a, b in box)
        steps = squares(e.expr, dict(zip(e.output.ranks, shape, strict=True)), self.extents, self.contracts)
        block = tuple(steps[r, 0] for r in e.output.ranks)
        if block == shape or 0 in shape:
            return self._einsum(e, box)
        whole = self._empty(self.types[e.name], box)
        for sub in tiles(box, block):
            _write(whole, sub, box, self._einsum(e, sub))
        return self._tidy(whole)

    def _einsum(self, e: Einsum, box: Box) -> Value:
        scope = Scope.over(e.output.ranks, box)
        if not scope.size:
            return self._tidy(self._empty(self.types[e.name], box))
        return self._store(self.at(e.expr, scope, None), self.types[e.name], self.dtype(e.expr), scope.shape)

    def _store(self, value: Value, dtype: str, source: str, shape: tuple[int, ...]) -> Value:
        """A value computed as ``source``, as a tensor of its dtype and shape; f32 is no rounding point."""
        if (
            (source, dtype) == ("f64", "f32")
            or rounds(dtype)
            or not DTYPES[dtype].is_float
            or value.array.dtype.kind != "f"
        ):
            value = self.cast(value, dtype, source)
        return value.apply(lambda a: np.array(np.broadcast_to(a, shape)))

    def _empty(self, dtype: str, box: Box) -> Value:
        shape = tuple(b - a for a, b in box)
        error = np.zeros(shape) if self.track else None
        return Value(np.zeros(shape, array_type(dtype)), np.zeros(shape, bool), error)

    def _tidy(self, value: Value) -> Value:
        none = value.masked is None or not bool(value.masked.any())
        return Value(value.array, None, value.error) if none else value

    def _state(self, e: Einsum, boxes: Mapping[str, Box]) -> dict[str, Value]:
        """A monoid of several components: each output is folded over its own ranks, with what it depends on."""
        assert isinstance(e.expr, Reduce)
        result: dict[str, Value] = {}
        for over in dict.fromkeys(o.ranks for o in e.outputs if o.name in boxes):
            wanted = {i: o for i, o in enumerate(e.outputs) if o.ranks == over and o.name in boxes}
            box = boxes[next(iter(wanted.values())).name]
            scope = Scope.over(over, box)
            if scope.size:
                state = self.fold(e.expr, scope, None, tuple(wanted))
                for o, value in zip(wanted.values(), state, strict=True):
                    result[o.name] = self._store(value, self.types[o.name], self.types[o.name], scope.shape)
            else:
                result.update({o.name: self._tidy(self._empty(self.types[o.name], box)) for o in wanted.values()})
        return result

    def _scan(self, e: Einsum, scan: Scan, spans: Mapping[str, tuple[int, int]]) -> Value:
        """Step along the scanned rank from its beginning; entries are kept, so a step may reach back any distance.

        Ranks along which every read of itself stays in place are computed over their span alone.
        """
        box = tuple(spans.get(r, (0, self.extents[r])) for r in e.output.ranks)
        still = _in_place(e)
        region = [b if r in still else (0, self.extents[r]) for r, b in zip(e.output.ranks, box, strict=True)]
        start, end = box[scan.axis]
        region[scan.axis] = (0, end) if scan.direction > 0 else (start, self.extents[scan.rank])
        state = self._empty(self.types[e.name], tuple(region))
        self.running[e.name] = tuple(a for a, _ in region), state
        for t in range(*region[scan.axis])[:: scan.direction]:
            sub = tuple((t, t + 1) if i == scan.axis else span for i, span in enumerate(region))
            _write(state, sub, tuple(region), self._blocks(e, sub))
        del self.running[e.name]
        where = tuple(slice(a - o, b - o) for (a, b), (o, _) in zip(box, region, strict=True))
        return self._tidy(state.apply(lambda a: a[where]))

    # Expressions

    def leaf(self, e: Expr, scope: Scope, guard: Array | None) -> Value:
        match e:
            case Rank(name=name):
                return self.exact(scope.coordinate(name))
            case Extent(rank=rank):
                return self.exact(np.full((1,) * scope.ndim, self.extents[rank], np.int64))
            case Access():
                return self._access(e, scope, guard)
            case Reduce():
                return self._reduced(e, scope, guard)
            case _:
                return super().leaf(e, scope, guard)

    def _reduced(self, e: Reduce, scope: Scope, guard: Array | None) -> Value:
        """The value of a reduction; that of one element is kept, as samples of a row share the row's."""
        if scope.size != 1 or guard is not None or self.running:
            return self.reduce(e, scope, guard)
        free = free_ranks(e)
        at = tuple((r, int(values[0])) for r, (_, values) in scope.axes.items() if r in free)
        key = (id(e), at, scope.ndim, self.summed)
        if key not in self.rows:
            while len(self.rows) >= KEPT_ROWS:
                self.rows.pop(next(iter(self.rows)))
            self.rows[key] = e, self.reduce(e, scope, guard)
        return self.rows[key][1]

    def _access(self, e: Access, scope: Scope, guard: Array | None) -> Value:
        """The elements that the indices name; those that no guard needs may be any."""
        if not e.indices:
            return self.fetch(e.tensor, ()).apply(lambda a: a.reshape((1,) * scope.ndim))
        parts = [self.at(i, scope, guard) for i in e.indices]
        indices = [p.array for p in parts]
        shape = np.broadcast_shapes(*(i.shape for i in indices))
        guard = None if guard is None else projected(guard, shape)
        inside = np.ones((1,) * scope.ndim, bool)
        for axis, (index, size) in enumerate(zip(indices, self.shapes[e.tensor], strict=True)):
            good = (index >= 0) & (index < size)
            if needed(~good, guard):
                raise self._outside(e, axis, size, index, ~good if guard is None else ~good & guard)
            inside = inside & good
        live = inside if guard is None else inside & guard
        if not bool(live.any()):
            return self.exact(np.zeros(shape, array_type(self.types[e.tensor])))
        if guard is not None:
            spans = [np.broadcast_to(i, shape)[np.broadcast_to(live, shape)] for i in indices]
        else:
            spans = indices
        box = tuple((int(s.min()), int(s.max()) + 1) for s in spans)
        part = self.fetch(e.tensor, box)
        extent = tuple(b - a for a, b in box)
        local = tuple(np.clip(i - a, 0, b - a - 1) for i, (a, b) in zip(indices, box, strict=True))
        value = part.apply(lambda a: np.broadcast_to(a, extent)[local])
        if self.track and any(bool(p.slack().any()) for p in parts):
            # A wrong index reads anything.
            unsure = sum((p.slack() > 0).astype(float) for p in parts) > 0
            value = Value(value.array, value.masked, np.where(unsure, np.inf, value.slack()))
        return value

    def _outside(self, e: Access, axis: int, size: int, index: Array, bad: Array) -> EvaluationError:
        value = int(np.broadcast_to(index, bad.shape)[bad].flat[0])
        hint = f"guard the read: where(index in bounds, {e.tensor}[index], 0)"
        if value < 0 and literal_value(e.indices[axis]) == value:
            hint = "indices do not wrap: with `extent(k)` entries the last is at extent(k) - 1"
        message = f"`{e.tensor}` is read at {value} along axis {axis}, which has extent {size}"
        return EvaluationError(message, hint=hint, loc=e.loc)


def _terms(c: Cascade, extents: Mapping[str, int]) -> dict[str, int]:
    """For each Einsum, by its first output: the terms of the longest sum in it, or of one that takes in its value."""
    found: dict[str, int] = {}
    wanted: dict[str, int] = {}
    for e in reversed(c.einsums):
        own = [math.prod(extents[r] for r in n.ranks) for n in e.reductions if n.op == "sum" or n.op in c.monoid_of]
        outer = max(wanted.get(o.name, 1) for o in e.outputs)
        found[e.name] = max([outer, *own])
        for name in tensors_read(e.expr):
            wanted[name] = max(wanted.get(name, 1), *(own or [outer]))
    return found


def _in_place(e: Einsum) -> frozenset[str]:
    """The ranks of a scan along which it reads itself only where it writes."""
    reads = [n for n in walk(e.expr) if isinstance(n, Access) and n.tensor == e.name]
    bound = {r for red in e.reductions for r in red.ranks}
    every = enumerate(e.output.ranks)
    return frozenset(r for axis, r in every if r not in bound and all(n.indices[axis] == Rank(r) for n in reads))


def _write(target: Value, sub: Box, box: Box, value: Value) -> None:
    """Write a value into the part of a larger one that covers the sub-box."""
    where = tuple(slice(a - o, b - o) for (a, b), (o, _) in zip(sub, box, strict=True))
    target.array[where] = value.array
    if target.masked is not None:
        target.masked[where] = value.flag() if value.masked is not None else False
    if target.error is not None:
        target.error[where] = value.slack()


def deeply(c: Cascade, compute: Callable[[], T]) -> T:
    """Run what recurses from an output through all of a cascade, on a stack that is deep enough."""
    levels = sum(20 + 5 * _depth(e.expr) for e in c.einsums)
    if levels < 400:
        with np.errstate(all="ignore"):
            return compute()
    found: list[T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            with np.errstate(all="ignore"):
                found.append(compute())
        except BaseException as error:
            failed.append(error)

    limit, stack = sys.getrecursionlimit(), threading.stack_size()
    try:
        sys.setrecursionlimit(max(limit, levels + 1000))
        threading.stack_size(min(1 << 30, (16 << 20) + 2048 * levels))
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    finally:
        threading.stack_size(stack)
        sys.setrecursionlimit(limit)
    if failed:
        raise failed[0]
    return found[0]


def _depth(e: Expr) -> int:
    """Levels of an expression."""
    deepest, stack = 0, [(e, 1)]
    while stack:
        node, depth = stack.pop()
        deepest = max(deepest, depth)
        stack.extend((k, depth + 1) for k in children(node))
    return deepest
