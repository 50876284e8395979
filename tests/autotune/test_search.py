"""The search by itself: what it asks, and how large an improvement must be to count."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from castile.autotune import search as searching
from castile.autotune.search import Search
from castile.autotune.surrogate import Array, Points, encode

ROWS = list(itertools.product((16, 32, 48, 64, 96, 128, 192, 256), (1, 2, 4, 8), (1, 2, 3, 4), (0, 1), (0, 1), (0, 1)))
POINTS = encode(list(zip(*ROWS, strict=True)))


def plateau() -> Array:
    """Times of a space that is a little uneven, and half that where three switches and a tile agree."""
    rough = np.random.default_rng(0).normal(0.0, 0.05, len(ROWS))
    times = [
        (1 + 0.1 * abs(math.log2(x / 64)) + 0.3 * (y > 4)) * (0.5 if (z, a, b, c) == (3, 1, 0, 1) else 1.0)
        for x, y, z, a, b, c in ROWS
    ]
    return np.array(times) * np.exp(rough)


def searched(points: Points, times: Array, trials: int, seed: int, batch: int = 1) -> list[int]:
    search, found = Search(points, seed), []
    while len(found) < trials and (asked := search.ask(min(batch, trials - len(found)))):
        for point in asked:
            search.tell(point, float(times[point]) if np.isfinite(times[point]) else None)
        found += asked
    return found


@pytest.mark.parametrize("batch", [1, 3])
def test_no_point_is_asked_twice_and_a_seed_decides_all(batch: int) -> None:
    times = plateau()
    times[::7] = np.nan
    first, second = (searched(POINTS, times, 30, 1, batch) for _ in range(2))
    assert first == second
    assert len(set(first)) == 30
    assert first != searched(POINTS, times, 30, 2, batch)


def test_the_unit_of_time_is_of_no_account() -> None:
    times = plateau()
    assert searched(POINTS, times, 25, 0) == searched(POINTS, times * 2.0**20, 25, 0)


def test_a_space_where_nothing_works_and_one_where_all_is_equal_come_to_their_end() -> None:
    few = encode([[1, 2, 4, 8] * 4, [r // 4 for r in range(16)]])
    assert sorted(searched(few, np.full(16, np.nan), 20, 0)) == list(range(16))
    assert sorted(searched(few, np.ones(16), 20, 0)) == list(range(16))


def test_an_improvement_counts_beyond_a_margin_that_narrows(monkeypatch: pytest.MonkeyPatch) -> None:
    targets: list[float] = []

    def improvement(mean: Array, deviation: Array, best: float) -> Array:
        targets.append(best)
        return -mean

    monkeypatch.setattr(searching, "expected_improvement", improvement)
    times = plateau()
    asked = searched(POINTS, times, 30, 0)
    margins = []
    for trials, target in zip(range(searching.FIRST, 30, 2), targets[::2], strict=True):  # of log time
        y = searching.log_time(times[asked[:trials]])
        margins.append((y.min() - target) / y.std())
    assert margins[0] == pytest.approx(searching.AMBITION)
    assert np.all(np.diff(margins) < 0)
    assert margins[-1] == pytest.approx(searching.AMBITION * math.sqrt(searching.FIRST / 28))
