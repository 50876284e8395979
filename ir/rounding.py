"""How rounding errors pass through each operation: the rules behind `bound.error_bound`.

Running error analysis (Higham, *Accuracy and Stability of Numerical Algorithms*, section 3.3): beside a value goes a
bound on the absolute error that a correct kernel may have made on the way to it. Two parts add up: what the operation
makes of its arguments' errors, read off its values at the ends of their intervals, and its own rounding. An infinite
bound says that nothing can be demanded; a bound of 0, that the value must be hit.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .dtypes import DTYPES
from .ops import OPS

Array = npt.NDArray[Any]

# The least normal f32, as kernels may flush what is below; and the greatest integer up to which f32 holds all.
TINY = 2.0**-126
WHOLE = 2.0**24


def growth(terms: int) -> float:
    """Roundings that a sum of that many terms may amount to, in any order.

    The square root is the probabilistic bound of Higham and Mary (2019) with room for 8 standard deviations; matrix
    units truncate, which counts twice.
    """
    return float(min(2 * terms, 8 * math.sqrt(terms))) if terms > 1 else 0.0


def unit(dtype: str) -> float:
    """Unit roundoff of arithmetic in a compute type; 0 for integers."""
    return DTYPES[dtype].unit_roundoff


def held(x: Array) -> Array:
    """The error of holding a float64 value in f32."""
    with np.errstate(all="ignore"):
        off = np.abs(x.astype(np.float32).astype(np.float64) - x)
    return np.where(np.isfinite(off), off, 0.0)


def settle(y: Array, error: Array, dtype: str, masked: Array | None = None) -> Array:
    """Nothing is demanded where the error is not known or the type overflows; where a mask decides, equality is."""
    error = np.where(np.isnan(error), np.inf, error)
    row = DTYPES[dtype]
    if row.is_float:
        error = np.where(np.isfinite(y) & (np.abs(y) + error > row.largest), np.inf, error)
    return error if masked is None else np.where(masked, 0.0, error)


def spread(y: Array, others: Iterable[Array]) -> Array:
    """How far other values of the same thing lie from ``y``; NaN and infinities lie nowhere but on themselves."""
    far = np.zeros(y.shape)
    for other in others:
        same = (other == y) | (np.isnan(other) & np.isnan(y))
        off = np.where(same, 0.0, np.abs(other - y))
        far = np.maximum(far, np.where(np.isnan(off), np.inf, off))
    return far


def absolute(x: Array) -> Array:
    """Absolute values as f64: the least integer of a type has none in the type."""
    return np.abs(np.asarray(x).astype(np.float64, copy=False))


def call_error(name: str, args: Sequence[Array], errors: Sequence[Array], y: Array, dtype: str) -> Array:
    """The error of one scalar operation whose arguments carry errors. For bools: 1 where the truth is uncertain."""
    if y.dtype.kind != "f":
        return _whole_error(name, args, errors, y)
    op, u = OPS[name], unit(dtype)
    x = [a.astype(np.float64) for a in args]
    slack = list(errors)
    if op.rule == "power":
        slack[1] = np.zeros(())
    if name in ("floordiv", "mod"):
        return _division_error(name, x, slack, y, u)
    carried = _carried(name, x, slack, y)
    return carried + np.where(np.isfinite(y), _own(name, x, y, u), 0.0)


def _carried(name: str, x: Sequence[Array], slack: Sequence[Array], y: Array) -> Array:
    """What the arguments' errors amount to in the result."""
    if not any(bool(e.any()) for e in slack):
        return np.zeros(y.shape)
    if name in ("sin", "cos", "abs", "neg"):
        return np.asarray(np.minimum(slack[0], 2.0 if name in ("sin", "cos") else np.inf) + np.zeros(y.shape))
    # Monotone in each argument, so the ends of their intervals tell all; but not across a pole.
    function = OPS[name].numpy
    ends = spread(
        y, (function(*c) for c in itertools.product(*((a - e, a + e) for a, e in zip(x, slack, strict=True))))
    )
    if name == "div" or name == "pow":
        at = 1 if name == "div" else 0
        pole = (slack[at] > 0) & (np.abs(x[at]) <= slack[at]) & ((name == "div") | (x[1] < 0))
        ends = np.where(pole, np.inf, ends)
    return ends


