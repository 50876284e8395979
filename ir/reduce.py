"""Reductions in the oracle: built-in ones piece by piece, sums of products without the products, monoids as folds.

What a mask left out is nothing: a sum of it alone, or of no terms, is the flagged 0, a maximum the flagged -inf. So a
reduction is what folding the masked operation of `scalar` gives, in whatever order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from . import rounding
from .blocks import factors, ordered, squares, tiles
from .cascade import Access, Call, Expr, Monoid, Reduce, free_ranks, tensors_read
from .contract import Contraction, Contractions
from .dtypes import DTYPES
from .errors import EvaluationError
from .ops import OPS, REDUCTIONS
from .scalar import Array, Box, Scalars, Scope, Value, array_type, flagged, masked_call, narrowed, needed
from .summands import summands
from .types import TypeChecker, body_types
from .verify import component_dependence

State = Mapping[int, Value]


class Reductions(Scalars):
    """Adds reductions over ranks of known extents; ``leaf`` of a subclass gives tensors and coordinates."""

    monoids: Mapping[str, Monoid]
    extents: Mapping[str, int]

    def __init__(self, checker: TypeChecker, values: Mapping[str, Value], track: bool = False) -> None:
        super().__init__(checker, values, track)
        self.contractions = Contractions(self.dtype, self.opened)
        # By identity, as hashing a tree costs; the sum is kept, so its identity stays its own.
        self.held: dict[int, tuple[Reduce, list[Contraction]]] = {}
        self.chains: dict[int, tuple[Call, list[Expr]]] = {}

    def opened(self, e: Access) -> Expr | None:
        """What a map computes at an access to it; None for any other tensor."""
        return None

    def in_any_order(self, e: Call, value: Value, scope: Scope, guard: Array | None) -> Value:
        terms = self._summands(e)
        if len(terms) <= 2:
            return value
        values = [self.at(t, scope, guard) for t in terms]
        magnitude, inherited = sum(rounding.absolute(v.array) for v in values), sum(v.slack() for v in values)
        error = inherited + rounding.chain_error(np.asarray(magnitude), len(terms), self.dtype(e))
        return replace(value, error=rounding.settle(value.array, error, self.dtype(e), value.masked))

    def _summands(self, e: Call) -> list[Expr]:
        """The terms of a chain of sums of floats that the numerics let a kernel add in any order."""
        if id(e) not in self.chains:
            free = self.numerics != "strict" and DTYPES[self.dtype(e)].is_float
            self.chains[id(e)] = (e, summands(e, self.opened, self.dtype) if free else [e])
        return self.chains[id(e)][1]

    def reduce(self, e: Reduce, scope: Scope, guard: Array | None) -> Value:
        """The value of a reduction over a scope."""
        if e.op in self.monoids:
            return self.fold(e, scope, guard, (0,))[0]
        if any(self.extents[r] == 0 for r in e.ranks):
            return self._nothing(e, scope, guard)
        return self._over(e, scope, guard, self._span(e), self.contracts(e))

    def _span(self, e: Reduce) -> Box:
        return tuple((0, self.extents[r]) for r in e.ranks)

    def _over(self, e: Reduce, scope: Scope, guard: Array | None, box: Box, contract: bool) -> Value:
        """A built-in reduction over a box of its ranks, piece by piece; an argmax has one piece.

        With ``contract`` a sum of products makes no array of the products, but for pieces that are not finite.
        """
        outer = {r: len(values) for r, (_, values) in scope.axes.items()}
        extents = {**self.extents, **{r: b - a for r, (a, b) in zip(e.ranks, box, strict=True)}}
        steps = squares(e, outer, extents, lambda n: self.contracts(n) and (contract or n is not e), keep=True)
        total: Value | None = None
        for piece in tiles(box, tuple(steps[r, id(e)] for r in e.ranks)):
            inner, wide = scope.extend_over(e.ranks, piece), _widen(guard, len(e.ranks))
            part = self._contract(e, inner, wide) if contract else self._piece(e, inner, wide)
            if part is None:
                part = self._over(e, scope, guard, piece, False)
            total = part if total is None else self._join(e, total, part)
        assert total is not None
        return Value(self.wrapped(e, total.array), total.masked, total.error)

    def _nothing(self, e: Reduce, scope: Scope, guard: Array | None) -> Value:
        """What a reduction over no coordinates gives: its identity."""
        if e.op == "argmax":
            if needed(np.ones((1,) * scope.ndim, bool), guard):
                message = f"argmax over rank `{e.ranks[0]}`, which is empty"
                hint = f"guard it: where(extent({e.ranks[0]}) > 0, argmax[{e.ranks[0]}](…), 0)"
                raise EvaluationError(message, hint=hint, rank=e.ranks[0], loc=e.loc)
            return self.exact(np.zeros((1,) * scope.ndim, np.int64))
        dtype = DTYPES[self.dtype(e)]
        identity: Any = REDUCTIONS[e.op].identity
        if dtype.is_integer and e.op in ("max", "min"):
            identity = dtype.lowest if e.op == "max" else dtype.highest
        array = np.full((1,) * scope.ndim, identity, array_type(dtype.name))
        return self.exact(array, flagged(array, np.ones(array.shape, bool)))

    def _piece(self, e: Reduce, scope: Scope, guard: Array | None) -> Value:
        count = len(e.ranks)
        axes = tuple(range(scope.ndim - count, scope.ndim))
        value = self.at(e.arg, scope, guard)
        value = value.apply(lambda a: np.broadcast_to(a, a.shape[:-count] + scope.shape[scope.ndim - count :]))
        array = value.array
        if array.dtype == bool and e.op not in ("any", "all"):
            array = array.astype(np.int64)
        result = np.asarray(REDUCTIONS[e.op].numpy(array, axis=axes[0] if e.op == "argmax" else axes))
        masked = None
        if value.masked is not None and e.op not in ("argmax", "any", "all"):
            result, masked = _masked_reduction(e.op, array, value.masked, result, axes)
        if not self.track:
            return Value(result, masked)
        rounded = self._rounded(e, scope, guard) if e.op == "sum" else np.zeros(())
        error = self._error(e, array, np.broadcast_to(value.slack(), array.shape), result, axes, rounded)
        return Value(result, masked, rounding.settle(result, error, self.dtype(e), masked))

    def _error(self, e: Reduce, x: Array, error: Array, y: Array, axes: tuple[int, ...], rounded: Array) -> Array:
        dtype, terms = self.dtype(e), self._terms(e)
        match e.op:
            case "sum":
                magnitude = np.sum(rounding.absolute(x), axes)
                rounded = rounded + self._tf32(e) * magnitude
                return rounding.sum_error(magnitude, np.sum(error, axes), terms, 0, dtype, rounded)
            case "prod":
                return rounding.prod_error(x, error, y, axes, dtype)
            case "argmax":
                return rounding.argmax_error(x.astype(float), error, axes[0])
            case "any" | "all":
                return rounding.truth_error(x, error, axes, REDUCTIONS[e.op].numpy)
            case _:
                return rounding.extreme_error(x, error, y, axes, REDUCTIONS[e.op].numpy)

    def _terms(self, e: Reduce) -> int:
        return math.prod(self.extents[r] for r in e.ranks)

    def _join(self, e: Reduce, a: Value, b: Value) -> Value:
        """Two pieces of one built-in reduction."""
        op = REDUCTIONS[e.op].combine
        joined = masked_call(op, (a, b), np.asarray(OPS[op].numpy(a.array, b.array)))
        if not self.track:
            return joined
        error = a.slack() + b.slack()
        if e.op != "sum":
            parts = [a.array, b.array], [a.slack(), b.slack()]
            error = rounding.call_error(op, *parts, joined.array, self.dtype(e))
        return Value(joined.array, joined.masked, rounding.settle(joined.array, error, self.dtype(e), joined.masked))

    # Sums of products

    def contracts(self, e: Reduce) -> bool:
        """Whether a reduction is a sum of products of floats, each of its ranks in some factor."""
        if e.op != "sum":
            return False
        parts = factors(e.arg)
        within = frozenset().union(*map(free_ranks, parts))
        floats = all(DTYPES[self.dtype(f)].is_float for f in parts)
        return len(parts) > 1 and floats and within.issuperset(e.ranks)

    def _contract(self, e: Reduce, scope: Scope, guard: Array | None) -> Value | None:
        """A sum of products without the array of products, by np.einsum; None where a factor is not finite."""
        parts = factors(e.arg)
        values = [self.at(f, scope, guard) for f in parts]
        arrays = _over_all([v.array for v in values], scope, len(e.ranks))
        if not all(bool(np.isfinite(x).all()) for x in arrays):
            return None
        kept = list(range(scope.ndim - len(e.ranks)))
        result = _contract_arrays(arrays, kept)
        masked = None
        if any(v.masked is not None for v in values):
            live = [np.broadcast_to(~v.flag(), x.shape).astype(float) for v, x in zip(values, arrays, strict=True)]
            masked = flagged(result, _contract_arrays(live, kept) == 0)
        if not self.track:
            return Value(result, masked)
        magnitudes = [np.abs(x) for x in arrays]
        magnitude = _contract_arrays(magnitudes, kept)
        inherited = np.zeros_like(magnitude)
        if any(bool(v.slack().any()) for v in values):
            # Beyond this the bound is infinite anyway, and infinity times a 0 would be NaN.
            wide = [m + np.minimum(v.slack(), 1e300) for m, v in zip(magnitudes, values, strict=True)]
            inherited = np.maximum(_contract_arrays(wide, kept) - magnitude, 0.0)
        rounded = self._rounded(e, scope, guard) + self._tf32(e) * magnitude
        error = rounding.sum_error(magnitude, inherited, self._terms(e), len(parts) - 1, self.dtype(e), rounded)
        return Value(result, masked, rounding.settle(result, error, self.dtype(e), masked))

    def _rounded(self, e: Reduce, scope: Scope, guard: Array | None) -> Array:
        """The error of operands that the numerics mode lets a kernel round to 16 bits (design, section 2)."""
        total = np.zeros(())
        if self.numerics != "strict":
            known = self.held.get(id(e))
            if known is None:
                known = self.held[id(e)] = (e, self.contractions.of(e.arg))
            for c in known[1]:
                total = total + c.rounding * self._size(c, len(e.ranks), scope, guard)
        return total

    def _size(self, c: Contraction, count: int, scope: Scope, guard: Array | None) -> Array:
        """The sum of the absolute values of a contraction's products over the last ranks of a scope."""
        arrays: list[Array] = []
        for p in c.conditions:
            arrays.append(self.at(p, scope, guard).array)
            guard = narrowed(guard, arrays[-1])
        # Where a factor is not finite, neither is the sum, or a mask has left the product out.
        arrays += [np.nan_to_num(np.abs(self.at(f, scope, guard).array), posinf=0.0) for f in c.parts]
        arrays = _over_all([a.astype(float) for a in arrays], scope, count)
        return _contract_arrays(arrays, list(range(scope.ndim - count)))

    def _tf32(self, e: Reduce) -> float:
        """The rounding of f32 operands in fast numerics."""
        parts = factors(e.arg)
        types = [self.dtype(f) for f in parts]
        wide = "f64" not in types and all(DTYPES[t].is_float and DTYPES[t].bits > 16 for t in types)
        return 2.0**-10 if self.numerics == "fast" and len(parts) > 1 and wide else 0.0

    # Monoids

    def fold(self, e: Reduce, scope: Scope, guard: Array | None, wanted: Sequence[int]) -> list[Value]:
        """The wanted components of a monoid's state: from the identity, one element after another, ranks in order."""
        m = self.monoids[e.op]
        needed = frozenset().union(*(component_dependence(m)[i] for i in wanted))
        merge = Merge(m, self.checker.state_types(e), needed, self.track)
        state = merge.identity(scope.ndim)
        count = len(e.ranks)
        box = self._span(e)
        for piece in tiles(box, ordered(box, scope.size)):
            inner = scope.extend_over(e.ranks, piece)
            values = {i: self.at(e.args[i], inner, _widen(guard, count)) for i in needed}
            for place in np.ndindex(*inner.shape[scope.ndim :]):
                state = merge(state, {i: _element(v, place) for i, v in values.items()})
        return [state[i] for i in wanted]


