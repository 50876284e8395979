"""Streams: the reductions that separation left bare or centred, as monoids with tuple state.

Exact algebra leaves ``Σ exp(a_k) w_k``, which overflows, and ``Σ (a_k - r)^p w_k``, whose separated sums cancel. Both
are carried in a representation that moves with what has been seen:

- *scaled*: mantissa and scale. The scale is a gauge, a running maximum of the exponents (FlashAttention), or of their
  rounded multiples of ln 2 (the extended exponent of Two-Pass Softmax, arXiv 2001.04438); taking in a new scale
  multiplies the mantissa by ``exp(g_old - g_new)``. Reductions that share an exponent share its gauge.
- *centred*: the sums of ``(a - r)^p w`` about the value that r has so far. When r moves to r', the binomial theorem
  gives them about r': T(r -> r'). Welford's and Chan's updates are the polynomial case; so is FlashAttention's dQ
  without a saved sum.

Every such state is an associative monoid: what streams a rank also splits it over programs, threads or machines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from math import comb, inf
from typing import TYPE_CHECKING

from ..ir.cascade import Access, Const, Einsum, Expr, Monoid, Output, Rank, Reduce
from .lower import LN2_PARTS, MINUS_INF, Lowering, call, literal
from .normal import (
    LN2,
    ONE_FRACTION,
    TRUE,
    UNIT,
    ZERO,
    Atom,
    Form,
    Monomial,
    Value,
    add,
    aligned,
    atom_nonnegative,
    bracket,
    compare,
    conjunction,
    conjuncts,
    const,
    exp,
    function,
    is_mask,
    lift,
    log,
    masked,
    mul,
    rewrite,
    scale,
    select,
    sub,
    values_inside,
)
from .normal import power as raise_to
from .places import NOWHERE, Ranking, merged, ranking_behind, split_masks
from .separate import Reductions, centred_factors, common_exponent, split_core, waits

if TYPE_CHECKING:
    from .step import Step

GAUGES = ("maximum", "exponent")


@dataclass(frozen=True, slots=True)
class Gauge:
    """The scale of an exponential: ``value`` is the form that bounds the exponent, made of the extremes in it.

    With ``power`` p the scale is the p-th power of an extreme s, as in BLAS's nrm2: ``value`` is p log s.
    """

    exponent: Form
    brackets: tuple[Atom, ...]
    value: Form
    extremes: tuple[Atom, ...]
    power: int = 0

    @property
    def key(self) -> bytes:
        own = self.value.digest if self.power else b""
        return self.exponent.digest + b"".join(b.digest for b in self.brackets) + own


@dataclass(frozen=True, slots=True)
class Component:
    """One part of a stream's state: the reduction that it ends as, its tensor, and how it moves."""

    atom: Atom
    name: str
    ranks: tuple[str, ...]
    kind: str
    gauge: Gauge | None = None


@dataclass(frozen=True, slots=True)
class Stream:
    """Reductions over the same ranks that are carried together; written as one Einsum over a monoid.

    ``step`` says how the state takes in a whole tile; empty where it takes in one element after another.
    """

    ranks: tuple[str, ...]
    components: tuple[Component, ...]
    monoid: Monoid | None
    einsum: Einsum | None
    step: Step = ()


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


def lower_powers(atom: Atom) -> list[tuple[tuple[int, ...], Atom]]:
    """The basis of a centred reduction: the same sum with each lower power of its centred factors, itself last."""
    body = atom.args[0]
    assert isinstance(body, Form)
    assert body.single is not None
    m, q = body.single
    inside = centres(atom)
    polys = [c.poly for c in inside]
    basis = []
    for powers in product(*(range(c.power + 1) for c in inside)):
        kept = [(a, p) for a, p in m.factors if a not in polys]
        kept += [(a, p) for a, p in zip(polys, powers, strict=True) if p]
        term = Form({Monomial(kept, m.exponent, m.brackets): q})
        basis.append((powers, count_of(atom.ranks) if term == UNIT else Atom("red", "sum", (term,), atom.ranks)))
    return basis


