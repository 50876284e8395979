"""Between which integers a value lies that is made of data: what a dtype holds, and what masks and shifts leave of it.

W >> 4 * (k % 8) & 15           0 … 15
(W & 15) - zero, zero: u8    -255 … 15
"""

from __future__ import annotations

from collections.abc import Mapping

from .cascade import Access, Call, Cast, Const, Expr, Extent, Rank
from .dtypes import DTYPES
from .extents import LARGEST_EXTENT
from .interval import Interval, combine
from .types import TypeChecker, settle

COORDINATE = (0, LARGEST_EXTENT)


def span(e: Expr, checker: TypeChecker, ranks: Mapping[str, Interval] | None = None) -> Interval | None:
    """An enclosure of an integer's values, ends included; None for what is no integer.

    Ranks lie anywhere in an extent unless ``ranks`` says where. What may leave its type and wrap is anywhere in it.
    """
    dtype = settle(checker.infer(e))
    if dtype == "bool":
        return 0, 1
    if not DTYPES[dtype].is_integer:
        return None
    whole = int(DTYPES[dtype].lowest), int(DTYPES[dtype].highest)
    found = _span(e, checker, ranks or {})
    return found if found is not None and whole[0] <= found[0] and found[1] <= whole[1] else whole


def _span(e: Expr, checker: TypeChecker, ranks: Mapping[str, Interval]) -> Interval | None:
    match e:
        case Const(value=int() as value, kind="int"):
            return value, value
        case Rank(name=name):
            return ranks.get(name, COORDINATE)
        case Extent():
            return COORDINATE
        case Access():
            return None
        case Cast(arg=arg):
            return span(arg, checker, ranks)
        case Call(op="where", args=(_, a, b)):
            yes, no = span(a, checker, ranks), span(b, checker, ranks)
            return None if yes is None or no is None else (min(yes[0], no[0]), max(yes[1], no[1]))
        case Call(op=op, args=args):
            spans = [span(a, checker, ranks) for a in args]
            known = [s for s in spans if s is not None]
            return _combined(op, known) if len(known) == len(spans) else None
    return None


def _combined(op: str, spans: list[Interval]) -> Interval | None:
    match op, spans:
        case "and", [(a, b), (c, d)] if a >= 0 or c >= 0:
            # A number that is not negative keeps some of its own bits at most.
            return 0, min(x for low, x in ((a, b), (c, d)) if low >= 0)
        case "or" | "xor", [(a, b), (c, d)] if a >= 0 and c >= 0:
            return 0, (1 << max(b, d).bit_length()) - 1
        case "rshift", [(a, b), (c, d)] if c >= 0:
            ends = (a >> c, a >> min(d, 64), b >> c, b >> min(d, 64))
            return min(ends), max(ends)
    return combine(op, spans)
