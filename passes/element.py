"""Values in terms of a stream: over its state, and what one element makes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..ir.cascade import Const, Expr, Rank
from .brackets import INF, TRUE, bracket, compare, conjunction, conjuncts
from .centred import centres, count_of
from .emptiness import is_mask
from .exponents import shared_brackets
from .forms import UNIT, ZERO, Atom, Form, Monomial, Value, add, lift, neg, sub
from .functions import aligned, exp, log
from .lower import Lowering
from .lower_atoms import MINUS_INF, call
from .normal import atom_nonnegative, mul, select
from .normal import power as raise_to
from .places import NOWHERE, split_masks
from .plan import Plan, carried, extended, rounded_exponent, unit_of
from .rewriting import rewrite
from .stream import Component, Gauge

# What extremes begin with.
_EMPTY = {"max": neg(INF), "min": INF}


def _differs(v: Form, from_: Form) -> Atom:
    return compare("ne", v, from_, integer=False)


class Elements:
    """Values of one group of reductions that stream together."""

    def __init__(self, plan: Plan, components: Sequence[Component], gauge: str, finish: Callable[[Form], Form]) -> None:
        self.plan = plan
        self.finish = finish
        self.components = components
        self.kind = gauge
        self.by_atom = {c.atom.digest: c for c in components}
        self.ranks = components[0].atom.ranks
        self.over = frozenset(self.ranks)
        self.body: list[tuple[str, Expr]] = []
        # How elements are written: where other tensors stand, their names.
        self.element_lowering = Lowering()

    def on_state(self, v: Form, prefix: str) -> Form:
        """A form with this stream's reductions replaced by the state's scalars."""

        def visit(a: Atom) -> Form | Atom | None:
            component = self.by_atom.get(a.digest)
            if component is not None:
                return self.ending(component, lift(self.scalar(component, prefix)), prefix)
            held = self.by_atom.get(carried(a, self.ranks).digest)
            return lift(self.scalar(held, prefix)) if held is not None else None

        return _scaled(self.counted(v), visit)

    def ending(self, component: Component, mantissa: Form, prefix: str) -> Form:
        """What a component is worth: its mantissa times the exponential of its gauge."""
        if component.gauge is None:
            return mantissa
        return mul(mantissa, exp(self.gauge_value(component.gauge, prefix)))

    def reference(self, v: Form, prefix: str) -> Form:
        """What a state is centred about. An extreme into which nothing has come is 0 there: no sum goes about -inf."""

        def begun(m: Monomial, exponent: Form | None) -> Monomial:
            inside = [a for a, p in m.factors if p > 0 and a in empty]
            return Monomial(m.factors, exponent, (*m.brackets, *(_differs(lift(a), empty[a]) for a in inside)))

        def scaled(m: Monomial) -> Form | None:
            # The scale of a sum stays what it is: exp(-inf) of nothing. A divisor tells of nothing by itself.
            if m.exponent is None or divided:
                return m.exponent
            raw = any(a in sums for a, _ in m.factors)
            terms = m.exponent.terms.items()
            return Form({t if raw and q > 0 else begun(t, t.exponent): q for t, q in terms})

        empty = {self.scalar(c, prefix): _EMPTY[c.atom.name] for c in self.components if c.atom.name in _EMPTY}
        sums = {self.scalar(c, prefix) for c in self.components if c.gauge is not None}
        divided = bool(self._denominators(v))
        return Form({begun(m, scaled(m)): q for m, q in self.on_state(v, prefix).terms.items()})

    def gauge_value(self, gauge: Gauge, prefix: str) -> Form:
        if self.kind == "exponent" and not gauge.power:
            return mul(unit_of(gauge), lift(self.scalar(self.extreme_of(gauge), prefix)))

        def visit(a: Atom) -> Form | Atom | None:
            component = self.by_atom.get(a.digest)
            return lift(self.scalar(component, prefix)) if component is not None else None

        result = rewrite(gauge.value, visit, {})
        assert isinstance(result, Form)
        return result

    def _top(self, gauge: Gauge) -> Form:
        """The merged gauge, without the unit of an extended exponent."""
        if self.kind == "exponent":
            return lift(self.scalar(self.extreme_of(gauge), ""))
        return self.gauge_value(gauge, "")

    def extreme_of(self, gauge: Gauge) -> Component:
        return self.by_atom[extended(gauge, self.ranks).digest]

    def scalar(self, component: Component, prefix: str) -> Atom:
        return Atom(
            "access",
            prefix + component.name,
            nonnegative=component.atom.name == "sum" and atom_nonnegative(component.atom),
        )

    def counted(self, v: Form) -> Form:
        """Extents of the streamed ranks, all of them together, replaced by the count so far."""
        count = count_of(self.ranks)
        if count.digest not in self.by_atom:
            return v

        def visit(a: Atom) -> Form | Atom | None:
            if a.digest in self.by_atom:
                return a
            if a.kind == "extent" and a.name in self.over:
                return lift(count) if a.name == self.ranks[0] else UNIT
            return None

        result = rewrite(v, visit, {})
        assert isinstance(result, Form)
        return result

    def leaf(self, component: Component) -> Expr:
        """What one element contributes to a component."""
        atom = component.atom
        body = atom.args[0]
        assert isinstance(body, Form)
        lowering = self.element_lowering
        if atom.digest in self.plan.rank_of:
            # One element is the best of its kind; there is no second.
            first = not split_masks(body, atom.ranks[0])[1]
            if atom.name == "argmax":
                return Rank(atom.ranks[0]) if first else Const(NOWHERE)
            return lowering.float(self.finish(body)) if first else MINUS_INF
        if atom.name != "sum":
            return lowering.float(self.finish(body))
        gauge = component.gauge
        value = self.leaf_value(atom, with_exponent=gauge is None)
        if gauge is None:
            return lowering.float(self.finish(value))
        if self.kind == "exponent" and not gauge.power:
            return self._exponent_leaf(gauge, value)
        # Where the element does not count, its scale may be any; elsewhere no condition is met unasked.
        rest = sub(gauge.exponent, self.leaf_form(gauge.value, shared_brackets(value).union(gauge.brackets)))
        return lowering.float(self.finish(mul(value, exp(rest))))

    def _exponent_leaf(self, gauge: Gauge, value: Form) -> Expr:
        lowering = self.element_lowering
        unit = unit_of(gauge)
        x = lowering.float(self.finish(mul(gauge.exponent, raise_to(unit, -1))))
        # The very expression that the extreme streams: rounded otherwise, the two could differ by one.
        n = lowering.float(self.finish(rounded_exponent(gauge)))
        # exp(-inf) is 1 times the base to the -inf.
        power = call("exp" if unit == UNIT else "exp2", call("sub", x, n))
        small = call("where", call("eq", n, MINUS_INF), Const(1.0), power)
        masks = shared_brackets(value).union(gauge.brackets)
        bare = Form({Monomial(m.factors, m.exponent, set(m.brackets) - masks): q for m, q in value.terms.items()})
        e = small if bare == UNIT else call("mul", small, lowering.float(self.finish(bare)))
        passed = self.finish(bracket(conjunction(masks))).single
        assert passed is not None
        condition = conjunction(passed[0].brackets)
        return e if condition == TRUE else call("where", lowering.atom(condition), e, Const(0.0))

    def leaf_value(self, atom: Atom, *, with_exponent: bool) -> Form:
        """The integrand of a sum at one element, its centred factors about the element's own reference."""
        body = atom.args[0]
        assert isinstance(body, Form)
        inside = centres(atom) if atom.digest in self.plan.reductions.centred else []
        polys = [c.poly for c in inside]
        terms = []
        for m, q in body.terms.items():
            rest = [(a, p) for a, p in m.factors if a not in polys]
            terms.append(Form({Monomial(rest, m.exponent if with_exponent else None, m.brackets): q}))
        value = add(*terms)
        for c in inside:
            z = add(c.varying, self.element_reference(c.reference, begun=False))
            if z.terms:
                z = add(c.varying, self.element_reference(c.reference, begun=True))
            value = mul(value, raise_to(z, c.power))
        return value

    def element_reference(self, reference: Form, begun: bool) -> Form:
        """The reference of a state of one element; 0 where `total` makes it 0 for an element that does not count, and
        with ``begun`` where the element is no more than an extreme begins with."""
        weights = [self._weight(a) for a in self._denominators(reference)]
        # Where nothing that the reference divides by comes in, it is 0: there alone may masks count as passed.
        live = self.leaf_form(reference, frozenset().union(*map(shared_brackets, weights)), begun)
        for w in weights:
            c = w.constant
            if c is not None and c != 0:
                continue
            brackets = shared_brackets(w)
            bare = Form({Monomial(m.factors, None, set(m.brackets) - brackets): q for m, q in w.terms.items()})
            if bare.constant is not None and bare.constant != 0:
                condition = conjunction(brackets)
            else:
                condition = compare("ne", w, ZERO, integer=False)
            live = select(condition, live, ZERO)
        return live

    def _denominators(self, reference: Form) -> list[Atom]:
        return [a for a in vanishing(self.counted(reference)) if a.digest in self.by_atom]

    def _weight(self, atom: Atom) -> Form:
        """The mantissa of one element."""
        component = self.by_atom[atom.digest]
        return self.leaf_value(atom, with_exponent=component.gauge is None)

    def leaf_form(self, v: Form, passed: frozenset[Atom], begun: bool = False) -> Form:
        """A form with this stream's reductions replaced by what one element makes of them.

        The conditions in ``passed`` count as met. With ``begun``, what extremes begin with counts as 0.
        """

        def visit(a: Atom) -> Form | Atom | None:
            component = self.by_atom.get(a.digest)
            if component is None:
                return None
            body = a.args[0]
            assert isinstance(body, Form)
            if begun and a.name in _EMPTY:
                own = passing(body, passed)
                return select(_differs(own, _EMPTY[a.name]), own, ZERO)
            if a.name != "sum":
                return passing(body, passed)
            return passing(self.leaf_value(a, with_exponent=True), passed)

        return _scaled(self.counted(v), visit)


