"""A second oracle: what a cascade means, one coordinate at a time, in Python's own numbers and nothing else.

It shares no code with `castile.ir.evaluate` but the inference of types. A value is a pair: a number, and whether it
stands for what a mask left out. With ``single`` it is a slow but honest kernel: f32 after every operation, sums one
term after another.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from ctypes import c_float
from fractions import Fraction
from typing import Any

from castile.ir.cascade import (
    Access,
    Call,
    Cascade,
    Cast,
    Const,
    Einsum,
    Expr,
    Extent,
    Monoid,
    Rank,
    Reduce,
    free_ranks,
)
from castile.ir.dtypes import DTYPES
from castile.ir.types import TypeChecker, body_types, settle, tensor_types
from castile.ir.verify import scan_step

Number = int | float | bool
Scalar = tuple[Any, bool]
Typed = Callable[[Any, str], Any]
INF, NAN = math.inf, math.nan


class Meaningless(Exception):
    """A read outside a tensor, an integer divided by zero, an argmax of nothing."""


class Naive:
    """The tensors of a cascade, each a dictionary from coordinates to values, for given inputs and extents."""

    def __init__(self, c: Cascade, inputs: Mapping[str, Any], extents: Mapping[str, int], single: bool = False) -> None:
        self.c, self.extents = c, extents
        self.typed: Typed = single_precision if single else typed
        self.types = tensor_types(c)
        self.checker = TypeChecker(self.types, c.monoid_of)
        self.tensors: dict[str, dict[tuple[int, ...], Scalar]] = {}
        self.shapes = {name: x.shape for name, x in inputs.items()}
        for p in c.params:
            x = inputs[p.name]
            every = itertools.product(*(range(n) for n in x.shape))
            self.tensors[p.name] = {at: (self.typed(convert(x[at].item(), p.dtype), p.dtype), False) for at in every}
        live = set(c.outputs)
        for e in reversed(c.einsums):
            if live & {o.name for o in e.outputs}:
                live |= {n.tensor for n in nodes(e.expr) if isinstance(n, Access)}
        for e in c.einsums:
            if live & {o.name for o in e.outputs}:
                self.compute(e)

    def compute(self, e: Einsum) -> None:
        scan = scan_step(e)
        for i, o in enumerate(e.outputs):
            shape = tuple(self.extents[r] for r in o.ranks)
            self.shapes[o.name], self.tensors[o.name] = shape, {}
            every = list(itertools.product(*map(range, shape)))
            if scan is not None:
                every.sort(key=lambda at: at[scan.axis] * scan.direction)
            for at in every:
                env = dict(zip(o.ranks, at, strict=True))
                if isinstance(e.expr, Reduce) and e.expr.op in self.c.monoid_of:
                    value = self.fold(e.expr, env, i)
                else:
                    value = self.at(e.expr, env)
                self.tensors[o.name][at] = self.cast(value, self.types[o.name])

    def at(self, e: Expr, env: Mapping[str, int]) -> Scalar:
        match e:
            case Const(value=value):
                return value, False
            case Rank(name=name):
                return env[name], False
            case Extent(rank=rank):
                return self.extents[rank], False
            case Access(tensor=tensor, indices=indices):
                at = tuple(self.at(i, env)[0] for i in indices)
                if any(not 0 <= i < n for i, n in zip(at, self.shapes[tensor], strict=True)):
                    raise Meaningless(f"{tensor}{at}")
                return self.tensors[tensor][at]
            case Cast(dtype=dtype, arg=arg):
                return self.cast(self.at(arg, env), dtype)
            case Reduce(op=op) if op in self.c.monoid_of:
                return self.fold(e, env, 0)
            case Reduce():
                return self.reduce(e, env)
            case Call(op="where", args=(condition, a, b)):
                taken = a if self.at(condition, env)[0] else b
                masked = taken == Call("neg", (Const(INF),))
                value, flag = self.at(taken, env)
                return self.typed(value, settle(self.checker.infer(e))), masked or flag
            case Call(op=op, args=args):
                return operation(op, [self.at(a, env) for a in args], settle(self.checker.infer(e)), self.typed)
        raise AssertionError(e)

    def cast(self, x: Scalar, dtype: str) -> Scalar:
        value = self.typed(convert(x[0], dtype), dtype)
        return value, x[1] and isinstance(value, float) and value in (0, -INF)

    def coordinates(self, e: Reduce, env: Mapping[str, int]) -> Iterator[dict[str, int]]:
        for at in itertools.product(*(range(self.extents[r]) for r in e.ranks)):
            yield {**env, **dict(zip(e.ranks, at, strict=True))}

    def reduce(self, e: Reduce, env: Mapping[str, int]) -> Scalar:
        dtype = settle(self.checker.infer(e))
        found = [self.at(e.arg, inner) for inner in self.coordinates(e, env)]
        numbers = [v for v, _ in found]
        if e.op == "argmax":
            if not found:
                raise Meaningless("argmax")
            nan = [i for i, v in enumerate(numbers) if v != v]
            return (nan or [max(range(len(numbers)), key=lambda i: (numbers[i], -i))])[0], False
        if e.op in ("any", "all"):
            return {"any": any, "all": all}[e.op](numbers), False
        if e.op in ("sum", "prod"):
            total: Number = self.typed(e.op == "prod", dtype)
            for v in numbers:
                total = self.typed(total + v if e.op == "sum" else times(total, v), dtype)
        elif not found:
            row = DTYPES[dtype]
            low, high = (-INF, INF) if row.is_float else (row.lowest, row.highest)
            total = low if e.op == "max" else high
        else:
            total = NAN if any(v != v for v in numbers) else self.typed({"max": max, "min": min}[e.op](numbers), dtype)
        if not isinstance(total, float):
            return total, False
        zero, minus = (0.0, True) in found, (-INF, True) in found
        if e.op == "prod":
            return (0.0, True) if zero else (total, False)
        if minus and e.op in ("sum", "min"):
            return -INF, True
        return total, all(flag for _, flag in found) and total in (0, -INF)

    def fold(self, e: Reduce, env: Mapping[str, int], component: int) -> Scalar:
        m = self.c.monoid_of[e.op]
        types = self.checker.state_types(e)
        inner = TypeChecker(body_types(m, types), {})
        identity = [self.typed(self.at(i, {})[0], t) for i, t in zip(m.identity, types, strict=True)]
        state: list[Scalar] = [(v, isinstance(v, float) and v in (0, -INF)) for v in identity]
        for inside in self.coordinates(e, env):
            element: list[Scalar] = []
            for i, (arg, t) in enumerate(zip(e.args, types, strict=True)):
                # Another component may vary along ranks that this one lacks; then this one does not depend on it.
                known = free_ranks(arg) <= inside.keys()
                assert known or i != component
                value, flag = self.at(arg, inside) if known else (1, False)
                element.append((self.typed(value, t), flag))
            state = merge(m, types, inner, state, element, self.typed)
        return state[component]


def merge(
    m: Monoid,
    types: tuple[str, ...],
    checker: TypeChecker,
    state: list[Scalar],
    element: list[Scalar],
    typed: Typed,
) -> list[Scalar]:
    names = dict(zip(m.params, state + element, strict=True))

    def at(e: Expr) -> Scalar:
        match e:
            case Const(value=value):
                return value, False
            case Access(tensor=tensor):
                return names[tensor]
            case Call(op="where", args=(condition, a, b)):
                value, flag = at(a if at(condition)[0] else b)
                return typed(value, settle(checker.infer(e))), flag
            case Call(op=op, args=args):
                return operation(op, [at(a) for a in args], settle(checker.infer(e)), typed)
        raise AssertionError(e)

    for name, value in m.body:
        names[name] = at(value)
    return [(typed(names[r][0], t), names[r][1]) for r, t in zip(m.results, types, strict=True)]


def nodes(e: Expr) -> Iterator[Expr]:
    yield e
    for kid in getattr(e, "args", ()) or getattr(e, "indices", ()) or ((e.arg,) if isinstance(e, Cast) else ()):
        yield from nodes(kid)


def single_precision(x: Number, dtype: str) -> Any:
    """As `typed`, with floats rounded to f32 where they are computed in it."""
    y = typed(x, dtype)
    return c_float(y).value if DTYPES[dtype].is_float and dtype != "f64" else y


def typed(x: Number, dtype: str) -> Any:
    """A number as arithmetic in a type leaves it: floats as they are, integers wrapped."""
    row = DTYPES[dtype]
    if row.is_float:
        return float(x)
    if row.kind == "bool":
        return bool(x)
    low = int(x) % 2**row.bits
    return low - 2**row.bits if row.kind == "int" and low >= 2 ** (row.bits - 1) else low


def convert(x: Number, dtype: str) -> Any:
    row = DTYPES[dtype]
    if row.is_float:
        return float(x) if dtype in ("f32", "f64") else rounded(float(x), dtype)
    if row.kind == "bool" or not isinstance(x, float):
        return typed(x, dtype) if row.kind != "bool" else x != 0
    if x != x:
        return 0
    return row.highest if x >= row.highest else row.lowest if x <= row.lowest else math.trunc(x)


def rounded(x: float, dtype: str) -> float:
    """To nearest, ties to even, in exact arithmetic."""
    row = DTYPES[dtype]
    if x != x or x == 0:
        return x
    over = math.copysign(row.overflow, x)
    if math.isinf(x):
        return over
    exponent = max(math.frexp(x)[1] - 1, row.min_exponent) - row.precision + 1
    quantum = Fraction(2) ** exponent
    y = round(Fraction(x) / quantum) * quantum
    return over if abs(y) > Fraction(row.largest) else math.copysign(float(y), x)


def times(a: Any, b: Any) -> Any:
    return a * b


def operation(op: str, args: list[Scalar], dtype: str, typed: Typed) -> Scalar:
    """An operation of the table on scalars, and the flag of its result."""
    floats = any(isinstance(v, float) for v, _ in args) or op in REAL or op == "div"
    if op in ("and", "or", "not"):
        pure = all(isinstance(v, bool) for v, _ in args)
        values: list[Any] = [v if pure else int(v) for v, _ in args]
    else:
        values = [float(v) if floats and op != "pow" else v if floats else int(v) for v, _ in args]
    if DTYPES[dtype].is_float and op != "pow":
        values = [typed(v, dtype) for v in values]
    y = REAL[op](values[0]) if op in REAL else BASIC[op](*values)
    if not isinstance(y, bool):
        y = typed(y, dtype)
    if not isinstance(y, float) or op in ("where", "mod", "floordiv"):
        return y, False
    zero = [flag and v == 0 for v, flag in args]
    minus = [flag and v == -INF for v, flag in args]
    positive = [0 < v < INF for v, _ in args]
    to_zero = to_minus = False
    if op == "mul":
        to_zero, to_minus = any(zero), (minus[0] and positive[1]) or (minus[1] and positive[0])
    elif op == "div":
        to_zero, to_minus = zero[0], minus[0] and positive[1]
    elif op in ("add", "minimum"):
        to_zero, to_minus = all(zero), any(minus)
    elif op == "sub":
        to_zero, to_minus = all(zero), minus[0]
    elif op == "maximum":
        to_zero, to_minus = all(f for _, f in args) and y == 0, all(minus)
    elif op == "pow":
        to_zero = zero[0] and values[1] > 0
    else:
        to_zero = (zero[0] and op in KEEPS_ZERO) or (minus[0] and op in ("exp", "exp2", "sigmoid"))
        to_minus = (zero[0] and op in ("log", "log2")) or (minus[0] and op in ("floor", "round"))
    return (0.0, True) if to_zero else (-INF, True) if to_minus else (y, False)


KEEPS_ZERO = frozenset("neg abs expm1 log1p sqrt tanh erf sin floor round".split())


def safe(f: Callable[..., float], over: float = INF) -> Callable[[float], float]:
    """A function of `math` as IEEE 754 has it: NaN outside its domain, an infinity past its range."""

    def g(x: float) -> float:
        try:
            return f(x)
        except ValueError:
            return NAN
        except OverflowError:
            return over

    return g


def logarithm(f: Callable[[float], float], pole: float = 0.0) -> Callable[[float], float]:
    return lambda x: -INF if x == pole else safe(f)(x)


def sigmoid(x: float) -> float:
    return 1 / (1 + safe(math.exp)(-x))


REAL: dict[str, Callable[[float], float]] = {
    "exp": safe(math.exp), "exp2": safe(lambda x: 2.0**x), "expm1": safe(math.expm1),
    "log": logarithm(math.log), "log2": logarithm(math.log2), "log1p": logarithm(math.log1p, -1.0),
    "sqrt": safe(math.sqrt), "rsqrt": lambda x: math.copysign(INF, x) if x == 0 else 1 / safe(math.sqrt)(x),
    "tanh": math.tanh, "sigmoid": sigmoid, "erf": math.erf, "sin": safe(math.sin), "cos": safe(math.cos),
}  # fmt: skip


def divide(a: float, b: float) -> float:
    if b == 0:
        return NAN if a == 0 or a != a else math.copysign(INF, a) * math.copysign(1, b)
    return a / b


def floor_divide(a: Any, b: Any) -> Any:
    if not isinstance(a, float):
        if b == 0:
            raise Meaningless("//")
        return a // b
    if b == 0:
        return divide(a, b)
    return NAN if math.isinf(a) or a != a or b != b else a // b


def modulo(a: Any, b: Any) -> Any:
    if not isinstance(a, float):
        if b == 0:
            raise Meaningless("%")
        return a % b
    if b == 0 or math.isinf(a) or a != a or b != b:
        return NAN
    return a % b


def power(a: Any, n: Any) -> Any:
    if not isinstance(a, float):
        return int(a) ** int(n)
    try:
        return a**n
    except ZeroDivisionError:
        return math.copysign(INF, a) if int(n) % 2 else INF
    except OverflowError:
        return -INF if a < 0 and int(n) % 2 else INF


def shift(a: int, by: int, left: bool) -> int:
    if not 0 <= by <= 63:
        raise Meaningless("<<")
    return a << by if left else a >> by


def whole(f: Callable[[float], int]) -> Callable[[Any], Any]:
    return lambda x: x if not isinstance(x, float) or not math.isfinite(x) else math.copysign(float(f(x)), x)


def extreme(a: Any, b: Any, greatest: bool) -> Any:
    if a != a or b != b:
        return NAN
    return max(a, b) if greatest else min(a, b)


BASIC: dict[str, Callable[..., Any]] = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": times, "div": divide,
    "floordiv": floor_divide, "mod": modulo, "pow": power, "neg": lambda a: -a, "abs": abs,
    "lt": lambda a, b: a < b, "le": lambda a, b: a <= b, "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b, "eq": lambda a, b: a == b, "ne": lambda a, b: a != b,
    "and": lambda a, b: a & b, "or": lambda a, b: a | b, "not": lambda a: not a if isinstance(a, bool) else ~a,
    "lshift": lambda a, b: shift(a, b, True), "rshift": lambda a, b: shift(a, b, False),
    "minimum": lambda a, b: extreme(a, b, False), "maximum": lambda a, b: extreme(a, b, True),
    "floor": whole(math.floor), "round": whole(round),
}  # fmt: skip
