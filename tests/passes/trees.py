"""A cascade as a machine would compute it: monoids merged over random trees, in float32 or float64, without flags.

The oracle folds a monoid from the left, in float64, and knows what a mask left out. A kernel does neither, so derived
text must hold under any split and any association of the elements, in the precision of the target, on plain numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from castile.ir.cascade import Call, Cascade, Monoid, Reduce
from castile.ir.evaluate import Oracle, Scope, read_inputs
from castile.ir.extents import resolve
from castile.ir.scalar import Array, Scalars, Value, array_type, common
from castile.ir.types import TypeChecker


def single(x: Array) -> Array:
    """The float64 values of an array, rounded to float32."""
    return x.astype(np.float32).astype(np.float64) if x.dtype.kind == "f" else x


class Plain(Scalars):
    """Scalar arithmetic without flags; in float32 each operation is rounded (once: float64 is wide enough)."""

    precision = "f64"

    def rounded(self, value: Value) -> Value:
        return Value(single(value.array) if self.precision == "f32" else value.array)

    def call(self, e: Call, args: Sequence[Value], guard: Array | None) -> Value:
        return self.rounded(super().call(e, [Value(a.array) for a in args], guard))

    def select(self, e: Call, condition: Value, a: Value, b: Value) -> Value:
        return Value(super().select(e, condition, Value(a.array), Value(b.array)).array)

    def literal(self, e: Any, ndim: int) -> Value:
        return self.rounded(super().literal(e, ndim))


class Single(Plain):
    precision = "f32"


class TreeOracle(Plain, Oracle):
    """Evaluates a cascade; every monoid is merged over a tree that ``rng`` draws anew for each reduction."""

    def __init__(self, c: Cascade, inputs: Mapping[str, Any], rng: np.random.Generator, precision: str = "f64") -> None:
        values = read_inputs(c, inputs)
        if precision == "f32":
            values = {n: single(v) for n, v in values.items()}
        super().__init__(c, values, resolve(c, {}, {n: v.shape for n, v in values.items()}))
        self.rng = rng
        self.precision = precision

    def outputs(self) -> dict[str, Array]:
        with np.errstate(all="ignore"):
            return {name: self.full(name).array for name in self.c.outputs}

    def _reduced_flags(self, *_: Any) -> None:
        return None

    def _contract(self, *_: Any) -> None:
        return None

    def _reduce_piece(self, e: Reduce, scope: Scope, guard: Array | None) -> Value:
        if self.precision == "f64" or e.op != "sum":
            return self.rounded(super()._reduce_piece(e, scope, guard))
        count = len(e.ranks)
        axes = tuple(range(scope.ndim - count, scope.ndim))
        array = self.at(e.arg, scope, guard).array
        array = np.broadcast_to(array, array.shape[:-count] + scope.shape[-count:])
        if array.dtype.kind != "f":
            return super()._reduce_piece(e, scope, guard)
        return Value(np.asarray(np.sum(array.astype(np.float32), axes, dtype=np.float32)).astype(np.float64))

    def _fold(self, e: Reduce, scope: Scope, guard: Array | None) -> list[Value]:
        m = self.c.monoid_of[e.op]
        types = self.checker.state_types(e)
        inner = scope.extend(e.ranks, [np.arange(self.extents[r]) for r in e.ranks])
        shape = inner.shape[scope.ndim :]
        wide = None if guard is None else guard.reshape(guard.shape + (1,) * len(shape))
        elements = []
        for argument, t in zip(e.args, types, strict=True):
            array = self.at(argument, inner, wide).array
            array = np.broadcast_to(array, array.shape[: scope.ndim] + shape)
            array = array.reshape((*array.shape[: scope.ndim], int(np.prod(shape))))
            elements.append(common(array, np.zeros(1, array_type(t)))[0])
        identity = [self.expr(i, scope.ndim).array.astype(x.dtype) for i, x in zip(m.identity, elements, strict=True)]
        merge = Merge(m, types, self.precision)
        places = list(range(elements[0].shape[-1]))
        if self.rng.random() < 0.5 and commutes(m):
            self.rng.shuffle(places)
        return [Value(a) for a in self._tree(merge, [[x[..., p] for x in elements] for p in places], identity)]

    def _tree(self, merge: Merge, leaves: list[list[Array]], identity: list[Array]) -> list[Array]:
        """Merge in a random order of neighbours, identities strewn in, as programs over uneven splits would."""
        states = list(leaves)
        for _ in range(int(self.rng.integers(0, 3)) + (not states)):
            states.insert(int(self.rng.integers(0, len(states) + 1)), identity)
        while len(states) > 1:
            at = int(self.rng.integers(0, len(states) - 1))
            states[at : at + 2] = [merge(states[at], states[at + 1])]
        return states[0]


def commutes(m: Monoid) -> bool:
    """Whether elements may come in any order: true of derived monoids; a user's promises only association."""
    return m.name.startswith("stream")


class Merge:
    """A monoid's combine on plain arrays."""

    def __init__(self, m: Monoid, types: tuple[str, ...], precision: str = "f64") -> None:
        self.m = m
        self.tensors = dict(zip(m.params, types + types, strict=True))
        self.precision = precision

    def __call__(self, a: Sequence[Array], b: Sequence[Array]) -> list[Array]:
        values = {n: Value(x) for n, x in zip(self.m.params, [*a, *b], strict=True)}
        tensors = dict(self.tensors)
        kind = Single if self.precision == "f32" else Plain
        scalars = kind(TypeChecker(tensors, {}), values)
        ndim = max((v.array.ndim for v in values.values()), default=0)
        with np.errstate(all="ignore"):
            for name, expression in self.m.body:
                tensors[name] = scalars.dtype(expression)
                values[name] = scalars.expr(expression, ndim)
        return [values[r].array for r in self.m.results]


def tree_evaluate(
    c: Cascade, inputs: Mapping[str, Any], rng: np.random.Generator, precision: str = "f64"
) -> dict[str, Array]:
    """The outputs of a cascade, its monoids merged over random trees."""
    return TreeOracle(c, inputs, rng, precision).outputs()
