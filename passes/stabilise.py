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

from math import comb, inf

from ..ir.cascade import Access, Const, Einsum, Expr, Monoid, Output, Reduce
from .centred import Centre, centres, lower_powers
from .element import Elements
from .forms import LN2, ONE_FRACTION, Atom, Form, lift, scale, sub, values_inside
from .functions import exp
from .lower import Lowering
from .lower_atoms import MINUS_INF, call, literal
from .normal import mul
from .normal import power as raise_to
from .places import NOWHERE, merged
from .rewriting import rewrite
from .stream import Component, Gauge


class StreamWriter(Elements):
    """Writes one group as a monoid and the Einsum that uses it."""

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
        merged = self.reference(reference, "")
        for m, q in sorted(merged.terms.items(), key=lambda t: any(a.kind == "fn" for a, _ in t[0].factors)):
            term = Form({m: q})
            before = rewrite(term, old, {})
            assert isinstance(before, Form)
            step = self._difference(term, before)
            total = step if total is None else call("add", total, step)
        assert total is not None
        # Where nothing came in that the reference divides by or takes a logarithm of, there is nothing to move.
        empty = [call("eq", _name(prefix, self.by_atom[a.digest]), Const(0.0)) for a in self._denominators(reference)]
        if not empty:
            # Then what is carried as the maximum of itself tells: it is not there before the first element.
            inside = {x.name for x in values_inside(merged) if isinstance(x, Atom)}
            carried = (c for c in self.components if c.name in inside and _is_carried(c.atom))
            empty = [call("eq", _name(prefix, c), MINUS_INF) for c in carried]
        for p in empty:
            total = call("where", p, Const(0.0), total)
        return total


def _is_carried(a: Atom) -> bool:
    """Whether a component is a value that does not vary along the stream (`plan.carried`)."""
    return a.kind == "red" and a.name == "max" and not any(x.free & set(a.ranks) for x in a.args)


def _name(prefix: str, c: Component) -> Expr:
    return Access(prefix + c.name)
