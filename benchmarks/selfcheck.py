"""Does the harness tell the truth on this machine? Run it when nothing else runs: it takes about a minute.

Three things are planted and must be found, on work bound by arithmetic and on work bound by memory: nothing (the same
code twice must come out equal), a slowdown of 10%, and another process that holds a core.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from castile.benchmarks._command import Options, ensure_environment, measure, parse_options, run_quick
from castile.benchmarks._machine import ThisMachine, this_machine
from castile.benchmarks._rows import Row, aligned, describe_versions
from castile.benchmarks.harness import AA_LIMIT, Candidate, Case, Settings

Array = NDArray[np.float32]
SPIN = "while True: pass"
NOTHING, SLOWER, BUSY = "nothing planted", "10% more work", "a busy process"
PLANTED = ((NOTHING, 10), (SLOWER, 11), (BUSY, 10))


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found, in words, and whether it is what was planted."""

    check: str
    passed: bool
    numbers: str


@contextlib.contextmanager
def planted_process(count: int = 1) -> Iterator[None]:
    """`count` child processes that each hold a core."""
    children = [subprocess.Popen((sys.executable, "-c", SPIN)) for _ in range(count)]
    try:
        time.sleep(0.5)
        yield
    finally:
        for child in children:
            child.kill()
            child.wait()


def arithmetic(units: int) -> Callable[[Array], Callable[[], Array]]:
    """`units` products of two 256 x 256 matrices, in cache."""

    def build(matrix: Array) -> Callable[[], Array]:
        out = np.empty_like(matrix)

        def call() -> Array:
            for _ in range(units):
                np.matmul(matrix, matrix, out=out)
            return out

        return call

    return build


def memory(units: int) -> Callable[[Array], Callable[[], Array]]:
    """`units` copies of a tenth of an array each; those past the tenth begin again."""

    def build(array: Array) -> Callable[[], Array]:
        out = np.empty_like(array)
        pieces = [(out[i % 10 :: 10], array[i % 10 :: 10]) for i in range(units)]

        def call() -> Array:
            for into, piece in pieces:
                np.copyto(into, piece)
            return out

        return call

    return build


def cases(planted: str, units: int) -> Iterator[Case[Array]]:
    """For each kind of work, a baseline of 10 units and a candidate of `units`."""

    def multiplied(matrix: Array, out: object) -> None:
        np.testing.assert_allclose(np.asarray(out), matrix @ matrix, rtol=1e-3, atol=1e-3)

    def copied(array: Array, out: object) -> None:
        np.testing.assert_array_equal(np.asarray(out), array)

    yield Case(
        name=f"arithmetic, {planted}",
        inputs=lambda rng: rng.standard_normal((256, 256), dtype=np.float32),
        candidates=tuple(Candidate(n, arithmetic(u), False) for n, u in (("baseline", 10), ("candidate", units))),
        baseline="baseline",
        check=multiplied,
        flops=10 * 2.0 * 256**3,
        bytes=8.0 * 256**2,
        cache="in",
    )
    yield Case(
        name=f"memory, {planted}",
        inputs=lambda rng: rng.standard_normal((10, 1 << 19), dtype=np.float32),
        candidates=tuple(Candidate(n, memory(u), False) for n, u in (("baseline", 10), ("candidate", units))),
        baseline="baseline",
        check=copied,
        flops=0.0,
        bytes=8.0 * 10 * (1 << 19),
    )


def finding(planted: str, row: Row) -> Finding:
    """Judge the row of a candidate beside which `planted` was put."""
    slowdown = row.ratio.reciprocal()
    if planted == BUSY:
        passed = row.void is not None
    elif planted == SLOWER:
        passed = row.void is None and 1 < slowdown.low < 1.12 and slowdown.high > 1.08
    else:
        passed = row.void is None and abs(slowdown.median - 1) < AA_LIMIT
    low = min(row.peak_before_gflops, row.peak_after_gflops)
    numbers = (
        f"slowdown {slowdown.median:.3f} ({slowdown.low:.3f}-{slowdown.high:.3f})",
        f"A/A {row.aa_ratio.median:.3f}",
        f"peak {low:.0f} of {row.peak_best_gflops:.0f} GFLOP/s",
        f"rounds {row.rounds_kept} kept, {row.rounds_dropped} dropped",
        "" if row.others_cores is None else f"others {row.others_cores:.2f} cores",
        f"void: {row.void}" if row.void else "",
    )
    return Finding(row.name, passed, ", ".join(filter(None, numbers)))


def findings(machine: ThisMachine, options: Options) -> Iterator[Finding]:
    """Every check in turn. One that fails because the machine was busy of itself is tried again."""
    settings, versions = Settings(seconds=options.seconds, seed=options.seed), describe_versions()
    for planted, units in PLANTED:
        for case in cases(planted, units):
            with planted_process() if planted == BUSY else contextlib.nullcontext():
                attempts = 1 if planted == BUSY else options.attempts
                *_, (_, row) = measure(case, machine, settings, versions, attempts, options.out)
            yield finding(planted, row)


def main() -> int:
    """Print a line for each check; 0 if all pass."""
    options = parse_options("selfcheck")
    if options.quick:
        return run_quick((case for planted, units in PLANTED for case in cases(planted, units)), options)
    ensure_environment(options.threads)
    with this_machine(options.threads) as machine:
        peak = f"peak {machine.peak_gflops():.0f} GFLOP/s ({machine.probe_name}), scaling {machine.scaling():.2f}"
        print(f"{machine.device.cpu}: {machine.threads} threads, load average {os.getloadavg()[0]:.2f}, {peak}")
        sys.stdout.flush()
        found = list(findings(machine, options))
    print(aligned([("PASS" if f.passed else "FAIL", f.check, f.numbers) for f in found], left=(0, 1, 2)))
    return 0 if all(f.passed for f in found) else 1


if __name__ == "__main__":
    raise SystemExit(main())
