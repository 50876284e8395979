"""A kernel in C++: its argument struct, its grid, and the loops and strips of its body."""

from __future__ import annotations

from collections.abc import Sequence

from ..ir.errors import VerifyError
from ..ir.tile import Dot, Fold, For, Load, Map, Op, Store, TileKernel, lacking_ranks, print_kernel
from .cpp_expr import from_memory
from .cpp_scope import Axis, ctype, stored
from .cpp_strip import Strips
from .interface import runtime_ranks
from .made import multiple
from .names import comment
from .strips import reads, strips, writes

# Bytes of a thread's workspace beyond which a kernel is refused: without memory it could only abort the process.
LARGEST_WORKSPACE = 1 << 30


class KernelPrinter(Strips):
    """Prints one kernel."""

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
                self.line(f"const {ctype(p.dtype)} {name} = {from_memory(p.dtype, f'*args->{name}')};")
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
        rule = "<Subnormals::FLUSHED>" if self.flushed else ""
        self.open(f"parallel_for{rule}(first, last < 0 ? points : last, threads, [=](int64_t point) CASTILE_INLINED")
        self.lines += body
        self.close("});")

    def _body(self) -> list[str]:
        """The lines of one grid point."""
        self.depth = 2
        grid = self.k.grid
        for h in self.k.held:
            self.axes[h.rank] = Axis(h.size, "0", self._extent_text(h.of), self.names("rank", h.rank))
            self.aligned[h.rank] = h.size
        for i, g in reversed(list(enumerate(grid))):
            point = f"point % {self._tiles(g)}" if i else "point"
            self.aligned[g.rank] = g.size
            self._begin(g.rank, g.size, point if g.size == 1 or not i else f"({point})", self._extent_text(g.rank))
            if i:
                self.line(f"point /= {self._tiles(g)};")
        start = len(self.lines)
        self._ops(self.k.body)
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

    def _sequence(self, ops: Sequence[Op], row: str | None) -> None:
        """Operations in order; maps and folds that follow each other take one loop over the rows.

        A store that has no place in that loop comes after it, so that rows are gone over again while they are near.
        """
        run: list[Load | Map | Fold | Store] = []
        late: list[Store] = []
        taken: Map | None = None

        def flush() -> None:
            self._run(run, row)
            for store in late:
                self._op(store)
            run.clear()
            late.clear()

        for i, op in enumerate(ops):
            if taken is not None:
                taken = None
                continue
            following = ops[i + 1] if i + 1 < len(ops) else None
            if isinstance(op, Dot) and isinstance(following, Map) and self._takes(following, op):
                flush()
                taken = following
                self._dot_into(op, following)
                continue
            stored = set().union(*map(writes, late))
            if late and (reads(op) & stored or writes(op) & stored.union(*map(reads, late))):
                flush()
            if not isinstance(op, For | Dot) and self._runs(op, row):
                run.append(op)
                continue
            if isinstance(op, Load) and not reads(op) & set().union(*map(writes, run)):
                # What is loaded need not wait for a run, which may go on.
                self._op(op)
                continue
            if isinstance(op, Store) and run:
                late.append(op)
                continue
            flush()
            if isinstance(op, For):
                self._announce(op)
                self._for(op)
            else:
                self._op(op)
        flush()

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
        self.loops.append(op)
        self._ops(op.body)
        self.loops.pop()
        del self.axes[op.rank]
        self.aligned.pop(op.rank, None)
        self.places, self.stack, self.workspace = places, stack, workspace
        self.panels, self.finite = panels, finite
        self.close()
        if scope:
            self.close()


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
