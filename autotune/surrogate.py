"""The surrogate of the search: a Gaussian process over configurations, fitted anew as measurements come in.

Distance between two configurations is a weighted sum, over parameters, of how far apart their values lie and of
whether they differ at all: tuning landscapes are both smooth (twice the tile, a little slower) and jagged (this value
spills, that one does not), and the weights, fitted to the measurements, say which parameter is which.
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

# Log-normal priors of the hyperparameters: (mean, deviation) of the logarithm. A unit is a parameter's whole range.
_ORDERED, _EQUAL, _SCALE, _NOISE = (0.0, 1.0), (math.log(2.0), 1.0), (0.0, 0.7), (math.log(0.05), 1.0)
_BOUNDS = {_ORDERED: (-3.0, 5.0), _EQUAL: (-3.0, 5.0), _SCALE: (-2.0, 2.0), _NOISE: (-6.0, 0.5)}
_JITTER = 1e-6
_STEPS = 20


@dataclass(frozen=True, slots=True)
class Points:
    """Configurations as numbers: ``ordered`` ``[N, A]`` in 0…1 and ``codes`` ``[N, D]``, an integer for each value."""

    ordered: Array
    codes: Array

    def __len__(self) -> int:
        return len(self.codes)

    def take(self, which: Any) -> Points:
        return Points(self.ordered[which], self.codes[which])


def encode(columns: Sequence[Sequence[Any]]) -> Points:
    """Columns of a table, one sequence of N values for each parameter, as points. A parameter that never varies says
    nothing and is left out; values that are no numbers have no order.

    Whole numbers lie apart in two ways: by their size, and by how often 2 divides them, since warps, vectors, banks
    and lines of caches all come in powers of 2, and what fills them evenly is quick whatever its size.
    """
    ordered, codes = [], []
    for values in columns:
        numeric = all(isinstance(v, (int, float)) and math.isfinite(v) for v in values)
        keys = [float(v) for v in values] if numeric else [f"{type(v).__name__} {v}" for v in values]
        levels, code = np.unique(np.asarray(keys), return_inverse=True)
        if len(levels) < 2:
            continue
        codes.append(code)
        if numeric and len(levels) > 2:
            place = np.log2(levels) if levels[0] > 0 else np.arange(float(len(levels)))
            ordered.append(((place - place[0]) / (place[-1] - place[0]))[code])
            even = _evenness(levels)
            if even is not None:
                ordered.append(even[code])
    count = len(columns[0]) if columns else 0
    return Points(
        np.array(ordered, dtype=float).T.reshape(count, len(ordered)),
        np.array(codes, dtype=np.int64).T.reshape(count, len(codes)),
    )


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
    """Regression with one weight for each parameter's order and one for its equality, fitted by maximum posterior."""

    def __init__(self, points: Points) -> None:
        if find_spec("scipy") is None:
            raise UsageError("the search needs scipy", hint="pip install 'castile[tune]'")
        a = points.ordered.shape[1]
        # A parameter of two values has no order: whether they differ is all there is.
        levels = points.codes.max(axis=0) + 1 if len(points) else []
        equal = [_ORDERED if n == 2 else _EQUAL for n in levels]
        self._priors = [_ORDERED] * a + equal + [_SCALE, _NOISE]
        self._theta = np.array([p[0] for p in self._priors])
        self._ordered = a

    def fit(self, points: Points, y: Array) -> None:
        """Move the hyperparameters to the maximum of their posterior, from where they are."""
        from scipy.optimize import minimize

        apart = np.concatenate(
            [
                (points.ordered[:, None] - points.ordered[None]) ** 2,
                (points.codes[:, None] != points.codes[None]).astype(float),
            ],
            axis=2,
        )
        bounds = [_BOUNDS[p] for p in self._priors]
        found = minimize(
            self._loss, self._theta, (apart, y), jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": _STEPS}
        )
        if np.all(np.isfinite(found.x)):
            self._theta = found.x

    def _loss(self, theta: Array, apart: Array, y: Array) -> tuple[float, Array]:
        """The negative log posterior and its gradient."""
        from scipy.linalg import cho_solve, cholesky

        weights, scale, noise = np.exp(-2 * theta[:-2]), math.exp(2 * theta[-2]), math.exp(2 * theta[-1])
        shape, slope = _matern(apart @ weights)
        k = scale * shape
        k[np.diag_indices_from(k)] += noise + _JITTER
        lower = cholesky(k, lower=True, check_finite=False)
        alpha = cho_solve((lower, True), y, check_finite=False)
        inverse = cho_solve((lower, True), np.eye(len(y)), check_finite=False)
        pull = inverse - np.outer(alpha, alpha)
        means, deviations = np.array(self._priors).T
        z = (theta - means) / deviations
        gradient = np.empty_like(theta)
        gradient[:-2] = -weights * np.einsum("ij,ijk->k", pull * slope * scale, apart)
        gradient[-2] = np.sum(pull * shape) * scale
        gradient[-1] = np.trace(pull) * noise
        return float(0.5 * y @ alpha + np.log(np.diag(lower)).sum() + 0.5 * z @ z), gradient + z / deviations

    def _place(self, points: Points, levels: Array) -> Array:
        """Points as vectors whose squared distance is the weighted one."""
        weights = np.exp(-self._theta[:-2])
        parts = [points.ordered * weights[: self._ordered]]
        for j, count in enumerate(levels):
            hot = np.eye(int(count))[points.codes[:, j]]
            parts.append(hot * (weights[self._ordered + j] * math.sqrt(0.5)))
        return np.concatenate(parts, axis=1)

    def predict(self, known: Points, y: Array, asked: Points) -> tuple[Array, Array]:
        """Mean and standard deviation at ``asked``, given the values ``y`` at ``known``."""
        from scipy.linalg import cho_solve, cholesky, solve_triangular

        scale, noise = math.exp(2 * self._theta[-2]), math.exp(2 * self._theta[-1])
        levels = np.maximum(known.codes.max(axis=0), asked.codes.max(axis=0)) + 1
        a, b = self._place(known, levels), self._place(asked, levels)

        def kernel(p: Array, q: Array) -> Array:
            squared = (p * p).sum(axis=1)[:, None] + (q * q).sum(axis=1)[None] - 2 * p @ q.T
            return scale * _matern(np.maximum(squared, 0.0))[0]

        k = kernel(a, a)
        k[np.diag_indices_from(k)] += noise + _JITTER
        lower = cholesky(k, lower=True, check_finite=False)
        across = kernel(a, b)
        mean = across.T @ cho_solve((lower, True), y, check_finite=False)
        part = solve_triangular(lower, across, lower=True, check_finite=False)
        return mean, np.sqrt(np.maximum(scale - (part * part).sum(axis=0), 1e-12))


def expected_improvement(mean: Array, deviation: Array, best: float) -> Array:
    """How far below ``best`` a value is expected to fall, counting only falls."""
    from scipy.special import ndtr

    z = (best - mean) / deviation
    return deviation * (z * ndtr(z) + np.exp(-0.5 * z * z) / math.sqrt(2 * math.pi))
