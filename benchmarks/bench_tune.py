"""`castile tune` held against brute force, on workloads that the shipped table does not hold.

    python benchmarks/bench_tune.py prepare --seconds 200     # draw and compile mappings; beside other work
    python benchmarks/bench_tune.py tune --seconds 140        # alone on the machine; again, until nothing is left
    python benchmarks/bench_tune.py judge --seconds 110       # alone on the machine
    python benchmarks/bench_tune.py show

For each workload `castile tune --budget 60s` runs as a user runs it, in a process of its own with records and a build
cache of its own. Beside it stand mappings drawn from the whole space: the default, what differs from it in one choice,
and random ones. All of them are timed in turn; the fastest are held against the oracle, and then the winner, the
default and they meet in many interleaved rounds. A row of results tells by how much the winner is slower than the best
that was found by either.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

for _name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

import numpy as np  # noqa: E402

from castile.autotune.measure import Limits, Measurer  # noqa: E402
from castile.autotune.probe import describe_cpu, device_name  # noqa: E402
from castile.autotune.records import Records  # noqa: E402
from castile.autotune.space import space_of  # noqa: E402
from castile.benchmarks._rows import RESULTS, describe_versions  # noqa: E402
from castile.benchmarks._table import CASCADES, ROOT, State, Workload, cascade, draw  # noqa: E402
from castile.benchmarks._table_build import compile_all  # noqa: E402
from castile.ir.mapping import Mapping as Tuned  # noqa: E402

# None of these extents, and not all of these cascades, are in the table that the shipped cost model learned from.
WORKLOADS: tuple[tuple[str, dict[str, int]], ...] = (
    ("gemm", {"m": 384, "n": 640, "k": 896}),
    ("softmax", {"n": 2000, "k": 1500}),
    ("attention", {"b": 1, "h": 6, "q": 384, "k": 384, "d": 64, "f": 64}),
    ("layernorm", {"n": 768, "k": 3000}),
    ("log_softmax", {"n": 512, "k": 5000}),
    ("gemm_int4", {"m": 8, "n": 2048, "k": 1536}),
    ("softmax_backward", {"n": 640, "k": 2048}),
    ("gemm_nt", {"m": 96, "n": 1536, "k": 768}),
    ("rmsnorm_residual", {"n": 1000, "k": 2560}),
    ("gemm_swiglu", {"m": 256, "n": 512, "k": 512}),
)

# Mappings that are drawn, those that enter the last comparison beside winner and default, and its rounds.
DRAWN, LAST, ROUNDS = 120, 6, 60
BUDGET_S = 60

# Quartiles further apart than this share of the median tell of something else that ran.
UNEVEN = 0.5

# So does a winner that takes so many times what it took when it was tuned.
ELSEWISE = 1.5

# What holds: the winner within this of the best, and the whole within so many seconds.
NEAR, WITHIN_S = 1.05, 65.0


def prepare(state: State, seconds: float, drawn: int, count: int) -> None:
    """Draw and build the mappings that stand beside the tuner's."""
    known = {w.key for w in state.workloads()}
    device = describe_cpu()
    for place, (name, shapes) in enumerate(WORKLOADS[:count]):
        if Workload(name, shapes, ()).key in known:
            continue
        c = cascade(name)
        entries = draw(name, shapes, space_of(c, shapes, "cpu", device), drawn, {})
        told = [[e.mapping.to_dict(), e.source] for e in entries]
        state.append("plan", {"place": [0, place], "name": name, "shapes": shapes, "entries": told})
    compile_all(state, seconds)


def tune(state: State, seconds: float) -> None:
    """Run the tuner on the workloads that it has not seen, while there is time for a whole budget."""
    end = time.monotonic() + seconds
    done = {row["key"] for row in state.rows("tuned")}
    for name, shapes in WORKLOADS:
        key = Workload(name, shapes, ()).key
        if key in done or time.monotonic() + WITHIN_S > end:
            continue
        place = state.folder / "tuned" / f"{name}-{int(time.time())}"
        place.mkdir(parents=True)
        command = [sys.executable, "-m", "castile", "tune", str(CASCADES / f"{name}.cascade")]
        command += ["--budget", f"{BUDGET_S}s", "--json", "--records", str(place / "records.sqlite"), "--shape"]
        command += [f"{rank}={extent}" for rank, extent in shapes.items()]
        environment = {**os.environ, "CASTILE_CACHE_DIR": str(place / "cache")}
        environment.pop("OPENBLAS_NUM_THREADS")
        began = time.monotonic()
        found = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=120)
        took = time.monotonic() - began
        if found.returncode:
            print(f"{key}: {found.stderr[-300:]}")
            continue
        with Records(place / "records.sqlite", read_only=True) as records:
            every = records.all()
        winner = next(r for r in reversed(every) if r.kind == "final")
        good = sorted((r for r in every if r.kind == "trial" and r.time_s), key=lambda r: r.time_s or math.inf)
        row = {
            "key": key,
            "seconds": round(took, 2),
            "trials": sum(r.kind == "trial" for r in every),
            "failed": sum(r.status != "ok" for r in every),
            "winner": winner.mapping.to_dict(),
            "winner_s": winner.time_s,
            "best": [r.mapping.to_dict() for r in good[:LAST]],
        }
        state.append("tuned", row)
        print(f"{key}: {row['trials']} trials in {took:.1f} s, {winner.mapping}", flush=True)


