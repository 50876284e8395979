"""Maps written where they are read: a read becomes what it computes, and no reduction captures an index."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from ..ir.cascade import Access, Cascade, Expr, Rank, Reduce, children, free_ranks, rebuild, substitute, transform

Maps = Mapping[str, tuple[tuple[str, ...], Expr]]


class Inliner:
    """Replaces reads of maps and fused reductions, given as ranks and value by tensor, by what they compute.

    A reduction in such a value has ranks of its own. Where an index that is put in has a rank of the same name, the
    reduction's gets another one; ``origin`` says whose extent that has.
    """

    def __init__(self, c: Cascade, maps: Maps) -> None:
        self.maps = maps
        self.taken = {*c.ranks, *c.param_of, *c.einsum_of}
        self.origin: dict[str, str] = {}

    def __call__(self, e: Expr) -> Expr:
        kids = children(e)
        if kids:
            e = rebuild(e, tuple(self(k) for k in kids))
        if isinstance(e, Access) and e.tensor in self.maps:
            ranks, value = self.maps[e.tensor]
            free: set[str] = set().union(*map(free_ranks, e.indices))
            return substitute(self._apart(value, free), dict(zip(ranks, e.indices, strict=True)))
        return e

    def _apart(self, e: Expr, free: Collection[str]) -> Expr:
        """The value with no reduction over a rank in ``free``."""
        if isinstance(e, Reduce) and (names := {r: self._name(r, free) for r in e.ranks if r in free}):
            renamed_ranks = tuple(names.get(r, r) for r in e.ranks)
            e = replace(e, ranks=renamed_ranks, args=tuple(renamed(a, names) for a in e.args))
        kids = children(e)
        return rebuild(e, tuple(self._apart(k, free) for k in kids)) if kids else e

    def _name(self, rank: str, free: Collection[str]) -> str:
        """Another name for a rank, the same each time, so that equal reductions stay equal."""
        name = rank + "_in"
        while name in self.taken or name in free:
            name += "_in"
        self.origin[name] = self.origin.get(rank, rank)
        return name


def renamed(e: Expr, names: Mapping[str, str]) -> Expr:
    """The expression with ranks under other names, bound ones too; an extent keeps the old one, whose size it is."""

    def one(n: Expr) -> Expr:
        if isinstance(n, Rank):
            return replace(n, name=names.get(n.name, n.name))
        return replace(n, ranks=tuple(names.get(r, r) for r in n.ranks)) if isinstance(n, Reduce) else n

    return transform(e, one) if names else e
