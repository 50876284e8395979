"""Predicates over tiles: where an Iverson bracket is 0, where it is 1, and which part of a rank it can let through.

Take causal attention with a window of 256 keys, and a tile of queries 512..575:

    p = (q >= k) & (q - k < 256)
    classify(p, {"q": (512, 575), "k": (0, 255)})       # "outside": skipped
    classify(p, {"q": (512, 575), "k": (320, 511)})     # "full": no mask code
    classify(p, {"q": (512, 575), "k": (512, 575)})     # "partial": masked
    support(p, "k", {"q": (512, 575)}, {"k": 4096})     # (257, 575): the keys that some query sees
    loop_bounds(p, "k").touch[0]                        # max(q.first - 255) <= k <= min(q.last)
    loop_bounds(p, "k").full[0]                         # max(q.last - 255) <= k <= min(q.first)

so the kernel runs over the touched keys, and only those outside the full range carry mask code.

A box gives each rank's least and greatest coordinate, both included, as in `ir.interval`; a box with an empty side
holds nothing, so everything is outside it. Comparisons become ``form <= 0`` over affine forms, where a coordinate that
occurs twice is gathered; `//` and `%` by a constant are exact wherever the quotient is one. Truth is three-valued
(Kleene); what stays open is settled by branch and bound down to small boxes, whose points are tried. Within the budget
the answer is exact; beyond it, it is "partial", which is always safe.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from math import prod
from typing import Any, Literal

import numpy as np

from ..ir.cascade import Access, Const, Expr, Extent, Rank, negative, transform, walk
from ..ir.errors import UsageError
from ..ir.interval import SAFE, Interval
from .affine import Affine, Below, Every, Floor, Node, Some, forms_of, join, read, units_of
from .ranges import Bounds, Range, loop_bounds

__all__ = ["Bounds", "Range", "Verdict", "classify", "loop_bounds", "support"]

Verdict = Literal["outside", "full", "partial"]

# Bounds of integer tensors' elements over a tile: by access, or by tensor where all its accesses share them.
DataBounds = Mapping[str | Access, Interval]

# Boxes looked at, and points of a box that are tried one by one.
BUDGET, TRIED = 4096, 1 << 14


def classify(
    p: Expr,
    box: Mapping[str, Interval],
    extents: Mapping[str, int] | None = None,
    bounds: DataBounds | None = None,
) -> Verdict:
    """Whether a predicate holds nowhere in a box, everywhere, or neither (or perhaps neither).

    ``box`` maps ranks to their least and greatest coordinate; a rank without an entry spans its extent. ``bounds``
    bound the elements of integer tensors (1 and 0 for bools), as `Access` nodes or by tensor; unbounded data are open.
    """
    scope = _Scope.of(p, box, extents, bounds)
    if any(low > high for low, high in scope.box.values()):
        return "outside"
    seen: set[bool | None] = set()
    for truth in _leaves(read(scope.pinned(p)), scope):
        seen.add(truth)
        if None in seen or len(seen) == 2:
            return "partial"
    return "full" if seen == {True} else "outside"


def support(
    p: Expr,
    rank: str,
    box: Mapping[str, Interval],
    extents: Mapping[str, int] | None = None,
    bounds: DataBounds | None = None,
) -> Interval:
    """The least and greatest coordinate of a rank for which a predicate holds somewhere in the box; (0, -1) for none.

    The rank itself runs over its entry in the box, else over its extent. Exact as `classify` is, else an enclosure.
    """
    if rank not in box and rank not in (extents or {}):
        message = f"nothing tells between which coordinates `{rank}` runs"
        raise UsageError(message, rank=rank, hint=f"give its extent, as in extents={{{rank!r}: 64}}")
    scope = _Scope.of(p, {rank: (0, (extents or {}).get(rank, 0) - 1), **box}, extents, bounds)
    node = read(scope.pinned(p))

    def possible(span: Interval) -> bool:
        within = replace(scope, box={**scope.box, rank: span})
        return all(a <= b for a, b in within.box.values()) and any(t is not False for t in _leaves(node, within))

    first = _edge(scope.box[rank], possible, False)
    return (0, -1) if first is None else (first, _edge((first, scope.box[rank][1]), possible, True) or first)


def _edge(span: Interval, possible: Callable[[Interval], bool], last: bool) -> int | None:
    """The first or last coordinate of a span that is possible."""
    stack = [span]
    while stack:
        low, high = stack.pop()
        if low > high or not possible((low, high)):
            continue
        if low == high:
            return low
        middle = (low + high) // 2
        stack += [(low, middle), (middle + 1, high)] if last else [(middle + 1, high), (low, middle)]
    return None


@dataclass(frozen=True, slots=True)
class _Scope:
    box: Mapping[str, Interval]
    extents: Mapping[str, int]
    bounds: DataBounds

    @classmethod
    def of(
        cls, p: Expr, box: Mapping[str, Interval], extents: Mapping[str, int] | None, bounds: DataBounds | None
    ) -> _Scope:
        extents = extents or {}
        whole = {n.name: (0, extents[n.name] - 1) for n in walk(p) if isinstance(n, Rank) and n.name in extents}
        return cls({**whole, **box}, extents, bounds or {})

    def pinned(self, p: Expr) -> Expr:
        """The predicate with extents and data that have one known value replaced by it."""

        def visit(e: Expr) -> Expr:
            if isinstance(e, Extent) and e.rank in self.extents:
                return Const(self.extents[e.rank])
            if isinstance(e, Access) and (known := self.data(e)) is not None and known[0] == known[1]:
                return negative(int(known[0]))
            return e

        return transform(p, visit)

    def data(self, e: Access) -> Interval | None:
        return self.bounds.get(e, self.bounds.get(e.tensor))

    def span(self, form: Affine) -> Interval | None:
        """The least and greatest value of a form over the box; an enclosure where units depend on one another."""
        low = high = (form := self.settled(form)).constant
        for unit, q in form.terms:
            match unit:
                case Rank(name=name):
                    found = self.box.get(name)
                case Access():
                    found = self.data(unit)
                case Floor(of=of, by=by, rest=rest):
                    inside = self.span(of)
                    found = (0, by - 1) if rest else (inside[0] // by, inside[1] // by) if inside else None
                case _:
                    found = None
            if found is None:
                return None
            low, high = low + q * found[q < 0], high + q * found[q > 0]
        return low, high

    def settled(self, form: Affine) -> Affine:
        """The form with every quotient that is the same all over the box replaced by it."""
        for unit, _ in form.terms:
            if isinstance(unit, Floor) and (inside := self.span(unit.of)) is not None:
                times = inside[0] // unit.by
                if times == inside[1] // unit.by:
                    value = self.settled(unit.of) - Affine((), times * unit.by) if unit.rest else Affine((), times)
                    form = form.swap(unit, value)
        return form

    def trim(self, node: Node) -> Node:
        """Kleene: what is decided all over the box goes."""
        match node:
            case Below(form=form):
                found = self.span(form)
                return node if found is None or found[0] <= 0 < found[1] else found[1] <= 0
            case Every(parts=parts) | Some(parts=parts):
                return join([self.trim(x) for x in parts], isinstance(node, Every))
            case _:
                return node


def _leaves(root: Node, scope: _Scope) -> Iterator[bool | None]:
    """The truths that a predicate takes over a box, each as often as it comes up; None where it is not known."""
    stack: list[tuple[Node, Mapping[str, Interval]]] = [(root, scope.box)]
    for _ in range(BUDGET):
        if not stack:
            return
        node, box = stack.pop()
        here = replace(scope, box=box)
        node = here.trim(node)
        if isinstance(node, bool):
            yield node
            continue
        units = [u for form in forms_of(node) for u in units_of(form)]
        wide = {u.name: box[u.name] for u in units if isinstance(u, Rank) and u.name in box}
        wide = {r: (a, b) for r, (a, b) in wide.items() if a < b}
        if not wide:
            yield None
            continue
        closed = not _is_open(node) and all(isinstance(u, Floor | Rank) for u in units)
        if closed and prod(b - a + 1 for a, b in wide.values()) <= TRIED and _is_safe(node, here):
            grid = np.ix_(*(np.arange(a, b + 1) for a, b in wide.values()))
            values = _try(node, {**{r: a for r, (a, _) in box.items()}, **dict(zip(wide, grid, strict=True))})
            yield from (truth for truth in (True, False) if np.any(values == truth))
            continue
        rank, (a, b) = max(wide.items(), key=lambda item: item[1][1] - item[1][0])
        middle = (a + b) // 2
        stack += [(node, {**box, rank: (a, middle)}), (node, {**box, rank: (middle + 1, b)})]
    if stack:
        yield None


def _is_open(node: Node) -> bool:
    return node is None or (isinstance(node, Every | Some) and any(map(_is_open, node.parts)))


def _is_safe(node: Node, scope: _Scope) -> bool:
    """Whether no value that is computed leaves int64."""
    inner = [u.of for form in forms_of(node) for u in units_of(form) if isinstance(u, Floor)]
    for form in (*forms_of(node), *inner):
        sizes = [(scope.span(Affine(((u, 1),))), q) for u, q in form.terms]
        if any(s is None for s, _ in sizes):
            return False
        if sum(abs(q) * max(-s[0], s[1]) for s, q in sizes if s is not None) + abs(form.constant) >= SAFE:
            return False
    return True


def _try(node: Node, at: Mapping[str, Any]) -> Any:
    """The truth at every point of a grid of coordinates."""
    if isinstance(node, Below):
        return _value(node.form, at) <= 0
    assert isinstance(node, Every | Some)
    return reduce(np.logical_and if isinstance(node, Every) else np.logical_or, (_try(x, at) for x in node.parts))


def _value(form: Affine, at: Mapping[str, Any]) -> Any:
    total: Any = form.constant
    for unit, q in form.terms:
        if isinstance(unit, Floor):
            inside = _value(unit.of, at)
            total = total + q * (inside % unit.by if unit.rest else inside // unit.by)
        else:
            assert isinstance(unit, Rank)
            total = total + q * at[unit.name]
    return total
