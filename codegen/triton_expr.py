"""Scalar expressions of a tile program as Triton: typed as the language types them, aligned over a tile's axes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..ir.cascade import (
    Access,
    Call,
    Cast,
    Const,
    Expr,
    Extent,
    Rank,
    children,
    free_ranks,
    literal_value,
    ranks_named,
    walk,
)
from ..ir.dtypes import DTYPES, wrap
from ..ir.errors import VerifyError
from ..ir.interval import interval
from ..ir.ops import OPS
from ..ir.scalar import convert
from ..ir.types import WEAK_FLOAT, WEAK_INT, TypeChecker, computed_in, fits, settle
from .triton_prelude import power_name

# How tightly texts bind, in Python's order.
ATOM, UNARY, MUL, ADD, SHIFT, AND, OR, COMPARE = 9, 8, 7, 6, 5, 4, 3, 2
_LEVELS = {"add": ADD, "sub": ADD, "mul": MUL, "div": MUL, "and": AND, "or": OR}

# A coordinate that nothing but ranks makes, in the type in which positions are computed.
INDEX = "index"

# Extents below this keep every index in 32 bits; a host passes 64-bit positions where one is not.
NARROW_EXTENT = 1 << 20

# The Triton type that holds a value of each dtype in registers: 8-bit floats as f16, which holds all of them.
_HELD = {"f8e4m3": "tl.float16", "f8e5m2": "tl.float16"}


def held(dtype: str) -> str:
    return _HELD.get(dtype, DTYPES[dtype].triton)


@dataclass(frozen=True, slots=True)
class Value:
    """The text of an expression, how tightly it binds, its dtype, and whether it is a literal."""

    text: str
    level: int
    dtype: str
    literal: bool = False

    def at(self, floor: int) -> str:
        return f"({self.text})" if self.level < floor else self.text


def aligned(text: str, axes: Sequence[str], over: Sequence[str]) -> str:
    """A tile over ``axes`` as it broadcasts over the axes ``over``."""
    order = [a for a in over if a in axes]
    if order != list(axes):
        permutation = ", ".join(str(list(axes).index(a)) for a in order)
        text = f"tl.trans({text})" if len(axes) == 2 else f"tl.permute({text}, ({permutation}))"
    if not axes or len(over) == len(axes):
        return text
    return f"{text}[{', '.join(':' if a in axes else 'None' for a in over)}]"


class Expressions:
    """Prints expressions over the tiles, ranks and scalars in scope.

    ``tiles`` gives each tile's text, axes and dtype in registers; ``vectors`` the ranks in scope that have many
    coordinates; ``name`` spells ranks, extents and tensors. Helpers that a text needs are added to ``used``.
    """

    def __init__(
        self,
        checker: TypeChecker,
        name: Callable[[str, str], str],
        scalars: Mapping[str, str],
        interpret: bool,
        exact: bool,
    ) -> None:
        self.checker = checker
        self.name = name
        self.scalars = scalars
        self.interpret = interpret
        self.exact = exact
        self.tiles: dict[str, tuple[str, tuple[str, ...], str]] = {}
        self.vectors: set[str] = set()
        self.used: set[str] = set()

    def need(self, helper: str) -> str:
        self.used.add(helper)
        return helper

    # Conversions

    def converted(self, v: Value, dtype: str) -> str:
        """A value in a dtype, as the language converts it."""
        if v.dtype == dtype:
            return v.text
        row = DTYPES[dtype]
        if v.literal:
            return self.full((), v, dtype)
        if v.dtype == INDEX:
            if not row.is_float or dtype in ("f64", "f32", "f16"):
                return f"({v.at(ADD)} != 0)" if dtype == "bool" else f"{v.at(ATOM)}.to({held(dtype)})"
            v = Value(v.text, v.level, "i64")
        source = DTYPES[v.dtype]
        if row.kind == "bool":
            return f"({v.at(ADD)} != 0)"
        if source.is_float and not row.is_float:
            return f"{self.need('to_integer')}({self.wide(v)}, {row.lowest}, {row.highest}, {row.triton})"
        if not row.is_float or dtype in ("f64", "f32", "f16") or (dtype == "bf16" and not self.interpret):
            return f"{v.at(ATOM)}.to({held(dtype)})"
        wide = self.converted(v, "f32")
        if dtype == "bf16":
            return f"{self.need('to_bf16')}({wide})"
        return f"{self.need('from_' + dtype)}({self.need('to_' + dtype)}({wide}))"

    def wide(self, v: Value) -> str:
        """A float value in f32 or f64."""
        return self.converted(v, "f64" if v.dtype == "f64" else "f32")

    def full(self, shape: Sequence[str], v: Value, dtype: str) -> str:
        """A literal or scalar as a tile of a shape."""
        if v.literal:
            dims, text = ", ".join(shape) + ("," if len(shape) == 1 else ""), v.text
            if DTYPES[dtype].is_integer and v.dtype in DTYPES and DTYPES[v.dtype].is_integer:
                # Integers wrap, which Triton refuses to do with a literal.
                text = str(wrap(np.asarray(int(text), np.int64), dtype))
            return f"tl.full(({dims}), {text}, {held(dtype)})"
        text = self.converted(v, dtype)
        return f"tl.broadcast_to({text}, ({', '.join(shape)}{',' if len(shape) == 1 else ''}))" if shape else text

    # Values

    def typed(self, e: Expr, dtype: str, axes: Sequence[str], floor: int = 0) -> str:
        """The text of an expression as a value of a dtype over ``axes``."""
        v = self.value(e, axes, dtype)
        if v.literal or v.dtype == dtype:
            return v.at(floor)
        return self.converted(v, dtype)

    def value(self, e: Expr, axes: Sequence[str], wanted: str | None = None) -> Value:
        """An expression in its own type; a literal takes the wanted one."""
        v = self._value(e, axes, wanted)
        logic = isinstance(e, Call) and e.op in ("and", "or", "not")
        if self.interpret and axes and v.dtype == "bool" and not logic and not self.spread(e):
            # The interpreter broadcasts a lone truth value as a number.
            ones = ", ".join("1" for _ in axes) + ("," if len(axes) == 1 else "")
            one = self.full((), v, "i32") if v.literal else f"{v.at(ATOM)}.to(tl.int32)"
            return Value(f"({one} + tl.zeros(({ones}), tl.int32) != 0)", ATOM, "bool")
        return v

    def spread(self, e: Expr) -> frozenset[str]:
        """The axes over which the text of an expression has values."""
        found: set[str] = set()
        for node in walk(e):
            if isinstance(node, Rank) and node.name in self.vectors:
                found.add(node.name)
            elif isinstance(node, Access) and node.tensor in self.tiles:
                found |= set(self.tiles[node.tensor][1])
        return frozenset(found)

    def _value(self, e: Expr, axes: Sequence[str], wanted: str | None = None) -> Value:
        literal = self._literal(e, wanted)
        if literal is not None:
            return literal
        if narrow(e):
            return self.index(e, axes)
        match e:
            case Access(tensor=tensor):
                if tensor in self.tiles:
                    text, own, dtype = self.tiles[tensor]
                    v = Value(aligned(text, own, axes), ATOM, dtype)
                    computed = self.checker.tensors[tensor]
                    return v if dtype == computed else Value(self.converted(v, computed), ATOM, computed)
                return Value(self.name("scalar", tensor), ATOM, self.scalars[tensor])
            case Cast(dtype=dtype, arg=arg):
                number = literal_value(arg)
                if number is not None:
                    return self._cast_literal(number, settle(self.checker.infer(arg)), dtype)
                found = self.value(arg, axes)
                return found if found.dtype == dtype else Value(self.converted(found, dtype), ATOM, dtype)
            case Call():
                return self._call(e, axes, wanted)
            case Rank() | Extent():
                return self.index(e, axes)
            case _:
                raise VerifyError(f"{type(e).__name__} has no place in a tile program")

    def index(self, e: Expr, axes: Sequence[str]) -> Value:
        """An integer expression over ranks and extents alone, in the type of positions."""
        match e:
            case Const(value=value):
                return Value(str(int(value)), ATOM, INDEX, True)
            case Rank(name=name):
                own = (name,) if name in self.vectors and name in axes else ()
                base = "rank" if name not in self.vectors or name in axes else "start"
                return Value(aligned(self.name(base, name), own, axes), ATOM, INDEX)
            case Extent(rank=rank):
                return Value(self.name("extent value", rank), ATOM, INDEX)
            case Call(op="neg", args=(a,)):
                return Value("-" + self.index(a, axes).at(ATOM), UNARY, INDEX)
            case Call(op=op, args=(a, b)):
                x, y = self.index(a, axes), self.index(b, axes)
                if op in ("add", "sub", "mul"):
                    level = _LEVELS[op]
                    left, right = x.at(level), y.at(level + 1)
                    return Value(f"{left} {OPS[op].symbol} {right}", level, INDEX)
                if op in ("floordiv", "mod"):
                    span = _span(a)
                    if span is not None and span[0] >= 0:
                        return Value(f"{x.at(MUL)} {OPS[op].symbol} {y.at(UNARY)}", MUL, INDEX)
                    helper = self.need("floordiv" if op == "floordiv" else "floormod")
                    return Value(f"{helper}({x.text}, {y.text})", ATOM, INDEX)
                return Value(f"tl.{op}({x.text}, {y.text})", ATOM, INDEX)
            case _:
                raise VerifyError("no index of ranks alone")

    def _literal(self, e: Expr, wanted: str | None) -> Value | None:
        number = literal_value(e)
        if number is None:
            return None
        dtype = self.checker.infer(e)
        if dtype == WEAK_FLOAT:
            dtype = wanted if wanted in ("f32", "f64") else "f32"
        elif dtype == WEAK_INT:
            dtype = wanted if wanted is not None and wanted != "bool" and fits(number, wanted) else "i64"
        text = self.spell(number, dtype)
        return Value(text, UNARY if text.startswith("-") else ATOM, str(dtype), True)

    def _cast_literal(self, number: float | int | bool, source: str, dtype: str) -> Value:
        """A literal as a cast converts it: Triton's own literals neither saturate nor round as the language does."""
        text = self.spell(convert(np.asarray(number), dtype).item(), dtype)
        v = Value(text, UNARY if text.startswith("-") else ATOM, dtype, True)
        return v if dtype in ("f64", "f32", source) else Value(self.full((), v, dtype), ATOM, dtype)

    def spell(self, number: float | int | bool, dtype: str | None) -> str:
        if isinstance(number, bool) or dtype == "bool":
            return str(bool(number))
        whole = dtype in DTYPES and DTYPES[str(dtype)].is_integer and math.isfinite(number)
        if not whole and (isinstance(number, float) or (dtype in DTYPES and DTYPES[str(dtype)].is_float)):
            number = float(number)
            if math.isnan(number):
                return 'float("nan")'
            if math.isinf(number):
                return ("-" if number < 0 else "") + self.need("INF")
            return repr(number)
        return str(int(number))

    # Operations

    def _call(self, e: Call, axes: Sequence[str], wanted: str | None) -> Value:
        row = OPS[e.op]
        types = [self.checker.infer(a) for a in e.args]
        own = self.checker.infer(e)
        dtype = settle(own)
        if own == WEAK_FLOAT and wanted == "f64" or own == WEAK_INT and wanted in ("i32", "u32"):
            dtype = str(wanted)
        if row.rule == "compare" and all(narrow(a) for a in e.args):
            x, y = (self.index(a, axes) for a in e.args)
            if x.literal and y.literal:
                return Value(str(bool(row.numpy(int(x.text), int(y.text)))), ATOM, "bool", True)
            return Value(f"{x.at(ADD)} {row.symbol} {y.at(ADD)}", COMPARE, "bool")
        within = computed_in(e, dtype, types)
        result = "bool" if row.rule == "compare" else within
        v = self._computed(e, within, result, axes)
        if row.rule != "compare" and within != dtype:
            return Value(self.converted(v, dtype), ATOM, dtype)
        return v

    def _args(self, e: Call, within: str, axes: Sequence[str]) -> list[Value]:
        """The operands in the type of the operation; if all are literals, the first is a value of its own."""
        found = []
        for a in e.args:
            v = self.value(a, axes, within)
            if not v.literal and v.dtype != within:
                v = Value(self.converted(v, within), ATOM, within)
            elif v.literal and v.dtype != within and DTYPES[within].is_integer and v.dtype in ("i64", "i32"):
                v = self._wrapped(int(v.text), within)
            found.append(v)
        if all(v.literal for v in found):
            found[0] = Value(self.full((), found[0], within), ATOM, within)
        return found

    def _wrapped(self, number: int, dtype: str) -> Value:
        """A whole number as an integer type holds it: modulo 2^bits. Triton takes no literal that a type lacks."""
        row = DTYPES[dtype]
        text = str((number - row.lowest) % (1 << row.bits) + row.lowest) if row.kind != "bool" else str(number)
        return Value(text, UNARY if text.startswith("-") else ATOM, dtype, True)

    def _computed(self, e: Call, within: str, result: str, axes: Sequence[str]) -> Value:
        if e.op == "where":
            condition = self.typed(e.args[0], "bool", axes)
            if condition in ("True", "False"):
                condition = f"tl.full((), {condition}, tl.int1)"
            a, b = self._args(Call("add", e.args[1:]), within, axes)
            return Value(f"tl.where({condition}, {a.text}, {b.text})", ATOM, within)
        if e.op == "pow":
            exponent = literal_value(e.args[1])
            assert isinstance(exponent, int)
            base = self._args(Call("neg", e.args[:1]), within, axes)[0]
            return Value(f"{self.need(power_name(exponent))}({base.text})", ATOM, within)
        args = self._args(e, within, axes)
        if e.op in ("lshift", "rshift"):
            return self._shift(e, args, within)
        if e.op == "not":
            if within == "bool":
                return Value(f"{args[0].at(ADD)} == 0", COMPARE, within)
            return Value("~" + args[0].at(ATOM), UNARY, within)
        if e.op == "neg":
            return Value("-" + args[0].at(ATOM), UNARY, within)
        function = self._function(e, within, args)
        if function is not None:
            return Value(function, ATOM, result)
        level = _LEVELS.get(e.op, COMPARE)
        if args[0].literal and args[0].text.endswith("INF"):  # a constant of Triton's, whose operators are Python's
            args[0] = Value(self.full((), args[0], within), ATOM, within)
        if level == COMPARE:
            return Value(f"{args[0].at(ADD)} {OPS[e.op].symbol} {args[1].at(ADD)}", COMPARE, result)
        left, right = args[0].at(level), args[1].at(level + 1)
        if e.op in ("and", "or") and within == "bool":
            left, right = args[0].at(SHIFT), args[1].at(SHIFT)
        return Value(f"{left} {OPS[e.op].symbol} {right}", level, result)

    def _function(self, e: Call, within: str, args: list[Value]) -> str | None:
        """The call that computes an operation; None where it is an infix operator."""
        texts = ", ".join(a.text for a in args)
        is_real, double = DTYPES[within].is_float, within == "f64"
        match e.op:
            case "div" if not double and self.exact:
                return f"tl.div_rn({texts})"
            case "minimum" | "maximum":
                return f"{self.need(e.op) if is_real else 'tl.' + e.op}({texts})"
            case "floordiv" | "mod":
                helper = "floordiv" if e.op == "floordiv" else "floormod"
                if within == "u32" or args[0].literal:  # a bare literal counts as signed there, and has no type
                    texts = ", ".join(self.full((), a, within) if a.literal else a.text for a in args)
                return f"{self.need(helper + ('_float' if is_real else ''))}({texts})"
            case "exp" if not double:
                if _is_difference(e.args[0]) or not self.exact:
                    return f"tl.exp2({args[0].at(MUL)} * {self.need('LOG2_E')})"
                return f"{self.need('exp')}({texts})"
            case "sigmoid":
                rounded = double or _is_difference(e.args[0]) or not self.exact
                return f"{self.need('sigmoid' if rounded else 'sigmoid_exact')}({texts})"
            case "expm1" | "tanh":
                return f"{self.need(e.op + ('_f64' if double else ''))}({texts})"
            case "log1p":
                return f"{self.need('log1p')}({texts})"
            case "sqrt" if not double and self.exact:
                return f"tl.sqrt_rn({texts})"
            case "floor":
                return f"tl.floor({texts})" if is_real else args[0].at(ATOM)
            case "round":
                return f"{self.need('rint' + ('_f64' if double else ''))}({texts})" if is_real else args[0].at(ATOM)
            case _:
                if OPS[e.op].symbol:
                    return None
                return OPS[e.op].triton.format(**dict(zip("abc", (a.text for a in args), strict=False)))

    def _shift(self, e: Call, args: list[Value], within: str) -> Value:
        count = literal_value(e.args[1])
        bits = DTYPES[within].bits
        if isinstance(count, int) and 0 <= count < bits:
            return Value(f"{args[0].at(SHIFT)} {OPS[e.op].symbol} {count}", SHIFT, within)
        name = "shift_left" if e.op == "lshift" else "shift_right_u32" if within == "u32" else "shift_right"
        return Value(f"{self.need(name)}({args[0].text}, {args[1].text}, {bits - 1})", ATOM, within)


