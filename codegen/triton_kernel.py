"""One tile kernel as one `@triton.jit` function.

Tiles are padded to powers of two: a rank in scope has a vector of coordinates and a mask of the active ones, which a
host that knows the extent to be a multiple of the tile switches off (``EVEN_…``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..ir.cascade import Call, Const, Expr, Extent, Param, literal_value
from ..ir.dtypes import DTYPES
from ..ir.tile import Dot, Fold, For, Load, Map, Op, Store, lacking_ranks, operations, print_kernel
from .interface import runtime_ranks
from .triton_dot import Dots
from .triton_expr import INDEX, held
from .triton_grid import Grid
from .triton_memory import Memory
from .triton_scope import TAKEN, Argument, Axis, Printed, power_of_two


class KernelPrinter(Grid, Memory, Dots):
    """Prints one kernel under a name."""

    def printed(self) -> Printed:
        self._grid_ranks()
        self._ops(self.k.body)
        body = self.lines
        self.lines, self.depth = [], 1
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
        always = lacking_ranks(self.k)
        grid = tuple((g.rank, g.size, int(g.rank in always)) for g in self.k.grid)
        return Printed(self.function, text, arguments, grid, frozenset(self.e.used), self.sequential)

    def _scalar(self, p: Param) -> str:
        """A 0-dimensional input in the type in which it computes."""
        name = self.names("tensor", p.name)
        if p.name in self.by_value and p.dtype != "f64":
            row = DTYPES[p.dtype]
            if p.dtype == "bf16":  # before Triton 3.9 the interpreter makes no such number
                return f"tl.full((), {name}, tl.float32).to(tl.bfloat16)"
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
            if p.name in self.blocks:
                found.append(Argument(self.descriptor(p.name), "descriptor", p.name, block=self.blocks[p.name]))
            checked = [i for i in range(len(p.indices)) if (p.name, i) in self.checked]
            found += [Argument(self.size(p.name, i), "size", p.name, i) for i in checked]
        found += [Argument(self.extent(r), "extent", r) for r in runtime_ranks(self.k)]
        if self.checked:
            found.append(Argument("fault", "fault"))
        found.append(Argument("INDEX", "index"))
        return (*found, *self.constants.values())

    # Operations

    def _ops(self, body: tuple[Op, ...]) -> None:
        headings = [t.strip() for t in print_kernel(replace(self.k, tensors=(), body=body)).split("\n")[1:]]
        at = 0
        for place, op in enumerate(body):
            if not (isinstance(op, Map) and literal_value(op.expr) is not None):
                self.line(f"# {_comment(headings[at])}")
            at += 1 + (len(list(operations(op.body))) if isinstance(op, For) else 0)
            match op:
                case For():
                    self._for(op, last=not any(isinstance(x, For) and x.rank == op.rank for x in body[place + 1 :]))
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

    def _for(self, op: For, last: bool) -> None:
        whole = op.lower is None and (op.upper is None or isinstance(op.upper, Extent))
        of = op.upper.rank if isinstance(op.upper, Extent) else op.rank
        first, end = "0", self.extent(of)
        if not whole:
            first, end = self._bounds(op)
        saved = dict(self.axes), dict(self.e.tiles), set(self.e.vectors), set(self.clean)
        name = self.named("rank", op.rank)
        if op.size == 1:
            step = self.names("step", op.rank, "{}_")
            span = f"{first}, {end}" if first != "0" else end
            self.line(f"for {step} in {self._range(op, span)}:")
            self.depth += 1
            at = step if not op.reverse else f"{end} - 1 - {step}" + (f" + {first}" if first != "0" else "")
            self.line(f"{name} = tl.full((), {at}, INDEX)")
            self.axes[op.rank] = Axis(1, 1)
            self.e.vectors.discard(op.rank)
        else:
            start, step = self.named("start", op.rank), self._step(op.rank, op.size)
            begin = first if first == "0" or _aligned(op.lower, op.size) else f"{first} // {step} * {step}"
            self.line(f"for {start} in {self._range(op, f'{begin}, {end}, {step}')}:")
            self.depth += 1
            if op.reverse:
                back = self.names("back", op.rank, "{}_back")
                self.line(f"{back} = (tl.cdiv({end}, {step}) - 1) * {step} + {begin} // {step} * {step} - {start}")
                start = back
            # Masks are tested inside, and no other loop goes on where this one ends: its last tile may be whole.
            open_end = last and op.phase == "partial" and not op.reverse
            aligned = not whole and _aligned(op.lower, op.size) and (open_end or _aligned(op.upper, op.size))
            lower = "" if whole or _aligned(op.lower, op.size) else first
            self._vector(
                op.rank,
                op.size,
                start,
                self.extent(of) if aligned else end,
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

    def _range(self, op: For, span: str) -> str:
        """A loop's range: it may say how far ahead all is loaded, where Triton would load operands of products alone
        ahead; and one with products may share its work among specialised warps."""
        options = []
        stages = 1 if self.sequential else self.mapping.knob("stages")
        if self.mapping.knob("ahead") and stages > 1 and any(isinstance(x, Load) for x in op.body):
            options.append(f"num_stages={stages}")
        if self.specialises and any(isinstance(x, Dot) for x in op.body):
            self.constants.setdefault("SPECIALIZE", Argument("SPECIALIZE", "specialize"))
            options.append("warp_specialize=SPECIALIZE")
        return f"tl.range({', '.join([span, *options])})" if options else f"range({span})"

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

    def _map(self, op: Map) -> None:
        axes = self._long(op.tile.axes)
        self._set(op.tile, self._whole_text(op.expr, op.tile.dtype, axes))


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


__all__ = ["TAKEN", "Argument", "KernelPrinter", "Printed", "power_of_two"]
