"""Products, powers and signs of forms: the constructors that cancel, factor and select."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from fractions import Fraction

from ..ir.ops import OPS
from .brackets import FALSE, TRUE, bracket, conjunction, conjuncts, disjunction, lbr, negate
from .emptiness import FILLED, is_mask, pruned, where_finite, where_nonzero
from .forms import (
    LN2,
    ONE,
    ONE_FRACTION,
    UNIT,
    ZERO,
    ZERO_FRACTION,
    Atom,
    Form,
    Monomial,
    add,
    lift,
    scale,
    sub,
    values_inside,
)

# The greatest finite f32, in which kernels hold literals.
LARGEST_F32 = Fraction((1 << 24) - 1) * (1 << 104)
SMALLEST_F32 = Fraction(1, 1 << 126)


def const(value: int | float | Fraction) -> Form:
    """A number; infinities are atoms. ln 2 and log2 e are recognised, so that exp2 and exp meet in one form."""
    if isinstance(value, float):
        if math.isinf(value):
            sign = ONE_FRACTION if value > 0 else -ONE_FRACTION
            return Form({Monomial([(Atom("inf", "inf"), 1)]): sign})
        for known, n in ((LN2, 1), (1 / LN2, -1)):
            for sign in (ONE_FRACTION, -ONE_FRACTION):
                if value in _spellings(float(sign) * known):
                    return Form({Monomial([(Atom("ln2", "ln2", nonnegative=True), n)]): sign})
    return Form({ONE: Fraction(value)})


def _spellings(x: float) -> tuple[float, ...]:
    """A constant as people write it: in double, one step off, and rounded to single."""
    import struct

    single = struct.unpack("f", struct.pack("f", x))[0]
    return (x, math.nextafter(x, math.inf), math.nextafter(x, -math.inf), single, float(f"{single:.8g}"))


def times(a: Monomial, b: Monomial) -> Monomial | None:
    """The product of two monomials; None where their brackets contradict, so that it is 0.

    What may be empty cancels under a bracket (`emptiness`).
    """
    factors = dict(a.factors)
    brackets = set(a.brackets) | set(b.brackets)
    for atom, power in b.factors:
        before = factors.get(atom, 0)
        factors[atom] = before + power
        if before * power < 0 and before + power <= 0:
            brackets.update(where_nonzero(atom))
    if any(negate(p) in brackets for p in brackets):
        return None
    exponent = a.exponent or b.exponent
    if a.exponent is not None and b.exponent is not None:
        exponent = add(a.exponent, b.exponent)
        brackets.update(_cancelled(a.exponent, b.exponent))
    return pruned(Monomial(factors, exponent, brackets))


def _cancelled(a: Form, b: Form) -> Iterable[Atom]:
    """Where maxima that cancel in a sum of exponents are of something, and so more than -inf."""
    for m, q in a.terms.items():
        other = b.terms.get(m, ZERO_FRACTION)
        if q * other < 0 and q + other <= 0 and m.atom is not None:
            yield from where_finite(m.atom)


def mul(*forms: Form) -> Form:
    """A product. Constants distribute; a sum joins as one factor: its content times a "poly" atom."""
    monomial, q = ONE, ONE_FRACTION
    alone = sum(f.constant is None for f in forms) <= 1
    for f in forms:
        if not f.terms:
            return ZERO
        only = f.single or (factored(f) if alone else _guarded(f))
        product = times(monomial, only[0])
        if product is None:
            return ZERO
        monomial, q = product, q * only[1]
    if not _has_square(monomial):
        lone = _lone_poly(monomial)
        if lone is not None:
            return scale(lone, q)
        return Form({monomial: q})
    return _square(monomial, q)


def _guarded(f: Form) -> tuple[Monomial, Fraction]:
    """A sum as `factored` has it, 0 whatever it is multiplied with at coordinates where none of its terms is there."""
    m, q = factored(f)
    present = disjunction(conjunction(filter(_is_of_coordinates, t.brackets)) for t in f.terms)
    return Monomial(m.factors, m.exponent, {*m.brackets, *conjuncts(present)}), q


def _is_of_coordinates(b: Atom) -> bool:
    """Whether a bracket follows from coordinates and extents alone."""
    inside = (x for x in values_inside(b) if isinstance(x, Atom))
    return b.name != FILLED and all(x.kind in ("pred", "rank", "extent", "int") for x in inside)


def _lone_poly(m: Monomial) -> Form | None:
    """A monomial that is just a sum is that sum."""
    if m.atom is None or m.atom.kind != "poly":
        return None
    inner = m.atom.args[0]
    assert isinstance(inner, Form)
    return inner


def _has_square(m: Monomial) -> bool:
    return any(a.kind == "fn" and a.name in ("sqrt", "abs") and abs(p) >= 2 for a, p in m.factors)


def _square(m: Monomial, q: Fraction) -> Form:
    """abs(x)² = x², and sqrt(x)² = x where x is known not to be negative."""
    rest: list[tuple[Atom, int]] = []
    result = [Form({Monomial((), m.exponent, m.brackets): q})]
    for a, p in m.factors:
        inner = a.args[0] if a.args else None
        if a.kind == "fn" and a.name == "sqrt" and abs(p) >= 2 and isinstance(inner, Form) and nonnegative(inner):
            half = abs(p) // 2 * (1 if p > 0 else -1)
            result.append(power(inner, half))
            rest.append((a, p - 2 * half))
        elif a.kind == "fn" and a.name == "abs" and abs(p) >= 2 and isinstance(inner, Form):
            even = abs(p) // 2 * (2 if p > 0 else -2)
            result.append(power(inner, even))
            rest.append((a, p - even))
        else:
            rest.append((a, p))
    plain = Form({Monomial(rest): ONE_FRACTION})
    if len(result) == 1:
        return Form({m: q})
    return mul(plain, *result)


def factored(f: Form) -> tuple[Monomial, Fraction]:
    """A sum as content · poly(rest): common atoms, exponent terms, brackets and the leading coefficient come out."""
    masks = {m: q for m, q in f.terms.items() if is_mask(m) and q > 0}
    if masks and len(masks) < len(f.terms):
        return _factored_beside(f, masks)
    terms = list(f.terms.items())
    first, lead = terms[0]
    common = dict(first.factors)
    exponent = dict(first.exponent.terms) if first.exponent is not None else {}
    brackets = set(first.brackets)
    for m, _ in terms[1:]:
        powers = dict(m.factors)
        common = {
            a: min(p, powers[a]) if (p > 0) == (powers[a] > 0) and p > 0 else max(p, powers[a])
            for a, p in common.items()
            if a in powers and (p > 0) == (powers[a] > 0)
        }
        other = m.exponent.terms if m.exponent is not None else {}
        exponent = {t: q for t, q in exponent.items() if other.get(t) == q}
        brackets &= set(m.brackets)
    content = Monomial(common, Form(exponent) if exponent else None, brackets)
    rest: dict[Monomial, Fraction] = {}
    for m, q in terms:
        powers = dict(m.factors)
        for a, p in content.factors:
            powers[a] = powers.get(a, 0) - p
        shift = m.exponent or ZERO
        left = Monomial(
            powers,
            sub(shift, content.exponent) if content.exponent is not None else m.exponent,
            set(m.brackets) - brackets,
        )
        held = _lone_poly(left)
        for t, p in held.terms.items() if held is not None else ((left, ONE_FRACTION),):
            rest[t] = rest.get(t, ZERO_FRACTION) + p * q / lead
    inner = Form(rest)
    if not inner.terms:
        return ONE, ZERO_FRACTION
    if inner.single is None and len(inner.terms) == len(terms):
        # The sign and size of a poly are fixed, so that equal sums up to a factor are one atom.
        q = _size(scale(inner, lead)) / abs(lead)
        q = q if inner.terms[_leading(inner)] > 0 else -q
        own = Monomial([(poly(scale(inner, 1 / q)), 1)])
    else:
        # A sum within the sum was opened: other terms, other common factors.
        own, q = inner.single or factored(inner)
    product = times(content, own)
    assert product is not None
    return product, lead * q


def _leading(f: Form) -> Monomial:
    """The term whose sign a sum has: the one that varies most, then a number, as people write X - mu and 1 - p."""
    return max(f.terms, key=lambda m: (len(m.free), m.is_one))


def _size(f: Form) -> Fraction:
    """What a sum is divided by: the largest coefficient of a term that is no number, if that rounds none of the others.

    4 x + 2 -> 4 (x + 1/2), but 3 x + 1 stays: where x is nearly -1/3, an error of x + 1/3 is all that is left. And
    x/4 + b stays, as 4 b is infinite where b is a mask that adds the least number there is.
    """
    values = [q for m, q in f.terms.items() if m.factors or m.exponent is not None]
    size = max(map(abs, values or f.terms.values()))
    ratios = [abs(q) / size for q in f.terms.values()]
    exact = all(_is_exact(r) for r in ratios)
    # A literal such as the least finite number, which masks add, is to stay a number.
    return size if exact and (size >= 1 or max(ratios) <= LARGEST_F32) else ONE_FRACTION


def _is_exact(q: Fraction) -> bool:
    """Whether f32 holds a number, whatever its size."""
    n, d = q.numerator, q.denominator
    return d & (d - 1) == 0 and (n >> ((n & -n).bit_length() - 1)).bit_length() <= 24


def _factored_beside(f: Form, masks: Mapping[Monomial, Fraction]) -> tuple[Monomial, Fraction]:
    """Masks beside other terms: a positive content passes them by, as positive multiples of 0 and -inf are the same."""
    others = Form({m: q for m, q in f.terms.items() if m not in masks})
    content, q = others.single or factored(others)
    leaving = [(a, p) for a, p in content.factors if a.kind == "red" and is_positive(a)]
    # Under brackets an exponent may read what they alone let be read.
    leaves = content.exponent is not None and not (content.brackets and reads_computed_places(content.exponent))
    taken = Monomial(leaving, content.exponent if leaves else None)
    inside = None if leaves else content.exponent
    left = Monomial([f for f in content.factors if f not in leaving], inside, content.brackets)
    rest = add(mul(Form({left: ONE_FRACTION if q > 0 else -ONE_FRACTION})), Form(masks))
    product = times(taken, Monomial([(poly(rest), 1)]))
    assert product is not None
    return product, abs(q)


def reads_computed_places(v: Atom | Form) -> bool:
    """Whether a value reads a tensor at an index that is not just a rank."""
    reads = (x for x in values_inside(v) if isinstance(x, Atom))
    indices = (i for x in reads if x.kind == "access" or x.name.startswith("access:") for i in x.args)
    return any(not isinstance(i, Form) or i.atom is None or i.atom.kind != "rank" for i in indices)


def is_positive(a: Atom) -> bool:
    """Whether an atom is known to be above 0: a sum of exponentials."""
    body = a.args[0] if a.kind in ("red", "poly") and a.args and a.name in ("sum", "") else None
    if not isinstance(body, Form):
        return a.kind == "ln2"
    return bool(body.terms) and all(
        q > 0 and m.exponent is not None and not m.brackets and all(is_positive(b) for b, _ in m.factors)
        for m, q in body.terms.items()
    )


def poly(f: Form) -> Atom:
    """A sum as one atom."""
    return Atom("poly", "", (f,), nonnegative=nonnegative(f))


def power(f: Form, n: int) -> Form:
    """An integer power. A negative power of something bracketed stays opaque: 1/0 outside the bracket is no select."""
    if n == 0:
        return UNIT
    if not f.terms:
        return ZERO if n > 0 else lift(Atom("fn", "div", (UNIT, ZERO)))
    m, q = f.single or factored(f)
    if n < 0 and m.brackets:
        return power_of_opaque(f, n)
    exponent = scale(m.exponent, Fraction(n)) if m.exponent is not None else None
    result = Monomial([(a, p * n) for a, p in m.factors], exponent, m.brackets)
    return mul(Form({result: Fraction(q) ** n}))


def power_of_opaque(f: Form, n: int) -> Form:
    """A negative power of something whose parts stay together: ``(1 / f)^-n``."""
    inverse = Atom("fn", "div", (UNIT, f))
    return Form({Monomial([(inverse, -n)]): ONE_FRACTION})


def div(a: Form, b: Form) -> Form:
    """``a / b``."""
    return mul(a, power(b, -1))


def nonnegative(f: Form) -> bool:
    """Whether a value is known not to be negative (NaN aside)."""
    return all(q > 0 and _monomial_nonnegative(m) for m, q in f.terms.items())


def _monomial_nonnegative(m: Monomial) -> bool:
    return all(p % 2 == 0 or atom_nonnegative(a) for a, p in m.factors)


def atom_nonnegative(a: Atom) -> bool:
    """Whether an atom is known not to be negative (NaN aside)."""
    if a.nonnegative or a.kind in ("extent", "rank", "inf", "ln2"):
        return True
    if a.kind == "fn" and a.name in OPS:
        if OPS[a.name].nonnegative:
            return True
        if a.name == "maximum":
            return any(isinstance(x, Form) and nonnegative(x) for x in a.args)
        if a.name == "minimum":
            return all(isinstance(x, Form) and nonnegative(x) for x in a.args)
    if a.kind == "red" and a.name in ("sum", "prod", "min", "max"):
        return all(isinstance(x, Form) and nonnegative(x) for x in a.args)
    return a.kind == "cast" and isinstance(a.args[0], Form) and nonnegative(a.args[0])


def select(p: Atom, a: Form, b: Form) -> Form:
    """``where(p, a, b)``: a literal -inf branch becomes lbr, any other pair two brackets."""
    minus = const(-math.inf)
    if p == TRUE or a == b:
        return a
    if p == FALSE:
        # What a mask leaves out stays marked as that, unlike -inf in the data.
        return lift(lbr(p)) if b == minus else b
    if b == minus:
        return masked(a, [p])
    if a == minus:
        return masked(b, [negate(p)])
    return add(bracketed(p, a), bracketed(negate(p), b))


def masked(f: Form, conditions: Iterable[Atom]) -> Form:
    """``where(p, f, -inf)``: what f reads stays under the condition, as ``[p] f + lbr(p)``."""
    p = conjunction(conditions)
    return f if p == TRUE else add(bracketed(p, f), lift(lbr(p)))


def bracketed(p: Atom, f: Form) -> Form:
    """[p] · f, term by term."""
    mask = bracket(p)
    if not mask.terms:
        return ZERO
    (m, _) = next(iter(mask.terms.items()))
    terms: dict[Monomial, Fraction] = {}
    for t, q in f.terms.items():
        product = times(m, t)
        if product is not None:
            terms[product] = terms.get(product, ZERO_FRACTION) + q
    return Form(terms)
