"""Races between castile's kernels and torch's, where either may be faster: run once for each shape in a process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable

# Rounds of a race, and seconds after which no further one begins; how much faster than torch a kernel must be.
ROUNDS, LONGEST_S, BETTER = 4, 0.15, 1.02


def faster(mine: Callable[[], None], theirs: Callable[[], None]) -> bool:
    """Whether the first is faster, by the best of several rounds in turn; the first call of each does not count."""
    best = [float("inf"), float("inf")]
    mine()
    theirs()
    start = time.perf_counter()
    for _ in range(ROUNDS):
        for i, run in enumerate((mine, theirs)):
            before = time.perf_counter()
            run()
            best[i] = min(best[i], time.perf_counter() - before)
        if time.perf_counter() - start > LONGEST_S:
            break
    return best[0] * BETTER < best[1]


class Races:
    """Who won: the same for all graphs and threads of a process, so that equal calls give equal bits."""

    def __init__(self) -> None:
        self._won: dict[Hashable, bool] = {}
        self._lock = threading.Lock()

    def won(self, key: Hashable, race: Callable[[], bool]) -> bool:
        """Whether castile won the race of that key, run now if it never was; lost if it cannot be run."""
        with self._lock:
            found = self._won.get(key)
            if found is None:
                try:
                    found = race()
                except Exception:  # whatever a kernel does, the model runs
                    found = False
                self._won[key] = found
            return found


RACES = Races()
