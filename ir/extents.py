"""Extents: how each rank gets its size, and which interval an index spans.

A bare rank in a parameter binds its extent. A rank that occurs only in other indices takes the largest extent with
which all of them stay in bounds; accesses under a `where` are guarded and count only where a rank has no other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from .cascade import Access, Call, Cascade, Const, Expr, Extent, Rank, Reduce, children, free_ranks, ranks_named, walk
from .errors import InputError, VerifyError

Interval = tuple[int, int]
LARGEST_EXTENT = 1 << 40


def interval(e: Expr, ranks: Mapping[str, Interval], extents: Mapping[str, int] | None = None) -> Interval | None:
    """The least and greatest value of an integer expression over a box of ranks; None where data decide.

    Exact for sums of distinct ranks times constants and for `//` and `%` of those by constants; an enclosure otherwise.
    """
    sizes = extents or {}
    match e:
        case Const(value=int() as value, kind="int"):
            return (value, value)
        case Rank(name=name):
            return ranks.get(name)
        case Extent(rank=rank):
            return (sizes[rank], sizes[rank]) if rank in sizes else None
        case Call(op=op, args=args):
            spans = [interval(a, ranks, sizes) for a in args]
            known = [s for s in spans if s is not None]
            return _combine(op, known) if len(known) == len(spans) else None
        case _:
            return None


def _combine(op: str, spans: list[Interval]) -> Interval | None:
    match op, spans:
        case "neg", [(a, b)]:
            return (-b, -a)
        case "add", [(a, b), (c, d)]:
            return (a + c, b + d)
        case "sub", [(a, b), (c, d)]:
            return (a - d, b - c)
        case "mul", [(a, b), (c, d)]:
            corners = (a * c, a * d, b * c, b * d)
            return (min(corners), max(corners))
        case "floordiv", [(a, b), (c, d)] if c > 0:
            corners = (a // c, a // d, b // c, b // d)
            return (min(corners), max(corners))
        case "mod", [(a, b), (c, d)] if c == d > 0:
            return (a % c, b % c) if a // c == b // c else (0, c - 1)
        case "minimum", [(a, b), (c, d)]:
            return (min(a, c), min(b, d))
        case "maximum", [(a, b), (c, d)]:
            return (max(a, c), max(b, d))
        case "abs", [(a, b)]:
            return (0 if a <= 0 <= b else min(abs(a), abs(b)), max(abs(a), abs(b)))
        case "lshift", [(a, b), (c, d)] if c == d and 0 <= c < 63:
            return (a << c, b << c)
        case "rshift", [(a, b), (c, d)] if c == d and 0 <= c < 63:
            return (a >> c, b >> c)
        case _:
            return None


def is_affine(e: Expr) -> bool:
    """Whether the index depends on ranks and extents alone, not on data."""
    return not isinstance(e, Access | Reduce) and all(is_affine(k) for k in children(e))


def extent_of(index: Expr, extents: Mapping[str, int]) -> int | None:
    """The number of values from 0 to the greatest that an index takes: ``k // 8`` is ceil(k / 8). None if not known."""
    ranks = free_ranks(index)
    if any(r not in extents for r in ranks_named(index)):
        return None
    if any(extents[r] == 0 for r in ranks):
        return 0
    span = interval(index, {r: (0, extents[r] - 1) for r in ranks}, extents)
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
        own = {o.name for o in e.outputs}
        yield from _uses(e.expr, False, own)