def reductions_over(v: Value, ranks: tuple[str, ...]) -> list[Atom]:
    """The outermost reductions over exactly these ranks inside a value."""

    def over(x: Value) -> bool:
        return isinstance(x, Atom) and x.kind == "red" and x.ranks == ranks

    return [x for x in values_inside(v, into=lambda x: not over(x)) if isinstance(x, Atom) and over(x)]


class Plan:
    """Which reductions stream together, and what each carries.

    ``opaque`` holds what the tensors that stay tensors read. ``settled`` are scaled sums whose gauge another stream
    has finished when they begin: they are plain reductions under it.
    """

    def __init__(
        self, reductions: Reductions, kind: str = "maximum", opaque: Mapping[str, tuple[Value, ...]] | None = None
    ) -> None:
        self.reductions = reductions
        self.kind = kind
        self.opaque = opaque or {}
        self.gauges: dict[bytes, Gauge] = {}
        self.group_of: dict[bytes, dict[bytes, Atom]] = {}
        self.settled: set[bytes] = set()
        self.rankings: dict[bytes, Ranking] = {}
        self.rank_of: dict[bytes, bytes] = {}
        self.read_by: dict[bytes, list[Atom]] = {}

    def gauge(self, atom: Atom) -> Gauge | None:
        """The gauge of a sum whose exponential is bare, or that was divided by powers of an extreme."""
        if atom.digest in self.reductions.powers:
            extreme, n = self.reductions.powers[atom.digest]
            return Gauge(ZERO, (), scale(log(lift(extreme)), Fraction(n)), (extreme,), n)
        if atom.kind != "red" or atom.name != "sum" or not self.reductions.is_bare(atom):
            return None
        body = atom.args[0]
        assert isinstance(body, Form)
        exponent = common_exponent(body)
        assert exponent is not None
        over = frozenset(atom.ranks)
        shared = frozenset.intersection(*(frozenset(m.brackets) for m in body.terms))
        brackets = tuple(sorted((b for b in shared if b.free & over), key=lambda b: b.digest))
        bounded = masked(exponent, brackets)
        value = self.reductions.extreme("max", atom.ranks, bounded)
        if waits(exponent, over) or outside_of(value, atom.ranks):
            # The state must hold all that its correction needs: then the maximum of the whole exponent is carried.
            value = lift(Atom("red", "max", (bounded,), atom.ranks))
        extremes = tuple(reductions_over(value, atom.ranks))
        gauge = Gauge(exponent, brackets, value, extremes)
        if self.kind == "exponent":
            gauge = Gauge(exponent, brackets, value, (extended(gauge, atom.ranks),))
        return self.gauges.setdefault(gauge.key + "".join(atom.ranks).encode(), gauge)

    def include(self, atom: Atom) -> bool:
        """Put a reduction and all that it needs while streaming into one group; False where that cannot be."""
        trail: list[Atom] = []
        if self._include(atom, trail, 0) and self._sound(trail):
            self._join(trail)
            return True
        gauge = self.gauge(atom)
        if gauge is None or atom.digest in self.reductions.centred:
            return False
        # What it reads needs its gauge too, and has finished it.
        self.settled.add(atom.digest)
        self._join([atom])
        return True

    def _include(self, atom: Atom, trail: list[Atom], depth: int) -> bool:
        if atom in trail:
            return True
        ranking = ranking_behind(atom)
        if ranking is not None:
            trail.extend(a for j in range(len(ranking.places) + 1) for a in ranking.pair(j) if a not in trail)
            self._rank(ranking)
            return True
        if depth > 40 or atom.kind != "red" or atom.name not in ("sum", "max", "min"):
            return False
        trail.append(atom)
        over = frozenset(atom.ranks)
        body = atom.args[0]
        if not isinstance(body, Form):
            return False
        gauge = self.gauge(atom)
        if gauge is not None:
            trail.extend(e for e in gauge.extremes if e not in trail)
        if atom.digest not in self.reductions.centred:
            return not waits(body, over) or gauge is not None
        for _, lower in lower_powers(atom):
            if lower != atom:
                if centres(lower):
                    self.reductions.centred.setdefault(lower.digest, lower)
                if not self._include(lower, trail, depth + 1):
                    return False
        for centre in centres(atom):
            needed = reductions_over(centre.reference, atom.ranks)
            if not needed or waits_other(centre.reference, over):
                return False
            if mentions_extent(centre.reference, over):
                trail.append(count_of(atom.ranks))
            if not all(self._include(n, trail, depth + 1) for n in needed):
                return False
            outside = outside_of(centre.reference, atom.ranks)
            if any(a.kind in ("pred", "lbr") for a in outside):
                return False
            trail.extend(carried(a, atom.ranks) for a in outside)
        return True

    def _rank(self, ranking: Ranking) -> None:
        """Of rankings of the same values, the longest is carried."""
        key = ranking.values.digest + ranking.rank.encode()
        known = self.rankings.get(key)
        longest = ranking if known is None or len(known.places) < len(ranking.places) else known
        self.rankings[key] = longest
        for j in range(len(longest.places) + 1):
            for a in longest.pair(j):
                self.rank_of[a.digest] = key

    def _sound(self, trail: list[Atom]) -> bool:
        """Whether a group of these, with the groups that they are in already, does not wait for itself."""
        group = {b.digest: b for a in trail for b in self._group(a)}
        seen: set[bytes] = set()
        stack = [x for a in group.values() for x in self._inputs(a, group)]
        while stack:
            a = stack.pop()
            if a.digest in group:
                return False
            if a.digest not in seen:
                seen.add(a.digest)
                stack.extend(x for b in self._group(a) for x in self._inputs(b, {}))
        return True

    def _group(self, a: Atom) -> Iterable[Atom]:
        return self.group_of.get(a.digest, {a.digest: a}).values()

    def _inputs(self, a: Atom, group: Mapping[bytes, Atom]) -> list[Atom]:
        """The reductions that must be finished before this one begins; what it refers to in its group moves with it."""
        together: set[bytes] = set()
        if a.digest in self.reductions.centred:
            together = {n.digest for c in centres(a) for n in reductions_over(c.reference, a.ranks)}
        if a.digest in self.rank_of:
            together = {p.digest for p in self.rankings[self.rank_of[a.digest]].places}
        own = self.group_of.get(a.digest, group)
        return [x for x in self._read_by(a) if x.digest not in together or x.digest not in own]

    def _read_by(self, a: Atom) -> list[Atom]:
        """The outermost reductions inside a reduction, and for a settled one those of its gauge."""
        if a.digest not in self.read_by:
            found: list[Atom] = []
            tensors: set[str] = set()
            waiting: list[Value] = [*a.args]
            while waiting:
                inside = list(values_inside(*waiting, into=_is_no_reduction))
                waiting = []
                for x in inside:
                    if not isinstance(x, Atom):
                        continue
                    if x.kind == "red":
                        found.append(x)
                    name = x.name.removeprefix("access:")
                    if x.kind in ("access", "pred") and name in self.opaque and name not in tensors:
                        tensors.add(name)
                        waiting.extend(self.opaque[name])
            self.read_by[a.digest] = found
        gauge = self.gauge(a) if a.digest in self.settled else None
        return [*self.read_by[a.digest], *(gauge.extremes if gauge is not None else ())]

    def _join(self, trail: list[Atom]) -> None:
        group = {b.digest: b for a in trail for b in self._group(a)}
        self.group_of.update(dict.fromkeys(group, group))

    def groups(self) -> list[list[Atom]]:
        """The groups, each in an order in which a component comes after those that it needs."""
        distinct = {id(g): g for g in self.group_of.values()}
        return [_ordered(list(g.values()), self) for g in distinct.values()]


