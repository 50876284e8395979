"""Partial results: the state that a piece of a rank gives, and how states combine.

A reduction that streams is a monoid, so a rank can be cut anywhere: keys split over programs (flash-decoding), a prefix
that many requests share, a sequence that lies on several machines. Of attention over ``k``,

    p = partial(c, "k")
    p.cascade    # Q, K, V of a piece  ->  M[b, h, q], L[b, h, q], O_sum[b, h, q, f]
    p.combine    # M_pieces[piece, b, h, q], ...  ->  M, L, O_sum: a state again, in any association
    merge(p)     # M_pieces[piece, b, h, q], ...  ->  O[b, h, q, f]

each a cascade like any other, which prints, parses, evaluates and compiles. A piece sees its own keys only, so where
the coordinate of ``k`` is a value (causal masks), the first cascade takes ``k_start``, the piece's place in the whole
rank, and where the size of ``k`` is one, ``k_extent``, the size of the whole. What follows the reductions may need the
size too; that is carried in the state.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import lcm
from typing import Any

import numpy as np

from ..ir.cascade import (
    Access,
    Call,
    Cascade,
    Const,
    Einsum,
    Expr,
    Extent,
    Output,
    Param,
    Rank,
    Reduce,
    children,
    is_minus_infinity,
    ranks_named,
    rebuild,
    tensors_read,
    walk,
)
from ..ir.errors import InputError, UsageError, VerifyError, did_you_mean
from ..ir.extents import bindings
from ..ir.print import print_expr
from ..ir.types import tensor_types
from ..ir.verify import verify
from .derive import derive
from .fresh import fresh
from .pieces import Sorter, State


@dataclass(frozen=True, slots=True)
class Partial:
    """What a piece of a rank leaves behind, as three cascades.

    ``cascade`` has the parameters of the original for any piece of ``rank`` and gives the state, a tensor for each name
    in ``states``. ``combine`` and ``merged`` take a state's tensors stacked along a new leading rank ``piece``, under
    the names of `stacked`, and give one state, or the original results.

    ``start`` and ``extent`` name the parameters that tell a piece where it begins and how large the whole rank is; ""
    where it need not know. Pieces begin at multiples of ``align``, since packed axes (``k // 8``) are cut there.
    """

    cascade: Cascade
    combine: Cascade
    merged: Cascade
    rank: str
    piece: str
    states: tuple[str, ...]
    start: str
    extent: str
    align: int

    @property
    def stacked(self) -> dict[str, str]:
        """For each tensor of the state, the parameter of ``combine`` and ``merged`` that takes it, a piece a row."""
        return dict(zip(self.states, (p.name for p in self.combine.params), strict=True))

    def stack(self, states: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray[Any, Any]]:
        """The states of several pieces as inputs of ``combine`` and ``merged``; each tensor gets a leading axis."""
        if not states:
            message = "no states came, so the shapes of their tensors are not known"
            raise InputError(message, hint="an empty piece has a state: give that one")
        return {name: np.stack([np.asarray(s[state]) for s in states]) for state, name in self.stacked.items()}


def partial(c: Cascade, rank: str, *, gauge: str = "maximum") -> Partial:
    """What a piece of a rank gives, and how pieces combine, for a cascade that one derived pass over the rank computes.

    ``gauge`` is the gauge of derived streams, as in `derive`. Raises `UsageError` for a rank that the cascade does not
    have, `VerifyError` where nothing is reduced over it, or where results need a piece again after all were seen.
    """
    if rank not in c.ranks:
        hint = did_you_mean(rank, c.ranks) or "its ranks are " + ", ".join(c.ranks)
        raise UsageError(f"`{c.name}` has no rank `{rank}`", rank=rank, hint=hint)
    return _Writer(derive(c, gauge=gauge), rank).split()


def merge(p: Partial) -> Cascade:
    """The cascade from the states of all pieces, stacked along a leading rank, to the original results.

    Its parameters are ``p.stacked`` and whatever else the end of the computation reads.
    """
    return p.merged


class _Writer(Sorter):
    """Writes the three cascades of what was sorted."""

    def split(self) -> Partial:
        self.sort()
        merged = self._merged()
        cascade = self._piece()
        types = tensor_types(cascade)
        states = [o for s in self.states.values() for o in s.outputs]
        stacked = tuple(
            Param(self.stack_name(o.name), types[o.name], (Rank(self.piece), *map(Rank, o.ranks))) for o in states
        )
        combining = tuple(self._combining(s) for s in self.states.values())
        names = tuple(o.name for o in states)
        combine = self._cascade("combine", stacked, combining, names)
        used = [p for p in stacked if any(p.name in tensors_read(e.expr) for e in merged.einsums)]
        whole = self._closed("merge", (*used, *merged.params), merged.einsums, self.c.outputs, whole=True)
        asked = {n for e in cascade.einsums for n in tensors_read(e.expr)}
        return Partial(
            cascade,
            combine,
            whole,
            self.rank,
            self.piece,
            names,
            self.start if self.start in asked else "",
            self.extent if self.extent in asked else "",
            self.align,
        )

    # Writing

    def _merged(self) -> Cascade:
        """What follows the reductions, over the merged states; not yet closed under extents."""
        einsums = _pruned([*(self._combining(s) for s in self.states.values()), *self.late], self.c.outputs)
        read = {t for e in einsums for t in tensors_read(e.expr)}
        params = tuple(p for p in self.c.params if p.name in read)
        for p in params:
            if self.split_axes[p.name]:
                hint = f"it has the axis `{self.rank}`, of which each piece holds a part"
                raise self.refusal(f"the results read `{p.name}` when the pieces are merged", hint)
        bare = {i.name for p in params for i in p.indices if isinstance(i, Rank)}
        bare |= {r for s in self.states.values() for o in s.outputs for r in o.ranks}
        extents: list[Einsum] = []
        for r in dict.fromkeys(n.rank for e in einsums for n in walk(e.expr) if isinstance(n, Extent)):
            if r != self.rank and r in bare:
                continue
            name = self.extents[r] = fresh(f"{r}_size", self.taken)
            op = "sum" if r == self.rank else "max"
            self.states[name] = State((Output(name),), Extent(r), op)
            self.early.append(Einsum((Output(name),), Extent(r)))
            extents.append(self._combining(self.states[name]))
        einsums = [replace(e, expr=_with_extents(e.expr, self.extents)) for e in einsums]
        return replace(self.c, params=params, einsums=(*extents, *einsums))

    def _combining(self, s: State) -> Einsum:
        """The same reduction over the rank of pieces: a state is an element of its own monoid."""
        monoid = next((m for m in self.monoids if m.name == s.op), None)
        args: list[Expr] = []
        for i, o in enumerate(s.outputs):
            e: Expr = Access(self.stack_name(o.name), (Rank(self.piece), *map(Rank, o.ranks)))
            if monoid is not None and s.op in self.user and is_minus_infinity(monoid.identity[i]):
                # What a mask left out is still left out: a state of nothing is no -inf that came as data.
                e = Call("where", (Call("eq", (e, monoid.identity[i])), monoid.identity[i], e))
            args.append(e)
        return Einsum(s.outputs, Reduce(s.op, (self.piece,), tuple(args)))

    def _piece(self) -> Cascade:
        """What a piece computes: its coordinates moved to where it lies, its sizes those of the whole."""
        outputs = tuple(o.name for s in self.states.values() for o in s.outputs)
        einsums = []
        sizes = set(self.extents.values())
        for e in _pruned(self.early, outputs):
            einsums.append(e if e.name in sizes else replace(e, expr=self._moved(e.expr, e)))
        return self._closed("partial", self._read_params(einsums), tuple(einsums), outputs, whole=False)

    def _read_params(self, einsums: Iterable[Einsum]) -> tuple[Param, ...]:
        read = {t for e in einsums for t in tensors_read(e.expr)}
        own = [Param(n, "i64") for n in (self.start, self.extent) if n in read]
        return (*(p for p in self.c.params if p.name in read), *own)

    def _moved(self, x: Expr, e: Einsum) -> Expr:
        match x:
            case Rank(name=self.rank):
                return Call("add", (x, Access(self.start)))
            case Extent(rank=self.rank):
                return Access(self.extent)
            case Access():
                return replace(x, indices=tuple(self._index(x, axis, e) for axis in range(len(x.indices))))
            case _:
                return rebuild(x, tuple(self._moved(k, e) for k in children(x)))

    def _index(self, x: Access, axis: int, e: Einsum) -> Expr:
        """An index of a tensor that is cut along the axis stays as it is, any other is a value."""
        index, declared = x.indices[axis], self.c.indices_of(x.tensor)[axis]
        if self.rank not in ranks_named(declared):
            return self._moved(index, e)
        if index == declared:
            match declared:
                case Rank():
                    return index
                case Call(op="floordiv", args=(Rank(), Const(value=int() as by))):
                    self.align = lcm(self.align, by)
                    return index
                case _:
                    pass
        message = f"`{print_expr(x)}` reads `{x.tensor}` beyond the piece of rank `{self.rank}` that it belongs to"
        raise self.refusal(message, f"a piece holds `{print_expr(declared)}` for its own `{self.rank}` only", e.name)

    def _cascade(
        self, what: str, params: Iterable[Param], einsums: tuple[Einsum, ...], outputs: tuple[str, ...]
    ) -> Cascade:
        used = {n.op for e in einsums for n in e.reductions}
        name = f"{self.c.name}_{what}"
        monoids = tuple(m for m in self.monoids if m.name in used)
        made = Cascade(name, tuple(params), einsums, outputs, monoids, self.c.numerics)
        verify(made)
        return made

    def _closed(
        self,
        what: str,
        params: tuple[Param, ...],
        einsums: tuple[Einsum, ...],
        outputs: tuple[str, ...],
        *,
        whole: bool,
    ) -> Cascade:
        """A cascade whose ranks have the extents that they have in the original; parameters that say so join it."""
        bare = {i.name for p in params for i in p.indices if isinstance(i, Rank)}
        known = {p.name for p in params}
        named = {r for e in einsums for r in (*e.ranks, *ranks_named(e.expr))}
        named |= {r for p in params for i in p.indices for r in ranks_named(i)}
        for r in [r for r in self.c.ranks if r in named - bare]:
            binding = self.bindings[r]
            if binding.param is None:
                continue
            p = self.c.param_of[binding.param[0]]
            if p.name not in known and not (whole and self.split_axes[p.name]):
                params, known = (*params, p), known | {p.name}
                bare |= {i.name for i in p.indices if isinstance(i, Rank)}
        order = {p.name: n for n, p in enumerate(self.c.params)}
        mine = [p for p in params if p.name not in order and whole]
        rest = [p for p in params if p.name not in order and not whole]
        made = (*mine, *sorted((p for p in params if p.name in order), key=lambda p: order[p.name]), *rest)
        draft = Cascade("draft", made, einsums, outputs, tuple(self.monoids), self.c.numerics)
        try:
            found = {b.rank: b for b in bindings(draft)}
        except VerifyError as error:
            raise self._unbounded(error.rank, whole) from error
        for r, b in found.items():
            before = self.bindings.get(r)
            if b.param is None and (before is None or before.param is not None or set(b.within) != set(before.within)):
                raise self._unbounded(r, whole)
        return self._cascade(what, made, einsums, outputs)

    def _unbounded(self, r: str, whole: bool) -> VerifyError:
        who = "what follows the merge" if whole else f"a piece of rank `{self.rank}`"
        hint = f"let a parameter without `{self.rank}` have the axis `{r}`"
        return self.refusal(f"{who} does not tell the extent of rank `{r}`", hint)


def _pruned(einsums: Sequence[Einsum], outputs: Iterable[str]) -> list[Einsum]:
    """The Einsums that the outputs depend on, in order."""
    live = set(outputs)
    kept: list[Einsum] = []
    for e in reversed(einsums):
        if any(o.name in live for o in e.outputs):
            live.update(tensors_read(e.expr))
            kept.append(e)
    return kept[::-1]


def _with_extents(x: Expr, names: Mapping[str, str]) -> Expr:
    if isinstance(x, Extent) and x.rank in names:
        return Access(names[x.rank])
    return rebuild(x, tuple(_with_extents(k, names) for k in children(x)))
