"""Extents: how each rank gets its size.

A bare rank in a parameter binds its extent. Any other rank takes the largest extent with which the indices that mention
it stay in bounds: those that every point of the iteration space reads, if there are any; else those under a ``where``
that are the bare rank; else all under a ``where``.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from .cascade import Access, Call, Cascade, Const, Expr, Rank, children, first_mention, free_ranks, ranks_named
from .errors import InputError, VerifyError, did_you_mean
from .interval import Interval as Interval
from .interval import exact_interval
from .interval import interval as interval
from .interval import is_affine as is_affine
from .print import print_expr, print_param

LARGEST_EXTENT = 1 << 40


def scratch_sizes(indices: Iterable[Expr], extents: Mapping[str, int]) -> tuple[int | None, ...]:
    """The sizes of the axes of a tensor between kernels: ranks, or as many pieces as a constant says."""
    return tuple(int(i.value) if isinstance(i, Const) else extent_of(i, extents) for i in indices)


def extent_of(index: Expr, extents: Mapping[str, int]) -> int | None:
    """The number of values from 0 to the greatest that an index takes: ``k // 8`` is ceil(k / 8). None if not known."""
    ranks = free_ranks(index)
    if any(r not in extents for r in ranks_named(index)):
        return None
    if any(extents[r] == 0 for r in ranks):
        return 0
    span = exact_interval(index, {r: (0, extents[r] - 1) for r in ranks}, extents)
    return None if span is None else max(0, span[1] + 1)


@dataclass(frozen=True, slots=True)
class Use:
    """An index that mentions a rank: which axis of which tensor it reads, and whether a `where` guards it."""

    index: Expr
    tensor: str
    axis: int
    guarded: bool


def uses(c: Cascade) -> Iterator[Use]:
    """Every index of every access of the cascade that depends on ranks alone."""
    for p in c.params:
        for axis, index in enumerate(p.indices):
            if not isinstance(index, Rank | Const):
                yield Use(index, p.name, axis, False)
    for e in c.einsums:
        yield from _uses(e.expr, False)


def _uses(e: Expr, guarded: bool) -> Iterator[Use]:
    if isinstance(e, Access):
        for axis, index in enumerate(e.indices):
            if is_affine(index):
                yield Use(index, e.tensor, axis, guarded)
            yield from _uses(index, guarded)
    elif isinstance(e, Call) and e.op == "where":
        yield from _uses(e.args[0], guarded)
        yield from _uses(e.args[1], True)
        yield from _uses(e.args[2], True)
    else:
        for kid in children(e):
            yield from _uses(kid, guarded)


@dataclass(frozen=True, slots=True)
class Binding:
    """How a rank gets its extent: as an axis of a parameter, or as the largest that keeps ``within`` in bounds."""

    rank: str
    param: tuple[str, int] | None
    within: tuple[Use, ...] = ()


def bindings(c: Cascade) -> tuple[Binding, ...]:
    """How every rank gets its extent, in an order in which each needs only those before it.

    Raises `VerifyError` for a rank that nothing bounds.
    """
    bound: dict[str, Binding] = {}
    for p in c.params:
        for axis, index in enumerate(p.indices):
            if isinstance(index, Rank) and index.name not in bound:
                bound[index.name] = Binding(index.name, (p.name, axis))
    waiting = {r: i for i, r in enumerate(c.ranks) if r not in bound}
    if not waiting:
        return tuple(bound.values())
    found = _informative(c, waiting)
    needs = {(r, i): _needs(c, use, r) & waiting.keys() for r in waiting for i, use in enumerate(found[r])}
    needed_by: dict[str, list[tuple[str, int]]] = {r: [] for r in waiting}
    for key, others in needs.items():
        for r in others:
            needed_by[r].append(key)
    open_uses = {r: len(found[r]) for r in waiting}
    # Ranks of which every use is ready, and of which some is; each in order of first appearance.
    whole: list[tuple[int, str]] = []
    partly: list[tuple[int, str]] = []

    def ready(rank: str) -> None:
        open_uses[rank] -= 1
        heapq.heappush(partly, (waiting[rank], rank))
        if not open_uses[rank]:
            heapq.heappush(whole, (waiting[rank], rank))

    for (rank, _), others in needs.items():
        if not others:
            ready(rank)
    while len(bound) < len(c.ranks):
        queue = whole or partly
        if not queue:
            raise _unbounded(c, next(r for r in c.ranks if r not in bound))
        _, rank = heapq.heappop(queue)
        if rank in bound:
            continue
        within = tuple(use for i, use in enumerate(found[rank]) if not needs[rank, i])
        bound[rank] = Binding(rank, None, within)
        for key in needed_by[rank]:
            needs[key].discard(rank)
            if not needs[key] and key[0] not in bound:
                ready(key[0])
    return tuple(bound.values())


