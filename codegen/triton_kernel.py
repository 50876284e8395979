"""One tile kernel as one `@triton.jit` function.

Tiles are padded to powers of two: a rank in scope has a vector of coordinates and a mask of the active ones, which a
host that knows the extent to be a multiple of the tile switches off (``EVEN_…``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ..ir.cascade import Access, Call, Const, Expr, Extent, Param, Rank, literal_value, walk
from ..ir.dtypes import DTYPES
from ..ir.errors import VerifyError
from ..ir.interval import is_affine
from ..ir.ops import OPS, REDUCTIONS
from ..ir.tile import Dot, Fold, For, Load, Map, Op, Store, Tile, TileKernel, operations, print_kernel, verify_kernel
from ..ir.types import TypeChecker, compute_type, join, settle
from .cpp import checked_axes, checked_indices, runtime_ranks
from .names import Names
from .triton_expr import ATOM, INDEX, OR, Expressions, Value, held, narrow

# The least size of each side of a matrix product on every GPU that Triton knows.
LEAST_DOT = 16

# Names that generated Triton must not take: Python's words, its built-ins in use, and the module's own.
TAKEN = tuple(
    """False None True and as assert async await break class continue def del elif else except finally for from global
    if import in is lambda nonlocal not or pass raise return try while with yield match case type int float bool max min
    range len abs pow round print sum any all tl triton torch INF LOG2_E INDEX pid fault fault_ out exp sigmoid
    maximum minimum reduce_max reduce_min reduce_prod multiply expm1 log1p tanh rint floordiv floormod shift_left
    shift_right to_integer to_bf16 annihilating grid main check self dot
    tensors spans narrow positions programs faults number names largest low high middle fits abs zip sum bool""".split()
)


def power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


@dataclass(frozen=True, slots=True)
class Axis:
    """A rank in scope: the step from tile to tile, the size of its vector, and whether lanes may be inactive."""

    step: int
    block: int
    masked: bool = True


@dataclass(frozen=True, slots=True)
class Argument:
    """An argument of a kernel.

    ``kind`` is "pointer", "scalar", "stride", "size" (of ``axis`` of tensor ``name``), "extent" (of rank ``name``),
    "fault", or a constant: "even" (is the extent of rank ``name`` a multiple of ``value``?), "constant", "index" (the
    type of positions).
    """

    text: str
    kind: str
    name: str = ""
    axis: int = 0
    value: int = 0

    @property
    def is_constant(self) -> bool:
        return self.kind in ("even", "constant", "index")


@dataclass(frozen=True, slots=True)
class Printed:
    """A kernel as text, what a host passes to it, and the helpers that it needs.

    ``grid`` holds the extents' ranks and steps whose counts of tiles multiply to the number of programs.
    """

    name: str
    text: str
    arguments: tuple[Argument, ...]
    grid: tuple[tuple[str, int], ...]
    helpers: frozenset[str]
    sequential: bool


class KernelPrinter:
    """Prints one kernel under a name."""

    def __init__(self, k: TileKernel, name: str, *, by_value: frozenset[str], numerics: str, interpret: bool) -> None:
        """``by_value`` names the 0-dimensional tensors that are numbers; others of no axes lie in memory."""
        verify_kernel(k)
        self.by_value = by_value
        self.k = k
        self.function = name
        self.numerics = numerics
        self.interpret = interpret
        self.params: Mapping[str, Param] = {p.name: p for p in k.tensors}
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
        self.least = _least_blocks(k)
        self.kept = _kept(k)
        self.clean: set[str] = set()
        self.sequential = any(isinstance(op, Load) and op.source.tensor in k.outputs for op in operations(k.body))
        for p in k.tensors:
            self.names("tensor", p.name)
        for r in [*(g.rank for g in k.grid), *k.whole, *(h.rank for h in k.held), *runtime_ranks(k)]:
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
        return str(self.k.whole[rank]) if rank in self.k.whole else self.named("extent", rank)

    def stride(self, tensor: str, axis: int) -> str:
        return self.names("stride", f"{tensor}_stride{axis}")

    def size(self, tensor: str, axis: int) -> str:
        return self.names("size", f"{tensor}_size{axis}")

    def constant(self, form: str, rank: str, value: int, kind: str = "constant") -> str:
        text = self.names(f"{kind} {value}", rank, form)
        self.constants.setdefault(text, Argument(text, kind, rank, 0, value))
        return text

    # Lines

    def line(self, text: str) -> None:
        self.lines.append("    " * self.depth + text if text else "")

    # The kernel

    def printed(self) -> Printed:
        self._ranks()
        self._ops(self.k.body)
        body = self.lines
        self.lines = []
        for rank in sorted(self.values):
            self.line(f"{self.named('extent value', rank)} = tl.full((), {self.extent(rank)}, INDEX)")
        for p in self.k.tensors:
            if p.name in self.read:
                self.line(f"{self.named('scalar', p.name)} = {self._scalar(p)}")
        arguments = self._arguments()
        head = ["@triton.jit", f"def {self.function}("]
        head += self._signature(arguments)
        head.append("):")
        notes = [f"    # {_comment(t.strip())}" for t in print_kernel(self.k).split("\n")[: 1 + len(self.k.tensors)]]
        text = "\n".join([*head, *notes, *self.lines, *(body or ["    pass"])]) + "\n"
        grid = tuple((g.rank, g.size) for g in self.k.grid)
        return Printed(self.function, text, arguments, grid, frozenset(self.e.used), self.sequential)

    def _scalar(self, p: Param) -> str:
        """A 0-dimensional input in the type in which it computes."""
        name = self.names("tensor", p.name)
        if p.name in self.by_value and p.dtype != "f64":
            row = DTYPES[p.dtype]
            value = f"tl.full((), {name}, {'tl.int32' if row.kind == 'bool' else held(p.dtype)})"
            return f"{value} != 0" if row.kind == "bool" else value
        text = f"tl.load({name})"
        if p.dtype == "bool":
            return f"{text} != 0"
        return f"{self.e.need('from_' + p.dtype)}({text})" if p.dtype.startswith("f8") else text

    def _signature(self, arguments: Sequence[Argument]) -> list[str]:
        """One line for each tensor and its strides, one for the extents, one for the constants."""
        lines: list[list[str]] = []
        for a in arguments:
            word = f"{a.text}: tl.constexpr" if a.is_constant else a.text
            fresh = a.kind in ("pointer", "scalar") or not lines
            if a.kind in ("extent", "fault") or a.is_constant:
                previous = arguments[arguments.index(a) - 1]
                fresh = (previous.kind in ("extent", "fault"), previous.is_constant) != (
                    a.kind in ("extent", "fault"),
                    a.is_constant,
                )
            if fresh or not lines:
                lines.append([])
            lines[-1].append(word)
        return [f"    {', '.join(words)}," for words in lines]

    def _arguments(self) -> tuple[Argument, ...]:
        found = []
        for p in self.k.tensors:
            name = self.names("tensor", p.name)
            if p.name in self.by_value:
                found.append(Argument(name, "scalar", p.name))
                continue
            found.append(Argument(name, "pointer", p.name))
            found += [Argument(self.stride(p.name, i), "stride", p.name, i) for i in range(len(p.indices))]
            checked = [i for i in range(len(p.indices)) if (p.name, i) in self.checked]
            found += [Argument(self.size(p.name, i), "size", p.name, i) for i in checked]
        found += [Argument(self.extent(r), "extent", r) for r in runtime_ranks(self.k)]
        if self.checked:
            found.append(Argument("fault", "fault"))
        found.append(Argument("INDEX", "index"))
        return (*found, *self.constants.values())

    def _ranks(self) -> None:
        """The coordinates of the grid's tile and of the ranks that are held whole."""
        grid = self.k.grid
        if grid:
            self.line("pid = tl.program_id(0)")
        for i, g in reversed(list(enumerate(grid))):
            count = (
                self.extent(g.rank) if g.size == 1 else f"tl.cdiv({self.extent(g.rank)}, {self._step(g.rank, g.size)})"
            )
            at = f"pid % {count}" if i else "pid"
            if g.size == 1:
                self.line(f"{self.named('rank', g.rank)} = ({at}).to(INDEX)")
                self.axes[g.rank] = Axis(1, 1)
            else:
                start = self.named("start", g.rank)
                self.line(f"{start} = (({at}) * {self._step(g.rank, g.size)}).to(INDEX)")
                self._vector(g.rank, g.size, start, self.extent(g.rank), g.rank)
            if i:
                self.line(f"pid = pid // {count}")
        for r, n in self.k.whole.items():
            self._held(r, n, str(n), None)
        for h in self.k.held:
            self._held(h.rank, h.size, self.extent(h.of), h.of)

    def _held(self, rank: str, size: int, extent: str, of: str | None) -> None:
        if size == 1:
            self.line(f"{self.named('rank', rank)} = tl.full((), 0, INDEX)")
            self.axes[rank] = Axis(1, 1)
            return
        self._vector(rank, size, "0", extent, of, held_whole=True)

    def _block(self, rank: str, size: int) -> int:
        return max(power_of_two(size), self.least.get(rank, 1))

    def _step(self, rank: str, size: int) -> str:
        if self._block(rank, size) == size:
            return self.constant("BLOCK_{}", rank, size)
        return str(size)

    def _vector(
        self, rank: str, size: int, start: str, last: str, even: str | None, held_whole: bool = False, first: str = ""
    ) -> None:
        """A vector of coordinates from ``start`` and the mask of those in the tile and below ``last``.

        ``even`` names the rank whose extent, if a multiple of the tile, makes all of them active.
        """
        block = self._block(rank, size)
        name, inside = self.named("rank", rank), self.named("in", rank)
        lanes = f"tl.arange(0, {self.constant('BLOCK_{}', rank, block)})"
        self.line(f"{name} = {lanes}.to(INDEX)" if start == "0" else f"{name} = {start} + {lanes}.to(INDEX)")
        self.e.vectors.add(rank)
        parts = [f"({name} < {last})"]
        if first:
            parts.insert(0, f"({name} >= {first})")
        if block != size and not held_whole:
            parts.append(f"({lanes} < {size})")
            even = None
        if even is not None:
            constant = self.constant("EVEN_{}", even, block, "even")
            parts[0] = f"{parts[0]} | {constant}"
        self.axes[rank] = Axis(size, block)
        text = " & ".join(parts)
        self.line(f"{inside} = {text[1:-1] if len(parts) == 1 and even is None else text}")

    # Operations

    def _ops(self, body: tuple[Op, ...]) -> None:
        headings = [t.strip() for t in print_kernel(replace(self.k, tensors=(), body=body)).split("\n")[1:]]
        at = 0
        for op in body:
            if not (isinstance(op, Map) and literal_value(op.expr) is not None):
                self.line(f"# {_comment(headings[at])}")
            at += 1 + (len(list(operations(op.body))) if isinstance(op, For) else 0)
            match op:
                case For():
                    self._for(op)
                case Store():
                    self._store(op)
                case Load():
                    self._load(op)
                case Map():
                    self._map(op)
                case Fold():
                    self._fold(op)
                case Dot():
                    self._dot(op)

    def _for(self, op: For) -> None:
        whole = op.lower is None and (op.upper is None or isinstance(op.upper, Extent))
        of = op.upper.rank if isinstance(op.upper, Extent) else op.rank
        first, last = "0", self.extent(of)
        if not whole:
            first, last = self._bounds(op)
        saved = dict(self.axes), dict(self.e.tiles), set(self.e.vectors), set(self.clean)
        name = self.named("rank", op.rank)
        if op.size == 1:
            step = self.names("step", op.rank, "{}_")
            span = f"{first}, {last}" if first != "0" else last
            self.line(f"for {step} in range({span}):")
            self.depth += 1
            at = step if not op.reverse else f"{last} - 1 - {step}" + (f" + {first}" if first != "0" else "")
            self.line(f"{name} = tl.full((), {at}, INDEX)")
            self.axes[op.rank] = Axis(1, 1)
            self.e.vectors.discard(op.rank)
        else:
            start, step = self.named("start", op.rank), self._step(op.rank, op.size)
            begin = first if first == "0" or _aligned(op.lower, op.size) else f"{first} // {step} * {step}"
            self.line(f"for {start} in range({begin}, {last}, {step}):")
            self.depth += 1
            if op.reverse:
                back = self.names("back", op.rank, "{}_back")
                self.line(f"{back} = (tl.cdiv({last}, {step}) - 1) * {step} + {begin} // {step} * {step} - {start}")
                start = back
            aligned = not whole and _aligned(op.lower, op.size) and _aligned(op.upper, op.size)
            lower = "" if whole or _aligned(op.lower, op.size) else first
            self._vector(
                op.rank,
                op.size,
                start,
                self.extent(of) if aligned else last,
                of if whole or aligned else None,
                first=lower,
            )
        before = len(self.lines)
        self._ops(op.body)
        if len(self.lines) == before:
            self.line("pass")
        self.depth -= 1
        self.axes, self.e.tiles, self.e.vectors, clean = saved
        self.clean &= clean

    def _bounds(self, op: For) -> tuple[str, str]:
        """The names of a loop's first coordinate and of the one after its last."""
        first, last = self.names("low", op.rank, "{}_first"), self.names("high", op.rank, "{}_last")
        if op.lower is None or literal_value(op.lower) == 0:
            first = "0"
        else:
            self.line(f"{first} = tl.maximum({self._bound(op.lower)}, 0)")
        if op.upper is None:
            last = self.extent(op.rank)
        else:
            self.line(f"{last} = tl.minimum({self._bound(op.upper)}, {self.extent(op.rank)})")
        return first, last

    def _bound(self, e: Expr) -> str:
        v = self.e.value(e, (), "i64")
        if v.literal:
            return self.e.full((), v, "i64")
        return v.text if v.dtype in (INDEX, "i64") else self.e.converted(v, "i64")

    def _shape(self, axes: Sequence[str]) -> list[str]:
        return [self.constant("BLOCK_{}", a, self.axes[a].block) for a in axes]

    def _long(self, axes: Sequence[str]) -> tuple[str, ...]:
        """The axes of many coordinates."""
        return tuple(a for a in axes if self.axes[a].block != 1)

    def _mask(self, axes: Sequence[str], over: Sequence[str]) -> str:
        """The active lanes of some axes, over the given ones; "" where all always are."""
        from .triton_expr import aligned

        return " & ".join(aligned(self.named("in", a), (a,), over) for a in over if a in axes)

    def _whole_text(self, e: Expr, dtype: str, axes: Sequence[str], floor: int = 0) -> str:
        """An expression as a value of a dtype over exactly the given axes."""
        v = self.e.value(e, axes, dtype)
        if v.literal:
            return self.e.full(self._shape(axes), v, dtype)
        text = v.text if v.dtype == dtype else self.e.converted(v, dtype)
        if self.e.spread(e) >= set(axes):
            return Value(text, v.level if v.dtype == dtype else ATOM, dtype).at(floor)
        return self.e.full(self._shape(axes), Value(text, ATOM, dtype), dtype)

    def _set(self, tile: Tile, text: str, clean: bool = False) -> None:
        """Assign a tile."""
        axes = self._long(tile.axes)
        name = self.names("tile", tile.name)
        self.e.tiles[tile.name] = (name, axes, self.kept.get(tile.name, tile.dtype))
        self.line(f"{name} = {text}")
        (self.clean.add if clean else self.clean.discard)(tile.name)

    def _map(self, op: Map) -> None:
        axes = self._long(op.tile.axes)
        self._set(op.tile, self._whole_text(op.expr, op.tile.dtype, axes))

    # Memory

    def _pointer(
        self, access: Access, axes: Sequence[str], declared: Sequence[Expr], checks: frozenset[int]
    ) -> tuple[str, list[tuple[int, str]]]:
        """The address of an access over some axes, and the names of the indices that data make."""
        texts: list[tuple[bool, str]] = []
        found = []
        for i, index in enumerate(access.indices):
            stride = self.stride(access.tensor, i)
            if literal_value(index) == 0:
                continue
            if i in checks:
                name = self.names("at", f"{access.tensor}_{i}_{len(self.lines)}", "{}_at")
                text = self.e.typed(index, "i64", axes)
                if self.interpret and axes and not self.e.spread(index):
                    # The interpreter broadcasts a lone truth value, as tests of this would give, as a number.
                    text += f" + tl.zeros(({', '.join('1' for _ in axes)},), tl.int64)"
                self.line(f"{name} = {text}")
                found.append((i, name))
                texts.append((True, f"{name} * {stride}"))
                continue
            v = self.e.value(index, axes, "i64")
            texts.append((bool(self.e.spread(index)), f"{v.at(7)} * {stride}"))
        ordered = [t for wide, t in texts if not wide] + [t for wide, t in texts if wide]
        pointer = " + ".join([self.names("tensor", access.tensor), *ordered])
        spread = frozenset().union(*(self.e.spread(i) for i in access.indices))
        if axes and not spread >= set(axes):
            shape = ", ".join(self._shape(axes)) + ("," if len(axes) == 1 else "")
            pointer = f"{pointer} + tl.zeros(({shape}), tl.int32)"
        return pointer, found

    def _checks(self, access: Access, found: Sequence[tuple[int, str]], mask: str, axes: Sequence[str]) -> str:
        """Lanes whose data-made indices lie outside report it and are masked."""
        if not found:
            return mask
        outside = " | ".join(f"({n} < 0) | ({n} >= {self.size(access.tensor, i)})" for i, n in found)
        name = self.names("outside", f"{access.tensor}_{len(self.lines)}", "outside_{}")
        live = self.names("live", f"{access.tensor}_{len(self.lines)}", "inside_{}")
        shape = ", ".join(self._shape(axes)) + ("," if len(axes) == 1 else "")
        mask = mask or f"tl.full(({shape}), True, tl.int1)"
        if axes:
            mask = f"tl.broadcast_to({mask}, ({shape}))"
        self.line(f"{live} = {mask}")
        self.line(f"{name} = {live} & ({outside})")
        number = 1 + list(self.params).index(access.tensor)
        target = f"fault + tl.zeros(({shape}), tl.int32)" if axes else "fault"
        self.line(f"tl.store({target}, {number}, mask={name})")
        self.line(f"{live} = {live} & ({name} == 0)")
        return live

    def _load(self, op: Load) -> None:
        param = self.params[op.source.tensor]
        axes = self._long(op.tile.axes)
        dtype = self.kept.get(op.tile.name, op.tile.dtype)
        if not param.indices and param.name not in self.k.outputs:
            self._set(op.tile, self._whole_text(Access(param.name), op.tile.dtype, axes))
            return
        pointer, found = self._pointer(op.source, axes, param.indices, checked_indices(op, param.indices))
        mask = self._mask(axes, axes)
        if op.guard is not None:
            guard = self.e.typed(op.guard, "bool", axes, OR)
            guard = f"tl.full((), {guard}, tl.int1)" if guard in ("True", "False") else guard
            mask = f"{mask} & {guard if guard.startswith('(') else f'({guard})'}" if mask else guard
        mask = self._checks(op.source, found, mask, axes)
        row = DTYPES[param.dtype]
        other = self.e.spell(op.other, "f32" if row.is_float else "i32") if row.bits > 8 or not row.is_float else "0"
        other = str(int(op.other)) if param.dtype == "bool" else other
        text = f"tl.load({pointer})"
        if mask:
            name = self.names("tile", op.tile.name)
            if len(pointer) + len(mask) > 90:
                address = self.names("address", op.tile.name, "{}_at")
                self.line(f"{address} = {pointer}")
                pointer = address
            if len(mask) > 60 and found == []:
                live = self.names("mask", op.tile.name, "{}_in")
                self.line(f"{live} = {mask}")
                mask = live
            text = f"tl.load({pointer}, mask={mask}, other={other})"
            del name
        if param.dtype == "bool":
            text = f"({text} != 0)"
        elif row.is_float and row.bits == 8:
            text = f"{self.e.need('from_' + param.dtype)}({text})"
            if op.other != 0.0:
                text = f"tl.where({mask}, {text}, {self.e.spell(op.other, 'f32')}).to(tl.float16)"
        value = Value(text, ATOM, param.dtype)
        text = text if dtype == param.dtype else self.e.converted(value, dtype)
        self._set(op.tile, text, clean=op.other == 0.0)

    def _store(self, op: Store) -> None:
        param = self.params[op.target.tensor]
        axes = self._long(op.axes)
        value = self._whole_text(op.expr, param.dtype, axes)
        row = DTYPES[param.dtype]
        if row.is_float and row.bits == 8:
            wide = self.e.wide(self.e.value(op.expr, axes, "f32"))
            wide = self._whole_text(op.expr, "f32", axes)
            value = f"{self.e.need('to_' + param.dtype)}({wide})"
        elif param.dtype == "bool":
            value = f"({value}).to(tl.uint8)"
        pointer, found = self._pointer(op.target, axes, param.indices, checked_indices(op, param.indices))
        mask = self._checks(op.target, found, self._mask(axes, axes), axes)
        if len(pointer) + len(value) + len(mask) > 90:
            result = self.names("result", f"{param.name}", "{}_new")
            self.line(f"{result} = {value}")
            value = result
        self.line(f"tl.store({pointer}, {value}{f', mask={mask}' if mask else ''})")
        if self.sequential:
            self.line("tl.debug_barrier()  # what this step stored, the next one reads")

    # Reductions

    def _fold(self, op: Fold) -> None:
        tile = op.tile
        over = self._long(op.over)
        kept = self._long(tile.axes)
        axes = self._order(op.expr, (*kept, *over))
        if op.op == "argmax":
            self._argmax(op, axes, over, kept)
            return
        element = settle(self.checker.infer(op.expr))
        logic = op.op in ("any", "all")
        total = "bool" if logic else settle(join(compute_type(tile.dtype), compute_type(element)))
        text = self._whole_text(op.expr, total, axes)
        mask = self._mask(over, axes)
        clean = isinstance(op.expr, Access) and op.expr.tensor in self.clean and op.op == "sum"
        if mask and not clean:
            text = f"tl.where({mask}, {text}, {self._identity(op.op, total)})"
        text = self._reduced(op.op, text, total, axes, over)
        rest = [a for a in axes if a not in over]
        if rest != list(kept):
            text = f"tl.permute({text}, ({', '.join(str(rest.index(a)) for a in kept)}))"
        if op.accumulate:
            old = self.e.converted(Value(self.names("tile", tile.name), ATOM, tile.dtype), total)
            combine = OPS[REDUCTIONS[op.op].combine]
            if combine.name in ("maximum", "minimum"):
                real = DTYPES[total].is_float
                text = f"{self.e.need(combine.name) if real else 'tl.' + combine.name}({old}, {text})"
            else:
                text = f"{old} {combine.symbol} {text}"
        value = Value(text, ATOM if not op.accumulate else 2, total)
        self._set(
            tile, text if total == tile.dtype else self.e.converted(Value(f"({text})", ATOM, value.dtype), tile.dtype)
        )

    def _order(self, e: Expr, axes: Sequence[str]) -> tuple[str, ...]:
        """The axes in the order of a tile of the expression that has them all, so that nothing is transposed."""
        for node in walk(e):
            if isinstance(node, Access) and node.tensor in self.e.tiles:
                own = self.e.tiles[node.tensor][1]
                if set(own) == set(axes):
                    return own
        return tuple(axes)

    def _identity(self, op: str, dtype: str) -> str:
        row = DTYPES[dtype]
        if op in ("max", "min") and row.is_integer:
            return str(row.lowest if op == "max" else row.highest)
        identity = REDUCTIONS[op].identity
        assert identity is not None
        return self.e.spell(identity if isinstance(identity, bool) else float(identity), dtype)

    def _reduced(self, op: str, text: str, dtype: str, axes: Sequence[str], over: Sequence[str]) -> str:
        """A text reduced over some of its axes, the last one first."""
        if op in ("any", "all"):
            text = f"{Value(text, 0, 'bool').at(ATOM)}.to(tl.int32)"
        for a in sorted(over, key=axes.index, reverse=True):
            at = list(axes).index(a)
            match op:
                case "max" | "min" if DTYPES[dtype].is_float:
                    text = f"{self.e.need('reduce_' + op)}({text}, {at})"
                case "prod":
                    text = f"{self.e.need('reduce_prod')}({text}, {at})"
                case "sum":
                    text = f"tl.sum({text}, {at})"
                case "any" | "max":
                    text = f"tl.max({text}, {at})"
                case "all" | "min":
                    text = f"tl.min({text}, {at})"
                case _:
                    raise VerifyError(f"`{op}` is no reduction that a tile program folds")
        return f"({text} != 0)" if op in ("any", "all") else text

    def _argmax(self, op: Fold, axes: Sequence[str], over: Sequence[str], kept: Sequence[str]) -> None:
        if len(op.over) != 1 or op.accumulate:
            raise VerifyError("argmax goes over one rank and starts afresh")
        rank = op.over[0]
        coordinate = self._whole_text(Rank(rank), "i64", ())
        if not over:
            shape = self._shape(kept)
            self._set(op.tile, self.e.full(shape, Value(coordinate, ATOM, "i64"), "i64"))
            return
        dtype = settle(compute_type(settle(self.checker.infer(op.expr))))
        at = list(axes).index(rank)
        value, top = self.names("value", op.tile.name, "{}_of"), self.names("top", op.tile.name, "{}_top")
        mask = self._mask(over, axes)
        self.line(f"{value} = {self._whole_text(op.expr, dtype, axes)}")
        self.line(f"{value} = tl.where({mask}, {value}, {self._identity('max', dtype)})")
        self.line(f"{top} = tl.expand_dims({self._reduced('max', value, dtype, axes, over)}, {at})")
        hit = f"{mask} & (({value} == {top}) | ({value} != {value}))"
        place = self._whole_text(Rank(rank), "i64", axes)
        text = f"tl.min(tl.where({hit}, {place}, {(1 << 62)}), {at})"
        rest = [a for a in axes if a != rank]
        if rest != list(kept):
            text = f"tl.permute({text}, ({', '.join(str(rest.index(a)) for a in kept)}))"
        self._set(op.tile, text)

    # Dot

    def _dot(self, op: Dot) -> None:
        from .triton_expr import aligned

        plan = dot_groups(op, {t: a for t, (_, a, _) in self.e.tiles.items()}, self._long(op.tile.axes))
        over = self._long(op.over)
        target = self.names("tile", op.tile.name)
        wide = op.tile.dtype
        if plan is None or not DTYPES[wide].is_float:
            axes = (*self._long(op.tile.axes), *over)
            a, b = (self._operand(n, wide, op.operand) for n in (op.left, op.right))
            x = aligned(a, self.e.tiles[op.left][1], axes)
            y = aligned(b, self.e.tiles[op.right][1], axes)
            product = f"{x} * {y}"
            if op.annihilates:
                product = f"tl.where({x} == 0, 0.0, {product})"
            mask = self._mask(over, axes)
            if mask:
                product = f"tl.where({mask}, {product}, {'0.0' if DTYPES[wide].is_float else '0'})"
            text = self._reduced("sum", product, wide, axes, over)
            self._set(op.tile, f"{target} + {text}" if op.accumulate else text)
            return
        left, right, batch, m, n = plan
        kind = self._operand_type(op)
        texts = []
        for name, groups in ((left, (batch, m, over)), (right, (batch, over, n))):
            text = self._operand(name, wide, op.operand, kind)
            own = self.e.tiles[name][1]
            mask = self._mask(over, own)
            if mask and name not in self.clean:
                text = f"tl.where({mask}, {text}, 0.0)"
            texts.append(self._matrix(text, own, groups))
        options = ""
        if kind == "f32":
            options = (
                ', input_precision="tf32"'
                if self.numerics == "fast" and not self.interpret
                else ', input_precision="ieee"'
            )
        result_axes = (*batch, *m, *n)
        own = self._long(op.tile.axes)
        direct = result_axes == own and max(len(batch), len(m), len(n)) <= 1
        accumulator = f", {target}" if direct and op.accumulate else ""
        if op.annihilates:
            flip = left != op.left
            text = self._annihilating(op, texts, options, flip, accumulator, wide)
        else:
            out = ", out_dtype=tl.float64" if wide == "f64" else ""
            text = f"tl.dot({texts[0]}, {texts[1]}{accumulator}{options}{out})"
        if not direct:
            shape = self._shape(result_axes)
            if max(len(batch), len(m), len(n)) > 1:
                text = f"tl.reshape({text}, ({', '.join(shape)}))"
            if result_axes != own:
                text = f"tl.permute({text}, ({', '.join(str(result_axes.index(a)) for a in own)}))"
            text = f"{target} + {text}" if op.accumulate else text
        self._set(op.tile, text)

    def _annihilating(
        self, op: Dot, texts: Sequence[str], options: str, flip: bool, accumulator: str, wide: str
    ) -> str:
        """A dot where a 0 of the left operand gives 0 even against infinity or NaN: its finite part, and the rest."""
        base = self.names("tile", op.tile.name)
        a, b = f"{base}_a", f"{base}_b"
        self.line(f"{a} = {texts[0]}")
        self.line(f"{b} = {texts[1]}")
        other = a if flip else b
        total = f"{base}_sum"
        part = self.e.need("finite_part")
        left, right = (f"{part}({a})", b) if flip else (a, f"{part}({b})")
        out = ", out_dtype=tl.float64" if wide == "f64" else ""
        self.line(f"{total} = tl.dot({left}, {right}{accumulator}{options}{out})")
        # Only where there is an infinity or NaN is there more to do.
        self.line(f"if tl.max((({other} - {other}) != 0).to(tl.int32)) != 0:")
        depth = math.prod(self.axes[r].block for r in self._long(op.over))
        self.line(f"    {total} = {self.e.need('infinite_part')}({a}, {b}, {total}, {depth}, {flip})")
        return total

    def _operand_type(self, op: Dot) -> str:
        """The type in which operands are multiplied."""
        if op.tile.dtype == "f64":
            return "f64"
        if self.interpret:
            return "f32"
        types = {op.operand} if op.operand else {self.e.tiles[n][2] for n in (op.left, op.right)}
        types = {"f16" if t.startswith("f8") else t for t in types}
        kind = types.pop()
        return kind if not types and kind in ("f16", "bf16") else "f32"

    def _operand(self, name: str, wide: str, operand: str | None, kind: str | None = None) -> str:
        """A tile as an operand: rounded if it is to be, in the type in which it is multiplied."""
        text, _, dtype = self.e.tiles[name]
        v = Value(text, ATOM, dtype)
        if operand is not None and dtype != operand:
            v = Value(self.e.converted(v, operand), ATOM, operand)
        wanted = kind or wide
        if held(v.dtype) == held(wanted):
            return v.text
        return self.e.converted(v, wanted)

    def _matrix(self, text: str, own: Sequence[str], groups: tuple[tuple[str, ...], ...]) -> str:
        """A tile with its axes grouped into those of a matrix, or of a batch of them."""
        order = tuple(a for g in groups for a in g)
        if order != tuple(own):
            if len(own) == 2:
                text = f"tl.trans({text})"
            else:
                text = f"tl.permute({text}, ({', '.join(str(list(own).index(a)) for a in order)}))"
        if max(map(len, groups)) > 1:
            sizes = [" * ".join(self._shape(g)) for g in groups if g]
            text = f"tl.reshape({text}, ({', '.join(sizes)}))"
        return text


def dot_groups(
    op: Dot, axes: Mapping[str, tuple[str, ...]], kept: tuple[str, ...]
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


def _least_blocks(k: TileKernel) -> dict[str, int]:
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

    sizes = {g.rank: g.size for g in k.grid} | dict(k.whole) | {h.rank: h.size for h in k.held}
    visit(k.body, sizes, {})
    return least


def _kept(k: TileKernel) -> dict[str, str]:
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


def _aligned(e: Expr | None, size: int) -> bool:
    """Whether a bound is a multiple of a size."""
    match e:
        case None:
            return True
        case Const(value=int() as n):
            return n % size == 0
        case Call(op="mul", args=(_, Const(value=int() as n))):
            return n % size == 0
        case Call(op="maximum" | "minimum" | "add", args=args):
            return all(_aligned(a, size) for a in args)
        case Call(op="where", args=(_, a, b)):
            return _aligned(a, size) and _aligned(b, size)
    return False


def _comment(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)


__all__ = ["Argument", "KernelPrinter", "Printed", "is_affine", "narrow"]
