"""Normal forms back to expressions: readable text, types intact, brackets as selects.

What each reduction becomes is the caller's choice: an access to a tensor that holds it, or the reduction in place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fractions import Fraction

from ..ir.cascade import Call, Const, Expr
from ..ir.print import print_expr
from .brackets import conjuncts, negate
from .emptiness import filled, is_unmasked, nothing_over
from .forms import LN2, ONE_FRACTION, Atom, Form, Monomial, Value, add, scale, values_inside
from .integers import in_64_bits, is_integral, may_be_integral
from .lower_atoms import MINUS_INF, Atoms, Hook, as_form, call, either, literal, zero
from .normal import LARGEST_F32, SMALLEST_F32, atom_nonnegative

# ln 2 in three parts, the first two so short that their products with an exponent up to 2^17 are exact in f32.
LN2_PARTS = (0.6875, 0.005615234375, LN2 - 0.6875 - 0.005615234375)


def show(v: Value) -> str:
    """A value as people read it, reductions in place."""
    return print_expr(Lowering().value(v))


def held_in_place(a: Atom) -> str:
    """The key of a reduction without a tensor of its own among those whose zeros mean "nothing came"."""
    return a.digest.hex()


class Lowering(Atoms):
    """Turns values into expressions.

    ``hook`` sees atoms first; ``guarded`` names tensors whose zeros mean "nothing came", and reductions in place, with
    the gauge of each that has one; None guards nothing. ``named`` and ``negated`` find the tensor that holds a value or
    its negative; ``emptied`` has the ranks that tensors which no mask empties were reduced over. ``room`` is how deep
    atoms may nest before an ellipsis stands for them.
    """

    def __init__(
        self,
        hook: Hook | None = None,
        guarded: Mapping[str, Form | None] | None = None,
        exponents: frozenset[str] = frozenset(),
        named: Callable[[Form], Expr | None] | None = None,
        room: int | None = None,
        negated: Callable[[Form], Expr | None] | None = None,
        emptied: Mapping[str, tuple[str, ...]] | None = None,
    ) -> None:
        self.hook = hook
        self.named = named
        self.negated = negated
        self.room = room
        self.guarded = guarded
        self.emptied = emptied or {}
        self.exponents = exponents

    # Sums

    def form(self, f: Form, *, whole: bool | None = None) -> Expr:
        """A form; ``whole`` says that integers are wanted, None that it is one if it can be.

        A float that is to become an integer is computed as the float that it is.
        """
        if not f.terms:
            return Const(0)
        if self.named is not None and (found := self.named(f)) is not None:
            return found
        if whole is None:
            # A number alone may be a float: 2^63 is one that no integer is.
            number = f.constant
            whole = is_integral(f) and (number is None or -(1 << 63) < number < 1 << 63)
        return self._masked(list(f.terms.items()), whole and may_be_integral(f))

    def _masked(self, every: list[tuple[Monomial, Fraction]], whole: bool) -> Expr:
        """A sum, or -inf where one of its masks leaves it out: what it reads stands under the masks."""
        masks = [a for m, q in every if (a := _mask(m, q)) is not None]
        passed = {p for a in masks for p in conjuncts(a.args[0])}
        # Under a mask, what it masks needs no bracket of its own.
        terms = [
            (Monomial(m.factors, m.exponent, set(m.brackets) - passed) if passed else m, q)
            for m, q in every
            if _mask(m, q) is None
        ]
        e = self._sum(terms, whole) if terms else zero(masks)
        if masks:
            e = self._where([p for a in masks for p in a.args if isinstance(p, Atom)], e, MINUS_INF)
        return e

    def _sum(self, terms: list[tuple[Monomial, Fraction]], whole: bool) -> Expr:
        terms = in_64_bits(terms) if whole else terms
        multiple = self._multiple(terms) if len(terms) > 1 else None
        if multiple is not None:
            return self._reduced(terms, *multiple)
        parts = self._selected(terms, whole)
        parts.sort(key=lambda p: (not p[1], isinstance(p[0], Const), print_expr(p[0])))
        total: Expr | None = None
        for e, positive in parts:
            if total is None:
                total = e if positive else call("neg", e)
            else:
                total = call("add" if positive else "sub", total, e)
        return total if total is not None else Const(0) if whole else Const(0.0)

    def _selected(self, terms: list[tuple[Monomial, Fraction]], whole: bool) -> list[tuple[Expr, bool]]:
        """The terms as (expression, whether it is added): ``[p] a + [not p] b`` becomes one ``where``."""
        groups: dict[frozenset[Atom], list[tuple[Monomial, Fraction]]] = {}
        for m, q in terms:
            bare = Monomial(m.factors, m.exponent) if m.brackets else m
            groups.setdefault(frozenset(m.brackets), []).append((bare, q))
        parts: list[tuple[Expr, bool]] = []
        for brackets in list(groups):
            if brackets not in groups:
                continue
            other = next(
                (
                    (p, o)
                    for p in sorted(brackets, key=lambda a: a.digest)
                    if (o := brackets - {p} | {negate(p)}) in groups
                ),
                None,
            )
            mine = groups.pop(brackets)
            if other is None:
                if brackets and any(_mask(m, q) is not None for m, q in mine):
                    e = self._masked(mine, whole)
                    parts.append((self._where(brackets, e, Const(0) if whole else Const(0.0)), True))
                    continue
                whole_terms = [(Monomial(m.factors, m.exponent, brackets) if brackets else m, q) for m, q in mine]
                parts += [self._term(m, q, whole) for m, q in whole_terms]
                continue
            p, complement = other
            theirs = groups.pop(complement)
            if p.name == "not":
                p, mine, theirs = negate(p), theirs, mine
            a, b = self._masked(mine, whole), self._masked(theirs, whole)
            if self.inside and not whole and _is_integer(a) and _is_integer(b):
                b = literal(theirs[0][1], whole=False)  # a sum of floats stays one
            e = call("where", self.atom(p), a, b)
            rest = brackets & complement
            parts.append((self._where(rest, e, Const(0) if whole else Const(0.0)) if rest else e, True))
        return parts

    # Products

    def _term(self, m: Monomial, q: Fraction, whole: bool) -> tuple[Expr, bool]:
        """One term as (expression, whether it is added)."""
        if self.named is not None:
            own = Form({m: q})
            if (found := self.named(own)) is not None:
                return found, True
            if self.negated is not None and (found := self.negated(own)) is not None:
                return found, False
        turned = self._turned(m)
        e = self._product(m, abs(q), whole, turned)
        if m.brackets:
            e = self._where(m.brackets, e, Const(0) if whole else Const(0.0))
        odd = sum(p for a, p in m.factors if a in turned) % 2
        return e, (q > 0) != bool(odd)

    def _turned(self, m: Monomial) -> dict[Atom, Expr]:
        """The factors whose negatives have names: a sum's sign is fixed by its form, not by who wrote it."""
        if self.negated is None:
            return {}
        found = {a: self.negated(as_form(a.args[0])) for a, _ in m.factors if a.kind == "poly"}
        return {a: e for a, e in found.items() if e is not None}

    def _product(self, m: Monomial, q: Fraction, whole: bool, turned: Mapping[Atom, Expr]) -> Expr:
        inside = self._takes_exponent(m)
        over: list[Expr] = []
        under: list[Expr] = []
        ln2 = 0
        for a, p in sorted(m.factors, key=lambda f: _order(f[0])):
            if a.kind == "ln2":
                ln2 = p
                continue
            root = a.kind == "fn" and a.name == "sqrt" and p < 0
            if root and self.named is not None and self.named(Form({Monomial([(a, 1)]): ONE_FRACTION})) is not None:
                under.append(_power(self.atom(a), -p))
            elif root:
                base: Expr = call("rsqrt", self.form(as_form(a.args[0])))
                over.append(_power(base, -p))
            else:
                e = self.form(_times_exp(a, m, p)) if inside == a else turned.get(a) or self.atom(a)
                (over if p > 0 else under).append(_power(e, abs(p)))
        if ln2:
            over.insert(0, Const(LN2**ln2))
        if m.exponent is not None and inside is None:
            over.append(self._exponential(m.exponent))
        numerator, denominator = _ratio(q, whole)
        far: list[Fraction] = []
        if not whole and over and not all(SMALLEST_F32 <= x <= LARGEST_F32 for x in (numerator, denominator)):
            # A literal beyond f32 is infinite or 0 there, though what it multiplies may bring it back.
            (numerator, far), denominator = _in_range(q), ONE_FRACTION
        if numerator != 1 or not over:
            over.insert(0, literal(numerator, whole) if whole else either(numerator))
        total = over[0]
        for x in (*over[1:], *map(either, far)):
            total = call("mul", total, x)
        if denominator != 1:
            under.append(either(denominator))
        if under:
            d = under[0]
            for x in under[1:]:
                d = call("mul", d, x)
            total = call("div", total, d)
        return self._guard(m, total)

    def _takes_exponent(self, m: Monomial) -> Atom | None:
        """The sum of exponentials that an exponential was a factor of: ``exp(-m) (a exp(x) + b exp(y))``.

        Multiplied out again no exponential leaves the range of floats that its sum does not leave.
        """
        if m.exponent is None:
            return None
        sums = [a for a, p in m.factors if p > 0 and _sums_exponentials(a)]
        alone = len(sums) == 1 and (self.named is None or self.named(as_form(sums[0].args[0])) is None)
        return sums[0] if alone else None

    def _guard(self, m: Monomial, e: Expr) -> Expr:
        """A quotient of sums into which nothing came, 0 / 0, is 0; so is such a sum times what may be no number.

        A sum of exponentials is 0 too where all of them are: their greatest exponent, -inf, cannot be taken off.
        """
        for a, p in m.factors:
            if p > 0 and a.kind == "aligned" and len(a.args) > 1:
                e = call("where", call("eq", self.value(a.args[1]), MINUS_INF), Const(0.0), e)
        below = [a for a, p in m.factors if p < 0 and self._may_be_empty(a)]
        above = [a for a, p in m.factors if p > 0 and (self._may_be_empty(a) or self._is_masked(a))]
        divided = bool(below)
        if not below and m.exponent is not None:
            below = above[:1]
        elif not below and not self.inside and any(_may_be_none(a, p) for a, p in m.factors if a not in above):
            below = [a for a in above if filled(a) is not None][:1]
        if not below or not (above or m.brackets or m.exponent is not None):
            return e
        # What is divided has masks of its own: nothing may have come into it where something came into the divisor.
        known = {None, *map(filled, below)}
        own = [a for a in above if a not in below and filled(a) not in known]
        gauge = self._gauge(below[0]) if above else None
        if gauge is not None and m.exponent is None:
            # Above and below share a scale, which cancels, except that nothing but -inf in the data gives NaN.
            g = self.form(gauge)
            e = call("mul", e, call("exp", call("sub", g, g)))
        empty: Expr | None = None
        for a in (*below, *own):
            over = self._emptied_by(a) if divided else None
            if over is not None and set(over) & m.free:
                continue
            mine = call("eq", self.atom(a), Const(0.0)) if over is None else self.atom(nothing_over(over))
            empty = mine if empty is None else call("or", empty, mine)
        return e if empty is None else call("where", empty, Const(0.0), e)

    def _emptied_by(self, a: Atom) -> tuple[str, ...] | None:
        """The ranks whose emptiness alone leaves a sum empty; None where masks may, and its being 0 tells.

        What no mask empties is 0 too where data are -inf throughout, and 0 / 0 is no number then.
        """
        if a.kind == "access":
            return self.emptied.get(a.name)
        body = a.args[0] if a.kind == "red" and self._gauge(a) is None else None
        return a.ranks if isinstance(body, Form) and is_unmasked(body) else None

    def settled(self, a: Atom, body: Form) -> Form:
        """A reduction in place takes its own maximum off, where there is one."""
        top = self._gauge(a)
        if top is None:
            return body
        terms: dict[Monomial, Fraction] = {}
        for m, q in body.terms.items():
            power = Form({Monomial((), m.exponent): ONE_FRACTION})
            terms[Monomial([*m.factors, (Atom("below", "", (power, top)), 1)], None, m.brackets)] = q
        return Form(terms)

    def _gauge(self, a: Atom) -> Form | None:
        if self.guarded is None:
            return None
        return self.guarded.get(a.name if a.kind == "access" else held_in_place(a))

    def _may_be_empty(self, a: Atom) -> bool:
        """Whether a value is a sum that is 0 where nothing came in, and there alone: of exponentials, masks aside."""
        if self.guarded is None:
            return False
        if a.kind == "access":
            return a.name in self.guarded
        body = a.args[0] if a.kind == "red" and a.name == "sum" else None
        return isinstance(body, Form) and bool(body.terms) and all(m.exponent is not None for m in body.terms)

    def _is_masked(self, a: Atom) -> bool:
        """Whether a value is a sum of terms that are all masked, of whatever."""
        body = a.args[0] if a.kind == "red" and a.name == "sum" else None
        return self.guarded is not None and isinstance(body, Form) and all(m.brackets for m in body.terms)

    def _exponential(self, f: Form) -> Expr:
        """exp of a form, or exp2 where every term carries a factor ln 2."""
        stripped: dict[Monomial, Fraction] = {}
        for m, q in f.terms.items():
            powers = {a.kind: (a, p) for a, p in m.factors}
            if powers.get("ln2", (None, 0))[1] != 1:
                return call("exp", self.form(f))
            stripped[Monomial([(a, p) for a, p in m.factors if a.kind != "ln2"], m.exponent, m.brackets)] = q
        return call("exp2", self.form(Form(stripped)))

    def _multiple(self, terms: list[tuple[Monomial, Fraction]]) -> tuple[Monomial, Fraction] | None:
        """The one term that is plus or minus an extended exponent, or one times ln 2."""
        found = [(m, q) for m, q in terms if self._is_multiple(m) and abs(q) == 1]
        return found[0] if len(found) == 1 else None

    def _reduced(self, terms: list[tuple[Monomial, Fraction]], m: Monomial, q: Fraction) -> Expr:
        """A sum with an extended exponent: it meets what is as large as it before what is small.

        Times ln 2 it joins in parts, so that nothing is lost (Cody and Waite).
        """
        n = self.form(Form({Monomial([(a, p) for a, p in m.factors if a.kind != "ln2"]): ONE_FRACTION}))
        rest = [t for t in terms if t[0] != m]
        small = [t for t in rest if any(a.kind == "fn" for a, _ in t[0].factors)]
        large = [t for t in rest if t not in small] or small
        twos = [(_of_twos(t), p) for t, p in large if _of_twos(t) is not None]
        if len(m.factors) == 1:
            e = call("sub" if q < 0 else "add", self._sum(large, False), n)
        elif len(twos) == len(large):
            # In their own base large numbers cancel exactly.
            powers = self._sum([(t, p) for t, p in twos if t is not None], False)
            e = call("mul", Const(LN2), call("sub" if q < 0 else "add", powers, n))
        else:
            e = self._sum(large, False)
            for part in LN2_PARTS if q < 0 else reversed(LN2_PARTS):
                e = call("sub" if q < 0 else "add", e, call("mul", n, Const(part)))
        for expression, positive in self._selected(small, False) if large is not small else ():
            e = call("add" if positive else "sub", e, expression)
        return e

    def _is_multiple(self, m: Monomial) -> bool:
        kinds = sorted((a.kind, p) for a, p in m.factors)
        named = any(a.kind == "access" and a.name in self.exponents for a, _ in m.factors)
        alone = kinds in ([("access", 1)], [("access", 1), ("ln2", 1)])
        return alone and named and m.exponent is None and not m.brackets

    # Atoms