def _is_difference(e: Expr) -> bool:
    """Whether a value was rounded on the way already, so that one rounding more is no matter."""
    return isinstance(e, Call) and e.op in ("sub", "add", "mul", "where", "neg") and not _plain(e)


def _plain(e: Expr) -> bool:
    return isinstance(e, Call) and e.op == "neg" and isinstance(e.args[0], Access)


_AFFINE = frozenset({"add", "sub", "mul", "neg", "floordiv", "mod", "minimum", "maximum"})


def narrow(e: Expr) -> bool:
    """Whether a value of ranks alone stays within 32 bits as long as extents are below `NARROW_EXTENT`."""
    if not free_ranks(e) and not ranks_named(e):
        return isinstance(e, Const) and e.kind == "int" and e.value < 1 << 30
    return _narrow(e)


def _narrow(e: Expr) -> bool:
    match e:
        case Const(kind=kind):
            return kind == "int"
        case Rank() | Extent():
            return True
        case Call(op=op) if op in _AFFINE:
            span = _span(e)
            good = span is not None and span[0] >= -(1 << 31) and span[1] < 1 << 31
            return good and all(_narrow(k) for k in children(e))
        case _:
            return False


def _span(e: Expr) -> tuple[int, int] | None:
    extents = dict.fromkeys(ranks_named(e), NARROW_EXTENT)
    low = interval(e, dict.fromkeys(free_ranks(e), (0, NARROW_EXTENT - 1)), extents)
    least = interval(e, dict.fromkeys(free_ranks(e), (0, NARROW_EXTENT - 1)), dict.fromkeys(extents, 0))
    if low is None or least is None:
        return None
    return min(low[0], least[0]), max(low[1], least[1])
