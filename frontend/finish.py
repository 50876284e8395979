"""The end of a lowering: axes cut as they are read, what nobody needs left out, extents shown, short names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from ..ir.cascade import (
    Access,
    Call,
    Cascade,
    Const,
    Expr,
    Extent,
    Param,
    Rank,
    Reduce,
    ranks_named,
    transform,
    walk,
)
from ..ir.errors import InputError, VerifyError
from ..ir.extents import resolve
from .values import Size, Workspace, same

# The parameter that shows what no argument does.
WITNESS = "shape"

NOTHING: Mapping[str, str] = {}


def digits(index: Expr, ws: Workspace) -> tuple[str, ...] | None:
    """The ranks of which an index is the mixed radix, most significant first."""
    match index:
        case Rank(name=name):
            return (name,)
        case Call(op="add", args=(Call(op="mul", args=(high, factor)), Rank(name=low))):
            size = ws.sizes[low]
            if factor != Extent(low) and not (isinstance(factor, Const) and same(size, factor.value)):
                return None
            outer = digits(high, ws)
            return None if outer is None else (*outer, low)
        case _:
            return None


def cut_axes(e: Expr, name: str, parts: Sequence[tuple[Size, ...] | None], ws: Workspace) -> Expr:
    def one(n: Expr) -> Expr:
        if not isinstance(n, Access) or n.tensor != name:
            return n
        indices: list[Expr] = []
        for index, part in zip(n.indices, parts, strict=True):
            found = digits(index, ws) if part is not None else None
            indices += map(Rank, found) if found is not None else [index]
        return Access(name, tuple(indices))

    return transform(e, one)


def unshown(c: Cascade, sizes: Mapping[str, Size], hints: Mapping[str, int]) -> tuple[str, ...]:
    """The ranks whose extents the parameters do not show, or would show wrongly."""
    shown = {i.name for p in c.params for i in p.indices if isinstance(i, Rank)}
    others = [r for r in c.ranks if r not in shown]
    if any(not isinstance(sizes[r], int) for r in c.ranks):
        return tuple(others)
    missing: list[str] = []
    known = {r: hints[r] for r in shown}
    while True:
        trial = replace(c, params=(*c.params, Param(WITNESS, "bool", tuple(map(Rank, missing))))) if missing else c
        try:
            found = resolve(trial, {**known, **{r: hints[r] for r in missing}})
        except (VerifyError, InputError):
            return tuple(others)
        wrong = [r for r in others if found[r] != hints[r]]
        if not wrong:
            return tuple(missing)
        missing += wrong


def one_name(c: Cascade, sizes: Mapping[str, Size]) -> Cascade:
    """Ranks that index one axis under one name, unless a statement has use for both: what is shared is seen to be."""
    axes: dict[tuple[str, int], list[str]] = {}

    def seen(tensor: str, indices: Iterable[Expr]) -> None:
        for axis, index in enumerate(indices):
            if isinstance(index, Rank):
                axes.setdefault((tensor, axis), []).append(index.name)

    statements: list[set[str]] = []
    for p in c.params:
        seen(p.name, p.indices)
        statements.append({i.name for i in p.indices if isinstance(i, Rank)})
    for e in c.einsums:
        for o in e.outputs:
            seen(o.name, map(Rank, o.ranks))
        for n in walk(e.expr):
            if isinstance(n, Access):
                seen(n.tensor, n.indices)
        statements.append(set(e.outputs[0].ranks) | set(ranks_named(e.expr)))
    names = {r: r for s in statements for r in s}
    for first, *others in axes.values():
        for other in others:
            a, b = names[first], names[other]
            if a != b and same(sizes[a], sizes[b]) and not any({a, b} <= s for s in statements):
                names = {r: a if n == b else n for r, n in names.items()}
                statements = [{a if r == b else r for r in s} for s in statements]
    return named_anew(c, names)


def named_anew(c: Cascade, ranks: Mapping[str, str], tensors: Mapping[str, str] = NOTHING) -> Cascade:
    """The cascade with other names for its ranks, and for some of its tensors."""

    def one(n: Expr) -> Expr:
        match n:
            case Rank(name=name):
                return Rank(ranks[name])
            case Extent(rank=name):
                return Extent(ranks[name])
            case Access(tensor=name, indices=indices):
                return Access(tensors.get(name, name), indices)
            case Reduce(op=op, ranks=over, args=args):
                return Reduce(op, tuple(ranks[r] for r in over), args)
            case _:
                return n

    params = tuple(
        replace(p, name=tensors.get(p.name, p.name), indices=tuple(transform(i, one) for i in p.indices))
        for p in c.params
    )
    einsums = tuple(
        replace(
            e,
            outputs=tuple(replace(o, ranks=tuple(ranks[r] for r in o.ranks)) for o in e.outputs),
            expr=transform(e.expr, one),
        )
        for e in c.einsums
    )
    return replace(c, params=params, einsums=einsums)


_LETTERS = "b h i j k l m n p r s t u v w a c d f g o z x y q e".split()


def renamed(c: Cascade) -> tuple[Cascade, dict[str, str]]:
    """Ranks under short names, parameters numbered as they stand: the same text for the same computation."""
    tensors = {n: f"x{i}" for i, n in enumerate(p.name for p in c.params if p.indices and p.name != WITNESS)}
    tensors |= {n: f"n{i}" for i, n in enumerate(p.name for p in c.params if not p.indices)}
    taken = {*tensors.values(), WITNESS, c.name, *(o.name for e in c.einsums for o in e.outputs)}
    letters = [x for x in _LETTERS if x not in taken]
    ranks = {r: letters[i] if i < len(letters) else f"{letters[i % len(letters)]}{i}" for i, r in enumerate(c.ranks)}
    return named_anew(c, ranks, tensors), ranks
