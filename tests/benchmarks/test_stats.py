"""Medians, their intervals and paired ratios."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from castile.benchmarks._stats import Interval, median_interval, quantile, ratio_interval


def coverage(n: int, rank: int) -> float:
    """Chance that the rank-th smallest and rank-th largest of n values enclose the median."""
    return 1 - 2 * sum(math.comb(n, i) for i in range(rank)) / 2**n


@pytest.mark.parametrize("n", range(6, 120))
def test_the_interval_is_the_narrowest_that_covers_95_percent(n: int) -> None:
    interval = median_interval(range(1, n + 1))
    rank = int(interval.low)
    assert interval.high == n + 1 - rank
    assert coverage(n, rank) >= 0.95
    assert coverage(n, rank + 1) < 0.95


@pytest.mark.parametrize("n", range(1, 6))
def test_few_values_give_their_whole_range(n: int) -> None:
    interval = median_interval(range(1, n + 1))
    assert (interval.low, interval.high) == (1, n)


def test_skewed_noise_is_covered_as_often_as_promised() -> None:
    rng = random.Random(0)
    intervals = [median_interval([rng.lognormvariate(0.0, 1.0) for _ in range(31)]) for _ in range(2000)]
    assert 0.94 <= sum(i.contains(1.0) for i in intervals) / len(intervals) <= 0.985


@pytest.mark.parametrize("values", [[3.0], [2.0, 1.0], [5.0, 1.0, 4.0], [0.5, 8.0, -1.0, 2.0, 2.0]])
@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.5, 0.9, 1.0])
def test_quantiles_are_numpys(values: list[float], fraction: float) -> None:
    assert quantile(values, fraction) == pytest.approx(float(np.quantile(values, fraction)))


def test_no_values_are_refused() -> None:
    with pytest.raises(ValueError, match="no values"):
        median_interval([])
    with pytest.raises(ValueError, match="no values"):
        quantile([], 0.5)


def test_pairing_cancels_what_both_sides_suffer() -> None:
    drift = [1.0 + i for i in range(40)]
    assert ratio_interval([2 * d for d in drift], drift) == Interval(2.0, 2.0, 2.0)
    with pytest.raises(ValueError, match="shorter"):
        ratio_interval([1.0, 2.0], [1.0])


def test_the_reciprocal_swaps_the_ends() -> None:
    assert Interval(0.5, 0.25, 1.0).reciprocal() == Interval(2.0, 1.0, 4.0)
