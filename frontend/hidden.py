"""Masks of the least finite number: what they hide is left out, as by -inf, where every row provably sees something.

    x + where(k <= q, 0.0, -3.4e38)  →  where(k <= q, x, -inf)      before a softmax over k

A score that such a mask hides has an exponential of exactly 0, unless all of its row is hidden: then eager spreads the
row evenly, and the sum stays as it is written. So it does where another mask is added that may hide what this one
shows. Scores of a size that comes near the mask's own are not reckoned with.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import reduce
from typing import Any

from torch.fx import Node

from ..ir.cascade import Access, Call, Cast, Const, Expr, Rank, Reduce, free_ranks, literal_value, tensors_read
from ..ir.dtypes import DTYPES
from ..ir.ops import OPS
from ..passes.predicate import classify
from .nodes import ATTENTION, PRODUCTS, op_name, tensors_of
from .values import Value, Workspace, call, number, same, substitute

# What is added must be this low: an exponential of it beside any score that one computes with is 0.
LOW = -1e38
# A coordinate's greatest value, for proofs.
FAR = 1 << 40
# Operations whose results are never that low, whatever they are given.
BOUNDED = frozenset("tanh sigmoid erf sin cos abs exp exp2 sqrt rsqrt".split())
# Operations of ATen of which the same is said: scores, not masks; and rows that were learned.
SCORES = PRODUCTS | ATTENTION
SCORES |= frozenset(f"{op}.default" for op in ("_softmax", "native_layer_norm", "embedding", *BOUNDED))


def left_out(ws: Workspace, a: Value, axis: int) -> Value:
    """What a softmax over ``axis`` reads, with masks of the least finite number as -inf where that is the same."""
    if len(a.dims[axis]) != 1:
        return a
    masks: list[Expr] = []
    rest = _without_masks(a.expr, masks)
    if not masks or rest is None or _may_hide(ws, rest):
        return a
    seen = reduce(lambda x, y: call("and", x, y), masks)
    if not _every_row(ws, seen, a, axis):
        return a
    return Value(a.dims, call("where", seen, rest, number(-math.inf)), a.dtype)


def _without_masks(e: Expr, masks: list[Expr]) -> Expr | None:
    """A sum without its addends that are masks, None if there are no others; where those add 0 joins ``masks``."""
    seen = _seen(e)
    if seen is not None:
        masks.append(seen)
        return None
    match e:
        case Cast(dtype=dtype, arg=arg) if DTYPES[dtype].is_float:
            rest = _without_masks(arg, masks)
            return None if rest is None else Cast(dtype, rest)
        case Call(op="add", args=args):
            left = [x for x in (_without_masks(a, masks) for a in args) if x is not None]
            return call("add", *left) if len(left) == 2 else left[0] if left else None
        case _:
            return e


def _may_hide(ws: Workspace, e: Expr) -> bool:
    """Whether an element may be as low as a mask makes it. Sums of products are scores, and those are not."""
    match e:
        case Const():
            return not abs(e.value) < -LOW
        case Cast(arg=arg):
            return _may_hide(ws, arg)
        case Reduce(op="sum", args=(Call(op="mul"),)):
            return False
        case Reduce(args=args):
            return any(_may_hide(ws, x) for x in args)
        case Access(tensor=name):
            if name in ws.params:
                return DTYPES[ws.params[name][0]].is_float and ws.may_hide(name)
            written = next((x.expr for x in ws.einsums if any(o.name == name for o in x.outputs)), None)
            return written is None or _may_hide(ws, written)
        case Call(op="where", args=(_, a, b)):
            return _may_hide(ws, a) or _may_hide(ws, b)
        case Call(op=op) if op.startswith("log"):
            return True
        case Call(op=op, args=args) if op not in BOUNDED and OPS[op].rule not in ("compare", "logic"):
            return any(_may_hide(ws, x) for x in args)
        case _:
            return False


def may_hide(node: Node) -> bool:
    """Whether a tensor that comes from outside a region may hold what hides: a mask that a model is given, or one made
    of numbers as low as that."""
    seen: set[Node] = set()
    todo: list[Any] = [node]
    while todo:
        n = todo.pop()
        if not isinstance(n, Node):
            if isinstance(n, (list, tuple)):
                todo += n
            elif isinstance(n, float) and not abs(n) < -LOW:
                return True
            continue
        name = op_name(n)
        if n in seen or not any(f.is_floating_point() for f in tensors_of(n)):
            continue
        if n.op != "call_function" or name.startswith("log"):
            return True
        seen.add(n)
        if name not in SCORES:
            todo += [*n.args, *n.kwargs.values()]
        elif name in ("addmm.default", "baddbmm.default"):
            todo.append(n.args[0])
    return False


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
