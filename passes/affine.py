"""Predicates as conjunctions and disjunctions of atoms ``form <= 0`` over affine forms in coordinates.

A coordinate that occurs twice in a comparison is gathered, `//` and `%` by a constant are units of a form, and
minima, maxima and absolute values dissolve into the conjunctions and disjunctions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..ir.cascade import Access, Call, Cast, Const, Expr, Extent, Rank, walk

# Maxima in one comparison; each doubles the atoms that it dissolves into.
MAX_TOPS = 8


@dataclass(frozen=True, slots=True)
class Floor:
    """The quotient ``of // by``, or the remainder ``of % by``; ``by`` is positive."""

    of: Affine
    by: int
    rest: bool


@dataclass(frozen=True, slots=True)
class Top:
    """The greater of two values; it is split up wherever it is compared."""

    a: Affine
    b: Affine


Unit = Rank | Extent | Access | Floor | Top


@dataclass(frozen=True, slots=True)
class Affine:
    """A sum of integer multiples of units, and a constant."""

    terms: tuple[tuple[Unit, int], ...] = ()
    constant: int = 0

    def __add__(self, other: Affine) -> Affine:
        total = dict(self.terms)
        for unit, q in other.terms:
            total[unit] = total.get(unit, 0) + q
        kept = sorted(((u, q) for u, q in total.items() if q), key=lambda t: repr(t[0]))
        return Affine(tuple(kept), self.constant + other.constant)

    def __mul__(self, by: int) -> Affine:
        return Affine(tuple((u, q * by) for u, q in self.terms) if by else (), self.constant * by)

    def __sub__(self, other: Affine) -> Affine:
        return self + other * -1

    def swap(self, unit: Unit, value: Affine) -> Affine:
        """The form with one unit replaced."""
        q = dict(self.terms).get(unit, 0)
        return self + Affine(((unit, -q),)) + value * q if q else self


@dataclass(frozen=True, slots=True)
class Below:
    """The atom ``form <= 0``."""

    form: Affine


@dataclass(frozen=True, slots=True)
class Every:
    """A conjunction."""

    parts: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Some:
    """A disjunction."""

    parts: tuple[Node, ...]


# None is what is not known.
Node = bool | None | Below | Every | Some


def read(e: Expr, positive: bool = True) -> Node:
    """A predicate, or its negation, as conjunctions and disjunctions of atoms."""
    match e:
        case Const(value=value):
            return bool(value) == positive
        case Access():
            form = Affine(((e, 1),))
            return below(Affine((), 1) - form if positive else form)
        case Call(op="not", args=(a,)):
            return read(a, not positive)
        case Call(op="and" | "or" as op, args=args):
            return join([read(a, positive) for a in args], (op == "and") == positive)
        case Call(op="where", args=(c, a, b)):
            chosen = join([read(c, False), read(a, positive)], False)
            return join([chosen, join([read(c), read(b, positive)], False)], True)
        case Call(op="lt" | "le" | "gt" | "ge" | "eq" | "ne" as op, args=(a, b)):
            left, right = _affine(a), _affine(b)
            return None if left is None or right is None else _compare(op, left - right, positive)
        case _:
            return None


def _compare(op: str, d: Affine, positive: bool) -> Node:
    if not positive:
        op = {"lt": "ge", "ge": "lt", "gt": "le", "le": "gt", "eq": "ne", "ne": "eq"}[op]
    one = Affine((), 1)
    match op:
        case "lt" | "le":
            return below(d + one if op == "lt" else d)
        case "gt" | "ge":
            return below(one - d if op == "gt" else d * -1)
        case "eq":
            return join([below(d), below(d * -1)], True)
        case _:
            return join([below(d + one), below(one - d)], False)


def below(form: Affine) -> Node:
    """``form <= 0``; a maximum that is at most 0 has both its parts at most 0."""
    if _tops(form) > MAX_TOPS:
        return None
    for unit, q in form.terms:
        if isinstance(unit, Top):
            return join([below(form.swap(unit, unit.a)), below(form.swap(unit, unit.b))], q > 0)
    return Below(form) if form.terms else form.constant <= 0