def _own(name: str, x: Sequence[Array], y: Array, u: float) -> Array:
    """The rounding of the operation itself."""
    if name in ("neg", "abs", "minimum", "maximum", "floor", "round") or not u:
        return np.zeros(())
    own = 2 * OPS[name].ulps * u * np.abs(y) + np.where((y == 0) & ~_vanished(name, x), 0.0, TINY)
    if name == "pow":
        own = own * np.maximum(np.abs(x[1]), 1)
    if name in ("exp", "exp2", "expm1"):
        # The argument is scaled by log2(e), in f32, before the power of two.
        own = own + 2 * u * np.where(np.isfinite(x[0]), np.abs(x[0]), 0.0) * np.abs(y)
    return own


def _vanished(name: str, x: Sequence[Array]) -> Array:
    """Where a result of 0 is too small a number rather than none: a kernel's may be another such number."""
    match name:
        case "exp" | "exp2" | "sigmoid":
            return np.asarray(np.isfinite(x[0]))
        case "mul":
            return np.asarray((x[0] != 0) & (x[1] != 0))
        case "div":
            return np.asarray((x[0] != 0) & np.isfinite(x[1]))
        case "pow":
            return np.asarray(x[0] != 0)
        case _:
            return np.zeros((), bool)


def _division_error(name: str, x: Sequence[Array], slack: Sequence[Array], y: Array, u: float) -> Array:
    """``//`` and ``%`` of floats: a kernel may round the quotient, across an integer too."""
    quotient = x[0] / x[1]
    off = _carried("div", x, slack, quotient) + 4 * u * np.abs(quotient)
    jump = spread(np.floor(quotient), (np.floor(quotient - off), np.floor(quotient + off)))
    exact = (slack[0] + slack[1] == 0) & (np.floor(quotient) * x[1] == x[0]) & (np.abs(quotient) < WHOLE)
    jump = np.where(exact, 0.0, jump)
    if name == "floordiv":
        return np.asarray(jump + u * np.abs(y))
    rest = slack[0] + np.abs(np.floor(quotient)) * slack[1] + u * (np.abs(x[0]) + np.abs(y))
    return np.asarray(np.where(np.isfinite(y), jump * np.abs(x[1]) + np.where(exact, 0.0, rest), 0.0))


def _whole_error(name: str, args: Sequence[Array], errors: Sequence[Array], y: Array) -> Array:
    """The error of an operation whose result is an integer or a truth."""
    total = np.asarray(sum(errors) + np.zeros(y.shape))
    if not bool(total.any()):
        return total
    if name in ("lt", "le", "gt", "ge", "eq", "ne"):
        near = ~(np.abs(args[0].astype(np.float64) - args[1].astype(np.float64)) > total)
        return ((total > 0) & near).astype(float)
    if y.dtype == bool:
        flips = itertools.product(*((a, a ^ (e > 0)) for a, e in zip(args, errors, strict=True)))
        return spread(y.astype(float), (OPS[name].numpy(*f).astype(float) for f in flips))
    if name in ("add", "sub", "mul", "neg", "abs", "minimum", "maximum"):
        x = [a.astype(np.float64) for a in args]
        return _carried(name, x, errors, y.astype(np.float64))
    return np.where(total > 0, np.inf, 0.0)


def converted_error(x: Array, dtype: str) -> Array:
    """What integers are off by as floats of a compute type, which holds all of them up to a power of two."""
    size = absolute(x)
    return np.where(size > WHOLE, unit(dtype) * size, 0.0)


def cast_error(x: Array, error: Array, y: Array, dtype: str, wide: bool, free: bool, to: Callable[..., Array]) -> Array:
    """The error of a cast, done by ``to``.

    ``wide`` says that the argument was computed in f64 and so is rounded even by a cast to f32; ``free`` that the
    numerics let the kernel leave the rounding away.
    """
    row = DTYPES[dtype]
    ends = spread(y.astype(np.float64), (to(x - error, dtype).astype(float), to(x + error, dtype).astype(float)))
    carried = np.where(error > 0, ends, 0.0)
    if not row.is_float or dtype == "f64":
        return carried
    # A rewrite may have moved the rounding past a factor; integers beyond 2^24 pass through f32.
    moved = (error > 0) if dtype != "f32" else np.zeros((), bool)
    if wide or free or x.dtype.kind == "i":
        moved = moved | wide | (free and dtype != "f32") | ((x.dtype.kind == "i") & (absolute(x) > WHOLE))
    own = 2 * row.unit_roundoff * np.abs(y) + 2.0 ** (row.min_exponent - row.precision + 1)
    return np.asarray(carried + np.where(moved & np.isfinite(y), own, 0.0))