class Merge:
    """A monoid's combine over arrays of states, for state types and for the components that are asked for."""

    def __init__(self, m: Monoid, types: Sequence[str], components: frozenset[int], track: bool) -> None:
        self.m = m
        self.types = types
        self.components = sorted(components)
        self.track = track
        names = {n for i in self.components for n in (m.params[i], m.params[i + m.width])}
        self.body: list[tuple[str, Expr]] = []
        for name, value in m.body:
            if names.issuperset(tensors_read(value)):
                self.body.append((name, value))
                names.add(name)
        self.checker = TypeChecker(body_types(m, tuple(types)), {})

    def identity(self, ndim: int) -> State:
        """The empty state: as nothing went into it, its 0 and -inf count as masked."""
        scalars, scope = Scalars(self.checker, {}, self.track), Scope({}, (1,) * ndim)
        values = {i: scalars.at(self.m.identity[i], scope, None).as_kind(self.types[i]) for i in self.components}
        return {i: Value(v.array, flagged(v.array, np.ones(v.array.shape, bool)), v.error) for i, v in values.items()}

    def __call__(self, state: State, element: State) -> State:
        """One application to two states whose arrays broadcast against each other."""
        m = self.m
        values: dict[str, Value] = {}
        for i in self.components:
            values[m.params[i]] = state[i].as_kind(self.types[i])
            values[m.params[i + m.width]] = element[i].as_kind(self.types[i])
        scalars = Scalars(self.checker, values, self.track)
        scope = Scope({}, (1,) * max((v.array.ndim for v in values.values()), default=0))
        for name, value in self.body:
            values[name] = scalars.at(value, scope, None).as_kind(self.checker.tensors[name])
        return {i: values[m.results[i]].as_kind(self.types[i]) for i in self.components}


