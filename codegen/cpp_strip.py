"""Strips of rows, and what of a tile each of them needs."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import replace

from ..ir.cascade import Access, Call, Const, Expr, Rank, free_ranks, walk
from ..ir.interval import slope
from ..ir.tile import Dot, Fold, For, Load, Map, Op, Store
from .cpp_rows import Rows
from .cpp_scope import Axis, ctype, stored
from .interface import checked_indices
from .strips import MOST_ROWS, ROWS, ROWS_ACROSS, Strip, reads, writes
from .vectors import steps


class Strips(Rows):
    """Prints operations that run a few rows at a time."""

    def _sequence(self, ops: Sequence[Op], row: str | None) -> None:
        raise NotImplementedError

    def _strip(self, strip: Strip, body: tuple[Op, ...]) -> None:
        """Operations on a few rows at a time; tiles that nothing else touches are no longer than that."""
        rank = strip.axis
        assert rank is not None
        whole = self.axes[rank]
        made = [op.tile for op in strip.ops if isinstance(op, Load | Map | Fold | Dot)]
        elsewhere = {t for op in body if op not in strip.ops for t in (*reads(op), *writes(op))}
        for op in strip.ops:
            if isinstance(op, Load | Map | Fold | Dot) and op.tile.name in elsewhere:
                if not (isinstance(op, Load) and op.source.tensor not in self.k.outputs and self._view(op)):
                    self._declare(op.tile)
        near = {tile.name for tile in made} - elsewhere
        for op in strip.ops:
            plan = self._dot_plan(op) if isinstance(op, Dot) else None
            if isinstance(op, Dot) and plan is not None and rank not in plan.right.tile.axes:
                self._prepare(op, plan)
        at, base, count = (self.names("strip" + x, rank, "{}" + x) for x in ("_at", "1", "_rows"))
        # As many as registers hold, which of bf16 the machine tells.
        narrow = any(isinstance(op, Dot) and self._is_of_bf16(op) for op in strip.ops)
        across = any(self._lies_across(op, rank, strip.ops) for op in strip.ops if isinstance(op, Load))
        most, name = (ROWS_ACROSS, "ROWS_ACROSS") if across else (ROWS, "STRIP_ROWS")
        size, rows = (MOST_ROWS, f"{name}<bf16>") if narrow else (most, str(most))
        self.open(f"for (int64_t {at} = 0; {at} < {whole.count}; {at} += {rows})")
        start, begins = base if whole.base != "0" else at, len(self.lines)
        self.line(f"const int64_t {count} = at_most({rows}, {whole.count} - {at});")
        places, stack, finite, panels = dict(self.places), self.stack, dict(self.finite), dict(self.panels)
        used = {t for op in strip.ops for t in (*reads(op), *writes(op))}
        for name in sorted(used & set(self.places)):
            place = self.places[name]
            if rank in place.tile.axes and place.elements != 1:
                rows, step = self.names("rows", name, f"{place.name}_rows"), place.step(rank)
                offset = at if step == "1" else f"{at} * {step}"
                kind = f"const {stored(place.tile.dtype)}" if place.view is not None else ctype(place.tile.dtype)
                self.line(f"{kind}* const {rows} = {place.name} + {offset};")
                self.places[name] = replace(place, name=rows)
        self.axes[rank] = Axis(min(size, whole.size), start, count, whole.index, cut=True)
        aligned = self.aligned.pop(rank, 1)  # a strip begins anywhere
        parts: list[str] = []
        cut = self._needed(strip.ops, rank, near)
        if cut is not None:
            axis = self.axes[cut.rank]
            parts = self._cut(strip.ops, cut, rank)
        self._ask(strip.ops, rank)
        self._sequence(strip.ops, rank)
        self._drop_unused(parts)
        if start == base and any(re.search(rf"\b{base}\b", line) for line in self.lines[begins:]):
            self.lines.insert(begins, "  " * self.depth + f"const int64_t {base} = {whole.base} + {at};")
        if cut is not None:
            self.axes[cut.rank] = axis
        self.axes[rank], self.aligned[rank] = whole, aligned
        self.places, self.stack, self.finite, self.panels = places, stack, finite, panels
        self.close()

    def _lies_across(self, op: Load, row: str, ops: Sequence[Op]) -> bool:
        """Whether a strip multiplies rows that lie across memory, where those of a few strips share its lines."""
        plans = (self._dot_plan(x) for x in ops if isinstance(x, Dot) and op.tile.name in (x.left, x.right))
        rows = any(p is not None and p.m == row and p.left.tile.name == op.tile.name for p in plans)
        return rows and self._along(op.source, op.tile.axes) == row

    def _ask(self, ops: Sequence[Op], row: str) -> None:
        """Fetch what is wanted once a product is done, while it runs: rows of tensors that are loaded and stored then,
        and where the next strip's rows begin."""
        products = [i for i, op in enumerate(ops) if isinstance(op, Dot)]
        for i, op in enumerate(ops if products else ()):
            if isinstance(op, Load) and op.guard is None:
                if i > products[0]:
                    self._ask_rows("prefetch_rows", op, op.source, op.tile.axes, row)
                elif any(isinstance(x, Dot) and x.left == op.tile.name for x in ops):
                    self._ask_rows("prefetch_next_rows", op, op.source, op.tile.axes, row)
            elif isinstance(op, Store) and not op.through and i > products[0]:
                self._ask_rows("prefetch_rows_to_write", op, op.target, op.axes, row)

    def _ask_rows(self, function: str, op: Load | Store, access: Access, axes: Sequence[str], row: str) -> None:
        """Fetch those rows of a tensor that a strip touches, if they are its rows, one element after another."""
        param, long = self.params[access.tensor], tuple(r for r in axes if self.axes[r].size != 1)
        moves = steps(access.indices, long) if len(long) == 2 and row in long else None
        if moves is None or {c for _, c in moves.values()} != {1} or checked_indices(op, param.indices):
            return
        first = f"&{self.names('tensor', param.name)}[{self._offset(access, frozenset(), frozenset())}]"
        along = next(r for r in long if r != row)
        strides = ", ".join(self._stride(param.name, moves[r][0]) for r in (row, along))
        self.line(f"{function}({first}, {strides}, {self.axes[row].count}, {self.axes[along].count});")

    def _needed(self, ops: Sequence[Op], row: str, near: Collection[str]) -> For | None:
        """The loop around a strip of whose tile its rows need but a part, known before; None if there is none.

        What has coordinates of that loop must be the strip's own or be read only, so that the others need no value.
        """
        loop = self.loops[-1] if self.loops else None
        if loop is None or loop.size == 1:
            return None
        used = set().union(*(reads(op) for op in ops))
        if loop.meets is not None and not (used >= {*loop.meets} and self._lie_apart(loop.meets, row, loop.rank, near)):
            loop = replace(loop, meets=None)
        if loop.own == (None, None) and loop.meets is None:
            return None
        for e in loop.own:
            tiled = {r for r in (free_ranks(e) if e is not None else ()) if self.axes[r].size != 1}
            data = {n.tensor for n in walk(e) if isinstance(n, Access)} if e is not None else set()
            if tiled - {row} or data & set(self.tiles) or (e is not None and slope(e, row) is None):
                return None
        for op in ops:
            if isinstance(op, Store | For) or (loop.rank in op.tile.axes and op.tile.name not in near):
                return None
            if not isinstance(op, Dot):
                continue
            plan = self._dot_plan(op)
            if plan is None:
                return None
            if loop.rank in (plan.n, plan.k, *plan.over):
                key = (plan.right.name, plan.n, plan.k, self._operands(op, plan))
                if loop.rank in plan.over or plan.right.tile.name in self.makers or key not in self.panels:
                    return None
        return loop

    def _lie_apart(self, meets: tuple[str, str], row: str, rank: str, near: Collection[str]) -> bool:
        """Whether numbers of rows and of a loop lie in memory, one after another."""
        places = [self.places.get(t) for t in meets]
        kinds = {p.tile.dtype for p in places if p is not None}
        axes = [p.long for p in places if p is not None and p.view is None and p.tile.name not in near]
        return axes == [(row,), (rank,)] and kinds in ({"i32"}, {"i64"})

    def _cut(self, ops: Sequence[Op], loop: For, row: str) -> list[str]:
        """Go over the part of a loop's tile that the rows of a strip need: from a whole panel on, in whole vectors.

        Gives the names of what lies in memory already, from where it is needed on.
        """
        rank, whole = loop.rank, self.axes[loop.rank]
        skip, base, count = (self.names("strip" + x, rank, "{}" + x) for x in ("_skip", "1", "_some"))
        low, high = (
            self._at_end(e, row, last) if e is not None else None
            for e, last in zip(loop.own, (False, True), strict=True)
        )
        low = f"{low} - {whole.base}" if low is not None else None
        high = f"{high} - {whole.base}" if high is not None else None
        if loop.meets is not None:
            met, (mine, theirs) = self.names("met", rank, "{}_met"), (self.places[t].name for t in loop.meets)
            self.line(f"const Span {met} = between({mine}, {self.axes[row].count}, {theirs}, {whole.count});")
            low = f"at_least({met}.first, {low})" if low is not None else f"{met}.first"
            high = f"at_most({met}.last, {high})" if high is not None else f"{met}.last"
        if low is not None:
            self.line(f"const int64_t {skip} = panels_before({low}, {whole.count});")
            self.line(f"const int64_t {base} = {whole.base} + {skip};")
        else:
            skip, base = "0", whole.base
        left = whole.count if low is None else f"{whole.count} - {skip}"
        ahead = "" if low is None else f" - {skip}"
        text = left if high is None else f"vectors_to({high}{ahead}, {left})"
        self.line(f"const int64_t {count} = {text};")
        parts = self._from(ops, loop, skip) if low is not None else []
        self.axes[rank] = Axis(whole.size, base, count, whole.index)
        return parts

    def _from(self, ops: Sequence[Op], loop: For, skip: str) -> list[str]:
        """Have what lies in memory already begin at the first coordinate that is needed."""
        rank, used = loop.rank, set().union(*(reads(op) for op in ops))
        panels, parts = dict(self.panels), []
        for name in sorted(used & set(self.places)):
            place = self.places[name]
            if rank not in place.tile.axes or place.elements == 1:
                continue
            step, part = place.step(rank), self.names("part", name, f"{place.name}_some")
            kind = stored(place.tile.dtype) if place.view is not None else ctype(place.tile.dtype)
            const = "const " if place.view is not None else ""
            self.line(f"{const}{kind}* const {part} = {place.name} + {skip}{'' if step == '1' else f' * {step}'};")
            parts.append(part)
            self.places[name] = replace(place, name=part)
            if place.name in self.finite:
                self.finite[part] = self.finite[place.name]
            for (packed, n, k, operand), text in panels.items():
                if packed == place.name and rank in (n, k):
                    start = f"from_column({skip})" if rank == n else f"from_row({skip})"
                    self.panels[part, n, k, operand] = f"{text}.{start}"
        return parts

    def _drop_unused(self, names: Sequence[str]) -> None:
        """Take back pointers that nothing used."""
        for name in names:
            places = [i for i, line in enumerate(self.lines) if re.search(rf"\b{name}\b", line)]
            if len(places) == 1:
                del self.lines[places[0]]

    def _at_end(self, e: Expr, row: str, last: bool) -> str:
        """A bound that moves one way with the row: the least that it is in a strip or, ``last``, the greatest."""
        axis, rising = self.axes[row], slope(e, row)
        if last and e == Call("add", (Rank(row), Const(1))):
            return f"{axis.base} + {axis.count}"
        if rising and (rising > 0) == last:
            self.axes[row] = replace(axis, base=f"({axis.base} + {axis.count} - 1)")
        text = self.typed(e, "i64")
        self.axes[row] = axis
        return text
