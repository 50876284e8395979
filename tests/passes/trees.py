"""A cascade as a machine would compute it: monoids merged over random trees, in float32 or float64, without flags.

The oracle folds a monoid from the left, in float64, and knows what a mask left out. A kernel does neither, so derived
text must hold under any split and any association of the elements, in the precision of the target, on plain numbers.
This evaluator shares nothing with the oracle but the op table: whole arrays, one axis for each rank in scope.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from castile.ir.cascade import Access, Call, Cascade, Cast, Const, Einsum, Expr, Extent, Monoid, Rank, Reduce
from castile.ir.dtypes import DTYPES, round_to, rounds, wrap
from castile.ir.extents import resolve, shape_of
from castile.ir.ops import OPS, REDUCTIONS
from castile.ir.types import TypeChecker, settle, tensor_types
from castile.ir.verify import scan_step

Array = np.ndarray[Any, Any]


def tree_evaluate(
    c: Cascade, inputs: Mapping[str, Any], rng: np.random.Generator, precision: str = "f64"
) -> dict[str, Array]:
    """The outputs of a cascade, its monoids merged over random trees."""
    with np.errstate(all="ignore"):
        return Machine(c, inputs, rng, precision).run()


class Arithmetic:
    """Scalar operations over arrays; in float32 each result is rounded (once: float64 is wide enough)."""

    def __init__(self, types: dict[str, str], precision: str) -> None:
        self.types = types
        self.precision = precision
        self.checker = TypeChecker(types, {})

    def dtype(self, e: Expr) -> str:
        return settle(self.checker.infer(e))

    def settle(self, x: Any) -> Array:
        x = np.asarray(x)
        if x.dtype.kind == "f":
            return x.astype(np.float32).astype(np.float64) if self.precision == "f32" else x.astype(np.float64)
        return x if x.dtype == bool else x.astype(np.int64)

    def cast(self, x: Array, dtype: str) -> Array:
        row = DTYPES[dtype]
        if row.is_float:
            x = x.astype(np.float64)
            return round_to(x, dtype) if rounds(dtype) else self.settle(x)
        if row.kind == "bool":
            return np.asarray(x != 0)
        if x.dtype.kind == "f":
            return np.clip(np.where(np.isnan(x), 0.0, np.trunc(x)), row.lowest, row.highest).astype(np.int64)
        return wrap(x.astype(np.int64), dtype)

    def call(self, e: Call, args: Sequence[Array]) -> Array:
        op = OPS[e.op]
        arrays = [a.astype(np.int64) if a.dtype == bool and op.rule in ("arith", "same", "power") else a for a in args]
        if op.rule in ("divide", "real"):
            arrays = [a.astype(np.float64) for a in arrays]
        if e.op in ("floordiv", "mod") and arrays[1].dtype.kind == "i":
            arrays[1] = np.where(arrays[1] == 0, 1, arrays[1])
        if e.op == "pow":
            arrays[1] = arrays[1].astype(arrays[0].dtype)
        y = np.asarray(op.numpy(*arrays))
        if y.dtype.kind in "iu":
            dtype = self.dtype(e)
            return wrap(y.astype(np.int64), dtype) if DTYPES[dtype].is_integer else y
        return self.settle(y)


class Merge(Arithmetic):
    """A monoid's combine on plain arrays."""

    def __init__(self, m: Monoid, types: Sequence[str], precision: str = "f64") -> None:
        super().__init__(dict(zip(m.params, (*types, *types), strict=True)), precision)
        self.m = m
        self.state = tuple(types)

    def identity(self) -> list[Array]:
        kinds = [np.float64 if DTYPES[t].is_float else np.int64 for t in self.state]
        return [np.asarray(self.value(i, {}), k) for i, k in zip(self.m.identity, kinds, strict=True)]

    def __call__(self, a: Sequence[Array], b: Sequence[Array]) -> list[Array]:
        values = dict(zip(self.m.params, (*a, *b), strict=True))
        with np.errstate(all="ignore"):
            for name, expression in self.m.body:
                self.types[name] = self.dtype(expression)
                values[name] = self.value(expression, values)
        return [values[r] for r in self.m.results]

    def value(self, e: Expr, values: Mapping[str, Array]) -> Array:
        match e:
            case Const():
                return self.settle(e.value)
            case Access(tensor=name):
                return values[name]
            case Cast(dtype=dtype, arg=arg):
                return self.cast(self.value(arg, values), dtype)
            case Call(args=args):
                return self.call(e, [self.value(a, values) for a in args])
        raise AssertionError(e)


