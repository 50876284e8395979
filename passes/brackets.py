"""Predicates in one spelling each, and Iverson brackets of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from .forms import ONE_FRACTION, UNIT, ZERO, Atom, Form, Monomial, Value, lift, neg, scale, sub


def lbr(p: Atom) -> Atom:
    """What a mask leaves of an addend: 0 where p holds, else -inf."""
    return Atom("lbr", "", (p,))


def pred(name: str, *args: Value, **kwargs: Any) -> Atom:
    """A predicate, by the name of what it says of its arguments."""
    return Atom("pred", name, args, dtype="bool", **kwargs)


TRUE = pred("true")


FALSE = pred("false")


INF = lift(Atom("inf", "inf"))


def compare(op: str, a: Form, b: Form, integer: bool) -> Atom:
    """A comparison in one spelling: integers as ``difference >= 0`` or ``== 0``, floats by ``lt le eq ne`` alone."""
    if op in ("gt", "ge"):
        op, a, b = {"gt": "lt", "ge": "le"}[op], b, a
    x, y = a.constant, b.constant
    if x is not None and y is not None:
        return TRUE if {"lt": x < y, "le": x <= y, "eq": x == y, "ne": x != y}[op] else FALSE
    if op in ("eq", "ne"):
        difference = sub(a, b)
        if integer and difference.constant is not None:
            return TRUE if (difference.constant == 0) == (op == "eq") else FALSE
        if integer:
            lead = next(iter(difference.terms.values()))
            difference = (
                scale(difference, 1 / abs(lead) if lead > 0 else -1 / abs(lead))
                if _primitive(difference)
                else difference
            )
            return negate(pred("eq0", difference)) if op == "ne" else pred("eq0", difference)
        first, second = sorted((a, b), key=lambda f: f.digest)
        eq = pred("eq", first, second)
        return negate(eq) if op == "ne" else eq
    if integer:
        # a < b is b - a - 1 >= 0, a <= b is b - a >= 0.
        difference = sub(b, a)
        if op == "lt":
            difference = sub(difference, UNIT)
        if difference.constant is not None:
            return TRUE if difference.constant >= 0 else FALSE
        return pred("ge0", difference)
    if op == "lt" and not (a.terms and b.terms):
        (first, rises), (second, falls) = _without_exponential(a), _without_exponential(b)
        if (first, second) != (a, b):
            return conjunction([compare(op, first, second, integer), *rises, *falls])
    return pred(op, a, b)


def _primitive(f: Form) -> bool:
    return len({abs(q) for q in f.terms.values()}) == 1


def _without_exponential(f: Form) -> tuple[Form, list[Atom]]:
    """One side of ``0 < f`` or ``f < 0`` without its positive factor, and what says that the factor is not 0.

    ``exp(x - m) * v`` -> ``v`` where ``-inf < x`` and ``m < inf``.
    """
    only = f.single
    if only is None or only[0].exponent is None:
        return f, []
    m, q = only
    signed = Form({Monomial(m.factors, None, m.brackets): ONE_FRACTION if q > 0 else -ONE_FRACTION})
    terms = [(Form({t: ONE_FRACTION}), p) for t, p in only[0].exponent.terms.items() if not _is_finite(t)]
    return signed, [pred("lt", neg(INF), t) if p > 0 else pred("lt", t, INF) for t, p in terms]


def _is_finite(m: Monomial) -> bool:
    """Whether a term of an exponent is finite whatever the data."""
    return m.exponent is None and all(a.kind in ("rank", "extent", "ln2") for a, _ in m.factors)


def negate(p: Atom) -> Atom:
    """Not p: De Morgan inwards, an integer inequality turned round."""
    if p.name == "not" and isinstance(p.args[0], Atom):
        return p.args[0]
    if p == TRUE:
        return FALSE
    if p == FALSE:
        return TRUE
    if p.name == "ge0" and isinstance(p.args[0], Form):
        return pred("ge0", sub(neg(p.args[0]), UNIT))
    if p.name in ("and", "or"):
        parts = [negate(a) for a in p.args if isinstance(a, Atom)]
        return conjunction(parts) if p.name == "or" else disjunction(parts)
    return pred("not", p)


def conjunction(parts: Iterable[Atom]) -> Atom:
    """Where all hold: each part once, in a fixed order; FALSE where two contradict each other."""
    flat = {q for p in parts for q in conjuncts(p)} - {TRUE}
    if FALSE in flat or any(negate(p) in flat for p in flat):
        return FALSE
    ordered = sorted(flat, key=lambda p: p.digest)
    return TRUE if not ordered else ordered[0] if len(ordered) == 1 else pred("and", *ordered)


def disjunction(parts: Iterable[Atom]) -> Atom:
    """Where one of several holds: each part once, in a fixed order; TRUE where two leave no other case."""
    flat: set[Atom] = set()
    for p in parts:
        flat |= {a for a in p.args if isinstance(a, Atom)} if p.name == "or" else {p}
    flat -= {FALSE}
    if TRUE in flat or any(negate(p) in flat for p in flat):
        return TRUE
    ordered = sorted(flat, key=lambda p: p.digest)
    return FALSE if not ordered else ordered[0] if len(ordered) == 1 else pred("or", *ordered)


def conjuncts(p: Value) -> list[Atom]:
    """The parts of a conjunction; none of TRUE."""
    assert isinstance(p, Atom)
    if p.name == "and" and p.kind == "pred":
        return [a for a in p.args if isinstance(a, Atom)]
    return [] if p == TRUE else [p]


def bracket(p: Atom) -> Form:
    """[p]: 1 where p holds, else 0."""
    if p == TRUE:
        return UNIT
    if p == FALSE:
        return ZERO
    return Form({Monomial((), None, conjuncts(p)): ONE_FRACTION})


def one_at_a_time(terms: Sequence[Monomial]) -> bool:
    """Whether no two terms are there together, by their brackets."""
    opposites = [{negate(p) for p in m.brackets} for m in terms]
    return all(opposites[i] & set(m.brackets) for j, m in enumerate(terms) for i in range(j))
