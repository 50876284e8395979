"""The content key: a hash of the cascade with its names taken out."""

from __future__ import annotations

import hashlib
from dataclasses import replace

from .cascade import Access, Cascade, Einsum, Expr, Extent, Monoid, Output, Param, Rank, Reduce, transform
from .print import print_cascade
from .types import tensor_types


def rename(
    c: Cascade, tensors: dict[str, str], ranks: dict[str, str], monoids: dict[str, str] | None = None
) -> Cascade:
    """The cascade under other names; a name that a map does not hold stays."""
    ops = monoids or {}

    def one(e: Expr) -> Expr:
        match e:
            case Rank(name=name):
                return replace(e, name=ranks.get(name, name))
            case Extent(rank=rank):
                return replace(e, rank=ranks.get(rank, rank))
            case Access(tensor=tensor):
                return replace(e, tensor=tensors.get(tensor, tensor))
            case Reduce(op=op):
                return replace(e, op=ops.get(op, op), ranks=tuple(ranks.get(r, r) for r in e.ranks))
            case _:
                return e

    def output(o: Output) -> Output:
        return replace(o, name=tensors.get(o.name, o.name), ranks=tuple(ranks.get(r, r) for r in o.ranks))

    def param(p: Param) -> Param:
        return replace(p, name=tensors.get(p.name, p.name), indices=tuple(transform(i, one) for i in p.indices))

    def einsum(e: Einsum) -> Einsum:
        return replace(e, outputs=tuple(output(o) for o in e.outputs), expr=transform(e.expr, one))

    return replace(
        c,
        params=tuple(param(p) for p in c.params),
        einsums=tuple(einsum(e) for e in c.einsums),
        outputs=tuple(tensors.get(o, o) for o in c.outputs),
        monoids=tuple(replace(m, name=ops.get(m.name, m.name)) for m in c.monoids),
    )


def _anonymous(m: Monoid) -> Monoid:
    names = {n: f"s{i}" for i, n in enumerate(dict.fromkeys(m.params + tuple(n for n, _ in m.body)))}

    def one(e: Expr) -> Expr:
        return replace(e, tensor=names.get(e.tensor, e.tensor)) if isinstance(e, Access) else e

    return replace(
        m,
        params=tuple(names[p] for p in m.params),
        results=tuple(names[r] for r in m.results),
        body=tuple((names[n], transform(e, one)) for n, e in m.body),
    )


def canonical(c: Cascade) -> Cascade:
    """The cascade with names replaced by places (t0… tensors, r0… ranks, m0… monoids) and inferred dtypes written."""
    types = tensor_types(c)
    names = [p.name for p in c.params] + [o.name for e in c.einsums for o in e.outputs]
    renamed = rename(
        c,
        {n: f"t{i}" for i, n in enumerate(names)},
        {r: f"r{i}" for i, r in enumerate(c.ranks)},
        {m.name: f"m{i}" for i, m in enumerate(c.monoids)},
    )
    einsums = tuple(
        replace(
            e, outputs=tuple(replace(o, dtype=types[old.name]) for o, old in zip(e.outputs, was.outputs, strict=True))
        )
        for e, was in zip(renamed.einsums, c.einsums, strict=True)
    )
    return replace(renamed, name="c", einsums=einsums, monoids=tuple(map(_anonymous, renamed.monoids)), doc="")


def content_key(c: Cascade) -> str:
    """SHA-256 of the canonical text, in hex."""
    return hashlib.sha256(print_cascade(canonical(c)).encode()).hexdigest()
