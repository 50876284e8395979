"""The search beside those of Kernel Tuner, on brute-forced tables: how far each stays behind the optimum.

    python benchmarks/bench_search.py TABLE [TABLE ...] [--trials 200] [--seeds 20] [--json]

Kernel Tuner runs in its simulation mode with each strategy's defaults, where it is installed; random search stands
beside them in any case. For every mark the strategies are compared with castile's by a permutation test of the
difference of mean regrets; `significant` says that a strategy is better at 5%. ``error`` is the standard error of a
mean. Slices (--strategies) may be run one by one: with --out rows go to a file, in place of those of the same name,
and with --regrets searches are kept in a folder, seed by seed, so that a run that is broken off goes on from there.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gzip
import io
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

for _name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

import numpy as np  # noqa: E402

from castile.autotune.replay import replay  # noqa: E402
from castile.autotune.table import Table, read_table  # noqa: E402

MARKS = (25, 50, 100, 200)

# Those of Kernel Tuner 1.4 that work on any table without further packages.
STRATEGIES = (
    "basinhopping",
    "bayes_opt",
    "diff_evo",
    "dual_annealing",
    "firefly_algorithm",
    "genetic_algorithm",
    "greedy_ils",
    "greedy_mls",
    "mls",
    "ordered_greedy_mls",
    "pso",
    "simulated_annealing",
)


def random_search(table: Table, trials: int, seeds: int) -> Any:
    """Regrets ``[seeds, trials]`` of drawing without replacement."""
    slowest = float(np.nanmax(table.times))
    rows = []
    for seed in range(seeds):
        order = np.random.default_rng(seed).permutation(len(table))[:trials]
        times = table.times[np.resize(order, trials)]
        rows.append(np.nan_to_num(np.fmin.accumulate(times), nan=slowest))
    return np.array(rows) / table.best - 1


def kernel_tuner_search(path: Path, table: Table, strategy: str, trials: int, seed: int) -> Any:
    """Regrets ``[trials]`` of a strategy of Kernel Tuner, in the order of its distinct configurations."""
    import random

    import kernel_tuner
    from constraint import FunctionConstraint

    raw = path.read_bytes()
    data = json.loads(gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw)
    known = set(data["cache"])
    names = data["tune_params_keys"]
    allowed = FunctionConstraint(lambda *values: ",".join(map(str, values)) in known)
    random.seed(seed)
    np.random.seed(seed)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        cache = Path(folder) / "cache.json"
        cache.write_text(json.dumps(data))
        found, _ = kernel_tuner.tune_kernel(
            data["kernel_name"],
            "",
            tuple(data["problem_size"]),
            [],
            {n: data["tune_params"][n] for n in names},
            restrictions=[allowed],
            strategy=strategy,
            strategy_options={"max_fevals": trials},
            cache=str(cache),
            simulation_mode=True,
            quiet=True,
        )
    times = [r["time"] if isinstance(r["time"], (int, float)) else np.nan for r in found][:trials]
    times += [np.nan] * (trials - len(times))
    best = np.fmin.accumulate(np.array(times, dtype=float))
    return np.nan_to_num(best, nan=float(np.nanmax(table.times))) / table.best - 1


def better(theirs: Any, ours: Any, rounds: int = 5000) -> float:
    """The probability that a difference of means this much in their favour is chance."""
    rng = np.random.default_rng(0)
    both, count = np.concatenate([theirs, ours]), len(theirs)
    seen = ours.mean() - theirs.mean()
    drawn = (rng.permutation(both) for _ in range(rounds))
    return float(np.mean([p[count:].mean() - p[:count].mean() >= seen - 1e-12 for p in drawn]))


def searches(path: Path, table: Table, strategy: str, trials: int, seeds: int, folder: Path | None) -> Any:
    """Regrets ``[seeds, trials]`` of a strategy, each seed's kept in a folder as it ends."""
    rows = []
    for seed in range(seeds):
        place = None if folder is None else folder / f"{path.name}-{strategy}-{trials}-{seed}.npy"
        if place is not None and place.is_file():
            rows.append(np.load(place))
            continue
        if strategy == "castile":
            rows.append(replay(table, trials, [seed]).regrets[0])
        else:
            rows.append(kernel_tuner_search(path, table, strategy, trials, seed))
        if place is not None:
            np.save(place, rows[-1])
    return np.array(rows)


def bench(
    path: Path, trials: int, seeds: int, strategies: list[str], folder: Path | None = None
) -> list[dict[str, Any]]:
    """One row for each strategy and mark."""
    table = read_table(path)
    ours = searches(path, table, "castile", trials, seeds, folder)
    found = {"castile": ours, "random": random_search(table, trials, seeds)}
    for strategy in strategies:
        try:
            found[strategy] = searches(path, table, strategy, trials, seeds, folder)
        except Exception as error:  # a strategy of theirs that fails is a row less, not the end
            print(f"{strategy}: {type(error).__name__}: {error}"[:200], file=sys.stderr)
    rows = []
    for name, regrets in found.items():
        for mark in (m for m in MARKS if m <= trials):
            here = regrets[:, mark - 1]
            chance = better(here, ours[:, mark - 1]) if name != "castile" else 1.0
            rows.append(
                {
                    "table": path.name,
                    "strategy": name,
                    "trials": mark,
                    "mean": float(here.mean()),
                    "error": float(here.std(ddof=1) / len(here) ** 0.5) if len(here) > 1 else 0.0,
                    "median": float(np.median(here)),
                    "significant": chance < 0.05,
                }
            )
    return rows


def keep(path: Path, rows: list[dict[str, Any]], seeds: int) -> None:
    """Write rows into a file of them, where they replace those of the same table, strategy and mark."""
    with contextlib.suppress(ImportError):
        from importlib.metadata import version

        import kernel_tuner  # noqa: F401

        rows = [{"kernel_tuner": version("kernel_tuner"), **r} for r in rows]
    date = datetime.date.today().isoformat()
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    every = [*map(json.loads, lines), *({"date": date, "seeds": seeds, **r} for r in rows)]
    last = {(r["table"], r["strategy"], r["trials"]): r for r in every}
    path.write_text("".join(json.dumps(r) + "\n" for r in last.values()), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("tables", nargs="*", type=Path)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--strategies", default=",".join(STRATEGIES), help="of Kernel Tuner, joined by commas")
    parser.add_argument("--out", type=Path, help="a file of rows to write into")
    parser.add_argument("--regrets", type=Path, help="a folder to keep searches in, seed by seed")
    parser.add_argument("--quick", action="store_true", help="three searches of 25 trials")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    trials, seeds = (25, 3) if given.quick else (given.trials, given.seeds)
    try:
        import kernel_tuner  # noqa: F401

        strategies = [s for s in given.strategies.split(",") if s]
    except ImportError:
        print("kernel_tuner is not installed: only random search stands beside", file=sys.stderr)
        strategies = []
    if not given.tables:
        print("name one table or more: cache files of Kernel Tuner", file=sys.stderr)
    if given.regrets is not None:
        given.regrets.mkdir(parents=True, exist_ok=True)
    rows = [row for path in given.tables for row in bench(path, trials, seeds, strategies, given.regrets)]
    if given.out is not None and rows:
        keep(given.out, rows, seeds)
    if given.json:
        print(json.dumps(rows, indent=1))
        return
    for row in rows:
        mark = "  better than castile" if row["significant"] else ""
        print(
            f"{row['table'][:30]:30} {row['strategy']:20} {row['trials']:4} "
            f"mean {row['mean']:8.2%}  median {row['median']:8.2%}{mark}"
        )


if __name__ == "__main__":
    main()
