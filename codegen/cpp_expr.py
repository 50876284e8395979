"""Expressions in C++: of scalars, and of vectors along one axis."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeGuard

import numpy as np

from ..ir.cascade import Access, Call, Cast, Expr, Extent, Rank, literal_value, tensors_read
from ..ir.dtypes import DTYPES
from ..ir.errors import VerifyError
from ..ir.ops import OPS
from ..ir.tile import Load
from ..ir.types import WEAK_FLOAT, WEAK_INT, computed_in, settle
from .cpp_scope import Place, Scope, ctype
from .vectors import ADD, ATOM, LOOSE, MUL, UNARY, Inside, Lanes, NotVectors, Text

_LEVELS = {"add": (ADD, ADD, MUL), "sub": (ADD, ADD, MUL), "mul": (MUL, MUL, UNARY), "div": (MUL, MUL, UNARY)}


@dataclass(frozen=True, slots=True)
class Value:
    """The text of an expression, how tightly it binds, and its dtype."""

    text: str
    level: int
    dtype: str

    def at(self, floor: int) -> str:
        return f"({self.text})" if self.level < floor else self.text


class Expressions(Scope):
    """Texts of expressions."""

    def typed(self, e: Expr | None, dtype: str, axes: frozenset[str] = frozenset(), floor: int = 0) -> str:
        """The text of an expression as a value of a dtype, in a loop nest over ``axes``."""
        assert e is not None
        v = self.value(e, axes, dtype)
        if v.dtype == dtype:
            return v.at(floor)
        return converted(v, dtype)

    def value(self, e: Expr, axes: frozenset[str], wanted: str | None = None) -> Value:
        """An expression in its own type; a literal takes the wanted one."""
        folded = self._literal(e, wanted)
        if folded is not None:
            return folded
        match e:
            case Rank(name=name):
                return self._coordinate(name, axes)
            case Extent(rank=rank):
                known = rank in self.k.fixed
                return Value(f"int64_t({self.k.fixed[rank]})" if known else self._extent(rank), ATOM, "i64")
            case Access(tensor=tensor):
                if tensor in self.tiles:
                    return Value(self._element(tensor), ATOM, self.tiles[tensor].dtype)
                param = self.params[tensor]
                name = self.names("tensor", tensor)
                text = from_memory(param.dtype, f"*{name}") if tensor in self.k.outputs else name
                return Value(text, UNARY if tensor in self.k.outputs else ATOM, param.dtype)
            case Cast(dtype=dtype, arg=arg):
                found = self.value(arg, axes, "f64" if dtype == "f64" and literal_value(arg) is not None else None)
                return found if found.dtype == dtype else Value(converted(found, dtype), ATOM, dtype)
            case Call():
                return self._call(e, axes, wanted)
            case _:
                raise VerifyError(f"{type(e).__name__} has no place in a tile program")

    def _coordinate(self, rank: str, axes: frozenset[str]) -> Value:
        axis = self.axes[rank]
        if axis.size == 1 or rank not in axes:
            return Value(axis.base if axis.base != "0" else "int64_t(0)", ATOM, "i64")
        if axis.base == "0":
            return Value(axis.index, ATOM, "i64")
        return Value(f"{axis.base} + {axis.index}", ADD, "i64")

    def _literal(self, e: Expr, wanted: str | None) -> Value | None:
        """A literal, perhaps negated."""
        number = literal_value(e)
        if number is None:
            return None
        dtype = self.checker.infer(e)
        if dtype == WEAK_FLOAT:
            dtype = wanted if wanted in ("f32", "f64") else "f32"
        elif dtype == WEAK_INT:
            row = DTYPES[wanted or "bool"]
            fits = row.is_integer and row.lowest <= number <= row.highest
            exact = wanted in ("f32", "f64") and abs(number) < 1 << 24
            dtype = str(wanted) if fits or exact else "i64"
        text = self.literal(number, dtype)
        return Value(text, UNARY if text.startswith("-") else ATOM, dtype)

    def literal(self, number: float | int | bool, dtype: str) -> str:
        """A number as a literal of a dtype."""
        row = DTYPES[dtype]
        if row.kind == "bool":
            return "true" if number else "false"
        if row.is_integer:
            number = int(number)
            if dtype == "i64":
                return f"int64_t({number})" if number > -(2**63) else "INT64_MIN"
            return f"{number}u" if dtype == "u32" else f"{ctype(dtype)}({number})" if row.bits < 32 else _i32(number)
        number = float(number)
        if math.isnan(number):
            return f'to<{ctype(dtype)}>(__builtin_nanf(""))'
        if dtype == "f64":
            return repr(number) if math.isfinite(number) else ("-" if number < 0 else "") + "double(inf)"
        with np.errstate(over="ignore"):
            finite = bool(np.isfinite(np.float32(number)))
        text = f"{number!r}f" if finite else "inf" if number > 0 else "-inf"
        return text if dtype == "f32" else f"to<{ctype(dtype)}>({text})"

    def _call(self, e: Call, axes: frozenset[str], wanted: str | None) -> Value:
        row = OPS[e.op]
        types = [self.checker.infer(a) for a in e.args]
        own = self.checker.infer(e)
        dtype = settle(own)
        if own == WEAK_FLOAT and wanted == "f64" or own == WEAK_INT and e.op == "where" and wanted in ("i32", "u32"):
            dtype = str(wanted)
        within = computed_in(e, dtype, types)
        if e.op == "where":
            condition = self.typed(e.args[0], "bool", axes)
            arms = ", ".join(self.typed(a, within, axes) for a in e.args[1:])
            return Value(f"select<{ctype(within)}>({condition}, {arms})", ATOM, within)
        if e.op == "pow":
            return Value(f"power<{literal_value(e.args[1])}>({self.typed(e.args[0], within, axes)})", ATOM, within)
        if e.op in ("lshift", "rshift"):
            return self._shift(e, within, axes)
        if e.op == "not":
            sign = "!" if within == "bool" else "~"
            return Value(sign + self.typed(e.args[0], within, axes, ATOM), UNARY, within)
        if e.op in ("floordiv", "mod") and DTYPES[within].is_integer and _is_power(by := literal_value(e.args[1])):
            if (within_tile := self._in_tile(e, by, axes)) is not None:
                return within_tile
            # Rounded down as these are, negative numbers too.
            dividend = self.typed(e.args[0], within, axes, ATOM)
            rest = f">> {by.bit_length() - 1}" if e.op == "floordiv" else f"& {self.literal(by - 1, within)}"
            return Value(f"{dividend} {rest}", LOOSE, within)
        result = "bool" if row.rule == "compare" else within
        if row.symbol and row.arity == 2 and e.op not in ("floordiv", "mod"):
            level, left, right = _LEVELS.get(e.op, (LOOSE, ATOM, ATOM))
            a, b = self.typed(e.args[0], within, axes, left), self.typed(e.args[1], within, axes, right)
            text = Value(row.cpp.format(a=a, b=b), level, result)
        elif e.op == "neg":
            text = Value("-" + self.typed(e.args[0], within, axes, ATOM), UNARY, result)
        else:
            args = dict(zip("abc", (self.typed(a, within, axes) for a in e.args), strict=False))
            called = row.cpp.format(**args)
            if self.alone and e.op == "exp" and within == "f32":
                called = called.replace("exp(", "exp_alone(", 1)
            if DTYPES[within].is_integer:
                called = called.replace("(", f"<{ctype(within)}>(", 1)
            text = Value(called, ATOM, result)
        # Where the arithmetic was done in a wider type, the result is what wraps or rounds.
        if row.rule != "compare" and within != dtype:
            return Value(converted(text, dtype), ATOM, dtype)
        return text

    def _in_tile(self, e: Call, by: int, axes: frozenset[str]) -> Value | None:
        """A coordinate's quotient or remainder in a tile that no multiple of the divisor cuts: by those of its base."""
        r = e.args[0]
        if not isinstance(r, Rank) or r.name not in axes or self.axes[r.name].size == 1:
            return None
        axis, size = self.axes[r.name], self.aligned.get(r.name, 0)
        if size < axis.size or by % size or axis.base == "0":
            return None
        if e.op == "floordiv":
            return Value(f"{axis.base} >> {by.bit_length() - 1}", LOOSE, "i64")
        return Value(f"({axis.base} & int64_t({by - 1})) + {axis.index}", ADD, "i64")

    def _shift(self, e: Call, within: str, axes: frozenset[str]) -> Value:
        count = literal_value(e.args[1])
        a = self.typed(e.args[0], within, axes, ATOM)
        if e.op == "rshift" and isinstance(count, int) and 0 <= count < DTYPES[within].bits:
            return Value(f"{a} >> {count}", LOOSE, within)
        name = "shift_left" if e.op == "lshift" else "shift_right"
        b = self.typed(e.args[1], within, axes)
        value = self.typed(e.args[0], within, axes)
        return Value(f"{name}<{ctype(within)}>({value}, {b})", ATOM, within)

    def _vector_axis(self, place: Place) -> str | None:
        """The axis along which a tile of floats is computed in whole vectors."""
        if place.tile.dtype not in ("f32", "bf16") or not place.long or place.view is not None:
            return None
        return place.long[-1] if self.axes[place.long[-1]].in_vectors else None

    def _vectors(
        self,
        e: Expr,
        inner: str,
        axes: frozenset[str],
        kept: Mapping[str, str] | None = None,
        inside: Inside | None = None,
    ) -> Text | None:
        """The text of an expression over vectors along an axis, or None; ``kept`` tiles are vectors by name."""
        try:
            return replace(self._lanes(inner, axes, kept), inside=inside).value(e)
        except NotVectors:
            return None

    def _lanes(self, inner: str, axes: frozenset[str], kept: Mapping[str, str] | None = None) -> Lanes:
        """What writes expressions over vectors along an axis."""

        def tile(name: str) -> tuple[str, bool, str | None] | None:
            if name not in self.tiles:
                return None
            place = self._place(name)
            varies = inner in place.long
            beside = varies and place.long[-1] == inner and place.view is None
            return place.tile.dtype, varies, self._element(name) if beside else None

        def scalar(x: Expr, dtype: str) -> str:
            return self.typed(x, dtype, axes, ATOM)

        strict = self.k.ordered
        return Lanes(inner, self.checker, tile, scalar, kept or {}, strict, not strict, self.flushed)

    def _guarded(self, op: Load, inner: str) -> str | None:
        """The text of which lanes of a load along an axis there are, or None; the others have to be 0."""
        if op.guard is None or op.other != 0 or tensors_read(op.guard):
            return None
        try:
            return self._lanes(inner, frozenset((*op.tile.axes, inner))).condition(op.guard).text
        except NotVectors:
            return None

    def _left(self, inner: str) -> str:
        """The name of how many elements there are from a vector's first on, in a loop over vectors."""
        return self.names("left", inner, "{}_left")

    def _vector_loop(self, inner: str, lines: Sequence[str]) -> None:
        """A loop over vectors; where tensors are met, whole ones apart from the last."""

        def body() -> None:
            for text in lines:
                self.line(text)

        self._over_vectors(inner, body, *lines)

    def _over_vectors(self, inner: str, body: Callable[[], None], *texts: str) -> None:
        """A loop over vectors whose body has these texts; where tensors are met, whole ones apart from the last."""
        axis, left = self.axes[inner], self._left(inner)
        meets = any(left in text for text in texts)
        if meets:
            self.open(f"each_vector({axis.count}, [&](int64_t {axis.index}, int64_t {left}) CASTILE_INLINED")
        else:
            self.open(f"for (int64_t {axis.index} = 0; {axis.index} < {axis.count}; {axis.index} += LANES)")
        body()
        self.close("});" if meets else "}")

    def _elements(self, inner: str, lines: Sequence[str], result: str, whole: str = "") -> str:
        """The head of the function that gives a fold its vectors by ``lines`` and a result.

        ``whole`` names whether a vector needs no masks, where that is told.
        """
        axis, left = self.axes[inner], self._left(inner)
        named = f" {left}" if any(left in text for text in (*lines, result)) else ""
        told = f", auto {whole}" if whole else ""
        return f"[&](int64_t {axis.index}, int64_t{named}{told}) CASTILE_INLINED"


def _is_power(n: object) -> TypeGuard[int]:
    return isinstance(n, int) and n > 0 and n & (n - 1) == 0


def converted(v: Value, dtype: str) -> str:
    return v.text if v.dtype == dtype else f"to<{ctype(dtype)}>({v.text})"


def from_memory(dtype: str, text: str) -> str:
    return f"({text} != 0)" if dtype == "bool" else text


def _i32(number: int) -> str:
    return str(number) if number > -(2**31) else "INT32_MIN"
