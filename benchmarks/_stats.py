"""Medians and their confidence intervals, without assuming any distribution of the noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Interval:
    """A median with its confidence interval, in the unit of the values it was taken from."""

    median: float
    low: float
    high: float

    def contains(self, value: float) -> bool:
        """Whether `value` lies in the interval, ends included."""
        return self.low <= value <= self.high

    def reciprocal(self) -> Interval:
        """The interval of 1/x: a speed-up read as a slowdown."""
        return Interval(1 / self.median, 1 / self.high, 1 / self.low)


def quantile(values: Sequence[float], fraction: float) -> float:
    """The `fraction` quantile of `values`, interpolated linearly between neighbours."""
    if not values:
        raise ValueError("no values")
    ordered = sorted(values)
    position = fraction * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def median_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """The median of `values` with the order-statistic confidence interval (the inverted sign test).

    How many of n independent values fall below the true median is binomial(n, 1/2), whatever their distribution, so the
    r-th smallest and r-th largest value enclose it with a probability known exactly; r is the largest that keeps it at
    `confidence` or more. Below 6 values not even the extremes reach 95%: then the interval is the whole range.
    """
    if not values:
        raise ValueError("no values")
    ordered = sorted(values)
    n = len(ordered)
    outside, rank = 0.0, 0
    while rank < n // 2:
        outside += 2 * math.comb(n, rank) / 2**n
        if outside > 1 - confidence:
            break
        rank += 1
    rank = max(rank, 1)
    return Interval(quantile(ordered, 0.5), ordered[rank - 1], ordered[n - rank])


def ratio_interval(numerators: Sequence[float], denominators: Sequence[float]) -> Interval:
    """The median of the paired ratios, with its confidence interval.

    Entry i of both comes from the same round, a moment apart: what drifts (clocks, temperature) cancels in each ratio.
    """
    return median_interval([a / b for a, b in zip(numerators, denominators, strict=True)])
