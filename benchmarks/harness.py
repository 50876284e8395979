"""The measuring harness: two or more ways to compute the same thing, timed side by side, or not believed.

    Case(
        name="softmax 4096x4096",
        inputs=lambda rng: rng.standard_normal((4096, 4096), dtype=np.float32),
        candidates=(Candidate("numpy", build_numpy, allocates=True), Candidate("castile", build, allocates=True)),
        baseline="numpy",
        check=agrees_with_oracle,  # (inputs, outputs) -> None, raises where wrong
        flops=5.0 * 4096**2,
        bytes=8.0 * 4096**2,
    )

`compare` turns such a case into rows, `main` of `_command.py` makes a command line of it, and `docs/measuring.md` says
why each guard exists.
"""

from __future__ import annotations

import dataclasses
import datetime
import gc
import math
import os
import random
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, Protocol, TypeVar

import numpy as np

from castile.benchmarks._machine import Device, Machine, own_threads_running, retained_allocator
from castile.benchmarks._outputs import allocates, spoil
from castile.benchmarks._rows import Row, Versions, command_words, describe_versions
from castile.benchmarks._stats import Interval, median_interval, quantile, ratio_interval

AA_LIMIT = 0.05
PEAK_LIMIT = 0.04
OTHERS_LIMIT_CORES = 0.05
MIN_ROUNDS, MAX_ROUNDS, MAX_SETS, MAX_CALLS = 11, 201, 4096, 1 << 18
SETS, SETS_BYTES, GAP_LINES = 16, 1 << 30, 1024
SETTLE_STEP_S, SETTLE_LIMIT_S, WARM_S = 0.001, 0.25, 0.002

Inputs = TypeVar("Inputs")
Call = Callable[[], object]


class WrongOutput(Exception):
    """A candidate computes something else than the reference, or misdeclares itself; the case is not measured."""


@dataclass(frozen=True, slots=True)
class Candidate(Generic[Inputs]):
    """One way to compute a case. `build(inputs)` prepares (compiles, packs) and gives the call to be timed.

    `allocates` says whether each call returns new memory (True) or writes where the last one did (False). Outputs must
    not alias inputs. `check` takes the place of the case's for one that computes something else, to be raced against.
    """

    name: str
    build: Callable[[Inputs], Call]
    allocates: bool
    check: Callable[[Inputs, object], None] | None = None


@dataclass(frozen=True, slots=True)
class Case(Generic[Inputs]):
    """One thing to compute, and who computes it.

    `flops` and `bytes` are what one call needs at least; rates are counted from them for every candidate alike.
    With `cache="out"` every call meets inputs that have left the last-level cache, with "in" those of the call before.
    `footprint_bytes` is what one set of inputs and outputs occupies, where that is not `bytes`.
    """

    name: str
    inputs: Callable[[np.random.Generator], Inputs]
    candidates: tuple[Candidate[Inputs], ...]
    baseline: str
    check: Callable[[Inputs, object], None]
    flops: float
    bytes: float
    cache: Literal["out", "in"] = "out"
    footprint_bytes: float | None = None

    def __post_init__(self) -> None:
        names = [candidate.name for candidate in self.candidates]
        if len(set(names)) != len(names):
            raise ValueError(f"{self.name}: two candidates share a name: {', '.join(names)}")
        if self.baseline not in names:
            raise ValueError(f"{self.name}: baseline {self.baseline!r} is none of {', '.join(names)}")
        if len({candidate.allocates for candidate in self.candidates}) > 1:
            sides = ", ".join(f"{c.name} {'allocates' if c.allocates else 'does not'}" for c in self.candidates)
            raise ValueError(f"{self.name}: allocation belongs on both sides or on none: {sides}")


class Timer(Protocol):
    """How a sample is taken. A GPU's would flush its L2 in `settle` and time with events."""

    def now(self) -> float:
        """Seconds since some fixed moment."""

    def settle(self) -> None:
        """Bring the machine to rest before a sample."""

    def time(self, calls: Sequence[Call]) -> float:
        """Seconds that all `calls`, one after the other, take."""