def _is_integer(e: Expr) -> bool:
    """Whether an expression is an integer's literal of either sign."""
    return _is_integer(e.args[0]) if isinstance(e, Call) and e.op == "neg" else isinstance(e, Const) and e.kind == "int"


def _of_twos(m: Monomial) -> Monomial | None:
    """A term without its factor ln 2; None where it has none."""
    left = [(a, p) for a, p in m.factors if a.kind != "ln2"]
    one = [p for a, p in m.factors if a.kind == "ln2"] == [1]
    return Monomial(left, m.exponent, m.brackets) if one else None


def _sums_exponentials(a: Atom) -> bool:
    """Whether every term of a sum is an exponential, or a sum of them times something."""
    return a.kind == "poly" and all(
        t.exponent is not None or any(p > 0 and _sums_exponentials(b) for b, p in t.factors)
        for t in as_form(a.args[0]).terms
    )


def _times_exp(a: Atom, m: Monomial, power: int) -> Form:
    """A sum with the exponential beside its power multiplied into its terms."""
    assert m.exponent is not None
    by = scale(m.exponent, Fraction(1, power))
    terms = as_form(a.args[0]).terms.items()
    return Form({Monomial(t.factors, add(t.exponent or Form({}), by), t.brackets): q for t, q in terms})


