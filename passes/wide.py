"""Arithmetic in f64 from its first operand on, whatever the order in which a derivation left the operands.

A number and a sum of numbers have no type of their own, so where they come before what is f64 they would meet in f32::

    N = sum[k](where(k < n, 0.1, 0.0))          ->      N = sum[k](where(k < n, f64(0.1), 0.0))
    Y = 0.3 * extent(k) * N * f64(X)                    Y = f64(0.3) * extent(k) * N * f64(X)
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from ..ir.cascade import Access, Call, Cascade, Cast, Const, Einsum, Expr, Extent, Rank, Reduce, children, rebuild
from ..ir.types import WEAK_FLOAT, TypeChecker, tensor_types

ARITHMETIC = ("add", "sub", "mul", "div")


def in_f64(c: Cascade, kept: Collection[str] = ()) -> Cascade:
    """The cascade with f64 arithmetic in f64 throughout, but for the ``kept`` Einsums; itself where all of it is."""
    types = tensor_types(c)
    return _Widening(c, types, kept).run() if "f64" in types.values() else c


class _Widening:
    def __init__(self, c: Cascade, types: dict[str, str], kept: Collection[str]) -> None:
        self.c = c
        self.kept = kept
        self.checker = TypeChecker(types, c.monoid_of)
        # Tensors that are made of numbers alone, and those of them that f64 meets.
        self.numbers: set[str] = set()
        self.met: set[str] = set()

    def run(self) -> Cascade:
        for e in self.c.einsums:
            if self._is_free(e) and self._is_f32(e.expr) and self._is_number(e.expr):
                self.numbers.add(e.name)
        made = [e if e.name in self.kept else replace(e, expr=self._expr(e.expr)) for e in self.c.einsums]
        # Backwards, as what is made of numbers may read what is.
        found = tuple([self._met(e) for e in reversed(made)][::-1])
        return self.c if found == self.c.einsums else replace(self.c, einsums=found)

    def _is_free(self, e: Einsum) -> bool:
        """Whether a tensor's type is nobody's choice."""
        return len(e.outputs) == 1 and e.output.dtype is None and e.name not in (*self.c.outputs, *self.kept)

    def _met(self, e: Einsum) -> Einsum:
        return replace(e, expr=self._widened(e.expr)) if e.name in self.met else e

    def _is_f32(self, e: Expr) -> bool:
        """Whether an operand is computed in f32, as choices between numbers are too where nothing says more."""
        dtype = self.checker.infer(e)
        return dtype == "f32" or (dtype == WEAK_FLOAT and not isinstance(e, Const))

    def _is_number(self, e: Expr) -> bool:
        """Whether nothing in a value has a type: numbers, coordinates and extents, and tensors of them."""
        match e:
            case Const() | Rank() | Extent():
                return True
            case Access(tensor=name):
                return name in self.numbers
            case Reduce(op="sum" | "max" | "min" | "prod", args=(arg,)):
                return self._is_number(arg)
            case Call(op="where", args=(_, a, b)):
                return self._is_number(a) and self._is_number(b)
            case Call(op=op) if op in ARITHMETIC or op == "neg":
                return all(map(self._is_number, children(e)))
        return False

    def _expr(self, e: Expr) -> Expr:
        """An expression in which no operand of f64 arithmetic is f32 arithmetic."""
        kids = children(e)
        new = tuple(map(self._expr, kids))
        if isinstance(e, Call) and e.op in ARITHMETIC and self.checker.infer(e) == "f64":
            new = tuple(self._widened(n) if self._is_f32(k) else n for n, k in zip(new, kids, strict=True))
        return e if all(a is b for a, b in zip(new, kids, strict=True)) else rebuild(e, new)

    def _widened(self, e: Expr) -> Expr:
        """An f32 operand computed in f64: its first number is one of f64."""
        match e:
            case Access(tensor=name) if name in self.numbers:
                self.met.add(name)
            case Call(op="where", args=(p, a, b)):
                return replace(e, args=(p, self._widened(a), b if isinstance(b, Const) else self._widened(b)))
            case Reduce(args=(arg,)) if self._is_number(e):
                return replace(e, args=(self._widened(arg),))
            case Call(op=op, args=(first, *rest)) if op in ARITHMETIC or op == "neg":
                after = [a if isinstance(a, Const) else self._widened(a) for a in rest]
                wide = isinstance(first, Const) and any(isinstance(a, Access) and a.tensor in self.met for a in rest)
                return replace(e, args=(first if wide else self._first(first), *after))
            case Const():
                return Cast("f64", e)
        return e

    def _first(self, e: Expr) -> Expr:
        return self._widened(e) if isinstance(e, Call | Reduce) else Cast("f64", e)
