"""Operands that are made where they are multiplied: a map written out for a few neighbours of the summed rank.

    right[k, n] = W[k // 8, n] >> 4 * (k % 8) & 15

for eight values of k from a multiple of 8 on reads one word, and its shifts are literals: 0, 4, … 28. So the operand
never lies in memory as a whole, only the panel of it that a dot has at hand, and for few rows not even that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import lcm

from ..ir.cascade import Access, Call, Cast, Const, Expr, Rank, children, rebuild, walk
from ..ir.tile import Load

# Values of the summed rank that are written out.
LONGEST = 16


@dataclass(frozen=True, slots=True)
class Recipe:
    """How an operand is made: for ``period`` values of ``over`` at a time, in vectors along ``along``.

    ``direct`` are the loads that are made into it and read by nothing else; ``operand`` is the C++ type by which it is
    multiplied. ``tiled`` says that its tensors lie in tiles of columns, one after another.
    """

    along: str
    over: str
    period: int
    direct: tuple[Load, ...]
    operand: str
    tiled: bool


def period(exprs: list[Expr], rank: str, size: int, least: int = 2) -> int | None:
    """After how many values of a rank its quotients and remainders repeat; None where that is long or does not divide
    the size of a tile. A multiple of ``least``, as values go in pairs or more."""
    found = least
    for e in exprs:
        for n in walk(e):
            match n:
                case Call(op="floordiv" | "mod", args=(Rank(name=name), Const(value=int() as by))) if name == rank:
                    if by < 1:
                        return None
                    found = lcm(found, by) if by <= LONGEST else found
    return found if found <= LONGEST and size % found == 0 else None


def at(e: Expr, rank: str, i: int, length: int) -> Expr:
    """An index i coordinates further, where that of ``rank`` is a multiple of ``length``, which i is below."""
    match e:
        case Rank(name=name) if name == rank:
            return Call("add", (e, _whole(i))) if i else e
        case Call(op="floordiv" | "mod" as op, args=(Rank(name=name) as r, Const(value=int() as by))) if name == rank:
            if by > 0 and length % by == 0:
                return _folded(Call("add", (Call(op, e.args), _whole(i // by)))) if op == "floordiv" else _whole(i % by)
            if by > 0 and by % length == 0:
                return e if op == "floordiv" else _folded(Call("add", (e, _whole(i))))
            return Call(op, (at(r, rank, i, length), e.args[1]))
    kids = children(e)
    return _folded(rebuild(e, tuple(at(k, rank, i, length) for k in kids))) if kids else e


def remainders_at(e: Expr, rank: str, i: int, length: int) -> Expr:
    """A value with the remainders of ``rank`` as numbers, where it is i coordinates past a multiple of ``length``.

    All else is left to where the rank stands then.
    """
    match e:
        case Call(op="mod", args=(Rank(name=name), Const(value=int() as by))) if name == rank:
            return _whole(i % by) if by > 0 and length % by == 0 else e
    kids = children(e)
    return _folded(rebuild(e, tuple(remainders_at(k, rank, i, length) for k in kids))) if kids else e


_EXACT: dict[str, Callable[[int, int], int]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
}


def _whole(n: int) -> Expr:
    """A number where a coordinate stood: it keeps that one's type, as a plain literal would take another's."""
    return Cast("i64", Const(n))


def number(e: Expr) -> int | None:
    """The number that a literal is, or a coordinate was."""
    match e:
        case Cast(dtype="i64", arg=Const(value=int() as value, kind="int")) | Const(value=int() as value, kind="int"):
            return value
    return None


def _folded(e: Expr) -> Expr:
    """Integer arithmetic on such numbers done, and nothing added."""
    if not isinstance(e, Call) or e.op not in _EXACT or not any(isinstance(a, Cast) for a in e.args):
        return e
    a, b = (number(x) for x in e.args)
    if a is not None and b is not None:
        return _whole(_EXACT[e.op](a, b))
    return e.args[0] if e.op == "add" and b == 0 else e


def multiple(e: Expr, n: int, known: Callable[[str], Expr | None]) -> bool:
    """Whether an integer is a multiple of n by its form; ``known`` gives what a tile was made from."""
    match e:
        case Const(value=int() as value):
            return value % n == 0
        case Call(op="mul", args=args):
            return any(multiple(a, n, known) for a in args)
        case Call(op="add" | "sub" | "minimum" | "maximum", args=args):
            return all(multiple(a, n, known) for a in args)
    inner = known(e.tensor) if isinstance(e, Access) and not e.indices else None
    return inner is not None and multiple(inner, n, known)
