"""Which coordinates of a rank a predicate can let through over a tile, as expressions for generated loops.

In the expressions each other rank stands for one end of its tile: ``q.first`` and ``q.last`` are its least and greatest
coordinate, names that no rank of a text can have. An integer tensor's element ``len[b]`` likewise stands for its bounds
over the tile, ``len.least[b]`` and ``len.greatest[b]``; a scalar stands for itself.

Each disjunct of a predicate gives one range, so that a sink and a window leave out what lies between them. Other ranks
are eliminated by Fourier and Motzkin's method, which is exact for integers where of two coefficients one is 1.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import reduce

from ..ir.cascade import Access, Call, Const, Expr, Extent, Rank, negative, ranks_named, transform
from ..ir.interval import Interval, interval
from .affine import Affine, Below, Every, Floor, Node, Some, Unit, read, units_of

# Ranges that a union may fall into, and inequalities that elimination may make, before it settles for less.
MAX_RANGES, MAX_FORMS = 16, 64


@dataclass(frozen=True, slots=True)
class Range:
    """The coordinates from the greatest of ``lower`` to the least of ``upper``, both included, if all of ``when`` hold.

    No bound means that the range is open on that side.
    """

    lower: tuple[Expr, ...] = ()
    upper: tuple[Expr, ...] = ()
    when: tuple[Expr, ...] = ()

    def within(
        self,
        span: Interval,
        box: Mapping[str, Interval],
        extents: Mapping[str, int] | None = None,
        data: Mapping[str, Interval] | None = None,
    ) -> Interval:
        """The range as numbers, cut to ``span``, for a box of the other ranks; (0, -1) for nothing."""

        def at(e: Expr) -> int:
            found = interval(transform(e, pin), ends, extents)
            assert found is not None, "a bound is made of ends of tiles, extents and bounds of data"
            return found[0]

        def pin(e: Expr) -> Expr:
            if not isinstance(e, Access):
                return e
            tensor, _, end = e.tensor.partition(".")
            return negative((data or {})[tensor][end == "greatest"])

        ends = {r + ".first": (a, a) for r, (a, _) in box.items()} | {r + ".last": (b, b) for r, (_, b) in box.items()}
        low, high = max([span[0], *map(at, self.lower)]), min([span[1], *map(at, self.upper)])
        holds = all(at(w.args[0]) <= 0 for w in self.when if isinstance(w, Call))
        return (low, high) if holds and low <= high else (0, -1)


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a predicate lets through of a rank, over a tile of the others.

    Where no range of ``touch`` holds a coordinate, the predicate fails all over the tile; where one of ``full`` does,
    it holds all over the tile. ``exact`` says that ``touch`` holds no coordinate in vain.
    """

    touch: tuple[Range, ...]
    full: tuple[Range, ...]
    exact: bool

    @property
    def hull(self) -> Range:
        """One range that encloses all of ``touch``; empty (1 to 0) where there is none."""
        if not self.touch:
            return Range((Const(1),), (Const(0),))
        if len(self.touch) == 1:
            return self.touch[0]
        lows = [_fold("maximum", r.lower) for r in self.touch if r.lower]
        highs = [_fold("minimum", r.upper) for r in self.touch if r.upper]
        everywhere = len(self.touch)
        return Range(
            (_fold("minimum", lows),) if len(lows) == everywhere else (),
            (_fold("maximum", highs),) if len(highs) == everywhere else (),
        )


def first(rank: str) -> Rank:
    """The least coordinate of a rank's tile."""
    return Rank(rank + ".first")


def last(rank: str) -> Rank:
    """The greatest coordinate of a rank's tile."""
    return Rank(rank + ".last")


def loop_bounds(p: Expr, rank: str, data: Collection[str] = ()) -> Bounds:
    """Bounds on one rank's coordinates, by the ends of the other ranks' tiles, where a predicate may and does hold.

    ``data`` names the integer scalars and tensors whose bounds will be known; what reads others gives no bounds.
    """
    disjuncts = _disjuncts(read(p))
    if disjuncts is None:
        return Bounds((Range(),), (), False)
    touch, full, exact = [], [], True
    for forms in disjuncts:
        found, sure = _touched(forms, rank, data)
        exact = exact and sure
        touch += [found] if found is not None else []
        inner = _filled(forms, rank, data)
        full += [inner] if inner is not None else []
    return Bounds(tuple(dict.fromkeys(touch)), tuple(dict.fromkeys(full)), exact)


