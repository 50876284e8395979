"""Masks of the least finite number: what they hide is left out, as by -inf, where every row provably sees something.

    x + where(k <= q, 0.0, -3.4e38)  →  where(k <= q, x, -inf)      before a softmax over k

A score that such a mask hides has an exponential of exactly 0, unless all of its row is hidden: then eager spreads the
row evenly, and the sum stays as it is written. Scores of a size that comes near the mask's own are not reckoned with.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from ..ir.cascade import Call, Cast, Const, Expr, Rank, free_ranks, literal_value, tensors_read
from ..ir.dtypes import DTYPES
from ..passes.predicate import classify
from .values import Value, Workspace, call, number, same, substitute

# What is added must be this low: an exponential of it beside any score that one computes with is 0.
LOW = -1e38
# A coordinate's greatest value, for proofs.
FAR = 1 << 40


def left_out(ws: Workspace, a: Value, axis: int) -> Value:
    """What a softmax over ``axis`` reads, with masks of the least finite number as -inf where that is the same."""
    if len(a.dims[axis]) != 1:
        return a
    casts: list[str] = []
    e = a.expr
    while isinstance(e, Cast) and DTYPES[e.dtype].is_float:
        casts.append(e.dtype)
        e = e.arg
    if not (isinstance(e, Call) and e.op == "add"):
        return a
    for mask, rest in (e.args, e.args[::-1]):
        seen = _seen(mask)
        if seen is not None and _every_row(ws, seen, a, axis):
            for dtype in reversed(casts):
                rest = Cast(dtype, rest)
            return Value(a.dims, call("where", seen, rest, number(-math.inf)), a.dtype)
    return a


def _seen(mask: Expr) -> Expr | None:
    """Where a mask adds 0 rather than the least number, if it is such a mask of coordinates."""
    while isinstance(mask, Cast) and DTYPES[mask.dtype].is_float:
        mask = mask.arg
    if not (isinstance(mask, Call) and mask.op == "where") or tensors_read(mask):
        return None
    condition, yes, no = mask.args
    first, second = _added(yes), _added(no)
    if first == 0 and second is not None and second <= LOW:
        return condition
    return call("not", condition) if second == 0 and first is not None and first <= LOW else None


def _added(e: Expr) -> float | None:
    while isinstance(e, Cast) and DTYPES[e.dtype].is_float:
        e = e.arg
    value = literal_value(e)
    return None if value is None else float(value)


def _every_row(ws: Workspace, seen: Expr, a: Value, axis: int) -> bool:
    """Whether each row provably sees the first column, or the one of a coordinate of its own."""
    (column,) = a.dims[axis]
    box = dict.fromkeys(free_ranks(seen), (0, FAR))
    return any(classify(substitute(seen, {column: e}, ws.sizes), box) == "full" for e in _columns(ws, a, column))


def _columns(ws: Workspace, a: Value, column: str) -> Iterator[Expr]:
    yield Const(0)
    for r in a.ranks:
        if r != column and same(ws.sizes[r], ws.sizes[column]):
            yield Rank(r)
