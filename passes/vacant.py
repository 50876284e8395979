"""A cascade at extents of which some are 0: reductions over empty ranks become the identities that they are.

The algebra takes it that a rank has an element: ``sum[k](x / n)`` becomes ``sum[k](x) / n``, which over no ``k`` is 0
for the one and 0 / n for the other. Shapes with an empty rank have kernels of their own anyway, so these compute what
is left when nothing is reduced there:

    R = sqrt(sum[k](X[k] ** 2) / extent(k))    ->    R = sqrt(0 / 0)
    O[n] = sum[k](X[k] / R * W[k, n])          ->    O[n] = 0

What nothing went into counts as left out by a mask, as the oracle has it: such a 0 is ``exp(where(False, 0, -inf))``.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from fractions import Fraction
from math import inf

from ..ir.cascade import Call, Cascade, Cast, Const, Einsum, Expr, Extent, Reduce, literal_value, negative, transform
from ..ir.dtypes import DTYPES
from ..ir.errors import CastileError
from ..ir.ops import REDUCTIONS
from ..ir.types import TypeChecker, tensor_types
from ..ir.verify import verify
from .extent import keeps_extents
from .flags import written_out
from .lower_atoms import literal
from .masked import MINUS_INF

# A -inf and a 0 that say that nothing is there.
_NO_EXPONENT = Call("where", (Const(False), Const(0.0), MINUS_INF))
_NO_TERM = Call("exp", (_NO_EXPONENT,))


def vacated(c: Cascade, empty: Collection[str]) -> Cascade:
    """What a cascade computes where the given ranks are empty.

    An argmax of nothing stays, as it is nobody's value; and the cascade stays as it is where a rank would lose what
    tells its extent, or the text would go beyond the limits of the language.
    """
    gone = set(empty)
    if not gone:
        return c
    checker = TypeChecker(tensor_types(c), c.monoid_of)

    def without(e: Expr) -> Expr:
        if isinstance(e, Extent) and e.rank in gone:
            return Cast("i64", Const(0))
        if not isinstance(e, Reduce) or e.op == "argmax" or not gone & set(e.ranks):
            return e
        if e.op not in c.monoid_of:
            return _identity(e, checker.infer(e))
        return _state(c, e, checker)[0]

    einsums: list[Einsum] = []
    for einsum in c.einsums:
        first = einsum.expr
        if len(einsum.outputs) > 1 and isinstance(first, Reduce) and gone & set(first.ranks):
            values = _state(c, first, checker)
            einsums += [Einsum((o,), v) for o, v in zip(einsum.outputs, values, strict=True)]
        else:
            einsums.append(replace(einsum, expr=transform(einsum.expr, without)))
    used = {n.op for e in einsums for n in e.reductions}
    found = replace(c, einsums=tuple(einsums), monoids=tuple(m for m in c.monoids if m.name in used))
    try:
        verify(found)
    except CastileError:  # wider than the language allows, or a rank that nothing binds any more
        return c
    return written_out(found) if keeps_extents(c, found, {}) else c


def _identity(e: Reduce, dtype: str) -> Expr:
    """What a built-in reduction of nothing gives, in its type."""
    row, value = DTYPES[dtype], REDUCTIONS[e.op].identity
    assert value is not None
    if not row.is_float and e.op in ("max", "min"):
        value = row.lowest if e.op == "max" else row.highest
    return _typed(value if row.is_float or isinstance(value, bool) else int(value), dtype)


def _state(c: Cascade, e: Reduce, checker: TypeChecker) -> list[Expr]:
    """The empty state of a monoid, in its types."""
    values = [literal_value(i) for i in c.monoid_of[e.op].identity]
    return [_typed(v or 0, t) for v, t in zip(values, checker.state_types(e), strict=True)]


def _typed(value: float, dtype: str) -> Expr:
    """An identity as an expression: a 0 or -inf of floats counts as left out."""
    if not DTYPES[dtype].is_float:
        return Cast(dtype, Const(value) if isinstance(value, bool) else literal(Fraction(value), whole=True))
    return Cast(dtype, _NO_TERM if value == 0 else _NO_EXPONENT if value == -inf else negative(float(value)))