def _is_no_reduction(v: Value) -> bool:
    return not (isinstance(v, Atom) and v.kind == "red")


def outside_of(v: Form, ranks: tuple[str, ...]) -> list[Atom]:
    """What a value over a state needs that the state does not hold: tensors, other reductions, coordinates."""

    def held(x: Atom) -> bool:
        return x.kind == "red" and x.ranks == ranks

    def outside(x: Value) -> bool:
        if not isinstance(x, Atom) or held(x):
            return False
        return x.kind in ("access", "rank", "red", "lbr", "pred", "int") or (x.kind == "extent" and x.name not in ranks)

    found = values_inside(v, into=lambda x: not (isinstance(x, Atom) and (held(x) or outside(x))))
    return [x for x in found if isinstance(x, Atom) and outside(x)]


def carried(atom: Atom, ranks: tuple[str, ...]) -> Atom:
    """A value that does not vary over the ranks, carried in the state as the maximum of itself."""
    return Atom("red", "max", (lift(atom),), ranks)


def waits_other(reference: Form, over: frozenset[str]) -> bool:
    """Whether a reference also uses something reduced over only some of the ranks, or over more."""

    def reduced(x: Value) -> bool:
        return isinstance(x, Atom) and x.kind == "red" and bool(set(x.ranks) & over)

    inside = values_inside(reference, into=lambda x: not reduced(x))
    return any(isinstance(x, Atom) and reduced(x) and frozenset(x.ranks) != over for x in inside)


