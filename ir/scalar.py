"""Scalar expressions over NumPy arrays: values, their *masked* flags and, on request, their error bounds.

The masked flag follows section 2 of the design: a literal ``-inf`` branch of ``where`` sets it. A flagged -inf stays
what it is under anything added; ``exp`` turns it into a flagged 0; a flagged 0 annihilates in a product, even with
infinity; and a flagged 0 divided by anything is 0. Only 0 and -inf are ever flagged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from . import rounding
from .blocks import Box as Box
from .cascade import Access, Call, Cast, Const, Expr, is_minus_infinity, literal_value
from .dtypes import DTYPES, round_to, rounds, wrap
from .errors import EvaluationError
from .ops import OPS
from .types import TypeChecker, join, settle

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Value:
    """An array over the axes of the scope (size 1 where it does not vary).

    ``masked`` says where it stands for what a mask left out, None for nowhere. ``error`` bounds the absolute error that
    a correct kernel may have made, None where that is not asked for.
    """

    array: Array
    masked: Array | None = None
    error: Array | None = None

    def flag(self) -> Array:
        return np.zeros((1,) * self.array.ndim, bool) if self.masked is None else self.masked

    def slack(self) -> Array:
        return np.zeros((1,) * self.array.ndim) if self.error is None else self.error

    def apply(self, f: Callable[[Array], Array]) -> Value:
        """The same reshaping, slicing or broadcasting of every part."""
        return Value(
            f(self.array),
            None if self.masked is None else f(self.masked),
            None if self.error is None else f(self.error),
        )

    def as_kind(self, dtype: str) -> Value:
        """The same numbers in the NumPy type that holds a dtype."""
        return Value(self.array.astype(array_type(dtype), copy=False), self.masked, self.error)


@dataclass(frozen=True, slots=True)
class Scope:
    """The ranks in scope: for each the axis along which it runs, and its coordinates there."""

    axes: Mapping[str, tuple[int, Array]]
    shape: tuple[int, ...]

    @classmethod
    def over(cls, ranks: Sequence[str], box: Box) -> Scope:
        return cls({}, ()).extend_over(ranks, box)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def coordinate(self, rank: str) -> Array:
        axis, values = self.axes[rank]
        return values.reshape(tuple(-1 if i == axis else 1 for i in range(self.ndim)))

    def extend_over(self, ranks: Sequence[str], box: Box) -> Scope:
        """The scope with further axes, over a box of other ranks."""
        values = [np.arange(a, b, dtype=np.int64) for a, b in box]
        axes = {r: (self.ndim + i, v) for i, (r, v) in enumerate(zip(ranks, values, strict=True))}
        return Scope({**self.axes, **axes}, self.shape + tuple(len(v) for v in values))


def convert(x: Array, dtype: str) -> Array:
    """A cast as the language defines it: to floats by rounding, to integers by saturating truncation (NaN gives 0)."""
    row = DTYPES[dtype]
    if row.is_float:
        x = x.astype(np.float64)
        return round_to(x, dtype) if rounds(dtype) else x
    if row.kind == "bool":
        return np.asarray(x != 0)
    if x.dtype.kind != "f":
        return wrap(x.astype(np.int64), dtype)
    whole = np.where(np.isnan(x), 0.0, np.trunc(x))
    # 2^63 - 1 is no float64, so i64 clips below it and the top is put in by comparison.
    limit = np.nextafter(2.0**63, 0) if row.bits == 64 else float(row.highest)
    clipped = np.clip(whole, float(row.lowest), limit).astype(np.int64)
    return np.where(whole >= float(row.highest), np.int64(row.highest), clipped)


def array_type(dtype: str) -> Any:
    """The NumPy type in which the oracle holds values of a dtype."""
    row = DTYPES[dtype]
    return np.float64 if row.is_float else bool if row.kind == "bool" else np.int64


def common(a: Array, b: Array) -> tuple[Array, Array]:
    """Two arrays in one of float64, int64 and bool."""
    if a.dtype == b.dtype:
        return a, b
    kind: Any = np.float64 if "f" in (a.dtype.kind, b.dtype.kind) else np.int64
    return a.astype(kind), b.astype(kind)


class Scalars:
    """Evaluates literals, casts, operations and ``where`` over a scope; anything else is a value looked up by name.

    `reduce.Reductions` and `evaluate.Oracle` add ranks, reductions and tensors; a monoid's body needs no more.
    """

    numerics = "standard"
    # Terms of the longest sum that takes in what is computed.
    summed = 1

    def __init__(self, checker: TypeChecker, values: Mapping[str, Value], track: bool = False) -> None:
        self.checker = checker
        self.values = values
        self.track = track

    def dtype(self, e: Expr) -> str:
        return settle(self.checker.infer(e))

    def at(self, e: Expr, scope: Scope, guard: Array | None) -> Value:
        """The value of an expression over a scope; ``guard`` says where it is needed, None everywhere."""
        match e:
            case Const():
                return self.literal(e, scope)
            case Cast(dtype=name, arg=arg):
                value = self.at(arg, scope, guard)
                if self.track:
                    value = Value(value.array, value.masked, self.slack(arg, value, name))
                return self.cast(value, name, self.dtype(arg))
            case Call(op="where"):
                return self.where(e, scope, guard)
            case Call(op="mul") if self.track and self._in_parts(e):
                return self.call(e, [self._factor(a, scope, guard) for a in e.args], guard)
            case Call():
                value = self.call(e, [self.at(a, scope, guard) for a in e.args], guard)
                return self.in_any_order(e, value, scope, guard) if self.track else value
            case _:
                return self.leaf(e, scope, guard)

    def in_any_order(self, e: Call, value: Value, scope: Scope, guard: Array | None) -> Value:
        """The value of an operation with the error that it may have if a kernel adds terms in another order."""
        return value

    def _in_parts(self, e: Expr) -> bool:
        """Whether a kernel may sum the parts of a product's factors apart."""
        return self.summed > 1 and self.numerics != "strict" and DTYPES[self.dtype(e)].is_float

    def _factor(self, e: Expr, scope: Scope, guard: Array | None) -> Value:
        """A factor of a product of floats. A difference of integers is exact, yet a kernel may sum its parts apart."""
        value = self.at(e, scope, guard)
        match e:
            case Call(op="add" | "sub", args=args) if DTYPES[self.dtype(e)].is_integer:
                a, b = (np.abs(self.at(x, scope, guard).array.astype(np.float64)) for x in args)
                return Value(value.array, value.masked, value.slack() + rounding.parts_error(a + b, self.summed))
        return value

    def leaf(self, e: Expr, scope: Scope, guard: Array | None) -> Value:
        """The value of what is no operation."""
        if isinstance(e, Access):
            return self.values[e.tensor]
        raise EvaluationError(f"{type(e).__name__} has no meaning here", loc=e.loc)

    def exact(self, array: Array, masked: Array | None = None) -> Value:
        """A value without error."""
        return Value(array, masked, np.zeros((1,) * array.ndim) if self.track else None)

    def literal(self, e: Const, scope: Scope) -> Value:
        """A constant; the error of holding it in f32 counts where it meets that type."""
        dtype: Any = {"int": np.int64, "float": np.float64, "bool": bool}[e.kind]
        array = np.full((1,) * scope.ndim, e.value, dtype)
        return Value(array, None, rounding.held(array.astype(np.float64)) if self.track else None)

    def slack(self, e: Expr, value: Value, dtype: str) -> Array:
        """The error of a value that meets a type: literals are exact in f64 and in integers."""
        exact = literal_value(e) is not None and dtype != "f32"
        return np.zeros((1,) * value.array.ndim) if exact else value.slack()

    def entering(self, e: Expr, value: Value, dtype: str) -> Array:
        """The error with which a value enters arithmetic in a type; large integers are rounded on the way to floats."""
        slack = self.slack(e, value, dtype)
        whole = value.array.dtype.kind in "iu" and literal_value(e) is None
        return slack + rounding.converted_error(value.array, dtype) if whole and DTYPES[dtype].is_float else slack

    def cast(self, x: Value, dtype: str, source: str) -> Value:
        """A value computed as ``source``, converted."""
        y = convert(x.array, dtype)
        masked = flagged(y, x.masked)
        if not self.track:
            return Value(y, masked)
        wide, free = source == "f64", self.numerics == "fast"
        error = rounding.cast_error(x.array, x.slack(), y, dtype, wide, free, convert)
        return Value(y, masked, rounding.settle(y, error, dtype, masked))

    def where(self, e: Call, scope: Scope, guard: Array | None) -> Value:
        """Each branch is evaluated where it is taken; where rounding may tip an unsure condition, both are."""
        condition = self.at(e.args[0], scope, guard)
        chosen, unsure = condition.array, condition.slack() > 0
        a = self._branch(e.args[1], scope, guard, chosen, unsure)
        b = self._branch(e.args[2], scope, guard, ~chosen, unsure)
        left, right = common(a.array, b.array)
        y = self.wrapped(e, np.where(chosen, left, right))
        masked = None
        if a.masked is not None or b.masked is not None:
            masked = flagged(y, np.where(chosen, a.flag(), b.flag()))
        if not self.track:
            return Value(y, masked)
        dtype = self.dtype(e)
        error = np.where(chosen, self.entering(e.args[1], a, dtype), self.entering(e.args[2], b, dtype))
        if bool(unsure.any()):
            apart = np.abs(left.astype(float) - right.astype(float)) + a.slack() + b.slack()
            error = np.where(unsure & (left != right), np.where(np.isnan(apart), np.inf, apart), error)
        return Value(y, masked, error)

    def _branch(self, e: Expr, scope: Scope, guard: Array | None, chosen: Array, unsure: Array) -> Value:
        if is_minus_infinity(e):
            value = self.at(e, scope, guard)
            return Value(value.array, np.ones((1,) * scope.ndim, bool), value.error)
        if not bool(unsure.any()):
            return self.at(e, scope, narrowed(guard, chosen))
        try:
            return self.at(e, scope, narrowed(guard, chosen | unsure))
        except EvaluationError:
            # Outside its bounds the branch means nothing: a kernel that rounds into it may give anything.
            value = self.at(e, scope, narrowed(guard, chosen))
            return Value(value.array, value.masked, np.where(unsure, np.inf, value.slack()))

    def wrapped(self, e: Expr, array: Array) -> Array:
        """A result in the type in which it is computed: integers wrap."""
        if array.dtype.kind not in "iu":
            return array
        dtype = self.dtype(e)
        if DTYPES[dtype].is_float:
            return array.astype(np.float64)
        return wrap(array.astype(np.int64), dtype)

    def call(self, e: Call, args: Sequence[Value], guard: Array | None) -> Value:
        arrays = self._operands(e, [a.array for a in args], guard)
        result = masked_call(e.op, args, self.wrapped(e, np.asarray(OPS[e.op].numpy(*arrays))))
        if not self.track:
            return result
        dtype = self.dtype(e)
        within = join(*(self.dtype(a) for a in e.args)) if OPS[e.op].rule == "compare" else dtype
        slack = [self.entering(node, value, within) for node, value in zip(e.args, args, strict=True)]
        error = rounding.call_error(e.op, arrays, slack, result.array, dtype)
        return Value(result.array, result.masked, rounding.settle(result.array, error, dtype, result.masked))

    def _operands(self, e: Call, arrays: list[Array], guard: Array | None) -> list[Array]:
        """The arguments in the types in which NumPy computes what the language means; refused where it has none."""
        op = OPS[e.op]
        if op.rule in ("divide", "real"):
            return [a.astype(np.float64) for a in arrays]
        if op.rule in ("arith", "same", "power", "integer"):
            arrays = [a.astype(np.int64) if a.dtype == bool else a for a in arrays]
        if op.rule == "power":
            return [arrays[0], arrays[1].astype(arrays[0].dtype)]
        if op.arity == 2:
            arrays = list(common(*arrays))
        if op.name in ("floordiv", "mod") and arrays[1].dtype.kind == "i":
            zero = arrays[1] == 0
            if needed(zero, guard):
                hint = f"guard it: where(b != 0, a {op.symbol} b, 0)"
                raise EvaluationError(f"an integer is divided by zero in `{op.symbol}`", hint=hint, loc=e.loc)
            arrays[1] = np.where(zero, 1, arrays[1])
        if op.rule == "integer":
            if needed((arrays[1] < 0) | (arrays[1] > 63), guard):
                hint = "guard it with where(…)"
                message = f"`{op.symbol}` shifts by less than 0 or more than 63 bits"
                raise EvaluationError(message, hint=hint, loc=e.loc)
            arrays[1] = np.clip(arrays[1], 0, 63)
        return arrays


