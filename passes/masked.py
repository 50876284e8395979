"""Values and flags of expressions: where each is the 0 or the -inf of what a mask left out, as conditions.

The rules are those of `ir.scalar.masked_call` and `ir.reduce`, which carry flags beside values; here they are
expressions, None for a condition that never holds. `flags` writes whole cascades with them.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..ir.cascade import (
    Access,
    Call,
    Cast,
    Const,
    Expr,
    Rank,
    Reduce,
    children,
    is_minus_infinity,
    literal_value,
    rebuild,
)
from ..ir.ops import OPS
from ..ir.types import TypeChecker, is_float
from .casts import WITH_INFINITY

INF: Expr = Const(float("inf"))
MINUS_INF: Expr = Call("neg", (INF,))
ALWAYS: Expr = Const(True)

# Nodes of a value that is still compared where it scales a mask.
LARGE = 64


@dataclass(frozen=True, slots=True)
class Flags:
    """Where a value is the 0, and where it is the -inf, of what a mask left out; None for nowhere."""

    zero: Expr | None = None
    minus: Expr | None = None

    def __bool__(self) -> bool:
        return self.zero is not None or self.minus is not None


NEVER = Flags()


# Conditions, None for one that never holds


def either(*parts: Expr | None) -> Expr | None:
    """A condition that holds where one of several does."""
    found = list(dict.fromkeys(p for p in parts if p is not None))
    if ALWAYS in found:
        return ALWAYS
    total: Expr | None = None
    for p in found:
        total = p if total is None else Call("or", (total, p))
    return total


def both(a: Expr | None, b: Expr | None) -> Expr | None:
    """A condition that holds where two do."""
    if a is None or b is None:
        return None
    return b if a in (ALWAYS, b) else a if b == ALWAYS else Call("and", (a, b))


def without(a: Expr | None, b: Expr | None) -> Expr | None:
    """A condition that holds where the first does and the second does not."""
    return a if b is None else both(a, opposite(b))


def opposite(p: Expr) -> Expr | None:
    """A condition that holds where this one does not."""
    if p == ALWAYS:
        return None
    return p.args[0] if isinstance(p, Call) and p.op == "not" else Call("not", (p,))


def chosen(p: Expr, a: Expr | None, b: Expr | None) -> Expr | None:
    """A condition by branches: what one asks is asked where it is taken."""
    if a is None and b is None:
        return None
    if a is None:
        return opposite(p) if b == ALWAYS else Call("where", (p, Const(False), b or Const(False)))
    if b is None:
        return p if a == ALWAYS else Call("where", (p, a, Const(False)))
    return a if a == b else Call("where", (p, a, b))


def quantified(op: str, ranks: tuple[str, ...], p: Expr | None) -> Expr | None:
    """A condition asked of all coordinates of some ranks: ``any`` or ``all``."""
    return None if p is None else Reduce(op, ranks, (p,))


def select(p: Expr | None, a: Expr, b: Expr) -> Expr:
    """``where(p, a, b)``, for a p that may never hold."""
    return b if p is None else Call("where", (p, a, b))


class Expressions:
    """Values and flags of expressions, given the flags of the tensors that they read."""

    def __init__(self, checker: TypeChecker, everything: bool) -> None:
        self.checker = checker
        self.everything = everything
        # By identity, as hashing a tree costs; the nodes are kept, so their identities stay their own.
        self.known: dict[int, tuple[Expr, Flags]] = {}
        self.sizes: dict[int, tuple[Expr, int]] = {}

    def access(self, e: Access) -> Flags:
        """The flags of an element of a tensor."""
        raise NotImplementedError

    def stays(self, e: Access) -> bool:
        """Whether the algebra reads a tensor by its values alone."""
        return False

    def fold(self, e: Reduce) -> Expr | None:
        """The tensor that a reduction by a monoid became, which has flags; None if it has none."""
        return None

    # Flags

    def flags(self, e: Expr) -> Flags:
        found = self.known.get(id(e))
        if found is None:
            found = self.known[id(e)] = (e, self._flags(e))
        return found[1]

    def _flags(self, e: Expr) -> Flags:
        if isinstance(e, Const | Rank) or not is_float(self.checker.infer(e)):
            return NEVER
        match e:
            case Access():
                return self.access(e)
            case Cast(dtype=dtype, arg=arg):
                return rounded(self.flags(arg), dtype)
            case Reduce(op=op, ranks=ranks, args=(arg,)) if op in ("sum", "max", "min", "prod"):
                return _reduced(op, ranks, self.flags(arg))
            case Reduce():
                held = self.fold(e)
                return self.access(held) if isinstance(held, Access) else NEVER
            case Call(op="where", args=(p, a, b)):
                x, y = self._branch(a), self._branch(b)
                p = self.value(p) if x or y else p
                return Flags(chosen(p, x.zero, y.zero), chosen(p, x.minus, y.minus))
            case Call():
                return self._called(e)
        return NEVER

    def _branch(self, e: Expr) -> Flags:
        return Flags(minus=ALWAYS) if is_minus_infinity(e) else self.flags(e)

    def _called(self, e: Call) -> Flags:
        parts = [self.flags(a) for a in e.args]
        if not any(parts):
            return NEVER
        zero, minus = [f.zero for f in parts], [f.minus for f in parts]
        match e.op:
            case "mul":
                a, b = e.args
                to_zero = either(*zero)
                scaled = either(both(minus[0], self._scales(b)), both(minus[1], self._scales(a)))
                return Flags(to_zero, without(scaled, to_zero))
            case "div":
                return Flags(zero[0], both(minus[0], self._scales(e.args[1])))
            case "add":
                return Flags(both(*zero), either(*minus))
            case "sub":
                return Flags(both(*zero), minus[0])
            case "minimum":
                return Flags(both(*zero), either(*minus))
            case "maximum":
                mixed = either(both(zero[0], minus[1]), both(minus[0], zero[1]))
                return Flags(either(both(*zero), mixed), both(*minus))
            case "pow":
                return Flags(both(zero[0], self._positive(e.args[1])))
            case _ if len(parts) == 1:
                ends = ((OPS[e.op].at_zero, zero[0]), (OPS[e.op].at_neg_inf, minus[0]))
                return Flags(
                    either(*(p for at, p in ends if at == 0)), either(*(p for at, p in ends if at == -float("inf")))
                )
        return NEVER

    def _positive(self, e: Expr) -> Expr | None:
        number = literal_value(e)
        if number is not None:
            return ALWAYS if number > 0 else None
        return Call("gt", (self.value(e), Const(0)))

    def _scales(self, e: Expr) -> Expr | None:
        """Where a factor is positive and finite, so that -inf times it is -inf still."""
        if literal_value(e) is None and self.size(self.value(e)) > LARGE:
            return None  # said no further: what nests would double at each level
        positive = self._positive(e)
        return positive if positive in (ALWAYS, None) else both(positive, Call("lt", (self.value(e), INF)))

    def size(self, e: Expr) -> int:
        """The nodes of an expression, written out."""
        found = self.sizes.get(id(e))
        if found is None:
            found = self.sizes[id(e)] = (e, 1 + sum(map(self.size, children(e))))
        return found[1]

    # Values

    def value(self, e: Expr) -> Expr:
        """The expression with flags written out: all of them, or those that the algebra does not follow."""
        if isinstance(e, Reduce) and (held := self.fold(e)) is not None:
            return self.value(held)
        kids = children(e)
        new = tuple(self.value(k) for k in kids)
        same = all(a is b for a, b in zip(new, kids, strict=True))
        made = e if same else rebuild(e, new)
        match e:
            case Access() if not self.everything and self.stays(e):
                own = self.flags(e)
                return select(own.minus, MINUS_INF, select(own.zero, Const(0.0), made))
            case Reduce(op="min" | "prod") | Call() | Cast() if is_float(self.checker.infer(e)):
                return self._decided(e, made)
            case Reduce(op="sum") if is_float(self.checker.infer(e)):
                return select(self.flags(e).minus, MINUS_INF, made)
        return made

    def _decided(self, e: Call | Cast | Reduce, made: Expr) -> Expr:
        """An operation's result where flags decide it, though its operands as numbers would not."""
        own = self.flags(e)
        if self.everything:
            op = "" if isinstance(e, Cast) else e.op
            made = select(own.zero, Const(0.0), made) if op in ("mul", "div", "prod") else made
            return select(own.minus, MINUS_INF, made) if op in ("add", "sub", "minimum", "min") else made
        of_zero = isinstance(e, Call) and len(e.args) == 1 and OPS[e.op].at_zero == 0 and e.op != "neg"
        if of_zero or isinstance(e, Reduce):
            return select(own.minus, MINUS_INF, select(own.zero, Const(0.0), made))
        # In a product or a rounding of what is 0 here and -inf there, brackets are not followed either.
        product = isinstance(e, Cast) or e.op in ("mul", "div")
        return select(own.zero, Const(0.0), made) if product and own.minus is not None else made


def rounded(f: Flags, dtype: str | None) -> Flags:
    """The flags of what is converted to a type; None converts nothing."""
    if dtype is None or dtype in WITH_INFINITY:
        return f
    return Flags(f.zero) if is_float(dtype) else NEVER


def _reduced(op: str, ranks: tuple[str, ...], f: Flags) -> Flags:
    if not f:
        return NEVER
    some, every = quantified("any", ranks, f.zero), quantified("all", ranks, f.zero)
    minus = quantified("any", ranks, f.minus)
    match op:
        case "sum":
            return Flags(every, minus)
        case "min":
            return Flags(both(every, some), minus)
        case "prod":
            return Flags(some)
        case _:
            left_out = quantified("all", ranks, either(f.zero, f.minus))
            return Flags(both(left_out, some), quantified("all", ranks, f.minus))
