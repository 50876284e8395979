"""Strips: operations that treat each row of a tile alike run a few rows at a time, so that what passes between them
stays in the nearest cache.

    dot s[q, k] = …          for each strip of 6 rows q:
    map p[q, k] = exp(…)  →     dot, map, fold, dot of 6 rows
    fold l[q], dot o[q, f]

Operations that lack the row's axis, such as loading the keys, go before the strip where nothing hinders them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ..ir.cascade import Rank, tensors_read, walk
from ..ir.tile import Dot, Fold, For, Load, Map, Op, Store, expressions, operations

# The rows that the dot's micro-kernel holds in registers; those of a strip whose rows lie across memory, which are
# brought near together; those that a machine may hold of either (`STRIP_ROWS` and `ROWS_ACROSS` in `tile_amx.h`); and
# those up to which a tile is not cut into strips.
ROWS, ROWS_ACROSS, MOST_ROWS, FEW = 6, 24, 32, 16


@dataclass(frozen=True, slots=True)
class Strip:
    """Operations that run strip by strip along ``axis``; without one, once."""

    axis: str | None
    ops: tuple[Op, ...]


def reads(op: Op) -> set[str]:
    """The tiles and tensors that an operation reads, its own tile among them if it adds to it."""
    match op:
        case Load(source=source, guard=guard):
            return set(tensors_read(source)) | (set(tensors_read(guard)) if guard is not None else set())
        case Map(expr=expr):
            return set(tensors_read(expr))
        case Fold(tile=tile, expr=expr, accumulate=accumulate):
            return set(tensors_read(expr)) | ({tile.name} if accumulate else set())
        case Dot(tile=tile, left=left, right=right, accumulate=accumulate):
            return {left, right} | ({tile.name} if accumulate else set())
        case Store(target=target, expr=expr):
            return set(tensors_read(expr)) | {t for i in target.indices for t in tensors_read(i)}
        case For(body=body):
            inner = set().union(*(reads(x) for x in body)) if body else set()
            return inner | {t for e in expressions(op) for t in tensors_read(e)} | set(op.meets or ())


def writes(op: Op) -> set[str]:
    """The tiles and tensors that an operation writes."""
    if isinstance(op, Store):
        return {op.target.tensor}
    if isinstance(op, For):
        return {t for x in operations(op.body) if not isinstance(x, For) for t in writes(x)}
    return {op.tile.name}


def strips(body: tuple[Op, ...], size: Callable[[str], int]) -> Iterator[Strip]:
    """A body in order, its operations grouped; ``size`` gives the greatest size of an axis in scope."""
    axis = _rows_of(body, size)
    pending: list[Op] = []
    ahead: list[Op] = []

    def flush() -> Iterator[Strip]:
        if ahead:
            yield Strip(None, tuple(ahead))
        if pending:
            whole = not any(isinstance(op, Dot) for op in pending)
            yield Strip(None if whole else axis, tuple(pending))
        ahead.clear()
        pending.clear()

    for op in body:
        if axis is not None and _is_row_by_row(op, axis):
            pending.append(op)
            continue
        touched = set().union(*(reads(x) | writes(x) for x in pending)) if pending else set()
        made = set().union(*(writes(x) for x in pending)) if pending else set()
        apart = axis is not None and not _mixes(op, axis)
        if pending and apart and not reads(op) & made and not writes(op) & touched:
            ahead.append(op)
            continue
        yield from flush()
        yield Strip(None, (op,))
    yield from flush()


def _rows_of(body: tuple[Op, ...], size: Callable[[str], int]) -> str | None:
    """The axis along which most of a body's dots have their rows; None if there is none that is worth strips."""
    votes: dict[str, int] = {}
    for op in body:
        if isinstance(op, Dot):
            for a in op.tile.axes[:-1]:
                if size(a) > FEW:
                    votes[a] = votes.get(a, 0) + 1
    return max(votes, key=lambda a: (votes[a], size(a))) if votes else None


def _is_row_by_row(op: Op, axis: str) -> bool:
    axes = op.axes if isinstance(op, Store) else op.tile.axes if not isinstance(op, For) else ()
    return axis in axes and not _mixes(op, axis)


def _mixes(op: Op, axis: str) -> bool:
    """Whether an operation needs more than one row at a time, or is none of a row."""
    match op:
        case For():
            return True
        case Fold(over=over) | Dot(over=over):
            if axis in over:
                return True
    own = set(op.axes if isinstance(op, Store) else op.tile.axes)
    return axis not in own and any(isinstance(n, Rank) and n.name == axis for e in expressions(op) for n in walk(e))


Row = Map | Fold | Store


def runs(ops: Sequence[Row], inner: Callable[[Row], tuple[str, ...]]) -> list[list[Row]]:
    """Maps, folds and stores of one row in groups that share a loop along it, scalars between; one fold at most each.

    A scalar that does not wait for the loop before it goes ahead of it, so that the loop may grow.
    """
    groups: list[list[Row]] = []
    loop: list[Row] = []
    for op in ops:
        made = set().union(*(writes(x) for x in loop)) if loop else set()
        if not inner(op):
            touched = made.union(*(reads(x) for x in loop)) if loop else set()
            if reads(op) & made or writes(op) & touched:
                groups.append(loop)
                loop = []
            groups.append([op])
            continue
        folded = {x.tile.name for x in loop if isinstance(x, Fold)}
        apart = loop and inner(loop[0]) != inner(op)
        if apart or (folded and isinstance(op, Fold)) or reads(op) & folded or writes(op) & made:
            groups.append(loop)
            loop = []
        loop = [*loop, op]
    return [g for g in [*groups, loop] if g]
