"""What every part of the Triton printer shares: names, lines, the axes in scope, and texts of whole tiles."""

from __future__ import annotations

import math
from collections.abc import Mapping as Dict
from collections.abc import Sequence
from dataclasses import dataclass

from ..ir.cascade import Expr, Param
from ..ir.device import device_of
from ..ir.dtypes import DTYPES
from ..ir.footprint import scoped, scoped_sizes
from ..ir.mapping import Mapping
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
    integer_products,
    operations,
    tiles_of,
    verify_kernel,
)
from ..ir.types import TypeChecker
from .interface import checked_axes, runtime_ranks
from .names import Names
from .triton_expr import ATOM, Expressions, Value, aligned
from .triton_prelude import HELPERS

# The least size of each side of a matrix product on every GPU that Triton knows.
LEAST_DOT = 16

# Names that generated Triton must not take: Python's words, its built-ins in use, and the module's own.
TAKEN = tuple(
    """False None True and as assert async await break class continue def del elif else except finally for from global
    if import in is lambda nonlocal not or pass raise return try while with yield match case type int float bool max min
    range len abs pow round print sum any all tl triton torch INF LOG2_E INDEX pid fault fault_ out exp sigmoid
    maximum minimum reduce_max reduce_min reduce_prod multiply expm1 log1p tanh rint floordiv floormod shift_left
    shift_right to_integer to_bf16 point SPECIALIZE units
    reference along value over device extents described specialize TensorDescriptor grid main check self
    dot annihilating
    tensors spans narrow positions programs faults number names largest low high middle fits abs zip sum bool
    case unshared""".split()
) + tuple(HELPERS)


def power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


@dataclass(frozen=True, slots=True)
class Axis:
    """A rank in scope: the step from tile to tile, the size of its vector, where the vector starts, and whether lanes
    are inactive for no other reason than the extent."""

    step: int
    block: int
    start: str = "0"
    plain: bool = False


@dataclass(frozen=True, slots=True)
class Argument:
    """An argument of a kernel.

    ``kind`` is "pointer", "scalar", "stride", "size" (of ``axis`` of tensor ``name``), "extent" (of rank ``name``),
    "fault", "descriptor" (of the tiles of tensor ``name``, which have the sizes ``block``), or a constant: "even" (is
    the extent of rank ``name`` a multiple of ``value``?), "constant", "index" (the type of positions), "specialize"
    (do warps share out the work of loops?).
    """

    text: str
    kind: str
    name: str = ""
    axis: int = 0
    value: int = 0
    block: tuple[int, ...] = ()

    @property
    def is_constant(self) -> bool:
        return self.kind in ("even", "constant", "index", "specialize")


@dataclass(frozen=True, slots=True)
class Printed:
    """A kernel as text, what a host passes to it, and the helpers that it needs.

    ``grid`` holds the extents' ranks and steps whose counts of tiles multiply to the number of programs, and how many
    there are at least.
    """

    name: str
    text: str
    arguments: tuple[Argument, ...]
    grid: tuple[tuple[str, int, int], ...]
    helpers: frozenset[str]
    sequential: bool