def _is_data(a: Atom) -> bool:
    return any(isinstance(x, Atom) and x.kind == "access" for x in values_inside(a))


# The least number of which a function has a value.
_LEAST = {"log": 0, "log2": 0, "sqrt": 0, "log1p": -1}


def _is_none(a: Atom) -> bool:
    """Whether a factor is no number: log(-1), which masks may keep from being asked for."""
    inside = a.args[0] if a.kind == "fn" and a.name in _LEAST else None
    return isinstance(inside, Form) and inside.constant is not None and inside.constant < _LEAST[a.name]


def _may_be_none(a: Atom, power: int) -> bool:
    """Whether a factor may be no number, or infinite: data, and integers that are divided by."""
    made = bool(a.free) and a.kind != "rank" and (a.kind != "int" or power < 0)
    return _is_none(a) or _is_data(a) or made


def _mask(m: Monomial, q: Fraction) -> Atom | None:
    """The lbr of a term that is nothing but a positive multiple of it."""
    if m.exponent is not None or m.brackets or q < 0:
        return None
    found = [a for a, p in m.factors if a.kind == "lbr" and p == 1]
    others = [a for a, _ in m.factors if a.kind != "lbr"]
    alone = len(found) == 1 and len(others) == len(m.factors) - 1
    return found[0] if alone and all(map(atom_nonnegative, others)) else None