def _disjuncts(node: Node) -> list[tuple[Affine | None, ...]] | None:
    """A disjunction of conjunctions of ``form <= 0``, None in place of what is not known; None if it grows too long."""
    match node:
        case bool():
            return [()] if node else []
        case None:
            return [(None,)]
        case Below(form=form):
            return [(form,)]
        case Some(parts=parts):
            found = [_disjuncts(x) for x in parts]
            if any(f is None for f in found) or sum(len(f or ()) for f in found) > MAX_RANGES:
                return None
            return [d for f in found for d in f or ()]
        case Every(parts=parts):
            total: list[tuple[Affine | None, ...]] = [()]
            for x in parts:
                more = _disjuncts(x)
                if more is None or len(total) * len(more) > MAX_RANGES:
                    return None
                total = [a + b for a in total for b in more]
            return total


def _touched(forms: tuple[Affine | None, ...], rank: str, data: Collection[str]) -> tuple[Range | None, bool]:
    """The range where a conjunction may hold, and whether it holds somewhere for each coordinate in it."""
    exact = None not in forms
    kept = []
    for form in (_isolated(f, rank) for f in forms if f is not None):
        if form is None or (ended := _ended(form, data, False, (rank, *_direct(form)))) is None:
            exact = False
            continue
        kept.append(ended)
        exact = exact and not _entangled(form, [f for f in forms if f is not None])
    for other in sorted({r for f in kept for r in _direct(f) if r != rank}):
        kept, sure = _eliminated(kept, other)
        exact = exact and sure
    found = _range(kept, rank)
    # A range that is empty for every tile is no loss of exactness, nor is anything dropped from it.
    return found, exact or found is None


def _filled(forms: tuple[Affine | None, ...], rank: str, data: Collection[str]) -> Range | None:
    """The range where a conjunction holds all over the tile."""
    ended = []
    for f in forms:
        form = None if f is None else _isolated(f, rank)
        worst = None if form is None else _ended(form, data, True, (rank,))
        if worst is None:
            return None
        ended.append(worst)
    return _range(ended, rank)


def _direct(form: Affine) -> tuple[str, ...]:
    """The ranks that a form is linear in, other than ends of tiles."""
    return tuple(u.name for u, _ in form.terms if isinstance(u, Rank) and "." not in u.name)


def _named(unit: Unit) -> set[str]:
    """The ranks inside a unit."""
    if isinstance(unit, Floor):
        return {r for u in units_of(unit.of) if not isinstance(u, Floor) for r in _named(u)}
    return set(ranks_named(unit)) if isinstance(unit, Rank | Access) else set()


def _entangled(form: Affine, forms: list[Affine]) -> bool:
    """Whether the ends of a form's quotients, remainders and data need not be attained together with all else."""
    counts = [r for f in forms for u, _ in f.terms for r in _named(u)]
    return any(
        (isinstance(u, Floor) and (u.rest or len(_named(u)) > 1 or any(counts.count(r) > 1 for r in _named(u))))
        or (isinstance(u, Access) and bool(u.indices))
        for u, _ in form.terms
    )


def _isolated(form: Affine, rank: str) -> Affine | None:
    """The form with the rank out of its quotients: ``x // c <= y`` is ``x <= c*y + c - 1``; None where it stays in."""
    for unit, q in form.terms:
        if isinstance(unit, Floor) and rank in _named(unit):
            if unit.rest or abs(q) != 1:
                return None
            rest = form.swap(unit, Affine()) * unit.by
            return _isolated(unit.of + rest - Affine((), unit.by - 1) if q > 0 else rest - unit.of, rank)
    return None if any(isinstance(u, Access) and rank in _named(u) for u, _ in form.terms) else form


