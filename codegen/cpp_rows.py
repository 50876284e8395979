"""Operations one by one, and runs of them that share the loop over a row."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from ..ir.cascade import Access, Rank, free_ranks, walk
from ..ir.tile import Dot, Fold, Load, Map, Op, Store
from ..ir.types import settle
from .cpp_fold import REDUCERS
from .cpp_made import Makers
from .cpp_scope import text_of
from .interface import checked_indices
from .names import comment
from .strips import reads, runs, writes
from .vectors import WIDEST


class Rows(Makers):
    """Prints operations that hold no others."""

    def _announce(self, op: Op) -> None:
        for t in writes(op) & set(self.places):
            # What was found of a tile holds until it is written again.
            self.finite.pop(self.places[t].name, None)
        self.line(comment(text_of(self.k, op)))
        name = op.tile.name if isinstance(op, Load | Map | Fold | Dot) else None
        if name is not None and name in self.k.comments:
            self.line(comment(self.k.comments[name]))

    def _op(self, op: Load | Map | Fold | Dot | Store) -> None:
        self._announce(op)
        match op:
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
            self.line(comment(text_of(self.k, x)))
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
        reducer, target = REDUCERS[fold.op], self._element(fold.tile.name)
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
