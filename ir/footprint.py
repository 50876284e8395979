"""What a tile kernel does and needs, read off its operations: work by unit, bytes by level, live bytes, trip counts.

Counts are of the active coordinates, so a ragged last tile counts as what it holds. A loop with bounds counts the
coordinates between them, averaged over a sample of the grid; bounds that data make count as the whole rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from .cascade import Access, Call, Cast, Const, Expr, Extent, Rank, free_ranks, walk
from .dtypes import DTYPES
from .extents import extent_of
from .ops import OPS
from .tile import Dot, Fold, For, Load, Map, Op, Store, Tile, TileKernel, operations

# Grid tiles along each rank at which the bounds of loops are evaluated.
SAMPLES = 16

# The extent of every rank where only the way in which work is spread is asked for.
PROBED = 1 << 14


@dataclass(frozen=True, slots=True)
class Footprint:
    """The work of a whole kernel, and what one of its programs keeps.

    ``matrix_flops`` counts 2 for each product of a `Dot`, ``vector_ops`` the scalar operations, ``special_ops`` the
    exponentials and the like. ``memory_bytes`` is what must come from and go to memory at least, each element once;
    ``moved_bytes`` what loads and stores move between the caches and the programs. ``live_bytes`` is the most that the
    tiles of one program hold at once; ``programs`` the number of grid points. ``trips`` gives, by loop rank, how often
    its body runs in one program, on average.
    """

    programs: int
    matrix_flops: float
    vector_ops: float
    special_ops: float
    memory_bytes: float
    moved_bytes: float
    live_bytes: int
    trips: Mapping[str, float]


def footprint(k: TileKernel, extents: Mapping[str, int]) -> Footprint:
    """The footprint of a kernel for the given extents of its ranks."""
    return _Reader(k, extents).read()


def tile_bytes(t: Tile, sizes: Mapping[str, int]) -> int:
    """The bytes of a tile whose axes have these sizes."""
    return math.prod(sizes[a] for a in t.axes) * DTYPES[t.dtype].bits // 8


def scoped_sizes(k: TileKernel) -> dict[str, int]:
    """The tile sizes of the ranks in scope of a kernel's whole body."""
    return {g.rank: g.size for g in k.grid} | {h.rank: h.size for h in k.held}


def staged_bytes(k: TileKernel) -> int:
    """The bytes that one turn of the most demanding loop loads as operands of dots: what a pipeline holds per stage."""

    def visit(body: tuple[Op, ...], sizes: dict[str, int]) -> int:
        operands = {n for op in body if isinstance(op, Dot) for n in (op.left, op.right)}
        here = {op.tile.name: tile_bytes(op.tile, sizes) for op in body if isinstance(op, Load)}
        inside = [visit(op.body, {**sizes, op.rank: op.size}) for op in body if isinstance(op, For)]
        return max([sum(n for name, n in here.items() if name in operands), *inside])

    loops = [op for op in k.body if isinstance(op, For)]
    sizes = scoped_sizes(k)
    return max((visit(op.body, {**sizes, op.rank: op.size}) for op in loops), default=0)


def tile_shapes(k: TileKernel) -> Iterator[tuple[int, ...]]:
    """The sizes over which each operation of a kernel goes: of its tile, and for a `Fold` of what it reduces."""
    for axes, sizes in _spaces(k):
        yield tuple(sizes[a] for a in axes)


def largest_rank(k: TileKernel) -> str:
    """The widest rank of the largest operation: the one to tile smaller where a kernel is too big."""
    spaces = list(_spaces(k))
    if not spaces:
        return k.grid[0].rank if k.grid else ""
    axes, sizes = max(spaces, key=lambda s: math.prod(s[1][a] for a in s[0]))
    found = max(axes, key=lambda a: sizes[a], default="")
    return next((h.of for h in k.held if h.rank == found), found)


def _spaces(k: TileKernel) -> Iterator[tuple[tuple[str, ...], dict[str, int]]]:
    for op, sizes in scoped(k.body, scoped_sizes(k)):
        match op:
            case Fold(tile=tile, over=over):
                yield (*tile.axes, *over), sizes
            case Load(tile=tile) | Map(tile=tile) | Dot(tile=tile):
                yield tile.axes, sizes
            case Store(axes=axes):
                yield axes, sizes


def scoped(body: tuple[Op, ...], sizes: dict[str, int]) -> Iterator[tuple[Op, dict[str, int]]]:
    """Each operation, those of loops after their loop, with the tile sizes of the ranks in scope."""
    for op in body:
        yield op, sizes
        if isinstance(op, For):
            yield from scoped(op.body, {**sizes, op.rank: op.size})


@dataclass
class _Counts:
    matrix: float = 0.0
    vector: float = 0.0
    special: float = 0.0
    moved: float = 0.0


