"""Values over the tensors that hold them: mantissas times exponentials of their gauges."""

from __future__ import annotations

from dataclasses import replace

from ..ir.cascade import Cascade, Einsum, Monoid
from .emptiness import filled
from .forms import ZERO, Atom, Form, Monomial, Value, lift, sub, values_inside
from .fresh import fresh
from .functions import aligned, exp, log
from .lower import held_in_place
from .naming import wanted_names
from .normal import atom_nonnegative, mul
from .plan import Plan, unit_of
from .read import Reader
from .rewriting import rewrite
from .separate import Reductions
from .stream import Component, Gauge, Stream


class Finisher:
    """The state of one derivation, and its values as the derived cascade has them."""

    def __init__(self, c: Cascade, level: str, gauge: str) -> None:
        self.c = c
        self.level = level
        self.kind = gauge
        self.reductions = Reductions(level, c.numerics, {r: i for i, r in enumerate(c.ranks)})
        self.reader = Reader(c, self.reductions)
        self.plan = Plan(self.reductions, gauge, self.reader.opaque)
        outputs = [o for e in c.einsums for o in e.outputs]
        self.orders = [o.ranks for o in sorted(outputs, key=lambda o: o.name not in c.outputs)]
        self.taken: set[str] = {p.name for p in c.params} | set(c.ranks) | {m.name for m in c.monoids}
        self.einsums: list[Einsum] = []
        self.monoids: list[Monoid] = list(c.monoids)
        self.streams: list[Stream] = []
        self.named: dict[bytes, tuple[str, tuple[str, ...]]] = {}
        self.component: dict[bytes, Component] = {}
        self.done: set[bytes] = set()
        self.guarded: dict[str, Form | None] = {}
        self.emptied: dict[str, tuple[str, ...]] = {}
        self.inner: set[bytes] = set()
        self.written: set[str] = set()
        self.writing: set[str] = set()
        self.maps: dict[bytes, str] = {}
        self.negatives: dict[bytes, str] = {}
        self.mapped: dict[str, Form] = {}
        self.depths: dict[bytes, int] = {}
        self.told: tuple[dict[bytes, str], dict[bytes, str]] = ({}, {})
        self.wanted: dict[bytes, str] = {}
        self.group_of: dict[bytes, int] = {}
        self.groups: list[list[Atom]] = []
        self.bodies: set[bytes] = set()
        self.finished: dict[bytes, Value] = {}
        self.plain: dict[bytes, tuple[Form, tuple[Value, ...]]] = {}

    def _ranks(self, v: Value) -> tuple[str, ...]:
        """Free ranks in the order of a tensor of the cascade that has just these, an output's first; else in the order
        of the cascade, instances after their base."""
        for ranks in self.orders:
            if v.free == set(ranks):
                return ranks
        order = {r: i for i, r in enumerate(self.c.ranks)}
        base = self.reader.instances

        def place(rank: str) -> tuple[int, str]:
            return order.get(base.get(rank, rank), len(order)), rank

        return tuple(sorted(v.free, key=place))

    def _name_components(self) -> None:
        """Components take the names of the user's tensors that equal them; others get fresh ones."""
        self.wanted = wanted_names(self.reader.forms, self.plan, self.groups)
        for group in self.groups:
            for atom in group:
                name = fresh(self.wanted[atom.digest], self.taken)
                gauge = self.plan.gauge(atom)
                self.component[atom.digest] = Component(atom, name, self._ranks(atom), atom.name, gauge)
        claimed: set[str] = set()
        unnamed = {component.name: digest for digest, component in self.component.items()}
        for name, value in self.reader.forms.items():
            held = self._finished(value).atom if isinstance(value, Form) else None
            digest = unnamed.get(held.name) if held is not None and held.kind == "access" else None
            output = self.c.einsum_of[name].output
            if digest is None or name in claimed:
                continue
            component = self.component[digest]
            if component.name in unnamed and set(output.ranks) == set(component.ranks):
                claimed.add(name)
                self.component[digest] = replace(component, name=name, ranks=output.ranks)
        self.finished, self.plain = {}, {}
        for component in self.component.values():
            if component.atom.name == "sum" and component.gauge is not None and not component.gauge.power:
                self.guarded[component.name] = self._top(component.gauge)

    def _finished(self, v: Form) -> Form:
        """A form over the tensors that hold the streams' results: mantissas times exponentials of their gauges."""
        result = self._finished_value(v)
        assert isinstance(result, Form)
        return result

    def _finished_value(self, v: Value) -> Value:
        """`_finished`, of a form or of a predicate, whose sides are scaled as well."""
        return rewrite(v, self._visit, self.finished)

    def _visit(self, a: Atom) -> Form | Atom | None:
        component = self.component.get(a.digest)
        if component is not None:
            return self._worth(component)
        if a.kind == "red":
            return self._in_place(a) if a.digest in self.inner else self._plain(a)[0]
        if a.kind != "poly" and (a.kind != "fn" or a.name != "log"):
            return None
        inner = aligned(self._finished_form(a.args[0]), self._is_scaled)
        return inner if a.kind == "poly" else log(inner)

    def _finished_form(self, v: Value) -> Form:
        assert isinstance(v, Form)
        return self._finished(v)

    def _is_scaled(self, exponent: Form) -> bool:
        """Whether an exponent is made of gauges."""
        gauges = {c.name for c in self.component.values() if c.atom.name in ("max", "min")}
        inside = values_inside(exponent)
        return any(isinstance(x, Atom) and x.kind == "access" and x.name in gauges for x in inside)

    def _in_place(self, a: Atom) -> Form:
        """A reduction that is written where it is read: its argument is finished too, and a bare one keeps its maximum.

        ``sum[k](exp(S[k]))`` -> ``exp(max[k](S[k])) * sum[k](exp(S[k] - max[k](S[k])))``
        """
        scale = ZERO
        args = a.args
        gauge = self.plan.gauge(a)
        if gauge is not None and isinstance(args[0], Form):
            self.inner |= {x.digest for x in values_inside(gauge.value) if isinstance(x, Atom) and x.kind == "red"}
            scale = self._finished(gauge.value)
            rest = exp(sub(gauge.exponent, gauge.value))
            bare = Form({Monomial(m.factors, None, m.brackets): q for m, q in args[0].terms.items()})
            args = (mul(bare, rest),)
        done = tuple(map(self._finished_value, args))
        own = Atom(a.kind, a.name, done, a.ranks, a.dtype, a.reduced)
        self.inner.add(own.digest)
        if gauge is not None and not gauge.power:
            self.guarded[held_in_place(own)] = scale
        return mul(lift(own), exp(scale))

    def _plain(self, a: Atom) -> tuple[Form, tuple[Value, ...]]:
        """A reduction with a tensor of its own: what it is worth, and what it sums.

        A scale that does not vary leaves the sum: ``sum[d](W[d] * N[q, d] * exp(M[q]))`` is scaled as ``N`` is.
        """
        if a.digest not in self.plain:
            args = tuple(map(self._finished_value, a.args))
            worth, only = lift(a), args[0]
            if a.name == "sum" and isinstance(only, Form):
                only = aligned(only, self._is_scaled)
                scales = [self._leaving(m, frozenset(a.ranks)) for m in only.terms]
                if scales and scales[0].terms and all(s == scales[0] for s in scales):
                    args = (mul(only, exp(sub(ZERO, scales[0]))),)
                    worth = mul(worth, exp(scales[0]))
            self.plain[a.digest] = worth, args
        return self.plain[a.digest]

    def _leaving(self, m: Monomial, over: frozenset[str]) -> Form:
        """The scale of a term, as far as it does not vary over the ranks; none of one that keeps small what varies."""
        scaled = {t: q for t, q in (m.exponent or ZERO).terms.items() if self._is_scaled(Form({t: q}))}
        return ZERO if any(t.free & over for t in scaled) else Form(scaled)

    def _tensor(self, component: Component) -> Form:
        indices = tuple(lift(Atom("rank", r, dtype="i64")) for r in component.ranks)
        atom = component.atom
        positive, some = atom_nonnegative(atom), filled(atom)
        if some is not None:
            held = self._finished_value(some)
            assert isinstance(held, Atom)
            some = held
        return lift(Atom("access", component.name, indices, dtype=atom.dtype, nonnegative=positive, filled=some))

    def _worth(self, component: Component) -> Form:
        value = self._tensor(component)
        if component.gauge is None:
            return value
        return mul(value, exp(self._scale(component.gauge)))

    def _top(self, gauge: Gauge) -> Form:
        """What the scale is made of: a running maximum, or the greatest exponent."""
        if self.kind == "exponent":
            return self._tensor(self.component[gauge.extremes[0].digest])
        return self._finished(gauge.value)

    def _scale(self, gauge: Gauge) -> Form:
        if self.kind == "exponent" and not gauge.power:
            return mul(unit_of(gauge), self._tensor(self.component[gauge.extremes[0].digest]))
        return self._finished(gauge.value)
