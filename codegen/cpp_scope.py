"""What every part of the C++ printer shares: names, lines, the axes in scope, and where tiles lie."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from ..ir.cascade import Call, Param, walk
from ..ir.dtypes import DTYPES
from ..ir.errors import VerifyError
from ..ir.ops import OPS
from ..ir.tile import (
    Dot,
    Fold,
    For,
    GridRank,
    Load,
    Map,
    Op,
    Tile,
    TileKernel,
    expressions,
    operations,
    print_kernel,
    tiles_of,
)
from ..ir.types import TypeChecker
from .interface import checked_axes, runtime_ranks
from .made import Recipe
from .names import Names
from .vectors import WIDEST

# Bytes of tiles on a thread's stack: of one, and of all. What is larger lies in the thread's workspace.
LARGEST_ON_STACK = 1 << 15
STACK = 1 << 17

# Bytes from row to row that are a multiple of this are too regular for a cache.
ALIASED = 1024

# Operations that give ever smaller numbers, down to 0.
VANISHING = frozenset(o.name for o in OPS.values() if o.at_neg_inf == 0.0)


def ctype(dtype: str) -> str:
    """The C++ type of a value."""
    return DTYPES[dtype].cpp


def stored(dtype: str) -> str:
    """The C++ type of a tensor's element: any byte but 0 is true."""
    return "uint8_t" if dtype == "bool" else ctype(dtype)


@dataclass(frozen=True, slots=True)
class Axis:
    """A rank in scope: the greatest size of its tile, the text of its first coordinate and of its count of coordinates.

    ``index`` names the position within the tile. Of a ``cut`` tile these are a few coordinates, and others follow.
    """

    size: int
    base: str
    count: str
    index: str
    cut: bool = False

    @property
    def in_vectors(self) -> bool:
        """Whether whole vectors may go past the last coordinate, as there is room and nobody's value."""
        return self.size % WIDEST == 0 and not self.cut


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tile lies: its axes in the order of memory, and their sizes. A single element is a plain variable.

    A tile that is only multiplied may stay in its tensor's memory; then ``view`` has the text of each axis's stride.
    """

    tile: Tile
    name: str
    order: tuple[str, ...]
    sizes: tuple[int, ...]
    view: Mapping[str, str] | None = None

    @property
    def elements(self) -> int:
        return math.prod(self.sizes)

    @property
    def long(self) -> tuple[str, ...]:
        """The axes of more than one coordinate, in the order of memory."""
        return tuple(r for r, n in zip(self.order, self.sizes, strict=True) if n != 1)

    def stride(self, axis: str) -> int:
        at = self.order.index(axis)
        return math.prod(max(1, n) for n in self.sizes[at + 1 :])

    def step(self, axis: str) -> str:
        """The text of the distance between neighbours along an axis, in elements."""
        return self.view[axis] if self.view is not None else str(self.stride(axis))


@dataclass(frozen=True, slots=True)
class There:
    """A tile that stays in its tensor's memory where a flag says so."""

    tile: str
    flag: str


def _flushed(k: TileKernel) -> bool:
    """Whether a kernel makes zeros of results below the least normal number, as strict numerics do not let it.

    It does where exponentials meet products of matrices: to some processors each such number costs a hundred cycles,
    and each product with one as many again.
    """
    found = (e for op in operations(k.body) for root in expressions(op) for e in walk(root))
    products = any(isinstance(op, Dot) for op in operations(k.body))
    return products and not k.ordered and any(isinstance(e, Call) and e.op in VANISHING for e in found)