class _Reader:
    def __init__(self, k: TileKernel, extents: Mapping[str, int]) -> None:
        self.k = k
        self.extents = {**extents, **k.fixed, **{h.rank: extents.get(h.of, h.size) for h in k.held}}
        self.types = {p.name: DTYPES[p.dtype].bits // 8 for p in k.tensors}
        self.grid = {g.rank: g.size for g in k.grid}
        self.counts = _Counts()
        self.trips: dict[str, float] = {}

    def read(self) -> Footprint:
        # By rank: coordinates that a whole kernel visits, and the number of its tiles.
        spans = {h.rank: (float(self._extent(h.rank)), 1.0) for h in self.k.held}
        for r, n in self.grid.items():
            spans[r] = (float(self._extent(r)), float(-(-self._extent(r) // n)))
        programs = math.prod(-(-self._extent(r) // n) for r, n in self.grid.items())
        if programs:
            self._visit(self.k.body, spans, 1.0)
        c = self.counts
        return Footprint(
            programs,
            c.matrix,
            c.vector,
            c.special,
            self._compulsory() if programs else 0.0,
            c.moved,
            live_bytes(self.k),
            self.trips,
        )

    def _extent(self, rank: str) -> int:
        return max(0, self.extents.get(rank, 0))

    def _visit(self, body: tuple[Op, ...], spans: Mapping[str, tuple[float, float]], share: float) -> None:
        """``share`` is the part of the ranks' product that bounded loops let through."""
        for op in body:
            if isinstance(op, For):
                length, trips = self._loop(op)
                self.trips[op.rank] = self.trips.get(op.rank, 0.0) + trips
                self._visit(op.body, {**spans, op.rank: (length, trips)}, share)
                continue
            axes, over = (op.axes, ()) if isinstance(op, Store) else (op.tile.axes, getattr(op, "over", ()))
            wide = {*axes, *over}
            times = share * math.prod(n if r in wide else tiles for r, (n, tiles) in spans.items())
            kept = share * math.prod(n if r in axes else tiles for r, (n, tiles) in spans.items())
            self._count(op, times, kept)

    def _count(self, op: Load | Map | Fold | Dot | Store, times: float, kept: float) -> None:
        match op:
            case Load(source=source, guard=guard):
                self.counts.moved += times * self.types[source.tensor] * bool(source.indices)
                for e in (*source.indices, *([guard] if guard is not None else [])):
                    self._expr(e, times)
            case Store(target=target, expr=expr):
                self.counts.moved += times * self.types[target.tensor]
                self._expr(expr, times)
            case Map(expr=expr):
                self._expr(expr, times)
            case Fold(expr=expr):
                self._expr(expr, times)
                self.counts.vector += times
            case Dot():
                self.counts.matrix += 2 * times
                del kept

    def _expr(self, e: Expr, times: float) -> None:
        """The operations of an expression over data; those of coordinates alone are not worth counting."""
        for node in walk(e):
            if isinstance(node, Call) and any(isinstance(n, Access) for n in walk(node)):
                unit, n = OPS[node.op].cost
                if unit == "special":
                    self.counts.special += n * times
                else:
                    self.counts.vector += n * times
            elif isinstance(node, Cast):
                self.counts.vector += times

    # Loops

    def _loop(self, op: For) -> tuple[float, float]:
        """The coordinates that a loop visits and its trips, on average over the grid."""
        whole = self._extent(op.rank)
        if op.rank not in self.extents and isinstance(op.upper, Extent):
            whole = self._extent(op.upper.rank)
        if op.lower is None and (op.upper is None or isinstance(op.upper, Extent)):
            return float(whole), float(-(-whole // op.size))
        whole = whole if op.rank in self.extents else 1 << 60
        ranks = sorted({r for e in (op.lower, op.upper) if e is not None for r in free_ranks(e)} & self.grid.keys())
        length = trips = count = 0
        for starts in _points([range(0, self._extent(r), self.grid[r]) for r in ranks]):
            at = dict(zip(ranks, starts, strict=True))
            low, high = self._bound(op.lower, at, 0), self._bound(op.upper, at, whole)
            low, high = max(0, low), min(high, whole)
            length += max(0, high - low)
            trips += max(0, -(-high // op.size) - low // op.size) if high > low else 0
            count += 1
        return (length / count, trips / count) if count else (0.0, 0.0)

    def _bound(self, e: Expr | None, at: Mapping[str, int], default: int) -> int:
        if e is None:
            return default
        try:
            return int(self._value(e, at))
        except (KeyError, ZeroDivisionError):
            return default

    def _value(self, e: Expr, at: Mapping[str, int]) -> int:
        match e:
            case Const(value=value):
                return int(value)
            case Rank(name=name):
                return at.get(name, 0)
            case Extent(rank=rank):
                return self.extents[rank]
            case Call(op=op, args=args):
                return int(OPS[op].numpy(*(self._value(a, at) for a in args)))
        raise KeyError("data")

    def _compulsory(self) -> float:
        """The elements that the kernel touches of each tensor, once: its whole extent, or what fewer loads read."""
        total = 0.0
        for p in self.k.tensors:
            shape = [extent_of(i, self.extents) for i in p.indices]
            if all(n is not None for n in shape):
                total += math.prod(n or 0 for n in shape) * self.types[p.name]
        return total


def heaviest_last(k: TileKernel) -> str | None:
    """The rank of the grid along which loops run longer for the last tiles than for the first ones, if there is one."""
    ranks = {n.name for op in operations(k.body) for e in _bounds(op) for n in walk(e) if isinstance(n, Rank)}
    reader = _Reader(k, dict.fromkeys(_named(k), PROBED))
    for g in k.grid:
        if g.rank not in ranks:
            continue
        lengths = []
        for start in (0, (PROBED - 1) // g.size * g.size):
            at = {g.rank: start}
            loops = [op for op in operations(k.body) if isinstance(op, For)]
            spans = [(reader._bound(op.lower, at, 0), reader._bound(op.upper, at, PROBED)) for op in loops]
            lengths.append(sum(max(0, min(high, PROBED) - max(low, 0)) for low, high in spans))
        if lengths[1] > lengths[0]:
            return g.rank
    return None


def _bounds(op: Op) -> Iterator[Expr]:
    return (e for e in (op.lower, op.upper) if e is not None) if isinstance(op, For) else iter(())


def _named(k: TileKernel) -> Iterator[str]:
    """Every rank that a kernel's grid, loops and bounds name."""
    yield from (g.rank for g in k.grid)
    for op in operations(k.body):
        if isinstance(op, For):
            yield op.rank
            yield from (n.rank for e in _bounds(op) for n in walk(e) if isinstance(n, Extent))


def _points(ranges: list[range]) -> Iterator[tuple[int, ...]]:
    """A sample of a product of ranges, `SAMPLES` of each at most, evenly spread with the ends among them."""
    if not ranges:
        yield ()
        return
    for rest in _points(ranges[1:]):
        r = ranges[0]
        places = range(len(r)) if len(r) <= SAMPLES else [i * (len(r) - 1) // (SAMPLES - 1) for i in range(SAMPLES)]
        for i in places:
            yield (r[i], *rest)


def live_bytes(k: TileKernel) -> int:
    """The most bytes that the tiles of one program hold at once, each from where it is made to its last use."""
    return max((sum(tile_bytes(t, sizes) for t in tiles) for _, tiles, sizes in live_tiles(k)), default=0)


def live_tiles(k: TileKernel) -> Iterator[tuple[Op, list[Tile], dict[str, int]]]:
    """Each operation with the tiles that hold something while it runs, and the sizes of all ranks' tiles."""
    order: list[tuple[Op, tuple[int, ...]]] = []
    sizes = scoped_sizes(k)

    def visit(body: tuple[Op, ...], path: tuple[int, ...]) -> None:
        for op in body:
            order.append((op, path))
            if isinstance(op, For):
                sizes[op.rank] = max(op.size, sizes.get(op.rank, 0))
                visit(op.body, (*path, len(order) - 1))

    visit(k.body, ())
    ends = {}
    for i, (_, path) in enumerate(order):
        for loop in path:
            ends[loop] = i
    spans: dict[str, list[int]] = {}
    tiles: dict[str, Tile] = {}
    homes: dict[str, tuple[int, ...]] = {}
    for i, (op, path) in enumerate(order):
        made = op.tile if isinstance(op, Load | Map | Fold | Dot) else None
        if made is not None and made.name not in spans:
            spans[made.name], homes[made.name], tiles[made.name] = [i, i], path, made
        for name in {*_reads(op), *([made.name] if made is not None else [])}:
            if name in spans:
                # A tile from outside a loop lives until the loop ends.
                outer = [loop for loop in path if loop not in homes[name]]
                spans[name][1] = max(spans[name][1], ends[outer[0]] if outer else i)
    for i, (op, _) in enumerate(order):
        yield op, [t for n, t in tiles.items() if spans[n][0] <= i <= spans[n][1]], sizes


def _reads(op: Op) -> Iterator[str]:
    match op:
        case Load(source=source, guard=guard):
            exprs: tuple[Expr | None, ...] = (*source.indices, guard)
        case Map(expr=expr) | Fold(expr=expr):
            exprs = (expr,)
        case Store(target=target, expr=expr):
            exprs = (*target.indices, expr)
        case For(lower=lower, upper=upper):
            exprs = (lower, upper)
        case Dot(left=left, right=right):
            yield left
            yield right
            return
    for e in exprs:
        if e is not None:
            yield from (n.tensor for n in walk(e) if isinstance(n, Access))
