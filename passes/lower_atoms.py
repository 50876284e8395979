"""Atoms back to expressions: accesses, casts, reductions, and conditions in the order in which they guard."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fractions import Fraction
from math import inf

from ..ir.cascade import Access, Call, Cast, Const, Expr, Extent, Rank, Reduce, negative
from ..ir.dtypes import DTYPES
from ..ir.print import print_expr
from .forms import LN2, ONE_FRACTION, UNIT, Atom, Form, Value, parts_of
from .integers import SMALL_NUMBER, is_integral, is_narrow, may_be_integral

# What an atom becomes, where the caller decides; None leaves it to `Lowering`.
Hook = Callable[[Atom], Expr | None]

MINUS_INF: Expr = Call("neg", (Const(inf),))

# The largest integer of i64, and of a literal.
LARGEST = (1 << 63) - 1


def call(op: str, *args: Expr) -> Expr:
    return Call(op, args)


def literal(q: Fraction, whole: bool) -> Expr:
    """A number of either sign as a literal: a float, unless ``whole`` asks for an integer and i64 holds it."""
    if not whole or q.denominator != 1 or abs(q) > 1 << 63:
        return negative(float(q))
    if abs(q) == 1 << 63:
        # No literal goes beyond 2^63 - 1; of either sign it is the least integer, as integers wrap.
        return call("sub", negative(-LARGEST), Const(1))
    return negative(int(q))


def either(q: Fraction) -> Expr:
    """A number beside floats as people write it: 3, but 0.5 and 1e20."""
    return literal(q, q.denominator == 1 and abs(q) < 1 << 53)


class Atoms:
    """Turns atoms into expressions; sums and products are the layer above."""

    hook: Hook | None
    room: int | None
    # Whether what is written is summed: there a factor that is 0 hides nothing in a product of two tiles.
    inside = False

    def form(self, f: Form, *, whole: bool | None = None) -> Expr:
        """A form; ``whole`` says that it must be an integer, None that it is one if it can be."""
        raise NotImplementedError

    def settled(self, a: Atom, body: Form) -> Form:
        """The argument of a reduction with its exponentials as they are to be written."""
        return body

    def value(self, v: Value) -> Expr:
        return self.form(v) if isinstance(v, Form) else self.atom(v)

    def float(self, f: Form, dtype: str = "f32") -> Expr:
        """A form as a float: a literal with its point, integers converted."""
        c = f.constant
        if c is not None:
            return literal(c, whole=False)
        e = self.form(f)
        return Cast(dtype, e) if is_integral(f) else e

    def atom(self, a: Atom) -> Expr:
        if self.hook is not None and (found := self.hook(a)) is not None:
            return found
        if self.room is None:
            return self._atom(a)
        if self.room == 0:
            return Access("…")
        self.room -= 1
        found = self._atom(a)
        self.room += 1
        return found

    def _atom(self, a: Atom) -> Expr:
        match a.kind:
            case "access":
                return Access(a.name, tuple(self.form(as_form(i), whole=True) for i in a.args))
            case "rank":
                return Rank(a.name)
            case "extent":
                return Extent(a.name)
            case "ln2":
                return Const(LN2)
            case "inf":
                return Const(inf)
            case "poly" | "aligned":
                return self.form(as_form(a.args[0]))
            case "cast":
                return Cast(a.name, self.form(as_form(a.args[0])))
            case "lbr":
                inner = a.args[0]
                assert isinstance(inner, Atom)
                return call("where", self.atom(inner), zero([a]), MINUS_INF)
            case "int":
                return self._integer(a)
            case "red":
                return Reduce(a.name, a.ranks, tuple(self.body(a, x) for x in a.args))
            case "pred":
                return self._predicate(a)
            case "below":
                # Of nothing but -inf there is nothing to take off: what is left is 1, at a scale that is 0.
                power, top = self.form(as_form(a.args[0])), self.form(as_form(a.args[1]))
                return call("where", call("eq", top, MINUS_INF), Const(1.0), power)
            case _:
                return Call(a.name, tuple(self.value(x) for x in a.args))

    def body(self, a: Atom, x: Value) -> Expr:
        """The argument of a reduction: a float where the reduction is one."""
        if isinstance(x, Atom):
            return self.atom(x)
        before, self.inside = self.inside, True
        x = self.settled(a, x)
        if a.dtype in ("f32", "f64"):
            e = self.float(x)
        else:
            e = self.form(x, whole=None if a.name == "argmax" else True)
        self.inside = before
        return e

    def _integer(self, a: Atom) -> Expr:
        if a.name.startswith("cast:"):
            v, dtype = a.args[0], a.name[5:]
            # What floats were before is told by a cast of its own (`as_truncated`).
            whole = DTYPES[dtype].is_integer and isinstance(v, Form) and may_be_integral(v)
            return Cast(dtype, self.form(as_form(v), whole=True) if whole else self.value(v))
        return Call(a.name, tuple(self.form(x, whole=True) if isinstance(x, Form) else self.atom(x) for x in a.args))

    # Conditions

    def _predicate(self, a: Atom) -> Expr:
        if a.name in ("true", "false"):
            return Const(a.name == "true")
        if a.name in ("ge0", "eq0"):
            return self._comparison(as_form(a.args[0]), "ge" if a.name == "ge0" else "eq")
        if a.name == "not":
            inner = a.args[0]
            assert isinstance(inner, Atom)
            if inner.name == "eq0":
                return self._comparison(as_form(inner.args[0]), "ne")
            if inner.name == "eq":
                return self._equal("ne", inner)
            return call("not", self.atom(inner))
        if a.name == "or":
            return self._all(a.args, "or")
        if a.name == "and":
            *outside, last = _guarding(a.args)
            e = self._all(last)
            for group in reversed(outside):
                e = call("where", self._all(group), e, Const(False))
            return e
        if a.name.startswith("access:"):
            return Access(a.name[7:], tuple(self.form(as_form(i)) for i in a.args))
        if a.name.startswith("red:"):
            return Reduce(a.name[4:], a.ranks, tuple(self.value(x) for x in a.args))
        if a.name == "eq":
            return self._equal("eq", a)
        return Call(a.name, self._sides(a))

    def _equal(self, op: str, a: Atom) -> Expr:
        """``x == 0`` rather than ``0 == x``."""
        first, second = self._sides(a)
        return call(op, second, first) if isinstance(first, Const) else call(op, first, second)

    def _sides(self, a: Atom) -> tuple[Expr, ...]:
        """What is compared. Numbers beside integers are such, and so are large ones by themselves, -2^63 among them."""
        forms = [x for x in a.args if isinstance(x, Form)]
        large = any(not m.factors and abs(q) >= SMALL_NUMBER for f in forms for m, q in f.terms.items())
        integers = large or any(f.constant is None and is_integral(f) for f in forms)
        whole = True if integers and all(map(may_be_integral, forms)) else None
        return tuple(self.form(x, whole=whole) if isinstance(x, Form) else self.value(x) for x in a.args)

    def _all(self, parts: object, op: str = "and") -> Expr:
        found = sorted((self.atom(p) for p in parts if isinstance(p, Atom)), key=print_expr)  # type: ignore[attr-defined]
        e = found[0]
        for p in found[1:]:
            e = call(op, e, p)
        return e

    def _comparison(self, f: Form, op: str) -> Expr:
        """``f >= 0`` with its negative terms on the other side: q - k >= 0 is q >= k, k - q - 1 >= 0 is k > q.

        A number joins no data of 32 bits, which may wrap there, nor does the least integer: x + 1 >= 0 is x >= -1.
        """
        left = {m: q for m, q in f.terms.items() if q > 0}
        right = {m: -q for m, q in f.terms.items() if q < 0}
        one = next(iter(UNIT.terms))
        alone = {one: f.terms[one]} if one in f.terms else {}
        if alone and (is_narrow(f) or abs(alone[one]) > 1 << 62):
            left, right = ({m: q for m, q in side.items() if m != one} for side in (left, right))
            if not right:
                return call(op, self.form(Form(left), whole=True), literal(-alone[one], True))
            if not left:
                return call(op, literal(alone[one], True), self.form(Form(right), whole=True))
            left, right = (
                left | {m: q for m, q in alone.items() if q > 0},
                right | {m: -q for m, q in alone.items() if q < 0},
            )
        if op == "ge" and right.get(one) == ONE_FRACTION and len(right) > 1:
            del right[one]
            op = "gt"
        return call(op, self.form(Form(left), whole=True), self.form(Form(right), whole=True))

    def _where(self, parts: Iterable[Atom], e: Expr, otherwise: Expr) -> Expr:
        """A select under several conditions, those outside under which alone others may read."""
        for group in reversed(levels(parts)):
            e = call("where", self._all(group), e, otherwise)
        return e


def levels(parts: Iterable[Atom]) -> list[list[Atom]]:
    """Conditions in groups, outermost first: what one asks may be there to be read only where those before it hold.

    Those on coordinates alone come first, then those that read tensors in place, at other places, at places that are
    read themselves, and so on.
    """
    every = [c for p in parts for c in (p.args if p.kind == "pred" and p.name == "and" else (p,))]
    found: dict[int, list[Atom]] = {}
    memo: dict[bytes, int] = {}
    for p in dict.fromkeys(every):
        assert isinstance(p, Atom)
        found.setdefault(_reads(p, memo), []).append(p)
    return [found[n] for n in sorted(found)]


def _guarding(parts: Iterable[Value]) -> list[list[Atom]]:
    """Conditions in groups, those that read at computed places after those that let them."""
    every = [p for p in parts if isinstance(p, Atom)]
    far = [p for p in every if _reads(p, {}) > 1]
    near = [p for p in every if p not in far]
    return [near, *levels(far)] if near and far else [every]


def _reads(v: Value, memo: dict[bytes, int]) -> int:
    """How a value reads data: 0 not at all, 1 at ranks, 2 at computed places, 3 and more at places that it reads."""
    if v.digest not in memo:
        deepest = max((_reads(x, memo) for x in parts_of(v)), default=0)
        if isinstance(v, Atom) and (v.kind == "access" or v.name.startswith("access:")):
            bare = all(isinstance(i, Form) and i.atom is not None and i.atom.kind == "rank" for i in v.args)
            deepest = 2 + deepest if deepest else 1 if bare else 2
        elif isinstance(v, Atom) and (v.kind == "red" or v.name.startswith("red:")):
            deepest = max(deepest, 1)
        memo[v.digest] = deepest
    return memo[v.digest]


def as_form(v: Value) -> Form:
    assert isinstance(v, Form)
    return v


def zero(masks: Iterable[Atom]) -> Expr:
    """What stands where masks that stand alone leave nothing out."""
    return Cast("f64", Const(0.0)) if any(a.dtype == "f64" for a in masks) else Const(0.0)
