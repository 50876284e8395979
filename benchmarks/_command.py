"""The command line that all benchmarks share.

A benchmark is a file that describes its cases, small ones for `--quick`, and ends in:

    if __name__ == "__main__":
        raise SystemExit(main("softmax", cases))
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from castile.benchmarks._machine import ALLOCATOR, this_machine, usable_cpus
from castile.benchmarks._rows import RESULTS, Row, append_row, describe_versions, known_peak_gflops, table
from castile.benchmarks.harness import Case, Settings, WrongOutput, check, compare, rejudge

THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
RESTARTED = "CASTILE_BENCH_RESTARTED"


def ensure_environment(threads: int, allocator: str = "retained") -> None:
    """Restart this process once, with what must be set before it begins: thread counts and the allocator's limits.

    "retained" lets glibc's malloc keep freed memory in place of giving it back, so that no candidate pays the page
    faults of fresh memory at each call; "default" leaves the allocator as users have it.
    """
    wanted = dict.fromkeys(THREAD_VARIABLES, str(threads)) | (ALLOCATOR if allocator == "retained" else {})
    unwanted = [] if allocator == "retained" else [name for name in ALLOCATOR if name in os.environ]
    if not unwanted and all(os.environ.get(name) == value for name, value in wanted.items()):
        return
    if os.environ.get(RESTARTED):
        raise RuntimeError("the environment is still not as wanted after a restart: " + ", ".join(wanted))
    kept = {name: value for name, value in os.environ.items() if name not in unwanted}
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**kept, **wanted, RESTARTED: "1"})


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line of a benchmark asks for."""

    quick: bool
    only: str
    out: Path
    repeat: int
    json: bool
    threads: int
    seconds: float
    seed: int
    allocator: Literal["retained", "default"]
    recalibrate: bool


def parse_options(name: str, argv: Sequence[str] | None = None) -> Options:
    """Options of the benchmark `name` from `argv`, or from the command line."""
    parser = argparse.ArgumentParser(prog=name, description=f"Benchmark {name}; docs/measuring.md says how to read it.")
    parser.add_argument("--quick", action="store_true", help="small sizes, outputs checked, nothing timed")
    parser.add_argument("--only", default="*", metavar="GLOB", help="only cases whose name matches")
    parser.add_argument("--out", type=Path, default=RESULTS / f"{name}.jsonl", metavar="FILE", help="append rows here")
    parser.add_argument("--repeat", type=int, default=1, metavar="N", help="measure every case N times")
    parser.add_argument("--json", action="store_true", help="rows as one JSON document on stdout")
    parser.add_argument("--threads", type=int, default=len(usable_cpus()), metavar="N")
    parser.add_argument("--seconds", type=float, default=Settings().seconds, help="time spent on each case, about")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs and of the order of runs")
    parser.add_argument("--allocator", choices=("retained", "default"), default="retained")
    parser.add_argument("--recalibrate", action="store_true", help="forget the peaks that earlier rows hold")
    return Options(**vars(parser.parse_args(argv)))


def main(name: str, cases: Callable[[Options], Iterable[Case[Any]]], argv: Sequence[str] | None = None) -> int:
    """Run a benchmark from the command line: 0 if every row may be believed, 1 for a wrong output, 3 for a void row."""
    options = parse_options(name, argv)
    if argv is None and not options.quick:
        ensure_environment(options.threads, options.allocator)
    chosen = (case for case in cases(options) if fnmatch.fnmatch(case.name, options.only))
    return _quick(chosen, options) if options.quick else _measure(chosen, options)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _quick(cases: Iterable[Case[Any]], options: Options) -> int:
    """Check every case and time none."""
    verdicts: dict[str, str | None] = {}
    for case in cases:
        try:
            check(case, options.seed)
            verdicts[case.name] = None
        except WrongOutput as error:
            verdicts[case.name] = str(error)
        _say(f"{'WRONG' if verdicts[case.name] else 'ok':5}  {verdicts[case.name] or case.name}")
    if options.json:
        print(json.dumps([{"name": name, "wrong": wrong} for name, wrong in verdicts.items()]))
    return 1 if any(verdicts.values()) else 0


def _measure(cases: Iterable[Case[Any]], options: Options) -> int:
    """Measure every case; rows are on disk as soon as they are known."""
    settings, versions = Settings(seconds=options.seconds, seed=options.seed), describe_versions()
    rows: dict[str, Row] = {}
    wrong = False
    with this_machine(options.threads) as machine:
        if not options.recalibrate:
            known = known_peak_gflops(RESULTS, machine.device, machine.threads, machine.probe_name)
            machine.best_gflops = max(machine.best_gflops, known)
        for case in cases:
            for _ in range(options.repeat):
                _say(f"measuring {case.name}")
                try:
                    measured = compare(case, machine, settings, versions=versions)
                except WrongOutput as error:
                    _say(f"WRONG {error}")
                    wrong = True
                    break
                for row in measured:
                    rows[row.id] = row
                    append_row(row, options.out)
        for row in list(rejudge(rows.values(), machine.best_gflops)):
            rows[row.id] = row
            append_row(row, options.out)
    found = tuple(rows.values())
    print(json.dumps([dataclasses.asdict(row) for row in found]) if options.json else table(found))
    return 1 if wrong else 3 if any(row.void for row in found) else 0