def sum_error(
    magnitude: Array, inherited: Array, terms: int, products: int, dtype: str, rounded: Array | float = 0.0
) -> Array:
    """A sum: what its terms carry, plus the roundings of adding them.

    ``magnitude`` is the sum of their absolute values. ``products`` counts the multiplications in a term that its error
    does not; ``rounded`` is what the roundings of operands amount to that the numerics allow (design, section 2).
    """
    u = unit(dtype)
    if not u:
        return inherited
    own = u * (growth(terms) + products) * magnitude + rounded + (terms > 1) * terms * TINY
    own = np.where(np.isfinite(magnitude), own, 0.0)
    # A partial sum may overflow where the whole does not.
    return np.asarray(inherited + np.where(np.isfinite(magnitude) & (magnitude > DTYPES[dtype].largest), np.inf, own))


def chain_error(magnitude: Array, terms: int, dtype: str) -> Array:
    """What the order may change in a chain of sums: each term is rounded once, and each sum, which is no larger than
    ``magnitude``, the sum of the terms' absolute values."""
    own = np.where(np.isfinite(magnitude), unit(dtype) * terms * magnitude, 0.0)
    return np.where(np.isfinite(magnitude) & (magnitude > DTYPES[dtype].largest), np.inf, own)


# Terms at most of the sums into which a difference may fall apart: those of a long tile.
PARTS = 4096


def parts_error(magnitude: Array, terms: int) -> Array:
    """What a difference of integers is off by for each of the ``terms`` of a sum that a kernel made of the sums of the
    difference's parts; 0 where nothing is summed.

    ``magnitude`` is the sum of the parts' absolute values: a part is no smaller where the difference is.
    """
    return np.asarray(unit("f32") * growth(min(PARTS, terms)) * magnitude)


def prod_error(x: Array, error: Array, y: Array, axes: tuple[int, ...], dtype: str) -> Array:
    """A product of many: as its factors are off together; nothing is known where a part of it overflows or vanishes."""
    size = absolute(x)
    carried = np.abs(np.prod(size + error, axis=axes) - np.prod(size, axis=axes))
    carried = np.where(np.any(error > 0, axis=axes), np.where(np.isnan(carried), np.inf, carried), 0.0)
    if not DTYPES[dtype].is_float:
        return carried
    terms = math.prod(x.shape[a] for a in axes)
    tails = np.prod(np.maximum(size, 1), axis=axes), np.prod(np.where(size == 0, 1, np.minimum(size, 1)), axis=axes)
    lost = (terms > 2) & np.isfinite(y) & ((tails[0] > DTYPES[dtype].largest) | (tails[1] < TINY))
    own = np.where(np.isfinite(y), unit(dtype) * (terms - 1) * np.abs(y) + (terms > 1) * TINY, 0.0)
    return np.asarray(np.where(lost, np.inf, carried + own))


def extreme_error(x: Array, error: Array, y: Array, axes: tuple[int, ...], function: Callable[..., Array]) -> Array:
    """A maximum or minimum lies between those of the ends of its elements' intervals."""
    x = x.astype(np.float64)
    ends = (function(x - error, axis=axes), function(x + error, axis=axes))
    return np.where(np.any(error > 0, axis=axes), spread(y.astype(np.float64), ends), 0.0)


def truth_error(x: Array, error: Array, axes: tuple[int, ...], function: Callable[..., Array]) -> Array:
    """``any`` and ``all``: uncertain where the uncertain elements decide."""
    unsure = error > 0
    return np.asarray(function(x & ~unsure, axis=axes) != function(x | unsure, axis=axes)).astype(float)


def argmax_error(x: Array, error: Array, axis: int) -> Array:
    """0 where one element is clearly the first greatest; infinite where another may be."""
    best = np.argmax(x, axis=axis)
    top = np.take_along_axis(x, np.expand_dims(best, axis), axis)
    slack = np.take_along_axis(error, np.expand_dims(best, axis), axis)
    rivals = np.sum(~(x + error < top - slack) & (error + slack > 0), axis=axis)
    return np.where(rivals > 1, np.inf, 0.0)
