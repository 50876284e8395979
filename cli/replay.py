"""`castile replay`: the search on a brute-forced table, in place of hardware."""

from __future__ import annotations

import os
from pathlib import Path
from time import perf_counter
from typing import Annotated

import typer

from .terminal import Json, emit, err, out


def replay(
    table: Annotated[
        Path, typer.Argument(metavar="TABLE", help="A cache of Kernel Tuner or T4 JSON, also .gz.", show_default=False)
    ],
    trials: Annotated[int, typer.Option("--trials", min=1, max=100_000, help="Configurations to try.")] = 100,
    seeds: Annotated[int, typer.Option("--seeds", min=1, max=10_000, help="Searches, each from its own seed.")] = 20,
    json: Json = False,
) -> None:
    """Replay the search on a brute-forced table and report its regret.

    Regret is by how much the best configuration found is slower than the fastest of the table, as a fraction.
    """
    # Matrices of a few hundred rows: threads cost more than they bring. This must stand before NumPy is loaded.
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")
    from rich.progress import Progress

    from ..autotune.replay import replay as run
    from ..autotune.table import read_table

    found = read_table(table)
    began = perf_counter()
    with Progress(console=err(), transient=True) as bar:
        task = bar.add_task("searching", total=seeds)
        result = run(found, trials, range(seeds), lambda done: bar.update(task, completed=done))
    seconds = perf_counter() - began
    if json:
        emit(
            {
                "table": found.name,
                "device": found.device,
                "objective": found.objective,
                "configurations": len(found),
                "valid": int((found.times == found.times).sum()),
                "best": found.best,
                "trials": trials,
                "seeds": seeds,
                "median_regret": result.median(),
                "mean_regret": result.mean(),
                "seconds": seconds,
            }
        )
        return
    from rich.table import Table as Grid

    grid = Grid("trials", "median regret", "mean regret", title=f"{found.name}: {len(found)} configurations")
    for mark, middle in result.median().items():
        grid.add_row(mark, f"{middle:.2%}", f"{result.mean()[mark]:.2%}")
    out().print(grid)
    out().print(f"{seeds} searches in {seconds:.1f} s")