def mentions_extent(v: Value, over: frozenset[str]) -> bool:
    """Whether the size of a rank stands in a value, beside reductions over the ranks."""

    def beside(x: Value) -> bool:
        return not (isinstance(x, Atom) and x.kind == "red" and set(x.ranks) & over)

    return any(isinstance(x, Atom) and x.kind == "extent" and x.name in over for x in values_inside(v, into=beside))


def _ordered(group: list[Atom], plan: Plan) -> list[Atom]:
    """Extremes, then plain and scaled sums, then centred ones after what they refer to."""
    done: dict[bytes, Atom] = {}

    def place(a: Atom) -> None:
        if a.digest in done:
            return
        for centre in centres(a) if a.digest in plan.reductions.centred else []:
            for n in reductions_over(centre.reference, a.ranks):
                place(n)
        if a.digest in plan.reductions.centred:
            for _, lower in lower_powers(a):
                if lower != a:
                    place(lower)
        done[a.digest] = a

    rank = {"max": 0, "min": 0, "argmax": 0}
    for a in sorted(
        group, key=lambda a: (rank.get(a.name, 1), a.digest in plan.reductions.centred, len(a.free), a.digest)
    ):
        place(a)
    return [a for a in done.values() if any(a == g for g in group)]


class StreamWriter:
    """Writes one group as a monoid and the Einsum that uses it."""

    def __init__(self, plan: Plan, components: Sequence[Component], gauge: str, finish: Callable[[Form], Form]) -> None:
        self.plan = plan
        self.finish = finish
        self.components = components
        self.kind = gauge
        self.by_atom = {c.atom.digest: c for c in components}
        self.ranks = components[0].atom.ranks
        self.over = frozenset(self.ranks)
        self.body: list[tuple[str, Expr]] = []

    # Values in terms of the state

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

    def gauge_value(self, gauge: Gauge, prefix: str) -> Form:
        if self.kind == "exponent" and not gauge.power:
            return mul(const(LN2), lift(self.scalar(self.extreme_of(gauge), prefix)))

        def visit(a: Atom) -> Form | Atom | None:
            component = self.by_atom.get(a.digest)
            return lift(self.scalar(component, prefix)) if component is not None else None

        result = rewrite(gauge.value, visit, {})
        assert isinstance(result, Form)
        return result

    def _top(self, gauge: Gauge) -> Form:
        """The merged gauge, without the factor ln 2 of an extended exponent."""
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

    # The element

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
        rest = sub(gauge.exponent, self.leaf_form(gauge.value))
        return lowering.float(self.finish(mul(value, exp(rest))))

    def _exponent_leaf(self, gauge: Gauge, value: Form) -> Expr:
        lowering = self.element_lowering
        x = lowering.float(self.finish(gauge.exponent))
        # The very expression that the extreme streams: rounded otherwise, the two could differ by one.
        n = lowering.float(self.finish(rounded_exponent(gauge)))
        for part in LN2_PARTS:
            x = call("sub", x, call("mul", n, Const(part)))
        # exp(-inf) is 1 times 2 to the -inf.
        small = call("where", call("eq", n, MINUS_INF), Const(1.0), call("exp", x))
        masks = {b for m in value.terms for b in m.brackets if b.free & self.over}
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
            z = add(c.varying, self.element_reference(c.reference))
            value = mul(value, raise_to(z, c.power))
        return value

    def element_reference(self, reference: Form) -> Form:
        """The reference of a state of one element; 0 where `total` makes it 0 for an element that does not count."""
        weights = [self._weight(a) for a in self._denominators(reference)]
        # Where nothing that the reference divides by comes in, it is 0: there alone may masks count as passed.
        live = self.leaf_form(reference, frozenset().union(*map(_shared_brackets, weights)))
        for w in weights:
            c = w.constant
            if c is not None and c != 0:
                continue
            brackets = {b for m in w.terms for b in m.brackets}
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

    def leaf_form(self, v: Form, passed: frozenset[Atom] | None = None) -> Form:
        """A form with this stream's reductions replaced by what one element makes of them.

        Masks count as passed: those in ``passed``, or all.
        """

        def visit(a: Atom) -> Form | Atom | None:
            component = self.by_atom.get(a.digest)
            if component is None:
                return None
            body = a.args[0]
            assert isinstance(body, Form)
            if a.name != "sum":
                return passing(body, passed)
            return passing(self.leaf_value(a, with_exponent=True), passed)

        return _scaled(self.counted(v), visit)

    # The monoid

    def write(self, name: str, lowering: Lowering) -> tuple[Monoid, Einsum]:
        self.element_lowering = lowering
        for pairs in self._rankings():
            self.body += merged([(v.name, i.name) for v, i in pairs])
        for c in self.components:
            if c.atom.name != "sum" and c.atom.digest not in self.plan.rank_of:
                self._assign(
                    c.name, call("maximum" if c.atom.name == "max" else "minimum", _name("a_", c), _name("b_", c))
                )
        corrections: dict[bytes, tuple[Expr, Expr]] = {}
        for c in self.components:
            if c.gauge is not None and c.gauge.key not in corrections:
                corrections[c.gauge.key] = self._corrections(c.gauge, len(corrections))
        shifts: dict[bytes, tuple[Expr, Expr]] = {}
        for c in self.components:
            if c.atom.name != "sum":
                continue
            sides = []
            for side, prefix in enumerate(("a_", "b_")):
                factor = corrections[c.gauge.key][side] if c.gauge is not None else None
                sides.append(self._moved(c, prefix, side, factor, shifts))
            self._assign(c.name, call("add", *sides))
        identity = tuple(self._identity(c) for c in self.components)
        params = tuple(f"a_{c.name}" for c in self.components) + tuple(f"b_{c.name}" for c in self.components)
        monoid = Monoid(name, identity, params, tuple(c.name for c in self.components), tuple(self.body))
        outputs = tuple(Output(c.name, c.ranks) for c in self.components)
        return monoid, Einsum(outputs, Reduce(name, self.ranks, tuple(self.leaf(c) for c in self.components)))

    def _rankings(self) -> list[list[tuple[Component, Component]]]:
        """The (value, place) components of each ranking in the state, best first."""
        keys = dict.fromkeys(self.plan.rank_of[d] for d in self.by_atom if d in self.plan.rank_of)
        found = []
        for key in keys:
            ranking = self.plan.rankings[key]
            pairs = (ranking.pair(j) for j in range(len(ranking.places) + 1))
            found.append([(self.by_atom[v.digest], self.by_atom[i.digest]) for v, i in pairs])
        return found

    def _assign(self, name: str, value: Expr) -> Expr:
        self.body.append((name, value))
        return Access(name)

    def _identity(self, c: Component) -> Expr:
        if c.atom.name == "sum":
            return Const(0.0)
        if c.atom.name == "argmax":
            return Const(NOWHERE)
        return call("neg", Const(inf)) if c.atom.name == "max" else Const(inf)

    def _power_corrections(self, gauge: Gauge, number: int) -> tuple[Expr, Expr]:
        """``(s_old / s_new)^p``; where s is not above 0, nothing but zeros has come."""
        s = self.by_atom[gauge.extremes[0].digest]
        found = []
        for prefix in ("a_", "b_"):
            ratio = call("div", _name(prefix, s), _name("", s))
            e = ratio if gauge.power == 1 else call("pow", ratio, Const(gauge.power))
            e = call("where", call("gt", _name(prefix, s), Const(0.0)), e, Const(0.0))
            found.append(self._assign(f"c{prefix}{number or ''}".rstrip("_") + "_scale", e))
        return found[0], found[1]

    def _corrections(self, gauge: Gauge, number: int) -> tuple[Expr, Expr]:
        if gauge.power:
            return self._power_corrections(gauge, number)
        suffix = str(number or "")
        new = self.gauge_value(gauge, "")
        top = Lowering().float(self._top(gauge))
        found = []
        for prefix in ("a_", "b_"):
            e = Lowering().form(exp(sub(self.gauge_value(gauge, prefix), new)))
            # While nothing but -inf has come, mantissas stay: -inf - -inf has no exponential.
            e = call("where", call("eq", top, MINUS_INF), Const(1.0), e)
            found.append(self._assign(f"c{prefix}{suffix}".rstrip("_") + "_scale", e))
        return found[0], found[1]

    def _moved(
        self, c: Component, prefix: str, side: int, factor: Expr | None, shifts: dict[bytes, tuple[Expr, Expr]]
    ) -> Expr:
        """A component of one operand, brought to the merged state's gauge and reference."""
        value: Expr = _name(prefix, c)
        inside = centres(c.atom) if c.atom.digest in self.plan.reductions.centred else []
        if inside:
            value = self._shifted(c, inside, prefix, side, shifts)
        return value if factor is None else call("mul", value, factor)

    def _shifted(
        self, c: Component, inside: list[Centre], prefix: str, side: int, shifts: dict[bytes, tuple[Expr, Expr]]
    ) -> Expr:
        top = tuple(x.power for x in inside)
        deltas = [self._shift(x, shifts)[side] for x in inside]
        total: Expr | None = None
        for powers, lower in reversed(lower_powers(c.atom)):
            e: Expr = _name(prefix, self.by_atom[lower.digest])
            factor = 1
            for have, want, delta in zip(powers, top, deltas, strict=True):
                factor *= comb(want, have)
                if want > have:
                    e = call("mul", e, delta if want - have == 1 else call("pow", delta, Const(want - have)))
            if factor != 1:
                e = call("mul", Const(factor), e)
            total = e if total is None else call("add", total, e)
        assert total is not None
        return total

    def _shift(self, centre: Centre, shifts: dict[bytes, tuple[Expr, Expr]]) -> tuple[Expr, Expr]:
        """How far the reference moves from each operand's to the merged one."""
        key = centre.poly.digest
        if key not in shifts:
            number = str(len(shifts) or "")
            found = []
            for prefix in ("a_", "b_"):
                found.append(self._assign(f"{prefix}d{number}", self._moves(centre.reference, prefix)))
            shifts[key] = (found[0], found[1])
        return shifts[key]

    def _difference(self, new: Form, old: Form) -> Expr:
        """A term minus what it was: the coefficient, and the ln 2 of an extended exponent, after the subtraction."""
        by = ONE_FRACTION if new.single is None else new.single[1]
        ln2 = lift(Atom("ln2", "ln2", nonnegative=True))
        parts = [scale(f, 1 / by) for f in (new, old)]
        scaled = all(f.single is not None and (ln2.atom, 1) in f.single[0].factors for f in parts)
        if scaled:
            parts = [mul(f, raise_to(ln2, -1)) for f in parts]
        first, second = [Lowering().float(f) for f in (parts if by > 0 else reversed(parts))]
        e = call("sub", first, second)
        factors = ([Const(LN2)] if scaled else []) + ([literal(abs(by), whole=False)] if abs(by) != 1 else [])
        for factor in factors:
            e = call("mul", factor, e)
        return e

    def _moves(self, reference: Form, prefix: str) -> Expr:
        """How far a reference moves, term by term, so that large terms cancel before they meet small ones."""
        names = {c.name for c in self.components}

        def old(a: Atom) -> Form | Atom | None:
            return Atom("access", prefix + a.name, nonnegative=a.nonnegative) if a.name in names else None

        total: Expr | None = None
        merged = self.on_state(reference, "")
        for m, q in sorted(merged.terms.items(), key=lambda t: any(a.kind == "fn" for a, _ in t[0].factors)):
            term = Form({m: q})
            before = rewrite(term, old, {})
            assert isinstance(before, Form)
            step = self._difference(term, before)
            total = step if total is None else call("add", total, step)
        assert total is not None
        # Where nothing came in that the reference divides by or takes a logarithm of, there is nothing to move.
        for a in self._denominators(reference):
            total = call("where", call("eq", _name(prefix, self.by_atom[a.digest]), Const(0.0)), Const(0.0), total)
        return total


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


