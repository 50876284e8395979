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

from .brackets import bracket, compare, conjunction, conjuncts, disjunction, pred
from .forms import ONE, ONE_FRACTION, UNIT, ZERO, Atom, Form, Monomial, lift, values_inside

FILLED = "red:any"


def is_mask(m: Monomial) -> bool:
    """Whether a monomial is 0 or -inf and nothing else."""
    return m.atom is not None and m.atom.kind == "lbr"


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


def is_unmasked(f: Form) -> bool:
    """Whether no mask makes nothing of a sum's terms: of a condition in an exponent, only -inf would."""
    if any(m.brackets for m in f.terms):
        return False
    factors = [a for m in f.terms for a, _ in m.factors]
    if any(m.brackets for x in values_inside(*factors) if isinstance(x, Form) for m in x.terms):
        return False
    return not any(isinstance(x, Atom) and (x.kind == "lbr" or x.filled is not None) for x in values_inside(f))


def nothing_over(ranks: Iterable[str]) -> Atom:
    """That one of these ranks is empty."""
    extents = (lift(Atom("extent", r, dtype="i64", nonnegative=True)) for r in ranks)
    return disjunction(compare("eq", extent, ZERO, integer=True) for extent in extents)


def where_nonzero(a: Atom) -> list[Atom]:
    """Where something comes into a factor that is 0 without: where it cancels, 0 / 0 is 0 still and not 1."""
    some = filled(a)
    if some is not None:
        return [some]
    if a.kind == "extent":
        return _inhabited([a.name])
    return _inhabited(a.ranks) if a.kind == "red" and a.name == "sum" else []


def where_finite(a: Atom) -> list[Atom]:
    """Where something comes into a maximum, which is -inf without."""
    some = filled(a)
    if some is not None:
        return [some] if some.name == FILLED and _is_infinite_of_nothing(a) else []
    return _inhabited(a.ranks) if a.kind == "red" and a.name == "max" else []


def _is_infinite_of_nothing(a: Atom) -> bool:
    """Whether a reduction that masks empty is -inf then, as that of masked scores is, and not 0."""
    body = a.args[0] if a.kind == "red" else None
    return any(map(is_mask, body.terms)) if isinstance(body, Form) else not a.nonnegative


def unless_nothing(outer: Monomial, inside: Form, value: Form) -> Form:
    """Where a reduction is not the 0 that conditions leave, if what left it may be infinite: times that, 0 is no 0.

    Sums of exponentials are told by their 0 as they are written (`lower`).
    """
    finite = all(a.kind in ("extent", "ln2") or (a.kind in ("rank", "int") and p > 0) for a, p in outer.factors)
    finite = finite and outer.exponent is None
    if finite or not all(map(_may_vanish, inside.terms)):
        return UNIT
    plain = Form({value.single[0]: ONE_FRACTION}) if value.single is not None else value
    return bracket(compare("ne", plain, ZERO, integer=False))


def _may_vanish(m: Monomial) -> bool:
    """Whether a term is 0 by a condition, its own or that of a factor in it."""
    return m.exponent is None and (bool(m.brackets) or any(p > 0 and _factor_may_vanish(a) for a, p in m.factors))


def _factor_may_vanish(a: Atom) -> bool:
    inner = a.args[0] if a.kind == "poly" else None
    if isinstance(inner, Form):
        return all(t.brackets or is_mask(t) or _may_vanish(t) for t in inner.terms)
    return a.kind == "red" and filled(a) is not None


def _inhabited(ranks: Iterable[str]) -> list[Atom]:
    """That ranks are not empty: without a mask a reduction over them is of something then."""
    return [compare("le", UNIT, lift(Atom("extent", r, dtype="i64", nonnegative=True)), integer=True) for r in ranks]


def _rank_of(p: Atom) -> str | None:
    """The rank r of the predicate ``extent(r) >= 1``."""
    inside = p.args[0] if p.name == "ge0" else None
    if not isinstance(inside, Form) or len(inside.terms) != 2 or inside.terms.get(ONE) != -ONE_FRACTION:
        return None
    m, q = next((m, q) for m, q in inside.terms.items() if m != ONE)
    return m.atom.name if q == 1 and m.atom is not None and m.atom.kind == "extent" else None


def pruned(m: Monomial) -> Monomial:
    """A monomial without the brackets of these kinds that its other factors imply."""
    if not any(b.name == FILLED or _rank_of(b) is not None for b in m.brackets):
        return m
    kept = [b for b in m.brackets if not _is_superfluous(b, m)]
    return m if len(kept) == len(m.brackets) else Monomial(m.factors, m.exponent, kept)


def _is_superfluous(b: Atom, m: Monomial) -> bool:
    rank = _rank_of(b)
    if rank is not None:
        counted = any(n > 0 and _counts(a, rank) for a, n in m.factors)
        return counted or rank in m.free or any(_is_of_something(p, rank) for p in m.brackets)
    return b.name == FILLED and _implied(b, m.factors, set(m.brackets) - {b})


def _is_of_something(p: Atom, rank: str) -> bool:
    """Whether a predicate holds only where a rank is not empty: it finds an element, or its sum is not 0."""
    if p.name == FILLED:
        return rank in p.ranks
    equal = p.args[0] if p.name == "not" else None
    if not isinstance(equal, Atom) or equal.name != "eq":
        return False
    sides = [f for f in equal.args if isinstance(f, Form)]
    return any(not f.terms for f in sides) and all(_adds_up(f, rank) for f in sides)


def _adds_up(f: Form, rank: str) -> bool:
    """Whether a value is 0 where a rank is empty."""
    return all(any(n > 0 and _counts(a, rank) for a, n in m.factors) for m in f.terms)


def _counts(a: Atom, rank: str) -> bool:
    """Whether a factor is 0 where a rank is empty."""
    if a.kind == "red" and a.name == "sum" and rank in a.ranks or a.kind == "extent" and a.name == rank:
        return True
    body = a.args[0] if a.kind in ("cast", "poly") or (a.kind == "red" and a.name == "sum") else None
    return isinstance(body, Form) and rank not in a.ranks and _adds_up(body, rank)


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
