"""Arithmetic on adjoints, such that the text reads as a person writes it: no factor 1, no minus of a minus.

dA * 1.0 / L  ->  dA / L            dA * A + -(A * D)  ->  A * (dA - D)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..ir.cascade import Call, Const, Expr, literal_value
from .transpose import Share

ZERO: Expr = Const(0.0)
ONE: Expr = Const(1.0)


def is_negated(e: Expr) -> bool:
    return isinstance(e, Call) and e.op == "neg"


def negated(e: Expr) -> Expr:
    return e.args[0] if isinstance(e, Call) and e.op == "neg" else Call("neg", (e,))


def times(a: Expr, b: Expr) -> Expr:
    if is_negated(a) or is_negated(b):
        product = times(negated(a) if is_negated(a) else a, negated(b) if is_negated(b) else b)
        return product if is_negated(a) and is_negated(b) else negated(product)
    if ONE in (a, b) or 1 in (_integer(a), _integer(b)):
        return a if b == ONE or _integer(b) == 1 else b
    if isinstance(b, Call) and b.op == "div" and b.args[0] == ONE:
        return quotient(a, b.args[1])
    return Call("mul", (a, b))


def quotient(a: Expr, b: Expr) -> Expr:
    return negated(quotient(negated(a), b)) if is_negated(a) else Call("div", (a, b))


def added(terms: Sequence[Expr]) -> Expr:
    """The sum of the terms, what is added before what is subtracted."""
    first, *rest = sorted(terms, key=is_negated)
    for e in rest:
        first = Call("sub", (first, negated(e))) if is_negated(e) else Call("add", (first, e))
    return first


def collected(shares: Sequence[Share]) -> list[Share]:
    """Shares of one place under one condition as one, with the factor that all of them have in front."""
    groups: dict[tuple[object, ...], list[Share]] = {}
    for s in shares:
        groups.setdefault((s.indices, frozenset(s.ranks), s.guards), []).append(s)
    return [replace(g[0], value=_factored([s.value for s in g])) for g in groups.values()]


def _factored(values: Sequence[Expr]) -> Expr:
    if len(values) == 1:
        return values[0]
    products = [_factors(negated(v) if is_negated(v) else v) for v in values]
    common = next((f for f in products[0] if all(f in p for p in products)), None)
    if common is None or any(len(p) == 1 for p in products):
        return added(values)
    rests = []
    for v, p in zip(values, products, strict=True):
        at = p.index(common)
        rest = _product([*p[:at], *p[at + 1 :]])
        rests.append(negated(rest) if is_negated(v) else rest)
    return Call("mul", (common, added(rests)))


def _factors(e: Expr) -> list[Expr]:
    return [*_factors(e.args[0]), *_factors(e.args[1])] if isinstance(e, Call) and e.op == "mul" else [e]


def _product(factors: Sequence[Expr]) -> Expr:
    e = factors[0]
    for f in factors[1:]:
        e = times(e, f)
    return e


def _integer(e: Expr) -> int | None:
    value = literal_value(e)
    return value if type(value) is int else None


def folded(e: Expr) -> Expr:
    """Integer arithmetic on literals and trivial powers, as the derivative of a power needs it."""
    if not isinstance(e, Call) or len(e.args) != 2:
        return e
    a, b = (_integer(x) for x in e.args)
    if e.op in ("sub", "mul") and a is not None and b is not None:
        n = a - b if e.op == "sub" else a * b
        return Const(n) if n >= 0 else Call("neg", (Const(-n),))
    if e.op == "pow" and b in (0, 1):
        return e.args[0] if b == 1 else ONE
    return times(*e.args) if e.op == "mul" else e