def passing(v: Form, passed: frozenset[Atom] | None = None) -> Form:
    """A value at an element that its masks let pass: ``[p] a + lbr(p)`` -> ``a``; a bracket in every term holds too.

    Brackets that choose between terms, ``[c] a + [not c] b``, stay; with ``passed``, so do all that are not in it.
    """
    masks = {m: frozenset(conjuncts(m.factors[0][0].args[0])) for m in v.terms if is_mask(m)}
    held = frozenset().union(
        *masks.values(), _shared_brackets(Form({m: q for m, q in v.terms.items() if m not in masks}))
    )
    held = held if passed is None else held & passed
    rest = {m: q for m, q in v.terms.items() if m not in masks or not masks[m] <= held}
    return add(*(Form({Monomial(m.factors, m.exponent, set(m.brackets) - held): q}) for m, q in rest.items()))


def _shared_brackets(v: Form) -> frozenset[Atom]:
    """The brackets that every term of a value has."""
    return frozenset.intersection(*(frozenset(m.brackets) for m in v.terms)) if v.terms else frozenset()


def _name(prefix: str, c: Component) -> Expr:
    return Access(prefix + c.name)


def extended(gauge: Gauge, ranks: tuple[str, ...]) -> Atom:
    """The extreme that an extended exponent streams: the greatest rounded multiple of ln 2 among the exponents."""
    return Atom("red", "max", (masked(rounded_exponent(gauge), gauge.brackets),), ranks)


def rounded_exponent(gauge: Gauge) -> Form:
    """The multiple of ln 2 nearest to an exponent."""
    return function("round", (mul(gauge.exponent, raise_to(const(LN2), -1)),))


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