def _informative(c: Cascade, waiting: Mapping[str, int]) -> dict[str, list[Use]]:
    """For each rank the uses that set its extent."""
    every: dict[str, list[Use]] = {r: [] for r in waiting}
    for use in uses(c):
        axis = c.indices_of(use.tensor)[use.axis]
        for r in free_ranks(use.index):
            if r in every and (use.tensor in c.param_of or r not in ranks_named(axis)):
                every[r].append(use)
    for r, found in every.items():
        unguarded = [u for u in found if not u.guarded]
        bare = [u for u in found if isinstance(u.index, Rank)]
        every[r] = unguarded or bare or found
    return every


def _needs(c: Cascade, use: Use, rank: str) -> set[str]:
    """The other ranks whose extents must be known before the use bounds ``rank``; a parameter's axes always are."""
    others = set(ranks_named(use.index))
    if use.tensor not in c.param_of:
        others.update(ranks_named(c.indices_of(use.tensor)[use.axis]))
    return others - {rank}


def _unbounded(c: Cascade, rank: str) -> VerifyError:
    known = [*c.param_of, *c.einsum_of, *(r for r in c.ranks if r != rank)]
    return VerifyError(
        f"nothing gives rank `{rank}` an extent",
        rank=rank,
        hint=did_you_mean(rank, known, 0.7) or f"let a parameter have the axis `{rank}`, as in `X: f32[{rank}]`",
        loc=first_mention(c, rank),
    )


def given_ranks(c: Cascade) -> tuple[str, ...]:
    """The ranks whose extents a caller gives: those that a parameter has as an axis, alone or within an expression, as
    ``n // 64`` is one. All others follow from these."""
    sized = {r for p in c.params for i in p.indices for r in free_ranks(i)}
    return tuple(b.rank for b in bindings(c) if b.param is not None or b.rank in sized)


def resolve(
    c: Cascade, known: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]] | None = None
) -> dict[str, int]:
    """The extent of every rank, from extents given by name and, if given, the parameters' shapes.

    Raises `InputError` naming the rank, what was expected and what came: an extent that is missing or negative, two
    axes of one rank that differ, a shape of the wrong length, an axis that a derived extent contradicts.
    """
    shapes = shapes or {}
    extents: dict[str, int] = {}
    for name, value in known.items():
        if name not in c.ranks:
            raise InputError(f"the cascade has no rank `{name}`", hint="its ranks are " + ", ".join(c.ranks))
        extents[name] = _checked(name, value)
    _bind_axes(c, shapes, extents)
    for binding in bindings(c):
        if binding.rank in extents:
            continue
        if binding.param is not None:
            name, axis = binding.param
            raise InputError(
                f"rank `{binding.rank}` has no extent: it is axis {axis} of `{name}`",
                rank=binding.rank,
                hint=f"give it, as in --shape {binding.rank}=64",
            )
        extents[binding.rank] = _largest(c, binding, extents, shapes)
    _check_derived(c, shapes, extents)
    return {r: extents[r] for r in c.ranks}


def _checked(rank: str, value: object) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise InputError(
            f"the extent of rank `{rank}` is an integer", rank=rank, expected="an integer", got=repr(value)
        )
    number = value.__index__()
    if not 0 <= number <= LARGEST_EXTENT:
        raise InputError(
            f"rank `{rank}` cannot have extent {number}", rank=rank, expected=f"0 to {LARGEST_EXTENT}", got=str(number)
        )
    return int(number)