@dataclass(frozen=True, slots=True)
class WallTimer:
    """Wall-clock samples. `sync` is called before each reading of the clock, for devices that work asynchronously."""

    now: Callable[[], float] = time.perf_counter
    sync: Callable[[], object] | None = None
    sleep: Callable[[float], None] = time.sleep
    running: Callable[[], bool] = own_threads_running

    def settle(self) -> None:
        """Wait until no other thread of this process runs, 0.25 s at most.

        The threads of a pool go on spinning after the candidate that used them is done (OpenMP's for some 9 ms,
        OpenBLAS's for up to 100) and would take a core from the next one.
        """
        until = self.now() + SETTLE_LIMIT_S
        self.sleep(SETTLE_STEP_S)
        while self.running() and self.now() < until:
            self.sleep(SETTLE_STEP_S)

    def time(self, calls: Sequence[Call]) -> float:
        """Seconds that all `calls` take."""
        if self.sync:
            self.sync()
        start = self.now()
        for call in calls:
            call()
        if self.sync:
            self.sync()
        return self.now() - start


@dataclass(frozen=True, slots=True)
class Settings:
    """How a case is measured: for about `seconds`, in samples of at least `sample_s`, in an order drawn from `seed`."""

    seconds: float = 4.0
    sample_s: float = 0.005
    seed: int = 0


def judge(
    aa: Interval,
    peaks_gflops: tuple[float, float],
    best_gflops: float,
    others_cores: float | None,
    rounds_kept: int,
    rounds_dropped: int,
) -> str | None:
    """Why a measurement must not be believed, or None: the ways in which a machine gives itself away."""
    reasons = []
    if abs(aa.median - 1) > AA_LIMIT:
        reasons.append(f"A/A: the baseline differs from itself by {abs(aa.median - 1):.1%} (limit {AA_LIMIT:.0%})")
    low = min(peaks_gflops)
    if low < (1 - PEAK_LIMIT) * best_gflops:
        short = 1 - low / best_gflops
        reasons.append(
            f"peak: {low:.0f} GFLOP/s is {short:.1%} below this machine's {best_gflops:.0f} (limit {PEAK_LIMIT:.0%})"
        )
    if others_cores is not None and others_cores > OTHERS_LIMIT_CORES:
        reasons.append(f"busy: other processes held {others_cores:.2f} cores (limit {OTHERS_LIMIT_CORES})")
    if rounds_dropped > rounds_kept:
        rounds = rounds_dropped + rounds_kept
        reasons.append(f"unsteady: the machine was slow around {rounds_dropped} of {rounds} rounds (limit half)")
    return "; ".join(reasons) or None


class _Slots(Generic[Inputs]):
    """A case's candidates, built for every set of inputs, with one cursor that every call of any of them moves on.

    Candidates are built in random order with a gap of random size before each. Memory handed out in sequence would
    give each candidate an output at a fixed distance from its inputs, and that distance alone can cost 5%.
    """

    def __init__(self, case: Case[Inputs], sets: int, seed: int) -> None:
        self.case = case
        self.inputs: list[Inputs] = []
        self.calls: dict[str, list[Call]] = {candidate.name: [] for candidate in case.candidates}
        self.gaps: list[object] = []
        self.cursor = 0
        order = random.Random(seed)
        for index in range(sets):
            inputs = case.inputs(np.random.default_rng([seed, index]))
            self.inputs.append(inputs)
            for candidate in order.sample(case.candidates, len(case.candidates)):
                self.gaps.append(np.empty(64 * order.randrange(1, GAP_LINES), np.uint8))
                self.calls[candidate.name].append(candidate.build(inputs))

    def take(self, name: str, count: int, order: random.Random) -> list[Call]:
        """The next `count` calls of a candidate.

        Out of cache each is on the inputs touched longest ago, whoever touched them (at times one set is skipped, lest
        a candidate meet the same ones in every round); in cache all are on one set, drawn anew for each sample.
        """
        calls = self.calls[name]
        if self.case.cache == "in":
            return [order.choice(calls)] * count
        start = self.cursor + order.getrandbits(1)
        self.cursor = (start + count) % len(calls)
        return [calls[(start + i) % len(calls)] for i in range(count)]

    def check(self, when: str) -> None:
        """Check each candidate on the first and the last inputs, on memory spoilt before where it reuses its own."""
        for candidate in self.case.candidates:
            for index in sorted({0, len(self.inputs) - 1}):
                call = self.calls[candidate.name][index]
                if not candidate.allocates:
                    spoil(call())
                try:
                    (candidate.check or self.case.check)(self.inputs[index], call())
                except Exception as error:
                    raise WrongOutput(f"{self.case.name}: {candidate.name}: {when}: {error}") from error
            found = allocates(self.calls[candidate.name][0])
            if found is not None and found != candidate.allocates:
                does = "returns new memory at each call" if found else "returns the same memory at each call"
                declares = f"declares allocates={candidate.allocates}"
                raise WrongOutput(f"{self.case.name}: {candidate.name} {does}, but {declares}")


