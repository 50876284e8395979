"""How rounding errors pass through each operation: the rules behind `bound.error_bound`.

Running error analysis (Higham, *Accuracy and Stability of Numerical Algorithms*, section 3.3): beside a value goes a
bound on the absolute error that a correct kernel may have made on the way to it. A reduction of n terms in any order
errs by at most about min(n, 8 sqrt(n)) roundings of the sum of magnitudes; the square root is the probabilistic bound
of Higham and Mary (2019) with room for 8 standard deviations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .dtypes import DTYPES
from .ops import OPS

Array = npt.NDArray[Any]

# The least normal f32: kernels may flush what is below.
TINY = 2.0**-126


def growth(terms: int) -> float:
    """Roundings that a sum of that many terms may amount to, in any order."""
    return float(min(terms, 8 * math.sqrt(terms))) if terms > 1 else 0.0


def unit(dtype: str) -> float:
    """Unit roundoff of arithmetic in a compute type; 0 for integers."""
    return DTYPES[dtype].unit_roundoff


def settle(y: Array, error: Array, dtype: str, masked: Array | None = None) -> Array:
    """Nothing is demanded where the compute type overflows; where the value itself is not finite, equality is."""
    if not DTYPES[dtype].is_float:
        return np.where(np.isnan(error), np.inf, error)
    error = np.where(np.isnan(error), np.inf, error)
    error = np.where(np.abs(y) + error > DTYPES[dtype].largest, np.inf, error)
    error = np.where(np.isfinite(y), error, 0.0)
    return error if masked is None else np.where(masked, 0.0, error)


def call_error(name: str, args: Sequence[Array], errors: Sequence[Array], y: Array, dtype: str) -> Array:
    """The error of one scalar operation whose arguments carry errors. For bools: 1 where the truth is uncertain."""
    u = unit(dtype) if dtype in DTYPES else 0.0
    rounding = u * np.abs(y) + (TINY if u else 0.0) if y.dtype.kind == "f" else 0.0
    op = OPS[name]
    match name:
        case "add" | "sub":
            return np.asarray(errors[0] + errors[1] + rounding)
        case "mul":
            a, b = np.abs(args[0]), np.abs(args[1])
            return np.asarray(_times(a, errors[1]) + _times(b, errors[0]) + errors[0] * errors[1] + rounding)
        case "div":
            room = np.abs(args[1]) - errors[1]
            spread = (errors[0] + _times(np.abs(y), errors[1])) / np.where(room > 0, room, np.nan)
            exact = (errors[0] == 0) & (errors[1] == 0)
            return np.asarray(np.where(exact, 0.0, spread) + rounding * 2)
        case "neg" | "abs":
            return np.asarray(errors[0] + 0 * np.abs(y))
        case "maximum" | "minimum":
            return np.asarray(np.maximum(errors[0], errors[1]) + 0 * np.abs(y))
        case "pow":
            n = args[1]
            wide = np.power(np.abs(args[0]) + errors[0], n) - np.power(np.abs(args[0]), n)
            return np.asarray(np.abs(wide) + np.abs(n) * rounding)
        case "lt" | "le" | "gt" | "ge" | "eq" | "ne":
            uncertain = errors[0] + errors[1]
            return np.asarray(((uncertain > 0) & (np.abs(args[0] - args[1]) <= uncertain)).astype(float))
        case "and" | "or" | "not" if y.dtype == bool:
            return np.asarray(sum(errors) > 0, dtype=float)
        case _ if op.arity == 1:
            return np.asarray(_function(name, args[0], errors[0], y, u))
        case _:
            uncertain = np.asarray(sum(errors) > 0)
            return np.where(uncertain, np.inf, 0.0) + rounding


def _times(magnitude: Array, error: Array) -> Array:
    return np.where(error == 0, 0.0, magnitude * error)


def _function(name: str, x: Array, error: Array, y: Array, u: float) -> Array:
    op = OPS[name]
    x = x.astype(np.float64)
    if op.monotone or op.name in ("floor", "round"):
        # A monotone function is off by no more than at the ends of the argument's interval.
        low, high = op.numpy(x - error), op.numpy(x + error)
        spread = np.maximum(np.abs(high - y), np.abs(y - low))
        spread = np.where(error == 0, 0.0, spread)
    else:
        spread = error
    own = 2 * op.ulps * u * np.abs(y) + TINY * (u > 0)
    if name in ("exp", "exp2", "expm1"):
        # The argument is scaled by log2(e), in f32, before the power of two.
        own = own + 2 * u * np.where(np.isfinite(x), np.abs(x), 0.0) * np.abs(y)
    return np.asarray(spread + (own if op.rule == "real" else 0.0))


def cast_error(x: Array, error: Array, y: Array, dtype: str) -> Array:
    """A cast may round differently from the oracle wherever its argument is off, or where a rewrite moved it."""
    row = DTYPES[dtype]
    if row.is_float:
        if dtype in ("f64", "f32"):
            return np.asarray(error + 0 * np.abs(y))
        quantum = 2.0 ** (row.min_exponent - row.precision + 1)
        return np.asarray(error + 2 * row.unit_roundoff * (np.abs(y) + error) + quantum)
    if x.dtype.kind != "f":
        return np.asarray(error + 0 * np.abs(y))
    low, high = np.trunc(x - error), np.trunc(x + error)
    return np.asarray(np.where(error == 0, 0.0, np.maximum(np.abs(high - y), np.abs(y - low))))


def sum_error(magnitude: Array, inherited: Array, terms: int, dtype: str, narrow: float = 0.0) -> Array:
    """A sum: what its terms carry, plus the roundings of adding them.

    ``narrow`` is the unit roundoff to which one operand of the products may be rounded (design, section 2, *Numerics*).
    """
    u = unit(dtype)
    return np.asarray(inherited + (u * (growth(terms) + 2) + narrow) * magnitude + (TINY if u else 0.0))


def prod_error(x: Array, error: Array, y: Array, axes: tuple[int, ...], terms: int, dtype: str) -> Array:
    u = unit(dtype)
    spread = np.prod(np.abs(x) + error, axis=axes) - np.prod(np.abs(x), axis=axes)
    return np.asarray(np.abs(spread) + u * terms * np.abs(y) + (TINY if u else 0.0))


def argmax_error(x: Array, error: Array, axis: int) -> Array:
    """0 where one element is clearly the first greatest; infinite where another may be."""
    best = np.argmax(x, axis=axis)
    top = np.take_along_axis(x, np.expand_dims(best, axis), axis)
    slack = np.take_along_axis(error, np.expand_dims(best, axis), axis)
    rivals = np.sum((x + error >= top - slack) & (error + slack > 0), axis=axis)
    return np.asarray(np.where(rivals > 1, np.inf, 0.0))
