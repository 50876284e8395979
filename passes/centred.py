"""Centred integrands: powers of ``a(x) - r``, where r is a value of the same fiber, and the basis that moves with r.

``Σ (a - r)^p w`` separates by the binomial theorem into sums that cancel, so it is carried about the r that there is so
far; when r moves, the sums with lower powers say how.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from math import comb

from .forms import ONE_FRACTION, UNIT, ZERO, Atom, Form, Monomial, Value, add, lift, scale, values_inside
from .normal import const, mul, power
from .waiting import pieces, waits_value


def expand_factors(f: Form, over: frozenset[str]) -> Form:
    """Open nested products of sums within a sum, where a reduced value multiplies a sum that varies."""
    total: list[Form] = []
    for m, q in f.terms.items():
        a = m.atom
        if a is None or a.kind != "poly" or not a.free & over or not waits_value(a, over):
            total.append(Form({m: q}))
            continue
        inner = a.args[0]
        assert isinstance(inner, Form)
        total.append(scale(expand_factors(inner, over), q))
    return add(*total)


def split_core(f: Form, over: frozenset[str]) -> tuple[Form, Form]:
    """A sum as (core, mixed): the core is ``a(x) - r``, terms that vary alone and terms that are reduced alone.

    Where no reduced term stands alone there is nothing to cancel, and every term is mixed.
    """
    core: dict[Monomial, Fraction] = {}
    mixed: dict[Monomial, Fraction] = {}
    alone = False
    for m, q in f.terms.items():
        waiting = any(waits_value(p, over) for p in pieces(m))
        if waiting and m.free & over:
            mixed[m] = q
        else:
            core[m] = q
            alone = alone or waiting
    if not alone or all(any(waits_value(p, over) for p in pieces(m)) for m in core):
        return ZERO, f
    return Form(core), Form(mixed)


def centred_factors(m: Monomial, over: frozenset[str]) -> list[tuple[Atom, int]]:
    """The factors ``(a(x) - r)^p`` of a monomial."""
    return [(a, p) for a, p in m.factors if a.kind == "poly" and a.free & over and waits_value(a, over)]


def is_centred(body: Form, over: frozenset[str]) -> bool:
    """Whether everything that waits in the integrand stands in powers of ``a(x) - r``."""
    only = body.single
    if only is None:
        return False
    m = only[0]
    inside = centred_factors(m, over)
    for a, p in inside:
        form = a.args[0]
        assert isinstance(form, Form)
        core, mixed = split_core(form, over)
        if p < 1 or mixed.terms or not core.terms:
            return False
    named = {a for a, _ in inside}
    return bool(inside) and not any(waits_value(p, over) for p in pieces(m) if p not in named)


def basis_size(body: Form, over: frozenset[str]) -> int:
    """J: how many sums carry the separated integrand."""
    only = body.single
    assert only is not None
    size = 1
    for _, p in centred_factors(only[0], over):
        size *= p + 1
    return size


@dataclass(frozen=True, slots=True)
class Centre:
    """A factor ``(a - r)^p`` of an integrand: the poly atom, p, and -r, so that it is ``(varying + reference)^p``."""

    poly: Atom
    power: int
    varying: Form
    reference: Form


def count_of(ranks: tuple[str, ...]) -> Atom:
    """How many elements a piece has: the sum of 1."""
    return Atom("red", "sum", (UNIT,), ranks, nonnegative=True)


def centres(atom: Atom) -> list[Centre]:
    """The centred factors of a reduction's integrand."""
    over = frozenset(atom.ranks)
    body = atom.args[0]
    assert isinstance(body, Form)
    if body.single is None:
        return []
    found = []
    for a, p in centred_factors(body.single[0], over):
        inner = a.args[0]
        assert isinstance(inner, Form)
        core, _ = split_core(inner, over)
        reference = Form({m: q for m, q in core.terms.items() if not m.free & over})
        varying = Form({m: q for m, q in core.terms.items() if m.free & over})
        found.append(Centre(a, p, varying, reference))
    return found


def _beside(atom: Atom, inside: Sequence[Centre]) -> tuple[Monomial, Fraction]:
    """The term that a centred reduction sums without its centred factors, and its coefficient."""
    body = atom.args[0]
    assert isinstance(body, Form)
    assert body.single is not None
    m, q = body.single
    polys = [c.poly for c in inside]
    return Monomial([(a, p) for a, p in m.factors if a not in polys], m.exponent, m.brackets), q


def lower_powers(atom: Atom) -> list[tuple[tuple[int, ...], Atom]]:
    """The basis of a centred reduction: the same sum with each lower power of its centred factors, itself last."""
    inside = centres(atom)
    rest, q = _beside(atom, inside)
    basis = []
    for powers in product(*(range(c.power + 1) for c in inside)):
        kept = [(c.poly, p) for c, p in zip(inside, powers, strict=True) if p]
        term = Form({Monomial([*rest.factors, *kept], rest.exponent, rest.brackets): q})
        basis.append((powers, count_of(atom.ranks) if term == UNIT else Atom("red", "sum", (term,), atom.ranks)))
    return basis


def reductions_over(v: Value, ranks: tuple[str, ...]) -> list[Atom]:
    """The outermost reductions over exactly these ranks inside a value."""

    def over(x: Value) -> bool:
        return isinstance(x, Atom) and x.kind == "red" and x.ranks == ranks

    return [x for x in values_inside(v, into=lambda x: not over(x)) if isinstance(x, Atom) and over(x)]


def spread(atom: Atom) -> Form:
    """A centred reduction multiplied out: ``Σ (a - r)² w`` -> ``Σ a² w - 2 r Σ a w + r² Σ w``."""
    inside = centres(atom)
    rest, q = _beside(atom, inside)
    terms = []
    for powers in product(*(range(c.power + 1) for c in inside)):
        kept, outside = [Form({rest: q})], UNIT
        for c, p in zip(inside, powers, strict=True):
            kept.append(power(c.varying, p))
            outside = mul(outside, const(comb(c.power, p)), power(c.reference, c.power - p))
        inner = mul(*kept)
        factor = inner.single[1] if inner.single is not None else ONE_FRACTION
        inner = scale(inner, 1 / factor)
        ranks = tuple(r for r in atom.ranks if r in inner.free)
        sizes = [lift(Atom("extent", r, dtype="i64", nonnegative=True)) for r in atom.ranks if r not in ranks]
        total = lift(Atom("red", "sum", (inner,), ranks)) if ranks else inner
        terms.append(scale(mul(outside, total, *sizes), factor))
    return add(*terms)
