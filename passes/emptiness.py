"""What masks may leave empty, and what goes on saying so where it cancels.

A sum of masked exponentials into which nothing came is a 0 that wins over whatever it is multiplied with or divided by
(design, section 2): where every key is masked, ``L / L`` is 0 and not 1, and so is ``sum[k](P[k] / L)``. So such a
reduction cancels against itself only under a bracket:

    sum[k]([p] exp(x)) / sum[k]([p] exp(x))  ->  [any[k](p)]

The bracket goes where something else in the product is 0 there anyway: in ``sum[k]([p] exp(x - M) V) / L`` the maximum
cancels, and the sum beside it is as empty as the maximum is.
"""

from __future__ import annotations

from collections.abc import Iterable

from .brackets import conjunction, conjuncts, disjunction, pred
from .forms import Atom, Form, Monomial

FILLED = "red:any"


def is_mask(m: Monomial) -> bool:
    """Whether a monomial is 0 or -inf and nothing else."""
    bare = len(m.factors) == 1 and m.exponent is None and not m.brackets
    return bare and m.factors[0][0].kind == "lbr" and m.factors[0][1] == 1


def filled(a: Atom) -> Atom | None:
    """Where something comes into a reduction of masked elements; None for a reduction that masks do not empty.

    What a user's monoid or scan makes of them is told by its value, as 0 / 0 is no number elsewhere.
    """
    if a.kind == "access":
        return a.filled
    body = a.args[0] if a.kind == "red" and a.name in ("sum", "max") else None
    if not isinstance(body, Form) or not body.terms:
        return None
    masks = [m.factors[0][0].args[0] for m, q in body.terms.items() if is_mask(m) and q > 0]
    if a.name == "max" and masks:
        passed = conjunction(p for p in masks if isinstance(p, Atom))
    elif all(m.brackets and m.exponent is not None for m in body.terms):
        passed = disjunction(conjunction(m.brackets) for m in body.terms)
    else:
        return None
    return pred(FILLED, passed, ranks=a.ranks)


def pruned(m: Monomial) -> Monomial:
    """A monomial without the brackets of this kind that its other factors imply."""
    if not any(b.name == FILLED for b in m.brackets):
        return m
    kept = [b for b in m.brackets if b.name != FILLED or not _implied(b, m.factors, set(m.brackets) - {b})]
    return m if len(kept) == len(m.brackets) else Monomial(m.factors, m.exponent, kept)


def _implied(p: Atom, factors: Iterable[tuple[Atom, int]], brackets: Iterable[Atom]) -> bool:
    """Whether a product is 0 wherever nothing passes: under a bracket that an element passes, or by an empty factor."""
    within = p.args[0]
    assert isinstance(within, Atom)
    wanted = set(conjuncts(within))
    # Without a mask nothing passes where the rank itself is empty.
    return bool(wanted) and wanted <= set(brackets) or any(n > 0 and _vanishes(a, p, wanted) for a, n in factors)


def _vanishes(a: Atom, p: Atom, wanted: set[Atom]) -> bool:
    """Whether a factor is 0 wherever nothing passes."""
    own = filled(a)
    if own is not None and set(own.ranks) == set(p.ranks):
        within = own.args[0]
        assert isinstance(within, Atom)
        if wanted <= set(conjuncts(within)):
            return True
    if a.kind == "cast" or a.kind == "poly" or (a.kind == "red" and a.name == "sum"):
        body = a.args[0]
        free = not p.free & set(a.ranks)
        return isinstance(body, Form) and free and all(_implied(p, m.factors, m.brackets) for m in body.terms)
    return False
