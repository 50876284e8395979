"""Transposing accesses: what is read at ``X[i(r)]`` is sent back to ``dX[x]``, the sum over all r with i(r) = x.

An index that is a bare rank gives its name to the axis, one that is linear in a rank is solved for it, any other stays
as a condition under the sum::

    value[n, p, r] at X[n, 2*p + r]  ->  dX[n, w] = sum[r](where((w - r) % 2 == 0, value[n, (w - r) // 2, r], 0.0))
    value[t] at F[t - 1]             ->  dF[t] = where(t + 1 < extent(t), value[t + 1], 0.0)
    value[n, k] at X[I[n, k]]        ->  dX[v] = sum[n, k](where(I[n, k] == v, value[n, k], 0.0))
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

from ..ir.cascade import (
    Access,
    Call,
    Const,
    Expr,
    Extent,
    Rank,
    Reduce,
    children,
    free_ranks,
    ranks_named,
    rebuild,
    substitute,
    tensors_read,
    transform,
    walk,
)
from .fresh import fresh

ZERO: Expr = Const(0.0)


@dataclass
class Names:
    """New names of ranks, and what is known of every rank's extent.

    ``copies`` holds of which rank a new name is another instance; ``sizes`` what the extent of a rank is, where that is
    another rank's or a number.
    """

    taken: set[str]
    copies: dict[str, str] = field(default_factory=dict)
    sizes: dict[str, Expr] = field(default_factory=dict)

    def fresh(self, base: str) -> str:
        return fresh(base, self.taken)

    def copy(self, rank: str) -> str:
        """Another instance of a rank."""
        origin, number = self.copies.get(rank, rank), 2
        while f"{origin}_{number}" in self.taken:
            number += 1
        name = f"{origin}_{number}"
        self.taken.add(name)
        self.copies[name] = origin
        return name

    def extent(self, rank: str) -> Expr:
        origin = self.copies.get(rank, rank)
        return self.sizes.get(origin, Extent(origin))


@dataclass(frozen=True, slots=True)
class Share:
    """A share of a tensor's adjoint: ``value`` at the place ``indices``, for all of ``ranks`` where ``guards`` hold.

    A guard may read data only where those before it hold.
    """

    indices: tuple[Expr, ...]
    ranks: tuple[str, ...]
    guards: tuple[Expr, ...]
    value: Expr


def transpose(share: Share, axes: tuple[str, ...], names: Names) -> Expr:
    """The share as an expression over the ranks of its tensor, named ``axes``: every other rank is summed."""
    share = _apart(share, axes, names)
    ranks = list(share.ranks)
    indices, guards, value = list(share.indices), list(share.guards), share.value
    ranges: list[Expr] = []
    places: list[Expr] = []
    # Bare ranks first: what they name may stand in the other indices.
    for axis in sorted(range(len(axes)), key=lambda a: not isinstance(indices[a], Rank)):
        index, own = indices[axis], axes[axis]
        if index == Rank(own):
            ranks.remove(own)
            continue
        solution = _solved(index, own, ranks, guards, names)
        if solution is None:
            places.append(Call("eq", (index, Rank(own))))
            continue
        rank, at, tests = solution
        ranks.remove(rank)
        value = _put(value, rank, at)
        indices, guards, places, ranges = (
            [_put(e, rank, at) for e in part] for part in (indices, guards, places, ranges)
        )
        ranges += tests
    e = guarded([*ranges, *guards, *places], value)
    # Another instance of a rank gets its extent from what it reads along.
    idle = [r for r in ranks if r in names.copies and r not in free_ranks(e)]
    for r in idle:
        e = Call("mul", (names.extent(r), e))
    over = tuple(r for r in ranks if r not in idle)
    return Reduce("sum", over, (e,)) if over else e


def _put(e: Expr, rank: str, at: Expr) -> Expr:
    """An expression with a value in a rank's place, sums in indices added up: F[t + 1 - 1] is F[t]."""

    def summed(n: Expr) -> Expr:
        if not isinstance(n, Access) or isinstance(at, Rank):
            return n
        return replace(n, indices=tuple(spelled(*linear(i)) for i in n.indices))

    return transform(substitute(e, {rank: at}), summed)


