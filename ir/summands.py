"""Chains of sums, which a kernel may add in any order: an f32 intermediate is no rounding point.

    R[p, w] = X[2 * p, w] + X[2 * p + 1, w]
    Y[p, q] = (R[p, 2 * q] + R[p, 2 * q + 1]) / 4

adds four elements, and those that cancel in R need not meet first. So the bound of Y counts the roundings of a sum of
four: they follow the elements, however small R is.
"""

from __future__ import annotations

from collections.abc import Callable

from .cascade import Access, Call, Const, Expr, literal_value

# Terms of a chain at most; of a longer one, the sums of what is inside it are terms.
LONGEST = 64


def summands(
    e: Expr, opened: Callable[[Access], Expr | None], dtype_of: Callable[[Expr], str] = lambda e: ""
) -> list[Expr]:
    """The terms that an expression adds up, signs aside; itself alone where that is no sum.

    Factors that stand for one number go to each term. ``opened`` gives what a map computes at an access to it. A sum
    in another type, by ``dtype_of``, is one term: its roundings are of that type.
    """
    dtype = dtype_of(e)
    found = _apart(e, opened, lambda t: dtype_of(t) == dtype, LONGEST)
    return found if len(found) <= LONGEST else [e]


def _apart(e: Expr, opened: Callable[[Access], Expr | None], within: Callable[[Expr], bool], room: int) -> list[Expr]:
    """As `summands`; more than ``room`` of them need not be all."""
    if not within(e):
        return [e]
    match e:
        case Call(op="add" | "sub", args=(a, b)):
            left = _apart(a, opened, within, room)
            return left + _apart(b, opened, within, room - len(left)) if len(left) <= room else left
        case Call(op="neg", args=(a,)):
            return _apart(a, opened, within, room)
        case Call(op="mul", args=(a, b)) if is_number(a):
            return _scaled(e, b, _apart(b, opened, within, room), lambda t: Call("mul", (a, t), loc=e.loc))
        case Call(op="mul" | "div" as op, args=(a, b)) if is_number(b):
            return _scaled(e, a, _apart(a, opened, within, room), lambda t: Call(op, (t, b), loc=e.loc))
        case Access() if e.indices and (inside := opened(e)) is not None:
            terms = _apart(inside, opened, within, room)
            return terms if len(terms) > 1 else [e]
        case _:
            return [e]


def _scaled(e: Expr, a: Expr, terms: list[Expr], by: Callable[[Expr], Expr]) -> list[Expr]:
    return [by(t) for t in terms] if len(terms) > 1 or terms[0] is not a else [e]


def is_number(e: Expr) -> bool:
    """Whether an expression is one number for all coordinates: a literal or a scalar parameter."""
    return isinstance(e, Const) or literal_value(e) is not None or (isinstance(e, Access) and not e.indices)