def needed(bad: Array, guard: Array | None) -> bool:
    """Whether anything bad stands where the value counts."""
    return bool(np.any(bad if guard is None else bad & projected(guard, bad.shape)))


def projected(guard: Array, shape: tuple[int, ...]) -> Array:
    """Where a guard needs what varies along fewer axes: somewhere along the others."""
    others = tuple(i for i, n in enumerate(shape) if n == 1 and guard.shape[i] != 1)
    return np.asarray(guard.any(axis=others, keepdims=True)) if others else guard


def narrowed(guard: Array | None, condition: Array) -> Array:
    """Where a guard and a condition hold."""
    return condition if guard is None else condition & guard


def flagged(y: Array, masked: Array | None) -> Array | None:
    """The flags that a result keeps: only a 0 or -inf can stand for what a mask left out."""
    if masked is None or y.dtype.kind != "f":
        return None
    kept = masked & ((y == 0) | (y == -np.inf))
    return kept if bool(kept.any()) else None


def masked_call(name: str, args: Sequence[Value], y: Array) -> Value:
    """The flag of an operation's result, and the result itself where the flag decides it."""
    if y.dtype.kind != "f" or all(a.masked is None for a in args):
        return Value(y)
    zero = [a.flag() & (a.array == 0) for a in args]
    minus = [a.flag() & (a.array == -np.inf) for a in args]
    never = np.zeros((1,) * y.ndim, bool)
    to_zero, to_minus = never, never
    match name:
        case "mul":
            to_zero = zero[0] | zero[1]
            to_minus = ((minus[0] & _scales(args[1])) | (minus[1] & _scales(args[0]))) & ~to_zero
        case "div":
            to_zero, to_minus = zero[0], minus[0] & _scales(args[1])
        case "add":
            to_zero, to_minus = zero[0] & zero[1], minus[0] | minus[1]
        case "sub":
            to_zero, to_minus = zero[0] & zero[1], minus[0]
        case "maximum":
            both = args[0].flag() & args[1].flag()
            to_zero, to_minus = both & (y == 0), both & (y == -np.inf)
        case "minimum":
            to_minus = minus[0] | minus[1]
            to_zero = zero[0] & zero[1]
        case "pow":
            to_zero = zero[0] & (args[1].array > 0)
        case _ if len(args) == 1:
            op = OPS[name]
            for at, where in ((op.at_zero, zero[0]), (op.at_neg_inf, minus[0])):
                to_zero = to_zero | (where if at == 0 else never)
                to_minus = to_minus | (where if at == -np.inf else never)
        case _:
            return Value(y)
    y = np.where(to_zero, 0.0, np.where(to_minus, -np.inf, y))
    return Value(y, flagged(y, np.broadcast_to(to_zero | to_minus, y.shape)))


def _scales(x: Value) -> Array:
    """Where a factor is positive and finite, so that -inf times it is -inf still."""
    return np.asarray((x.array > 0) & np.isfinite(x.array))
