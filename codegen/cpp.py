"""C++ from tile programs: one readable translation unit with a C entry point for each kernel.

An operation prints as a loop nest over its tile's axes, its innermost loop along contiguous memory for the compiler to
vectorise; a dot prints as a call of the register-blocked kernel in `tile.h`. Tensors keep their strides, ranks their
extents as arguments: nothing but the ranks in ``fixed`` is known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np

from ..ir.cascade import Access, Call, Cast, Const, Expr, Extent, Param, Rank, free_ranks, literal_value, walk
from ..ir.dtypes import DTYPES
from ..ir.errors import VerifyError
from ..ir.interval import is_affine
from ..ir.ops import OPS
from ..ir.tile import (
    Dot,
    Fold,
    For,
    GridRank,
    Load,
    Map,
    Op,
    Store,
    Tile,
    TileKernel,
    lacking_ranks,
    operations,
    print_kernel,
    tiles_of,
    verify_kernel,
)
from ..ir.types import WEAK_FLOAT, WEAK_INT, TypeChecker, compute_type, computed_in, join, settle
from .made import LONGEST, Recipe, at, multiple, period
from .names import Names, comment, safe
from .strips import ROWS, Strip, reads, runs, strips, writes
from .vectors import WIDEST, Lanes, NotVectors, Text, steps

# Bytes of tiles on a thread's stack: of one, and of all. What is larger lies in the thread's workspace.
LARGEST_ON_STACK = 1 << 15
STACK = 1 << 17

# Bytes of a thread's workspace beyond which a kernel is refused: without memory it could only abort the process.
LARGEST_WORKSPACE = 1 << 30

# Bytes from row to row that are a multiple of this are too regular for a cache.
ALIASED = 1024

# By how many blocks of an operand that is made its tensors are fetched ahead: rows a page apart are not foreseen.
AHEAD = 4

# The widest panel of B that `dot` packs, in columns.
PANEL = 64

# What -O3 adds to this costs GCC twice the time and gives these kernels nothing: their loops say what is to be done.
FLAGS = tuple(
    "-std=c++17 -O2 -ftree-vectorize -fpeel-loops -ffp-contract=fast -fno-math-errno -fno-trapping-math -fwrapv".split()
)

# The types of `tile.h` that are structures around their bits.
NARROW = ("f16", "bf16", "f8e4m3", "f8e5m2")

_REDUCERS = {"sum": "Sum", "prod": "Prod", "max": "Max", "min": "Min", "any": "Any", "all": "All"}
_JOINS = {"sum": "{a} + {b}", "prod": "{a} * {b}", "max": "maximum({a}, {b})", "min": "minimum({a}, {b})"}
_JOINS |= {"any": "{a} | {b}", "all": "{a} & {b}"}

ATOM, UNARY, MUL, ADD, LOOSE = 9, 8, 7, 6, 1
_LEVELS = {"add": (ADD, ADD, MUL), "sub": (ADD, ADD, MUL), "mul": (MUL, MUL, UNARY), "div": (MUL, MUL, UNARY)}


# Arguments


@dataclass(frozen=True, slots=True)
class Field:
    """One 8-byte member of a kernel's argument struct.

    ``kind`` is "pointer", "stride", "size" (of ``axis`` of tensor ``name``), "extent" (of rank ``name``) or "fault"
    (where a kernel writes i when data index its i-th tensor, counted from 1, outside an axis).
    """

    kind: str
    name: str = ""
    axis: int = 0


def arguments(k: TileKernel) -> tuple[Field, ...]:
    """The members of a kernel's argument struct, in order."""
    checked = checked_axes(k)
    fields: list[Field] = []
    for p in k.tensors:
        fields.append(Field("pointer", p.name))
        fields += [Field("stride", p.name, axis) for axis in range(len(p.indices))]
        fields += [Field("size", p.name, axis) for axis in range(len(p.indices)) if (p.name, axis) in checked]
    fields += [Field("extent", r) for r in runtime_ranks(k)]
    if checked:
        fields.append(Field("fault"))
    return tuple(fields)


def runtime_ranks(k: TileKernel) -> tuple[str, ...]:
    """The ranks whose extents are arguments: those of the grid, of loops and of `extent`, unless they are fixed."""
    ranks = dict.fromkeys([*(g.rank for g in k.grid), *(h.of for h in k.held)])
    for op in operations(k.body):
        if isinstance(op, For):
            ranks[op.rank] = None
        for e in _expressions(op):
            ranks.update(dict.fromkeys(n.rank for n in walk(e) if isinstance(n, Extent)))
    return tuple(r for r in ranks if r not in k.fixed)


def bounded_ranks(k: TileKernel) -> frozenset[str]:
    """The ranks of loops that all end where an expression says: these need no extent."""
    found = {op.rank for op in operations(k.body) if isinstance(op, For)}
    found -= {op.rank for op in operations(k.body) if isinstance(op, For) and op.upper is None}
    found -= {n.rank for op in operations(k.body) for e in _expressions(op) for n in walk(e) if isinstance(n, Extent)}
    return frozenset(found - {g.rank for g in k.grid} - {h.of for h in k.held})


def checked_axes(k: TileKernel) -> frozenset[tuple[str, int]]:
    """The axes of tensors that data index: these are checked as the kernel runs."""
    declared = {p.name: p.indices for p in k.tensors}
    found = set()
    for op in operations(k.body):
        if isinstance(op, Load | Store):
            access = op.source if isinstance(op, Load) else op.target
            found |= {(access.tensor, i) for i in checked_indices(op, declared[access.tensor])}
    return frozenset(found)


def checked_indices(op: Load | Store, declared: Sequence[Expr]) -> frozenset[int]:
    """The indices of a load or store that only data can tell to lie inside: they read data, or data guard them."""
    access, guard = (op.source, op.guard) if isinstance(op, Load) else (op.target, None)
    open_guard = guard is not None and any(isinstance(n, Access) for n in walk(guard))
    return frozenset(i for i, e in enumerate(access.indices) if not is_affine(e) or (open_guard and e != declared[i]))


def _expressions(op: Op) -> Iterator[Expr]:
    """The expressions of one operation, those of a loop's body not among them."""
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
        case Dot():
            return


def entry_names(kernels: Sequence[TileKernel]) -> tuple[str, ...]:
    """The C symbol of each kernel."""
    names = Names()
    return tuple(names("entry", str(i), f"castile_{safe(k.name)}") for i, k in enumerate(kernels))


# The translation unit


@cache
def header() -> str:
    """The text of `tile.h`."""
    return Path(__file__).with_name("tile.h").read_text(encoding="utf-8")


INCLUDE = '#include "tile.h"\n'


def standalone(source: str) -> str:
    """A printed translation unit with `tile.h` put in its place, so that it needs no file but itself."""
    return source.replace(INCLUDE, header().replace("#pragma once\n\n", ""), 1)


def print_cpp(kernels: Sequence[TileKernel], name: str) -> str:
    """One C++17 translation unit with an ``extern "C"`` entry for each kernel.

    It includes `tile.h`; `standalone` puts that in. Raises `VerifyError` for a kernel that means nothing or that C++
    cannot hold.
    """
    build = f"c++ {' '.join(FLAGS)} -march=native -fopenmp -shared -fPIC {safe(name)}.cpp -o {safe(name)}.so"
    parts = [f"{comment(name)}: generated by castile.\n// {build}\n\n{INCLUDE}\nnamespace castile {{\n"]
    for k, entry in zip(kernels, entry_names(kernels), strict=True):
        verify_kernel(k)
        parts.append(Printer(k, entry).kernel())
    return "\n".join([*parts, "}  // namespace castile\n"])


def ctype(dtype: str) -> str:
    """The C++ type of a value."""
    return DTYPES[dtype].cpp


def stored(dtype: str) -> str:
    """The C++ type of a tensor's element: any byte but 0 is true."""
    return "uint8_t" if dtype == "bool" else ctype(dtype)


@dataclass(frozen=True, slots=True)
class Value:
    """The text of an expression, how tightly it binds, and its dtype."""

    text: str
    level: int
    dtype: str

    def at(self, floor: int) -> str:
        return f"({self.text})" if self.level < floor else self.text


@dataclass(frozen=True, slots=True)
class Axis:
    """A rank in scope: the greatest size of its tile, the text of its first coordinate and of its count of coordinates.

    ``index`` names the position within the tile.
    """

    size: int
    base: str
    count: str
    index: str


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