def join(parts: list[Node], every: bool) -> Node:
    """A conjunction or a disjunction, flattened, without what decides nothing."""
    kind = Every if every else Some
    flat: dict[Node, None] = {}
    for x in parts:
        flat.update(dict.fromkeys(x.parts if isinstance(x, kind) else (x,)))
    if (not every) in flat:
        return not every
    flat.pop(every, None)
    return every if not flat else next(iter(flat)) if len(flat) == 1 else kind(tuple(flat))


def _affine(e: Expr) -> Affine | None:
    """An integer expression as a form; None where it is not affine, or where data might wrap in a narrow type."""
    match e:
        case Const(value=int() as value, kind="int"):
            return Affine((), value)
        case Rank() | Extent() | Access():
            return Affine(((e, 1),))
        case Cast(dtype="i64", arg=arg):
            return _affine(arg)
        case Call(op="maximum" | "minimum" | "abs" as op, args=args):
            pair = [_affine(args[0]), _affine(args[-1])]
            if pair[0] is None or pair[1] is None:
                return None
            sign = -1 if op == "minimum" else 1
            return Affine(((Top(pair[0] * sign, pair[1] * (-1 if op == "abs" else sign)), sign),))
        case Call(args=args):
            if any(isinstance(n, Access) for n in walk(e)) and not any(map(_is_wide, args)):
                return None
            forms = [_affine(a) for a in args]
            known = [f for f in forms if f is not None]
            return _arithmetic(e.op, known) if len(known) == len(forms) else None
        case _:
            return None


def _is_wide(e: Expr) -> bool:
    """Whether arithmetic with the value is done in i64."""
    return isinstance(e, Rank | Extent | Cast) or (isinstance(e, Call) and any(map(_is_wide, e.args)))


def _arithmetic(op: str, args: list[Affine]) -> Affine | None:
    by = args[-1].constant if not args[-1].terms else None
    match op:
        case "neg":
            return args[0] * -1
        case "add":
            return args[0] + args[1]
        case "sub":
            return args[0] - args[1]
        case "mul" if by is not None:
            return args[0] * by
        case "mul" if not args[0].terms:
            return args[1] * args[0].constant
        case "floordiv" | "mod" if by is not None and by > 0:
            return _floor(args[0], by, op == "mod")
        case "lshift" if by is not None and 0 <= by < 63:
            return args[0] * (1 << by)
        case "rshift" if by is not None and 0 <= by < 63:
            return _floor(args[0], 1 << by, False)
        case _:
            return None


def _floor(form: Affine, by: int, rest: bool) -> Affine | None:
    """A quotient or remainder; quotients commute with a maximum, and a remainder is what a quotient leaves."""
    if _tops(form) > MAX_TOPS:
        return None
    for unit, q in form.terms:
        if isinstance(unit, Top):
            a, b = _floor(form.swap(unit, unit.a), by, False), _floor(form.swap(unit, unit.b), by, False)
            if a is None or b is None:
                return None
            sign = 1 if q > 0 else -1
            times = Affine(((Top(a * sign, b * sign), sign),))
            return form - times * by if rest else times
    if not form.terms:
        return Affine((), form.constant % by if rest else form.constant // by)
    return Affine(((Floor(form, by, rest), 1),))


def forms_of(node: Node) -> Iterator[Affine]:
    if isinstance(node, Below):
        yield node.form
    elif isinstance(node, Every | Some):
        for x in node.parts:
            yield from forms_of(x)


def units_of(form: Affine) -> Iterator[Unit]:
    for unit, _ in form.terms:
        yield unit
        if isinstance(unit, Floor):
            yield from units_of(unit.of)


def _tops(form: Affine) -> int:
    return sum(1 + _tops(u.a) + _tops(u.b) for u, _ in form.terms if isinstance(u, Top))
