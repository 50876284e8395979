"""The loops of a streamed rank: only where a bracket lets something through, those that need no mask apart.

sum[k](where(q >= k, P[q, k], 0.0))  with queries 64..127 in the tile gives two loops,
for k in 0 … 64 (full)               whose body reads P[q, k] alone, and
for k in 64 … 128 (partial)          whose body tests q >= k; keys past 127 are never visited.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import reduce
from math import inf

from ..ir.cascade import (
    Access,
    Call,
    Const,
    Expr,
    Extent,
    Rank,
    Reduce,
    children,
    free_ranks,
    literal_value,
    rebuild,
    transform,
)
from .ranges import Bounds, Range, loop_bounds

ZERO, ONE = Const(0), Const(1)


@dataclass(frozen=True, slots=True)
class Phase:
    """One loop: coordinates from ``lower`` to before ``upper`` (None: the whole rank), and what always holds there.

    ``own`` bounds what one coordinate of each tiled rank lets through, which those ranks stand for; ``meets`` are
    tensors' elements, of the rows and of the loop, that have to be equal.
    """

    name: str = "all"
    lower: Expr | None = None
    upper: Expr | None = None
    known: frozenset[Expr] = frozenset()
    own: tuple[Expr | None, Expr | None] = (None, None)
    meets: tuple[Access, Access] | None = None


ALL = Phase()


def conjuncts(p: Expr) -> Iterator[Expr]:
    """The parts of a conjunction."""
    if isinstance(p, Call) and p.op == "and":
        for a in p.args:
            yield from conjuncts(a)
    else:
        yield p


def bracket(op: str, element: Expr) -> frozenset[Expr]:
    """Conditions without which an element leaves a reduction as it is: those of brackets around it or its factors."""
    match element:
        case Call(op="where", args=(p, value, other)) if op in _NOTHING and literal_value(other) == _NOTHING[op]:
            return frozenset(conjuncts(p)) | bracket(op, value)
        case Call(op="mul", args=args) if op == "sum":
            return frozenset().union(*(bracket(op, a) for a in args))
        case Call(op="div" | "neg", args=args) if op == "sum":
            return bracket(op, args[0])
    return frozenset()


_NOTHING = {"sum": 0.0, "max": -inf, "min": inf}


def without(e: Expr, known: Collection[Expr], ranks: Collection[str]) -> Expr:
    """The expression where conditions on the ranks are known to hold; reductions that bind these are left alone."""
    if not known or (isinstance(e, Reduce) and set(e.ranks) & set(ranks)):
        return e
    kids = children(e)
    if kids:
        e = rebuild(e, tuple(without(k, known, ranks) for k in kids))
    if not isinstance(e, Call) or e.op != "where":
        return e
    rest = [c for c in conjuncts(e.args[0]) if c not in known]
    if not rest:
        return e.args[1]
    return Call("where", (reduce(lambda a, b: Call("and", (a, b)), rest), *e.args[1:]))


def phases(
    conditions: Iterable[Expr],
    rank: str,
    data: Collection[str],
    end: Callable[[str, bool], Expr],
    align: int,
    one: Callable[[str, bool], Expr] | None = None,
) -> tuple[Phase, ...]:
    """The loops over a rank outside which the conditions fail, in order, apart from each other.

    ``end(r, last)`` is the expression of a rank's first or last coordinate in the tile, ``one(r, last)`` the same for a
    tile of one row. Loops that need no mask are cut to multiples of ``align``, so that their tiles are filled.
    """
    parts = sorted(conditions, key=repr)
    if not parts:
        return (ALL,)
    found = loop_bounds(reduce(lambda a, b: Call("and", (a, b)), parts), rank, data)
    known = frozenset(parts)
    # Ranges that start with the rank come first: what follows begins where they end, so none is visited twice.
    early = tuple(t for t in found.touch if not _positive(t.lower))
    late = tuple(t for t in found.touch if _positive(t.lower))
    groups: list[Phase] = []
    start: Expr = ZERO
    for touch in (early, late):
        if not touch:
            continue
        if touch is late and early and any(not t.upper for t in early):
            break
        hull = Bounds(touch, (), found.exact).hull
        full = [f for f in found.full if bool(_positive(f.lower)) == (touch is late)] or list(found.full)
        loops, start = _group(hull, full, start, known, end, align)
        groups += loops
    if one is not None:
        own = _own(Bounds(found.touch, (), found.exact).hull, one)
        groups = [replace(g, own=own) if g.name == "partial" else g for g in groups]
    return tuple(groups) or (Phase("partial", ZERO, ZERO),)


def _own(touch: Range, one: Callable[[str, bool], Expr]) -> tuple[Expr | None, Expr | None]:
    """What a range is for one coordinate of every tiled rank; None for an end that does not depend on it."""
    low, high = _most([_ends(b, one) for b in _positive(touch.lower)]), _least([_after(b, one) for b in touch.upper])
    return (low if free_ranks(low) else None, high if high is not None and free_ranks(high) else None)


def _positive(bounds: Iterable[Expr]) -> tuple[Expr, ...]:
    """Lower bounds that may bind."""
    return tuple(b for b in bounds if not ((n := literal_value(b)) is not None and n <= 0))


def _group(
    touch: Range,
    full: list[Range],
    start: Expr,
    known: frozenset[Expr],
    end: Callable[[str, bool], Expr],
    align: int,
) -> tuple[list[Phase], Expr]:
    """The loops of one range, from ``start`` on: partial, full, partial; those that are always empty left out."""
    low = _most([start, *(_ends(b, end) for b in _positive(touch.lower))])
    high = _least([_after(b, end) for b in touch.upper])
    best = _widest(full)
    if best is None:
        return [_phase("partial", low, high, frozenset())], high or ZERO
    inner_low = _most([low, *(_ends(b, end) for b in _positive(best.lower) if b not in touch.lower)])
    loops = []
    if inner_low != low:
        inner_low = _up(inner_low, align)
        loops.append(_phase("partial", low, _least([inner_low, *([high] if high is not None else [])]), frozenset()))
    bounds = [_after(b, end) for b in best.upper if b not in touch.upper]
    if not bounds and not best.when:
        loops.append(_phase("full", inner_low, high, known))
        return loops, high or ZERO
    inside = all(b in best.upper or _at_first(b) in best.upper for b in touch.upper)
    limits = [_after(b, end) for b in best.upper] if inside else bounds
    inner_high = _least([*limits, *([high] if high is not None and not inside else [])])
    inner_high = _down(inner_high, align) if inner_high is not None else None
    if best.when:
        holds = reduce(lambda a, b: Call("and", (a, b)), (transform(w, lambda n: _pin(n, end)) for w in best.when))
        rank_end = inner_high if inner_high is not None else Const(1 << 62)
        inner_high = Call("where", (holds, rank_end, ZERO))
    loops.append(_phase("full", inner_low, inner_high, known))
    after = inner_low if inner_high is None else _most([inner_low, inner_high])
    loops.append(_phase("partial", after, high, frozenset()))
    return loops, high or ZERO


def _phase(name: str, low: Expr, high: Expr | None, known: frozenset[Expr]) -> Phase:
    return Phase(name, None if low == ZERO else low, high, known)


def _widest(full: list[Range]) -> Range | None:
    """One range without masks: the union of those that start alike, else the last."""
    if len(full) > 1 and len({f.lower for f in full}) == 1 and not any(f.when for f in full):
        if all(len(f.upper) == 1 for f in full):
            return Range(full[0].lower, (reduce(lambda a, b: Call("maximum", (a, b)), [f.upper[0] for f in full]),))
    return full[-1] if full else None


def _at_first(b: Expr) -> Expr:
    """A bound with the least coordinates of tiles in place of the greatest."""
    return transform(
        b, lambda n: Rank(n.name[:-4] + "first") if isinstance(n, Rank) and n.name.endswith(".last") else n
    )


# Bounds as expressions over what the kernel knows


def _pin(e: Expr, end: Callable[[str, bool], Expr]) -> Expr:
    if isinstance(e, Rank) and "." in e.name:
        rank, _, which = e.name.partition(".")
        return end(rank, which == "last")
    if isinstance(e, Access) and "." in e.tensor:
        return Access(e.tensor.partition(".")[0], e.indices)
    return e


def _ends(e: Expr, end: Callable[[str, bool], Expr]) -> Expr:
    return transform(e, lambda n: _pin(n, end))


def _after(e: Expr, end: Callable[[str, bool], Expr]) -> Expr:
    """The coordinate after an inclusive bound."""
    match e:
        case Rank() if e.name.endswith(".last"):
            return _plus_one(end(e.name.partition(".")[0], True))
        case Call(op="maximum" | "minimum" as op, args=(a, b)):
            return Call(op, (_after(a, end), _after(b, end)))
    return _plus_one(_ends(e, end))


def _plus_one(e: Expr) -> Expr:
    match e:
        case Call(op="sub", args=(a, Const(value=n))) if isinstance(n, int) and n >= 1:
            return a if n == 1 else Call("sub", (a, Const(n - 1)))
        case Call(op="add", args=(a, Const(value=n))) if isinstance(n, int):
            return Call("add", (a, Const(n + 1)))
        case Call(op="minimum", args=(a, b)):
            return Call("minimum", (_plus_one(a), _plus_one(b)))
        case Const(value=n) if isinstance(n, int):
            return Const(n + 1)
    return Call("add", (e, ONE))


def _most(parts: Iterable[Expr]) -> Expr:
    kept = [p for p in dict.fromkeys(parts) if p != ZERO]
    return reduce(lambda a, b: Call("maximum", (a, b)), kept) if kept else ZERO


def _least(parts: Iterable[Expr]) -> Expr | None:
    kept = list(dict.fromkeys(parts))
    return reduce(lambda a, b: Call("minimum", (a, b)), kept) if kept else None


def _down(e: Expr, by: int) -> Expr:
    return Call("mul", (Call("floordiv", (e, Const(by))), Const(by))) if by > 1 else e


def _up(e: Expr, by: int) -> Expr:
    return _down(Call("add", (e, Const(by - 1))), by)


def tile_end(rank: str, size: int, last: bool, extent: Expr | None = None) -> Expr:
    """A rank's first or last coordinate in the tile at hand, whose first one the rank's name stands for in bounds."""
    if size == 1 or not last:
        return Rank(rank)
    reach = Call("add", (Rank(rank), Const(size - 1)))
    return Call("minimum", (reach, Call("sub", (extent or Extent(rank), ONE))))