class Printer:
    """Prints one kernel."""

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
        self.axes: dict[str, Axis] = {}
        self.places: dict[str, Place] = {}
        self.lines: list[str] = []
        self.depth = 0
        self.stack = 0
        self.workspace = 0
        self.workspace_peak = 0
        self.dot_floats = 0
        self.panels: dict[tuple[str, str, str, str], str] = {}
        self.finite: dict[str, str] = {}
        self.looked = 0
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

    # Lines

    def line(self, text: str = "") -> None:
        self.lines.append("  " * self.depth + text if text else "")

    def open(self, text: str) -> None:
        self.line(f"{text} {{".lstrip())
        self.depth += 1

    def close(self, text: str = "}") -> None:
        self.depth -= 1
        self.line(text)

    # The kernel

    def kernel(self) -> str:
        body = self._body()
        self.lines, self.depth = [], 0
        head = print_kernel(self.k).split("\n")
        for text in head[: 1 + len(self.k.tensors)]:
            self.line(comment(text))
        self._struct()
        self.line()
        self.line('extern "C"')
        self.open(f"void {self.entry}(const {self.entry}_args* args, int64_t first, int64_t last, int64_t threads)")
        self._unpack()
        self._grid(body)
        self.close()
        return "\n".join(self.lines) + "\n"

    def _struct(self) -> None:
        """Every member takes 8 bytes, so a caller may fill it as an array of words."""
        self.open(f"struct {self.entry}_args")
        for p in self.k.tensors:
            name = self.names("tensor", p.name)
            const = "" if p.name in self.k.outputs else "const "
            self.line(f"{const}{stored(p.dtype)}* {name};")
            if p.indices:
                self.line(f"int64_t {', '.join(self._stride(p.name, i) for i in range(len(p.indices)))};  // strides")
            sizes = [self._size(p.name, i) for i in range(len(p.indices)) if (p.name, i) in self.checked]
            if sizes:
                self.line(f"int64_t {', '.join(sizes)};  // sizes of the axes that data index")
        if ranks := runtime_ranks(self.k):
            self.line(f"int64_t {', '.join(self._extent(r) for r in ranks)};")
        if self.checked:
            self.line("int64_t* fault;  // becomes i if data index the i-th tensor outside its axis")
        self.close("};")

    def _unpack(self) -> None:
        for p in self.k.tensors:
            name = self.names("tensor", p.name)
            const = "" if p.name in self.k.outputs else "const "
            if not p.indices and p.name not in self.k.outputs:
                self.line(f"const {ctype(p.dtype)} {name} = {_from_memory(p.dtype, f'*args->{name}')};")
                continue
            self.line(f"{const}{stored(p.dtype)}* const {name} = args->{name};")
            strides = [self._stride(p.name, i) for i in range(len(p.indices))]
            strides += [self._size(p.name, i) for i in range(len(p.indices)) if (p.name, i) in self.checked]
            self._from_args(strides)
        self._from_args([self._extent(r) for r in runtime_ranks(self.k)])
        if self.checked:
            self.line("int64_t* const fault = args->fault;")

    def _from_args(self, names: Sequence[str]) -> None:
        for i in range(0, len(names), 4):
            self.line("const int64_t " + ", ".join(f"{n} = args->{n}" for n in names[i : i + 4]) + ";")

    def _grid(self, body: list[str]) -> None:
        counts, always = [], lacking_ranks(self.k)
        for g in self.k.grid:
            count = self._tiles(g)
            if g.size != 1:
                number = f"tiles({self._extent_text(g.rank)}, {g.size})"
                number = f"at_least(1, {number})" if g.rank in always else number
                self.line(f"const int64_t {count} = {number};")
            counts.append(count)
        self.line(f"const int64_t points = {' * '.join(counts) or '1'};")
        # What a thread is worth follows the operation over most ranks.
        extent_of = {h.rank: h.of for h in self.k.held}
        work = " * ".join(["1.0", *(f"{self._extent_text(extent_of.get(r, r))}" for r in _widest(self.k))])
        self.line(f"threads = worth(threads, {work});")
        self.open("parallel_for(first, last < 0 ? points : last, threads, [&](int64_t point)")
        self.lines += body
        self.close("});")

    def _body(self) -> list[str]:
        """The lines of one grid point."""
        self.depth = 2
        grid = self.k.grid
        for h in self.k.held:
            self.axes[h.rank] = Axis(h.size, "0", self._extent_text(h.of), self.names("rank", h.rank))
        for i, g in reversed(list(enumerate(grid))):
            point = f"point % {self._tiles(g)}" if i else "point"
            self._begin(g.rank, g.size, point if g.size == 1 or not i else f"({point})", self._extent_text(g.rank))
            if i:
                self.line(f"point /= {self._tiles(g)};")
        start = len(self.lines)
        self._ops(self.k.body)
        if any(isinstance(op, Store) and op.through for op in self.readers):
            self.line("fence();")
        if self.workspace_peak or self.dot_floats:
            # A dot packs its operands behind the tiles; where that is, is known only now.
            size = self.workspace_peak + 4 * self.dot_floats
            if size > LARGEST_WORKSPACE:
                raise VerifyError(
                    f"the tiles of kernel `{self.k.name}` take {size >> 20} MiB a thread", hint="map smaller ones"
                )
            self.lines.insert(start, "  " * self.depth + f"char* const local = workspace({size});")
        return [t.replace("local + DOT)", f"local + {self.workspace_peak})") for t in self.lines]

    def _begin(self, rank: str, size: int, point: str, last: str) -> None:
        """Declare the first coordinate and the count of a grid rank's tile."""
        index = self.names("rank", rank)
        if size == 1:
            self.line(f"const int64_t {index} = {point};")
            self.axes[rank] = Axis(1, index, "1", index)
            return
        base, count = self._base(rank), self._count(rank)
        self.line(f"const int64_t {base} = {point} * {size}, {count} = at_most({size}, {last} - {base});")
        self.axes[rank] = Axis(size, base, count, index)

    # Names

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

    # Operations

    def _ops(self, body: tuple[Op, ...]) -> None:
        plain: list[Op] = []
        for group in strips(body, lambda r: self.axes[r].size if r in self.axes else 1):
            if group.axis is None:
                plain += group.ops
                continue
            self._sequence(plain, self._row(plain))
            plain = []
            self._strip(group, body)
        self._sequence(plain, self._row(plain))

    def _op(self, op: Op) -> None:
        for t in writes(op) & set(self.places):
            # What was found of a tile holds until it is written again.
            self.finite.pop(self.places[t].name, None)
        self.line(comment(_text(self.k, op)))
        name = op.tile.name if isinstance(op, Load | Map | Fold | Dot) else None
        if name is not None and name in self.k.comments:
            self.line(comment(self.k.comments[name]))
        match op:
            case For():
                self._for(op)
            case Store():
                self._store(op)
            case Load():
                if self._into_made(op) or self._view(op):
                    return
                # A tile lies in memory as its tensor does, so that both are walked along.
                self._declare(op.tile, self._along(op.source, op.tile.axes))
                self._load(op)
            case Map():
                if (recipe := self._recipe(op)) is not None:
                    self._make(op, recipe)
                    return
                self._declare(op.tile, self._as_read(op))
                self._map(op)
            case Fold():
                self._declare(op.tile)
                self._fold(op)
            case Dot():
                self._declare(op.tile)
                self._dot(op)

    # Runs

    def _row(self, ops: Sequence[Op]) -> str | None:
        """The axis that all maps and folds of a body keep and along which no tensor lies, if there is one."""
        tiles = [op.tile for op in ops if isinstance(op, Map | Fold)]
        common = [r for r in tiles[0].axes if all(r in t.axes for t in tiles)] if tiles else []
        last = {t.axes[-1] for t in tiles if t.axes}
        long = {r for op in ops if isinstance(op, Map | Fold) for r in self._inner(op, None)}
        accesses = [op.source if isinstance(op, Load) else op.target for op in ops if isinstance(op, Load | Store)]
        along = {a.indices[-1] for a in accesses if len(long & free_ranks(a)) > 1}
        common = [r for r in common if Rank(r) not in along]
        return next((r for r in common if self.axes[r].size != 1 and (r not in last or len(long) > 1)), None)

    def _sequence(self, ops: Sequence[Op], row: str | None) -> None:
        """Operations in order; maps and folds that follow each other take one loop over the rows."""
        run: list[Load | Map | Fold | Store] = []
        taken: Map | None = None
        for i, op in enumerate(ops):
            if taken is not None:
                taken = None
                continue
            following = ops[i + 1] if i + 1 < len(ops) else None
            if isinstance(op, Dot) and isinstance(following, Map) and self._takes(following, op):
                self._run(run, row)
                run, taken = [], following
                self._dot_into(op, following)
                continue
            if not isinstance(op, For | Dot) and self._runs(op, row):
                run.append(op)
                continue
            self._run(run, row)
            run = []
            self._op(op)
        self._run(run, row)

    def _inner(self, op: Load | Map | Fold | Store, row: str | None) -> tuple[str, ...]:
        """The axes along which an operation on one row goes."""
        axes = op.axes if isinstance(op, Store) else op.tile.axes
        over = op.over if isinstance(op, Fold) else ()
        return tuple(r for r in (*axes, *over) if self.axes[r].size != 1 and r != row)

    def _runs(self, op: Load | Map | Fold | Store, row: str | None) -> bool:
        """Whether an operation may share the loop over rows: one scalar a row, or vectors along one axis."""
        inner = self._inner(op, row)
        if (row is not None and row not in (op.axes if isinstance(op, Store) else op.tile.axes)) or len(inner) > 1:
            return False
        if isinstance(op, Store):
            param = self.params[op.target.tensor]
            plain = len(inner) == 1 and param.dtype in ("f32", "bf16") and not checked_indices(op, param.indices)
            good = plain and self.axes[inner[0]].size % WIDEST == 0 and self._side(op.target, inner[0]) is not None
            return good and self._vectors(op.expr, inner[0], frozenset(op.axes)) is not None
        if isinstance(op, Load):
            param = self.params[op.source.tensor]
            plain = op.guard is None and param.name not in self.k.outputs and not checked_indices(op, param.indices)
            good = plain and len(inner) == 1 and op.tile.dtype == "f32" and param.dtype in ("f32", "bf16")
            return good and self.axes[inner[0]].size % WIDEST == 0 and self._side(op.source, inner[0]) is not None
        if isinstance(op, Map):
            if not inner:
                return True
            place = self._place(op.tile.name)
            good = place.long[-1] == inner[0] == self._vector_axis(place)
        else:
            if not inner or inner[0] in op.tile.axes or op.op not in ("sum", "prod", "max", "min"):
                return False
            good = op.tile.dtype == "f32" and self.axes[inner[0]].size % WIDEST == 0
            good = good and settle(self.checker.infer(op.expr)) == "f32"
        own = any(isinstance(n, Access) and n.tensor == op.tile.name for n in walk(op.expr))
        if own and isinstance(op, Fold):
            return False
        return good and self._vectors(op.expr, inner[0], frozenset((*op.tile.axes, *inner))) is not None

    def _side(self, access: Access, inner: str) -> int | None:
        """The index of a tensor that moves by one with an axis, if no other moves."""
        moves = steps(access.indices, (inner,))
        return moves[inner][0] if moves is not None and moves[inner][1] == 1 else None

    def _run(self, run: Sequence[Load | Map | Fold | Store], row: str | None) -> None:
        """Loads, maps, folds and stores of one row; what only the same loop reads stays in a register."""
        loads = {op.tile.name: op for op in run if isinstance(op, Load)}
        work = [op for op in run if not isinstance(op, Load)]
        for name in list(loads):
            if not work or any(name in reads(x) for x in self.readers if x not in work):
                self._op(loads.pop(name))
        # A tile that had to be loaded before lies as its tensor does, which may not be along the row.
        if len(work) + len(loads) < 2 or not all(self._runs(op, row) for op in work):
            for each in (*loads.values(), *work):
                self._op(each)
            return
        groups = runs(work, lambda op: self._inner(op, row))
        written = [op.tile.name for op in self.readers if not isinstance(op, Store)]
        kept: set[str] = set(loads)
        for group in groups:
            made = {op.tile.name for op in group if isinstance(op, Map) and op.tile.dtype == "f32" and len(group) > 1}
            others = [op for op in self.readers if op not in group]
            kept |= {t for t in made if written.count(t) == 1 and not any(t in reads(op) for op in others)}
        for x in (*loads.values(), *work):
            self.line(comment(_text(self.k, x)))
            if not isinstance(x, Store) and x.tile.name not in kept:
                self._declare(x.tile)
        if row is not None:
            axis = self.axes[row]
            self.open(f"for (int64_t {axis.index} = 0; {axis.index} < {axis.count}; ++{axis.index})")
        for group in groups:
            inner = self._inner(group[0], row)
            if not inner:
                one = group[0]
                assert isinstance(one, Map)
                axes = frozenset(one.tile.axes)
                self.line(f"{self._element(one.tile.name)} = {self.typed(one.expr, one.tile.dtype, axes)};")
            else:
                used = set().union(*(reads(op) for op in group))
                self._group([*(x for t, x in loads.items() if t in used), *group], inner[0], kept)
        if row is not None:
            self.close()

    def _stored(self, op: Store, inner: str, value: str) -> str:
        """The statement that puts a vector into a tensor."""
        param, axis = self.params[op.target.tensor], self.axes[inner]
        side = self._side(op.target, inner)
        assert side is not None
        at = self._offset(op.target, frozenset(op.axes), frozenset())
        name, stride = self.names("tensor", param.name), self._stride(param.name, side)
        call = "stream" if op.through else "store"
        return f"{call}(&{name}[{at}], {stride}, {value}, {axis.count} - {axis.index});"

    def _loaded(self, op: Load, inner: str) -> str:
        """The text of a vector from a tensor."""
        param, axis = self.params[op.source.tensor], self.axes[inner]
        side = self._side(op.source, inner)
        assert side is not None
        at = self._offset(op.source, frozenset((*op.tile.axes, inner)), frozenset())
        name, stride = self.names("tensor", param.name), self._stride(param.name, side)
        return f"load(&{name}[{at}], {stride}, {axis.count} - {axis.index})"

    def _group(self, group: Sequence[Load | Map | Fold | Store], inner: str, kept: Collection[str]) -> None:
        """One loop along a row: vectors are mapped, kept or stored, and at most one fold takes them up."""
        axis = self.axes[inner]
        lines: list[str] = []
        names = {t: self.names("tile", t) for t in kept}
        fold: Fold | None = None
        result = ""
        for op in group:
            if isinstance(op, Load):
                lines.append(f"const Vector {names[op.tile.name]} = {self._loaded(op, inner)};")
                continue
            axes = op.axes if isinstance(op, Store) else op.tile.axes
            found = self._vectors(op.expr, inner, frozenset((*axes, inner)), names)
            assert found is not None
            value = found.text if found.wide else f"splat({found.text})"
            if isinstance(op, Store):
                lines.append(self._stored(op, inner, value))
            elif isinstance(op, Fold):
                fold, result = op, value
            elif op.tile.name in names:
                lines.append(f"const Vector {names[op.tile.name]} = {value};")
            elif op.tile.dtype == "f32" and any(op.tile.name in reads(x) for x in group if x is not op):
                # Kept for what follows in the loop, stored for what comes after it.
                names[op.tile.name] = self.names("lanes", op.tile.name, "{}_lanes")
                lines.append(f"const Vector {names[op.tile.name]} = {value};")
                lines.append(f"store(&{self._element(op.tile.name)}, {names[op.tile.name]});")
            else:
                lines.append(f"store(&{self._element(op.tile.name)}, {value});")
        if fold is None:
            self.open(f"for (int64_t {axis.index} = 0; {axis.index} < {axis.count}; {axis.index} += LANES)")
            for text in lines:
                self.line(text)
            self.close()
            return
        reducer, target = _REDUCERS[fold.op], self._element(fold.tile.name)
        start = target if fold.accumulate else f"{reducer}::identity<float>"
        call = f"{target} = fold_vectors<{reducer}>({axis.count}, {start}, [&](int64_t {axis.index})"
        if not lines:
            self.line(f"{call} {{ return {result}; }});")
            return
        self.open(call)
        for text in lines:
            self.line(text)
        self.line(f"return {result};")
        self.close("});")

    # Strips

    def _strip(self, strip: Strip, body: tuple[Op, ...]) -> None:
        """Operations on a few rows at a time; tiles that nothing else touches are no longer than that."""
        rank = strip.axis
        assert rank is not None
        whole = self.axes[rank]
        made = [op.tile for op in strip.ops if isinstance(op, Load | Map | Fold | Dot)]
        elsewhere = {t for op in body if op not in strip.ops for t in (*reads(op), *writes(op))}
        for tile in made:
            if tile.name in elsewhere:
                self._declare(tile)
        for op in strip.ops:
            plan = self._dot_plan(op) if isinstance(op, Dot) else None
            if isinstance(op, Dot) and plan is not None and rank not in plan.right.tile.axes:
                self._prepare(op, plan)
        at, base, count = (self.names("strip" + x, rank, "{}" + x) for x in ("_at", "1", "_rows"))
        self.open(f"for (int64_t {at} = 0; {at} < {whole.count}; {at} += {ROWS})")
        start = base if whole.base != "0" else at
        if start == base:
            self.line(f"const int64_t {base} = {whole.base} + {at};")
        self.line(f"const int64_t {count} = at_most({ROWS}, {whole.count} - {at});")
        places, stack, finite = dict(self.places), self.stack, dict(self.finite)
        used = {t for op in strip.ops for t in (*reads(op), *writes(op))}
        for name in sorted(used & set(self.places)):
            place = self.places[name]
            if rank in place.tile.axes and place.elements != 1:
                rows, step = self.names("rows", name, f"{place.name}_rows"), place.step(rank)
                offset = at if step == "1" else f"{at} * {step}"
                self.line(f"{ctype(place.tile.dtype)}* const {rows} = {place.name} + {offset};")
                self.places[name] = replace(place, name=rows)
        self.axes[rank] = Axis(ROWS, start, count, whole.index)
        self._sequence(strip.ops, rank)
        self.axes[rank] = whole
        self.places, self.stack, self.finite = places, stack, finite
        self.close()

    def _for(self, op: For) -> None:
        first, last = "0", self._extent_text(op.rank)
        scope = any(e is not None for e in (op.lower, op.upper))
        if scope:
            low = self.names("low", op.rank, "{}_first")
            high = self.names("high", op.rank, "{}_last")
            lower = self.typed(op.lower, "i64") if op.lower is not None else None
            upper = self.typed(op.upper, "i64") if op.upper is not None else None
            self.open("")
            self.line(f"const int64_t {low} = {f'at_least(0, {lower})' if lower else '0'};")
            self.line(f"const int64_t {high} = {f'at_most({last}, {upper})' if upper else last};")
            first, last = low, high
        index = self.names("rank", op.rank)
        at = index if op.size == 1 else self._base(op.rank)
        step = f"++{at}" if op.size == 1 else f"{at} += {op.size}"
        if not op.reverse:
            self.open(f"for (int64_t {at} = {first}; {at} < {last}; {step})")
        else:
            step = step.replace("+", "-")
            span = last if first == "0" else f"{last} - {first}"
            begin = f"(tiles({span}, {op.size}) - 1) * {op.size}" if op.size > 1 else f"{span} - 1"
            begin = begin if first == "0" else f"{first} + {begin}"
            self.open(f"for (int64_t {at} = {begin}; {at} >= {first}; {step})")
        places = dict(self.places)
        stack, workspace = self.stack, self.workspace
        panels, finite = dict(self.panels), dict(self.finite)
        known = {o.tile.name: o.expr for o in self.readers if isinstance(o, Map)}
        if op.lower is None or multiple(op.lower, op.size, known.get):
            self.aligned[op.rank] = op.size
        if op.size == 1:
            self.axes[op.rank] = Axis(1, index, "1", index)
        else:
            count = self._count(op.rank)
            self.line(f"const int64_t {count} = at_most({op.size}, {last} - {at});")
            self.axes[op.rank] = Axis(op.size, at, count, index)
        self._ops(op.body)
        del self.axes[op.rank]
        self.aligned.pop(op.rank, None)
        self.places, self.stack, self.workspace = places, stack, workspace
        self.panels, self.finite = panels, finite
        self.close()
        if scope:
            self.close()

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

    def _as_read(self, op: Map) -> str | None:
        """The axis along which all tiles lie that a map reads, unless a dot is to take its own up."""
        if any(isinstance(x, Dot) and op.tile.name in reads(x) for x in self.readers):
            return None
        lasts = {self.places[t].long[-1] for t in reads(op) if t in self.places and len(self.places[t].long) > 1}
        return next(iter(lasts)) if len(lasts) == 1 and lasts <= set(op.tile.axes) else None

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

    def _map(self, op: Map) -> None:
        place = self.places[op.tile.name]
        inner = self._vector_axis(place)
        wide = self._vectors(op.expr, inner, frozenset(op.tile.axes)) if inner is not None else None
        if inner is not None and wide is not None:
            value = wide.text if wide.wide else f"splat({wide.text})"
            rest = [r for r in place.order if r != inner]
            self._nest(rest, lambda: self._vector_loop(inner, f"store(&{self._element(op.tile.name)}, {value});"))
            return

        def body() -> None:
            self.line(f"{self._element(op.tile.name)} = {self.typed(op.expr, op.tile.dtype, frozenset(op.tile.axes))};")

        self._nest(place.order, body, "#pragma omp simd")

    # Vectors

    def _vector_axis(self, place: Place) -> str | None:
        """The axis along which a tile of floats is computed in whole vectors."""
        if place.tile.dtype not in ("f32", "bf16") or not place.long or place.view is not None:
            return None
        return place.long[-1] if self.axes[place.long[-1]].size % WIDEST == 0 else None

    def _vectors(self, e: Expr, inner: str, axes: frozenset[str], kept: Mapping[str, str] | None = None) -> Text | None:
        """The text of an expression over vectors along an axis, or None; ``kept`` tiles are vectors by name."""

        def tile(name: str) -> tuple[str, bool, str | None] | None:
            if name not in self.tiles:
                return None
            place = self._place(name)
            varies = inner in place.long
            beside = varies and place.long[-1] == inner and place.view is None
            return place.tile.dtype, varies, self._element(name) if beside else None

        try:
            return Lanes(inner, self.checker, tile, lambda x, t: self.typed(x, t, axes, ATOM), kept or {}).value(e)
        except NotVectors:
            return None

    def _vector_loop(self, inner: str, text: str) -> None:
        axis = self.axes[inner]
        self.open(f"for (int64_t {axis.index} = 0; {axis.index} < {axis.count}; {axis.index} += LANES)")
        self.line(text)
        self.close()

    # Memory

    def _load(self, op: Load) -> None:
        axes = frozenset(op.tile.axes)
        param = self.params[op.source.tensor]
        order, unit = self._order(op.source, op.tile.axes)
        checks = checked_indices(op, param.indices)

        def body() -> None:
            name = self.names("tensor", param.name)
            text = f"{name}[{self._offset(op.source, axes, checks)}]"
            if not param.indices:
                text = f"*{name}" if param.name in self.k.outputs else name
            held = "bool" if param.dtype == "bool" and not param.indices else param.dtype
            loaded = Value(_from_memory(param.dtype, text) if param.indices else text, ATOM, held)
            value = _converted(loaded, op.tile.dtype)
            if op.guard is None and param.dtype == op.tile.dtype and param.indices and ctype(param.dtype) in NARROW:
                # Structures are not copied in vectors, their bits are.
                self.line(f"{self._element(op.tile.name)}.raw = {text}.raw;")
                return
            if op.guard is not None:
                other = self.literal(op.other, op.tile.dtype)
                value = f"{self.typed(op.guard, 'bool', axes, ATOM)} ? {value} : {other}"
            self.line(f"{self._element(op.tile.name)} = {value};")

        self._access(order, unit, op.source, body, bool(checks), True)

    def _store(self, op: Store) -> None:
        axes = frozenset(op.axes)
        param = self.params[op.target.tensor]
        order, unit = self._order(op.target, op.axes)
        checks = checked_indices(op, param.indices)
        moving = {r for r in op.axes if self.axes[r].size != 1}
        apart = all(is_affine(i) for i in op.target.indices)
        apart = apart and moving <= {r for i in op.target.indices if isinstance(i, Rank) for r in (i.name,)}

        inner = order[-1] if order and unit is not None and not checks and param.dtype in ("f32", "bf16") else None
        if inner is not None and self.axes[inner].size % WIDEST == 0 and self._side(op.target, inner) is not None:
            wide = self._vectors(op.expr, inner, axes)
            if wide is not None:
                text = self._stored(op, inner, wide.text if wide.wide else f"splat({wide.text})")
                self._nest(order[:-1], lambda: self._vector_loop(inner, text))
                return

        def body() -> None:
            name = self.names("tensor", param.name)
            at = f"{name}[{self._offset(op.target, axes, checks)}]" if param.indices else f"*{name}"
            self.line(f"{at} = {self.typed(op.expr, param.dtype, axes)};")

        self._access(order, unit, op.target, body, bool(checks), apart)

    def _access(
        self,
        order: Sequence[str],
        unit: int | None,
        access: Access,
        body: Callable[[], None],
        checks: bool,
        apart: bool,
    ) -> None:
        """The loops around a load or store; ``unit`` is the tensor's axis along which the innermost loop runs."""
        pragma = "#pragma omp simd" if apart else ""
        if checks:
            self.open("")
            self.line("bool outside = false;")
            pragma = pragma and pragma + " reduction(|:outside)"
        if unit is not None:
            stride = self._stride(access.tensor, unit)
            self.open(f"with_stride({stride}, [&](auto {stride})")
        self._nest(order, body, pragma)
        if unit is not None:
            self.close("});")
        if checks:
            number = 1 + list(self.params).index(access.tensor)
            self.line(f"if (outside) *fault = {number};")
            self.close()

    def _order(self, access: Access, axes: tuple[str, ...]) -> tuple[tuple[str, ...], int | None]:
        """The loops of a load or store, innermost last, and the tensor's axis that the innermost alone moves along."""
        inner = self._along(access, axes)
        if inner is None:
            return axes, None
        along = [i for i, index in enumerate(access.indices) if inner in free_ranks(index)]
        order = (*(r for r in axes if r != inner), inner)
        whole = len(along) == 1 and is_affine(access.indices[along[0]])
        return order, along[0] if whole else None

    def _along(self, access: Access, axes: tuple[str, ...]) -> str | None:
        """The axis of a loop nest that moves along the tensor's last index; the nest's last one if none does."""
        moving = [r for r in axes if self.axes[r].size != 1]
        for index in reversed(access.indices):
            found = [r for r in moving if r in free_ranks(index)]
            if found and is_affine(index):
                return found[-1]
        return moving[-1] if moving else None

    def _offset(self, access: Access, axes: frozenset[str], checks: frozenset[int]) -> str:
        """The position of an element, in elements from the tensor's first."""
        terms = []
        for i, index in enumerate(access.indices):
            stride = self._stride(access.tensor, i)
            if literal_value(index) == 0:
                continue
            if i in checks:
                text = f"inside({self.typed(index, 'i64', axes)}, {self._size(access.tensor, i)}, outside)"
            else:
                text = self.typed(index, "i64", axes, MUL)
            terms.append(f"{text} * {stride}")
        return " + ".join(terms) or "0"

    # Reductions

    def _fold(self, op: Fold) -> None:
        tile, axes = op.tile, frozenset((*op.tile.axes, *op.over))
        if op.op not in _REDUCERS and op.op != "argmax":
            raise VerifyError(f"`{op.op}` is no reduction that a tile program folds")
        if op.op == "argmax":
            self._argmax(op, axes)
            return
        element = settle(self.checker.infer(op.expr))
        total = "bool" if op.op in ("any", "all") else settle(join(compute_type(tile.dtype), compute_type(element)))
        inner = self._contiguous(op.expr, (*tile.axes, *op.over))
        own = any(isinstance(n, Access) and n.tensor == tile.name for n in walk(op.expr))
        moving = self.places[tile.name].long
        if inner and moving and inner == moving[-1] and total == tile.dtype and not own:
            self._fold_outer(op, total, axes)
            return
        reduced = [r for r in op.over if self.axes[r].size != 1]
        if inner in reduced:
            reduced = [*(r for r in reduced if r != inner), inner]
        reducer = _REDUCERS[op.op]

        last = self.axes[reduced[-1]] if reduced else None
        wide = None
        if last is not None and total == "f32" and last.size % WIDEST == 0 and op.op in ("sum", "prod", "max", "min"):
            wide = self._vectors(op.expr, reduced[-1], axes)

        def body() -> None:
            target = self._element(tile.name)
            begin = f"{reducer}::identity<{ctype(total)}>"
            if op.accumulate:
                begin = _converted(Value(target, ATOM, tile.dtype), total)
            value = self.typed(op.expr, total, axes) if wide is None or not wide.wide else wide.text
            if not reduced:
                joined = f"{reducer}::join<{ctype(total)}>({begin}, {value})"
                self.line(f"{target} = {_converted(Value(joined, ATOM, total), tile.dtype)};")
                return
            assert last is not None

            def folded(start: str) -> str:
                element = f"[&](int64_t {last.index}) {{ return {value}; }}"
                if wide is not None and wide.wide:
                    return f"fold_vectors<{reducer}>({last.count}, {start}, {element})"
                return f"fold<{reducer}, {ctype(total)}>({last.count}, {start}, {element})"

            if len(reduced) == 1:
                text = folded(begin)
                self.line(f"{target} = {_converted(Value(text, ATOM, total), tile.dtype)};")
                return
            name = self.names("total", tile.name, "{}_total")
            self.line(f"{ctype(total)} {name} = {begin};")
            self._nest(reduced[:-1], lambda: self.line(f"{name} = {folded(name)};"))
            self.line(f"{target} = {_converted(Value(name, ATOM, total), tile.dtype)};")

        self._nest(tile.axes, body)

    def _fold_outer(self, op: Fold, total: str, axes: frozenset[str]) -> None:
        """A reduction whose contiguous axis is kept: whole rows are joined, the tile being the accumulators."""
        name = op.tile.name
        *outer, inner = self.places[name].long

        def rows() -> None:
            if not op.accumulate:
                begin = f"{_REDUCERS[op.op]}::identity<{ctype(total)}>"
                self._nest([inner], lambda: self.line(f"{self._element(name)} = {begin};"), "#pragma omp simd")
            at = self._element(name)
            joined = _JOINS[op.op].format(a=at, b=self.typed(op.expr, total, axes, UNARY))
            self._nest([*op.over, inner], lambda: self.line(f"{at} = {joined};"), "#pragma omp simd")

        self._nest(outer, rows)

    def _argmax(self, op: Fold, axes: frozenset[str]) -> None:
        if len(op.over) != 1 or op.accumulate:
            raise VerifyError("argmax goes over one rank and starts afresh")
        axis = self.axes[op.over[0]]

        def body() -> None:
            value = self.typed(op.expr, settle(self.checker.infer(op.expr)), axes)
            dtype = settle(self.checker.infer(op.expr))
            if not DTYPES[dtype].is_integer:
                value = _converted(Value(value, ATOM, dtype), settle(compute_type(dtype)))
            found = axis.base
            if axis.size != 1:
                found = f"fold_argmax({axis.count}, [&](int64_t {axis.index}) {{ return {value}; }})"
                found = found if axis.base == "0" else f"{axis.base} + {found}"
            self.line(f"{self._element(op.tile.name)} = {_converted(Value(found, LOOSE, 'i64'), op.tile.dtype)};")

        self._nest(op.tile.axes, body)

    def _contiguous(self, e: Expr, axes: tuple[str, ...]) -> str | None:
        """The axis along which most of the tiles in an expression are contiguous; None if there is none to tell."""
        votes: dict[str, int] = {}
        for node in walk(e):
            if isinstance(node, Access) and node.tensor in self.places:
                place = self.places[node.tensor]
                if place.long:
                    votes[place.long[-1]] = votes.get(place.long[-1], 0) + max(1, len(place.long) - 1)
        return max(votes, key=lambda r: (votes[r], axes.index(r))) if votes else None

    # Dot

    def _dot(self, op: Dot) -> None:
        plan = self._dot_plan(op)
        if plan is None:
            self._dot_loops(op)
        elif not op.annihilates:
            self._dot_call(op, plan)
        else:
            # A zero on the left and an infinity or NaN on the right are rare: only then are the products looked at.
            self.open(f"if ({self._all_finite(op, plan)})")
            self._dot_call(op, plan)
            self.depth -= 1
            self.open("} else")
            self._dot_call(op, plan, annihilates=True)
            self.close()

    def _all_finite(self, op: Dot, plan: DotPlan) -> str:
        """The name of a flag: whether all elements of the operand that is not annihilated are finite."""
        place = self.places[op.right]
        if place.name in self.finite:
            return self.finite[place.name]
        self.looked += 1
        name = self.names("finite", f"{op.right} {self.looked}", f"{place.name}_finite")
        self.finite[place.name] = name
        long = [r for r in place.tile.axes if self.axes[r].size != 1]
        row, column = (plan.k, plan.n) if place is plan.right else (plan.m, plan.k)
        kind = ctype(place.tile.dtype)
        if set(long) == {row, column}:
            matrix = self._matrix(place, row, column, "const " + kind)
            self.line(f"bool {name} = all_finite<{kind}>({matrix}, {self.axes[row].count}, {self.axes[column].count});")
            return name
        self.line(f"bool {name} = true;")
        check = f"{name} = {name} & is_finite<{kind}>({self._element(op.right)});"
        self._nest(place.order, lambda: self.line(check), f"#pragma omp simd reduction(&:{name})")
        return name

    # Operands made where they are multiplied

    def _recipe(self, op: Map) -> Recipe | None:
        """How to make a tile where it is multiplied; None where it has to lie in memory."""
        name = op.tile.name
        if name not in self.recipes:
            # What follows asks for this tile again, and is told that it lies in memory.
            self.recipes[name] = None
            self.recipes[name] = self._found_recipe(op)
        return self.recipes[name]

    def _found_recipe(self, op: Map) -> Recipe | None:
        tile = op.tile
        written = [x for x in self.readers if not isinstance(x, Store) and x.tile.name == tile.name]
        readers = [x for x in self.readers if tile.name in reads(x)]
        dots = [x for x in readers if isinstance(x, Dot) and (x.operand or "f32") == tile.dtype and not x.annihilates]
        if len(written) != 1 or not dots or len(dots) != len(readers) or not all(self._shares(x, tile) for x in dots):
            return None
        along, over = dots[0].tile.axes[-1], dots[0].over[0]
        if any(r not in self.axes for x in dots for r in (*x.tile.axes, *x.over)):
            return None
        plans = [self._dot_plan(x) for x in dots]
        if any(p is None or (p.n, p.k, p.batch, p.over) != (along, over, (), ()) for p in plans):
            return None
        loads = [x for x in self.readers if isinstance(x, Load) and x.tile.name in reads(op) and along in x.tile.axes]
        exprs = [op.expr, *(i for x in loads for i in x.source.indices)]
        length = period(exprs, over, self.aligned.get(over, 0) or 1)
        if length is None or not all(self._direct(x, op, along) for x in loads):
            return None
        if sum(1 for t in reads(op) if t in self.tiles and along in self.tiles[t].axes) != len(loads):
            return None
        recipe = Recipe(along, over, length, tuple(loads))
        try:
            for i in range(length):
                self._made_values(op, recipe, {x.tile.name: "x" for x in loads}, i)
        except NotVectors:
            return None
        return recipe

    def _direct(self, op: Load, reader: Map, along: str) -> bool:
        """Whether a load can be made in vectors within what alone reads it."""
        param = self.params[op.source.tensor]
        others = [x for x in self.readers if op.tile.name in reads(x) and x is not reader]
        plain = op.guard is None and param.name not in self.k.outputs and not checked_indices(op, param.indices)
        known = param.dtype in ("f32", "bf16", "u32", "i32", "u8", "i8")
        return plain and known and not others and self._side(op.source, along) is not None

    def _into_made(self, op: Load) -> bool:
        """Leave a load to the operand that is made of it."""
        makers = [x for x in self.readers if isinstance(x, Map) and op.tile.name in reads(x)]
        found = self._recipe(makers[0]) if len(makers) == 1 else None
        return found is not None and op in found.direct

    def _made_values(self, op: Map, recipe: Recipe, kept: Mapping[str, str], i: int = 0) -> Text:
        """The text of an operand's value ``i`` coordinates further; raises `NotVectors`."""
        axis, moved = self.axes[recipe.over], at(op.expr, recipe.over, i, recipe.period)
        self.axes[recipe.over] = replace(
            axis, index=f"at_most({axis.index} + {i}, {axis.count} - 1)" if i else axis.index
        )
        plain = frozenset((*op.tile.axes,))

        def tile(name: str) -> tuple[str, bool, str | None] | None:
            return (self.tiles[name].dtype, name in kept, None) if name in self.tiles else None

        def scalar(x: Expr, dtype: str) -> str:
            return self.typed(x, dtype, plain, ATOM)

        try:
            return Lanes(recipe.along, self.checker, tile, scalar, kept).field(moved)
        finally:
            self.axes[recipe.over] = axis

    def _make(self, op: Map, recipe: Recipe) -> None:
        """A function that makes an operand where a dot asks for it."""
        over, along = self.axes[recipe.over], self.axes[recipe.along]
        left, axes = "left", frozenset(op.tile.axes)
        name = self.names("make", op.tile.name, "{}_made")
        # What it captures stays in registers, unless there are tiles among it.
        near = reads(op) <= {x.tile.name for x in recipe.direct}
        params = ", ".join(f"int64_t {x}" for x in (over.index, along.index, left))
        self.open(f"const auto {name} = [{'=' if near else '&'}]({params}) CASTILE_INLINED")
        bound: dict[str, str] = {}
        values: list[str] = []
        for i in range(recipe.period):
            kept: dict[str, str] = {}
            for load in recipe.direct:
                param = self.params[load.source.tensor]
                offset = self._moved_offset(load.source, recipe, i, axes)
                side = self._side(load.source, recipe.along)
                assert side is not None
                stride = self._stride(param.name, side)
                text = f"load(&{self.names('tensor', param.name)}[{offset}], {stride}, {left})"
                if text not in bound:
                    bound[text] = self.names(
                        "lanes", f"{load.tile.name} {i}", load.tile.name if not i else f"{load.tile.name}_{i}"
                    )
                    self.line(f"const auto {bound[text]} = {text};")
                    if i == 0:
                        ahead = replace(over, index=f"({over.index} + {AHEAD * recipe.period})")
                        self.axes[recipe.over] = ahead
                        later = self._moved_offset(load.source, recipe, 0, axes)
                        self.axes[recipe.over] = over
                        self.line(f"prefetch(&{self.names('tensor', param.name)}[{later}]);")
                kept[load.tile.name] = bound[text]
            found = self._made_values(op, recipe, kept, i)
            values.append(found.text if found.wide else f"splat({found.text})")
        self.line(f"return units<{ctype(op.tile.dtype)}>(")
        for i, text in enumerate(values):
            self.line(f"    {text}{',' if i + 1 < len(values) else ');'}")
        self.close("};")
        self.makers[op.tile.name] = name

    def _moved_offset(self, access: Access, recipe: Recipe, i: int, axes: frozenset[str]) -> str:
        """The position of an element ``i`` coordinates further; never past the last one that there is."""
        moved = tuple(at(x, recipe.over, i, recipe.period) for x in access.indices)
        if moved == tuple(at(x, recipe.over, 0, recipe.period) for x in access.indices):
            return self._offset(replace(access, indices=moved), axes, frozenset())
        axis = self.axes[recipe.over]
        self.axes[recipe.over] = replace(axis, index=f"at_most({axis.index} + {i}, {axis.count} - 1)")
        text = self._offset(access, axes, frozenset())
        self.axes[recipe.over] = axis
        return text

    def _prepare(self, op: Dot, plan: DotPlan) -> None:
        """Before a strip: pack the operand that all its rows share, and look whether it is finite if that matters."""
        if op.annihilates and self.places[op.right] is plan.right and not plan.batch and not plan.over:
            self._all_finite(op, plan)
        long = {r for r in plan.right.tile.axes if self.axes[r].size != 1}
        maker = self.makers.get(plan.right.tile.name)
        if plan.right.tile.name not in self.places and maker is None:
            return
        key = (plan.right.name, plan.n, plan.k, op.operand or "f32")
        if long != {plan.n, plan.k} or key in self.panels:
            return
        n, k = self.axes[plan.n], self.axes[plan.k]
        name = self.names("panels", "_".join(key), f"{plan.right.tile.name}_panels")
        units = -(-n.size // PANEL) * PANEL * (k.size + (1 if maker is None else LONGEST))
        self.line(f"char* const {name} = {self._room(4 * units)};")
        self.panels[key] = name
        if maker is not None:
            recipe = self.recipes[plan.right.tile.name]
            assert recipe is not None
            self.line(
                f"pack_made<{ctype(op.operand or 'f32')}, {recipe.period}>({maker}, {k.count}, {n.count}, {name});"
            )
            return
        kind = ctype(plan.right.tile.dtype)
        matrix = self._matrix(plan.right, plan.k, plan.n, "const " + kind)
        self.line(f"pack<{ctype(op.operand or 'f32')}, {kind}>({matrix}, {k.count}, {n.count}, {name});")

    def _matrix(self, place: Place, row: str, column: str, kind: str) -> str:
        fixed = [r for r in place.tile.axes if r not in (row, column) and self.axes[r].size != 1]
        at = "".join(f" + {self.axes[r].index} * {place.step(r)}" for r in fixed)
        return f"Matrix<{kind}>{{{place.name}{at}, {place.step(row)}, {place.step(column)}}}"

    def _view(self, op: Load) -> bool:
        """Let a tile that is only the shared operand of dots stay in its tensor's memory."""
        tile, param = op.tile, self.params[op.source.tensor]
        long = tuple(r for r in tile.axes if self.axes[r].size != 1)
        if op.guard is not None or len(long) != 2 or checked_indices(op, param.indices) or param.dtype != tile.dtype:
            return False
        moves = steps(op.source.indices, long)
        readers = [x for x in operations(self.k.body) if not isinstance(x, For) and tile.name in reads(x)]
        if moves is None or not readers or not all(isinstance(x, Dot) and self._shares(x, tile) for x in readers):
            return False
        strides = {r: self._stride(param.name, i) + (f" * {c}" if c != 1 else "") for r, (i, c) in moves.items()}
        name = self.names("tile", tile.name)
        first = self._offset(op.source, frozenset(), frozenset())
        self.line(f"const {stored(param.dtype)}* const {name} = {self.names('tensor', param.name)} + {first};")
        order = (*(r for r in long if r != long[-1]), long[-1])
        self.places[tile.name] = Place(tile, name, order, tuple(self.axes[r].size for r in order), strides)
        return True

    def _shares(self, op: Dot, tile: Tile) -> bool:
        """Whether a tile is the operand that all rows of a dot share: it has the columns, and the other has not."""
        other = self.tiles[op.right if op.left == tile.name else op.left]
        if other.name == tile.name or op.tile.dtype != "f32" or not op.tile.axes or len(op.over) != 1:
            return False
        column = op.tile.axes[-1]
        kept = [r for r in op.tile.axes if r != column and r in other.axes]
        good = column in tile.axes and column not in other.axes and bool(kept)
        return good and set(tile.axes) == {column, op.over[0]} and tile.dtype in ("f32", "bf16", "f16")

    def _takes(self, op: Map, dot: Dot) -> bool:
        """Whether a map alone reads the sums of a dot, place by place, so that it may take them from registers."""
        plan = self._dot_plan(dot)
        if plan is None or dot.annihilates or dot.accumulate or plan.batch or plan.over:
            return False
        readers = [x for x in self.readers if dot.tile.name in reads(x)]
        written = [x for x in self.readers if not isinstance(x, Store) and x.tile.name == dot.tile.name]
        right = plan.right.tile.name
        ready = right in self.makers or (right, plan.n, plan.k, dot.operand or "f32") in self.panels
        if readers != [op] or len(written) != 1 or not ready or set(op.tile.axes) != set(dot.tile.axes):
            return False
        place = self._place(op.tile.name)
        if self._vector_axis(place) != plan.n:
            return False
        return self._vectors(op.expr, plan.n, frozenset(op.tile.axes), {dot.tile.name: "x"}) is not None

    def _dot_into(self, dot: Dot, op: Map) -> None:
        """A dot whose sums a map takes up as they are done."""
        plan = self._dot_plan(dot)
        assert plan is not None
        for x in (dot, op):
            self.line(comment(_text(self.k, x)))
        self._declare(op.tile)
        name, sums = self.names("take", op.tile.name, "{}_takes"), self.names("sums", dot.tile.name, dot.tile.name)
        found = self._vectors(op.expr, plan.n, frozenset(op.tile.axes), {dot.tile.name: sums})
        assert found is not None
        m, n = self.axes[plan.m].index, self.axes[plan.n].index
        self.open(f"const auto {name} = [&](int64_t {m}, int64_t {n}, Vector {sums}) CASTILE_INLINED")
        self.line(f"store(&{self._element(op.tile.name)}, {found.text});")
        self.close("};")
        self._dot_call(dot, plan, taken=f"through({name})")

    def _dot_loops(self, op: Dot) -> None:
        """A dot as a plain reduction of products."""
        wanted = op.tile.dtype
        operands: list[Expr] = []
        for name in (op.left, op.right):
            e: Expr = Access(name)
            if op.operand is not None:
                e = Cast(op.operand, e)
            if settle(self.checker.infer(e)) != wanted:
                e = Cast(wanted, e)
            operands.append(e)
        product: Expr = Call("mul", tuple(operands))
        if op.annihilates:
            product = Call("where", (Call("eq", (operands[0], Const(0))), Const(0), product))
        self._fold(Fold(op.tile, "sum", op.over, product, op.accumulate))

    def _dot_plan(self, op: Dot) -> DotPlan | None:
        """How a dot maps onto the micro-kernel; None where plain loops do better or are the only way."""
        left, right, target = (self._place(name) for name in (op.left, op.right, op.tile.name))
        types = {left.tile.dtype, right.tile.dtype, op.operand or "f32"}
        if op.tile.dtype != "f32" or not all(DTYPES[t].is_float and t != "f64" for t in types):
            return None
        if op.tile.name in (op.left, op.right):
            return None
        long = {r for r in (*left.tile.axes, *right.tile.axes) if self.axes[r].size != 1}
        kept = [r for r in target.order if r in long]
        over = [r for r in op.over if r in long]
        if not kept or not over:
            return None
        if kept[-1] not in right.tile.axes:
            left, right = right, left
        rows = [r for r in kept if r not in right.tile.axes]
        n = kept[-1]
        if n in left.tile.axes or not rows:
            return None
        m = max(rows, key=lambda r: self.axes[r].size)
        k = max(over, key=lambda r: self.axes[r].size)
        if self.axes[n].size < 4:
            return None
        batch, outer = tuple(r for r in kept if r not in (m, n)), tuple(r for r in over if r != k)
        return DotPlan(left, right, m, n, k, batch, outer)

    def _dot_call(self, op: Dot, plan: DotPlan, annihilates: bool = False, taken: str | None = None) -> None:
        """Call the micro-kernel; ``taken`` is where its sums go, if not into the dot's own tile."""
        m, n, k = (self.axes[r] for r in (plan.m, plan.n, plan.k))
        maker, recipe = self.makers.get(plan.right.tile.name), self.recipes.get(plan.right.tile.name)
        more = 1 if maker is None else LONGEST + 2
        few = 4 * (n.size + 2 * k.size + 64) if maker is not None else 0
        self.dot_floats = max(self.dot_floats, (k.size + more) * PANEL + m.size * (k.size + more), few)
        target = self._place(op.tile.name)
        accumulate = op.accumulate or bool(plan.over)
        panels = self.panels.get((plan.right.name, plan.n, plan.k, op.operand or "f32"))
        a_type, b_type = ctype(plan.left.tile.dtype), ctype(plan.right.tile.dtype)
        types = ", ".join((ctype(op.operand or "f32"), a_type, b_type))

        def zero() -> None:
            self.line(f"{self._element(op.tile.name)} = 0;")

        def call() -> None:
            a = self._matrix(plan.left, plan.m, plan.k, "const " + a_type)
            b = self._matrix(plan.right, plan.k, plan.n, "const " + b_type) if maker is None else maker
            c = self._matrix(target, plan.m, plan.n, "float") if taken is None else ""
            counts, adds = f"{m.count}, {n.count}, {k.count}", "true" if accumulate else "false"
            scratch = "reinterpret_cast<float*>(local + DOT)"
            put = f"Into{{{c}, {adds}}}" if taken is None else taken
            if annihilates:
                left = self.places[op.left] is plan.left
                self.line(f"dot_annihilating<{types}, {'true' if left else 'false'}>({c}, {a}, {b}, {counts}, {adds});")
                return
            operand = ctype(op.operand or "f32")
            if maker is not None and recipe is not None:
                made = f"{operand}, {recipe.period}"
                name = f"dot_made<{made}>" if panels is None else f"dot_packed_made<{made}, decltype({maker})>"
            else:
                name = f"dot<{types}>" if panels is None else f"dot_packed<{operand}, {a_type}>"
            whole = maker is None and panels is None
            self.line(f"{name}(")
            self.line(f"    {c if whole else put},")
            self.line(f"    {a},")
            self.line(f"    {b if panels is None else panels},")
            self.line(f"    {counts}, {adds + ', ' if whole else ''}{scratch});")

        if plan.over and not op.accumulate:
            self._nest(op.tile.axes, zero, "#pragma omp simd")
        self._nest((*plan.batch, *plan.over), call)

    # Expressions

    def typed(self, e: Expr | None, dtype: str, axes: frozenset[str] = frozenset(), floor: int = 0) -> str:
        """The text of an expression as a value of a dtype, in a loop nest over ``axes``."""
        assert e is not None
        v = self.value(e, axes, dtype)
        if v.dtype == dtype:
            return v.at(floor)
        return _converted(v, dtype)

    def value(self, e: Expr, axes: frozenset[str], wanted: str | None = None) -> Value:
        """An expression in its own type; a literal takes the wanted one."""
        folded = self._literal(e, wanted)
        if folded is not None:
            return folded
        match e:
            case Rank(name=name):
                return self._coordinate(name, axes)
            case Extent(rank=rank):
                known = rank in self.k.fixed
                return Value(f"int64_t({self.k.fixed[rank]})" if known else self._extent(rank), ATOM, "i64")
            case Access(tensor=tensor):
                if tensor in self.tiles:
                    return Value(self._element(tensor), ATOM, self.tiles[tensor].dtype)
                param = self.params[tensor]
                name = self.names("tensor", tensor)
                text = _from_memory(param.dtype, f"*{name}") if tensor in self.k.outputs else name
                return Value(text, UNARY if tensor in self.k.outputs else ATOM, param.dtype)
            case Cast(dtype=dtype, arg=arg):
                found = self.value(arg, axes, "f64" if dtype == "f64" and literal_value(arg) is not None else None)
                return found if found.dtype == dtype else Value(_converted(found, dtype), ATOM, dtype)
            case Call():
                return self._call(e, axes, wanted)
            case _:
                raise VerifyError(f"{type(e).__name__} has no place in a tile program")

    def _coordinate(self, rank: str, axes: frozenset[str]) -> Value:
        axis = self.axes[rank]
        if axis.size == 1 or rank not in axes:
            return Value(axis.base if axis.base != "0" else "int64_t(0)", ATOM, "i64")
        if axis.base == "0":
            return Value(axis.index, ATOM, "i64")
        return Value(f"{axis.base} + {axis.index}", ADD, "i64")

    def _literal(self, e: Expr, wanted: str | None) -> Value | None:
        """A literal, perhaps negated."""
        number = literal_value(e)
        if number is None:
            return None
        dtype = self.checker.infer(e)
        if dtype == WEAK_FLOAT:
            dtype = wanted if wanted in ("f32", "f64") else "f32"
        elif dtype == WEAK_INT:
            row = DTYPES[wanted or "bool"]
            fits = row.is_integer and row.lowest <= number <= row.highest
            exact = wanted in ("f32", "f64") and abs(number) < 1 << 24
            dtype = str(wanted) if fits or exact else "i64"
        text = self.literal(number, dtype)
        return Value(text, UNARY if text.startswith("-") else ATOM, dtype)

    def literal(self, number: float | int | bool, dtype: str) -> str:
        """A number as a literal of a dtype."""
        row = DTYPES[dtype]
        if row.kind == "bool":
            return "true" if number else "false"
        if row.is_integer:
            number = int(number)
            if dtype == "i64":
                return f"int64_t({number})" if number > -(2**63) else "INT64_MIN"
            return f"{number}u" if dtype == "u32" else f"{ctype(dtype)}({number})" if row.bits < 32 else _i32(number)
        number = float(number)
        if math.isnan(number):
            return f'to<{ctype(dtype)}>(__builtin_nanf(""))'
        if dtype == "f64":
            return repr(number) if math.isfinite(number) else ("-" if number < 0 else "") + "double(inf)"
        with np.errstate(over="ignore"):
            finite = bool(np.isfinite(np.float32(number)))
        text = f"{number!r}f" if finite else "inf" if number > 0 else "-inf"
        return text if dtype == "f32" else f"to<{ctype(dtype)}>({text})"

    def _call(self, e: Call, axes: frozenset[str], wanted: str | None) -> Value:
        row = OPS[e.op]
        types = [self.checker.infer(a) for a in e.args]
        own = self.checker.infer(e)
        dtype = settle(own)
        if own == WEAK_FLOAT and wanted == "f64" or own == WEAK_INT and e.op == "where" and wanted in ("i32", "u32"):
            dtype = str(wanted)
        within = computed_in(e, dtype, types)
        if e.op == "where":
            condition = self.typed(e.args[0], "bool", axes)
            arms = ", ".join(self.typed(a, within, axes) for a in e.args[1:])
            return Value(f"select<{ctype(within)}>({condition}, {arms})", ATOM, within)
        if e.op == "pow":
            return Value(f"power<{literal_value(e.args[1])}>({self.typed(e.args[0], within, axes)})", ATOM, within)
        if e.op in ("lshift", "rshift"):
            return self._shift(e, within, axes)
        if e.op == "not":
            sign = "!" if within == "bool" else "~"
            return Value(sign + self.typed(e.args[0], within, axes, ATOM), UNARY, within)
        result = "bool" if row.rule == "compare" else within
        if row.symbol and row.arity == 2 and e.op not in ("floordiv", "mod"):
            level, left, right = _LEVELS.get(e.op, (LOOSE, ATOM, ATOM))
            a, b = self.typed(e.args[0], within, axes, left), self.typed(e.args[1], within, axes, right)
            text = Value(row.cpp.format(a=a, b=b), level, result)
        elif e.op == "neg":
            text = Value("-" + self.typed(e.args[0], within, axes, ATOM), UNARY, result)
        else:
            args = dict(zip("abc", (self.typed(a, within, axes) for a in e.args), strict=False))
            called = row.cpp.format(**args)
            if DTYPES[within].is_integer:
                called = called.replace("(", f"<{ctype(within)}>(", 1)
            text = Value(called, ATOM, result)
        # Where the arithmetic was done in a wider type, the result is what wraps or rounds.
        if row.rule != "compare" and within != dtype:
            return Value(_converted(text, dtype), ATOM, dtype)
        return text

    def _shift(self, e: Call, within: str, axes: frozenset[str]) -> Value:
        count = literal_value(e.args[1])
        a = self.typed(e.args[0], within, axes, ATOM)
        if e.op == "rshift" and isinstance(count, int) and 0 <= count < DTYPES[within].bits:
            return Value(f"{a} >> {count}", LOOSE, within)
        name = "shift_left" if e.op == "lshift" else "shift_right"
        b = self.typed(e.args[1], within, axes)
        value = self.typed(e.args[0], within, axes)
        return Value(f"{name}<{ctype(within)}>({value}, {b})", ATOM, within)


@dataclass(frozen=True, slots=True)
class DotPlan:
    """Which axes of a dot are the micro-kernel's m, n and k, and which are looped over outside it."""

    left: Place
    right: Place
    m: str
    n: str
    k: str
    batch: tuple[str, ...]
    over: tuple[str, ...]


def _converted(v: Value, dtype: str) -> str:
    return v.text if v.dtype == dtype else f"to<{ctype(dtype)}>({v.text})"


def _from_memory(dtype: str, text: str) -> str:
    return f"({text} != 0)" if dtype == "bool" else text


def _i32(number: int) -> str:
    return str(number) if number > -(2**31) else "INT32_MIN"


def _text(k: TileKernel, op: Op) -> str:
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


def _widest(k: TileKernel) -> tuple[str, ...]:
    """The ranks of the operation that goes over most of them, the grid's first."""
    best: tuple[str, ...] = ()

    def visit(body: tuple[Op, ...], loops: tuple[str, ...]) -> None:
        nonlocal best
        for op in body:
            match op:
                case For():
                    visit(op.body, (*loops, op.rank))
                    continue
                case Store(axes=axes):
                    ranks = axes
                case Fold(tile=tile, over=over) | Dot(tile=tile, over=over):
                    ranks = (*tile.axes, *over)
                case Load(tile=tile) | Map(tile=tile):
                    ranks = tile.axes
            found = tuple(dict.fromkeys((*loops, *ranks)))
            if len(found) > len(best):
                best = found

    visit(k.body, tuple(g.rank for g in k.grid))
    return best
