"""Reductions of the Triton printer."""

from __future__ import annotations

from collections.abc import Sequence

from ..ir.cascade import Access, Expr, Rank, walk
from ..ir.dtypes import DTYPES
from ..ir.errors import VerifyError
from ..ir.ops import OPS, REDUCTIONS
from ..ir.tile import Fold
from ..ir.types import compute_type, join, settle
from .triton_expr import ATOM, Value
from .triton_scope import Scope


class Reductions(Scope):
    """Prints folds."""

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
        # Lanes that a load left 0 need no mask, unless the tile is one value for all of them.
        clean = isinstance(op.expr, Access) and op.expr.tensor in self.clean and op.op == "sum"
        clean = clean and self.e.spread(op.expr) >= set(over)
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
