"""Products: which axes of a dot are the micro-kernel's, and the call of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..ir.cascade import Access, Call, Cast, Const, Expr
from ..ir.dtypes import DTYPES
from ..ir.tile import Dot, Fold, For, Load, Op, Store, Tile, operations
from ..ir.types import settle
from .cpp_fold import Folds
from .cpp_scope import Place, There, ctype, stored
from .interface import checked_indices
from .made import LONGEST
from .strips import reads, writes
from .vectors import steps

# Floats that go to a dot as they lie.
EIGHT = ("f8e4m3", "f8e5m2")

# The widest panel of B that `dot` packs, in columns.
PANEL = 64


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


class Dots(Folds):
    """Prints dots."""

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
        floats = op.tile.dtype == "f32" and all(DTYPES[t].is_float and t != "f64" for t in types)
        if not floats and not self._of_bytes(op):
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

    def _of_bytes(self, op: Dot) -> bool:
        """Whether the operands of a dot are whole numbers of 8 bits, and its sums of 32."""
        return op.tile.dtype == "i32" and all(self.tiles[t].dtype in ("i8", "u8") for t in (op.left, op.right))

    def _multiplied(self, op: Dot, name: str) -> str:
        """The type in which a dot multiplies an operand."""
        return self.tiles[name].dtype if self._of_bytes(op) else op.operand or "f32"

    def _operands(self, op: Dot, plan: DotPlan) -> str:
        """How the operands of a dot go into the micro-kernel, as a type of C++."""
        if self._of_bytes(op):
            return f"Whole<{ctype(plan.left.tile.dtype)}, {ctype(plan.right.tile.dtype)}>"
        return ctype(op.operand or "f32")

    def _is_of_bf16(self, op: Dot) -> bool:
        """Whether a dot's operands go into the micro-kernel in bf16."""
        return op.operand == "bf16" and not self._of_bytes(op)

    def _dot_call(self, op: Dot, plan: DotPlan, annihilates: bool = False, taken: str | None = None) -> None:
        """Call the micro-kernel; ``taken`` is where its sums go, if not into the dot's own tile."""
        m, n, k = (self.axes[r] for r in (plan.m, plan.n, plan.k))
        maker, recipe = self.makers.get(plan.right.tile.name), self.recipes.get(plan.right.tile.name)
        more = 1 if maker is None else LONGEST + 2
        few = 4 * (n.size + 2 * k.size + 64) if maker is not None else 0
        self.dot_floats = max(self.dot_floats, (k.size + more) * PANEL + m.size * (k.size + more), few)
        target = self._place(op.tile.name)
        accumulate = op.accumulate or bool(plan.over)
        operand = self._operands(op, plan)
        panels = self.panels.get((plan.right.name, plan.n, plan.k, operand))
        a_type, b_type = ctype(plan.left.tile.dtype), ctype(plan.right.tile.dtype)
        types = ", ".join((operand, a_type, b_type))

        def zero() -> None:
            self.line(f"{self._element(op.tile.name)} = 0;")

        def call() -> None:
            a = self._matrix(plan.left, plan.m, plan.k, "const " + a_type)
            b = self._matrix(plan.right, plan.k, plan.n, "const " + b_type) if maker is None else maker
            c = self._matrix(target, plan.m, plan.n, ctype(op.tile.dtype)) if taken is None else ""
            counts, adds = f"{m.count}, {n.count}, {k.count}", "true" if accumulate else "false"
            scratch = "reinterpret_cast<float*>(local + DOT)"
            put = f"Into{{{c}, {adds}}}" if taken is None else taken
            if annihilates:
                left = self.places[op.left] is plan.left
                self.line(f"dot_annihilating<{types}, {'true' if left else 'false'}>({c}, {a}, {b}, {counts}, {adds});")
                return
            if maker is not None and recipe is not None:
                made = f"{operand}, {recipe.period}"
                name = (
                    f"dot_made<{made}, {'true' if recipe.tiled else 'false'}>"
                    if panels is None
                    else f"dot_packed_made<{made}, decltype({maker})>"
                )
            else:
                ordered = ", true" if self.k.ordered else ""
                name = f"dot<{types}{ordered}>" if panels is None else f"dot_packed<{operand}, {a_type}>"
            whole = maker is None and panels is None
            self.line(f"{name}(")
            self.line(f"    {c if whole else put},")
            self.line(f"    {a},")
            self.line(f"    {b if panels is None else panels},")
            self.line(f"    {counts}, {adds + ', ' if whole else ''}{scratch});")

        if plan.over and not op.accumulate:
            self._nest(op.tile.axes, zero, "#pragma omp simd")
        self._nest((*plan.batch, *plan.over), call)

    def _matrix(self, place: Place, row: str, column: str, kind: str) -> str:
        fixed = [r for r in place.tile.axes if r not in (row, column) and self.axes[r].size != 1]
        at = "".join(f" + {self.axes[r].index} * {place.step(r)}" for r in fixed)
        return f"Matrix<{kind}>{{{place.name}{at}, {place.step(row)}, {place.step(column)}}}"

    def _view(self, op: Load) -> bool:
        """Let a tile that is only an operand of dots stay in its tensor's memory."""
        tile, param = op.tile, self.params[op.source.tensor]
        long = tuple(r for r in tile.axes if self.axes[r].size != 1)
        if op.guard is not None or len(long) != 2 or checked_indices(op, param.indices) or param.dtype != tile.dtype:
            return False
        moves = steps(op.source.indices, long)
        readers = [x for x in operations(self.k.body) if not isinstance(x, For) and tile.name in reads(x)]
        if moves is None or not readers or not all(isinstance(x, Dot) for x in readers):
            return False
        if not all(self._shares(x, tile) for x in readers if isinstance(x, Dot)) and not self._once(op, readers):
            return False
        strides = {r: self._stride(param.name, i) + (f" * {c}" if c != 1 else "") for r, (i, c) in moves.items()}
        name = self.names("tile", tile.name)
        first = self._offset(op.source, frozenset(), frozenset())
        self.line(f"const {stored(param.dtype)}* const {name} = {self.names('tensor', param.name)} + {first};")
        order = (*(r for r in long if r != long[-1]), long[-1])
        self.places[tile.name] = Place(tile, name, order, tuple(self.axes[r].size for r in order), strides)
        return True

    def _stays(self, op: Load) -> bool:
        """Let sums that come from an output, are added to and go back to it stay there, if rows lie along memory."""
        tile, tensor = op.tile, op.source.tensor
        long = tuple(r for r in tile.axes if self.axes[r].size != 1)
        moves = steps(op.source.indices, long) if len(long) == 2 and op.guard is None else None
        if moves is None or moves[long[1]][1] != 1 or not self._is_taken_and_put_back(op):
            return False
        name, param = self.names("tile", tile.name), self.names("tensor", tensor)
        flag, row = self.names("there", tile.name, f"{name}_there"), self.names("step", tile.name, f"{name}_row")
        (side, by), (last, _) = (moves[r] for r in long)
        sizes = tuple(self.axes[r].size for r in long)
        stride = self._stride(tensor, side) + (f" * {by}" if by != 1 else "")
        self.line(f"const bool {flag} = {self._stride(tensor, last)} == 1;")
        self.line(f"const int64_t {row} = {flag} ? {stride} : {sizes[1]};")
        room = f"reinterpret_cast<float*>({self._room(4 * sizes[0] * sizes[1])})"
        first = f"{param} + {self._offset(op.source, frozenset(), frozenset())}"
        self.line(f"float* const {name} = {flag} ? {first} : {room};")
        self.places[tile.name] = Place(tile, name, long, sizes, {long[0]: row, long[1]: "1"})
        self.there[tensor] = There(tile.name, flag)
        self.open(f"if (!{flag})")
        self._load(op)
        self.close()
        return True

    def _is_taken_and_put_back(self, op: Load) -> bool:
        """Whether a tile of f32 is an output's, only products are added to it, and it goes back where it was."""
        tile, tensor = op.tile.name, op.source.tensor
        if op.tile.dtype != "f32" or tensor not in self.k.outputs or self.params[tensor].dtype != "f32":
            return False
        bodies = (self.k.body, *(x.body for x in operations(self.k.body) if isinstance(x, For)))
        body = next(b for b in bodies if op in b)
        after = body[body.index(op) + 1 :]
        back = next((i for i, x in enumerate(after) if tensor in reads(x) | writes(x)), None)
        if back is None:
            return False
        store, users = after[back], [x for x in self.readers if x is not op and tile in reads(x) | writes(x)]
        sums = [x for x in users if isinstance(x, Dot) and x.tile.name == tile and x.accumulate and not x.annihilates]
        good = isinstance(store, Store) and store.target == op.source and store.expr == Access(tile)
        others = [x for x in users if x not in sums]
        return good and others == [store] and all(x in after and tile not in (x.left, x.right) for x in sums)

    def _once(self, op: Load, readers: Sequence[Op]) -> bool:
        """Whether a tile is the rows of one dot, as the micro-kernel reads them, and no loop reads it again."""
        dot, tile, name = readers[0], op.tile, op.source.tensor
        if (
            len(readers) > 1
            or not isinstance(dot, Dot)
            or name in self.k.outputs
            or not (self._multiplied(dot, tile.name) == tile.dtype or tile.dtype in EIGHT)
        ):
            return False
        others = [self.tiles[t] for t in (dot.left, dot.right) if t != tile.name]
        rows = [r for r in dot.tile.axes[:-1] if r in tile.axes]
        bodies = (self.k.body, *(x.body for x in operations(self.k.body) if isinstance(x, For)))
        beside = any(op in body and dot in body for body in bodies)
        good = beside and len(others) == len(rows) == len(dot.over) == 1 and rows[0] not in others[0].axes
        return good and set(tile.axes) == {rows[0], *dot.over} and dot.tile.dtype in ("f32", "i32")

    def _shares(self, op: Dot, tile: Tile) -> bool:
        """Whether a tile is the operand that all rows of a dot share: it has the columns, and the other has not."""
        other = self.tiles[op.right if op.left == tile.name else op.left]
        known = ("f32", "bf16", "f16", *EIGHT) if op.tile.dtype == "f32" else ("i8", "u8")
        if other.name == tile.name or not (op.tile.dtype == "f32" or self._of_bytes(op)):
            return False
        if not op.tile.axes or len(op.over) != 1:
            return False
        column = op.tile.axes[-1]
        kept = [r for r in op.tile.axes if r != column and r in other.axes]
        good = column in tile.axes and column not in other.axes and bool(kept)
        return good and set(tile.axes) == {column, op.over[0]} and tile.dtype in known
