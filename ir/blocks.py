"""How the oracle cuts its work, so that no array that it makes on the way is large.

An expression makes one array for each of its nodes, over the ranks that the node depends on. Where one is too large,
its longest axis is halved: blocks come out square, which is what a contraction reads least for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise

import numpy as np

from .cascade import Call, Expr, Reduce, children, free_ranks, walk

Box = tuple[tuple[int, int], ...]
# A rank, and the identity of the reduction that binds it (0 for the output's own), as inner ones shadow.
Axis = tuple[str, int]

# Elements of the largest temporary array.
BLOCK = 1 << 22


def tiles(box: Box, steps: tuple[int, ...]) -> Iterator[Box]:
    """The boxes of at most the given steps that make up a box, the last axis fastest."""
    cuts = [list(pairwise([*range(a, b, step), b])) for (a, b), step in zip(box, steps, strict=True)]
    for place in np.ndindex(*(len(c) for c in cuts)):
        yield tuple(c[i] for c, i in zip(cuts, place, strict=True))


def ordered(box: Box, copies: int) -> tuple[int, ...]:
    """Steps whose tiles, one after another, hold the coordinates in order; ``copies`` elements stand at each."""
    steps: list[int] = []
    room = max(1, BLOCK // max(1, copies))
    for a, b in reversed(box):
        steps.append(max(1, min(b - a, room)))
        room //= max(1, b - a)
    return tuple(reversed(steps))


def squares(
    e: Expr,
    outer: Mapping[str, int],
    extents: Mapping[str, int],
    contracts: Callable[[Reduce], bool],
    keep: bool = False,
) -> dict[Axis, int]:
    """Steps for each axis of an expression with which every array fits.

    ``outer`` has the sizes of the ranks in scope, which ``keep`` leaves whole; ``contracts`` tells which sums of
    products make no array of the products.
    """
    reductions = [n for n in walk(e) if isinstance(n, Reduce)]
    steps: dict[Axis, int] = {(r, 0): size for r, size in outer.items()}
    steps.update({(r, id(n)): extents[r] for n in reductions for r in n.ranks})
    if math.prod(max(1, size) for size in steps.values()) <= BLOCK:
        return steps
    whole = {(r, id(n)) for n in reductions if n.op == "argmax" for r in n.ranks}
    if keep:
        whole.update((r, 0) for r in outer)
    for axes in _arrays(e, {r: (r, 0) for r in outer}, frozenset(), contracts):
        able = sorted(axes - whole, key=lambda a: list(steps).index(a))
        while math.prod(steps[a] for a in axes) > BLOCK and any(steps[a] > 1 for a in able):
            longest = max(able, key=lambda a: steps[a])
            steps[longest] = -(-steps[longest] // 2)
    return steps


def _arrays(
    e: Expr, axes: Mapping[str, Axis], guard: frozenset[Axis], contracts: Callable[[Reduce], bool]
) -> Iterator[frozenset[Axis]]:
    """The axes of every array that an expression makes, and those of the guards that `where` puts on its branches."""
    yield frozenset(axes[r] for r in free_ranks(e))
    match e:
        case Reduce():
            inner = {**axes, **{r: (r, id(e)) for r in e.ranks}}
            contracted = contracts(e)
            for arg in factors(e.arg) if contracted else e.args:
                yield from _arrays(arg, inner, guard, contracts)
                if not contracted:
                    yield frozenset(inner[r] for r in free_ranks(arg).union(e.ranks))
        case Call(op="where"):
            condition, *branches = e.args
            yield from _arrays(condition, axes, guard, contracts)
            narrowed = guard | {axes[r] for r in free_ranks(condition)}
            yield narrowed
            for branch in branches:
                yield from _arrays(branch, axes, narrowed, contracts)
        case _:
            for child in children(e):
                yield from _arrays(child, axes, guard, contracts)


def factors(e: Expr) -> list[Expr]:
    """The factors of a product, left to right."""
    if isinstance(e, Call) and e.op == "mul":
        return factors(e.args[0]) + factors(e.args[1])
    return [e]