def guarded(conditions: Iterable[Expr], value: Expr, otherwise: Expr = ZERO) -> Expr:
    """``where(conditions, value, otherwise)``, each condition read only where those before it hold."""
    groups: list[Expr] = []
    for condition in dict.fromkeys(conditions):
        if groups and not tensors_read(condition):
            groups[-1] = Call("and", (groups[-1], condition))
        else:
            groups.append(condition)
    for condition in reversed(groups):
        value = Call("where", (condition, value, otherwise))
    return value


def clashes(share: Share, axes: tuple[str, ...]) -> list[str]:
    """The ranks of the share that a tensor's axis has by name but not in the same place."""

    def same(rank: str) -> bool:
        places = [i for i, index in enumerate(share.indices) if rank in ranks_named(index)]
        return len(places) == 1 and share.indices[places[0]] == Rank(rank) and axes[places[0]] == rank

    return [r for r in share.ranks if r in axes and not same(r)]


def _apart(share: Share, axes: tuple[str, ...], names: Names) -> Share:
    """The share with other names for its ranks, bound or free, that are those of the tensor's axes by chance."""

    parts = [*share.indices, *share.guards, share.value]
    bound = {r for e in parts for n in walk(e) if isinstance(n, Reduce) for r in n.ranks}
    # A name that is both free and bound inside is two ranks: the bound one is told apart first.
    inner = {r: names.copy(r) for r in sorted(bound & {*share.ranks, *axes})}
    free = {r: names.copy(r) for r in clashes(share, axes)}

    def renamed(e: Expr) -> Expr:
        return substitute(_rename_bound(e, inner), {r: Rank(n) for r, n in free.items()})

    return Share(
        tuple(renamed(i) for i in share.indices),
        tuple(free.get(r, r) for r in share.ranks),
        tuple(renamed(g) for g in share.guards),
        renamed(share.value),
    )


def _rename_bound(e: Expr, names: Mapping[str, str]) -> Expr:
    """Rename what reductions bind, and what of it their arguments read."""
    if not names:
        return e

    def one(n: Expr) -> Expr:
        if not isinstance(n, Reduce) or not set(n.ranks) & names.keys():
            return n
        mine = {r: Rank(names[r]) for r in n.ranks if r in names}
        return replace(
            n, ranks=tuple(names.get(r, r) for r in n.ranks), args=tuple(substitute(a, mine) for a in n.args)
        )

    return transform(e, one)


def copied(e: Expr, ranks: Iterable[str], names: Names) -> tuple[Expr, tuple[str, ...]]:
    """An expression over other instances of the ranks, and their names."""
    new = {r: names.copy(r) for r in ranks}
    return substitute(e, {r: Rank(n) for r, n in new.items()}), tuple(new.values())


def unshadowed(e: Expr, scope: Collection[str], names: Names) -> Expr:
    """Give a reduction's rank another name where it shadows one in scope."""
    if isinstance(e, Reduce):
        new = {r: names.copy(r) for r in e.ranks if r in scope}
        swap: dict[str, Expr] = {r: Rank(n) for r, n in new.items()}
        ranks = tuple(new.get(r, r) for r in e.ranks)
        e = replace(e, ranks=ranks, args=tuple(substitute(a, swap) for a in e.args))
        scope = {*scope, *ranks}
    kids = children(e)
    return rebuild(e, tuple(unshadowed(k, scope, names) for k in kids)) if kids else e


# Linear indices

Terms = dict[Expr, int]