def check(case: Case[Any], seed: int = 0) -> None:
    """Check every candidate's outputs on one set of inputs and time nothing. Raises `WrongOutput`."""
    _Slots(case, 1, seed).check("without timing")


def _sets(case: Case[Any], device: Device) -> int:
    """How many sets of inputs a case is measured on.

    The pages on which arrays happen to lie make the same code up to 5% faster or slower for as long as they live, so
    there are 16 sets, or as many as 1 GiB holds. Out of cache there are enough that each has left the cache when its
    turn comes again.
    """
    footprint = max(1.0, case.bytes if case.footprint_bytes is None else case.footprint_bytes)
    needed = 1 if case.cache == "in" else math.ceil(2 * device.last_level_bytes / footprint) + 1
    if needed > MAX_SETS:
        raise ValueError(f'{case.name}: {footprint:.0f} bytes are too few to measure out of cache; say cache="in"')
    if device.memory_bytes and needed * footprint > device.memory_bytes / 2:
        raise ValueError(f"{case.name}: {needed} sets of {footprint:.0f} bytes exceed half of the memory")
    return max(needed, min(SETS, int(SETS_BYTES / footprint)))


def _calibrate(slots: _Slots[Any], timer: Timer, sample_s: float) -> Mapping[str, tuple[int, float]]:
    """For each candidate, how many calls make a sample of at least `sample_s` seconds, and the seconds of one call."""
    found, order = {}, random.Random(0)
    for name in slots.calls:
        count = 1
        timer.time(slots.take(name, count, order))
        while True:
            # the shorter of two, for one may be long by a hiccup alone
            elapsed_s = min(timer.time(slots.take(name, count, order)) for _ in range(2))
            if elapsed_s >= sample_s / 2 or count >= MAX_CALLS:
                break
            count *= 2
        call_s = max(elapsed_s / count, sample_s / MAX_CALLS)
        found[name] = max(1, math.ceil(sample_s / call_s)), call_s
    return found


