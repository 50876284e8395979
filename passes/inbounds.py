"""Whether every read of a cascade stays in its tensor, for given extents: what the oracle would refuse, no kernel does.

A read is decided by `classify`: the conditions of the `where`s around it, and an index below 0 or past the end, are
true together nowhere. Conditions and indices that hang on data are for the kernel to check as it runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ..ir.cascade import Access, Call, Cascade, Const, Einsum, Expr, Rank, children, free_ranks, walk
from ..ir.errors import EvaluationError, attach
from ..ir.extents import extent_of, is_affine
from ..ir.interval import interval
from ..ir.print import print_expr
from .predicate import classify, support


def check_reads(c: Cascade, extents: Mapping[str, int]) -> None:
    """Raise `EvaluationError` for a read outside its tensor that no condition on coordinates prevents."""
    box = {r: (0, n - 1) for r, n in extents.items()}
    for e in c.einsums:
        for access, conditions in _reads(e.expr, ()):
            if any(extents[r] == 0 for r in _ranks_around(e, access)):
                continue
            for axis, index in enumerate(access.indices):
                size = extent_of(c.indices_of(access.tensor)[axis], extents)
                if size is None or not is_affine(index):
                    continue
                span = interval(index, box, extents)
                if span is not None and span[0] >= 0 and span[1] < size:
                    continue
                _check(c, access, index, size, conditions, extents)


def always_read(c: Cascade) -> dict[Access, frozenset[str]]:
    """The reads under no condition, each with the ranks around it: where none of those is empty, it stays inside."""
    found: dict[Access, frozenset[str]] = {}
    for e in c.einsums:
        for access, conditions in _reads(e.expr, ()):
            if not conditions:
                around = frozenset(_ranks_around(e, access))
                found[access] = min(found.get(access, around), around, key=len)
    return found


def _ranks_around(e: Einsum, access: Access) -> set[str]:
    """The ranks of the space in which an access stands, as far as its emptiness may keep it from being read."""
    return {*e.ranks, *free_ranks(access)}


def _reads(e: Expr, conditions: tuple[Expr, ...]) -> Iterator[tuple[Access, tuple[Expr, ...]]]:
    """Every access, with what holds where it is read."""
    if isinstance(e, Call) and e.op == "where":
        condition, yes, no = e.args
        yield from _reads(condition, conditions)
        yield from _reads(yes, (*conditions, condition))
        yield from _reads(no, (*conditions, Call("not", (condition,))))
        return
    if isinstance(e, Access):
        yield e, conditions
    for kid in children(e):
        yield from _reads(kid, conditions)


def _check(
    c: Cascade, access: Access, index: Expr, size: int, conditions: tuple[Expr, ...], extents: Mapping[str, int]
) -> None:
    data = any(isinstance(n, Access) for condition in conditions for n in walk(condition))
    for outside in (Call("lt", (index, Const(0))), Call("ge", (index, Const(size)))):
        p: Expr = outside
        for condition in conditions:
            p = Call("and", (condition, p))
        if classify(p, {}, extents) == "outside" or data:
            continue
        at = _example(p, extents)
        where = ", ".join(f"{r}={n}" for r, n in at.items() if r in free_ranks(index))
        text = print_expr(index)
        inside = f"{text} >= 0" if outside.op == "lt" else f"{text} < {size}"
        error = EvaluationError(
            f"`{print_expr(access)}` is read outside `{access.tensor}`" + (f" at {where}" if where else ""),
            expected=f"`{text}` from 0 to {size - 1}",
            hint=f"put the read under a condition: where({inside}, {print_expr(access)}, 0.0)",
            loc=access.loc,
        )
        raise attach(error, c.source) if c.source is not None else error


def _example(p: Expr, extents: Mapping[str, int]) -> dict[str, int]:
    """Coordinates at which a predicate holds, found one rank after the other."""
    box: dict[str, tuple[int, int]] = {}
    for rank in sorted(n.name for n in walk(p) if isinstance(n, Rank)):
        if rank not in box:
            low, high = support(p, rank, box, extents)
            box[rank] = (low, low) if low <= high else (0, 0)
    return {r: low for r, (low, _) in box.items()}