def linear(e: Expr) -> tuple[Terms, int]:
    """An integer expression as (multiples of what is opaque, constant): ``2*p + r - 1`` is ({p: 2, r: 1}, -1)."""
    match e:
        case Const(value=int() as value, kind="int"):
            return {}, value
        case Call(op="neg", args=(a,)):
            return _plus(({}, 0), linear(a), -1)
        case Call(op="add" | "sub" as op, args=(a, b)):
            return _plus(linear(a), linear(b), 1 if op == "add" else -1)
        case Call(op="mul", args=(a, b)):
            left, right = linear(a), linear(b)
            if not left[0]:
                left, right = right, left
            return _plus(({}, 0), left, right[1]) if not right[0] else ({e: 1}, 0)
        case _:
            return {e: 1}, 0


def _plus(a: tuple[Terms, int], b: tuple[Terms, int], factor: int) -> tuple[Terms, int]:
    total = dict(a[0])
    for e, k in b[0].items():
        total[e] = total.get(e, 0) + factor * k
    return {e: k for e, k in total.items() if k}, a[1] + factor * b[1]


def spelled(terms: Terms, constant: int) -> Expr:
    """The expression of a linear form, what is added before what is subtracted."""
    parts: list[tuple[Expr, bool]] = []
    for e, k in sorted(terms.items(), key=lambda t: t[1] < 0):
        parts.append((e if abs(k) == 1 else Call("mul", (Const(abs(k)), e)), k > 0))
    if constant or not parts:
        parts.append((Const(abs(constant)), constant >= 0))
    parts.sort(key=lambda p: not p[1])
    first, positive = parts[0]
    total = first if positive else Call("neg", (first,))
    for e, positive in parts[1:]:
        total = Call("add" if positive else "sub", (total, e))
    return total


def _solved(
    index: Expr, own: str, ranks: list[str], guards: list[Expr], names: Names
) -> tuple[str, Expr, list[Expr]] | None:
    """Solve ``index = own`` for a rank: (the rank, its value, the tests that it is one); None if no rank comes out.

    The first of the ranks that serves is taken: those of the Einsum stand before those that it reduces, and what
    remains to be summed is then what the Einsum itself reduced.
    """
    terms, constant = linear(index)
    if guards and any(tensors_read(e) for e in terms):
        return None
    for rank in ranks:
        factor = terms.get(Rank(rank), 0)
        if not factor or any(rank in ranks_named(e) for e in terms if e != Rank(rank)):
            continue
        # factor * rank + rest = own, with the sign such that the divisor is positive.
        sign = 1 if factor > 0 else -1
        rest = {e: -k * sign for e, k in terms.items() if e != Rank(rank)}
        rest[Rank(own)] = rest.get(Rank(own), 0) + sign
        rest = {e: k for e, k in rest.items() if k}
        whole = spelled(rest, -constant * sign)
        if abs(factor) > 1:
            at: Expr = Call("floordiv", (whole, Const(abs(factor))))
            tests = [Call("eq", (Call("mod", (whole, Const(abs(factor)))), Const(0)))]
            low, high = Call("ge", (whole, Const(0))), Call("lt", (at, names.extent(rank)))
            return rank, at, [low, high, *tests]
        return rank, whole, _range_tests(whole, rest, -constant * sign, own, rank, names)
    return None


def _range_tests(at: Expr, rest: Terms, constant: int, own: str, rank: str, names: Names) -> list[Expr]:
    """The tests that a rank's value lies in its extent, without those that hold of themselves."""
    size = names.extent(rank)
    high = Call("lt", (at, size))
    if rest != {Rank(own): 1}:
        return [Call("ge", (at, Const(0))), high]
    low: list[Expr] = [Call("ge", (Rank(own), Const(-constant)))] if constant < 0 else []
    return low if constant <= 0 and names.extent(own) == size else [*low, high]


def reads(e: Expr, tensor: str) -> bool:
    """Whether an expression reads a tensor."""
    return any(isinstance(n, Access) and n.tensor == tensor for n in walk(e))
