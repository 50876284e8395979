"""Operands that are made where they are multiplied (`made.py`), and those that are packed before a strip."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ..ir.cascade import Access, Expr, free_ranks, tensors_read
from ..ir.dtypes import DTYPES
from ..ir.tile import Dot, Load, Map, Store
from .cpp_dot import PANEL, DotPlan, Dots
from .cpp_scope import ctype, text_of
from .interface import checked_indices
from .made import LONGEST, Recipe, at, period, remainders_at
from .names import comment
from .strips import reads
from .vectors import ATOM, Lanes, NotVectors, Text

# By how many blocks of an operand that is made its tensors are fetched ahead: rows a page apart are not foreseen.
AHEAD = 4


class Makers(Dots):
    """Prints functions that make an operand, and dots whose sums a map takes up."""

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
        dots = [
            x
            for x in readers
            if isinstance(x, Dot) and self._multiplied(x, tile.name) == tile.dtype and not x.annihilates
        ]
        if len(written) != 1 or not dots or len(dots) != len(readers) or not all(self._shares(x, tile) for x in dots):
            return None
        along, over = dots[0].tile.axes[-1], dots[0].over[0]
        if any(r not in self.axes for x in dots for r in (*x.tile.axes, *x.over)):
            return None
        operands: set[str] = set()
        for x in dots:
            plan = self._dot_plan(x)
            if plan is None or (plan.n, plan.k, plan.batch, plan.over) != (along, over, (), ()):
                return None
            operands.add(self._operands(x, plan))
        if len(operands) > 1:
            return None
        loads = [x for x in self.readers if isinstance(x, Load) and x.tile.name in reads(op) and along in x.tile.axes]
        exprs = [op.expr, *(i for x in loads for i in x.source.indices)]
        whole = self._of_bytes(dots[0])
        length = period(exprs, over, self.aligned.get(over, 0) or 1, 4 if whole else 2)
        if length is None or not all(self._direct(x, op, along) for x in loads):
            return None
        if sum(1 for t in reads(op) if t in self.tiles and along in self.tiles[t].axes) != len(loads):
            return None
        tiled = any(len({i for i in x.source.indices if along in free_ranks(i)}) > 1 for x in loads)
        recipe = Recipe(along, over, length, tuple(loads), operands.pop(), tiled)
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

    def _made_values(
        self, op: Map, recipe: Recipe, kept: Mapping[str, str], i: int = 0, words: dict[str, int] | None = None
    ) -> Text:
        """The text of an operand's value ``i`` coordinates further; raises `NotVectors`."""
        axis, moved = self.axes[recipe.over], remainders_at(op.expr, recipe.over, i, recipe.period)
        self.axes[recipe.over] = replace(
            axis, index=f"at_most({axis.index} + {i}, {axis.count} - 1)" if i else axis.index
        )
        plain = frozenset((*op.tile.axes,))

        def tile(name: str) -> tuple[str, bool, str | None] | None:
            return (self.tiles[name].dtype, name in kept, None) if name in self.tiles else None

        def scalar(x: Expr, dtype: str) -> str:
            return self.typed(x, dtype, plain, ATOM)

        try:
            strict, words = self.k.ordered, {} if words is None else words
            lanes = Lanes(recipe.along, self.checker, tile, scalar, kept, strict, not strict, self.flushed, words)
            return lanes.field(moved, whole=op.tile.dtype in ("i8", "u8"))
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
        words: dict[str, int] = {}
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
                        # Of tiles, what the same columns have in the next tile of the summed rank.
                        further = over.size if recipe.tiled else AHEAD * recipe.period
                        ahead = replace(over, index=f"({over.index} + {further})")
                        self.axes[recipe.over] = ahead
                        later = self._moved_offset(load.source, recipe, 0, axes)
                        self.axes[recipe.over] = over
                        self.line(f"prefetch(&{self.names('tensor', param.name)}[{later}]);")
                kept[load.tile.name] = bound[text]
            found = self._made_values(op, recipe, kept, i, words)
            whole = DTYPES[op.tile.dtype].is_integer
            values.append(found.text if found.wide else f"{'integers' if whole else 'splat'}({found.text})")
        self.line(f"return units<{recipe.operand}>(")
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
        if op.annihilates and self.places.get(op.right) is plan.right and not plan.batch and not plan.over:
            self._all_finite(op, plan)
        long = {r for r in plan.right.tile.axes if self.axes[r].size != 1}
        maker = self.makers.get(plan.right.tile.name)
        if plan.right.tile.name not in self.places and maker is None:
            return
        operand = self._operands(op, plan)
        key = (plan.right.name, plan.n, plan.k, operand)
        if long != {plan.n, plan.k} or key in self.panels:
            return
        n, k = self.axes[plan.n], self.axes[plan.k]
        name = self.names(
            "panels", "_".join((*key[:3], op.operand or plan.right.tile.dtype)), f"{plan.right.tile.name}_panels"
        )
        units = -(-n.size // PANEL) * PANEL * (k.size + (1 if maker is None else LONGEST))
        room = self._room(4 * units)
        self.panels[key] = name
        if maker is not None:
            self.line(f"char* const {name} = {room};")
            recipe = self.recipes[plan.right.tile.name]
            assert recipe is not None
            self.line(f"pack_made<{operand}, {recipe.period}>({maker}, {k.count}, {n.count}, {name});")
            return
        kind = ctype(plan.right.tile.dtype)
        matrix = self._matrix(plan.right, plan.k, plan.n, "const " + kind)
        loads = (x.source.tensor for x in self.readers if isinstance(x, Load) and x.tile.name == plan.right.tile.name)
        stays = plan.right.view is not None and not {*loads} & {*self.k.outputs}
        function = f"{'in_panels' if stays else 'packed'}<{operand}, {kind}>"
        self.line(f"const Panels<{operand}> {name} = {function}({matrix}, {k.count}, {n.count}, {room});")

    def _takes(self, op: Map, dot: Dot) -> bool:
        """Whether a map alone reads the sums of a dot, place by place, so that it may take them from registers."""
        plan = self._dot_plan(dot)
        if plan is None or dot.annihilates or dot.accumulate or plan.batch or plan.over:
            return False
        readers = [x for x in self.readers if dot.tile.name in reads(x)]
        written = [x for x in self.readers if not isinstance(x, Store) and x.tile.name == dot.tile.name]
        right = plan.right.tile.name
        ready = right in self.makers or (plan.right.name, plan.n, plan.k, self._operands(dot, plan)) in self.panels
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
            self.line(comment(text_of(self.k, x)))
        self._declare(op.tile)
        name, sums = self.names("take", op.tile.name, "{}_takes"), self.names("sums", dot.tile.name, dot.tile.name)
        found = self._vectors(op.expr, plan.n, frozenset(op.tile.axes), {dot.tile.name: sums})
        assert found is not None
        m, n = self.axes[plan.m].index, self.axes[plan.n].index
        # Numbers by value: what is stored through a pointer may change others, which would be read for each vector.
        read = {t for t in tensors_read(op.expr) if t in self.params and not self.params[t].indices}
        numbers = "".join(f", {self.names('tensor', t)}" for t in sorted(read - set(self.k.outputs)))
        kind = "Mask" if self._of_bytes(dot) else "Vector"
        self.open(f"const auto {name} = [&{numbers}](int64_t {m}, int64_t {n}, {kind} {sums}) CASTILE_INLINED")
        self.line(f"store(&{self._element(op.tile.name)}, {found.text});")
        self.close("};")
        self._dot_call(dot, plan, taken=f"through({name})")
