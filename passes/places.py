"""Places: the best J elements of a fiber, as one reduction.

A maximum that leaves out the places of earlier maxima waits for them: top-2 written out is two passes. The best J
of two lists are among the best J of each, so (value, place) pairs, best first, are a monoid (the k-truncated
merge):

    I1[t] = argmax[e](X[t, e])                                (V1[t], I1[t], V2[t], I2[t]) =
    I2[t] = argmax[e](where(e == I1[t], -inf, X[t, e]))  ->       stream[e](X[t, e], e, -inf, 2147483647)

Ties go to the first place, and NaN comes before all else, as argmax has it.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..ir.cascade import Access, Expr
from .brackets import compare
from .forms import Atom, Form, Monomial, lift
from .normal import masked

# The place of no element: greater than any.
NOWHERE = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Ranking:
    """The first places of one order: the values compared, and the argmax of each place, best first."""

    values: Form
    rank: str
    places: tuple[Atom, ...]

    def pair(self, j: int) -> tuple[Atom, Atom]:
        """The value and the place of the j-th best, as reductions that leave out those before it."""
        body = self.values
        for p in self._left_out(j):
            body = masked(body, [p])
        return Atom("red", "max", (body,), (self.rank,)), Atom("red", "argmax", (body,), (self.rank,), "i64")

    def every(self) -> list[Atom]:
        """The values and places of all, best first."""
        return [a for j in range(len(self.places) + 1) for a in self.pair(j)]

    def _left_out(self, j: int) -> list[Atom]:
        here = lift(Atom("rank", self.rank, dtype="i64"))
        return [compare("ne", here, lift(p), integer=True) for p in self.places[:j]]


def split_masks(body: Form, rank: str) -> tuple[Form, list[Atom]]:
    """A sum as (values, the conditions of the masks that leave out places)."""
    values, conditions = {}, []
    for m, q in body.terms.items():
        only = m.factors[0][0] if len(m.factors) == 1 and m.exponent is None and not m.brackets else None
        if only is None or only.kind != "lbr" or q != 1:
            values[m] = q
            continue
        condition = only.args[0]
        assert isinstance(condition, Atom)
        joined = condition.args if condition.kind == "pred" and condition.name == "and" else (condition,)
        parts = [p for p in joined if isinstance(p, Atom)]
        if all(place_left_out(p, rank) is not None for p in parts):
            conditions += parts
        else:
            values[m] = q
    passed = set(conditions)
    return Form({Monomial(m.factors, m.exponent, set(m.brackets) - passed): q for m, q in values.items()}), conditions


def place_left_out(condition: Atom, rank: str) -> Atom | None:
    """The argmax whose place a condition ``rank != argmax`` leaves out."""
    inner = condition.args[0] if condition.name == "not" and condition.args else None
    if not isinstance(inner, Atom) or inner.name != "eq0":
        return None
    difference = inner.args[0]
    assert isinstance(difference, Form)
    found: Atom | None = None
    for m, q in difference.terms.items():
        if len(m.factors) != 1 or m.exponent is not None or abs(q) != 1:
            return None
        atom, power = m.factors[0]
        if atom.kind == "red" and atom.name == "argmax" and atom.ranks == (rank,) and power == 1:
            found = atom if not any(b.free for b in m.brackets) else None
        elif atom.kind != "rank" or atom.name != rank or m != Monomial([(atom, 1)]):
            return None
    return found if len(difference.terms) == 2 else None


def ranking_of(values: Form, conditions: list[Atom], rank: str) -> Ranking | None:
    """The ranking that conditions leave out the first places of; None where they leave out anything else."""
    places: list[Atom] = []
    for condition in conditions:
        place = place_left_out(condition, rank)
        if place is None:
            return None
        places.append(place)
    # The j-th place leaves out the j before it.
    ordered = sorted(set(places), key=lambda p: len(split_masks(_body(p), rank)[1]))
    ranking = Ranking(values, rank, tuple(ordered))
    good = all(ranking.pair(j)[1] == place for j, place in enumerate(ordered))
    return ranking if good else None


def ranking_behind(atom: Atom) -> Ranking | None:
    """The ranking whose next place or value a reduction is; None for any other."""
    if atom.kind != "red" or atom.name not in ("max", "argmax") or len(atom.ranks) != 1:
        return None
    values, conditions = split_masks(_body(atom), atom.ranks[0])
    return ranking_of(values, conditions, atom.ranks[0]) if conditions else None


def _body(a: Atom) -> Form:
    body = a.args[0]
    assert isinstance(body, Form)
    return body


def _before(v: Expr, i: Expr, w: Expr, at: Expr) -> Expr:
    """Whether the value v at the place i comes before w at ``at``: NaN before all else, of equals the first place."""
    from .lower_atoms import call

    earlier = call("lt", i, at)
    greater = call("or", call("gt", v, w), call("and", call("eq", v, w), earlier))
    return call("or", greater, call("and", call("ne", v, v), call("or", call("eq", w, w), earlier)))


def merged(names: list[tuple[str, str]]) -> list[tuple[str, Expr]]:
    """The assignments that merge two lists of (value, place) pairs, best first: b's are inserted into a's in turn."""
    from .lower_atoms import call

    body: list[tuple[str, Expr]] = []

    def assign(name: str, e: Expr) -> Expr:
        body.append((name, e))
        return Access(name)

    kept: list[tuple[Expr, Expr]] = [(Access(f"a_{v}"), Access(f"a_{i}")) for v, i in names]
    for n, (value, place) in enumerate(names):
        v: Expr = Access(f"b_{value}")
        i: Expr = Access(f"b_{place}")
        # An entry of b cannot come before those of b that are better.
        for j in range(n, len(kept)):
            w, at = kept[j]
            last = j == len(kept) - 1
            better = assign(f"better{n}{j}", _before(v, i, w, at))
            final = j == n
            kept[j] = (
                assign(names[j][0] if final else f"v{n}{j}", call("where", better, v, w)),
                assign(names[j][1] if final else f"i{n}{j}", call("where", better, i, at)),
            )
            if not last:
                v = assign(f"w{n}{j}", call("where", better, w, v))
                i = assign(f"j{n}{j}", call("where", better, at, i))
    return body
