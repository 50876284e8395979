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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from castile.benchmarks._machine import ALLOCATOR, Machine, this_machine, usable_cpus
from castile.benchmarks._rows import RESULTS, Row, Versions, append_row, describe_versions, known_peak_gflops, table
from castile.benchmarks.harness import Case, Settings, Timer, WallTimer, WrongOutput, check, compare, rejudge

THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
# NumPy asks for huge pages and torch does not: whoever made an array must not decide how fast it is read. OpenBLAS's
# threads spin for 100 ms after their work unless told 2**22 cycles (2 ms), and each sample would wait for that.
ALIKE = {"NUMPY_MADVISE_HUGEPAGE": "0", "OPENBLAS_THREAD_TIMEOUT": "22"}
RESTARTED = "CASTILE_BENCH_RESTARTED"


def ensure_environment(threads: int, allocator: str = "retained") -> None:
    """Restart this process once, with what must be set before it begins: thread counts and the allocator's limits.

    "retained" lets glibc's malloc keep freed memory in place of giving it back, so that no candidate pays the page
    faults of fresh memory at each call; "default" leaves the allocator as users have it.
    """
    wanted = dict.fromkeys(THREAD_VARIABLES, str(threads)) | ALIKE | (ALLOCATOR if allocator == "retained" else {})
    unwanted = [] if allocator == "retained" else [name for name in ALLOCATOR if name in os.environ]
    restarted = os.environ.pop(RESTARTED, None)  # not for child processes
    if not unwanted and all(os.environ.get(name) == value for name, value in wanted.items()):
        return
    if restarted:
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
    attempts: int
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
    parser.add_argument(
        "--only", default="*", metavar="GLOB", help="only cases that match: word, glob, or several joined by |"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / f"{name}.jsonl", metavar="FILE", help="append rows here")
    parser.add_argument("--repeat", type=int, default=1, metavar="N", help="measure every case N times")
    parser.add_argument("--attempts", type=int, default=3, metavar="N", help="tries at a case that comes out void")
    parser.add_argument("--json", action="store_true", help="rows as one JSON document on stdout")
    parser.add_argument("--threads", type=int, default=len(usable_cpus()), metavar="N")
    parser.add_argument("--seconds", type=float, default=Settings().seconds, help="time spent on each case, about")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs and of the order of runs")
    parser.add_argument("--allocator", choices=("retained", "default"), default="retained")
    parser.add_argument("--recalibrate", action="store_true", help="forget the peaks that earlier rows hold")
    return Options(**vars(parser.parse_args(argv)))


def main(
    name: str,
    cases: Callable[[Options], Iterable[Case[Any]]],
    argv: Sequence[str] | None = None,
    timer: Timer | None = None,
    restart: bool = False,
) -> int:
    """Run a benchmark from the command line: 0 if each case has a row to believe, 1 for a wrong output, 3 for void.

    With ``argv`` of its own the process is not started anew with the harness's environment, unless ``restart``.
    """
    options = parse_options(name, argv)
    if (argv is None or restart) and not options.quick:
        ensure_environment(options.threads, options.allocator)
    chosen = (case for case in cases(options) if wanted(case.name, options.only))
    return run_quick(chosen, options) if options.quick else run_measured(chosen, options, timer)


def wanted(name: str, only: str) -> bool:
    """Whether a case is meant by one of several globs, joined by ``|``; a word means the cases that begin with it."""
    return any(fnmatch.fnmatch(name, p) or name.split()[:1] == [p] for p in only.split("|"))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run_quick(cases: Iterable[Case[Any]], options: Options) -> int:
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


def measure(
    case: Case[Any],
    machine: Machine,
    settings: Settings,
    versions: Versions,
    attempts: int,
    out: Path,
    timer: Timer | None = None,
) -> Iterator[tuple[Row, ...]]:
    """The rows of each attempt at a case until one is not void, every one of them on disk as soon as it is known."""
    for _ in range(attempts):
        _say(f"measuring {case.name}")
        rows = compare(case, machine, settings, timer or WallTimer(), versions)
        for row in rows:
            append_row(row, out)
        yield rows
        if not rows[0].void:
            return
        _say(f"void     {rows[0].void}")


def run_measured(cases: Iterable[Case[Any]], options: Options, timer: Timer | None) -> int:
    """Measure every case."""
    settings, versions = Settings(seconds=options.seconds, seed=options.seed), describe_versions()
    rows: dict[str, Row] = {}
    wrong = False
    with this_machine(options.threads) as machine:
        if not options.recalibrate:
            known = known_peak_gflops(RESULTS, machine.device, machine.threads, machine.probe_name)
            machine.best_gflops = max(machine.best_gflops, known)
        for case in cases:
            try:
                for _ in range(options.repeat):
                    tries = measure(case, machine, settings, versions, options.attempts, options.out, timer)
                    rows |= {row.id: row for measured in tries for row in measured}
            except WrongOutput as error:
                _say(f"WRONG    {error}")
                wrong = True
        for row in list(rejudge(rows.values(), machine.best_gflops)):
            rows[row.id] = row
            append_row(row, options.out)
    print(json.dumps([dataclasses.asdict(row) for row in rows.values()]) if options.json else table([*rows.values()]))
    last = {row.name: row.void for row in rows.values()}
    return 1 if wrong else 3 if any(last.values()) else 0