class Scope:
    """The state of a printer of one kernel, and what its operations are written with."""

    def __init__(
        self, k: TileKernel, name: str, mapping: Mapping, *, by_value: frozenset[str], numerics: str, target: str
    ) -> None:
        """``by_value`` names the 0-dimensional tensors that are numbers; others of no axes lie in memory."""
        verify_kernel(k)
        self.by_value = by_value
        self.k = k
        self.function = name
        self.numerics = numerics
        self.mapping = mapping
        self.interpret = interpret = target == "interpret"
        self.target = target
        self.features = device_of(target).features
        self.specialises = bool(mapping.knob("specialize") and (self.features & {"wgmma", "tcgen05"} or interpret))
        self.params: Dict[str, Param] = {p.name: p for p in k.tensors}
        self.names = Names((*TAKEN, name))
        types = {p.name: p.dtype for p in k.tensors}
        types |= {op.tile.name: op.tile.dtype for op in operations(k.body) if isinstance(op, Load | Map | Fold | Dot)}
        self.checker = TypeChecker(types, {})
        scalars = {p.name: p.dtype for p in k.tensors if not p.indices}
        self.e = Expressions(self.checker, self.named, scalars, interpret, numerics != "fast")
        self.checked = checked_axes(k)
        self.axes: dict[str, Axis] = {}
        self.lines: list[str] = []
        self.depth = 1
        self.constants: dict[str, Argument] = {}
        self.values: set[str] = set()
        self.read: set[str] = set()
        self.least = least_blocks(k)
        self.kept = kept_types(k)
        self.clean: set[str] = set()
        self.exact = integer_products(k)
        self.blocks: dict[str, tuple[int, ...]] = {}
        self.sequential = any(isinstance(op, Load) and op.source.tensor in k.outputs for op in operations(k.body))
        for p in k.tensors:
            self.names("tensor", p.name)
        for r in [*(g.rank for g in k.grid), *(h.rank for h in k.held), *runtime_ranks(k)]:
            self.names("rank", r)
        for t in types:
            self.names("tensor" if t in self.params else "tile", t)

    # Names

    def named(self, kind: str, name: str) -> str:
        match kind:
            case "extent":
                return self.names("extent", name, "{}_extent")
            case "extent value":
                self.values.add(name)
                return self.names("total", name, "{}_total")
            case "start":
                return self.names("start", name, "{}0")
            case "in":
                return self.names("in", name, "{}_in")
            case "scalar" if name in self.k.outputs:
                return f"tl.load({self.names('tensor', name)})"
            case "scalar":
                self.read.add(name)
                return self.names("scalar", name, "{}_value")
            case _:
                return self.names(kind, name)

    def extent(self, rank: str) -> str:
        return str(self.k.fixed[rank]) if rank in self.k.fixed else self.named("extent", rank)

    def stride(self, tensor: str, axis: int) -> str:
        return self.names("stride", f"{tensor}_stride{axis}")

    def size(self, tensor: str, axis: int) -> str:
        return self.names("size", f"{tensor}_size{axis}")

    def descriptor(self, tensor: str) -> str:
        return self.names("descriptor", f"{tensor}_tiles")

    def constant(self, form: str, rank: str, value: int, kind: str = "constant") -> str:
        text = self.names(f"{kind} {value}", rank, form)
        self.constants.setdefault(text, Argument(text, kind, rank, 0, value))
        return text

    # Lines

    def line(self, text: str) -> None:
        self.lines.append("    " * self.depth + text if text else "")

    # Axes

    def _shape(self, axes: Sequence[str]) -> list[str]:
        return [self.constant("BLOCK_{}", a, self.axes[a].block) for a in axes]

    def _long(self, axes: Sequence[str]) -> tuple[str, ...]:
        """The axes of many coordinates."""
        return tuple(a for a in axes if self.axes[a].block != 1)

    def _mask(self, axes: Sequence[str], over: Sequence[str]) -> str:
        """The active lanes of some axes, over the given ones; "" where all always are."""
        return " & ".join(aligned(self.named("in", a), (a,), over) for a in over if a in axes)

    def _whole_text(self, e: Expr, dtype: str, axes: Sequence[str]) -> str:
        """An expression as a value of a dtype over exactly the given axes."""
        v = self.e.value(e, axes, dtype)
        if v.literal:
            return self.e.full(self._shape(axes), v, dtype)
        text = v.text if v.dtype == dtype else self.e.converted(v, dtype)
        if self.e.spread(e) >= set(axes):
            return Value(text, v.level if v.dtype == dtype else ATOM, dtype).at(0)
        return self.e.full(self._shape(axes), Value(text, ATOM, dtype), dtype)

    def _set(self, tile: Tile, text: str, clean: bool = False) -> None:
        """Assign a tile."""
        axes = self._long(tile.axes)
        name = self.names("tile", tile.name)
        self.e.tiles[tile.name] = (name, axes, self.kept.get(tile.name, tile.dtype))
        self.line(f"{name} = {text}")
        (self.clean.add if clean else self.clean.discard)(tile.name)

    def _block(self, rank: str, size: int) -> int:
        return max(power_of_two(size), self.least.get(rank, 1))

    def _step(self, rank: str, size: int) -> str:
        if self._block(rank, size) == size:
            return self.constant("BLOCK_{}", rank, size)
        return str(size)


