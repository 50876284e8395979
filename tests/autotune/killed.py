"""A tuner to be killed: it tells of each trial that is on record, on a line of its own.

python killed.py RECORDS SEED TRIALS
"""

from __future__ import annotations

import sys

from test_measure import SHAPES, SOFTMAX, faulty, with_faults

from castile.autotune.tuner import Progress, tune


def main(path: str, seed: int, trials: int) -> None:
    with_faults(setattr)

    def told(p: Progress) -> None:
        if p.last is not None:
            print(p.last.uid, flush=True)

    result = tune(SOFTMAX, SHAPES, budget_s=20, trials=trials, seed=seed, path=path, progress=told, measurer=faulty(2))
    print("done", result.best.uid, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