def _scaled(v: Form, swap: Callable[[Atom], Form | Atom | None]) -> Form:
    """A value with its reductions swapped for others, sums of what is scaled brought to one scale."""
    memo: dict[bytes, Value] = {}

    def visit(a: Atom) -> Form | Atom | None:
        new = swap(a)
        if new is not None or a.kind not in ("poly", "fn") or (a.kind == "fn" and a.name != "log"):
            return new
        inner = rewrite(a.args[0], visit, memo)
        assert isinstance(inner, Form)
        if inner.digest == a.args[0].digest:
            return a
        return aligned(inner) if a.kind == "poly" else log(aligned(inner))

    result = rewrite(v, visit, memo)
    assert isinstance(result, Form)
    return result


def passing(v: Form, passed: frozenset[Atom]) -> Form:
    """A value at an element that some masks let pass: ``[p] a + lbr(p)`` -> ``a``; a bracket in every term holds too.

    Brackets that choose between terms, ``[c] a + [not c] b``, stay, and so do all that are not among the passed.
    """
    masks = {m: frozenset(conjuncts(m.factors[0][0].args[0])) for m in v.terms if is_mask(m)}
    held = frozenset().union(
        *masks.values(), shared_brackets(Form({m: q for m, q in v.terms.items() if m not in masks}))
    )
    held &= passed
    rest = {m: q for m, q in v.terms.items() if m not in masks or not masks[m] <= held}
    return add(*(Form({Monomial(m.factors, m.exponent, set(m.brackets) - held): q}) for m, q in rest.items()))


def vanishing(v: Form) -> list[Atom]:
    """The reductions that a value divides by or takes the logarithm of: where they are 0, it is not defined."""
    found: dict[bytes, Atom] = {}

    def visit(x: Value, risky: bool) -> None:
        if isinstance(x, Atom):
            if x.kind == "red":
                if risky:
                    found[x.digest] = x
                return
            for a in x.args:
                visit(a, risky or (x.kind == "fn" and x.name in ("log", "div")))
            return
        for m in x.terms:
            for a, p in m.factors:
                visit(a, risky or p < 0)
            if m.exponent is not None:
                visit(m.exponent, risky)

    visit(v, False)
    return list(found.values())