def _uses(e: Expr, guarded: bool, own: set[str]) -> Iterator[Use]:
    if isinstance(e, Access):
        for axis, index in enumerate(e.indices):
            if e.tensor not in own and is_affine(index):
                yield Use(index, e.tensor, axis, guarded)
            yield from _uses(index, guarded, own)
    elif isinstance(e, Call) and e.op == "where":
        yield from _uses(e.args[0], guarded, own)
        yield from _uses(e.args[1], True, own)
        yield from _uses(e.args[2], True, own)
    else:
        for kid in children(e):
            yield from _uses(kid, guarded, own)


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
    waiting = [r for r in c.ranks if r not in bound]
    every = list(uses(c)) if waiting else []
    by_rank: dict[str, list[Use]] = {r: [] for r in waiting}
    for use in every:
        for r in free_ranks(use.index):
            # T[p], where p is T's own axis, says nothing of p.
            if r in by_rank and not (use.index == Rank(r) and use.index == c.indices_of(use.tensor)[use.axis]):
                by_rank[r].append(use)
    for r, found in by_rank.items():
        # A guarded index may run out of bounds by design, so a plain one under the same guard says more than a shifted one.
        plain = [u for u in found if isinstance(u.index, Rank)]
        by_rank[r] = [u for u in found if not u.guarded] or plain or found
    while waiting:
        ready = {r: [u for u in by_rank[r] if _ready(c, u, r, bound)] for r in waiting}
        rank = next((r for r in waiting if ready[r] and len(ready[r]) == len(by_rank[r])), None)
        rank = rank or next((r for r in waiting if ready[r]), None)
        if rank is None:
            raise _unbounded(c, waiting[0])
        bound[rank] = Binding(rank, None, tuple(ready[rank]))
        waiting.remove(rank)
    return tuple(bound.values())


def _ready(c: Cascade, use: Use, rank: str, bound: Mapping[str, Binding]) -> bool:
    axis = c.indices_of(use.tensor)[use.axis] if use.axis < len(c.indices_of(use.tensor)) else None
    if axis is None:
        return False
    if use.tensor in c.param_of and axis == use.index:
        # A parameter's own derived axis, W[k // 8]: its size is known from the array.
        return all(r in bound or r == rank for r in ranks_named(use.index)) and rank in free_ranks(use.index)
    own_axis = use.tensor not in c.param_of
    return all(r in bound or r == rank for r in ranks_named(use.index)) and (
        not own_axis or all(r in bound for r in ranks_named(axis))
    )


def _unbounded(c: Cascade, rank: str) -> VerifyError:
    loc = next((e.loc for e in c.einsums if rank in ranks_named(e.expr) or rank in e.ranks), None)
    known = (
        [p.name for p in c.params] + [o.name for e in c.einsums for o in e.outputs] + [r for r in c.ranks if r != rank]
    )
    import difflib

    close = difflib.get_close_matches(rank, known, n=1, cutoff=0.7)
    hint = f"did you mean `{close[0]}`?" if close else f"let a parameter have the axis `{rank}`, as in `X: f32[{rank}]`"
    return VerifyError(f"nothing gives rank `{rank}` an extent", rank=rank, hint=hint, loc=loc)


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
            from .print import print_param

            raise InputError(
                f"`{p.name}` has {len(shape)} axes, not {len(p.indices)}",
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
    return extent_of(c.indices_of(tensor)[axis], extents)


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
    first = interval(index, {**box, rank: (0, 0)}, extents)
    if first is None:
        return None
    if not box and sum(isinstance(n, Rank) for n in walk(index)) > 1:
        return _counted_within(index, rank, size, extents)

    def fits(extent: int) -> bool:
        span = interval(index, {**box, rank: (0, extent - 1)}, extents)
        return span is not None and span[1] < size and span[0] >= min(0, first[0])

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


def _counted_within(index: Expr, rank: str, size: int, extents: Mapping[str, int]) -> int | None:
    """As `_largest_within`, where the index mentions its only rank more than once, as in ``d + 1 - 2 * (d % 2)``.

    Intervals of its parts enclose more than the index takes, so its values are counted one by one.
    """
    for at in range(4 * size + 1024):
        span = interval(index, {rank: (at, at)}, extents)
        if span is None or not 0 <= span[0] < size:
            return at
    return None


def _check_derived(c: Cascade, shapes: Mapping[str, tuple[int, ...]], extents: Mapping[str, int]) -> None:
    from .print import print_expr

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
