"""How many bytes of registers one program of a tile kernel holds at once, as far as a tile program tells.

A tile lives in registers from where it is made to its last use; what only feeds matrix products lies in shared memory
where the matrix unit reads it from there. An operation that computes has its result beside what it reads, and a
gather an address for each element. Where products hang on each other, warps share out the rows of the first; those
that find none left hold what others hold.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from math import prod

from ..ir.cascade import Access, Call, Expr, Rank, walk
from ..ir.device import Device
from ..ir.dtypes import DTYPES
from ..ir.footprint import live_tiles, scoped_sizes
from ..ir.ops import OPS
from ..ir.tile import (
    Dot,
    Fold,
    For,
    Load,
    Map,
    Op,
    Store,
    Tile,
    TileKernel,
    expressions,
    integer_products,
    operations,
    tiles_of,
)

# Bytes of an address, and elements of a row that share one.
ADDRESS, VECTOR = 8, 8

# Matrix units that read operands from shared memory.
SHARED = frozenset({"wgmma", "tcgen05"})

# The registers of a thread that loops, strides and positions take, whatever the tiles are; and those of a matrix unit
# that takes operands from registers, or of products without one.
PLAIN, OPERANDS = 40, 80

# Those of products that wait for each other where the matrix unit runs beside the threads.
WAITING = 24

# How often warps hold an operand that is computed for a product of its own.
SHARING = 3

# Rows of a product for each warp, and for the four warps that such a matrix unit takes together.
SIDE, GROUP = 16, 64


def registers_free(k: TileKernel, device: Device, warps: int) -> int:
    """Bytes of registers that the tiles of one program of a kernel may take."""
    threads = warps * device.warp
    dots = [op for op in operations(k.body) if isinstance(op, Dot)]
    shared = bool(device.features & SHARED) and all(op.operand is not None for op in dots)
    taken = PLAIN + (OPERANDS if dots and not shared else 0)
    taken += WAITING if shared and chained(k) else 0
    return 4 * threads * (min(device.registers_per_thread, device.registers_per_unit // threads) - taken)


def register_bytes(k: TileKernel, device: Device, warps: int, stages: int = 1) -> int:
    """The most bytes that the tiles of one program take of registers at once, with so many warps and stages."""
    exact = integer_products(k)
    shared = _shared(k, exact) if device.features & SHARED else frozenset()
    made = {op.tile.name for op in operations(k.body) if isinstance(op, Map)}
    ahead, decided = _ahead(k), _decided(k)
    heads = chained(k)
    same = _copies(k, heads, device, warps)
    most, each = 0, dict[str, int]()
    for op, tiles, sizes in live_tiles(k):
        if not each:
            each = {t.name: 0 if t.name in shared else _bytes(t, sizes) for t in tiles_of(k).values()}
        held = sum(each[t.name] for t in tiles)
        beside = (0 if op in exact else _beside(op, sizes)) + ahead.get(op, 0) + decided.get(op, 0)
        if isinstance(op, Dot) and not device.features & SHARED:
            # What is computed for a product lies with several warps, and with all of them for one that others hang on;
            # some units want it twice, made in f32.
            times = SHARING if not heads else warps if op in heads else 0
            times *= 4 if heads and "wmma" in device.features else 1
            computed = sum(_bytes(t, sizes) for t in tiles if t.name in made and t.name in (op.left, op.right))
            beside += times * computed // (same if heads else 1)
            if op.operand is None and "wmma" in device.features:
                # These are shared out over all threads.
                most = max(most, same * held + _by_hand(op, sizes, warps * device.warp))
        most = max(most, same * (held + beside))
    return most + (_waiting(k) if stages > 1 and "wmma" in device.features else 0)


def _waiting(k: TileKernel) -> int:
    """Bytes that the loads of a loop with products hold for its next turn, where they pass through registers."""
    loops = [op for op in operations(k.body) if isinstance(op, For)]
    sizes = {**scoped_sizes(k), **{loop.rank: loop.size for loop in loops}}
    most = 0
    for loop in loops:
        if any(isinstance(op, Dot) for op in loop.body):
            most = max(most, sum(_bytes(op.tile, sizes) for op in loop.body if isinstance(op, Load)))
    return most


def _ahead(k: TileKernel) -> dict[Op, int]:
    """Bytes that operations of loops of a number of turns which is known hold beside: those are unrolled, and what the
    next one needs is loaded early."""
    found: dict[Op, int] = {}
    loops = [op for op in operations(k.body) if isinstance(op, For)]
    sizes = {**scoped_sizes(k), **{loop.rank: loop.size for loop in loops}}
    for loop in loops:
        if loop.rank in k.fixed and not any(isinstance(op, Dot) for op in loop.body):
            loads = sum(_bytes(op.tile, sizes) for op in loop.body if isinstance(op, Load))
            found |= dict.fromkeys(loop.body, loads)
    return found


def _decided(k: TileKernel) -> dict[Op, int]:
    """Bytes of conditions on data that several operations of a body ask: they are decided once and held in between."""
    found: dict[Op, int] = {}
    axes = {name: t.axes for name, t in tiles_of(k).items()}
    loops = [op for op in operations(k.body) if isinstance(op, For)]
    sizes = {**scoped_sizes(k), **{loop.rank: loop.size for loop in loops}}
    for body in (k.body, *(loop.body for loop in loops)):
        asked: dict[Call, list[int]] = {}
        for i, op in enumerate(body):
            if isinstance(op, Map | Fold | Store):
                for e in {n for n in walk(op.expr) if isinstance(n, Call) and OPS[n.op].rule == "compare"}:
                    asked.setdefault(e, []).append(i)
        for e, places in asked.items():
            wide = {a for name in _tensors(e) for a in axes.get(name, ())}
            for op in body[places[0] : places[-1] + 1] if len(places) > 1 else ():
                found[op] = found.get(op, 0) + prod(_up(sizes[a]) for a in wide)
    return found


def chained(k: TileKernel) -> tuple[Dot, ...]:
    """The products of a kernel on whose results other products hang."""
    hang: dict[str, frozenset[Dot]] = {}
    found: dict[Dot, None] = {}
    for op in operations(k.body):
        if not isinstance(op, Map | Fold | Dot):
            continue
        read = (op.left, op.right) if isinstance(op, Dot) else tuple(_tensors(op.expr))
        before = frozenset().union(*(hang.get(name, frozenset()) for name in read))
        if isinstance(op, Dot):
            found |= dict.fromkeys(before - {op})
            before |= {op}
        hang[op.tile.name] = hang.get(op.tile.name, frozenset()) | before
    return tuple(found)


def copies(k: TileKernel, device: Device, warps: int) -> int:
    """How many warps hold the same, because the products that others hang on have too few rows for all of them."""
    return _copies(k, chained(k), device, warps)


def _copies(k: TileKernel, heads: Collection[Dot], device: Device, warps: int) -> int:
    if not heads:
        return 1
    axes = {name: t.axes for name, t in tiles_of(k).items()}
    sizes = dict(scoped_sizes(k)) | {op.rank: op.size for op in operations(k.body) if isinstance(op, For)}
    most = 1
    for op in heads:
        if op.operand is None and "mfma" not in device.features:
            continue
        rows, columns = sides(op, axes, sizes)
        if device.features & {"mfma", "wmma"}:
            held = warps * min(rows, 32 if "mfma" in device.features else SIDE) / rows
        elif device.features & SHARED and rows >= GROUP:
            held = 1
        else:
            held = warps * SIDE / rows if rows >= columns else warps * SIDE // 2 / columns
        most = max(most, int(held))
    return most


def sides(op: Dot, axes: Mapping[str, tuple[str, ...]], sizes: Mapping[str, int]) -> tuple[int, int]:
    """The rows and columns of a product: rows are those of the operand that has its result's first long axis."""
    long = [a for a in op.tile.axes if sizes[a] > 1]
    first = set(axes[op.left] if long and long[0] in axes[op.left] else axes[op.right])
    rows = prod(_up(sizes[a]) for a in long if a in first)
    return max(SIDE, rows), max(SIDE, prod(_up(sizes[a]) for a in long if a not in first))


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
        for e in expressions(op)
        for n in walk(e)
        if isinstance(n, Access)
    }
    # A factor that may be infinite is looked at before it is multiplied.
    read |= {op.right for op in operations(k.body) if isinstance(op, Dot) and op.annihilates}
    return frozenset(loads - made - read)


def _by_hand(op: Dot, sizes: Mapping[str, int], threads: int) -> int:
    """Bytes of operands of a product that threads make each for a square of the result, all of its depth at once."""
    side = max(1.0, prod(_up(sizes[a]) for a in op.tile.axes) / threads) ** 0.5
    return int(8 * side * prod(_up(sizes[a]) for a in op.over) * threads)


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


def _tensors(e: Expr) -> Iterator[str]:
    return (n.tensor for n in walk(e) if isinstance(n, Access))


def _up(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()
