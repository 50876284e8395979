"""Tile sizes, warps and stages for GPUs where nothing was tuned: read off the kernels that plain tiles give.

A contraction wants the largest square that registers hold; a stream of contractions 128 rows, and what it keeps on chip
whole; f32 products are made without the matrix unit on NVIDIA, so their tiles are small. What only maps and folds wants
whole rows along memory. No operation may go over more elements than the registers of its threads hold.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from collections.abc import Mapping as Dict
from dataclasses import replace
from math import prod

from ..ir.device import Device
from ..ir.dtypes import DTYPES
from ..ir.footprint import heaviest_last, scoped_sizes
from ..ir.mapping import Mapping
from ..ir.tile import Dot, Fold, For, Load, Map, Op, Store, TileKernel, integer_products, operations, tiles_of
from .defaults_cpu import along_memory, shared_rows
from .registers import chained, copies, register_bytes, registers_free

# The least side of a matrix product.
SIDE = 16

# Elements of one operation for each warp: 64 registers of a thread hold them.
PER_WARP = 2048

# Elements that one program looks at together, of one row or of short ones.
ROW = 1024

# Elements of one operation over three axes or more.
MANY_AXES = 4096

# Rows up to which heads that share keys are taken together, and rows of a product's tiles that go together.
PACKED, SWIZZLE = 64, 8

# The part of shared memory that loaded tiles may fill.
SHARE = 0.75

# How often a mapping that does not fit is changed, the warps that it may have, and needs that count as alike. What
# needs many times what there is spills whatever it does, and loads nothing ahead.
ROUNDS, FEWEST, WARPS, RELIEF, HOPELESS = 8, 2, 8, 1.05, 2

GPU_KNOBS = {"hold": 1, "align": 128, "group": 1}


def gpu_mapping(
    kernels: tuple[TileKernel, ...],
    extents: Dict[str, int],
    device: Device,
    build: Callable[[Mapping], tuple[TileKernel, ...]],
) -> Mapping:
    """The default mapping of kernels that a mapping with `GPU_KNOBS` gave; ``build`` makes those of another mapping."""
    packed = shared_rows(kernels, extents, PACKED)
    if packed:
        kernels = build(Mapping(tiles=packed, knobs=GPU_KNOBS))
    tiles: dict[str, int] = {}
    products: dict[str, int] = {}
    warps, stages = 4, 2
    # A rank of several kernels follows those that contract.
    for k in sorted(kernels, key=_contracts):
        held = {h.rank for h in k.held}
        if _contracts(k):
            found, most = _contraction(k, extents, device)
            # Of what the products do not know, so much as there is, or one where other kernels would take more.
            found = {g.rank: g.size for g in k.grid if g.size > 1 or g.rank in tiles} | found
            warps = max(warps, most)
            stages = 3 if device.target in ("cuda:90", "cuda:100") and _narrow(k) else 2
            if "wmma" in device.features and chained(k):
                # Tiles of the next turn would wait in registers.
                stages = 1
        else:
            found = _rows(k, extents)
        found = {r: n for r, n in found.items() if r in extents and r not in held}
        if _contracts(k):
            if "wmma" in device.features:
                # What one kernel streams and another has as its rows: registers are scarce in both.
                found = {r: min(n, products.get(r, n)) for r, n in found.items()}
            products |= found
        tiles |= found
    tiles = {r: max(1, min(n, _up(extents[r]))) for r, n in tiles.items()} | packed
    for k in kernels:
        _shrink(k, tiles, PER_WARP * warps)
    knobs = {**GPU_KNOBS, "warps": warps, "stages": stages}
    if any(heaviest_last(k) for k in kernels):
        knobs["heavy"] = 1
    if any(_contracts(k) and all(op.accumulate for op in _products(k)) for k in kernels):
        knobs["swizzle"] = SWIZZLE
    return relieved(Mapping(tiles=tiles, knobs=knobs), device, build)


def relieved(mapping: Mapping, device: Device, build: Callable[[Mapping], tuple[TileKernel, ...]]) -> Mapping:
    """More warps, one stage or a smaller tile, whichever relieves most, until each kernel has room as far as it tells.

    ``build`` makes the kernels of a mapping.
    """
    kernels = build(mapping)
    for _ in range(ROUNDS):
        mapping = _manned(kernels, mapping, device)
        wanted = need(kernels, mapping, device)
        if wanted <= 1:
            break
        better = _relief(kernels, mapping, device, wanted, build)
        if better is None:
            break
        mapping, kernels = better
    if mapping.knob("stages") > 1 and need(kernels, mapping, device) > HOPELESS:
        mapping = replace(mapping, knobs={**mapping.knobs, "stages": 1})
    return mapping


def _relief(
    kernels: tuple[TileKernel, ...],
    mapping: Mapping,
    device: Device,
    wanted: float,
    build: Callable[[Mapping], tuple[TileKernel, ...]],
) -> tuple[Mapping, tuple[TileKernel, ...]] | None:
    """Of the mappings that need less the one that relieves most, of those that relieve alike the first.

    What a kernel takes follows from its tiles' sizes, so that only a mapping about to be chosen is built: it may hold
    a rank whole that it names a smaller tile for.
    """
    others = list(_smaller(kernels, mapping, device))
    made = [tuple(_resized(k, mapping.tiles, m.tiles) for k in kernels) for m in others]
    sure = [m.tiles == mapping.tiles for m in others]
    found = []
    for i, sized in enumerate(made):
        others[i] = _manned(sized, others[i], device)
        found.append(need(sized, others[i], device))
    while min(found, default=wanted) < wanted:
        i = next(i for i, n in enumerate(found) if n <= max(1.0, RELIEF * min(found)))
        if sure[i]:
            return others[i], made[i]
        made[i], sure[i] = build(others[i]), True
        others[i] = _manned(made[i], others[i], device)
        found[i] = need(made[i], others[i], device)
    return None


def _resized(k: TileKernel, old: Dict[str, int], new: Dict[str, int]) -> TileKernel:
    """A kernel with the sizes of other tiles; the bounds of its loops stay as they are."""
    other = {r: n for r, n in new.items() if n != old.get(r)}

    def resized(op: Op) -> Op:
        if not isinstance(op, For):
            return op
        size = other[op.rank] if op.rank in other and op.size == old.get(op.rank) else op.size
        return replace(op, size=size, body=tuple(map(resized, op.body)))

    if not other:
        return k
    grid = tuple(replace(g, size=other[g.rank]) if g.rank in other and g.size == old.get(g.rank) else g for g in k.grid)
    return replace(k, grid=grid, body=tuple(map(resized, k.body)))


def _manned(kernels: tuple[TileKernel, ...], mapping: Mapping, device: Device) -> Mapping:
    """The mapping without warps that hold what others hold in every kernel that contracts, if nothing gets scarce.

    Where operands pass through registers on their way to shared memory, all threads are of use.
    """
    products = [k for k in kernels if _contracts(k)]
    while products and "wmma" not in device.features:
        warps = mapping.knob("warps")
        fewer = replace(mapping, knobs={**mapping.knobs, "warps": warps // 2})
        if warps <= FEWEST or any(copies(k, device, warps) == 1 for k in products):
            break
        if need(kernels, fewer, device) > max(1.0, need(kernels, mapping, device)):
            break
        mapping = fewer
    return mapping


def _smaller(kernels: tuple[TileKernel, ...], mapping: Mapping, device: Device) -> Iterator[Mapping]:
    """The mapping with more warps, with one stage where stages take registers, and with one tile halved, the widest
    first."""
    warps = mapping.knob("warps")
    if warps < WARPS:
        yield replace(mapping, knobs={**mapping.knobs, "warps": 2 * warps})
    if mapping.knob("stages") > 1 and "wmma" in device.features:
        yield replace(mapping, knobs={**mapping.knobs, "stages": 1})
    sides = {
        r for k in kernels for op in _products(k) for r in (*op.tile.axes, *(op.over if len(op.over) == 1 else ()))
    }
    for rank, size in sorted(mapping.tiles.items(), key=lambda t: -t[1]):
        if size > (SIDE if rank in sides else 1):
            yield replace(mapping, tiles={**mapping.tiles, rank: _up(size) // 2})


def need(kernels: tuple[TileKernel, ...], mapping: Mapping, device: Device) -> float:
    """What the most demanding kernel takes of registers or shared memory, as a share of what is there."""
    warps, stages = mapping.knob("warps"), mapping.knob("stages")
    return max(
        max(
            register_bytes(k, device, warps, stages) / registers_free(k, device, warps),
            _loaded_bytes(k, _buffers(device, stages)) / (SHARE * device.shared_bytes),
        )
        for k in kernels
    )


def _buffers(device: Device, stages: int) -> int:
    """Turns of a loop whose tiles lie in shared memory together."""
    return stages if "lds.load" in device.features else max(1, stages - 1)


def _loaded_bytes(k: TileKernel, buffers: int) -> int:
    """Bytes that loops with products load ahead, each tile in its tensor's type: they wait in shared memory."""
    bits = {p.name: DTYPES[p.dtype].bits for p in k.tensors}
    most = 0
    for loop in operations(k.body):
        if isinstance(loop, For) and any(isinstance(op, Dot) for op in loop.body):
            sizes = {**scoped_sizes(k), loop.rank: loop.size}
            loads = [op for op in loop.body if isinstance(op, Load)]
            each = (prod(_up(sizes.get(r, 1)) for r in op.tile.axes) * bits[op.source.tensor] for op in loads)
            most = max(most, sum(each) // 8 * buffers)
    return most


def _contracts(k: TileKernel) -> bool:
    return bool(_products(k))


def _products(k: TileKernel) -> list[Dot]:
    """The matrix products of a kernel, those of integers among them."""
    exact = integer_products(k)
    found = []
    for op in operations(k.body):
        if isinstance(op, Dot):
            found.append(op)
        elif isinstance(op, Fold) and op in exact:
            found.append(Dot(op.tile, *exact[op], op.over, op.accumulate, "i8"))
    return found


def _narrow(k: TileKernel) -> bool:
    """Whether every product is one of 16-bit operands, or of narrower ones."""
    types = {p.name: DTYPES[p.dtype] for p in k.tensors}
    loads = {op.tile.name: types[op.source.tensor] for op in operations(k.body) if isinstance(op, Load)}
    small = {name for name, row in loads.items() if row.is_float and row.bits == 8}
    return all(op.operand is not None or {op.left, op.right} <= small for op in _products(k))


def _contraction(k: TileKernel, extents: Dict[str, int], device: Device) -> tuple[dict[str, int], int]:
    """Tiles of a kernel with dots, and its warps."""
    dots = _products(k)
    narrow = _narrow(k)
    if any(not op.accumulate for op in dots):
        found = _squares(k, dots, extents, 128 if narrow else 32, 64 if narrow else 32)
        return _stream(k, dots, extents, device, found)
    # In f32 a depth of several ranks is half as deep: factors of these are computed, in registers. There the next
    # turn's tiles wait on some units, and masked operands.
    scarce = "wmma" in device.features
    deep = 64 if (narrow or all(len(op.over) == 1 for op in dots)) and not scarce else 32
    wide = 64 if scarce and any(op.annihilates for op in dots) else 128
    return _squares(k, dots, extents, wide if narrow else 32, deep), 8 if narrow else 4


def _squares(k: TileKernel, dots: Collection[Dot], extents: Dict[str, int], wide: int, deep: int) -> dict[str, int]:
    """Tiles of products' sides: ``wide`` of what programs share out, ``deep`` of what they loop over.

    What both operands have and the sums keep is a batch of products, not a side of one.
    """
    grid = {g.rank for g in k.grid}
    loops = {op.rank for op in operations(k.body) if isinstance(op, For)}
    batch = {r for op in dots for r in op.tile.axes if all(r not in group for group in _groups(op, k))}
    found: dict[str, int] = {}
    for op in dots:
        for group in _groups(op, k):
            for ranks, size in ((grid - batch, wide), (loops - batch, deep)):
                for r, n in _shared_out([r for r in group if r in ranks], size, extents).items():
                    found[r] = max(n, found.get(r, 1))
    return found | dict.fromkeys(batch & (grid | loops), 1)


def _stream(
    k: TileKernel, dots: Collection[Dot], extents: Dict[str, int], device: Device, found: Dict[str, int]
) -> tuple[dict[str, int], int]:
    """Tiles of a stream of contractions, given those of its products' sides, and its warps."""
    found, narrow = dict(found), _narrow(k)
    grid = {g.rank for g in k.grid}
    # What the state keeps along the last rank of the output is held whole.
    for op in dots:
        column = next((r for r in reversed(op.tile.axes) if r in grid), None)
        if op.accumulate and column is not None and len([r for r in op.tile.axes if r in grid]) > 1:
            found[column] = _up(extents[column])
    head = max([prod(_up(extents.get(h.of, h.size)) for h in k.held[:1]), SIDE])
    # A mask that annihilates takes registers of its own, and so do operands that lie in registers.
    masked = any(op.annihilates for op in dots)
    loops = [op for op in operations(k.body) if isinstance(op, For)]
    less = {op.rank: min(32, found[op.rank]) for op in loops if op.rank in found}
    if narrow and masked and "tcgen05" in device.features:
        found |= less
    many = any(sum(isinstance(x, Dot) for x in op.body) > 2 for op in loops)
    made = {op.tile.name for op in operations(k.body) if isinstance(op, Map)}
    # What is computed for a product that others hang on lies with every warp, on some units twice.
    computed = "wmma" in device.features and any({op.left, op.right} & made for op in chained(k))
    if narrow and (masked or many or computed) and not device.features & {"wgmma", "tcgen05"}:
        found |= less
        if "wmma" in device.features:
            rows = SIDE if computed or many else 32
            own = {r for op in dots if not op.accumulate for r in op.tile.axes if r in grid}
            found |= {r: min(rows, found[r]) for r in own}
        return found, 8
    return found, 8 if not narrow or head > 64 or masked or device.target != "cuda:90" else 4


def _groups(op: Dot, k: TileKernel) -> tuple[list[str], ...]:
    """The ranks of each side of a product: rows, columns and depth."""
    left, right = (tiles_of(k)[t].axes for t in (op.left, op.right))
    rows = [r for r in op.tile.axes if r in left and r not in right]
    columns = [r for r in op.tile.axes if r in right and r not in left]
    return rows, columns, list(op.over)


def _shared_out(ranks: list[str], size: int, extents: Dict[str, int]) -> dict[str, int]:
    """Tiles of the ranks of one side, which together make up its size: the last one has as much of it as it fills."""
    found = {}
    for r in reversed(ranks):
        found[r] = max(1, size) if r == ranks[0] else max(1, min(size, _up(extents.get(r, size))))
        size //= found[r]
    return found


def _rows(k: TileKernel, extents: Dict[str, int]) -> dict[str, int]:
    """Tiles of a kernel that maps and folds: along memory."""
    votes = along_memory(k)
    found = dict.fromkeys((g.rank for g in k.grid), 1)
    loops = [op.rank for op in operations(k.body) if isinstance(op, For) and op.size > 1]
    if not votes:
        return found
    along = max(votes, key=lambda r: votes[r])
    # Of several loops one more goes over rows together.
    found |= {r: 16 if r in [x for x in loops if x != along][-1:] else 1 for r in loops}
    found[along] = ROW if along in loops or not loops else 128
    room = ROW // _up(extents.get(along, 1))
    if room > 1 and along in found and k.grid:
        # Short rows are taken several at a time: of what is only mapped so many, of what is folded those of one rank.
        grid = [g.rank for g in reversed(k.grid)]
        if not loops and along in grid:
            for r in grid:
                if r != along:
                    found[r] = min(room, _up(extents.get(r, room)))
                    room //= found[r]
        elif along != grid[0]:
            found[grid[0]] = room
    return found


def _shrink(k: TileKernel, tiles: dict[str, int], most: int) -> None:
    """Halve tiles until no operation of the kernel goes over more than so many elements."""
    sizes = scoped_sizes(k)
    # A program runs for two coordinates of these, as an empty rank needs; a product has sides.
    pairs = {g.rank for g in k.grid if g.size == 2}
    sides = {r for op in _products(k) for r in (*op.tile.axes, *op.over)}

    exact = integer_products(k)

    def visit(body: tuple[Op, ...], sizes: Dict[str, int]) -> None:
        def size(r: str) -> int:
            return max(_up(tiles.get(r, sizes.get(r, 1))), 2 if r in pairs else 1)

        for op in body:
            if isinstance(op, For):
                visit(op.body, {**sizes, op.rank: op.size})
                continue
            axes = op.axes if isinstance(op, Store) else op.tile.axes
            if isinstance(op, Fold) and op not in exact:
                axes = (*axes, *op.over)
            if isinstance(op, Dot) and not all(any(size(r) > 1 for r in side) for side in _groups(op, k)[:2]):
                # Without rows or columns it is a sum of products.
                axes = (*axes, *op.over)
            # Three axes and more are reduced through shared memory and slow to compile.
            few = len([r for r in axes if size(r) > 1]) <= 2
            limit = most if few else min(most, MANY_AXES)
            while prod(map(size, axes)) > limit:
                free = [r for r in axes if r in tiles and tiles[r] > (SIDE if r in sides and few else 1)]
                if not free:
                    break
                widest = max(free, key=lambda r: tiles[r])
                tiles[widest] = max(1, _up(tiles[widest]) // 2)

    visit(k.body, sizes)


def _up(n: int) -> int:
    return 1 << max(0, n - 1).bit_length() if n > 1 else 1
