"""Streams: monoids taken in element by element, or tile by tile by their step, and the sums that these scatter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..ir.cascade import (
    Access,
    Const,
    Einsum,
    Expr,
    Monoid,
    Rank,
    Reduce,
    children,
    free_ranks,
    rebuild,
    tensors_read,
    walk,
)
from ..ir.tile import Dot, Fold, HeldRank, Load, Map, Store, Tile
from ..ir.types import settle
from .neutral import neutral_body
from .phases import Phase, bracket, without
from .step import Let, Take
from .tile_products import mask_of
from .tile_reduce import Reductions


class Streams(Reductions):
    """Writes the state of a monoid."""

    def _state(self) -> list[Expr]:
        """The components of a monoid's Einsum."""
        assert isinstance(self.e.expr, Reduce)
        return (
            self._stream(self.e.expr)
            if self.step is not None
            else self._fold_monoid(self._unshadowed(self.e.expr), None)
        )

    def _stream(self, e: Reduce) -> list[Expr]:
        """A stream by its step: tile by tile, extremes first, then sums under the new gauges and references."""
        assert self.step is not None
        m = self.c.monoid_of[e.op]
        types = self.checker.state_types(e)
        components = self.piece.components if self.piece is not None else {}
        ranks_of = {components.get(o.name, o.name): set(o.ranks) for o in self.e.outputs}
        state: dict[str, Tile] = {}
        for (name, ranks), dtype, start in zip(ranks_of.items(), types, m.identity, strict=True):
            state[name] = self._tile(name, ranks, dtype)
            self.frames[-1].ops.append(Map(state[name], start))
        takes = [s for s in self.step if isinstance(s, Take)]
        shared = frozenset.intersection(*(bracket(s.op, s.element) for s in takes))
        for phase in self._phases(e.ranks, shared):
            self._open(e.ranks, self.tiling.stream, bool(phase.known))
            self._advance(e, phase, state, ranks_of)
            for x in self.added:
                self._add(x, phase)
            self._close(e.ranks, phase)
        return [Access(tile.name) for tile in state.values()]

    def _advance(self, e: Reduce, phase: Phase, state: Mapping[str, Tile], ranks_of: Mapping[str, set[str]]) -> None:
        """One step of a stream: the state takes in a tile of elements."""
        assert self.step is not None
        names: dict[str, Expr] = {"a_" + n: Access(t.name) for n, t in state.items()}
        for s in self.step:
            if isinstance(s, Let):
                value = substituted(s.value, names)
                tile = self._tile(s.name, self._depends(value), settle(self.checker.infer(value)))
                self.frames[-1].ops.append(Map(tile, value))
                names[s.name] = Access(tile.name)
                continue
            alone = not any("a_" + s.component in reads_of(x) for x in self.step if x is not s)
            into = state[s.component] if alone else None
            s = replace(s, element=without(s.element, phase.known, e.ranks))
            names[s.component] = self._take(e, s, ranks_of[s.component], state[s.component].dtype, names, into)
        for n, tile in state.items():
            if names[n] != Access(tile.name):
                self.frames[-1].ops.append(Map(tile, names[n]))

    def _take(
        self, e: Reduce, s: Take, ranks: set[str], dtype: str, names: Mapping[str, Expr], into: Tile | None
    ) -> Expr:
        """A component's new value from its old one and a tile of elements; in place where nobody needs the old one."""
        new = into or self._tile(s.component, ranks, dtype)
        ops = self.frames[-1].ops
        old = substituted(s.old, names)
        self.local = names
        mask, inside = mask_of(s.element)
        over = tuple(r for r in e.ranks if self.sizes[r] > 1)
        pair = self._factors(Reduce(s.op, e.ranks, (inside,)), None, ranks, mask) if s.op == "sum" else None
        value = self.value(s.element, None) if pair is None else None
        if old != Access(new.name):
            ops.append(Map(new, old))
        if pair is not None:
            ops.append(Dot(new, pair.left, pair.right, over, True, pair.operand, pair.annihilates))
        else:
            assert value is not None
            ops.append(Fold(new, s.op, over, value, accumulate=True))
        self.local = {}
        return Access(new.name)

    def _fold_monoid(self, e: Reduce, guard: Expr | None) -> list[Expr]:
        m: Monoid = self.c.monoid_of[e.op]
        types = self.checker.state_types(e)
        ranks = self._monoid_ranks(m, e, guard)
        state = [self._tile(r, ranks[r], t) for r, t in zip(m.results, types, strict=True)]
        for tile, start in zip(state, m.identity, strict=True):
            self.frames[-1].ops.append(Map(tile, start))
        for r in e.ranks:
            self._open((r,), 1)
        element = [self.value(a, guard) for a in e.args]
        names: dict[str, Expr] = {}
        for p, x in zip(m.params, [*(Access(t.name) for t in state), *element], strict=True):
            names[p] = x
        ops = self.frames[-1].ops
        results: dict[str, Expr] = dict(names)
        for name, expr in neutral_body(m, e.ranks):
            value = substituted(expr, results)
            tile = self._tile(name, ranks[name] | set(e.ranks), settle(self.checker.infer(value)))
            ops.append(Map(tile, value))
            results[name] = Access(tile.name)
        for tile, r in zip(state, m.results, strict=True):
            ops.append(Map(tile, results[r]))
        for r in reversed(e.ranks):
            self._close((r,))
        return [Access(t.name) for t in state]

    def _monoid_ranks(self, m: Monoid, e: Reduce, guard: Expr | None) -> dict[str, frozenset[str]]:
        """The ranks with which each name of a monoid varies; a component need not vary with all that others do."""
        width = len(m.results)
        held = self._depends(guard) if guard is not None else frozenset()
        scope = frozenset().union(*(f.ranks for f in self.frames))
        found = {p: frozenset((free_ranks(a) & scope) | held) for p, a in zip(m.params[width:], e.args, strict=True)}
        found |= dict.fromkeys(m.params[:width], frozenset())
        while True:
            for name, expr in m.body:
                found[name] = frozenset().union(*(found[n.tensor] for n in walk(expr) if isinstance(n, Access)))
            after = {p: found[p] | found.get(r, frozenset()) for p, r in zip(m.params, m.results, strict=False)}
            if all(found[p] == ranks for p, ranks in after.items()):
                return found
            found |= after

    def _prepare(self, added: Sequence[Einsum]) -> tuple[str, ...]:
        """The rank over which these sum, which becomes a loop; what they have not in common is held entire."""
        over = self._over(added[0])
        # A tile of one element would leave nothing to sum.
        self.sizes[over] = max(2, self.sizes[over])
        for r in self.e.ranks:
            if any(r not in o.ranks for o in self.e.outputs):
                self.held[r] = HeldRank(r, self.sizes[r], r)
        return (over,)

    def _over(self, x: Einsum) -> str:
        assert isinstance(x.expr, Reduce)
        return x.expr.ranks[0]

    def _clear(self, x: Einsum) -> None:
        """Put 0 wherever something is to be added."""
        assert isinstance(self.e.expr, Reduce)
        self._open(self.e.expr.ranks, self.tiling.stream)
        self._put(x, Const(0.0))
        self._close(self.e.expr.ranks)

    def _put(self, x: Einsum, value: Expr) -> None:
        axes = tuple(r for r in x.output.ranks if self.sizes[r] > 1)
        self.frames[-1].ops.append(Store(Access(x.name, tuple(map(Rank, x.output.ranks))), axes, value))

    def _add(self, x: Einsum, phase: Phase) -> None:
        """Add the share of the tiles at hand to a sum in memory."""
        assert isinstance(self.e.expr, Reduce)
        assert isinstance(x.expr, Reduce)
        ops = self.frames[-1].ops
        element = without(x.expr.arg, phase.known, self.e.expr.ranks)
        axes = tuple(r for r in x.output.ranks if self.sizes[r] > 1)
        total = replace(self._tile(x.name, x.ranks, self.types[x.name]), axes=axes)
        mask, inside = mask_of(element)
        over = x.expr.ranks
        pair = self._factors(replace(x.expr, args=(inside,)), None, x.ranks, mask)
        value = self.value(element, None) if pair is None else None
        ops.append(Load(total, Access(x.name, tuple(map(Rank, x.output.ranks)))))
        if pair is not None:
            ops.append(Dot(total, pair.left, pair.right, over, True, pair.operand, pair.annihilates))
        else:
            assert value is not None
            ops.append(Fold(total, "sum", over, value, accumulate=True))
        self._put(x, Access(total.name))


def reads_of(s: Let | Take) -> set[str]:
    """What a part of a step reads; a component's own old value, to which it adds, among it."""
    exprs = (s.value,) if isinstance(s, Let) else (s.old, s.element)
    return {t for e in exprs for t in tensors_read(e)}


def substituted(e: Expr, values: Mapping[str, Expr]) -> Expr:
    """A monoid's expression with its names replaced."""
    if isinstance(e, Access) and e.tensor in values:
        return values[e.tensor]
    kids = children(e)
    return rebuild(e, tuple(substituted(k, values) for k in kids)) if kids else e