def _ended(form: Affine, data: Collection[str], greatest: bool, kept: tuple[str, ...]) -> Affine | None:
    """The least or greatest value of a form over the tile, as a form over ends; ``kept`` ranks stay as they are."""
    total = Affine((), form.constant)
    for unit, q in form.terms:
        top = greatest == (q > 0)
        match unit:
            case Rank(name=name):
                end: Affine | None = Affine(((unit if name in kept else (last if top else first)(name), 1),))
            case Extent():
                end = Affine(((unit, 1),))
            case Access(tensor=tensor, indices=indices) if tensor in data:
                bound = replace(unit, tensor=tensor + (".greatest" if top else ".least")) if indices else unit
                end = Affine(((bound, 1),))
            case Floor(of=of, by=by, rest=True):
                end = Affine((), by - 1 if top else 0)
            case Floor(of=of, by=by):
                inside = _ended(of, data, top, ())
                end = None if inside is None else Affine(((Floor(inside, by, False), 1),))
            case _:
                end = None
        if end is None:
            return None
        total = total + end * q
    return total


def _eliminated(forms: list[Affine], rank: str) -> tuple[list[Affine], bool]:
    """What inequalities say when a coordinate may be anything between the ends of its tile."""
    unit = Rank(rank)
    at = [dict(f.terms).get(unit, 0) for f in forms]
    above = [(f, q) for f, q in zip(forms, at, strict=True) if q > 0]
    below = [(f, q) for f, q in zip(forms, at, strict=True) if q < 0]
    new = [f for f, q in zip(forms, at, strict=True) if not q]
    new += [f.swap(unit, Affine(((first(rank), 1),))) for f, _ in above]
    new += [f.swap(unit, Affine(((last(rank), 1),))) for f, _ in below]
    if len(new) + len(above) * len(below) > MAX_FORMS:
        return new, False
    new += [f * -b + g * a for f, a in above for g, b in below]
    return new, all(a == 1 or b == -1 for _, a in above for _, b in below)


def _range(forms: list[Affine], rank: str) -> Range | None:
    """The coordinates for which every form is at most 0; None where there are none whatever the tile."""
    unit = Rank(rank)
    lower: dict[tuple[object, ...], tuple[Affine, int]] = {}
    upper: dict[tuple[object, ...], tuple[Affine, int]] = {}
    when: dict[tuple[object, ...], Affine] = {}
    for form in forms:
        q = dict(form.terms).get(unit, 0)
        rest = form.swap(unit, Affine())
        if q == 0:
            if not form.terms and form.constant > 0:
                return None
            if form.terms and (form.terms not in when or form.constant > when[form.terms].constant):
                when[form.terms] = form
            continue
        # Of two bounds that differ by a constant the tighter one stays: in both cases that of the greater rest.
        side = lower if q < 0 else upper
        key = (rest.terms, q)
        if key not in side or rest.constant > side[key][0].constant:
            side[key] = (rest, q)
    lows = [_expr(rest) if q == -1 else _expr(rest + Affine((), -q - 1), -q) for rest, q in lower.values()]
    highs = [_expr(rest * -1, q) for rest, q in upper.values()]
    return Range(tuple(lows), tuple(highs), tuple(Call("le", (_expr(f), Const(0))) for f in when.values()))


def _expr(form: Affine, by: int = 1) -> Expr:
    """A form as an expression, floored by ``by``."""
    if not form.terms:
        return negative(form.constant // by)
    total: Expr | None = None
    for unit, q in sorted(form.terms, key=lambda t: t[1] < 0):
        term: Expr = _expr(unit.of, unit.by) if isinstance(unit, Floor) else unit  # type: ignore[assignment]
        term = term if abs(q) == 1 else Call("mul", (Const(abs(q)), term))
        if total is None:
            total = term if q > 0 else Call("neg", (term,))
        else:
            total = Call("add" if q > 0 else "sub", (total, term))
    assert total is not None
    if form.constant:
        total = Call("add" if form.constant > 0 else "sub", (total, Const(abs(form.constant))))
    return total if by == 1 else Call("floordiv", (total, Const(by)))


def _fold(op: str, parts: Collection[Expr]) -> Expr:
    return reduce(lambda a, b: Call(op, (a, b)), dict.fromkeys(parts))
