"""Normal forms: the algebra in which the passes compute.

A `Form` is a sum of monomials with rational coefficients. A monomial is a product of atoms with integer powers, one
exponential of a form, and a set of Iverson brackets: ``c · a² b⁻¹ · exp(e) · [p][q]``. Products of sums stay
factored: a sum becomes one atom, so nothing explodes unless a rewrite asks for it. Constructors simplify as they
build, bottom up, so there is no search and equal values get equal digests. Integer arithmetic that may wrap, and
functions that no rule opens, are opaque atoms.

Brackets are selects: where ``p`` is false the monomial is 0 whatever its other factors are. ``lbr(p)`` is the
logarithm of a bracket, 0 or -inf; ``where(p, a, -inf)`` is ``a + lbr(p)``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from fractions import Fraction
from hashlib import blake2b
from typing import Any

from ..ir.ops import OPS

LN2 = math.log(2.0)
ZERO_FRACTION: Fraction = Fraction(0)
ONE_FRACTION: Fraction = Fraction(1)


def _digest(*parts: Any) -> bytes:
    h = blake2b(digest_size=16)
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode()
        h.update(len(data).to_bytes(4, "little"))
        h.update(data)
    return h.digest()


class Atom:
    """A value that the algebra does not look into, with what it must know: its free ranks, the ranks reduced inside.

    ``kind`` is one of: "access" (name: tensor, args: indices), "rank", "extent", "ln2", "inf", "fn" (name: operation),
    "cast" (name: dtype), "red" (name: reduction, ranks: what it binds, args: its bodies), "poly" (args: one sum),
    "aligned" (args: a sum of scaled values, whose common scale stays where it is), "lbr" (args: one predicate), and for
    integers and predicates "int" and "pred" (name: operation).
    """

    __slots__ = ("args", "digest", "dtype", "free", "kind", "name", "nonnegative", "ranks", "reduced")
    free: frozenset[str]
    reduced: frozenset[str]
    digest: bytes

    def __init__(
        self,
        kind: str,
        name: str,
        args: tuple[Value, ...] = (),
        ranks: tuple[str, ...] = (),
        dtype: str = "f32",
        reduced: frozenset[str] = frozenset(),
        nonnegative: bool = False,
    ) -> None:
        self.kind, self.name, self.args, self.ranks, self.dtype = kind, name, args, ranks, dtype
        self.nonnegative = nonnegative
        free = frozenset().union(*(a.free for a in args))
        self.free = free | {name} if kind == "rank" else free - set(ranks)
        self.reduced = frozenset(ranks).union(reduced, *(a.reduced for a in args))
        self.digest = _digest(kind, name, dtype, *ranks, *(a.digest for a in args))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Atom) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        from .lower import show

        return show(self)


class Monomial:
    """``Π atom^power · exp(exponent) · Π [bracket]``, without its coefficient."""

    __slots__ = ("brackets", "digest", "exponent", "factors", "free", "reduced")
    free: frozenset[str]
    reduced: frozenset[str]
    digest: bytes

    def __init__(
        self,
        factors: Mapping[Atom, int] | Iterable[tuple[Atom, int]] = (),
        exponent: Form | None = None,
        brackets: Iterable[Atom] = (),
    ) -> None:
        items = factors.items() if isinstance(factors, Mapping) else factors
        self.factors = tuple(sorted(((a, p) for a, p in items if p), key=lambda f: f[0].digest))
        self.exponent = exponent if exponent is not None and exponent.terms else None
        self.brackets = tuple(sorted(set(brackets), key=lambda b: b.digest))
        parts: list[Value] = [a for a, _ in self.factors]
        parts += [self.exponent] if self.exponent is not None else []
        parts += self.brackets
        self.free = frozenset().union(*(p.free for p in parts))
        self.reduced = frozenset().union(*(p.reduced for p in parts))
        self.digest = _digest(
            "monomial",
            *(x for a, p in self.factors for x in (a.digest, p)),
            "exp",
            self.exponent.digest if self.exponent is not None else b"",
            *(b.digest for b in self.brackets),
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Monomial) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    @property
    def is_one(self) -> bool:
        return not (self.factors or self.brackets or self.exponent is not None)


class Form:
    """A sum of monomials: ``{monomial: coefficient}``. The empty sum is 0."""

    __slots__ = ("digest", "free", "reduced", "terms")
    free: frozenset[str]
    reduced: frozenset[str]
    digest: bytes

    def __init__(self, terms: Mapping[Monomial, Fraction]) -> None:
        kept = [(m, q) for m, q in terms.items() if q]
        kept.sort(key=lambda t: t[0].digest)
        self.terms: dict[Monomial, Fraction] = dict(kept)
        self.free = frozenset().union(*(m.free for m in self.terms))
        self.reduced = frozenset().union(*(m.reduced for m in self.terms))
        self.digest = _digest("form", *(x for m, q in kept for x in (m.digest, q)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Form) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        from .lower import show

        return show(self)

    @property
    def single(self) -> tuple[Monomial, Fraction] | None:
        """The only term, or None for 0 and for sums."""
        return next(iter(self.terms.items())) if len(self.terms) == 1 else None

    @property
    def constant(self) -> Fraction | None:
        """The number that the form is, or None."""
        if not self.terms:
            return ZERO_FRACTION
        only = self.single
        return only[1] if only is not None and only[0].is_one else None

    @property
    def atom(self) -> Atom | None:
        """The one atom that the form is, or None."""
        only = self.single
        if only is None or only[1] != 1:
            return None
        m = only[0]
        plain = len(m.factors) == 1 and m.factors[0][1] == 1 and m.exponent is None and not m.brackets
        return m.factors[0][0] if plain else None


Value = Atom | Form

ONE = Monomial()
ZERO = Form({})
UNIT = Form({ONE: ONE_FRACTION})


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


def lift(a: Atom) -> Form:
    return Form({Monomial([(a, 1)]): ONE_FRACTION})


def add(*forms: Form) -> Form:
    terms: dict[Monomial, Fraction] = {}
    for f in forms:
        for m, q in f.terms.items():
            terms[m] = terms.get(m, ZERO_FRACTION) + q
    return Form(terms)


def scale(f: Form, by: Fraction) -> Form:
    return Form({m: q * by for m, q in f.terms.items()})


def neg(f: Form) -> Form:
    return scale(f, -ONE_FRACTION)


def sub(a: Form, b: Form) -> Form:
    return add(a, neg(b))


def times(a: Monomial, b: Monomial) -> Monomial | None:
    """The product of two monomials; None where their brackets contradict, so that it is 0."""
    factors = dict(a.factors)
    for atom, power in b.factors:
        factors[atom] = factors.get(atom, 0) + power
    brackets = set(a.brackets) | set(b.brackets)
    if any(negate(p) in brackets for p in brackets):
        return None
    exponent = a.exponent or b.exponent
    if a.exponent is not None and b.exponent is not None:
        exponent = add(a.exponent, b.exponent)
    return Monomial(factors, exponent, brackets)


def mul(*forms: Form) -> Form:
    """A product. Constants distribute; a sum joins as one factor: its content times a "poly" atom."""
    monomial, q = ONE, ONE_FRACTION
    for f in forms:
        if not f.terms:
            return ZERO
        only = f.single or factored(f)
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


def _lone_poly(m: Monomial) -> Form | None:
    """A monomial that is just a sum is that sum."""
    if len(m.factors) == 1 and m.factors[0][1] == 1 and m.exponent is None and not m.brackets:
        atom = m.factors[0][0]
        if atom.kind == "poly":
            inner = atom.args[0]
            assert isinstance(inner, Form)
            return inner
    return None


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
        # The sign and size of a poly are fixed by its first term, so that equal sums up to a factor are one atom.
        first_left = next(iter(inner.terms.values()))
        own, q = Monomial([(poly(scale(inner, 1 / first_left)), 1)]), first_left
    else:
        # A sum within the sum was opened: other terms, other common factors.
        own, q = inner.single or factored(inner)
    product = times(content, own)
    assert product is not None
    return product, lead * q


def is_mask(m: Monomial) -> bool:
    """Whether a monomial is 0 or -inf and nothing else."""
    return len(m.factors) == 1 and m.factors[0][0].kind == "lbr" and m.exponent is None and not m.brackets


def _factored_beside(f: Form, masks: Mapping[Monomial, Fraction]) -> tuple[Monomial, Fraction]:
    """Masks beside other terms: a positive content passes them by, as positive multiples of 0 and -inf are the same."""
    others = Form({m: q for m, q in f.terms.items() if m not in masks})
    content, q = others.single or factored(others)
    leaving = [(a, p) for a, p in content.factors if a.kind == "red" and _is_positive(a)]
    taken = Monomial(leaving, content.exponent)
    left = Monomial([f for f in content.factors if f not in leaving], None, content.brackets)
    rest = add(mul(Form({left: ONE_FRACTION if q > 0 else -ONE_FRACTION})), Form(masks))
    product = times(taken, Monomial([(poly(rest), 1)]))
    assert product is not None
    return product, abs(q)


def _is_positive(a: Atom) -> bool:
    """Whether an atom is known to be above 0: a sum of exponentials."""
    body = a.args[0] if a.kind in ("red", "poly") and a.args and a.name in ("sum", "") else None
    if not isinstance(body, Form):
        return a.kind == "ln2"
    return bool(body.terms) and all(
        q > 0 and m.exponent is not None and not m.brackets and all(_is_positive(b) for b, _ in m.factors)
        for m, q in body.terms.items()
    )


def poly(f: Form) -> Atom:
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
    inverse = Atom("fn", "div", (UNIT, f))
    return Form({Monomial([(inverse, -n)]): ONE_FRACTION})


def div(a: Form, b: Form) -> Form:
    return mul(a, power(b, -1))


# Signs


def nonnegative(f: Form) -> bool:
    """Whether a value is known not to be negative (NaN aside)."""
    return all(q > 0 and _monomial_nonnegative(m) for m, q in f.terms.items())


def _monomial_nonnegative(m: Monomial) -> bool:
    return all(p % 2 == 0 or atom_nonnegative(a) for a, p in m.factors)


def atom_nonnegative(a: Atom) -> bool:
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


# Exponentials and logarithms


def exp(f: Form) -> Form:
    """exp of a form: brackets come out of lbr, integer multiples of logarithms become powers."""
    exponent: dict[Monomial, Fraction] = {}
    brackets: list[Atom] = []
    product: list[Form] = []
    for m, q in f.terms.items():
        only = (
            m.factors[0][0]
            if len(m.factors) == 1 and m.factors[0][1] == 1 and m.exponent is None and not m.brackets
            else None
        )
        positive = all(atom_nonnegative(a) or p % 2 == 0 for a, p in m.factors if a.kind != "lbr")
        masks = [a for a, p in m.factors if a.kind == "lbr" and p == 1]
        if masks and q > 0 and positive and m.exponent is None:
            # A positive multiple of 0 or -inf is the same 0 or -inf.
            for mask in masks:
                brackets += conjuncts(mask.args[0])
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
    parts += [lift(lbr(p)) for p in m.brackets]
    if q != 1:
        parts.append(const(math.log(q)))
    if len(inside) == 1 and inside[0][1] == 1 and inside[0][0].kind == "poly":
        parts.append(log_atom(inside[0][0]))
    elif inside:
        parts.append(lift(Atom("fn", "log", (Form({Monomial(inside): ONE_FRACTION}),))))
    return add(*parts)


def log_atom(a: Atom) -> Form:
    if a.kind == "ln2":
        return const(math.log(LN2))
    if a.kind == "fn" and a.name == "sqrt" and isinstance(a.args[0], Form):
        return scale(log(a.args[0]), Fraction(1, 2))
    inner = a.args[0] if a.kind == "poly" else lift(a)
    return lift(Atom("fn", "log", (inner,)))


# Predicates


def lbr(p: Atom) -> Atom:
    return Atom("lbr", "", (p,))


def pred(name: str, *args: Value, **kwargs: Any) -> Atom:
    return Atom("pred", name, args, dtype="bool", **kwargs)


TRUE, FALSE = pred("true"), pred("false")


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
    return pred(op, _drop_positive(a, b), _drop_positive(b, a))


def _primitive(f: Form) -> bool:
    return len({abs(q) for q in f.terms.values()}) == 1


def _drop_positive(f: Form, other: Form) -> Form:
    """In a comparison with 0, positive factors do not matter."""
    if other.terms or f.single is None:
        return f
    m, q = f.single
    if m.exponent is None:
        return f
    return Form({Monomial(m.factors, None, m.brackets): ONE_FRACTION if q > 0 else -ONE_FRACTION})


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
    flat = {q for p in parts for q in conjuncts(p)} - {TRUE}
    if FALSE in flat or any(negate(p) in flat for p in flat):
        return FALSE
    ordered = sorted(flat, key=lambda p: p.digest)
    return TRUE if not ordered else ordered[0] if len(ordered) == 1 else pred("and", *ordered)


def disjunction(parts: Iterable[Atom]) -> Atom:
    flat: set[Atom] = set()
    for p in parts:
        flat |= {a for a in p.args if isinstance(a, Atom)} if p.name == "or" else {p}
    flat -= {FALSE}
    if TRUE in flat or any(negate(p) in flat for p in flat):
        return TRUE
    ordered = sorted(flat, key=lambda p: p.digest)
    return FALSE if not ordered else ordered[0] if len(ordered) == 1 else pred("or", *ordered)


def conjuncts(p: Value) -> list[Atom]:
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


# Functions


def function(name: str, args: tuple[Form, ...]) -> Form:
    """A scalar function: opened where a rule knows how, else an atom. Masks pass where f(-inf) or f(0) lets them."""
    simple: dict[str, Callable[..., Form]] = {"exp": exp, "log": log}
    if name in simple:
        return simple[name](args[0])
    ln2 = const(LN2)
    match name:
        case "exp2":
            return exp(mul(ln2, args[0]))
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
            first, second = sorted(args, key=lambda f: f.digest)
            return first if first == second else lift(Atom("fn", name, (first, second)))
    if len(args) == 1 and name in OPS and OPS[name].at_neg_inf == 0.0:
        masks = [a for m in args[0].terms for a, p in m.factors if a.kind == "lbr" and p == 1 and len(m.factors) == 1]
        if masks:
            bare = Form({m: q for m, q in args[0].terms.items() if not any(a.kind == "lbr" for a, _ in m.factors)})
            return bracketed(conjunction(p for a in masks for p in conjuncts(a.args[0])), function(name, (bare,)))
    return lift(Atom("fn", name, args))


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


# Sums of scaled values


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
    every = [scales[d] for d in sorted(scales)]
    top = every[0]
    for e in every[1:]:
        top = function("maximum", (top, e))
    terms = [
        mul(Form({Monomial(m.factors, None, m.brackets): q}), exp(sub(m.exponent or ZERO, top)))
        for m, q in others.terms.items()
    ]
    inner = add(*terms, masks)
    return mul(exp(top), lift(Atom("aligned", "", (inner,), nonnegative=nonnegative(inner))))


# Walking and substitution


def parts_of(v: Value) -> Iterable[Value]:
    """What a value is made of, one level down: an atom's arguments; a form's atoms, brackets and exponents."""
    if isinstance(v, Atom):
        yield from v.args
        return
    for m in v.terms:
        yield from (a for a, _ in m.factors)
        yield from m.brackets
        if m.exponent is not None:
            yield m.exponent


def values_inside(
    *roots: Value, into: Callable[[Value], bool] = lambda v: True, parts: Callable[[Value], Iterable[Value]] = parts_of
) -> Iterator[Value]:
    """Every value inside the roots, themselves included, once each; ``into`` says whose ``parts`` are gone into."""
    seen: set[bytes] = set()
    stack: list[Value] = list(roots)
    while stack:
        v = stack.pop()
        if v.digest in seen:
            continue
        seen.add(v.digest)
        yield v
        if into(v):
            stack.extend(parts(v))


def rewrite(value: Value, f: Callable[[Atom], Form | Atom | None], memo: dict[bytes, Value]) -> Value:
    """Rebuild a value bottom up with simplification; ``f`` may replace an atom (None: keep and go inside)."""
    found = memo.get(value.digest)
    if found is not None:
        return found
    result: Value
    if isinstance(value, Form):
        result = _rewrite_form(value, f, memo)
    else:
        result = _rewrite_atom(value, f, memo)
    memo[value.digest] = result
    return result


def _rewrite_form(value: Form, f: Callable[[Atom], Form | Atom | None], memo: dict[bytes, Value]) -> Form:
    if all(rewrite(part, f, memo).digest == part.digest for part in parts_of(value)):
        return value
    parts = []
    for m, q in value.terms.items():
        factors = [power(_as_form(rewrite(a, f, memo)), p) for a, p in m.factors]
        if m.exponent is not None:
            factors.append(exp(_as_form(rewrite(m.exponent, f, memo))))
        product = mul(const(q), *factors)
        for b in m.brackets:
            p = rewrite(b, f, memo)
            assert isinstance(p, Atom)
            product = bracketed(p, product)
        parts.append(product)
    return add(*parts)


def _as_form(v: Value) -> Form:
    return v if isinstance(v, Form) else lift(v)


def _rewrite_atom(a: Atom, f: Callable[[Atom], Form | Atom | None], memo: dict[bytes, Value]) -> Value:
    new = f(a)
    if new is not None:
        return new
    if not a.args:
        return a
    args = tuple(rewrite(x, f, memo) for x in a.args)
    if all(x.digest == y.digest for x, y in zip(args, a.args, strict=True)):
        return a
    return remake(a, args)


def remake(a: Atom, args: tuple[Value, ...]) -> Value:
    """The same atom over other arguments, simplified anew."""
    if a.kind == "poly":
        return args[0]
    if a.kind == "fn" and a.name != "div":
        return function(a.name, tuple(_as_form(x) for x in args))
    if a.kind == "fn":
        return div(_as_form(args[0]), _as_form(args[1]))
    if a.kind == "pred" and a.name in ("and", "or", "not"):
        parts = [x for x in args if isinstance(x, Atom)]
        return negate(parts[0]) if a.name == "not" else conjunction(parts) if a.name == "and" else disjunction(parts)
    if a.kind == "pred" and a.name in ("ge0", "eq0"):
        c = _as_form(args[0]).constant
        if c is not None:
            return TRUE if (c >= 0 if a.name == "ge0" else c == 0) else FALSE
    return Atom(a.kind, a.name, args, a.ranks, a.dtype, a.reduced, a.nonnegative)
