"""Replay: the search on a brute-forced table in place of hardware, and how far it stays behind the optimum."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .search import Search
from .surrogate import encode
from .table import Table

# Trials at which regret is reported.
MARKS = (25, 50, 100, 200)


@dataclass(frozen=True, slots=True)
class Replay:
    """``regrets`` ``[seeds, trials]``: by how much the best so far is slower than the optimum, as a fraction of it."""

    regrets: Any

    @property
    def marks(self) -> tuple[int, ...]:
        trials = self.regrets.shape[1]
        return tuple(sorted({*(m for m in MARKS if m <= trials), trials}))

    def median(self) -> dict[str, float]:
        return {str(m): float(np.median(self.regrets[:, m - 1])) for m in self.marks}

    def mean(self) -> dict[str, float]:
        return {str(m): float(np.mean(self.regrets[:, m - 1])) for m in self.marks}


def replay(
    table: Table, trials: int, seeds: Sequence[int], progress: Callable[[int], None] = lambda done: None
) -> Replay:
    """Search a table once for each seed. Before anything valid is found, regret is that of the slowest."""
    points = encode(table.columns, table.parameters)
    rows = []
    for done, seed in enumerate(seeds):
        progress(done)
        search = Search(points, seed)
        times: list[float] = []
        while len(times) < trials and (asked := search.ask()):
            for point in asked:
                time = float(table.times[point])
                search.tell(point, time if np.isfinite(time) else None)
                times.append(time)
        times += [np.nan] * (trials - len(times))
        rows.append(np.fmin.accumulate(np.array(times)))
    found = np.nan_to_num(np.array(rows), nan=float(np.nanmax(table.times)))
    return Replay(found / table.best - 1.0)
