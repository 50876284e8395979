"""Expressions over whole vectors: the text of a value in LANES neighbouring positions of one axis.

    exp(scale * load(s + q * 512 + k) - m[q])

What does not vary along the axis stays a scalar. A comparison of coordinates becomes a mask of lanes. Where an
expression holds anything else (integers, other dtypes, reads that do not lie side by side), there is no such text, and
the loop goes element by element.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from ..ir.cascade import Access, Call, Cast, Const, Expr, Rank, free_ranks, literal_value, walk
from ..ir.dtypes import DTYPES
from ..ir.ops import OPS
from ..ir.spans import span
from ..ir.types import TypeChecker, is_float, settle
from .made import number

# Rows of tiles are multiples of this many elements where they are computed in vectors: the widest machine's.
WIDEST = 16

ATOM, UNARY, MUL, ADD, LOOSE = 9, 8, 7, 6, 1

_INFIX = {"add": ("+", ADD, ADD, MUL), "sub": ("-", ADD, ADD, MUL), "mul": ("*", MUL, MUL, UNARY)}
_INFIX["div"] = ("/", MUL, MUL, UNARY)
_CALLS = {
    op: op
    for op in "exp exp2 expm1 log log2 log1p tanh erf sigmoid sin cos abs sqrt rsqrt floor maximum minimum".split()
} | {"round": "rint"}
_COMPARISONS = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}
_INTEGERS = {"add": "+", "sub": "-", "mul": "*", "and": "&", "or": "|", "xor": "^"}
_LOGIC = {"and": "&", "or": "|"}


@dataclass(frozen=True, slots=True)
class Text:
    """Text that binds as tightly as ``level`` says; ``wide`` if it is a vector or mask, else a scalar.

    Lanes of integers are of ``kind`` "Mask" (i32) or "Words" (u32), whichever holds them.
    """

    text: str
    level: int
    wide: bool
    kind: str = "Vector"

    def at(self, floor: int) -> str:
        return f"({self.text})" if self.level < floor else self.text


class NotVectors(Exception):
    """The expression has no text over vectors."""


@dataclass(slots=True)
class Inside:
    """Where along an axis comparisons of coordinates hold in whole vectors: from the greatest of ``first`` on, before
    the least of ``last``. ``name`` is what the loop's text knows there, ``origin`` writes what is so at its start."""

    name: str
    origin: Callable[[Expr, str], str]
    first: list[str] = field(default_factory=list)
    last: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Lanes:
    """Writes expressions along ``axis``.

    ``tile`` gives a tile's dtype, whether it varies along the axis, and its element's text, or None where it does not
    lie side by side; ``scalar`` the text of what does not vary, in a dtype; ``kept`` names tiles that are vectors.
    ``words`` numbers the words of which fields were written; ``inside``, if given, is told where masks of coordinates
    let all lanes through. ``exact`` values are no products by a reciprocal; ``rough`` exponentials of what was rounded
    as it was computed take fewer steps, the fewest where results below the least normal number are ``flushed`` to 0.
    """

    axis: str
    checker: TypeChecker
    tile: Callable[[str], tuple[str, bool, str | None] | None]
    scalar: Callable[[Expr, str], str]
    kept: Mapping[str, str] = field(default_factory=dict)
    exact: bool = False
    rough: bool = True
    flushed: bool = False
    words: dict[str, int] = field(default_factory=dict)
    inside: Inside | None = None

    def varies(self, e: Expr) -> bool:
        for n in walk(e):
            if isinstance(n, Rank) and n.name == self.axis:
                return True
            if isinstance(n, Access) and (found := self.tile(n.tensor)) is not None and found[1]:
                return True
        return False

    def value(self, e: Expr) -> Text:
        """An f32 value; raises `NotVectors`."""
        if not self.varies(e):
            number = literal_value(e)
            return Text(self.scalar(e, "f32"), UNARY if number is not None and number < 0 else ATOM, False)
        # A coordinate, and not a float that a coordinate went into.
        whole = not is_float(settle(self.checker.infer(e)))
        whole = whole and not any(isinstance(n, Access) and self._varying(n) for n in walk(e))
        step = coefficient(e, self.axis) if whole else None
        if step is not None:
            return Text(f"lanes_from({self.scalar(e, 'i64')}, {step})", ATOM, True)
        if DTYPES[settle(self.checker.infer(e))].is_integer:
            return Text(f"floats({self.integer(e).text})", ATOM, True)
        match e:
            case Access(tensor=tensor):
                if tensor in self.kept:
                    return Text(self.kept[tensor], ATOM, True)
                found = self.tile(tensor)
                if found is None or found[2] is None or found[0] not in ("f32", "bf16"):
                    raise NotVectors
                return Text(f"load(&{found[2]})", ATOM, True)
            case Cast(dtype="f32" | "bf16" as to, arg=arg) if _in_lanes(kind := settle(self.checker.infer(arg))):
                value = self.value(arg)
                return value if to in ("f32", kind) else Text(f"rounded({_wide(value)})", ATOM, True)
            case Call():
                return self._call(e)
        raise NotVectors

    def _call(self, e: Call) -> Text:
        if settle(self.checker.infer(e)) not in ("f32", "bf16"):
            raise NotVectors
        if e.op == "where":
            a, b = self.value(e.args[1]), self.value(e.args[2])
            return Text(f"choose({self.condition(e.args[0]).text}, {a.text}, {b.text})", ATOM, True)
        if e.op == "neg":
            return Text("-" + self.value(e.args[0]).at(ATOM), UNARY, True)
        if e.op == "pow" and isinstance(n := literal_value(e.args[1]), int):
            return Text(f"power<{n}>({self.value(e.args[0]).text})", ATOM, True)
        if e.op in _INFIX:
            if not any(is_float(self.checker.infer(x)) for x in e.args):
                raise NotVectors  # a quotient of integers is one of f64
            sign, level, left, right = _INFIX[e.op]
            a, b = (self.value(x) for x in e.args)
            if e.op == "div" and not b.wide and not self.exact:
                return Text(f"divide({a.text}, {b.text})", ATOM, True)
            return Text(f"{a.at(left)} {sign} {b.at(right)}", level, True)
        if e.op == "exp2" and (whole := self._whole(e.args[0])) is not None:
            return Text(f"exp2({whole.text})", ATOM, True)
        if e.op == "exp" and self.rough and _rounds_inside(e.args[0]):
            name = "exp_flushed" if self.flushed else "exp_rough"
            return Text(f"{name}({self.value(e.args[0]).text})", ATOM, True)
        if e.op in _CALLS:
            args = [self.value(x) for x in e.args]
            several = len(args) > 1
            return Text(f"{_CALLS[e.op]}({', '.join(_wide(x) if several else x.text for x in args)})", ATOM, True)
        raise NotVectors

    def _whole(self, e: Expr) -> Text | None:
        """Integers, perhaps on their way to a float, in lanes of i32; None where that is none of them."""
        inner = e.arg if isinstance(e, Cast) and e.dtype == "f32" else e
        if not self.varies(inner) or not DTYPES[settle(self.checker.infer(inner))].is_integer:
            return None
        try:
            found = self.integer(inner)
        except NotVectors:
            return None
        return found if found.kind == "Mask" else None

    def integer(self, e: Expr) -> Text:
        """Integers in lanes of 32 bits, which provably hold them, whatever type they have; raises `NotVectors`."""
        kind = self._kind(e)
        if not self.varies(e):
            known = number(e)
            text = str(known) if known is not None else self.scalar(e, "i64")
            return Text(f"{'uint32_t' if kind == 'Words' else 'int32_t'}({text})", ATOM, False, kind)
        match e:
            case Access(tensor=tensor):
                found = self.tile(tensor)
                if tensor in self.kept:
                    return Text(self.kept[tensor], ATOM, True, kind)
                if found is None or found[2] is None or found[0] not in ("i32", "u32", "i8", "u8"):
                    raise NotVectors
                return Text(f"load(&{found[2]})", ATOM, True, kind)
            case Cast(arg=arg) if span(arg, self.checker) == span(e, self.checker):
                return _as(kind, self.integer(arg))
            case Call(op=op, args=(a, b)) if op in _INTEGERS:
                x, y = (_as(kind, self.integer(v)) for v in (a, b))
                return Text(f"{x.at(ATOM)} {_INTEGERS[op]} {y.at(ATOM)}", LOOSE, True, kind)
            case Call(op="rshift" | "lshift" as op, args=(a, b)):
                amount = span(b, self.checker)
                if amount is None or amount[0] < 0 or amount[1] > 31 or self.varies(b):
                    raise NotVectors
                known = number(b)
                count = str(known) if known is not None else f"int32_t({self.scalar(b, 'i64')})"
                x = self.integer(a) if op == "rshift" else _as(kind, self.integer(a))
                if known == 0:
                    return _as(kind, x)
                shifted = Text(f"{x.at(ATOM)} {'>>' if op == 'rshift' else '<<'} {count}", LOOSE, True, x.kind)
                return _as(kind, shifted)
        raise NotVectors

    def _kind(self, e: Expr) -> str:
        """The lanes that hold an integer."""
        found = span(e, self.checker)
        if found is not None and found[0] >= -(1 << 31) and found[1] < 1 << 31:
            return "Mask"
        if found is not None and found[0] >= 0 and found[1] < 1 << 32:
            return "Words"
        raise NotVectors

    def field(self, e: Expr, whole: bool = False) -> Text:
        """A value, an integer if it is to be ``whole``, or neighbouring bits of words by their place, of which several
        may be made at once."""
        match e:
            case Cast(dtype="f32" | "bf16" | "i32" | "i64" | "u32", arg=Call(op="and") as arg):
                return self.field(arg, whole)
            case Call(op="and", args=(x, Const(value=int() as mask))) if mask > 0 and not mask & (mask + 1):
                shift, word = 0, x
                match x:
                    case Call(op="rshift", args=(inner, amount)) if (
                        count := number(amount)
                    ) is not None and count >= 0:
                        shift, word = count, inner
                if self.varies(word) and shift + mask.bit_length() <= 32:
                    text = _as("Words", self.integer(word)).text
                    which = self.words.setdefault(text, len(self.words))
                    return Text(f"Field<{shift}, {mask.bit_length()}, {which}>{{{text}}}", ATOM, True)
        return self.integer(e) if whole else self.value(e)

    def condition(self, e: Expr) -> Text:
        """A mask of lanes, or a bool where it is the same for all."""
        if not self.varies(e):
            return Text(self.scalar(e, "bool"), LOOSE, False)
        if not isinstance(e, Call):
            raise NotVectors
        if e.op in _LOGIC:
            a, b = (self.condition(x) for x in e.args)
            return Text(f"mask_of({a.text}) {_LOGIC[e.op]} mask_of({b.text})", LOOSE, True)
        if e.op == "not":
            return Text(f"~mask_of({self.condition(e.args[0]).text})", UNARY, True)
        if OPS[e.op].rule != "compare" or e.op not in _COMPARISONS:
            raise NotVectors
        steps = [coefficient(a, self.axis) for a in e.args]
        if None not in steps and not any(isinstance(n, Access) and self._varying(n) for n in walk(e)):
            return self._coordinates(e.op, e.args, (steps[0] or 0) - (steps[1] or 0))
        if all(DTYPES[settle(self.checker.infer(a))].is_integer for a in e.args):
            return self._integers(e.op, e.args)
        if any(settle(self.checker.infer(a)) not in ("f32", "bf16") for a in e.args):
            raise NotVectors
        # Values that are equal must compare so: no quotient by way of a reciprocal.
        a, b = (replace(self, exact=True).value(x) for x in e.args)
        return Text(f"({_wide(a)} {_COMPARISONS[e.op]} {_wide(b)})", ATOM, True)

    def _integers(self, op: str, args: tuple[Expr, ...]) -> Text:
        """``a op b`` for integers of 32 bits or fewer that data give."""
        a, b = (self.integer(x) for x in args)
        if a.kind != b.kind:
            raise NotVectors
        return Text(f"({a.at(ATOM)} {_COMPARISONS[op]} {b.at(ATOM)})", ATOM, True)

    def _varying(self, n: Access) -> bool:
        found = self.tile(n.tensor)
        return found is not None and found[1]

    def _coordinates(self, op: str, args: tuple[Expr, ...], step: int) -> Text:
        """``a op b`` for integers of which one side moves with the lane: a first or last few lanes."""
        a, b = (self.scalar(x, "i64") for x in args)
        if step == -1:
            a, b, op = b, a, {"lt": "gt", "le": "ge", "gt": "lt", "ge": "le"}.get(op, op)
        elif step != 1:
            raise NotVectors
        if op not in ("lt", "le", "ge", "gt"):
            raise NotVectors
        # Now a + lane op b.
        upper, more = op in ("lt", "le"), " + 1" if op in ("le", "gt") else ""
        below = f"({b}) - ({a}){more}"
        if (inside := self.inside) is None:
            return Text(f"lanes_below({below})" if upper else f"~lanes_below({below})", ATOM if upper else UNARY, True)
        x, y = (inside.origin(e, "i64") for e in (args[::-1] if step == -1 else args))
        (inside.last if upper else inside.first).append(f"({y}) - ({x}){more}")
        return Text(f"lanes_{'below' if upper else 'past'}({below}, {inside.name})", ATOM, True)


