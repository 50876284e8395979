"""Which tile a program works on: the order in which tiles are taken, and programs that stay and take several."""

from __future__ import annotations

from ..ir.footprint import heaviest_last
from ..ir.tile import Dot, GridRank, lacking_ranks, operations, tiles_of
from .triton_scope import Axis, Scope


class Grid(Scope):
    """Prints the coordinates of the grid's tile, and of the ranks that are held whole."""

    def _grid_ranks(self) -> None:
        grid = self._slowest_first()
        plane = self._plane()
        # The number of the tile that is left when the ranks that change faster are told.
        left = "pid"
        persistent = bool(grid) and self.mapping.knob("persistent")
        if persistent:
            self.line(f"programs = {' * '.join(map(self._tiles, grid))}")
            self.line("for pid in range(tl.program_id(0), programs, tl.num_programs(0)):")
            self.depth += 1
        elif grid:
            self.line("pid = tl.program_id(0)")
        while grid:
            g = grid.pop()
            if plane and g in plane:
                grid = [x for x in grid if x not in plane]
                count = self._swizzled(*plane, left)
            else:
                count = self._tiles(g)
                self._placed(g, f"{left} % {count}" if grid else left, count)
            if grid:
                self.line(f"{'point' if persistent else 'pid'} = {left} // {count}")
                left = "point" if persistent else "pid"
        for h in self.k.held:
            self._held(h.rank, h.size, self.extent(h.of), h.of)

    def _slowest_first(self) -> list[GridRank]:
        """The grid's ranks, the one that changes slowest first."""
        heavy = heaviest_last(self.k) if self.mapping.knob("heavy") == 2 else None
        return sorted(self.k.grid, key=lambda g: g.rank != heavy) if heavy else list(self.k.grid)

    def _plane(self) -> tuple[GridRank, GridRank] | None:
        """The two tiled ranks of a product of which neither operand has both."""
        tiled = [g for g in self.k.grid if g.size > 1]
        if self.mapping.knob("swizzle") == 1 or len(tiled) < 2 or heaviest_last(self.k):
            return None
        rows, columns = tiled[-2:]
        axes = {name: {*tile.axes} for name, tile in tiles_of(self.k).items()}
        operands = [axes[n] for op in operations(self.k.body) if isinstance(op, Dot) for n in (op.left, op.right)]
        apart = [not {rows.rank, columns.rank} <= x for x in operands]
        return (rows, columns) if apart and all(apart) else None

    def _tiles(self, g: GridRank) -> str:
        """How many tiles a rank has."""
        count = self.extent(g.rank) if g.size == 1 else f"tl.cdiv({self.extent(g.rank)}, {self._step(g.rank, g.size)})"
        return f"tl.maximum({count}, 1)" if g.rank in lacking_ranks(self.k) else count

    def _swizzled(self, rows: GridRank, columns: GridRank, left: str) -> str:
        """Place two ranks so that programs near in time share operands; gives how many tiles both have."""
        counts, at = [], []
        for g in (rows, columns):
            counts.append(self.names("tiles", g.rank, "{}_tiles"))
            at.append(self.names("tile of", g.rank, "{}_tile"))
            self.line(f"{counts[-1]} = {self._tiles(g)}")
        m, n = counts
        step = self.mapping.knob("swizzle")
        self.line(f"# {step} rows of tiles at a time, so that what they share stays in the L2 cache")
        self.line(f"{', '.join(at)} = tl.swizzle2d({left} // {n} % {m}, {left} % {n}, {m}, {n}, {step})")
        self._placed(rows, at[0], m)
        self._placed(columns, at[1], n)
        return f"({m} * {n})"

    def _placed(self, g: GridRank, at: str, count: str) -> None:
        """The coordinates of a rank's tile number ``at``; where the last tiles have the most work, from the end."""
        if self.mapping.knob("heavy") and heaviest_last(self.k) == g.rank:
            at = f"{count} - 1 - {at}"
        if g.size == 1:
            self.line(f"{self.named('rank', g.rank)} = {self._position(at)}")
            self.axes[g.rank] = Axis(1, 1)
            return
        start = self.named("start", g.rank)
        self.line(f"{start} = {self._position(f'({at}) * {self._step(g.rank, g.size)}')}")
        self._vector(g.rank, g.size, start, self.extent(g.rank), g.rank)

    def _position(self, text: str) -> str:
        """A number in the type of positions; the interpreter's loops count in Python's numbers."""
        persistent = self.interpret and self.mapping.knob("persistent")
        return f"tl.full((), {text}, INDEX)" if persistent else f"({text}).to(INDEX)"

    def _held(self, rank: str, size: int, extent: str, of: str | None) -> None:
        if size == 1:
            self.line(f"{self.named('rank', rank)} = tl.full((), 0, INDEX)")
            self.axes[rank] = Axis(1, 1)
            return
        self._vector(rank, size, "0", extent, of, held_whole=True)

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
        plain = last == self.extent(rank) or (held_whole and even is not None)
        self.axes[rank] = Axis(size, block, start, plain and not first and (block == size or held_whole))
        text = " & ".join(parts)
        self.line(f"{inside} = {text[1:-1] if len(parts) == 1 and even is None else text}")