def _sample(
    slots: _Slots[Any], calibrated: Mapping[str, tuple[int, float]], machine: Machine, timer: Timer, settings: Settings
) -> tuple[list[list[float]], int, int]:
    """Seconds per call, by slot and round, and how many rounds were kept and dropped.

    Slots 0 and 1 are both the baseline; each round runs every slot once. A round is dropped if the machine is slow just
    before or just after it, whatever its own times. If too few remain, all are returned, for a row that is void.
    """
    baseline = slots.case.baseline
    names = [baseline, baseline, *(name for name in slots.calls if name != baseline)]
    warm = {name: min(math.ceil(WARM_S / call_s), count) for name, (count, call_s) in calibrated.items()}
    order = random.Random(settings.seed)
    kept: list[list[float]] = []
    dropped: list[list[float]] = []
    until = timer.now() + settings.seconds
    timer.settle()
    steady = machine.steady()
    while len(kept) < MAX_ROUNDS:
        if timer.now() >= until and (len(kept) >= MIN_ROUNDS or len(dropped) >= 3 * MIN_ROUNDS):
            break
        times = [0.0] * len(names)
        for slot in order.sample(range(len(names)), len(names)):
            name = names[slot]
            count, _ = calibrated[name]
            calls = slots.take(name, warm[name] + count, order)
            timer.settle()
            timer.time(calls[: warm[name]])
            times[slot] = timer.time(calls[warm[name] :]) / count
        timer.settle()
        before, steady = steady, machine.steady()
        (kept if before and steady else dropped).append(times)
    rounds = kept if len(kept) >= MIN_ROUNDS else kept + dropped
    return [list(times) for times in zip(*rounds, strict=True)], len(kept), len(dropped)


def compare(
    case: Case[Inputs],
    machine: Machine,
    settings: Settings = Settings(),
    timer: Timer = WallTimer(),
    versions: Versions | None = None,
) -> tuple[Row, ...]:
    """Measure a case: one row for each candidate, the baseline first. Raises `WrongOutput` if a check fails."""
    slots = _Slots(case, _sets(case, machine.device), settings.seed)
    slots.check("before timing")
    calibrated = _calibrate(slots, timer, settings.sample_s)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        timer.settle()
        before = machine.cpu_times()
        peak_before = machine.peak_gflops()
        samples, kept, dropped = _sample(slots, calibrated, machine, timer, settings)
        timer.settle()
        peak_after = machine.peak_gflops()
        after = machine.cpu_times()
    finally:
        if collecting:
            gc.enable()
    slots.check("after timing")

    others_cores = after.others_since(before) if before and after else None
    aa = ratio_interval(samples[0], samples[1])
    void = judge(aa, (peak_before, peak_after), machine.best_gflops, others_cores, kept, dropped)
    versions = versions or describe_versions()

    def row(name: str, times: list[float], ratio: Interval) -> Row:
        seconds = median_interval(times)
        return Row(
            id=uuid.uuid4().hex,
            name=case.name,
            candidate=name,
            baseline=case.baseline,
            seconds=seconds,
            quartiles_s=(quantile(times, 0.25), quantile(times, 0.75)),
            ratio=ratio,
            aa_ratio=aa,
            gflops=case.flops / seconds.median / 1e9,
            gbytes_s=case.bytes / seconds.median / 1e9,
            void=void,
            samples_s=tuple(float(f"{t:.6g}") for t in times),
            rounds_kept=kept,
            rounds_dropped=dropped,
            calls_per_sample=calibrated[name][0],
            cache=case.cache,
            input_sets=len(slots.inputs),
            allocates=case.candidates[0].allocates,
            allocator="retained" if retained_allocator() else "default",
            threads=machine.threads,
            peak_before_gflops=peak_before,
            peak_after_gflops=peak_after,
            peak_best_gflops=machine.best_gflops,
            probe=machine.probe_name,
            others_cores=others_cores,
            load_average=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
            seed=settings.seed,
            device=machine.device,
            versions=versions,
            date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            command=command_words(),
        )

    others = [name for name in slots.calls if name != case.baseline]
    measured = zip(others, samples[2:], strict=True)
    return (
        row(case.baseline, samples[0], aa),
        *(row(name, times, ratio_interval(samples[0], times)) for name, times in measured),
    )


def rejudge(rows: Iterable[Row], best_gflops: float) -> Iterator[Row]:
    """Those rows that a peak seen later shows to be void: the machine was busy while they were taken."""
    for row in rows:
        peaks = row.peak_before_gflops, row.peak_after_gflops
        void = judge(row.aa_ratio, peaks, best_gflops, row.others_cores, row.rounds_kept, row.rounds_dropped)
        if void and not row.void:
            yield dataclasses.replace(row, void=void, peak_best_gflops=best_gflops)
