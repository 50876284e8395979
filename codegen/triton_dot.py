"""Matrix products of the Triton printer."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..ir.dtypes import DTYPES
from ..ir.tile import Dot, Fold
from .triton_expr import ATOM, Value, aligned, held
from .triton_reduce import Reductions
from .triton_scope import LEAST_DOT, dot_groups

# The least depth of a product of 8-bit integers.
LEAST_BYTES = 32


class Dots(Reductions):
    """Prints dots: on the matrix unit where rows and columns remain, else as sums of products."""

    def _dot(self, op: Dot) -> None:
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
        options = f', input_precision="{self._precision()}"' if kind == "f32" else ""
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

    def _fold(self, op: Fold) -> None:
        """A fold; one of products of 8-bit integers is a matrix product where its sides are long enough."""
        names = self.exact.get(op)
        if names is None or not self._exact_dot(op, *names):
            super()._fold(op)

    def _exact_dot(self, op: Fold, *names: str) -> bool:
        dot = Dot(op.tile, names[0], names[1], op.over, op.accumulate, "i8")
        own, over = self._long(op.tile.axes), self._long(op.over)
        plan = dot_groups(dot, {t: a for t, (_, a, _) in self.e.tiles.items()}, own)
        if plan is None or any(self.e.tiles[n][2] != "i8" for n in names):
            return False
        left, right, batch, m, n = plan
        sides = [math.prod(self.axes[r].block for r in group) for group in (m, n, over)]
        single = max(len(batch), len(m), len(n)) <= 1 and (*batch, *m, *n) == own
        if not single or min(sides[:2]) < LEAST_DOT or sides[2] < LEAST_BYTES:
            return False
        texts = []
        for name, groups in ((left, (batch, m, over)), (right, (batch, over, n))):
            text, axes, _ = self.e.tiles[name]
            mask = self._mask(over, axes)
            if mask and name not in self.clean:
                text = f"tl.where({mask}, {text}, 0)"
            texts.append(self._matrix(text, axes, groups))
        target = self.names("tile", op.tile.name)
        accumulator = f", {target}" if op.accumulate else ""
        self._set(op.tile, f"tl.dot({texts[0]}, {texts[1]}{accumulator}, out_dtype=tl.int32)")
        return True

    def _precision(self) -> str:
        """How f32 operands are multiplied."""
        if self.interpret or self.numerics == "strict" or not self.target.startswith("cuda"):
            return "tf32" if self.numerics == "fast" and not self.interpret else "ieee"
        if self.mapping.knob("tf32x3"):
            return "tf32x3"
        return "tf32" if self.numerics == "fast" else "ieee"

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