def judge(state: State, seconds: float, out: Path) -> None:
    """Time winner, default and the fastest others in turn, where both sides are ready."""
    end = time.monotonic() + seconds
    tuned = {row["key"]: row for row in state.rows("tuned")}
    built = {row["source"]: not row["failed"] for row in state.rows("built")}
    done = {row["key"] for row in state.rows("judged")}
    for w in state.workloads():
        if w.key in done or w.key not in tuned or any(e.source not in built for e in w.entries):
            continue
        if time.monotonic() + 20 > end:
            return
        os.environ["CASTILE_CACHE_DIR"] = str(state.cache(w.name))
        good = [e.mapping for e in w.entries if built[e.source]]
        row = _judged(w, good, tuned[w.key], end - time.monotonic())
        if row is None:
            print(f"{w.key}: the worker died, or something else ran meanwhile; it is judged again")
            continue
        state.append("judged", row)
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        _tell(row)


def _judged(w: Workload, good: list[Tuned], tuned: dict[str, Any], seconds: float) -> dict[str, Any] | None:
    default, winner = w.entries[0].mapping, Tuned.from_json(tuned["winner"])
    theirs = [Tuned.from_json(m) for m in tuned["best"]]
    every = list(dict.fromkeys([*good, *theirs]))
    with Measurer(cascade(w.name), w.shapes, "cpu", 0, Limits(run_s=60.0), builders=2) as bench:
        if any(o.status != "ok" for o in bench.compile([default, winner, *theirs])):
            return None
        first = bench.compete(every, min(20.0, seconds / 2), 4)
        if first is None:
            return None
        order = (every[i] for i in sorted(range(len(every)), key=lambda i: min(first[i])))
        fastest = itertools.islice((m for m in order if m in (default, winner) or bench.check(m).status == "ok"), LAST)
        last = list(dict.fromkeys([default, winner, *fastest]))
        times = bench.compete(last, min(25.0, seconds / 2), ROUNDS)
    if times is None or max(_spread(t) for t in times) > UNEVEN:
        return None
    if median(times[last.index(winner)]) > ELSEWISE * tuned["winner_s"]:
        return None
    best = min(range(len(last)), key=lambda i: median(times[i]))
    beside, usual = (_ratio(times[last.index(winner)], times[i]) for i in (best, 0))
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "key": w.key,
        "device": device_name(),
        "castile": describe_versions().castile,
        "tune_seconds": tuned["seconds"],
        "trials": tuned["trials"],
        "failed": tuned["failed"],
        "drawn": len(good),
        "rounds": len(times[0]),
        "winner": str(winner),
        "best": str(last[best]),
        "winner_s": median(times[last.index(winner)]),
        "default_s": median(times[0]),
        "best_s": median(times[best]),
        "over_best": beside,
        "over_default": usual,
        "drawn_by_tuner_only": last[best] not in good,
    }


def _spread(times: Sequence[float]) -> float:
    """The distance of the quartiles over the median."""
    low, high = np.quantile(times, [0.25, 0.75])
    return float((high - low) / median(times))


def _ratio(times: Sequence[float], base: Sequence[float]) -> list[float]:
    """The median of the ratios, round by round, and its interval of 95%."""
    ratios = np.asarray(times) / np.asarray(base)
    drawn = np.median(np.random.default_rng(0).choice(ratios, (2000, len(ratios))), axis=1)
    return [round(float(x), 4) for x in (np.median(ratios), *np.quantile(drawn, [0.025, 0.975]))]


def _tell(row: dict[str, Any]) -> None:
    best, usual = ("{:.3f} ({:.3f} to {:.3f})".format(*row[n]) for n in ("over_best", "over_default"))
    print(
        f"{row['key'][:52]:52} {row['trials']:4} trials {row['tune_seconds']:5.1f} s  over best {best}  "
        f"over default {usual}",
        flush=True,
    )


def show(path: Path) -> None:
    """The latest row of each workload, and what holds of them."""
    rows = {row["key"]: row for row in map(json.loads, path.read_text(encoding="utf-8").splitlines())}
    for row in rows.values():
        _tell(row)
    near = sum(r["over_best"][0] <= NEAR for r in rows.values())
    slower = sum(r["over_default"][1] > 1.0 for r in rows.values())
    late = sum(r["tune_seconds"] > WITHIN_S for r in rows.values())
    print(f"{near} of {len(rows)} within 5% of the best, {slower} slower than the default, {late} over {WITHIN_S:g} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("step", nargs="?", default="show", choices=("prepare", "tune", "judge", "show"))
    parser.add_argument("--state", type=Path, default=ROOT / "build" / "tune")
    parser.add_argument("--seconds", type=float, default=110.0, help="how long a slice may take, about")
    parser.add_argument("--mappings", type=int, default=DRAWN)
    parser.add_argument("--workloads", type=int, default=len(WORKLOADS), help="only the first so many")
    parser.add_argument("--out", type=Path, default=RESULTS / "tune.jsonl")
    parser.add_argument("--quick", action="store_true", help="for `make bench`, which only shows what is known")
    given = parser.parse_args()
    state = State(given.state)
    if given.step == "prepare":
        prepare(state, given.seconds, given.mappings, given.workloads)
    elif given.step == "tune":
        tune(state, given.seconds)
    elif given.step == "judge":
        judge(state, given.seconds, given.out)
    elif given.out.is_file():
        show(given.out)


if __name__ == "__main__":
    main()
