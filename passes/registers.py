"""How many bytes of registers one program of a tile kernel holds at once, as far as a tile program tells.

A tile lives in registers from where it is made to its last use; what only feeds matrix products lies in shared memory
where the matrix unit reads it from there. An operation that computes has its result beside what it reads, and a
gather an address for each element.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from math import prod

from ..ir.cascade import Access, Expr, Rank, walk
from ..ir.device import Device
from ..ir.dtypes import DTYPES
from ..ir.footprint import live_tiles
from ..ir.tile import Dot, Fold, For, Load, Map, Op, Store, Tile, TileKernel, integer_products, operations

# Bytes of an address, and elements of a row that share one.
ADDRESS, VECTOR = 8, 8

# Matrix units that read operands from shared memory.
SHARED = frozenset({"wgmma", "tcgen05"})

# The registers of a thread that loops, strides and positions take, whatever the tiles are; and those of a matrix unit
# that takes operands from registers, or of products without one.
PLAIN, OPERANDS = 40, 80


def registers_free(k: TileKernel, device: Device, warps: int) -> int:
    """Bytes of registers that the tiles of one program of a kernel may take."""
    threads = warps * device.warp
    dots = [op for op in operations(k.body) if isinstance(op, Dot)]
    shared = bool(device.features & SHARED) and all(op.operand is not None for op in dots)
    taken = PLAIN if shared or not dots else PLAIN + OPERANDS
    return 4 * threads * (min(device.registers_per_thread, device.registers_per_unit // threads) - taken)


def register_bytes(k: TileKernel, device: Device) -> int:
    """The most bytes that the tiles of one program take of registers at once."""
    exact = integer_products(k)
    shared = _shared(k, exact) if device.features & SHARED else frozenset()
    most = 0
    for op, tiles, sizes in live_tiles(k):
        held = sum(_bytes(t, sizes) for t in tiles if t.name not in shared)
        most = max(most, held + (0 if op in exact else _beside(op, sizes)))
    return most


def _bytes(t: Tile, sizes: Mapping[str, int]) -> int:
    return prod(_up(sizes[a]) for a in t.axes) * max(1, DTYPES[t.dtype].bits // 8)


def _shared(k: TileKernel, exact: Collection[Op]) -> frozenset[str]:
    """Tiles that loads make and only dots read."""
    loads = {op.tile.name for op in operations(k.body) if isinstance(op, Load)}
    made = {op.tile.name for op in operations(k.body) if isinstance(op, Map | Fold | Dot)}
    read = {
        n.tensor
        for op in operations(k.body)
        if op not in exact
        for e in _exprs(op)
        for n in walk(e)
        if isinstance(n, Access)
    }
    return frozenset(loads - made - read)


def _beside(op: Op, sizes: Mapping[str, int]) -> int:
    """Bytes that an operation takes beside the tiles that it reads and makes."""
    match op:
        case Fold(tile=tile, over=over, expr=expr) if not isinstance(expr, Access):
            return 8 * prod(_up(sizes[a]) for a in (*tile.axes, *over))
        case Store(axes=axes, expr=expr) if not isinstance(expr, Access):
            return 4 * prod(_up(sizes[a]) for a in axes)
        case Dot(tile=tile, annihilates=True):
            # The rare part: a result of its own, and operands one by one.
            return 8 * prod(_up(sizes[a]) for a in tile.axes)
        case Load(tile=tile, source=source):
            joint = any(
                len({n.name for n in walk(i) if isinstance(n, Rank)} & {*tile.axes}) > 1 for i in source.indices
            )
            return ADDRESS * prod(_up(sizes[a]) for a in tile.axes) // (1 if joint else VECTOR)
    return 0


def _exprs(op: Op) -> Iterator[Expr]:
    match op:
        case Load(source=source, guard=guard):
            yield from source.indices
            if guard is not None:
                yield guard
        case Map(expr=expr) | Fold(expr=expr):
            yield expr
        case Store(target=target, expr=expr):
            yield from target.indices
            yield expr
        case For(lower=lower, upper=upper):
            yield from (e for e in (lower, upper) if e is not None)


def _up(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()