class Machine(Arithmetic):
    def __init__(self, c: Cascade, inputs: Mapping[str, Any], rng: np.random.Generator, precision: str) -> None:
        super().__init__(dict(tensor_types(c)), precision)
        self.checker = TypeChecker(self.types, c.monoid_of)
        self.c, self.rng = c, rng
        self.tensors = {p.name: self.cast(np.asarray(inputs[p.name]), p.dtype) for p in c.params}
        self.extents = resolve(c, {}, {n: v.shape for n, v in self.tensors.items()})

    def run(self) -> dict[str, Array]:
        for e in self.c.einsums:
            if len(e.outputs) > 1 or (isinstance(e.expr, Reduce) and e.expr.op in self.c.monoid_of):
                self._state(e)
            elif scan_step(e) is not None:
                self._scan(e)
            else:
                self.tensors[e.name] = self._whole(e, e.expr)
        return {name: self.tensors[name] for name in self.c.outputs}

    def _whole(self, e: Einsum, expr: Expr) -> Array:
        scope = {r: np.arange(self.extents[r]) for r in e.output.ranks}
        value = np.broadcast_to(self.at(expr, scope), [len(v) for v in scope.values()])
        return self.cast(value, self.types[e.name])

    def _scan(self, e: Einsum) -> None:
        scan = scan_step(e)
        assert scan is not None
        shape = [self.extents[r] for r in e.output.ranks]
        self.tensors[e.name] = result = np.zeros(shape, np.float64 if DTYPES[self.types[e.name]].is_float else np.int64)
        steps = range(shape[scan.axis])
        for t in steps if scan.direction > 0 else reversed(steps):
            scope = {r: np.array([t]) if r == scan.rank else np.arange(self.extents[r]) for r in e.output.ranks}
            value = np.broadcast_to(self.at(e.expr, scope), [len(v) for v in scope.values()])
            result[tuple(slice(t, t + 1) if i == scan.axis else slice(None) for i in range(len(shape)))] = self.cast(
                value, self.types[e.name]
            )

    def _state(self, e: Einsum) -> None:
        assert isinstance(e.expr, Reduce)
        scope = {r: np.arange(self.extents[r]) for r in e.ranks}
        for o, value in zip(e.outputs, self.fold(e.expr, scope), strict=True):
            full = np.broadcast_to(value, [len(v) for v in scope.values()])
            # A component does not vary along ranks that its output lacks.
            index = tuple(slice(None) if r in o.ranks else 0 for r in e.ranks)
            kept = [r for r in e.ranks if r in o.ranks]
            part = full[index].transpose([kept.index(r) for r in o.ranks])
            self.tensors[o.name] = self.cast(part, self.types[o.name])

    def at(self, e: Expr, scope: Mapping[str, Array]) -> Array:
        """The value over a scope, one axis for each of its ranks."""
        match e:
            case Const():
                return self.settle(e.value).reshape((1,) * len(scope))
            case Rank(name=name):
                return scope[name].reshape([-1 if r == name else 1 for r in scope])
            case Extent(rank=rank):
                return np.asarray(self.extents[rank]).reshape((1,) * len(scope))
            case Cast(dtype=dtype, arg=arg):
                return self.cast(self.at(arg, scope), dtype)
            case Access(tensor=name, indices=indices):
                return self._read(name, [self.at(i, scope) for i in indices], len(scope))
            case Reduce():
                return self.reduce(e, scope)
            case Call(args=args):
                return self.call(e, [self.at(a, scope) for a in args])

    def _read(self, name: str, indices: list[Array], ndim: int) -> Array:
        array = self.tensors[name]
        if not indices:
            return array.reshape((1,) * ndim)
        if 0 in shape_of(self.c, name, self.extents):
            return np.zeros(np.broadcast_shapes(*(i.shape for i in indices)), array.dtype)
        # Out of bounds is read only where a select discards it.
        return array[tuple(np.clip(i, 0, n - 1) for i, n in zip(indices, array.shape, strict=True))]

    def reduce(self, e: Reduce, scope: Mapping[str, Array]) -> Array:
        if e.op in self.c.monoid_of:
            return self.fold(e, scope)[0]
        inner = {**{r: v for r, v in scope.items() if r not in e.ranks}, **self._bound(e)}
        outer = len(inner) - len(e.ranks)
        x = self.at(e.arg, inner)
        x = np.broadcast_to(x, (*x.shape[:outer], *(len(inner[r]) for r in e.ranks)))
        axes = tuple(range(outer, len(inner)))
        if x.dtype == bool and e.op not in ("any", "all"):
            x = x.astype(np.int64)
        if e.op == "argmax":
            y = np.argmax(x, axis=axes[0])
        elif x.dtype.kind == "f":
            fast = x.astype(np.float32) if self.precision == "f32" else x
            y = self.settle(REDUCTIONS[e.op].numpy(fast, axis=axes, initial=REDUCTIONS[e.op].identity))
        else:
            settings = {} if e.op in ("any", "all") or x.size else {"initial": REDUCTIONS[e.op].identity}
            y = REDUCTIONS[e.op].numpy(x, axis=axes, **settings)
            y = wrap(np.asarray(y), self.dtype(e)) if np.asarray(y).dtype != bool else y
        return self._spread(np.asarray(y), scope, e)

    def _bound(self, e: Reduce) -> dict[str, Array]:
        return {r: np.arange(self.extents[r]) for r in e.ranks}

    def _spread(self, y: Array, scope: Mapping[str, Array], e: Reduce) -> Array:
        """An axis of size 1 for each rank of the scope that the reduction shadows."""
        for i, r in enumerate(scope):
            if r in e.ranks:
                y = np.expand_dims(y, i)
        return y

    def fold(self, e: Reduce, scope: Mapping[str, Array]) -> list[Array]:
        m = self.c.monoid_of[e.op]
        merge = Merge(m, self.checker.state_types(e), self.precision)
        inner = {**scope, **self._bound(e)}
        shape = [len(inner[r]) for r in e.ranks]
        elements = []
        for argument, t in zip(e.args, merge.state, strict=True):
            x = self.at(argument, inner).astype(np.float64 if DTYPES[t].is_float else np.int64)
            x = np.broadcast_to(x, (*x.shape[: len(scope)], *shape))
            elements.append(x.reshape((*x.shape[: len(scope)], int(np.prod(shape)))))
        places = list(range(int(np.prod(shape))))
        if m.name.startswith("stream") and self.rng.random() < 0.5:
            # What castile derives commutes; a user's monoid promises association alone.
            self.rng.shuffle(places)
        leaves = [[x[..., p] for x in elements] for p in places]
        empty = [i.reshape((1,) * len(scope)) for i in merge.identity()]
        return self.tree(merge, leaves, empty)

    def tree(self, merge: Merge, leaves: list[list[Array]], empty: list[Array]) -> list[Array]:
        """Merge neighbours in a random order, identities strewn in, as programs over uneven splits would."""
        states = list(leaves)
        for _ in range(int(self.rng.integers(0, 3)) + (not states)):
            states.insert(int(self.rng.integers(0, len(states) + 1)), empty)
        while len(states) > 1:
            at = int(self.rng.integers(0, len(states) - 1))
            states[at : at + 2] = [merge(states[at], states[at + 1])]
        return states[0]
