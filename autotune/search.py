"""The search: which configuration to measure next. Deterministic given a seed and the times that it is told.

A few configurations that differ as much as possible come first. Then two surrogates take turns: one of the logarithm of
time, which tells the slow apart, by what parameters do alone and together; and one of speed, which tells the fast
apart, by what lies near. Each proposes the configuration that promises the greatest improvement beyond a margin, wide
at first and ever narrower. A cost model takes part by what is measured first: its choices come before the ones that
differ (`tuner.promising`), and a model that is wrong costs those trials and no more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .surrogate import Array, GaussianProcess, Points, expected_improvement

# Configurations measured before a surrogate is asked, how many random ones each of them is chosen from, and of how
# many measurements on a surrogate's hyperparameters are fitted again.
FIRST, DRAWN, REFIT = 10, 40, 5

# How much more than its deviation a surrogate is taken to be unsure: its hyperparameters are a guess from few
# measurements too, of which the deviation says nothing, and a search that believes it stays in the first good place.
WARY = 1.4

# How large an improvement must be to count, after the first points, in standard deviations of what was measured; it
# falls with the root of the trials (a cooling schedule, as in Sasena's thesis, 2002). Often hundreds of configurations
# are about as good, and a few much better: were any improvement welcome, the trials would go into gains of a percent.
AMBITION = 1.0

# Spaces up to this size are scored whole; in larger ones the neighbours of the best, and others drawn at random.
WHOLE, ELITE, POOL = 20_000, 8, 8000


def log_time(times: Array) -> Array:
    """Logarithms, the slowest drawn nearer, failures as the slowest."""
    good = np.isfinite(times)
    y = np.log(times, where=good, out=np.full(len(times), np.nan))
    y = np.where(good, y, np.nanmax(y))
    middle = np.median(y)
    return np.minimum(y, middle + 3 * (middle - y.min()))


def slowness(times: Array) -> Array:
    """Minus the speed as a share of the best: 0 for failures."""
    good = np.isfinite(times)
    return -np.where(good, np.min(times[good]) / np.where(good, times, 1.0), 0.0)


@dataclass(slots=True)
class _Arm:
    """One surrogate, and what it makes of times."""

    scale: Callable[[Array], Array]
    process: GaussianProcess
    turns: int = 0


class Search:
    """Proposes points of a finite space by `ask`, and learns their times by `tell`.

    ``first`` are points to measure before any other: the default of a space, what a cost model holds to be fast.
    ``ask`` may be called for several at once, and again before all are told. ``forecasts`` holds the time that a
    surrogate foresaw for the points that it proposed.
    """

    def __init__(self, points: Points, seed: int = 0, *, first: Sequence[int] = ()) -> None:
        self.points = points
        self.times: dict[int, float] = {}
        self.forecasts: dict[int, float] = {}
        self._rng = np.random.default_rng(seed)
        self._asked: set[int] = set()
        self._order: list[int] = []
        self._arms = [
            _Arm(log_time, GaussianProcess(points.places, factored=True)),
            _Arm(slowness, GaussianProcess(points.places, factored=False)),
        ]
        self._turn = 0
        self._queue = self._design(list(dict.fromkeys(first)))

    @property
    def best(self) -> int | None:
        """The fastest point so far; None before anything has run."""
        good = [(t, i) for i, t in self.times.items() if np.isfinite(t)]
        return min(good)[1] if good else None

    def tell(self, point: int, time: float | None) -> None:
        """The time of a point in any unit, the same for all; None for a point that failed."""
        self._asked.add(point)
        self._order.append(point) if point not in self.times else None
        self.times[point] = float(time) if time is not None and time > 0 and np.isfinite(time) else np.inf

    def ask(self, count: int = 1) -> list[int]:
        """Up to ``count`` points that were not asked before; fewer where the space ends."""
        found: list[int] = []
        while len(found) < count and len(self._asked) < len(self.points):
            point = self._next()
            self._asked.add(point)
            found.append(point)
        return found

    # The first points

    def _design(self, first: list[int]) -> list[int]:
        """The first ones, then points that differ in as many parameters as possible."""
        size = len(self.points)
        chosen = first or [int(self._rng.integers(size))]
        codes = self.points.codes
        for _ in range(FIRST - len(chosen)):
            drawn = self._rng.choice(size, min(DRAWN, size), replace=False)
            apart = (codes[drawn][:, None] != codes[chosen][None]).mean(axis=2) if codes.shape[1] else np.zeros((1, 1))
            score = apart.min(axis=1) + 0.3 * apart.mean(axis=1) + 1e-6 * self._rng.random(len(apart))
            chosen.append(int(drawn[int(np.argmax(score))]))
        return list(dict.fromkeys(chosen))

    # The points after them

    def _next(self) -> int:
        while self._queue:
            point = self._queue.pop(0)
            if point not in self._asked:
                return point
        candidates = self._candidates()
        if len(candidates) == 1 or not any(np.isfinite(t) for t in self.times.values()):
            return int(self._rng.choice(candidates))
        arm = self._arms[self._turn % len(self._arms)]
        self._turn += 1
        promise, mean = self._promise(arm, candidates)
        place = int(np.argmax(promise))
        if arm.scale is log_time:
            self.forecasts[int(candidates[place])] = float(np.exp(mean[place]))
        return int(candidates[place])

    def _candidates(self) -> Array:
        """Points that may come next."""
        size = len(self.points)
        free = np.ones(size, dtype=bool)
        free[list(self._asked)] = False
        if size <= WHOLE:
            return np.flatnonzero(free)
        codes = self.points.codes
        best = sorted(self.times, key=lambda i: (self.times[i], i))[:ELITE]
        near = np.zeros(size, dtype=bool)
        for i in best:
            near |= (codes != codes[i]).sum(axis=1) <= 2
        near &= free
        close = np.flatnonzero(near)
        if len(close) > POOL // 2:
            close = np.sort(self._rng.choice(close, POOL // 2, replace=False))
        free[close] = False
        others = np.flatnonzero(free)
        drawn = self._rng.choice(others, min(POOL - len(close), len(others)), replace=False)
        return np.concatenate([close, np.sort(drawn)])

    def _promise(self, arm: _Arm, candidates: Array) -> tuple[Array, Array]:
        """The expected improvement of each candidate beyond the margin, and the mean behind it in the arm's scale.

        A point that was asked and not yet told counts as predicted.
        """
        told = np.array(self._order)
        y = arm.scale(np.array([self.times[i] for i in told]))
        middle, spread = y.mean(), y.std() + 1e-9
        scaled = (y - middle) / spread
        codes = self.points.codes
        known = codes[told]
        if arm.turns % REFIT == 0:
            arm.process.fit(known, scaled)
        arm.turns += 1
        pending = np.array(sorted(self._asked - set(self.times)), dtype=int)
        if len(pending):
            believed, _ = arm.process.predict(known, scaled, codes[pending])
            known, scaled = codes[np.concatenate([told, pending])], np.concatenate([scaled, believed])
        mean, deviation = arm.process.predict(known, scaled, codes[candidates])
        mean, deviation = mean * spread + middle, deviation * spread
        margin = AMBITION * float(y.std()) * math.sqrt(FIRST / max(FIRST, len(told)))
        return expected_improvement(mean, WARY * deviation, float(y.min()) - margin), mean
