"""Kernels that contract nothing, beside kernels that do, in programs of few rows.

A rank's tile says how many rows of a contraction share its other operand. What is made of such rows alone, the sums
of a norm or what is merged of pieces, shares nothing: as tall as the contraction's, its programs would be too few for
all cores.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from ..ir.cascade import Access, free_ranks
from ..ir.tile import Dot, For, Load, Store, TileKernel, operations

# Rows of such a program.
FEW_ROWS = 16


def with_few_rows(kernels: Sequence[TileKernel]) -> list[TileKernel]:
    """The kernels of a program, those that contract nothing with fewer rows where others contract."""
    apart = rows_apart(kernels)
    return [
        replace(k, grid=tuple(replace(g, size=least(g.size)) if g.rank in ranks else g for g in k.grid))
        for k, ranks in zip(kernels, apart, strict=True)
    ]


def least(size: int) -> int:
    """A tile of rows that share nothing, for one of so many: a divisor, as quotients may count on the larger one."""
    return FEW_ROWS if size % FEW_ROWS == 0 else size


def rows_apart(kernels: Iterable[TileKernel]) -> list[frozenset[str]]:
    """The ranks of each kernel's grid whose tile need not be that of a contraction beside it."""
    kernels = list(kernels)
    contract = [any(isinstance(op, Dot) for op in operations(k.body)) for k in kernels]
    return [_rows(k) if any(contract) and not own else frozenset() for k, own in zip(kernels, contract, strict=True)]


def _rows(k: TileKernel) -> frozenset[str]:
    """The grid's ranks that go across memory and with which all varies that is more than a vector."""
    ops = list(operations(k.body))
    if any(isinstance(op, For) and (op.phase != "all" or op.meets is not None) for op in ops):
        return frozenset()  # bounds count from the ends of tiles
    loads = [op.source for op in ops if isinstance(op, Load)]
    accesses = [*loads, *(op.target for op in ops if isinstance(op, Store))]
    largest = max((len(a.indices) for a in accesses), default=0)
    along = set().union(*(free_ranks(a.indices[-1]) for a in accesses if largest == len(a.indices) > 0))
    matrices = [_ranks(a) for a in loads if len(_ranks(a)) > 1]
    return frozenset(g.rank for g in k.grid if g.rank not in along and all(g.rank in ranks for ranks in matrices))


def _ranks(a: Access) -> frozenset[str]:
    return frozenset().union(*map(free_ranks, a.indices))
