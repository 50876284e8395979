"""Maps and reductions of tiles."""

from __future__ import annotations

from ..ir.cascade import Access, Expr, walk
from ..ir.dtypes import DTYPES
from ..ir.errors import VerifyError
from ..ir.tile import Fold, Map
from ..ir.types import compute_type, join, settle
from .cpp_expr import Value, converted
from .cpp_memory import Memory
from .cpp_scope import ctype
from .vectors import ATOM, LOOSE, UNARY

REDUCERS = {"sum": "Sum", "prod": "Prod", "max": "Max", "min": "Min", "any": "Any", "all": "All"}
_JOINS = {"sum": "{a} + {b}", "prod": "{a} * {b}", "max": "maximum({a}, {b})", "min": "minimum({a}, {b})"}
_JOINS |= {"any": "{a} | {b}", "all": "{a} & {b}"}


class Folds(Memory):
    """Prints maps and folds, one loop nest each."""

    def _map(self, op: Map) -> None:
        place = self.places[op.tile.name]
        inner = self._vector_axis(place)
        wide = self._vectors(op.expr, inner, frozenset(op.tile.axes)) if inner is not None else None
        if inner is not None and wide is not None:
            value = wide.text if wide.wide else f"splat({wide.text})"
            rest = [r for r in place.order if r != inner]
            self._nest(rest, lambda: self._vector_loop(inner, [f"store(&{self._element(op.tile.name)}, {value});"]))
            return

        def body() -> None:
            self.line(f"{self._element(op.tile.name)} = {self.typed(op.expr, op.tile.dtype, frozenset(op.tile.axes))};")

        self._nest(place.order, body, "#pragma omp simd")

    def _fold(self, op: Fold) -> None:
        tile, axes = op.tile, frozenset((*op.tile.axes, *op.over))
        if op.op not in REDUCERS and op.op != "argmax":
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
        reducer = REDUCERS[op.op]

        last = self.axes[reduced[-1]] if reduced else None
        wide = None
        if last is not None and total == "f32" and last.in_vectors and op.op in ("sum", "prod", "max", "min"):
            wide = self._vectors(op.expr, reduced[-1], axes)

        def body() -> None:
            target = self._element(tile.name)
            begin = f"{reducer}::identity<{ctype(total)}>"
            if op.accumulate:
                begin = converted(Value(target, ATOM, tile.dtype), total)
            value = self.typed(op.expr, total, axes) if wide is None or not wide.wide else wide.text
            if not reduced:
                joined = f"{reducer}::join<{ctype(total)}>({begin}, {value})"
                self.line(f"{target} = {converted(Value(joined, ATOM, total), tile.dtype)};")
                return
            assert last is not None

            def folded(start: str) -> str:
                if wide is not None and wide.wide:
                    element = f"{self._elements(reduced[-1], [], value)} {{ return {value}; }}"
                    return f"fold_vectors<{reducer}>({last.count}, {start}, {element})"
                element = f"[&](int64_t {last.index}) {{ return {value}; }}"
                return f"fold<{reducer}, {ctype(total)}>({last.count}, {start}, {element})"

            if len(reduced) == 1:
                text = folded(begin)
                self.line(f"{target} = {converted(Value(text, ATOM, total), tile.dtype)};")
                return
            name = self.names("total", tile.name, "{}_total")
            self.line(f"{ctype(total)} {name} = {begin};")
            self._nest(reduced[:-1], lambda: self.line(f"{name} = {folded(name)};"))
            self.line(f"{target} = {converted(Value(name, ATOM, total), tile.dtype)};")

        self._nest(tile.axes, body)

    def _fold_outer(self, op: Fold, total: str, axes: frozenset[str]) -> None:
        """A reduction whose contiguous axis is kept: whole rows are joined.

        Vectors stay in registers over the rows, and then meet what the tile holds: a long sum of numbers of one sign
        loses less where each tile of rows is summed by itself. Else the tile is the accumulators.
        """
        name = op.tile.name
        *outer, inner = self.places[name].long
        vector = self._vectors(op.expr, inner, axes) if self._stays_in_vectors(op, total) else None

        def vectors() -> None:
            assert vector is not None
            value = vector.text if vector.wide else f"splat({vector.text})"
            held, own = self.names("lanes", name, "{}_lanes"), f"&{self._element(name)}"

            def whole() -> None:
                self.line(f"Vector {held} = splat({REDUCERS[op.op]}::identity<{ctype(total)}>);")
                self._nest(op.over, lambda: self.line(f"{held} = {_JOINS[op.op].format(a=held, b=value)};"))
                met = _JOINS[op.op].format(a=f"load({own})", b=held) if op.accumulate else held
                self.line(f"store({own}, {met});")

            self._over_vectors(inner, whole, value)

        def rows() -> None:
            if not op.accumulate:
                begin = f"{REDUCERS[op.op]}::identity<{ctype(total)}>"
                self._nest([inner], lambda: self.line(f"{self._element(name)} = {begin};"), "#pragma omp simd")
            at = self._element(name)
            joined = _JOINS[op.op].format(a=at, b=self.typed(op.expr, total, axes, UNARY))
            self._nest([*op.over, inner], lambda: self.line(f"{at} = {joined};"), "#pragma omp simd")

        self._nest(outer, rows if vector is None else vectors)

    def _stays_in_vectors(self, op: Fold, total: str) -> bool:
        """Whether the sums of whole rows are vectors of f32, in an order that nobody prescribes."""
        inner = self._vector_axis(self.places[op.tile.name])
        return inner is not None and total == op.tile.dtype == "f32" and not self.k.ordered

    def _argmax(self, op: Fold, axes: frozenset[str]) -> None:
        if len(op.over) != 1 or op.accumulate:
            raise VerifyError("argmax goes over one rank and starts afresh")
        axis = self.axes[op.over[0]]

        def body() -> None:
            value = self.typed(op.expr, settle(self.checker.infer(op.expr)), axes)
            dtype = settle(self.checker.infer(op.expr))
            if not DTYPES[dtype].is_integer:
                value = converted(Value(value, ATOM, dtype), settle(compute_type(dtype)))
            found = axis.base
            if axis.size != 1:
                found = f"fold_argmax({axis.count}, [&](int64_t {axis.index}) CASTILE_INLINED {{ return {value}; }})"
                found = found if axis.base == "0" else f"{axis.base} + {found}"
            self.line(f"{self._element(op.tile.name)} = {converted(Value(found, LOOSE, 'i64'), op.tile.dtype)};")

        self._nest(op.tile.axes, body)

    def _contiguous(self, e: Expr, axes: tuple[str, ...]) -> str | None:
        """The axis along which most of the tiles in an expression are contiguous; None if there is none to tell."""
        votes: dict[str, int] = {}
        for node in walk(e):
            if isinstance(node, Access) and node.tensor in self.places:
                place = self.places[node.tensor]
                if place.long:
                    votes[place.long[-1]] = votes.get(place.long[-1], 0) + len(place.long)
        return max(votes, key=lambda r: (votes[r], axes.index(r))) if votes else None