def _bind_axes(c: Cascade, shapes: Mapping[str, tuple[int, ...]], extents: dict[str, int]) -> None:
    origin: dict[str, str] = dict.fromkeys(extents, "the extent given")
    for p in c.params:
        if p.name not in shapes:
            continue
        shape = shapes[p.name]
        if len(shape) != len(p.indices):
            raise InputError(
                f"`{p.name}` has {len(shape)} {'axis' if len(shape) == 1 else 'axes'}, not {len(p.indices)}",
                expected=print_param(p),
                got=f"shape {tuple(shape)}",
            )
        for axis, (index, size) in enumerate(zip(p.indices, shape, strict=True)):
            if not isinstance(index, Rank):
                continue
            here = f"axis {axis} of `{p.name}`"
            if extents.setdefault(index.name, int(size)) != size:
                known = f"{extents[index.name]} by {origin[index.name]}"
                raise InputError(
                    f"rank `{index.name}` has two extents: {known}, {size} by {here}",
                    rank=index.name,
                    hint="axes that share a rank's name have one size",
                )
            origin.setdefault(index.name, here)


def _axis_size(
    c: Cascade, tensor: str, axis: int, extents: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]]
) -> int | None:
    if tensor in shapes:
        return int(shapes[tensor][axis])
    index = c.indices_of(tensor)[axis]
    return int(index.value) if isinstance(index, Const) else extent_of(index, extents)


def _largest(c: Cascade, binding: Binding, extents: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]]) -> int:
    """The largest extent of a rank that keeps every index of its binding within its axis."""
    best: int | None = None
    for use in binding.within:
        size = _axis_size(c, use.tensor, use.axis, extents, shapes)
        if size is None:
            continue
        found = _largest_within(use.index, binding.rank, size, extents)
        if found is not None:
            best = found if best is None else min(best, found)
    if best is None:
        raise InputError(
            f"rank `{binding.rank}` has no extent: no index bounds it",
            rank=binding.rank,
            hint=f"give it, as in --shape {binding.rank}=64",
        )
    return best


def _largest_within(index: Expr, rank: str, size: int, extents: Mapping[str, int]) -> int | None:
    box = {r: (0, extents[r] - 1) for r in free_ranks(index) if r != rank}
    if any(high < 0 for _, high in box.values()):
        # Another rank of the index is empty, so nothing is read: the rank itself spans what it would alone.
        box = {r: (0, max(0, high)) for r, (_, high) in box.items()}

    def span(extent: int) -> Interval | None:
        return exact_interval(index, {**box, rank: (0, extent - 1)}, {**extents, rank: extent})

    first = span(1)
    if first is None:
        return None

    def inside(found: Interval | None) -> bool:
        return found is not None and found[1] < size and found[0] >= min(0, first[0])

    def fits(extent: int) -> bool:
        # The enclosure often decides, and it costs the same for any extent.
        enclosure = interval(index, {**box, rank: (0, extent - 1)}, {**extents, rank: extent})
        return inside(enclosure) or inside(span(extent))

    if not fits(1):
        return 0
    low, high = 1, 2
    while fits(high):
        low, high = high, high * 2
        if high > LARGEST_EXTENT:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _check_derived(c: Cascade, shapes: Mapping[str, tuple[int, ...]], extents: Mapping[str, int]) -> None:
    for p in c.params:
        if p.name not in shapes:
            continue
        for axis, (index, size) in enumerate(zip(p.indices, shapes[p.name], strict=True)):
            expected = extent_of(index, extents) if not isinstance(index, Const) else int(index.value)
            if expected is not None and expected != size:
                where = ", ".join(f"{r}={extents[r]}" for r in ranks_named(index))
                raise InputError(
                    f"axis {axis} of `{p.name}` has size {size}, not {expected}",
                    expected=f"`{print_expr(index)}` = {expected}" + (f" with {where}" if where else ""),
                    got=f"shape {tuple(shapes[p.name])}",
                )


def shape_of(c: Cascade, tensor: str, extents: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of a parameter or output under the given extents."""
    shape = []
    for index in c.indices_of(tensor):
        size = int(index.value) if isinstance(index, Const) else extent_of(index, extents)
        if size is None:
            raise InputError(f"the shape of `{tensor}` is not known", hint="give the extents of its ranks")
        shape.append(size)
    return tuple(shape)