def _rounds_inside(e: Expr) -> bool:
    """Whether what is added up was itself computed, so that the sum is off by more than a rounding of it."""
    match e:
        case Call(op="where", args=(_, a, b)):
            return _rounds_inside(a) or _rounds_inside(b)
        case Call(op="add" | "sub", args=args):
            return any(isinstance(a, Call) and a.op in ("mul", "div", "add", "sub", "tanh") for a in args)
    return False


def _in_lanes(dtype: str) -> bool:
    """Whether lanes of f32 hold the values of a type, or integers that become such."""
    return dtype in ("f32", "bf16") or DTYPES[dtype].is_integer


def _as(kind: str, t: Text) -> Text:
    """Integers as lanes of another kind: the same bits."""
    if t.kind == kind:
        return t
    if not t.wide:
        return replace(t, text=f"{'uint32_t' if kind == 'Words' else 'int32_t'}({t.text})", kind=kind)
    return Text(f"{'words' if kind == 'Words' else 'integers'}({t.text})", ATOM, True, kind)


def _wide(t: Text) -> str:
    return t.text if t.wide else f"splat({t.text})"


def coefficient(e: Expr, rank: str) -> int | None:
    """By how much an integer expression grows with a rank; None where it is not linear in it or not of ranks."""
    match e:
        case Rank(name=name):
            return int(name == rank)
        case Call(op="add" | "sub" as op, args=(x, y)):
            a, b = coefficient(x, rank), coefficient(y, rank)
            return None if a is None or b is None else a + b if op == "add" else a - b
        case Call(op="neg", args=(x,)):
            a = coefficient(x, rank)
            return None if a is None else -a
        case Call(op="mul", args=(x, y)):
            for factor, other in ((literal_value(x), y), (literal_value(y), x)):
                if isinstance(factor, int) and (a := coefficient(other, rank)) is not None:
                    return factor * a
    if rank in free_ranks(e) or any(isinstance(n, Access) and n.indices for n in walk(e)):
        return None
    number = literal_value(e)
    return None if isinstance(number, float) else 0


def steps(indices: tuple[Expr, ...], ranks: tuple[str, ...]) -> Mapping[str, tuple[int, int]] | None:
    """For each rank the one index that moves with it and by how much; None where one moves none, or several."""
    found: dict[str, tuple[int, int]] = {}
    for r in ranks:
        moved = [(i, coefficient(e, r)) for i, e in enumerate(indices)]
        nonzero = [(i, c) for i, c in moved if c != 0]
        if len(nonzero) != 1 or nonzero[0][1] is None:
            return None
        found[r] = (nonzero[0][0], nonzero[0][1])
    return found
