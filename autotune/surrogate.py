"""Surrogates of the search: Gaussian processes over configurations, fitted anew as measurements come in.

How far apart two values of a parameter lie is a weighted sum of how far in size and of whether they differ at all:
tuning landscapes are both smooth (twice the tile, a little slower) and jagged (this value spills, that one does not).
The weights, fitted to the measurements, say which parameter is which. Of such distances there are two kernels:

- *joint*: of their sum. Configurations are alike that differ little in all, so that it knows well what lies near the
  best, and nothing of what lies far from everything.
- *factored*: a product over parameters, each factor a constant and a kernel of that parameter alone, as in an analysis
  of variance (Stitson et al., 1999). Multiplied out, it has a term for every set of parameters: what one of them does
  by itself is learned from all configurations, and what several do together from those that share them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np

from ..ir.errors import UsageError

Array = Any  # a float64 ndarray


@dataclass(frozen=True, slots=True)
class _Prior:
    """A log-normal prior of a hyperparameter: mean, deviation and bounds of its logarithm."""

    mean: float
    deviation: float
    bounds: tuple[float, float]


# Lengths of a parameter's order, whose unit is the whole range, and of whether its values differ; the constant of each
# factor beside a kernel of 1; the standard deviations of what is modelled and of noise.
_ORDERED, _EQUAL = _Prior(0.0, 1.0, (-3.0, 5.0)), _Prior(math.log(2.0), 1.0, (-3.0, 5.0))
_CONSTANT, _SCALE = _Prior(0.0, 1.0, (-4.0, 4.0)), _Prior(0.0, 0.7, (-2.0, 2.0))
_NOISE = _Prior(math.log(0.05), 1.0, (-6.0, 0.5))
_JITTER = 1e-6
_STEPS = 20


@dataclass(frozen=True, slots=True)
class Points:
    """Configurations as numbers: ``codes`` ``[N, D]``, which of its values each parameter has, and ``places``, for each
    parameter ``[values, A]``, where these lie in 0…1; A is 0 for values without an order."""

    codes: Array
    places: tuple[Array, ...]

    def __len__(self) -> int:
        return len(self.codes)


def encode(columns: Sequence[Sequence[Any]], names: Sequence[str] = ()) -> Points:
    """Columns of a table, one sequence of N values for each parameter, as points. A parameter that never varies says
    nothing and is left out; values that are no numbers have no order. ``names`` of the parameters, where they follow
    Kernel Tuner's conventions, say which of them act together (`_together`).

    Whole numbers lie apart in two ways: by their size, and by how often 2 divides them, since warps, vectors, banks
    and lines of caches all come in powers of 2, and what fills them evenly is quick whatever its size.
    """
    codes, places = [], []
    for values in (*columns, *_together(columns, names)):
        numeric = all(isinstance(v, (int, float)) and math.isfinite(v) for v in values)
        keys = [float(v) for v in values] if numeric else [f"{type(v).__name__} {v}" for v in values]
        levels, code = np.unique(np.asarray(keys), return_inverse=True)
        if len(levels) < 2:
            continue
        ordered: list[Array] = []
        if numeric and len(levels) > 2:
            place = np.log2(levels) if levels[0] > 0 else np.arange(float(len(levels)))
            ordered.append((place - place[0]) / (place[-1] - place[0]))
            even = _evenness(levels)
            if even is not None:
                ordered.append(even)
        codes.append(code)
        places.append(np.array(ordered, dtype=float).reshape(len(ordered), len(levels)).T)
    count = len(columns[0]) if columns else 0
    return Points(np.array(codes, dtype=np.int64).T.reshape(count, len(codes)), tuple(places))


def _together(columns: Sequence[Sequence[Any]], names: Sequence[str]) -> list[list[float]]:
    """Products that a kernel runs by: the threads of a block, and how much of each axis a block covers.

    Kernel Tuner multiplies what begins with ``block_size`` into threads, and what ends with the same of ``_x``, ``_y``
    and ``_z`` divides the same axis: ``block_size_x * tile_size_x``.
    """
    sizes = [
        (name, values)
        for name, values in zip(names, columns, strict=bool(names))
        if all(isinstance(v, (int, float)) and 1 <= v <= 2**20 for v in values) and len(set(values)) > 1
    ]
    groups = [[values for name, values in sizes if name.startswith("block_size")]]
    groups += [[values for name, values in sizes if name.endswith(axis)] for axis in ("_x", "_y", "_z")]
    return [[math.prod(row) for row in zip(*group, strict=True)] for group in groups if len(group) > 1]


def _evenness(levels: Array) -> Array | None:
    """How often 2 divides each of some numbers, as 0…1; None where they are not whole or their size says it too."""
    if levels[0] < 1 or levels[-1] > 2**52 or np.any(levels != np.floor(levels)):
        return None
    whole = levels.astype(np.int64)
    times = np.log2((whole & -whole).astype(float))
    if np.ptp(times) == 0 or np.ptp(np.log2(levels) - times) == 0:
        return None
    even: Array = (times - times.min()) / np.ptp(times)
    return even


def _matern(squared: Array) -> tuple[Array, Array]:
    """The Matérn-5/2 kernel of a squared distance, and its derivative by that."""
    r = np.sqrt(5.0 * squared)
    falling = np.exp(-r)
    return (1.0 + r + r * r / 3.0) * falling, -(5.0 / 6.0) * (1.0 + r) * falling


class GaussianProcess:
    """Regression over configurations, given by their codes ``[N, D]``, with hyperparameters of maximum posterior.

    ``places`` are those of `Points`; ``factored`` chooses the kernel (see above). A distance along one parameter has
    few values, one for each pair of the parameter's own: a table. Raises `UsageError` without scipy.
    """

    def __init__(self, places: Sequence[Array], factored: bool) -> None:
        if find_spec("scipy") is None:
            raise UsageError("the search needs scipy", hint="pip install 'castile[tune]'")
        # For each parameter [A + 1, values, values]: squared distances in each order, and whether two values differ.
        self._apart = [
            np.stack([*((p[:, None] - p[None]) ** 2 for p in place.T), 1.0 - np.eye(len(place))]) for place in places
        ]
        priors: list[_Prior] = []
        for apart in self._apart:
            # A parameter of two values has no order: whether they differ is all there is.
            priors += [_ORDERED] * (len(apart) - 1) + [_EQUAL if apart.shape[1] > 2 else _ORDERED]
        self._factored = factored
        self._priors = [*priors, *([_CONSTANT] if factored else []), _SCALE, _NOISE]
        self._theta = np.array([p.mean for p in self._priors])

    def fit(self, known: Array, y: Array) -> None:
        """Move the hyperparameters to the maximum of their posterior, given the values ``y`` ``[N]`` at ``known``
        ``[N, D]``, from where they are."""
        from scipy.optimize import minimize

        found = minimize(
            self._loss,
            self._theta,
            (known, y),
            jac=True,
            method="L-BFGS-B",
            bounds=[p.bounds for p in self._priors],
            options={"maxiter": _STEPS},
        )
        if np.all(np.isfinite(found.x)):
            self._theta = found.x

    def _loss(self, theta: Array, known: Array, y: Array) -> tuple[float, Array]:
        """The negative log posterior and its gradient."""
        from scipy.linalg import cho_solve, cholesky

        scale, noise = math.exp(2 * theta[-2]), math.exp(2 * theta[-1])
        shape, slopes, by_constant = self._shape(theta, known, known, slopes=True)
        k = scale * shape
        k[np.diag_indices_from(k)] += noise + _JITTER
        lower = cholesky(k, lower=True, check_finite=False)
        alpha = cho_solve((lower, True), y, check_finite=False)
        pull = scale * (cho_solve((lower, True), np.eye(len(y)), check_finite=False) - np.outer(alpha, alpha))
        gradient: list[float] = []
        for w, apart, codes, slope in zip(self._weights(theta), self._apart, known.T, slopes, strict=True):
            is_value = np.eye(apart.shape[1])[codes]
            gradient += list(-w * (apart * (is_value.T @ (pull * slope) @ is_value)).sum(axis=(1, 2)))
        if self._factored:
            gradient.append(0.5 * float(np.sum(pull * by_constant)))
        gradient += [float(np.sum(pull * shape)), float(np.trace(pull)) * noise / scale]
        means, deviations = np.array([(p.mean, p.deviation) for p in self._priors]).T
        z = (theta - means) / deviations
        value = 0.5 * y @ alpha + np.log(np.diag(lower)).sum() + 0.5 * z @ z
        return float(value), np.array(gradient) + z / deviations

    def _weights(self, theta: Array) -> list[Array]:
        """The inverse squared lengths of each parameter."""
        ends = np.cumsum([len(a) for a in self._apart], dtype=int)
        return np.split(np.exp(-2 * theta[: ends[-1]]), ends[:-1]) if len(ends) else []

    def _shape(self, theta: Array, a: Array, b: Array, slopes: bool = False) -> tuple[Array, list[Array], Array]:
        """The kernel over its scale between points ``a`` and ``b``; with ``slopes`` also its derivatives by each
        parameter's squared distance, and by the logarithm of the constant."""
        tables = [np.tensordot(w, apart, 1) for w, apart in zip(self._weights(theta), self._apart, strict=True)]
        pairs = list(zip(tables, a.T, b.T, strict=True))
        if not self._factored:
            squared = np.zeros((len(a), len(b)))
            for table, p, q in pairs:
                squared += table[p][:, q]
            shape, slope = _matern(squared)
            return shape, [slope] * len(pairs) if slopes else [], np.zeros(())
        constant = math.exp(theta[-3])
        shape, by_distance, by_constant = np.ones((len(a), len(b))), [], np.zeros(())
        for table, p, q in pairs:
            kernel, slope = _matern(table)
            factor = ((constant + kernel) / (constant + 1.0))[p][:, q]
            shape *= factor
            if slopes:
                by_distance.append((slope / (constant + kernel))[p][:, q])
                by_constant = by_constant + (constant / (constant + kernel) - constant / (constant + 1.0))[p][:, q]
        return shape, [shape * d for d in by_distance], shape * by_constant if slopes else by_constant

    def predict(self, known: Array, y: Array, asked: Array) -> tuple[Array, Array]:
        """Mean and standard deviation ``[M]`` at ``asked`` ``[M, D]``, given the values ``y`` ``[N]`` at ``known``."""
        from scipy.linalg import cho_solve, cholesky, solve_triangular

        scale, noise = math.exp(2 * self._theta[-2]), math.exp(2 * self._theta[-1])
        k = scale * self._shape(self._theta, known, known)[0]
        k[np.diag_indices_from(k)] += noise + _JITTER
        lower = cholesky(k, lower=True, check_finite=False)
        across = scale * self._shape(self._theta, known, asked)[0]
        mean = across.T @ cho_solve((lower, True), y, check_finite=False)
        part = solve_triangular(lower, across, lower=True, check_finite=False)
        return mean, np.sqrt(np.maximum(scale - (part * part).sum(axis=0), 1e-12))


def expected_improvement(mean: Array, deviation: Array, best: float) -> Array:
    """How far below ``best`` a value is expected to fall, counting only falls."""
    from scipy.special import ndtr

    z = (best - mean) / deviation
    return deviation * (z * ndtr(z) + np.exp(-0.5 * z * z) / math.sqrt(2 * math.pi))
