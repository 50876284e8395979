"""Tile sizes for the CPU where nothing was tuned: read off the kernels that plain tiles give.

A contraction wants rows enough to make packing its shared operand worth while, columns as wide as a panel, and a depth
that keeps a strip of rows and a panel in the nearest caches. A loop over rows that lie along memory wants whole rows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from math import prod

from ..ir.cascade import Call, Const, Rank, free_ranks, tensors_read
from ..ir.dtypes import DTYPES
from ..ir.footprint import scoped_sizes, tile_bytes
from ..ir.machine import cores, second_cache
from ..ir.mapping import Mapping as TileMapping
from ..ir.tile import Dot, Fold, For, Load, Map, Store, TileKernel, operations, tiles_of
from .fuse import ON_CHIP

# The micro-kernel holds 6 rows and 64 columns; what is a multiple of a vector needs no remainder.
PANEL, LANES = 64, 16

# Rows that share a packed operand; more where each goes over a band, as in a sliding window: that is packed with what
# lies around it; as many as MANY where all go over the same and each core gets SHARES programs, of at least PROGRAMS in
# all. The depth of a contraction of 16-bit operands; others and the keys of attention take half.
ROWS, BAND, MANY, DEPTH = 192, 384, 1024, 1024
SHARES, PROGRAMS = 4, 16

# Rows and columns of a large product, where it has so many tiles of them: packing is little beside what it serves.
BLOCK, TASKS = (512, 256), 8

# Bytes of a panel with the whole depth of a contraction up to which one tile has it all, and those that several panels
# leave of the second cache to rows and sums. Rows that do not lie as they are multiplied are made anew for each tile of
# columns, which is wide.
WHOLE, PASSING = 1 << 20, 3 << 18

# With so few rows the shared operand is read once, where it lies: tiles go along its memory, as far as the cores leave
# each other something. Up to FEWEST rows are not even packed; then they are shallow, unless that operand lies along the
# depth: then they are LONG.
FEW, FEWEST, WIDE, SHALLOW, LONG = 16, 4, (512, 2048), 64, 4096

# Where factors leave a contraction group by group: the least group for which that pays, columns for up to FEWEST rows
# and for more, as what is done once for a row and group is to be little beside its products, and rows; tiles of columns
# that are streamed at once, as far as each core gets SHARES of them.
GROUP, WIDEST, BROAD, TALL, ABREAST = 64, 2048, 512, 256, 2

# The same where there is no contraction but for that: the least group; rows and columns, whose sums stay in the nearest
# cache as each group adds to them.
LEAST, NEAR = 16, (96, 128)

# Bytes of the largest tile, and of the largest one that is multiplied as it is loaded.
LARGEST, OPERAND = 1 << 22, 1 << 24

# A row whose length is not known is taken to be as long as none that stays in a cache.
UNKNOWN = 1 << 62

# Rows of one program that share an operand and come from several coordinates of a rank.
FEW_SHARED = 8

# Elements of a row that are looked at together where there is no contraction; rows of a tile across memory; and, where
# a row is gone over tile by tile, bytes of it that stay in the first cache from one pass over a tile to the next.
ROW, ACROSS, TWICE = 1024, 16, 1 << 14


def cpu_tiles(kernels: tuple[TileKernel, ...], extents: Mapping[str, int]) -> dict[str, int]:
    """The tile of each rank, at most its extent; ranks on chip and those taken one by one are left out."""
    wanted: dict[str, int] = {}
    looped = {op.rank for k in kernels for op in operations(k.body) if isinstance(op, For)}
    # A rank of several kernels follows those that contract, and then those that go along memory in a loop over it.
    along: set[str] = set()
    for k in sorted(kernels, key=_contracts):
        held = {h.rank for h in k.held}
        found = _contraction(k, extents, looped) if _contracts(k) else _rows(k, extents)
        kept = set() if _contracts(k) else along - {r for r, n in found.items() if n > 1}
        wanted |= {r: n for r, n in found.items() if r in extents and r not in held | kept}
        along |= {op.rank for op in operations(k.body) if isinstance(op, For) and found.get(op.rank, 0) >= ROW}
    # A row alone is a product's row all the same, unless others join it.
    joined = {r: n for r, n in shared_rows(kernels, extents, FEW_SHARED).items() if r not in wanted}
    dots = [op for k in kernels for op in operations(k.body) if isinstance(op, Dot)]
    rows = set() if joined else {r for op in dots for r in op.tile.axes}
    return {r: max(2 if r in rows else 1, min(n, _up(extents[r]))) for r, n in wanted.items()} | joined


def shared_rows(kernels: Iterable[TileKernel], extents: Mapping[str, int], most: int) -> dict[str, int]:
    """Ranks of which several coordinates read the same, as query heads that share keys do (``h // 4``), by how many one
    program takes: where it would have fewer than ``most`` rows without."""
    found: dict[str, int] = {}
    for k in kernels:
        grid = {g.rank for g in k.grid}
        wide = {r for op in operations(k.body) if isinstance(op, Dot) and not op.accumulate for r in op.tile.axes}
        rows = prod(max(1, extents.get(r, 1)) for r in wide & grid)
        for index in (i for op in operations(k.body) if isinstance(op, Load) for i in op.source.indices):
            match index:
                case Call(op="floordiv", args=(Rank(name=r), Const(value=int() as shared))) if r in grid - wide:
                    fit = [n for n in range(2, shared + 1) if shared % n == 0 and n * rows <= most]
                    if fit and extents.get(r, 1) > 1:
                        found[r] = max(fit)
    return found


def group_tiles(kernels: Iterable[TileKernel], extents: Mapping[str, int]) -> dict[str, int]:
    """Tiles of contractions whose operands have factors that groups of a summed rank share, as ``scale[k // 128, n]``:
    such a group is a tile."""
    found: dict[str, int] = {}
    for k in kernels:
        grid = {g.rank for g in k.grid}
        for op in (
            x for x in operations(k.body) if isinstance(x, Dot | Fold) and x.accumulate and len(x.tile.axes) > 1
        ):
            if isinstance(op, Fold) and op.op != "sum":
                continue
            least = GROUP if isinstance(op, Dot) else LEAST
            groups = [n for r in op.over for n in _quotients(k, r) if least <= n <= DEPTH]
            if not groups or len(op.over) != 1:
                continue
            *rows, column = op.tile.axes
            few = all(extents.get(r, 0) <= FEWEST for r in rows)
            found[op.over[0]] = min(groups)
            if isinstance(op, Fold):
                near = dict.fromkeys(rows, NEAR[0]) | {column: NEAR[1]}
                found |= {r: min(n, _up(extents[r])) for r, n in near.items() if r in grid and r in extents}
                continue
            found |= {r: min(TALL, _up(extents[r])) for r in rows if r in grid and extents.get(r, 0) > FEW}
            if column in grid and extents.get(column, 0) > ON_CHIP:
                # Weights that lie in tiles of columns are one stream for each. Some at once hide that a sum waits for
                # itself and share what is done once for a row; more than ABREAST are foreseen less well.
                tiles = [n for n in _quotients(k, column) if n % LANES == 0]
                wide = WIDEST if few else BROAD
                if few and tiles:
                    share = extents[column] // (SHARES * cores() * min(tiles))
                    wide = min(tiles) * max(1, min(share, ABREAST))
                found[column] = min(wide, _up(extents[column]))
    return found


def repeats(kernels: Iterable[TileKernel], tiles: Mapping[str, int], extents: Mapping[str, int]) -> int:
    """How often a fold beside a contraction is done again at most: once for each tile of a rank that it knows nothing
    of, as the sum of a row is by every tile of the columns that the row is multiplied with. Integers, by which loops
    are bounded, are not counted."""
    worst = 1
    for k in kernels:
        if not any(isinstance(op, Dot) and op.accumulate for op in operations(k.body)):
            continue
        known: dict[str, set[str]] = {}
        for op in (x for x in operations(k.body) if not isinstance(x, For | Store)):
            if isinstance(op, Load):
                own = {r for i in op.source.indices for r in free_ranks(i)}
            else:
                read = (op.left, op.right) if isinstance(op, Dot) else tensors_read(op.expr)
                own = set().union(*(known.get(t, set()) for t in read))
            own |= {*op.tile.axes, *(op.over if isinstance(op, Fold | Dot) else ())}
            known[op.tile.name] = known.get(op.tile.name, set()) | own
            if isinstance(op, Fold) and len(own) > 1 and DTYPES[op.tile.dtype].is_float:
                others = {g.rank for g in k.grid} - known[op.tile.name]
                worst = max(worst, prod(-(-extents.get(r, 1) // tiles.get(r, 1)) for r in others))
    return worst


def _quotients(k: TileKernel, rank: str) -> set[int]:
    """The numbers by which a rank is divided where a kernel loads."""
    loads = [op for op in operations(k.body) if isinstance(op, Load)]
    calls = [i for op in loads for i in op.source.indices if isinstance(i, Call) and i.op == "floordiv"]
    pairs = [(a, n) for a, n in (c.args for c in calls) if a == Rank(rank) and isinstance(n, Const)]
    return {int(n.value) for _, n in pairs}


def shrunk(mapping: TileMapping, build: Callable[[TileMapping], tuple[TileKernel, ...]]) -> TileMapping:
    """The mapping with tiles halved until the largest of any kernel is no larger than a thread should hold."""
    while True:
        large: list[tuple[float, dict[str, int]]] = []
        for k in build(mapping):
            sizes = scoped_sizes(k) | {op.rank: op.size for op in operations(k.body) if isinstance(op, For)}
            free = {r: n for r, n in sizes.items() if n > 2 and mapping.tiles.get(r, 0) > 2}
            plain = _operands(k)
            for t in tiles_of(k).values():
                excess = tile_bytes(t, sizes) / (OPERAND if t.name in plain else LARGEST)
                large.append((excess, {r: free[r] for r in t.axes if r in free}))
        most, ranks = max(large, key=lambda x: x[0], default=(0, {}))
        if most <= 1 or not ranks:
            return mapping
        widest = max(ranks, key=lambda r: ranks[r])
        mapping = replace(mapping, tiles={**mapping.tiles, widest: min(ranks[widest], mapping.tiles[widest]) // 2})


def _operands(k: TileKernel) -> set[str]:
    """The tiles that are loaded for contractions alone."""
    others: set[str] = set()
    for op in operations(k.body):
        others |= {op.tile.name} if isinstance(op, Map | Fold | Dot) else set()
        others |= set(tensors_read(op.expr)) if isinstance(op, Map | Fold | Store) else set()
    return {op.tile.name for op in operations(k.body) if isinstance(op, Load)} - others


def _contracts(k: TileKernel) -> bool:
    return any(isinstance(op, Dot) for op in operations(k.body))


def _contraction(k: TileKernel, extents: Mapping[str, int], looped: Collection[str]) -> dict[str, int]:
    """Tiles of a kernel with dots; ``looped`` are the ranks that any kernel goes over in a loop."""
    grid = {g.rank for g in k.grid}
    found: dict[str, int] = {}
    loops = {op.rank for op in operations(k.body) if isinstance(op, For)}
    # Dots nested in a loop with other work: the tile between them is to stay near.
    dots = [op for op in operations(k.body) if isinstance(op, Dot)]
    streamed = not all(_accumulates(op, k) for op in dots)
    narrow = all(width(op, k) < 4 for op in dots)
    for op in dots:
        if not op.tile.axes:
            continue
        column = op.tile.axes[-1]
        if column in grid:
            small = extents.get(column, 0) <= ON_CHIP
            found[column] = _up(extents[column]) if small else PANEL if streamed else 2 * PANEL
        for row in op.tile.axes[:-1]:
            if row in grid:
                blocks = [-(-extents.get(r, 0) // n) for r, n in zip((row, column), BLOCK, strict=True)]
                large = not streamed and prod(blocks) >= TASKS
                some = ROWS
                if streamed:
                    some = BAND if _banded(k) else ROWS if row in looped else _many(k, row, extents, found)
                found[row] = some if not large else BLOCK[0] if column in grid else 2 * ROWS
                if large and column in grid:
                    found[column] = BLOCK[1]
        rows = max((extents.get(r, 0) for r in op.tile.axes[:-1]), default=0)
        few = rows <= FEW and not streamed
        streams = few and not k.ordered and bool(op.over) and _lengthwise(k, op)
        if few and column in grid and extents[column] > ON_CHIP:
            share = -(-extents[column] // (cores() * PANEL)) * PANEL
            found[column] = PANEL if streams else min(max(WIDE[0], share), WIDE[1])
        for r in (*op.over, *op.tile.axes):
            if r in loops:
                deep = narrow and not streamed and (not few or k.ordered)
                shallow = few and rows <= FEWEST and not k.ordered
                found[r] = SHALLOW if shallow else DEPTH if deep else DEPTH // 2
        if streams and op.over[-1] in loops:
            found[op.over[-1]] = min(LONG, _up(extents.get(op.over[-1], LONG)))
        if not streamed and (not few or k.ordered):
            found |= _whole(k, op, extents, found)
    return found


def _lengthwise(k: TileKernel, op: Dot) -> bool:
    """Whether what rows share lies along the depth of their contraction, as it is multiplied: its rows are streams."""
    column, depth = op.tile.axes[-1], op.over[-1]
    same = {p.name for p in k.tensors if p.dtype == (op.operand or "f32")}
    loads = [x for x in operations(k.body) if isinstance(x, Load) and x.tile.name in (op.left, op.right)]
    return any(column in x.tile.axes and x.source.tensor in same and x.source.indices[-1] == Rank(depth) for x in loads)


def _whole(k: TileKernel, op: Dot, extents: Mapping[str, int], found: Mapping[str, int]) -> dict[str, int]:
    """The tiles of a contraction where a panel of its whole depth is small enough; ``found`` are those without."""
    depth, column, size = op.over[0], op.tile.axes[-1], width(op, k)
    loops = [x for x in k.body if isinstance(x, For) and op in x.body]
    alone = len(op.over) == len(loops) == 1 and loops[0].rank == depth and loops[0].phase == "all"
    if not alone or depth not in extents or column not in extents:
        return {}
    deep = size * max(1, extents[depth])
    same = {p.name for p in k.tensors if p.dtype in (("i8", "u8") if size == 1 else (op.operand or "f32",))}
    loads = [x for x in operations(k.body) if isinstance(x, Load) and x.tile.name in (op.left, op.right)]
    loads = [x for x in loads if x.source.tensor in same]
    along = [x for x in loads if column not in x.tile.axes and x.source.indices[-1] == Rank(depth)]
    columns = max(1, round((second_cache() - PASSING) / (deep * PANEL))) * PANEL if along else BLOCK[1]
    busy = max(TASKS, 2 * cores())
    if deep * (PANEL if along else columns) > WHOLE:
        return {}
    if along:
        columns = min(columns, max(1, -(-extents[column] // (busy * PANEL))) * PANEL)
    wanted = {depth: _up(extents[depth]), column: min(columns, BLOCK[1], _up(extents[column]))}
    rows = {r: found[r] for r in op.tile.axes[:-1] if r in found}
    others = {g.rank: extents.get(g.rank, 1) for g in k.grid if g.rank not in rows}
    if len(rows) == 1:
        # A panel serves all the rows that it can while no core is without one.
        (r,) = rows
        programs = prod(max(1, -(-n // wanted.get(o, 1))) for o, n in others.items())
        rows[r] = max(rows[r], _up(-(-extents[r] // -(-busy // programs))))
    # Rows that are multiplied where they lie take no room.
    most = max(LANES, (OPERAND if along else LARGEST) // deep // LANES * LANES)
    return wanted | {r: min(n, most) for r, n in rows.items()}


def whole_depth(kernels: Iterable[TileKernel], tiles: Mapping[str, int], extents: Mapping[str, int]) -> int:
    """The greatest extent of a rank that contractions loop over and of which one tile has it all; 0 if none has."""
    loops = [(x.rank, op, k) for k in kernels for x in k.body if isinstance(x, For) for op in x.body]
    depths = {r for r, op, k in loops if isinstance(op, Dot) and _accumulates(op, k) and op.over == (r,)}
    return max((extents[r] for r in depths if 1 < extents.get(r, 0) <= tiles.get(r, 0)), default=0)


def width(op: Dot, k: TileKernel) -> int:
    """Bytes of an element as a contraction multiplies it."""
    if op.operand is not None:
        return 2
    tiles = tiles_of(k)
    return max(DTYPES[tiles[t].dtype].bits // 8 if DTYPES[op.tile.dtype].is_integer else 4 for t in (op.left, op.right))


def _accumulates(op: Dot, k: TileKernel) -> bool:
    """Whether the sums of a contraction are added up: where they are made, or in the map that takes them up."""
    maps = [x for x in operations(k.body) if isinstance(x, Map) and op.tile.name in tensors_read(x.expr)]
    return op.accumulate or (op.tile.dtype == "i32" and any(x.tile.name in tensors_read(x.expr) for x in maps))


def _many(k: TileKernel, row: str, extents: Mapping[str, int], found: Mapping[str, int]) -> int:
    """Rows that share what a loop packs, where nothing depends on how many they are; ``found`` are the other tiles."""
    if any(isinstance(op, For) and op.meets is not None for op in operations(k.body)):
        return ROWS  # they are to have little between the least and the greatest of them
    others = prod(-(-extents.get(g.rank, 1) // found.get(g.rank, 1)) for g in k.grid if g.rank != row)
    pieces = -(-max(PROGRAMS, SHARES * cores()) // max(1, others))
    return max(ROWS, min(MANY, _up(-(-extents.get(row, 0) // pieces))))


def _banded(k: TileKernel) -> bool:
    """Whether all loops begin and end where each row says."""
    loops = [op for op in operations(k.body) if isinstance(op, For) and any(isinstance(x, Dot) for x in op.body)]
    return bool(loops) and all(op.phase == "full" or None not in op.own for op in loops)


def along_memory(k: TileKernel) -> dict[str, int]:
    """The ranks that are the last axis of what a kernel loads and stores, and how many axes lie so with each."""
    params = {p.name: p for p in k.tensors}
    votes: dict[str, int] = {}
    for op in operations(k.body):
        access = op.source if isinstance(op, Load) else op.target if isinstance(op, Store) else None
        if access is None or not access.indices or not isinstance(access.indices[-1], Rank):
            continue
        rank = access.indices[-1].name
        votes[rank] = votes.get(rank, 0) + len(params[access.tensor].indices)
    return votes


def _rows(k: TileKernel, extents: Mapping[str, int]) -> dict[str, int]:
    """Tiles of a kernel that maps and folds: along memory."""
    votes = along_memory(k)
    if not votes:
        return {}
    # Of two that lie along memory, one that fills vectors.
    along = max(votes, key=lambda r: (votes[r], min(extents.get(r, 0), LANES)))
    found = dict.fromkeys((g.rank for g in k.grid), 1)
    loops = {op.rank for op in operations(k.body) if isinstance(op, For)}
    found |= dict.fromkeys(loops, ACROSS)
    found[along] = max(ROW, TWICE // _bytes_along(k, along)) if along in loops else ROW
    return found


def _bytes_along(k: TileKernel, rank: str) -> int:
    """Bytes of all tensors that a kernel loads at a coordinate of a rank; at least one."""
    loads = (op.source.tensor for op in operations(k.body) if isinstance(op, Load) and rank in op.tile.axes)
    width = {p.name: DTYPES[p.dtype].bits // 8 for p in k.tensors}
    return max(1, sum(width[t] for t in {*loads}))


def _up(n: int) -> int:
    return -(-n // LANES) * LANES if n > 1 else 1


def longest_row(kernels: tuple[TileKernel, ...], extents: Mapping[str, int]) -> int:
    """The extent of the longest rank that kernels without contractions loop over.

    0 where one contracts or scans, or where the loop goes across memory.
    """
    loops = [op for k in kernels for op in operations(k.body) if isinstance(op, For)]
    nested = any(isinstance(x, For) for op in loops for x in op.body)
    if nested or any(map(_contracts, kernels)) or any(op.size == 1 or op.phase != "all" for op in loops):
        return 0
    ranks = {op.rank for op in loops}
    places = [op.source.indices[:-1] for k in kernels for op in operations(k.body) if isinstance(op, Load)]
    if any(free_ranks(i) & ranks for indices in places for i in indices):
        return 0
    return max((extents.get(r, UNKNOWN) for r in ranks), default=0)
