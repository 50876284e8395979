"""Casts as rounding points: which of them let constant factors pass."""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from ..ir.dtypes import DTYPES, round_to
from .brackets import bracket, one_at_a_time
from .emptiness import is_mask
from .forms import ONE_FRACTION, UNIT, ZERO_FRACTION, Atom, Form, Monomial, add, lift, scale
from .normal import const, mul, nonnegative

# Float types that hold what a mask stands for.
WITH_INFINITY = frozenset(n for n, row in DTYPES.items() if row.is_float and np.isinf(round_to(np.array(-np.inf), n)))


def movable(dtype: str, numerics: str) -> bool:
    """Whether a cast commutes with constant factors: to formats with the exponent range of f32, unless strict."""
    return numerics != "strict" and dtype in ("bf16", "f32", "f64")


def number_in_f64(f: Form) -> Form | None:
    """Numbers and masks as ones of f64, where nothing else in the text says that they are; None for anything more."""
    wide = [_wide_term(m, q) for m, q in f.terms.items()]
    if any(t is None for t in wide):
        return None
    return add(*(t for t in wide if t is not None)) if wide else _wide_number(ZERO_FRACTION)


def _wide_term(m: Monomial, q: Fraction) -> Form | None:
    if is_mask(m):
        return scale(lift(Atom("lbr", "", m.factors[0][0].args, dtype="f64")), q)
    if m.factors or m.exponent is not None:
        return None
    return mul(_wide_number(q), Form({Monomial((), None, m.brackets): ONE_FRACTION}))


def _wide_number(q: Fraction) -> Form:
    return lift(Atom("cast", "f64", (const(q),), dtype="f64"))


def cast(dtype: str, f: Form) -> Form:
    """A rounding to a float type: values of that type, their negatives, and 0 and 1 are left as they are, alone or one
    of several at a time."""
    only = f.single
    if not f.terms or f == UNIT:
        return f
    if all(_held(m, q, dtype) for m, q in f.terms.items()) and one_at_a_time(list(f.terms)):
        return f
    masks = {m: q for m, q in f.terms.items() if is_mask(m) and q > 0}
    if masks and dtype in WITH_INFINITY:
        # What a mask leaves out is -inf in every such type, and stays left out.
        return add(cast(dtype, Form({m: q for m, q in f.terms.items() if m not in masks})), Form(masks))
    if only is not None and only[1] == 1 and only[0].exponent is None:
        m = only[0]
        if not m.factors and m.brackets:
            return f
    if only is not None and only[0].brackets:
        m, q = only
        bare = cast(dtype, Form({Monomial(m.factors, m.exponent): q}))
        product = bare
        for b in m.brackets:
            product = mul(bracket(b), product)
        return product
    return lift(Atom("cast", dtype, (f,), dtype=dtype, nonnegative=nonnegative(f)))


def _held(m: Monomial, q: Fraction, dtype: str) -> bool:
    """Whether a term is a value of a type or its negative, where its brackets hold."""
    return (
        abs(q) == 1
        and m.exponent is None
        and len(m.factors) == 1
        and m.factors[0][1] == 1
        and m.factors[0][0].dtype == dtype
    )
