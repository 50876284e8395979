"""Contractions with an operand of 16 bits: the products of which a kernel may round the other operand to that type.

The operand need not stand outermost in the text. A kernel reads maps through, and takes a sum apart whose terms are
products with such an operand each::

    N[k, d] = V[k, d] * r[k]
    Y[d] = sum[k](A[k] * N[k, d] + where(k < n, B[k] * W[k, d], 0.0))

has the products ``A[k] * V[k, d] * r[k]`` and, where k < n, ``B[k] * W[k, d]``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from .cascade import Access, Call, Cast, Const, Expr, Reduce, literal_value, walk
from .dtypes import DTYPES

# Products into which one sum is taken apart at most.
MAX_PRODUCTS = 64


@dataclass(frozen=True, slots=True)
class Product:
    """``Π factors / Π under`` where all of the conditions hold."""

    factors: tuple[Expr, ...]
    under: tuple[Expr, ...] = ()
    conditions: tuple[Expr, ...] = ()

    def __mul__(self, other: Product) -> Product:
        conditions = dict.fromkeys(self.conditions + other.conditions)
        return Product(self.factors + other.factors, self.under + other.under, tuple(conditions))


@dataclass(frozen=True, slots=True)
class Contraction:
    """A product of narrow factors with one that may be rounded, where the conditions hold; by how much, relatively."""

    narrow: tuple[Expr, ...]
    wide: Expr
    conditions: tuple[Expr, ...]
    rounding: float

    @property
    def parts(self) -> tuple[Expr, ...]:
        return (*self.narrow, self.wide)


class Contractions:
    """Finds them; ``dtype`` types an expression, ``opened`` gives what a map computes at an access to it."""

    def __init__(self, dtype: Callable[[Expr], str], opened: Callable[[Access], Expr | None]) -> None:
        self.dtype = dtype
        self.opened = opened
        self.holding: dict[str, bool] = {}

    def of(self, e: Expr) -> list[Contraction]:
        """The contractions that the sum of an expression holds."""
        return [found for p in self.products(e) if (found := self._contraction(p)) is not None]

    def products(self, e: Expr) -> list[Product]:
        """An expression as a sum of products, signs aside; one that has no narrow factor is one factor."""
        found = self._apart(e)
        good = len(found) <= MAX_PRODUCTS and any(self.is_narrow(f) for p in found for f in p.factors)
        return found if good else [Product((e,))]

    def _apart(self, e: Expr) -> list[Product]:
        match e:
            case Call(op="mul", args=(a, b)):
                return self._multiplied(self.products(a), self.products(b), e)
            case Call(op="add" | "sub", args=(a, b)):
                return self.products(a) + self.products(b)
            case Call(op="neg", args=(a,)):
                return self.products(a)
            case Call(op="div", args=(a, b)):
                return [replace(p, under=(*p.under, b)) for p in self.products(a)]
            case Call(op="where", args=(p, a, b)):
                # What is 0 adds nothing.
                branches = ((p, a), (Call("not", (p,)), b))
                return [
                    replace(t, conditions=(c, *t.conditions))
                    for c, x in branches
                    if literal_value(x) != 0
                    for t in self.products(x)
                ]
            case Cast(dtype="f32" | "f64", arg=a):
                return self.products(a)
            case Access() if not self.is_narrow(e) and self._holds(e) and (inside := self.opened(e)) is not None:
                return self.products(inside)
            case _:
                return [Product((e,))]

    def _multiplied(self, left: list[Product], right: list[Product], e: Expr) -> list[Product]:
        """A product of sums: one is taken apart if nothing else is narrow and each of its terms is."""
        if len(left) == len(right) == 1:
            return [left[0] * right[0]]
        narrow = [[any(map(self.is_narrow, p.factors)) for p in side] for side in (left, right)]
        apart = (all(narrow[0]) and not any(narrow[1])) or (all(narrow[1]) and not any(narrow[0]))
        if apart and len(left) * len(right) <= MAX_PRODUCTS:
            return [a * b for a in left for b in right]
        assert isinstance(e, Call)
        whole = [side[0] if len(side) == 1 else Product((x,)) for side, x in zip((left, right), e.args, strict=True)]
        return [whole[0] * whole[1]]

    def _holds(self, e: Access) -> bool:
        """Whether a map reads a narrow tensor, itself or through other maps."""
        if e.tensor not in self.holding:
            self.holding[e.tensor] = False
            inside = self.opened(e)
            reads = [n for n in walk(inside) if isinstance(n, Access)] if inside is not None else []
            self.holding[e.tensor] = any(self.is_narrow(n) or self._holds(n) for n in reads)
        return self.holding[e.tensor]

    def is_narrow(self, e: Expr) -> bool:
        """Whether a factor is a float of 16 bits or less."""
        if not isinstance(e, Access | Cast | Reduce | Call):
            return False
        row = DTYPES.get(self.dtype(e))
        return row is not None and row.is_float and row.bits <= 16

    def _contraction(self, p: Product) -> Contraction | None:
        narrow = tuple(f for f in p.factors if self.is_narrow(f))
        wide = tuple(f for f in p.factors if f not in narrow)
        scaled = not all(map(self._is_exact, wide)) or bool(p.under)
        if not narrow or not (scaled or len(narrow) > 2):
            return None
        units = [DTYPES[self.dtype(f)].unit_roundoff for f in narrow]
        rounding = 2 * max(2.0**-11 if u < 2.0**-11 else min(u, 2.0**-8) for u in units)
        value = _product(wide)
        if p.under:
            value = Call("div", (value, _product(p.under)))
        return Contraction(narrow, value, p.conditions, rounding)

    def _is_exact(self, e: Expr) -> bool:
        """Whether a factor is exact in 16 bits: an integer of 8, or a power of two."""
        value = literal_value(e)
        if value is not None:
            return isinstance(value, bool) or math.frexp(abs(value))[0] == 0.5
        row = DTYPES[self.dtype(e)]
        return not row.is_float and row.bits <= 8


def _product(factors: Iterable[Expr]) -> Expr:
    first, *rest = tuple(factors) or (Const(1.0),)
    for f in rest:
        first = Call("mul", (first, f))
    return first