def _power(e: Expr, n: int) -> Expr:
    return e if n == 1 else call("pow", e, Const(n))


def _order(a: Atom) -> tuple[int, str]:
    """Scalars first, then tensors, then functions and sums."""
    ranks = {"ln2": 0, "extent": 1, "access": 2 if not a.args else 3, "red": 4, "fn": 5, "cast": 5, "poly": 6}
    rank = ranks.get(a.kind, 4)
    return rank, a.name if a.kind in ("access", "extent") else a.digest.hex()


def _in_range(q: Fraction) -> tuple[Fraction, list[Fraction]]:
    """A positive coefficient as one that f32 holds, times powers of two."""
    far: list[Fraction] = []
    while not SMALLEST_F32 <= q <= LARGEST_F32:
        far.append(Fraction(2) ** (100 if q > 1 else -100))
        q /= far[-1]
    return q, far


def _ratio(q: Fraction, whole: bool) -> tuple[Fraction, Fraction]:
    """A coefficient as literals above and below: a float where it is one exactly, else a quotient."""
    if q.denominator == 1 or whole:
        return q, ONE_FRACTION
    if Fraction(float(q)) == q and (
        q.denominator > 1 << 20 or q.numerator > 1 << 20 or q.denominator in (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
    ):
        return q, ONE_FRACTION
    if q.numerator == 1 or q.denominator < 1 << 16:
        return Fraction(q.numerator), Fraction(q.denominator)
    return Fraction(float(q)), ONE_FRACTION
