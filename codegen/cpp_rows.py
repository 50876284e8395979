"""Operations one by one, and runs of them that share the loop over a row."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import reduce

from ..ir.cascade import Access, Call, Expr, Rank, free_ranks, transform, walk
from ..ir.tile import Dot, Fold, Load, Map, Op, Store
from ..ir.types import settle
from .cpp_fold import REDUCERS
from .cpp_made import Makers
from .cpp_scope import Axis, ctype, text_of
from .interface import checked_indices
from .names import comment
from .strips import reads, runs, writes
from .vectors import ATOM, Inside

# What may share the loop over a row.
Row = Load | Map | Fold | Store


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
                there = self.there.get(op.target.tensor)
                if there is not None and op.expr == Access(there.tile):
                    self.open(f"if (!{there.flag})")
                    self._store(op)
                    self.close()
                    return
                self._store(op)
            case Load():
                place = self.places.get(op.tile.name)
                if self._into_made(op) or (place is not None and place.view is not None):
                    return
                # What a strip makes for others, too, has its place already.
                if place is None and (self._view(op) or self._stays(op)):
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

    def _as_read(self, op: Map) -> str | None:
        """The axis along which all tiles lie that a map reads, unless a dot is to take its own up as rows."""
        if any(isinstance(x, Dot) and op.tile.name in reads(x) and not self._shares(x, op.tile) for x in self.readers):
            return None
        lasts = {self.places[t].long[-1] for t in reads(op) if t in self.places and len(self.places[t].long) > 1}
        return next(iter(lasts)) if len(lasts) == 1 and lasts <= set(op.tile.axes) else None

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

    def _inner(self, op: Row, row: str | None) -> tuple[str, ...]:
        """The axes along which an operation on one row goes."""
        axes = op.axes if isinstance(op, Store) else op.tile.axes
        over = op.over if isinstance(op, Fold) else ()
        return tuple(r for r in (*axes, *over) if self.axes[r].size != 1 and r != row)

    def _runs(self, op: Row, row: str | None) -> bool:
        """Whether an operation may share the loop over rows: one scalar a row, or vectors along one axis."""
        inner = self._inner(op, row)
        if (row is not None and row not in (op.axes if isinstance(op, Store) else op.tile.axes)) or len(inner) > 1:
            return False
        if isinstance(op, Store):
            param = self.params[op.target.tensor]
            plain = len(inner) == 1 and param.dtype in ("f32", "bf16") and not checked_indices(op, param.indices)
            good = plain and self.axes[inner[0]].in_vectors and self._side(op.target, inner[0]) is not None
            return good and self._vectors(op.expr, inner[0], frozenset(op.axes)) is not None
        if isinstance(op, Load):
            param = self.params[op.source.tensor]
            plain = param.name not in self.k.outputs and not checked_indices(op, param.indices)
            good = plain and len(inner) == 1 and op.tile.dtype == "f32" and param.dtype in ("f32", "bf16")
            good = good and self.axes[inner[0]].in_vectors and self._side(op.source, inner[0]) is not None
            return good and (op.guard is None or self._guarded(op, inner[0]) is not None)
        if isinstance(op, Map):
            if not inner:
                return True
            place = self._place(op.tile.name)
            good = place.long[-1] == inner[0] == self._vector_axis(place)
        else:
            if not inner or inner[0] in op.tile.axes or op.op not in ("sum", "prod", "max", "min"):
                return False
            good = op.tile.dtype == "f32" and self.axes[inner[0]].in_vectors
            good = good and settle(self.checker.infer(op.expr)) in ("f32", "bf16")
        own = any(isinstance(n, Access) and n.tensor == op.tile.name for n in walk(op.expr))
        if own and isinstance(op, Fold):
            return False
        return good and self._vectors(op.expr, inner[0], frozenset((*op.tile.axes, *inner))) is not None

    def _run(self, run: Sequence[Row], row: str | None) -> None:
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
        last = {name: group for group in groups for op in group for name in reads(op) & set(loads)}
        for stage in self._stages(groups, row):
            if row is not None:
                axis = self.axes[row]
                self.open(f"for (int64_t {axis.index} = 0; {axis.index} < {axis.count}; ++{axis.index})")
            for some in stage:
                inner = self._inner(some[0], row)
                if not inner:
                    one = some[0]
                    assert isinstance(one, Map)
                    self.alone = True
                    text = self.typed(one.expr, one.tile.dtype, frozenset(one.tile.axes))
                    self.alone = False
                    self.line(f"{self._element(one.tile.name)} = {text};")
                else:
                    used = set().union(*(reads(op) for op in some))
                    ahead = {name: self._next(x, row) for name, x in loads.items() if last[name] is some}
                    self._group([*(x for t, x in loads.items() if t in used), *some], inner[0], kept, ahead)
            if row is not None:
                self.close()

    def _stages(self, groups: Sequence[Sequence[Row]], row: str | None) -> list[list[Sequence[Row]]]:
        """What is done for all rows of a strip before the next: a row that goes on with what it has just folded waits
        for it, and rows do not wait for each other."""
        if row is None or not self.axes[row].cut:
            return [[*groups]]
        stages: list[list[Sequence[Row]]] = [[]]
        folded: set[str] = set()
        scalars = False
        for group in groups:
            # A new stage begins where what was folded is wanted, and after the scalars that are made of it.
            long = bool(self._inner(group[0], row))
            if folded & set().union(*(reads(op) for op in group)) or (scalars and long and len(stages) > 1):
                stages.append([])
                folded.clear()
                scalars = False
            stages[-1].append(group)
            scalars |= not long
            folded |= {op.tile.name for op in group if isinstance(op, Fold)}
        return stages

    def _next(self, op: Load, row: str | None) -> tuple[str, Axis] | None:
        """The rank along which a kernel comes to its next row of a tensor, and its axis there; None if to none.

        Rows lie apart, so no machine foresees the next one; the tiles of one row follow each other, and are foreseen.
        """
        ranks = {r for i in op.source.indices for r in free_ranks(i)}
        around = [row, *(g.rank for g in self.k.grid[-1:] if g.size == 1)]
        rank = next((r for r in around if r is not None and r in ranks), None)
        if rank is None or ranks & {x.rank for x in self.loops}:
            return None
        axis = self.axes[rank]
        if rank == row:
            return rank, replace(axis, index=f"({axis.index} + 1)")
        return rank, replace(axis, base=f"({axis.base} + 1)")

    def _group(
        self,
        group: Sequence[Row],
        inner: str,
        kept: Collection[str],
        ahead: Mapping[str, tuple[str, Axis] | None],
    ) -> None:
        """One loop along a row; what it needs of the row alone is at hand before it.

        ``ahead`` tells of loads whose next row is to be fetched in this loop, and where that is.
        """
        places = dict(self.places)
        self._at_hand(group, inner)
        switch = self._switch(group, inner) if any(isinstance(op, Fold | Store) for op in group) else None
        if switch is None:
            self._loop(group, inner, kept, ahead)
        else:
            # A choice that is the same all along the row is made once: the loop is written out for both.
            self.open(f"if ({self.typed(switch, 'bool', frozenset(self.axes))})")
            self._loop(_decided(group, switch, 1, kept), inner, kept, {})
            self.depth -= 1
            self.open("} else")
            self._loop(_decided(group, switch, 2, kept), inner, kept, ahead)
            self.close()
        self.places = places

    def _inside(self, group: Sequence[Row], inner: str) -> Inside | None:
        """What is told where masks of a fold's loop let all lanes through; None where there is no fold."""
        axes = frozenset(r for op in group for r in (op.axes if isinstance(op, Store) else op.tile.axes)) - {inner}
        if not any(isinstance(op, Fold) for op in group):
            return None
        return Inside(self.names("inside", inner, "whole"), lambda e, t: self.typed(e, t, axes, ATOM))

    def _span(self, inside: Inside, axis: Axis) -> str:
        first, last = _chained("at_least", inside.first, "0"), _chained("at_most", inside.last, axis.count)
        return f"whole_vectors({first}, {last}, {axis.count})"

    def _at_hand(self, group: Sequence[Row], inner: str) -> None:
        """Read elements of tiles that are the same all along a loop before it: its stores might change them."""
        found = {n.tensor for op in group if not isinstance(op, Load) for n in walk(op.expr) if isinstance(n, Access)}
        for name in sorted(found & set(self.places)):
            place = self.places[name]
            if place.elements == 1 or inner in place.tile.axes or place.view is not None:
                continue
            self.looked += 1
            one = self.names("one", f"{name} {self.looked}", f"{place.tile.name}_one")
            self.line(f"const {ctype(place.tile.dtype)} {one} = {self._element(name)};")
            self.places[name] = replace(place, name=one, sizes=(1,) * len(place.sizes))

    def _switch(self, group: Sequence[Row], inner: str) -> Expr | None:
        """The condition of a choice that is the same all along a loop, if there is one."""
        for op in group:
            for n in walk(op.expr) if not isinstance(op, Load) else ():
                if isinstance(n, Call) and n.op == "where" and not self._moves(n.args[0], inner):
                    return n.args[0]
        return None

    def _moves(self, e: Expr, inner: str) -> bool:
        """Whether an expression may differ along an axis."""
        return any(
            n == Rank(inner)
            or (isinstance(n, Access) and n.tensor in self.tiles and inner in self.tiles[n.tensor].axes)
            for n in walk(e)
        )

    def _loop(
        self,
        group: Sequence[Row],
        inner: str,
        kept: Collection[str],
        ahead: Mapping[str, tuple[str, Axis] | None],
    ) -> None:
        """The loop itself: vectors are mapped, kept or stored, and at most one fold takes them up."""
        axis = self.axes[inner]
        lines: list[str] = []
        names = {t: self.names("tile", t) for t in kept}
        inside = self._inside(group, inner)
        fold: Fold | None = None
        result = ""
        for op in group:
            if isinstance(op, Load):
                lines.append(f"const Vector {names[op.tile.name]} = {self._loaded(op, inner)};")
                if (following := ahead.get(op.tile.name)) is not None:
                    lines.append(self._fetched(op, inner, *following))
                continue
            axes = op.axes if isinstance(op, Store) else op.tile.axes
            found = self._vectors(op.expr, inner, frozenset((*axes, inner)), names, inside)
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
            self._vector_loop(inner, lines)
            return
        reducer, target = REDUCERS[fold.op], self._element(fold.tile.name)
        start = target if fold.accumulate else f"{reducer}::identity<float>"
        whole = inside if inside is not None and (inside.first or inside.last) else None
        # Masks of coordinates are for the vectors at the ends.
        span = f", {self._span(whole, axis)}" if whole is not None else ""
        takes = self._elements(inner, lines, result, whole.name if whole is not None else "")
        call = f"{target} = fold_vectors<{reducer}>({axis.count}{span}, {start}, {takes}"
        if not lines:
            self.line(f"{call} {{ return {result}; }});")
            return
        self.open(call)
        for text in lines:
            self.line(text)
        self.line(f"return {result};")
        self.close("});")


def _chained(call: str, texts: Sequence[str], end: str) -> str:
    """One call within another of what several texts say."""
    found = list(dict.fromkeys(texts))
    return reduce(lambda a, b: f"{call}({a}, {b})", found) if found else end


def _decided(group: Sequence[Row], condition: Expr, arm: int, kept: Collection[str]) -> list[Row]:
    """Operations with the choices by a condition made; loads and ``kept`` tiles that none then reads are left out."""

    def chosen(e: Expr) -> Expr:
        return e.args[arm] if isinstance(e, Call) and e.op == "where" and e.args[0] == condition else e

    done: list[Row] = []
    needed: set[str] = set()
    for op in reversed(group):
        if isinstance(op, Load | Map) and op.tile.name in kept and op.tile.name not in needed:
            continue
        done.append(op if isinstance(op, Load) else replace(op, expr=transform(op.expr, chosen)))
        needed |= reads(done[-1])
    return done[::-1]
