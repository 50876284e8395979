"""Scalar expressions over NumPy arrays: values, their *masked* flags and, on request, their error bounds.

The masked flag follows section 2 of the design: a literal ``-inf`` branch of ``where`` sets it. A flagged -inf stays
what it is under anything added; ``exp`` turns it into a flagged 0; a flagged 0 annihilates in a product, even with
infinity; and a flagged 0 divided by a flagged 0 is 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from . import rounding
from .cascade import Access, Call, Cast, Const, Expr, is_minus_infinity
from .dtypes import DTYPES, round_to, rounds, wrap
from .errors import EvaluationError
from .ops import OPS
from .types import TypeChecker, settle

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

    def apply(self, f: Any) -> Value:
        """The same reshaping, slicing or broadcasting of every part."""
        return Value(
            f(self.array),
            None if self.masked is None else f(self.masked),
            None if self.error is None else f(self.error),
        )


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
    """Evaluates literals, casts, operations and ``where``; names are looked up in ``values``.

    `evaluate.Oracle` adds ranks, tensors and reductions; a monoid's body needs nothing more than this.
    """

    def __init__(self, checker: TypeChecker, values: Mapping[str, Value], track: bool = False) -> None:
        self.checker = checker
        self.values = values
        self.track = track

    def dtype(self, e: Expr) -> str:
        return settle(self.checker.infer(e))

    def expr(self, e: Expr, ndim: int, guard: Array | None = None) -> Value:
        """The value over ``ndim`` axes; ``guard`` says where it is needed, None everywhere."""
        match e:
            case Const():
                return self.literal(e, ndim)
            case Access(tensor=name):
                return self.values[name]
            case Cast(dtype=dtype, arg=arg):
                return self.cast(self.expr(arg, ndim, guard), dtype)
            case Call(op="where", args=(condition, a, b)):
                chosen = self.expr(condition, ndim, guard)
                left = self.expr(a, ndim, narrowed(guard, chosen.array))
                right = self.expr(b, ndim, narrowed(guard, ~chosen.array))
                return self.select(e, chosen, left, right)
            case Call():
                return self.call(e, [self.expr(a, ndim, guard) for a in e.args], guard)
            case _:
                raise EvaluationError(f"{type(e).__name__} has no meaning here", loc=e.loc)

    def literal(self, e: Const, ndim: int) -> Value:
        dtype: Any = {"int": np.int64, "float": np.float64, "bool": bool}[e.kind]
        return self.exact(np.full((1,) * ndim, e.value, dtype))

    def exact(self, array: Array, masked: Array | None = None) -> Value:
        """A value without error."""
        return Value(array, masked, np.zeros((1,) * array.ndim) if self.track else None)

    def cast(self, x: Value, dtype: str) -> Value:
        y = convert(x.array, dtype)
        masked = x.masked if DTYPES[dtype].is_float else None
        if not self.track:
            return Value(y, masked)
        error = rounding.cast_error(x.array, x.slack(), y, dtype)
        return Value(y, masked, rounding.settle(y, error, dtype, masked))

    def select(self, e: Call, condition: Value, a: Value, b: Value) -> Value:
        """``where``: a literal -inf branch is flagged; an uncertain condition may give either branch."""
        a, b = (
            Value(v.array, np.ones((1,) * v.array.ndim, bool), v.error) if is_minus_infinity(branch) else v
            for v, branch in ((a, e.args[1]), (b, e.args[2]))
        )
        left, right = common(a.array, b.array)
        y = self.wrapped(e, np.where(condition.array, left, right))
        masked = None
        if a.masked is not None or b.masked is not None:
            masked = np.where(condition.array, a.flag(), b.flag())
        if not self.track:
            return Value(y, masked)
        error = np.where(condition.array, a.slack(), b.slack())
        unsure = condition.slack() > 0
        if bool(unsure.any()):
            apart = np.abs(left.astype(float) - right.astype(float)) + a.slack() + b.slack()
            error = np.where(unsure, np.where(np.isnan(apart), np.inf, apart), error)
        return Value(y, masked, error)

    def wrapped(self, e: Expr, array: Array) -> Array:
        """Wrap an integer result into the type in which it is computed."""
        if array.dtype.kind not in "iu":
            return array
        dtype = self.dtype(e)
        return wrap(array.astype(np.int64), dtype) if DTYPES[dtype].bits < 64 else array

    def call(self, e: Call, args: Sequence[Value], guard: Array | None) -> Value:
        arrays = self._operands(e, [a.array for a in args], guard)
        y = self.wrapped(e, np.asarray(OPS[e.op].numpy(*arrays)))
        result = Value(y)
        if any(a.masked is not None for a in args):
            result = masked_call(e.op, args, y)
        if not self.track:
            return result
        dtype = self.dtype(e)
        error = rounding.call_error(e.op, arrays, [a.slack() for a in args], result.array, dtype)
        return Value(result.array, result.masked, rounding.settle(result.array, error, dtype, result.masked))

    def _operands(self, e: Call, arrays: list[Array], guard: Array | None) -> list[Array]:
        """The arguments in the types in which NumPy computes what the language means; refused where it has none."""
        op = OPS[e.op]
        if op.rule in ("divide", "real"):
            return [a.astype(np.float64) for a in arrays]
        if op.rule in ("arith", "same"):
            arrays = [a.astype(np.int64) if a.dtype == bool else a for a in arrays]
        if op.rule == "power":
            return [
                arrays[0].astype(np.int64) if arrays[0].dtype == bool else arrays[0],
                arrays[1].astype(arrays[0].dtype),
            ]
        if op.arity == 2:
            arrays = list(common(*arrays))
        if op.name in ("floordiv", "mod") and arrays[1].dtype.kind == "i":
            zero = arrays[1] == 0
            if needed(zero, guard):
                raise EvaluationError(f"an integer is divided by zero in `{op.symbol}`", loc=e.loc)
            arrays[1] = np.where(zero, 1, arrays[1])
        if op.rule == "integer":
            if needed((arrays[1] < 0) | (arrays[1] > 63), guard):
                raise EvaluationError(f"`{op.symbol}` shifts by less than 0 or more than 63 bits", loc=e.loc)
            arrays[1] = np.clip(arrays[1], 0, 63)
        return arrays


def needed(bad: Array, guard: Array | None) -> bool:
    """Whether anything bad stands where the value counts."""
    return bool(np.any(bad if guard is None else bad & guard))


def narrowed(guard: Array | None, condition: Array) -> Array:
    return condition if guard is None else condition & guard


def masked_call(name: str, args: Sequence[Value], y: Array) -> Value:
    """The flag of a result, and the result itself where the flag decides it."""
    if y.dtype.kind != "f":
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
        case "maximum" | "minimum":
            both = args[0].flag() & args[1].flag()
            to_zero, to_minus = both & (y == 0), both & (y == -np.inf)
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
    flags = np.broadcast_to(to_zero | to_minus, y.shape)
    return Value(y, flags if bool(flags.any()) else None)


def _scales(x: Value) -> Array:
    """Where a factor is positive and finite, so that -inf times it is -inf still."""
    return np.asarray((x.array > 0) & np.isfinite(x.array))
