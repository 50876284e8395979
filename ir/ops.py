"""The op table: what each scalar operation is, in one row each. Adding an operation is adding a row.

A row holds the spelling in the text, the arity, the typing rule, the meaning in NumPy, the derivative (in the language
itself, over the arguments ``a b c`` and the result ``y``), the algebraic facts that rewrites use, the Triton and C++
spellings, the cost in operations by unit, and the error of a good implementation in units in the last place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from .dtypes import DTYPES

INF = float("inf")


@dataclass(frozen=True, slots=True)
class Op:
    """One scalar operation.

    ``rule`` names the typing rule (`types.py`): "arith", "divide", "integer", "power", "compare", "logic", "real",
    "same" or "select". ``symbol`` and ``binds`` give infix spelling and precedence, "" for a function.
    ``derivative`` has one text per argument, None where the operation has none. ``at_zero`` and ``at_neg_inf``
    are f(0) and f(-inf) where those are 0 or -inf: a mask commutes with the function exactly there.
    ``identity`` is the two-sided identity element, ``inverse`` the operation that undoes this one. ``monotone`` holds
    "+", "-" or "" per argument. ``nonnegative`` says that the result is never below 0. ``triton`` and ``cpp`` spell the
    call. Triton's operators are ``symbol``; where Triton means something else than the language, or lacks a function,
    `codegen/triton_expr.py` has a case for it. ``cost`` is (unit, operations), unit "vector" or "special". ``ulps``
    bounds the error in f32 of the implementations that castile emits.
    """

    name: str
    arity: int
    rule: str
    numpy: Callable[..., Any]
    symbol: str = ""
    binds: int = 0
    derivative: tuple[str | None, ...] | None = None
    monotone: tuple[str, ...] = ()
    identity: float | bool | None = None
    inverse: str = ""
    commutes: bool = False
    at_zero: float | None = None
    at_neg_inf: float | None = None
    nonnegative: bool = False
    triton: str = ""
    cpp: str = ""
    cost: tuple[str, int] = ("vector", 1)
    ulps: float = 0.5


def _erf(x: Any) -> Any:
    return np.asarray(np.frompyfunc(math.erf, 1, 1)(x), dtype=np.float64)


def _rsqrt(x: Any) -> Any:
    return 1 / np.sqrt(x)


def _sigmoid(x: Any) -> Any:
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + e), e / (1 + e))


def _floor(x: Any) -> Any:
    return np.floor(x) if np.asarray(x).dtype.kind == "f" else x


def _round(x: Any) -> Any:
    return np.rint(x) if np.asarray(x).dtype.kind == "f" else x


# Precedence levels of the infix operators, those of Python: a higher level binds tighter.
COMPARE, OR, AND, SHIFT, ADD, MUL, UNARY, POWER, ATOM = range(1, 10)

_special = ("special", 1)
# A row: spelling, type rule and meaning; then derivative and algebra; then the targets' spellings, cost and error.
_ROWS = (
    Op("add", 2, "arith", np.add, "+", ADD, ("1.0", "1.0"), ("+", "+"), identity=0.0, inverse="sub", commutes=True,
       cpp="{a} + {b}"),
    Op("sub", 2, "arith", np.subtract, "-", ADD, ("1.0", "-1.0"), ("+", "-"),
       cpp="{a} - {b}"),
    Op("mul", 2, "arith", np.multiply, "*", MUL, ("b", "a"), identity=1.0, inverse="div", commutes=True,
       cpp="{a} * {b}"),
    Op("div", 2, "divide", np.divide, "/", MUL, ("1.0 / b", "-(y / b)"),
       cpp="{a} / {b}", cost=("vector", 4)),
    Op("floordiv", 2, "arith", np.floor_divide, "//", MUL, ("0.0", None),
       cpp="floordiv({a}, {b})", cost=("vector", 4)),
    Op("mod", 2, "arith", np.mod, "%", MUL, ("1.0", None),
       cpp="floormod({a}, {b})", cost=("vector", 4)),
    Op("pow", 2, "power", np.power, "**", POWER, ("b * a ** (b - 1)", None)),
    Op("neg", 1, "arith", np.negative, "-", UNARY, ("-1.0",), ("-",), at_zero=0.0,
       cpp="-{a}"),
    Op("lt", 2, "compare", np.less, "<", COMPARE, cpp="{a} < {b}"),
    Op("le", 2, "compare", np.less_equal, "<=", COMPARE, cpp="{a} <= {b}"),
    Op("gt", 2, "compare", np.greater, ">", COMPARE, cpp="{a} > {b}"),
    Op("ge", 2, "compare", np.greater_equal, ">=", COMPARE, cpp="{a} >= {b}"),
    Op("eq", 2, "compare", np.equal, "==", COMPARE, commutes=True, cpp="{a} == {b}"),
    Op("ne", 2, "compare", np.not_equal, "!=", COMPARE, commutes=True, cpp="{a} != {b}"),
    Op("and", 2, "logic", np.bitwise_and, "&", AND, identity=True, commutes=True, cpp="{a} & {b}"),
    Op("or", 2, "logic", np.bitwise_or, "|", OR, identity=False, commutes=True, cpp="{a} | {b}"),
    Op("not", 1, "logic", np.invert, "~", UNARY, cpp="~{a}"),
    Op("lshift", 2, "integer", np.left_shift, "<<", SHIFT, cpp="{a} << {b}"),
    Op("rshift", 2, "integer", np.right_shift, ">>", SHIFT, cpp="{a} >> {b}"),
    Op("where", 3, "select", np.where, derivative=(None, "where(a, 1.0, 0.0)", "where(a, 0.0, 1.0)"),
       triton="tl.where({a}, {b}, {c})", cpp="select({a}, {b}, {c})"),
    Op("minimum", 2, "arith", np.minimum, identity=INF, commutes=True, monotone=("+", "+"),
       derivative=("where(a < b, 1.0, where(a == b, 0.5, 0.0))", "where(b < a, 1.0, where(a == b, 0.5, 0.0))"),
       triton="tl.minimum({a}, {b})", cpp="minimum({a}, {b})"),
    Op("maximum", 2, "arith", np.maximum, identity=-INF, commutes=True, monotone=("+", "+"),
       derivative=("where(a > b, 1.0, where(a == b, 0.5, 0.0))", "where(b > a, 1.0, where(a == b, 0.5, 0.0))"),
       triton="tl.maximum({a}, {b})", cpp="maximum({a}, {b})"),
    Op("abs", 1, "same", np.abs, derivative=("where(a > 0, 1.0, where(a < 0, -1.0, 0.0))",), at_zero=0.0,
    nonnegative=True,
       triton="tl.abs({a})", cpp="abs({a})"),
    Op("exp", 1, "real", np.exp, derivative=("y",), monotone=("+",), inverse="log", at_neg_inf=0.0, nonnegative=True,
       triton="tl.exp({a})", cpp="exp({a})", cost=_special, ulps=2),
    Op("exp2", 1, "real", np.exp2, derivative=("y * 0.6931471805599453",), monotone=("+",), inverse="log2",
       at_neg_inf=0.0, nonnegative=True, triton="tl.exp2({a})", cpp="exp2({a})", cost=_special, ulps=2),
    Op("expm1", 1, "real", np.expm1, derivative=("y + 1.0",), monotone=("+",), inverse="log1p", at_zero=0.0,
       triton="", cpp="expm1({a})", cost=_special, ulps=4),
    Op("log", 1, "real", np.log, derivative=("1.0 / a",), monotone=("+",), inverse="exp", at_zero=-INF,
       triton="tl.log({a})", cpp="log({a})", cost=_special, ulps=2),
    Op("log2", 1, "real", np.log2, derivative=("1.4426950408889634 / a",), monotone=("+",), inverse="exp2",
    at_zero=-INF,
       triton="tl.log2({a})", cpp="log2({a})", cost=_special, ulps=2),
    Op("log1p", 1, "real", np.log1p, derivative=("1.0 / (1.0 + a)",), monotone=("+",), inverse="expm1", at_zero=0.0,
       triton="", cpp="log1p({a})", cost=_special, ulps=4),
    Op("sqrt", 1, "real", np.sqrt, derivative=("0.5 / y",), monotone=("+",), at_zero=0.0, nonnegative=True,
       triton="tl.sqrt({a})", cpp="sqrt({a})", cost=_special, ulps=1),
    Op("rsqrt", 1, "real", _rsqrt, derivative=("-0.5 * y / a",), monotone=("-",), nonnegative=True,
       triton="tl.rsqrt({a})", cpp="rsqrt({a})", cost=_special, ulps=2),
    Op("tanh", 1, "real", np.tanh, derivative=("1.0 - y * y",), monotone=("+",), at_zero=0.0,
       triton="", cpp="tanh({a})", cost=("special", 2), ulps=4),
    Op("sigmoid", 1, "real", _sigmoid, derivative=("y * (1.0 - y)",), monotone=("+",), at_neg_inf=0.0, nonnegative=True,
       triton="tl.sigmoid({a})", cpp="sigmoid({a})", cost=("special", 2), ulps=4),
    Op("erf", 1, "real", _erf, derivative=("1.1283791670955126 * exp(-(a * a))",), monotone=("+",), at_zero=0.0,
       triton="tl.erf({a})", cpp="erf({a})", cost=("special", 2), ulps=4),
    Op("sin", 1, "real", np.sin, derivative=("cos(a)",), at_zero=0.0,
       triton="tl.sin({a})", cpp="sin({a})", cost=_special, ulps=2),
    Op("cos", 1, "real", np.cos, derivative=("-sin(a)",),
       triton="tl.cos({a})", cpp="cos({a})", cost=_special, ulps=2),
    Op("floor", 1, "same", _floor, derivative=("0.0",), monotone=("+",), at_zero=0.0, at_neg_inf=-INF,
       triton="tl.floor({a})", cpp="floor({a})"),
    Op("round", 1, "same", _round, derivative=("0.0",), monotone=("+",), at_zero=0.0, at_neg_inf=-INF,
       triton="", cpp="rint({a})"),
)  # fmt: skip

OPS: Mapping[str, Op] = MappingProxyType({row.name: row for row in _ROWS})
FUNCTIONS: Mapping[str, Op] = MappingProxyType({row.name: row for row in _ROWS if not row.symbol})


@dataclass(frozen=True, slots=True)
class Reduction:
    """One built-in reduction: the operation that it folds, its identity, and the inverse where it is a group."""

    name: str
    combine: str
    identity: float | bool | None
    rule: str
    numpy: Callable[..., Any]


_REDUCTIONS = (
    Reduction("sum", "add", 0.0, "sum", np.sum),
    Reduction("prod", "mul", 1.0, "sum", np.prod),
    Reduction("max", "maximum", -INF, "extreme", np.max),
    Reduction("min", "minimum", INF, "extreme", np.min),
    Reduction("argmax", "", None, "argmax", np.argmax),
    Reduction("any", "or", False, "logic", np.any),
    Reduction("all", "and", True, "logic", np.all),
)

REDUCTIONS: Mapping[str, Reduction] = MappingProxyType({row.name: row for row in _REDUCTIONS})

# What no tensor, rank or monoid may be called.
RESERVED = frozenset(DTYPES) | frozenset(FUNCTIONS) | frozenset(REDUCTIONS) | {"inf", "extent", "cascade", "monoid"}
