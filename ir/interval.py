"""Interval arithmetic on indices: between which integers an index lies as its ranks run over a box."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from functools import reduce
from typing import Any

import numpy as np

from .cascade import Access, Call, Const, Expr, Extent, Rank, Reduce, children, free_ranks, walk

Interval = tuple[int, int]

# Coordinates tried one by one where interval arithmetic is not exact, and the magnitude that int64 holds safely.
MAX_TRIED = 1 << 20
SAFE = 1 << 62


def is_affine(e: Expr) -> bool:
    """Whether the index depends on ranks and extents alone, not on data."""
    return not isinstance(e, Access | Reduce) and all(is_affine(k) for k in children(e))


def interval(e: Expr, ranks: Mapping[str, Interval], extents: Mapping[str, int] | None = None) -> Interval | None:
    """An enclosure of an integer expression over a box of ranks, ends included; None where data decide.

    It is exact, its ends attained, where each rank occurs once and under no ``%``.
    """
    return _span(e, ranks, extents or {})


def slope(e: Expr, rank: str) -> int | None:
    """How an integer expression moves with a rank: 1 if it never falls, -1 if it never rises, 0 if it does not depend
    on it; None where no rule tells."""
    match e:
        case Rank(name=name):
            return int(name == rank)
        case Call(op="neg", args=(a,)):
            found = slope(a, rank)
            return None if found is None else -found
        case Call(op="sub", args=(a, b)):
            return slope(Call("add", (a, Call("neg", (b,)))), rank)
        case Call(op="add" | "minimum" | "maximum", args=(a, b)):
            found, other = slope(a, rank), slope(b, rank)
            return None if found is None or other is None or found * other < 0 else found or other
        case Call(op="mul" | "floordiv", args=(a, Const(value=int() as by))) if by > 0:
            return slope(a, rank)
        case Call(op="mul", args=(Const(value=int() as by), a)) if by > 0:
            return slope(a, rank)
    return 0 if rank not in free_ranks(e) else None


def exact_interval(e: Expr, ranks: Mapping[str, Interval], extents: Mapping[str, int]) -> Interval | None:
    """The least and greatest value of an index over a box: `interval`, with entangled ranks tried value by value.

    Beyond `MAX_TRIED` coordinates it is the enclosure.
    """
    tangled = [r for r in entangled(e) if r in ranks]
    enclosure = interval(e, ranks, extents)
    tried = math.prod(ranks[r][1] - ranks[r][0] + 1 for r in tangled)
    if not tangled or enclosure is None or not 0 < tried <= MAX_TRIED:
        return enclosure
    spans = [interval(node, ranks, extents) for node in walk(e)]
    if any(s is None or max(-s[0], s[1]) >= SAFE for s in spans):
        return enclosure
    grid = np.ix_(*(np.arange(ranks[r][0], ranks[r][1] + 1) for r in tangled))
    span = _span(e, {**ranks, **{r: (g, g) for r, g in zip(tangled, grid, strict=True)}}, extents)
    return None if span is None else (int(np.min(span[0])), int(np.max(span[1])))


def entangled(e: Expr) -> list[str]:
    """The ranks that occur twice or under a ``%``: there interval arithmetic encloses more than what is attained."""
    times = Counter(n.name for n in walk(e) if isinstance(n, Rank))
    for node in walk(e):
        if isinstance(node, Call) and node.op == "mod":
            times.update(n.name for n in walk(node) if isinstance(n, Rank))
    return [r for r, count in times.items() if count > 1]


def _span(e: Expr, ranks: Mapping[str, tuple[Any, Any]], extents: Mapping[str, int]) -> tuple[Any, Any] | None:
    """Ends of an interval, as integers or, over a grid of coordinates, as arrays of them."""
    match e:
        case Const(value=int() as value, kind="int"):
            return value, value
        case Rank(name=name):
            return ranks.get(name)
        case Extent(rank=rank):
            return (extents[rank], extents[rank]) if rank in extents else None
        case Call(op=op, args=args):
            spans = [_span(a, ranks, extents) for a in args]
            known = [s for s in spans if s is not None]
            return combine(op, known) if len(known) == len(spans) else None
        case _:
            return None


def combine(op: str, spans: list[tuple[Any, Any]]) -> tuple[Any, Any] | None:
    """The interval of an operation on intervals; None where there is no rule."""
    match op, spans:
        case "neg", [(a, b)]:
            return -b, -a
        case "add", [(a, b), (c, d)]:
            return a + c, b + d
        case "sub", [(a, b), (c, d)]:
            return a - d, b - c
        case "mul", [(a, b), (c, d)]:
            corners = (a * c, a * d, b * c, b * d)
            return _least(*corners), _greatest(*corners)
        case "floordiv", [(a, b), (int() as c, int() as d)] if c > 0:
            corners = (a // c, a // d, b // c, b // d)
            return _least(*corners), _greatest(*corners)
        case "mod", [(a, b), (int() as c, int() as d)] if c == d > 0:
            within = a // c == b // c
            return _choose(within, a % c, 0 * a), _choose(within, b % c, 0 * b + c - 1)
        case "minimum", [(a, b), (c, d)]:
            return _least(a, c), _least(b, d)
        case "maximum", [(a, b), (c, d)]:
            return _greatest(a, c), _greatest(b, d)
        case "abs", [(a, b)]:
            return _greatest(a, -b, 0), _greatest(-a, b)
        case "lshift", [(a, b), (int() as c, int() as d)] if c == d and 0 <= c < 63:
            return a << c, b << c
        case "rshift", [(a, b), (int() as c, int() as d)] if c == d and 0 <= c < 63:
            return a >> c, b >> c
        case _:
            return None


def _least(*values: Any) -> Any:
    return min(values) if all(isinstance(v, int) for v in values) else reduce(np.minimum, values)


def _greatest(*values: Any) -> Any:
    return max(values) if all(isinstance(v, int) for v in values) else reduce(np.maximum, values)


def _choose(condition: Any, a: Any, b: Any) -> Any:
    return np.where(condition, a, b) if isinstance(condition, np.ndarray) else a if condition else b
