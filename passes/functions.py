"""Functions of forms, opened where a rule knows how: exponentials, logarithms, roots; sums of scaled values."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from fractions import Fraction

from ..ir.ops import OPS
from .brackets import TRUE, compare, conjunction, conjuncts, disjunction, negate, pred
from .emptiness import filled, is_mask
from .forms import LN2, ONE_FRACTION, ZERO, Atom, Form, Monomial, add, lift, scale, sub
from .normal import atom_nonnegative, bracketed, const, factored, masked, mul, nonnegative, power, reads_computed_places


def exp(f: Form) -> Form:
    """exp of a form: brackets come out of lbr, integer multiples of logarithms become powers."""
    exponent: dict[Monomial, Fraction] = {}
    f, brackets = _unmasked(f)
    product: list[Form] = []
    for m, q in f.terms.items():
        only = m.atom
        positive = all(atom_nonnegative(a) or p % 2 == 0 for a, p in m.factors if a.kind != "lbr")
        masks = [a for a, p in m.factors if a.kind == "lbr" and p == 1]
        if masks and q > 0 and positive and m.exponent is None:
            # A positive multiple of 0 or -inf is the same 0 or -inf.
            for mask in masks:
                brackets += conjuncts(_passes(mask, m.brackets))
        elif only is not None and only.kind == "inf":
            if q < 0:
                return ZERO
            return lift(Atom("inf", "inf"))
        elif (
            only is not None and only.kind == "fn" and only.name == "log" and q.denominator == 1 and _log_is_total(only)
        ):
            inner = only.args[0]
            assert isinstance(inner, Form)
            product.append(power(inner, int(q)))
        else:
            exponent[m] = q
    # Under its own brackets the exponent needs none of them.
    passed = set(brackets)
    bare = add(*(Form({Monomial(m.factors, m.exponent, set(m.brackets) - passed): q}) for m, q in exponent.items()))
    return mul(Form({Monomial((), bare if bare.terms else None, brackets): ONE_FRACTION}), *product)


def _unmasked(f: Form) -> tuple[Form, list[Atom]]:
    """An exponent with its masks in the open: multiplied out where the factor is positive, else as a condition.

    exp(abs(s) * (a + lbr(p)))  ->  exp(abs(s) * a + lbr(p))
    exp(s * (a + lbr(p)))       ->  [p or not 0 < s] exp(s * (a + lbr(p)))
    """
    terms: list[Form] = []
    conditions: list[Atom] = []
    for m, q in f.terms.items():
        found = [a for a, p in m.factors if p == 1 and a.kind == "poly" and any(map(is_mask, _terms(a)))]
        if len(found) != 1 or m.exponent is not None:
            terms.append(Form({m: q}))
            continue
        rest = Form({Monomial([x for x in m.factors if x[0] != found[0]], None, m.brackets): q})
        if nonnegative(rest):
            terms += [mul(rest, Form({t: n})) for t, n in _terms(found[0]).items()]
            continue
        passed = conjunction(p for t in _terms(found[0]) if is_mask(t) for p in conjuncts(t.factors[0][0].args[0]))
        conditions.append(_asked(m.brackets, disjunction([passed, negate(compare("lt", ZERO, rest, integer=False))])))
        terms.append(Form({m: q}))
    return add(*terms), [p for c in conditions for p in conjuncts(c)]


def _passes(mask: Atom, brackets: Iterable[Atom]) -> Atom:
    """Where a mask leaves nothing out: where its condition holds, or where a bracket says that it is not looked at."""
    condition = mask.args[0]
    assert isinstance(condition, Atom)
    return _asked(brackets, disjunction([condition, *(negate(b) for b in brackets)]))


def _asked(brackets: Iterable[Atom], p: Atom) -> Atom:
    """A condition that holds outside the brackets anyway, asked within them alone where they may keep it in bounds."""
    around = conjunction(brackets)
    return pred("where", around, p, TRUE) if around != TRUE and reads_computed_places(p) else p


def _terms(a: Atom) -> dict[Monomial, Fraction]:
    inner = a.args[0]
    assert isinstance(inner, Form)
    return inner.terms


def _log_is_total(a: Atom) -> bool:
    inner = a.args[0]
    return isinstance(inner, Form) and nonnegative(inner)


def log(f: Form) -> Form:
    """log of a form: its exponential, its brackets and its non-negative factors come out."""
    if not f.terms:
        return const(-math.inf)
    m, q = f.single or factored(f)
    if q <= 0:
        return lift(Atom("fn", "log", (f,)))
    parts: list[Form] = []
    inside: list[tuple[Atom, int]] = []
    for a, p in m.factors:
        if atom_nonnegative(a):
            parts.append(scale(log_atom(a), Fraction(p)))
        else:
            inside.append((a, p))
    if m.exponent is not None:
        parts.append(m.exponent)
    if q != 1:
        parts.append(const(math.log(q)))
    if len(inside) == 1 and inside[0][1] == 1 and inside[0][0].kind == "poly":
        parts.append(log_atom(inside[0][0]))
    elif inside:
        parts.append(lift(Atom("fn", "log", (Form({Monomial(inside): ONE_FRACTION}),))))
    return masked(add(*parts), m.brackets)


def log_atom(a: Atom) -> Form:
    if a.kind == "ln2":
        return const(math.log(LN2))
    if a.kind == "fn" and a.name == "sqrt" and isinstance(a.args[0], Form):
        return scale(log(a.args[0]), Fraction(1, 2))
    inner = a.args[0] if a.kind == "poly" else lift(a)
    return lift(Atom("fn", "log", (inner,)))


def function(name: str, args: tuple[Form, ...]) -> Form:
    """A scalar function: opened where a rule knows how, else an atom. Masks pass where f(-inf) or f(0) lets them."""
    simple: dict[str, Callable[..., Form]] = {"exp": exp, "log": log}
    if name in simple:
        return simple[name](args[0])
    ln2 = const(LN2)
    number = args[0].constant
    match name:
        case "floor" | "round" if number is not None:
            return const(math.floor(number) if name == "floor" else round(number))
        case "exp2":
            # Term by term, so that a mask among them is one still.
            return exp(add(*(mul(ln2, Form({m: q})) for m, q in args[0].terms.items())))
        case "log2":
            return mul(log(args[0]), power(ln2, -1))
        case "sqrt":
            return _sqrt(args[0])
        case "rsqrt":
            return power(_sqrt(args[0]), -1)
        case "abs" if nonnegative(args[0]):
            return args[0]
        case "abs":
            m, q = args[0].single or factored(args[0])
            inner = [(a, p) for a, p in m.factors if not atom_nonnegative(a)]
            outer = Form(
                {Monomial([(a, p) for a, p in m.factors if atom_nonnegative(a)], m.exponent, m.brackets): abs(q)}
            )
            if inner == list(m.factors) and abs(q) == 1 and m.exponent is None and not m.brackets:
                return lift(Atom("fn", "abs", (scale(args[0], 1 / q) if q < 0 else args[0],)))
            return mul(outer, lift(Atom("fn", "abs", (Form({Monomial(inner): ONE_FRACTION}),)))) if inner else outer
        case "maximum" | "minimum":
            return _extreme(name, *sorted(args, key=lambda f: f.digest))
    if len(args) == 1 and name in OPS and OPS[name].at_neg_inf == 0.0:
        bare, passed = _opened(args[0])
        if passed != TRUE:
            return bracketed(passed, function(name, (bare,)))
    return lift(Atom("fn", name, args))


def _opened(f: Form) -> tuple[Form, Atom]:
    """A form without its masks, and where they leave nothing out."""
    masks = [m for m, q in f.terms.items() if q > 0 and is_mask(Monomial(m.factors, m.exponent))]
    bare = Form({m: q for m, q in f.terms.items() if m not in masks})
    return bare, conjunction(_passes(m.factors[0][0], m.brackets) for m in masks)


def _extreme(name: str, a: Form, b: Form) -> Form:
    """The greater or lesser of two: the lesser is masked where either is, the greater where both are.

    minimum(a + lbr(p), b)  ->  minimum(a, b) + lbr(p)
    """
    if a == b:
        return a
    (bare, p), (other, q) = _opened(a), _opened(b)
    if name == "minimum" and (p != TRUE or q != TRUE):
        return masked(_extreme(name, *sorted((bare, other), key=lambda f: f.digest)), [p, q])
    atom = lift(Atom("fn", name, (a, b)))
    return atom if p == TRUE or q == TRUE else masked(atom, [disjunction([p, q])])


def _sqrt(f: Form) -> Form:
    c = f.constant
    if c is not None and c >= 0:
        root = math.isqrt(c.numerator), math.isqrt(c.denominator)
        if root[0] ** 2 == c.numerator and root[1] ** 2 == c.denominator:
            return const(Fraction(*root))
    only = f.single
    if only is not None and nonnegative(f):
        m, q = only
        even = [(a, p // 2) for a, p in m.factors if p % 2 == 0 and atom_nonnegative(a)]
        odd = [(a, p) for a, p in m.factors if not (p % 2 == 0 and atom_nonnegative(a))]
        exponent = scale(m.exponent, Fraction(1, 2)) if m.exponent is not None else None
        outer = Form({Monomial(even, exponent, m.brackets): ONE_FRACTION})
        if not odd and q == 1:
            return outer
        return mul(outer, lift(Atom("fn", "sqrt", (Form({Monomial(odd): q}),))))
    return lift(Atom("fn", "sqrt", (f,)))


def aligned(f: Form, scaled: Callable[[Form], bool] = lambda e: True) -> Form:
    """A sum of exponentials brought to the greatest of their exponents, which comes out as a factor.

    ``a exp(x) + b exp(y)`` -> ``exp(m) (a exp(x - m) + b exp(y - m))`` with ``m = maximum(x, y)``, where one of the
    exponents is ``scaled``.
    """
    masks = Form({m: q for m, q in f.terms.items() if is_mask(m)})
    others = Form({m: q for m, q in f.terms.items() if m not in masks.terms})
    scales = {e.digest: e for m in others.terms if (e := m.exponent or ZERO) is not None}
    if len(scales) < 2 and not (len(others.terms) > 1 and masks.terms):
        return f
    if len(others.terms) < 2 or not any(e.terms and scaled(e) for e in scales.values()):
        return f
    top: Form | None = None
    for digest in sorted(scales):
        # Where conditions leave none of its terms, an exponent may be no number: that less the maximum of nothing. Of
        # one maximum of nothing less another, the sums beside them tell.
        each = scales[digest]
        if each.terms:
            mine = (m for m in others.terms if m.exponent == each)
            told = any(q < 0 for q in each.terms.values())
            each = masked(each, [disjunction(_counting(m) if told else conjunction(m.brackets) for m in mine)])
        top = each if top is None else function("maximum", (top, each))
    assert top is not None
    terms = [
        mul(Form({Monomial(m.factors, None, m.brackets): q}), exp(sub(m.exponent or ZERO, top)))
        for m, q in others.terms.items()
    ]
    inner = add(*terms, masks)
    # Where all of the exponents are -inf, so is the greatest, and -inf - -inf is no number: lowering asks for it.
    asked = () if nonnegative(top) else (top,)
    return mul(exp(top), lift(Atom("aligned", "", (inner, *asked), nonnegative=nonnegative(inner))))


def _counting(m: Monomial) -> Atom:
    """Where a term is not 0, as its conditions and the sums in it tell."""
    sums = (a for a, p in m.factors if p > 0 and filled(a) is not None)
    return conjunction([*m.brackets, *(compare("ne", lift(a), ZERO, integer=False) for a in sums)])
