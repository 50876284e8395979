"""Which reductions stream together, so that no stream waits for itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fractions import Fraction

from .centred import centres, count_of, lower_powers, reductions_over
from .emptiness import filled
from .exponents import common_exponent, shared_brackets
from .forms import LN2, UNIT, ZERO, Atom, Form, Value, lift, scale, values_inside
from .functions import function, log
from .normal import const, masked, mul
from .normal import power as raise_to
from .places import Ranking, ranking_behind
from .separate import Reductions
from .stream import Gauge
from .waiting import waits


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
        self.gauge_of: dict[bytes, Gauge | None] = {}
        self.group_of: dict[bytes, dict[bytes, Atom]] = {}
        self.settled: set[bytes] = set()
        self.rankings: dict[bytes, Ranking] = {}
        self.rank_of: dict[bytes, bytes] = {}
        self.read_by: dict[bytes, list[Atom]] = {}

    def gauge(self, atom: Atom) -> Gauge | None:
        """The gauge of a sum whose exponential is bare, or that was divided by powers of an extreme."""
        if atom.digest not in self.gauge_of:
            self.gauge_of[atom.digest] = self._find_gauge(atom)
        return self.gauge_of[atom.digest]

    def _find_gauge(self, atom: Atom) -> Gauge | None:
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
        brackets = tuple(sorted({*shared_brackets(body), *_shared_contents(body)}, key=lambda b: b.digest))
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
            trail.extend(a for a in ranking.every() if a not in trail)
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
        self.rank_of.update({a.digest: key for a in longest.every()})

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


def _shared_contents(body: Form) -> frozenset[Atom]:
    """Where something comes into factors that masks may leave empty, if the exponent is no number elsewhere.

    ``exp(L[a] - M[a]) * L[a]`` of a masked maximum M: where nothing came, -M is inf, and the product is 0.
    """
    exponent = common_exponent(body)
    if exponent is None or not any(filled(a) for m, q in exponent.terms.items() if q < 0 for a, _ in m.factors):
        return frozenset()
    return frozenset.intersection(
        *(frozenset(p for a, n in m.factors if n > 0 and (p := filled(a)) is not None) for m in body.terms)
    )


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

    order = {a.digest: i for r in plan.rankings.values() for i, a in enumerate(r.every())}

    def key(a: Atom) -> tuple[bool, int, bool, int, bytes]:
        summed = a.name not in ("max", "min", "argmax")
        return summed, order.get(a.digest, 0), a.digest in plan.reductions.centred, len(a.free), a.digest

    for a in sorted(group, key=key):
        place(a)
    mine = {a.digest for a in group}
    return [a for a in done.values() if a.digest in mine]


def extended(gauge: Gauge, ranks: tuple[str, ...]) -> Atom:
    """The extreme that an extended exponent streams: the greatest of the rounded exponents."""
    return Atom("red", "max", (masked(rounded_exponent(gauge), gauge.brackets),), ranks)


def rounded_exponent(gauge: Gauge) -> Form:
    """The integer nearest to an exponent, in units of its base."""
    return function("round", (mul(gauge.exponent, raise_to(unit_of(gauge), -1)),))


def unit_of(gauge: Gauge) -> Form:
    """What an extended exponent counts: ln 2 where every term has it, as ``exp2`` writes them, else 1.

    In its own base an exponent minus the nearest integer is exact in floats, however large it is.
    """
    binary = all(any(a.kind == "ln2" and p == 1 for a, p in m.factors) for m in gauge.exponent.terms)
    return const(LN2) if binary else UNIT
