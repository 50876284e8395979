"""Does the harness tell the truth on this machine? Run it when nothing else runs: about half a minute.

Three things are planted and must be found, on work bound by arithmetic and on work bound by memory: nothing (the same
code twice must come out equal), a slowdown of 10%, and another process that holds a core.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from castile.benchmarks._command import ensure_environment
from castile.benchmarks._machine import Machine, this_machine, usable_cpus
from castile.benchmarks._rows import aligned, describe_versions
from castile.benchmarks.harness import Candidate, Case, Settings, compare

Array = NDArray[np.float32]
SPIN = "while True: pass"


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


def findings(machine: Machine, settings: Settings) -> Iterator[Finding]:
    """Every check in turn."""
    versions = describe_versions()
    for planted, units in (("nothing planted", 10), ("10% more work", 11), ("a busy process", 10)):
        for case in cases(planted, units):
            with planted_process() if planted == "a busy process" else contextlib.nullcontext():
                row = compare(case, machine, settings, versions=versions)[1]
            slowdown = row.ratio.reciprocal()
            if planted == "nothing planted":
                passed = row.void is None and abs(slowdown.median - 1) < 0.02
            elif planted == "10% more work":
                passed = row.void is None and slowdown.low > 1 and 1.08 < slowdown.median < 1.12
            else:
                passed = row.void is not None
            found = f"slowdown {slowdown.median:.3f} ({slowdown.low:.3f}-{slowdown.high:.3f})"
            low = min(row.peak_before_gflops, row.peak_after_gflops)
            peak = f"peak {low:.0f} of {row.peak_best_gflops:.0f} GFLOP/s"
            others = "" if row.others_cores is None else f"others {row.others_cores:.2f} cores"
            numbers = (found, f"A/A {row.aa_ratio.median:.3f}", peak, others, f"void: {row.void}" if row.void else "")
            yield Finding(row.name, passed, ", ".join(filter(None, numbers)))


def main() -> int:
    """Print a line for each check; 0 if all pass."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=len(usable_cpus()), metavar="N")
    parser.add_argument("--seconds", type=float, default=Settings().seconds, help="time spent on each check, about")
    options = parser.parse_args()
    ensure_environment(options.threads)
    with this_machine(options.threads) as machine:
        peak = f"peak {machine.peak_gflops():.0f} GFLOP/s ({machine.probe_name}), scaling {machine.scaling():.2f}"
        print(f"{machine.device.cpu}: {machine.threads} threads, load average {os.getloadavg()[0]:.2f}, {peak}")
        sys.stdout.flush()
        found = list(findings(machine, Settings(seconds=options.seconds)))
    print(aligned([("PASS" if f.passed else "FAIL", f.check, f.numbers) for f in found], left=(0, 1, 2)))
    return 0 if all(f.passed for f in found) else 1


if __name__ == "__main__":
    raise SystemExit(main())
