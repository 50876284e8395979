"""Integers among forms: which values are integers, how wide their arithmetic is, how they become floats and back."""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from ..ir.dtypes import DTYPES, wrap
from ..ir.ops import OPS
from ..ir.scalar import convert as saturated
from .brackets import one_at_a_time
from .casts import cast, number_in_f64
from .forms import Atom, Form, Monomial, lift
from .normal import const, nonnegative

# What numbers are below in i64 arithmetic that wraps nowhere: as factors of values of 32 bits, and by themselves.
SMALL_FACTOR, SMALL_NUMBER = 1 << 30, 1 << 62


def is_integral(f: Form) -> bool:
    """Whether every part of the form is an integer, so that its expression has an integer type."""
    return bool(f.terms) and not all(m.brackets and not m.factors for m in f.terms) and may_be_integral(f)


def may_be_integral(f: Form) -> bool:
    """Whether no part of the form is a fraction or float data: where(p, 1, 0) is an integer where one is wanted."""
    return all(
        q.denominator == 1 and m.exponent is None and all(p > 0 and _integral_atom(a) for a, p in m.factors)
        for m, q in f.terms.items()
    )


def _integral_atom(a: Atom) -> bool:
    if a.kind == "poly":
        return isinstance(a.args[0], Form) and is_integral(a.args[0])
    return a.kind in ("rank", "extent") or (a.kind in ("int", "access", "red") and a.dtype[0] in "iu")


def is_wide(f: Form) -> bool:
    """Whether arithmetic on a form is done in i64."""
    return any(a.kind in ("rank", "extent") or a.dtype == "i64" for m in f.terms for a, _ in m.factors)


def is_narrow(f: Form) -> bool:
    """Whether arithmetic on the parts of a form is done in 32 bits."""
    atoms = [a for m in f.terms for a, _ in m.factors]
    return not any(a.kind in ("rank", "extent", "poly") or a.name == "argmax" or a.dtype == "i64" for a in atoms)


def is_small(f: Form) -> bool:
    """Whether a difference with the form does not wrap in i64: it is made of coordinates and values of 32 bits, with
    numbers that leave room."""
    return all(abs(q) < (SMALL_FACTOR if m.factors else SMALL_NUMBER) for m, q in f.terms.items()) and all(
        a.kind in ("rank", "extent") or a.name == "argmax" or DTYPES[a.dtype].bits <= 32
        for m in f.terms
        for a, _ in m.factors
    )


def _is_narrow_data(m: Monomial) -> bool:
    """Whether a term is data of at most 32 bits, times a number."""
    return bool(m.factors) and all(
        a.kind in ("access", "int", "red") and a.name != "argmax" and DTYPES[a.dtype].bits <= 32 for a, _ in m.factors
    )


def is_exact(f: Form) -> bool:
    """Whether a form is made of ranks, extents and integers only, so that i64 arithmetic on it does not wrap."""
    return all(
        q.denominator == 1
        and all(a.kind in ("rank", "extent") or a.dtype == "i64" or a.dtype == "i32" for a, _ in m.factors)
        for m, q in f.terms.items()
    )


def in_64_bits(terms: list[tuple[Monomial, Fraction]]) -> list[tuple[Monomial, Fraction]]:
    """Terms of an integer sum, which is one of i64: data of 32 bits that would wrap on the way is widened first.

    ``A + B - j`` -> ``i64(A) + i64(B) - j`` and ``3 * A`` -> ``3 * i64(A)``; ``A + j`` is one of i64 by itself.
    """
    if len(terms) > 1 and one_at_a_time([m for m, _ in terms]):
        # A choice is no sum: it is of the type of what it chooses from.
        return [t for term in terms for t in in_64_bits([term])]
    narrow = [_is_narrow_data(m) for m, _ in terms]
    first = any(q > 0 for (m, q), n in zip(terms, narrow, strict=True) if not n and not m.is_one)
    literal_too = any(m.is_one for m, _ in terms)
    lone = len(terms) == 1 and terms[0][1] == 1
    every = not lone and (sum(narrow) > 1 or (not first and (literal_too or all(narrow))))

    def wide(m: Monomial) -> Monomial:
        (atom, power), *rest = m.factors
        return Monomial([(Atom("int", "cast:i64", (lift(atom),), dtype="i64"), power), *rest], m.exponent, m.brackets)

    return [(wide(m) if n and (every or abs(q) != 1) else m, q) for (m, q), n in zip(terms, narrow, strict=True)]


def int_nonnegative(op: str, args: tuple[Form, ...]) -> bool:
    return op in ("floordiv", "mod", "and", "rshift", "abs") and all(nonnegative(a) for a in args)


def folded(op: str, values: list[int], dtype: str) -> int | None:
    """An operation on integer literals; None where it has no result."""
    if (op in ("floordiv", "mod") and not values[1]) or not all(-(1 << 63) <= v < 1 << 63 for v in values):
        return None
    if op in ("lshift", "rshift") and not 0 <= values[1] < 64:
        return None
    with np.errstate(all="ignore"):
        return int(wrap(np.asarray(OPS[op].numpy(*(np.int64(v) for v in values)), np.int64), dtype))


def as_float(v: Form, source: str, target: str) -> Form:
    """An integer's value as a float: data is converted before float arithmetic, coordinates and extents are exact."""
    if not DTYPES[source].is_integer or all(a.kind in ("rank", "extent") for m in v.terms for a, _ in m.factors):
        return v
    dtype = "f64" if target == "f64" else "f32"
    if v.atom is not None and v.atom.dtype == dtype:
        return v
    return lift(Atom("int", f"cast:{dtype}", (v,), dtype=dtype, nonnegative=nonnegative(v)))


def as_truncated(v: Form, source: str, target: str) -> Form:
    """A float that is about to become an integer, told from the integer that its form may look like: floats saturate,
    integers wrap. ``u32(-1.0)`` -> ``u32(0)``; ``u32(-1.0 * k)`` -> ``u32(f32(-k))``."""
    if v.constant is not None:
        return const(int(saturated(np.asarray(float(v.constant)), target)))
    if not may_be_integral(v):
        return v
    dtype = "f64" if source == "f64" else "f32"
    return v if v.atom is not None and v.atom.dtype == dtype else lift(Atom("int", f"cast:{dtype}", (v,), dtype=dtype))


def widened(v: Form, dtype: str) -> Form:
    """A value as one of a type in which the text computes, where nothing else says that it does."""
    if dtype == "f64" and not is_integral(v):
        return number_in_f64(v) or cast(dtype, v)
    own = v.atom
    if own is not None and own.dtype == dtype:
        return v
    return lift(Atom("int", f"cast:{dtype}", (v,), dtype=dtype, nonnegative=nonnegative(v) and dtype != "i32"))
