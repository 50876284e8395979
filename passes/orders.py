"""Maxima, minima and places: what order lets through."""

from __future__ import annotations

from math import inf, isnan

import numpy as np

from ..ir.ops import OPS
from .brackets import compare, lbr
from .emptiness import filled, unless_nothing
from .forms import ONE_FRACTION, ZERO, Atom, Form, Monomial, add, lift
from .functions import exp, function
from .ledger import Ledger
from .normal import atom_nonnegative, const, factored, is_positive, masked, mul, nonnegative, select
from .places import Ranking, ranking_of, split_masks
from .rewriting import rewrite
from .waiting import pieces, reason_of, waits, waits_value

# Functions through which an extreme passes, as they never fall, if they have a value where it begins: no maximum passes
# log or sqrt. Where its place is looked for, they must rise.
_INCREASING = frozenset(o.name for o in OPS.values() if o.monotone == ("+",))
with np.errstate(invalid="ignore"):
    _PARTIAL = frozenset(name for name in _INCREASING if isnan(OPS[name].numpy(-inf)))
_RISING = frozenset(name for name in _INCREASING if OPS[name].derivative != ("0.0",))


class Orders(Ledger):
    """Builds maxima, minima and argmax."""

    def extreme(self, op: str, ranks: tuple[str, ...], body: Form, dtype: str = "f32") -> Form:
        """max or min: addends that do not vary leave it, as do non-negative factors and increasing functions."""
        over = frozenset(ranks)
        if self.level != "full" or not body.terms:
            return lift(Atom("red", op, (body,), ranks, dtype))
        inner = body.atom
        same = inner is not None and inner.kind == "red" and inner.name == op
        if inner is not None and same and not set(inner.ranks) & (over | inner.free):
            held = inner.args[0]
            assert isinstance(held, Form)
            return self.extreme(op, self._ordered(ranks + inner.ranks), held, dtype)
        if not body.free & over:
            # Over an empty rank the maximum is -inf, which no factor brings back: the reduction stays.
            return lift(Atom("red", op, (body,), ranks, dtype))
        left = self._extreme_left(ranks, body) if op == "max" else None
        if left is not None:
            return left
        # A mask stays, as -inf does not cancel: where it hides all, the exponential of the difference is 0 and not 1.
        leaving = {m: q for m, q in body.terms.items() if not m.free & over and m.reduced & over}
        outer = Form({m: q for m, q in leaving.items() if all(a.kind != "lbr" for a, _ in m.factors)})
        inside = Form({m: q for m, q in body.terms.items() if m not in outer.terms})
        extreme = self._extreme_of(op, ranks, inside, dtype)
        result, own = add(outer, extreme), extreme.atom
        some = filled(own) if own is not None and next(iter(extreme.terms)) not in result.terms else None
        # A maximum of what masks leave out is -inf still when it cancels against itself.
        return result if some is None else add(result, lift(lbr(some)))

    def _extreme_of(self, op: str, ranks: tuple[str, ...], body: Form, dtype: str) -> Form:
        over = frozenset(ranks)
        m, q = body.single or factored(body)
        flipped = {"max": "min", "min": "max"}[op]
        # exp, and whatever increases, lets the extreme through.
        if m.exponent is not None and m.exponent.free & over and q > 0:
            varying = [(a, p) for a, p in m.factors if a.free & over]
            hidden = [b for b in m.brackets if b.free & over]
            if not varying and not (hidden and op == "min"):
                rest = Form(
                    {
                        Monomial(
                            [(a, p) for a, p in m.factors if not a.free & over],
                            None,
                            [b for b in m.brackets if b not in hidden],
                        ): q
                    }
                )
                if nonnegative(rest):
                    exponent = masked(m.exponent, hidden)
                    return mul(rest, exp(self.extreme(op, ranks, exponent, dtype)))
        atom = body.atom
        passing = _INCREASING - _PARTIAL if op == "max" else _INCREASING
        if atom is not None and atom.kind == "fn" and atom.name in passing:
            inner = atom.args[0]
            assert isinstance(inner, Form)
            return function(atom.name, (self.extreme(op, ranks, inner, dtype),))
        free = [(a, p) for a, p in m.factors if not a.free & over and (atom_nonnegative(a) or p % 2 == 0)]
        free_exponent = m.exponent if m.exponent is not None and not m.exponent.free & over else None
        outside = Monomial(free, free_exponent)
        masks = [a for t in body.terms for a, _ in t.factors if a.kind == "lbr"]
        if outside.is_one and q > 0 and abs(q) == 1:
            return self._last_extreme(op, ranks, body, dtype)
        kept = Monomial(
            [f for f in m.factors if f not in free], m.exponent if free_exponent is None else None, m.brackets
        )
        if masks and not all(kept_mask(kept, a) for a in masks):
            return self._last_extreme(op, ranks, body, dtype)
        inner = mul(Form({kept: ONE_FRACTION}))
        direction = op if q > 0 else flipped
        if masks and q < 0:
            return self._last_extreme(op, ranks, body, dtype)
        # What leaves is read only where it was before.
        guards = [b for b in m.brackets if not b.free & over and b.free & outside.free]
        outside = Monomial(free, free_exponent, guards)
        value = self.extreme(direction, ranks, inner, dtype)
        some = unless_nothing(outside, Form({kept: ONE_FRACTION}), value)
        return mul(const(abs(q) if q > 0 else q), Form({outside: ONE_FRACTION}), value, some)

    def _last_extreme(self, op: str, ranks: tuple[str, ...], body: Form, dtype: str) -> Form:
        over = frozenset(ranks)
        if waits(body, over):
            for part in (p for m in body.terms for p in pieces(m)):
                if waits_value(part, over):
                    self._block(ranks, part if isinstance(part, Form) else lift(part), body, reason_of(part))
        return lift(Atom("red", op, (body,), ranks, dtype))

    def _place(self, ranks: tuple[str, ...], body: Form) -> Form | None:
        """The place of a maximum that leaves out earlier places: ordered by what those were ordered by."""
        found = self._ranked(ranks, body)
        if found is None:
            return None
        ranking, plain = found
        value, place = (lift(a) for a in ranking.pair(len(ranking.places)))
        if plain:
            # Where all that is left is -inf, what was left out ties with it, and the first place is 0.
            return select(compare("eq", value, const(-inf), integer=False), ZERO, place)
        return select(self._enough(ranking), place, ZERO)

    def _extreme_left(self, ranks: tuple[str, ...], body: Form) -> Form | None:
        """The maximum of what earlier places leave."""
        found = self._ranked(ranks, body)
        if found is None:
            return None
        ranking, plain = found
        value = lift(ranking.pair(len(ranking.places))[0])
        if plain:
            return value
        first = Atom("red", "max", (ranking.values,), ranks)
        whole = self.extreme("max", ranks, split_masks(body, ranks[0])[0])
        reached: list[Atom] = []

        def visit(a: Atom) -> Form | Atom | None:
            if a == first:
                reached.append(a)
                return value
            return a if a.kind == "red" else None

        result = rewrite(whole, visit, {})
        assert isinstance(result, Form)
        return masked(result, [self._enough(ranking)]) if reached else None

    def _ranked(self, ranks: tuple[str, ...], body: Form) -> tuple[Ranking, bool] | None:
        """The ranking that a masked maximum continues, and whether it compares the very values."""
        if self.level != "full" or len(ranks) != 1:
            return None
        values, conditions = split_masks(body, ranks[0])
        if not conditions:
            return None
        already = any(a.kind == "lbr" for m in values.terms for a, _ in m.factors)
        orders = [(values, True)]
        if not already:
            orders.append((self._ordering(values, frozenset(ranks)), False))
        for kept, plain in orders:
            ranking = ranking_of(kept, conditions, ranks[0])
            if ranking is not None and ranking.places:
                return ranking, plain
        return None

    def _enough(self, ranking: Ranking) -> Atom:
        """Whether the fiber has a place beyond those that are left out."""
        size = lift(Atom("extent", ranking.rank, dtype="i64", nonnegative=True))
        return compare("gt", size, const(len(ranking.places)), integer=True)

    def argmax(self, ranks: tuple[str, ...], body: Form) -> Form:
        """The place of a maximum: terms that do not vary and increasing functions change nothing."""
        over = frozenset(ranks)
        left = self._place(ranks, body)
        if left is not None:
            return left
        body = self._ordering(body, over)
        if waits(body, over):
            for part in (p for m in body.terms for p in pieces(m)):
                if waits_value(part, over):
                    self._block(ranks, part if isinstance(part, Form) else lift(part), body, reason_of(part))
        return lift(Atom("red", "argmax", (body,), ranks, "i64"))

    def _ordering(self, body: Form, over: frozenset[str]) -> Form:
        """A simpler value that the same place maximises."""
        changed = self.level == "full"
        while changed and body.terms:
            changed = False
            body = Form({m: q for m, q in body.terms.items() if m.free & over})
            if not body.terms:
                break
            m, q = body.single or factored(body)
            varying = [(a, p) for a, p in m.factors if a.free & over]
            fixed = [(a, p) for a, p in m.factors if not a.free & over]
            good = [(a, p) for a, p in fixed if _keeps_order(a, p)]
            if m.exponent is not None and not varying and q > 0 and good == fixed:
                body, changed = masked(m.exponent, m.brackets), True
                continue
            if good or abs(q) != 1:
                kept = Monomial([f for f in m.factors if f not in good], m.exponent, m.brackets)
                body, changed = mul(Form({kept: ONE_FRACTION if q > 0 else -ONE_FRACTION})), True
                continue
            atom = body.atom
            if atom is not None and atom.kind == "fn" and atom.name in _RISING:
                inner = atom.args[0]
                assert isinstance(inner, Form)
                body, changed = inner, True
        return body


def _keeps_order(a: Atom, power: int) -> bool:
    """Whether values keep their order, ties too, times a power of a: what is 0 makes all of them equal."""
    return is_positive(a) or (power < 0 and (atom_nonnegative(a) or power % 2 == 0))


def kept_mask(m: Monomial, mask: Atom) -> bool:
    """Whether a mask stays an addend of a sum inside the monomial, so that a factor taken out did not scale it."""
    return any(a.kind == "poly" for a, _ in m.factors) or any(a == mask for a, _ in m.factors)