def dot_groups(
    op: Dot, axes: Dict[str, tuple[str, ...]], kept: tuple[str, ...]
) -> tuple[str, str, tuple[str, ...], tuple[str, ...], tuple[str, ...]] | None:
    """The operands of a matrix product in order, and the axes of its batch, rows and columns; None where it is none."""
    a, b = set(axes[op.left]), set(axes[op.right])
    batch = tuple(r for r in kept if r in a and r in b)
    rows = tuple(r for r in kept if r in a and r not in b)
    columns = tuple(r for r in kept if r in b and r not in a)
    over = [r for r in op.over if r in a and r in b]
    if not rows or not columns or not over:
        return None
    rest = [r for r in kept if r not in batch]
    if rest and rest[0] in columns:
        return op.right, op.left, batch, columns, rows
    return op.left, op.right, batch, rows, columns


def least_blocks(k: TileKernel) -> dict[str, int]:
    """The least size of each rank's vector, so that dots are matrix products of at least 16 by 16 by 16."""
    least: dict[str, int] = {}

    def visit(body: tuple[Op, ...], sizes: dict[str, int], tiles: dict[str, Tile]) -> None:
        for op in body:
            if isinstance(op, For):
                visit(op.body, {**sizes, op.rank: op.size}, tiles)
                continue
            if isinstance(op, Load | Map | Fold | Dot):
                tiles[op.tile.name] = op.tile
            if not isinstance(op, Dot):
                continue
            long = {t: tuple(a for a in tiles[t].axes if sizes[a] != 1) for t in (op.left, op.right, op.tile.name)}
            plan = dot_groups(op, long, long[op.tile.name])
            if plan is None:
                continue
            _, _, _, m, n = plan
            for group in (m, n, tuple(r for r in op.over if sizes[r] != 1)):
                product = 1
                for r in group:
                    product *= max(power_of_two(sizes[r]), least.get(r, 1))
                if product < LEAST_DOT:
                    widest = max(group, key=lambda r: sizes[r])
                    now = max(power_of_two(sizes[widest]), least.get(widest, 1))
                    least[widest] = now * (LEAST_DOT // product)

    sizes = {g.rank: g.size for g in k.grid} | {h.rank: h.size for h in k.held}
    visit(k.body, sizes, {})
    return least


def largest_operation(k: TileKernel) -> tuple[int, str]:
    """The elements that the largest operation of a kernel goes over, as vectors, and the rank to tile smaller for less.

    A `Dot` that is no matrix product is a sum over all its products.
    """
    least, tiles = least_blocks(k), tiles_of(k)
    most, found = 0, k.grid[0].rank if k.grid else ""
    for op, sizes in scoped(k.body, scoped_sizes(k)):
        if isinstance(op, For):
            continue
        axes = op.axes if isinstance(op, Store) else op.tile.axes
        if isinstance(op, Fold):
            axes += op.over
        if isinstance(op, Dot):
            long = {t: tuple(a for a in tiles[t].axes if sizes[a] != 1) for t in (op.left, op.right, op.tile.name)}
            axes += op.over if dot_groups(op, long, long[op.tile.name]) is None else ()
        blocks = {a: max(power_of_two(sizes[a]), least.get(a, 1)) for a in axes}
        if (elements := math.prod(blocks.values())) > most:
            most, found = elements, max(blocks, key=lambda a: blocks[a], default=found)
    return most, next((h.of for h in k.held if h.rank == found), found)


def kept_types(k: TileKernel) -> dict[str, str]:
    """Tiles that only loads make and that stay in the narrower type of their tensor until they are used."""
    params = {p.name: p.dtype for p in k.tensors}
    makers: dict[str, list[Op]] = {}
    for op in operations(k.body):
        if isinstance(op, Load | Map | Fold | Dot):
            makers.setdefault(op.tile.name, []).append(op)
    found = {}
    for name, ops in makers.items():
        loads = [op for op in ops if isinstance(op, Load)]
        types = {params[op.source.tensor] for op in loads}
        scalar = any(not op.source.indices for op in loads)
        if len(loads) == len(ops) and len(types) == 1 and not scalar:
            (dtype,) = types
            tile = loads[0].tile
            row = DTYPES[dtype]
            if dtype not in ("bool", tile.dtype) and row.compute == tile.dtype and row.bits < DTYPES[tile.dtype].bits:
                found[name] = dtype
    return found