class Scope:
    """The state of printing one kernel."""

    def __init__(self, k: TileKernel, entry: str) -> None:
        self.k = k
        self.entry = entry
        self.params: Mapping[str, Param] = {p.name: p for p in k.tensors}
        self.names = Names((entry, entry + "_args"))
        self.checked = checked_axes(k)
        self.tiles = tiles_of(k)
        self.readers = [op for op in operations(k.body) if not isinstance(op, For)]
        types = {p.name: p.dtype for p in k.tensors} | {t.name: t.dtype for t in _typed_tiles(k)}
        self.checker = TypeChecker(types, {})
        self.flushed = _flushed(k)
        self.axes: dict[str, Axis] = {}
        self.loops: list[For] = []
        self.places: dict[str, Place] = {}
        self.there: dict[str, There] = {}
        self.lines: list[str] = []
        self.depth = 0
        self.stack = 0
        self.workspace = 0
        self.workspace_peak = 0
        self.dot_floats = 0
        self.panels: dict[tuple[str, str, str, str], str] = {}
        self.finite: dict[str, str] = {}
        self.looked = 0
        self.alone = False
        self.recipes: dict[str, Recipe | None] = {}
        self.makers: dict[str, str] = {}
        self.aligned: dict[str, int] = {}
        # Names in a fixed order, so that the text does not hang on what is printed first.
        for p in k.tensors:
            self.names("tensor", p.name)
        for r in [*(g.rank for g in k.grid), *runtime_ranks(k)]:
            self.names("rank", r)
        for name in tiles_of(k):
            self.names("tile", name)

    def line(self, text: str = "") -> None:
        self.lines.append("  " * self.depth + text if text else "")

    def open(self, text: str) -> None:
        self.line(f"{text} {{".lstrip())
        self.depth += 1

    def close(self, text: str = "}") -> None:
        self.depth -= 1
        self.line(text)

    def _stride(self, tensor: str, axis: int) -> str:
        return self.names("stride", f"{tensor}_{axis}")

    def _size(self, tensor: str, axis: int) -> str:
        return self.names("size", f"{tensor}_size{axis}")

    def _extent(self, rank: str) -> str:
        return self.names("extent", rank, "{}_extent")

    def _extent_text(self, rank: str) -> str:
        return str(self.k.fixed[rank]) if rank in self.k.fixed else self._extent(rank)

    def _tiles(self, g: GridRank) -> str:
        return self._extent_text(g.rank) if g.size == 1 else self.names("tiles", g.rank, "{}_tiles")

    def _base(self, rank: str) -> str:
        return self.names("base", rank, "{}0")

    def _count(self, rank: str) -> str:
        return self.names("count", rank, "{}_n")

    def _declare(self, tile: Tile, last: str | None = None) -> None:
        """Make room for a tile, unless it has some. ``last`` is the axis to lay along memory, else its own last one."""
        if tile.name in self.places:
            return
        order = tile.axes if last is None else (*(r for r in tile.axes if r != last), last)
        sizes = [self.axes[r].size for r in order]
        width = DTYPES[tile.dtype].bits // 8
        if math.prod(sizes[:-1]) > 1 and sizes[-1] * width % ALIASED == 0:
            # Rows a large power of two apart fall into the same few lines of the nearest cache.
            sizes[-1] += 64 // width
        place = Place(tile, self.names("tile", tile.name), order, tuple(sizes))
        self.places[tile.name] = place
        kind = ctype(tile.dtype)
        if place.elements == 1:
            self.line(f"{kind} {place.name};")
            return
        size = max(1, place.elements) * DTYPES[tile.dtype].bits // 8
        if size <= LARGEST_ON_STACK and self.stack + size <= STACK:
            self.stack += size
            self.line(f"alignas(64) {kind} {place.name}[{max(1, place.elements)}];")
            return
        self.line(f"{kind}* const {place.name} = reinterpret_cast<{kind}*>({self._room(size)});")

    def _room(self, size: int) -> str:
        """Memory of the thread's workspace for some bytes."""
        at = self.workspace
        self.workspace += -(-size // 64) * 64
        self.workspace_peak = max(self.workspace_peak, self.workspace)
        return f"local + {at}"

    def _place(self, name: str) -> Place:
        """Where a tile lies, or will."""
        if name in self.places:
            return self.places[name]
        tile = self.tiles[name]
        return Place(tile, name, tile.axes, tuple(self.axes[r].size if r in self.axes else 1 for r in tile.axes))

    def _element(self, name: str) -> str:
        """A tile's element at the loops' positions."""
        place = self._place(name)
        if place.elements == 1:
            return place.name
        terms = []
        for r in place.long:
            stride = place.step(r)
            terms.append(self.axes[r].index + (f" * {stride}" if stride != "1" else ""))
        return f"{place.name}[{' + '.join(terms)}]"

    def _nest(self, ranks: Sequence[str], body: Callable[[], None], pragma: str = "") -> None:
        """Loops over positions, one rank each; ``pragma`` stands before the innermost."""
        loops = [r for r in ranks if self.axes[r].size != 1]
        for r in loops:
            axis = self.axes[r]
            if pragma and r == loops[-1]:
                self.line(pragma)
            self.open(f"for (int64_t {axis.index} = 0; {axis.index} < {axis.count}; ++{axis.index})")
        body()
        for _ in loops:
            self.close()


def text_of(k: TileKernel, op: Op) -> str:
    """An operation's own line in the text of its kernel."""
    return print_kernel(replace(k, tensors=(), body=(op,))).split("\n")[1].strip()


def _typed_tiles(k: TileKernel) -> list[Tile]:
    """The kernel's tiles; one name has one dtype, or its expressions would have none."""
    found: dict[str, Tile] = {}
    for op in operations(k.body):
        if isinstance(op, Load | Map | Fold | Dot):
            known = found.setdefault(op.tile.name, op.tile)
            if known.dtype != op.tile.dtype:
                raise VerifyError(f"in kernel `{k.name}`: tile `{op.tile.name}` has two dtypes")
    return list(found.values())