def combine_states(
    m: Monoid, types: Sequence[str], state: Sequence[Value], element: Sequence[Value], *, track: bool = False
) -> list[Value]:
    """One application of a monoid to two whole states."""
    merged = Merge(m, types, frozenset(range(m.width)), track)(dict(enumerate(state)), dict(enumerate(element)))
    return [merged[i] for i in range(m.width)]


def _masked_reduction(
    op: str, array: Array, masked: Array, result: Array, axes: tuple[int, ...]
) -> tuple[Array, Array | None]:
    """The result of a reduction over values some of which a mask left out, and its flags."""
    flags = np.broadcast_to(masked, array.shape)
    every = np.all(flags, axes)
    zero = np.any(flags & (array == 0), axes)
    minus = np.any(flags & (array == -np.inf), axes)
    match op:
        case "sum":
            result = np.where(minus, -np.inf, result)
            every = every | minus
        case "min":
            every = every | minus
            result = np.where(minus, -np.inf, result)
        case "prod":
            result, every = np.where(zero, 0.0, result), zero
        case _:
            pass
    return result, flagged(result, np.asarray(every))


def _element(value: Value, place: tuple[int, ...]) -> Value:
    """The value at one place of the last axes, of which some may have size 1."""

    def at(a: Array) -> Array:
        index = (..., *(min(i, n - 1) for i, n in zip(place, a.shape[a.ndim - len(place) :], strict=True)))
        return np.asarray(a[index])

    return value.apply(at)


def _widen(guard: Array | None, count: int) -> Array | None:
    return None if guard is None else guard.reshape(guard.shape + (1,) * count)


def _over_all(arrays: Sequence[Array], scope: Scope, count: int) -> list[Array]:
    """Factors of a product of which one goes over each of the last ranks of a scope, also where none varies: a sum of
    nothing is the same at every coordinate."""
    outer = scope.ndim - count
    same = [i for i in range(outer, scope.ndim) if all(a.shape[i] == 1 for a in arrays)]
    first, *rest = arrays
    return [np.broadcast_to(first, [scope.shape[i] if i in same else n for i, n in enumerate(first.shape)]), *rest]


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
