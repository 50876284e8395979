"""One step of a stream: how its state takes in a whole tile of the streamed ranks.

A monoid's merge takes in a state; a tile can do better, as all its elements are at hand: the extremes move first, then
the sums are taken directly under the new gauges and about the new references, and only the old state is corrected.
For attention this is FlashAttention's loop body.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..ir.cascade import Access, Const, Expr, tensors_read
from .brackets import bracket, conjunction
from .centred import Centre, centres
from .exponents import shared_brackets
from .forms import Form, Monomial, add, sub
from .functions import exp
from .lower import Lowering
from .lower_atoms import MINUS_INF, call
from .stabilise import StreamWriter
from .stream import Component


@dataclass(frozen=True, slots=True)
class Let:
    """A value of the state alone: a correction, a reference, how far it moved."""

    name: str
    value: Expr


@dataclass(frozen=True, slots=True)
class Take:
    """A component's new value: ``old`` combined by ``op`` with the reduction by ``op`` of ``element`` over the tile.

    In ``old`` the old state is named with the prefix ``a_``; the new state, already taken, by the components' names.
    """

    component: str
    op: str
    old: Expr
    element: Expr


Step = tuple[Let | Take, ...]


class StepWriter(StreamWriter):
    """Writes the step of a stream whose monoid `StreamWriter` writes."""

    def step(self, lowering: Lowering) -> Step:
        """The assignments of one step, in order."""
        self.element_lowering = lowering
        self.body = []
        done: list[Let | Take] = []
        written = 0

        def flush() -> None:
            nonlocal written
            others = {"b_" + c.name for c in self.components}
            done.extend(Let(n, v) for n, v in self.body[written:] if not others & set(tensors_read(v)))
            written = len(self.body)

        for c in self.components:
            if c.atom.name != "sum":
                element = lowering.float(self.finish(_body(c)))
                done.append(Take(c.name, c.atom.name, Access("a_" + c.name), element))
        factors: dict[bytes, Expr] = {}
        for c in self.components:
            if c.gauge is not None and c.gauge.key not in factors:
                factors[c.gauge.key] = self._corrections(c.gauge, len(factors))[0]
        flush()
        references: dict[bytes, Expr] = {}
        shifts: dict[bytes, tuple[Expr, Expr]] = {}
        for c in self.components:
            if c.atom.name != "sum":
                continue
            inside = centres(c.atom) if c.atom.digest in self.plan.reductions.centred else []
            for centre in inside:
                if centre.poly.digest not in references:
                    name = f"r{len(references)}"
                    references[centre.poly.digest] = self._assign(name, self._now(centre))
            factor = factors[c.gauge.key] if c.gauge is not None else None
            old = self._moved(c, "a_", 0, factor, shifts)
            flush()
            done.append(Take(c.name, "sum", old, self._element(c, inside, references)))
        return tuple(done)

    def _now(self, centre: Centre) -> Expr:
        """The reference that the new state has, 0 where it has none."""
        e = Lowering().float(self.reference(centre.reference, ""))
        for a in self._denominators(centre.reference):
            e = call("where", call("eq", Access(self.by_atom[a.digest].name), Const(0.0)), Const(0.0), e)
        return e

    def _element(self, c: Component, inside: list[Centre], references: dict[bytes, Expr]) -> Expr:
        """The integrand at one coordinate, under the new gauge and about the new references."""
        polys = [x.poly for x in inside]
        masks = shared_brackets(_body(c)).union(c.gauge.brackets if c.gauge is not None else ())
        terms = []
        for m, q in _body(c).terms.items():
            rest = [(a, p) for a, p in m.factors if a not in polys]
            exponent = m.exponent if c.gauge is None else None
            terms.append(Form({Monomial(rest, exponent, set(m.brackets) - masks): q}))
        value = add(*terms)
        lowering = self.element_lowering
        factors: list[Expr] = []
        if c.gauge is not None:
            rest_exponent = sub(self.finish(c.gauge.exponent), self.gauge_value(c.gauge, ""))
            power: Expr = lowering.form(exp(rest_exponent))
            top = Lowering().float(self._top(c.gauge))
            factors.append(call("where", call("eq", top, MINUS_INF), Const(1.0), power))
        for x in inside:
            z = call("add", lowering.float(self.finish(x.varying)), references[x.poly.digest])
            factors.append(z if x.power == 1 else call("pow", z, Const(x.power)))
        finished = self.finish(value)
        if finished.constant != 1 or not factors:
            factors.append(lowering.float(finished))
        e = factors[0]
        for f in factors[1:]:
            e = call("mul", e, f)
        # What a mask compares may be scaled as what it weighs is.
        passed = self.finish(bracket(conjunction(masks))).single
        assert passed is not None
        return lowering._where([conjunction(passed[0].brackets)], e, Const(0.0)) if masks else e


def _body(c: Component) -> Form:
    body = c.atom.args[0]
    assert isinstance(body, Form)
    return body
