"""What an element of a monoid's reduction does to the result: the reduction before it, it, and the reduction after it.

As a monoid associates, its reduction over k is ``before[k] ∘ element[k] ∘ after[k]`` for every k::

    (M[n], L[n]) = lse[k](X[n, k], 1.0)
    ->
    (M_before[n, k], L_before[n, k]) = lse[k_2](where(k_2 < k, X[n, k_2], -inf), where(k_2 < k, 1.0, 0.0))
    (M_after[n, k], L_after[n, k])   = lse[k_2](where(k_2 > k, X[n, k_2], -inf), where(k_2 > k, 1.0, 0.0))
    the body of lse on (M_before, L_before) and (X[n, k], 1.0), and again on that and (M_after, L_after)

The last values do not depend on k, and their derivative with respect to the element is the reduction's own. It costs a
reduction for each element; the reductions that a monoid stands for have cheaper gradients, where they can be written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..ir.cascade import (
    Access,
    Call,
    Const,
    Einsum,
    Expr,
    Monoid,
    Output,
    Rank,
    Reduce,
    free_ranks,
    substitute,
    transform,
)
from ..ir.types import TypeChecker, settle
from .transpose import Names


@dataclass
class Fold:
    """``einsums`` are the statements from the elements to ``results``, ``states`` those before and after among them.

    ``ranks`` are those reduced over, under names that none of the outputs has.
    """

    ranks: tuple[str, ...]
    states: list[Einsum] = field(default_factory=list)
    einsums: list[Einsum] = field(default_factory=list)
    results: list[Expr] = field(default_factory=list)
    types: dict[str, str] = field(default_factory=dict)


def unfolded(e: Einsum, m: Monoid, names: Names, checker: TypeChecker) -> Fold:
    """A monoid's Einsum around one of its elements."""
    assert isinstance(e.expr, Reduce)
    types = dict(checker.tensors)
    states = checker.state_types(e.expr)
    ranks, args = e.expr.ranks, e.expr.args
    if set(ranks) & set(e.ranks):
        # The reduction's ranks shadow those of an output.
        fresh = {r: names.copy(r) for r in ranks}
        args = tuple(_swapped(a, fresh) for a in args)
        ranks = tuple(fresh.values())
    fold = Fold(ranks)

    def state(when: str, op: str) -> list[Expr]:
        """The reduction over the elements before or after the one in question."""
        copies = {r: names.copy(r) for r in ranks}
        inside = _ordered(op, [(Rank(copies[r]), Rank(r)) for r in ranks])
        parts = [Call("where", (inside, _swapped(a, copies), i)) for a, i in zip(elements, m.identity, strict=True)]
        outputs = tuple(Output(names.fresh(f"{o.name}_{when}"), o.ranks + ranks) for o in e.outputs)
        fold.states.append(Einsum(outputs, Reduce(m.name, tuple(copies.values()), tuple(parts))))
        fold.einsums.append(fold.states[-1])
        fold.types.update({o.name: t for o, t in zip(outputs, states, strict=True)})
        return [Access(o.name, tuple(Rank(r) for r in o.ranks)) for o in outputs]

    def named(base: str, value: Expr) -> Expr:
        if isinstance(value, Access | Const):
            return value
        own = tuple(r for r in (*e.ranks, *ranks) if r in free_ranks(value))
        step = Einsum((Output(names.fresh(base), own),), value)
        fold.einsums.append(step)
        fold.types[step.name] = settle(TypeChecker({**types, **fold.types}, checker.monoids).infer(value))
        return Access(step.name, tuple(Rank(r) for r in own))

    def combined(first: Sequence[Expr], second: Sequence[Expr]) -> list[Expr]:
        values: dict[str, Expr] = dict(zip(m.params, [*first, *second], strict=True))
        for name, value in m.body:
            values[name] = named(f"{e.name}_{name}", _filled(value, values))
        return [values[r] for r in m.results]

    elements = [named(f"{o.name}_element", a) for o, a in zip(e.outputs, args, strict=True)]
    before, after = state("before", "lt"), state("after", "gt")
    fold.results = combined(combined(before, elements), after)
    return fold


def _filled(e: Expr, values: dict[str, Expr]) -> Expr:
    return transform(e, lambda n: values.get(n.tensor, n) if isinstance(n, Access) else n)


def _swapped(e: Expr, names: dict[str, str]) -> Expr:
    return substitute(e, {r: Rank(n) for r, n in names.items()})


def _ordered(op: str, pairs: Sequence[tuple[Rank, Rank]]) -> Expr:
    """Whether one place comes before (or after) another, in the order of the ranks."""
    (a, b), *rest = pairs
    first: Expr = Call(op, (a, b))
    if not rest:
        return first
    return Call("or", (first, Call("and", (Call("eq", (a, b)), _ordered(op, rest)))))
