"""Exponentials in sums: what they share, what they are divided by, what can leave them."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction

from .forms import ZERO, Atom, Form, Monomial, add, scale
from .ledger import MAX_TERMS
from .normal import mul
from .waiting import waits_value


def shared_brackets(v: Form) -> frozenset[Atom]:
    """The brackets that every term of a value has."""
    return frozenset.intersection(*(frozenset(m.brackets) for m in v.terms)) if v.terms else frozenset()


def common_exponent(body: Form) -> Form | None:
    """The exponent that all terms of an integrand share, or None."""
    found = {m.exponent.digest if m.exponent is not None else b"" for m in body.terms}
    return next(iter(body.terms)).exponent if len(found) == 1 else None


def is_share(m: Monomial) -> bool:
    """Whether an exponential is divided by a sum that it is a term of: ``exp(S[q, k]) / sum[k](exp(S[q, k]))``."""
    left = [m.exponent or ZERO]
    for a, p in m.factors:
        if p < 0 and (own := list(_exponents_in(a, m))):
            left = [add(x, scale(e, Fraction(p))) for x in left for e in own]
    return any(not x.terms for x in left[:MAX_TERMS]) and m.exponent is not None


def _exponents_in(a: Atom, m: Monomial) -> Iterable[Form]:
    """The exponents of the terms of a sum that are there wherever the brackets of a monomial hold."""
    body = a.args[0] if a.kind == "poly" or (a.kind == "red" and a.name == "sum") else None
    if not isinstance(body, Form):
        return
    for t in body.terms:
        if set(t.brackets) <= set(m.brackets):
            if t.exponent is not None:
                yield t.exponent
            elif a.kind == "poly" and len(t.factors) == 1 and t.factors[0][1] == 1:
                yield from _exponents_in(t.factors[0][0], m)


def expand(f: Form, over: frozenset[str]) -> Form:
    """Open the products of sums in an exponent whose terms can leave."""
    total: list[Form] = []
    for m, q in f.terms.items():
        opened = None
        for a, p in m.factors:
            if a.kind == "poly" and 0 < p <= 2 and a.free & over and waits_value(a, over):
                inner = a.args[0]
                assert isinstance(inner, Form)
                rest = Form({Monomial([(b, n) for b, n in m.factors if b != a], m.exponent, m.brackets): q})
                pieces = [rest]
                for _ in range(p):
                    pieces = [mul(x, Form({t: c})) for x in pieces for t, c in inner.terms.items()]
                opened = expand(add(*pieces), over)
                break
        total.append(opened if opened is not None else Form({m: q}))
    return add(*total)
