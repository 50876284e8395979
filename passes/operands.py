"""Operands that are stored: what rows of a product are made of, written down once instead of by each tile of columns.

    Y[m, n] = sum[k]((X[m, k] - mu[m]) * r[m] * W[k, n])

becomes a map ``Y_rows[m, k] = (X[m, k] - mu[m]) * r[m]`` and the product of two tensors. The map joins the kernel that
has its rows at hand, as that of a norm's sums.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod

from ..ir.cascade import Access, Call, Cascade, Cast, Einsum, Expr, Output, Rank, Reduce, free_ranks, tensors_read, walk
from ..ir.dtypes import DTYPES
from ..ir.ops import OPS
from ..ir.verify import scan_step
from .fresh import fresh
from .fuse import converted, fusible, is_map
from .inline import Inliner
from .tile_products import factors_of, multiplied

# The 16-bit type to which a product rounds both operands where one is of it (`Products._operand`).
SHORT = "bf16"

# Vector operations for each element from which storing may pay, those that making it again takes in all, and those of
# an exponential or the like. Of bf16 on a matrix unit, 1024³: rows of silu(a) b 2.6 -> 1.7 ms, of a norm 1.7 -> 1.45,
# but of a + b 1.8 -> 2.0.
WORK, REPEATED, SPECIAL = 3, 8, 8


def with_operands(
    c: Cascade, types: Mapping[str, str], extents: Mapping[str, int], tiles: Mapping[str, int]
) -> tuple[Cascade, frozenset[str]]:
    """The cascade with maps for what rows of products are made of, and the names of these.

    Only what several tiles of columns would make again, and what takes no more room than what it is made of. A product
    inside the loop that reads it meets its rows once. ``types`` are those of the cascade's tensors.
    """
    inside = fusible(c, extents)
    inlined: dict[str, tuple[tuple[str, ...], Expr]] = {}
    inline = Inliner(c, inlined)
    taken = {*c.ranks, *c.param_of, *(o.name for e in c.einsums for o in e.outputs)}
    einsums: list[Einsum] = []
    made: set[str] = set()
    for e in c.einsums:
        whole = replace(e, expr=inline(e.expr))
        if is_map(e) and e.name not in c.outputs:
            inlined[e.name] = (e.output.ranks, converted(whole, types))
        good = _is_product(e) and e.name not in inside
        found = _rows(c, whole, types, extents, tiles) if good else None
        if found is None:
            einsums.append(e)
            continue
        rows, others = found
        name = fresh(f"{e.name}_rows", taken)
        assert isinstance(e.expr, Reduce)
        ranks = tuple(r for r in (*e.output.ranks, *e.expr.ranks) if r in free_ranks(rows))
        einsums.append(Einsum((Output(name, ranks, _stored_in(others, types, c.numerics)),), rows))
        product = multiplied([Access(name, tuple(map(Rank, ranks))), *others])
        einsums.append(replace(e, expr=replace(e.expr, args=(product,))))
        made.add(name)
    return (replace(c, einsums=tuple(einsums)), frozenset(made)) if made else (c, frozenset())


def worth(c: Cascade, types: Mapping[str, str], extents: Mapping[str, int], tiles: Mapping[str, int]) -> bool:
    """Whether to make some rows again costs more than to store them: they are what work it is, and often."""
    changed, made = with_operands(c, types, extents, tiles)
    for e in changed.einsums:
        for name in made & set(tensors_read(e.expr)):
            column, steps = e.output.ranks[-1], _steps(changed.einsum_of[name].expr)
            again = -(-extents[column] // tiles[column]) - 1
            if steps >= WORK and steps * again >= REPEATED:
                return True
    return False


def _steps(e: Expr) -> int:
    """Vector operations for each element of a value that varies over all of its ranks."""
    every = [OPS[n.op].cost for n in walk(e) if isinstance(n, Call) and free_ranks(n) == free_ranks(e)]
    return sum(n * (SPECIAL if unit == "special" else 1) for unit, n in every)


def _is_product(e: Einsum) -> bool:
    plain = len(e.outputs) == 1 and isinstance(e.expr, Reduce) and e.expr.op == "sum"
    return plain and scan_step(e) is None and len(e.output.ranks) > 1


def _rows(
    c: Cascade, e: Einsum, types: Mapping[str, str], extents: Mapping[str, int], tiles: Mapping[str, int]
) -> tuple[Expr, list[Expr]] | None:
    """The factors of a product that do not vary over its columns, multiplied, and the others; None where they are not
    made, or are not made again."""
    assert isinstance(e.expr, Reduce)
    *_, column = e.output.ranks
    factors = factors_of(e.expr.args[0])
    mine = [f for f in factors if column not in free_ranks(f)]
    others = [f for f in factors if column in free_ranks(f)]
    if not mine or not others or extents.get(column, 1) <= tiles.get(column, extents.get(column, 1)):
        return None
    rows = multiplied(mine)
    over = set(e.expr.ranks)
    theirs = frozenset().union(*map(free_ranks, others))
    nodes = list(walk(rows))
    made = any(isinstance(n, Call) for n in nodes) and not any(isinstance(n, Reduce) for n in nodes)
    # What is rounded to 8 bits would have to be widened again and again.
    made = made and not (isinstance(rows, Cast) and DTYPES[rows.dtype].bits < 16)
    if not made or not over <= free_ranks(rows) or not over <= theirs or not free_ranks(rows) - theirs:
        return None
    return (rows, others) if _is_given(rows, c) and _is_small(rows, types, extents) else None


def _is_given(rows: Expr, c: Cascade) -> bool:
    """Whether a map reads results of other Einsums only by the row, and parameters where it varies most: what else is
    as large need not be there in memory at all."""
    reads = (n for n in walk(rows) if isinstance(n, Access))
    return all(n.tensor in c.param_of for n in reads if free_ranks(n) == free_ranks(rows))


def _is_small(rows: Expr, types: Mapping[str, str], extents: Mapping[str, int]) -> bool:
    """Whether a map, of elements of 16 bits, takes no more room than what it reads."""

    def count(e: Expr) -> int:
        return prod(max(1, extents.get(r, 1)) for r in free_ranks(e))

    reads = {n for n in walk(rows) if isinstance(n, Access)}
    return 16 * count(rows) <= sum(DTYPES[types[n.tensor]].bits * count(n) for n in reads)


def _stored_in(others: list[Expr], types: Mapping[str, str], numerics: str) -> str | None:
    """The type in which the product takes its rows."""
    alone = len(others) == 1 and isinstance(others[0], Access)
    short = alone and types[tensors_read(others[0])[0]] == SHORT and numerics != "strict"
    return SHORT if short else None
