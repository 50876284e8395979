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

from castile.benchmarks._machine import Device, Machine, retained_allocator
from castile.benchmarks._outputs import allocates, spoil
from castile.benchmarks._rows import Row, Versions, command_words, describe_versions
from castile.benchmarks._stats import Interval, median_interval, quantile, ratio_interval

AA_LIMIT = 0.05
PEAK_LIMIT = 0.04
OTHERS_LIMIT_CORES = 0.05
MIN_ROUNDS, MAX_ROUNDS, MAX_SETS, MAX_CALLS = 11, 201, 4096, 1 << 18
WARM_BELOW_S = 0.05
SETTLE_STEP_S, SETTLE_LIMIT_S = 0.001, 0.25

Inputs = TypeVar("Inputs")
Call = Callable[[], object]


class WrongOutput(Exception):
    """A candidate computes something else than the reference, or misdeclares itself; the case is not measured."""


@dataclass(frozen=True, slots=True)
class Candidate(Generic[Inputs]):
    """One way to compute a case. `build(inputs)` prepares (compiles, packs) and gives the call to be timed.

    `allocates` says whether each call returns new memory (True) or writes where the last one did (False). Outputs must
    not alias inputs.
    """

    name: str
    build: Callable[[Inputs], Call]
    allocates: bool


@dataclass(frozen=True, slots=True)
class Case(Generic[Inputs]):
    """One thing to compute, and who computes it.

    `flops` and `bytes` are what one call needs at least; rates are counted from them for every candidate alike.
    `cache="out"` rotates through as many inputs as fill the last-level cache twice, `cache="in"` calls on one.
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
    own_cpu: Callable[[], float] = time.process_time

    def settle(self) -> None:
        """Wait until this process is quiet, 0.25 s at most.

        The threads of a pool go on spinning after the candidate that used them is done (OpenMP's for some 9 ms,
        OpenBLAS's for 70) and would take a core from the next one.
        """
        until = self.now() + SETTLE_LIMIT_S
        while self.now() < until:
            wall_s, cpu_s = self.now(), self.own_cpu()
            self.sleep(SETTLE_STEP_S)
            if self.own_cpu() - cpu_s < 0.25 * (self.now() - wall_s):
                return

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
    aa: Interval, peaks_gflops: tuple[float, float], best_gflops: float, others_cores: float | None
) -> str | None:
    """Why a measurement must not be believed, or None: the three ways in which a machine gives itself away."""
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
    return "; ".join(reasons) or None


class _Slots(Generic[Inputs]):
    """A case's candidates, built for every set of inputs, with one cursor that every call of any of them moves on."""

    def __init__(self, case: Case[Inputs], sets: int, seed: int) -> None:
        self.case = case
        self.inputs = [case.inputs(np.random.default_rng([seed, index])) for index in range(sets)]
        self.calls = {c.name: [c.build(inputs) for inputs in self.inputs] for c in case.candidates}
        self.cursor = 0

    def take(self, name: str, count: int) -> list[Call]:
        """The next `count` calls of a candidate: always the inputs touched longest ago, whoever touched them."""
        start, self.cursor = self.cursor, (self.cursor + count) % len(self.inputs)
        calls = self.calls[name]
        return [calls[(start + i) % len(calls)] for i in range(count)]

    def check(self, when: str) -> None:
        """Check each candidate on the first and the last inputs, on memory spoilt before where it reuses its own."""
        for candidate in self.case.candidates:
            for index in sorted({0, len(self.inputs) - 1}):
                call = self.calls[candidate.name][index]
                if not candidate.allocates:
                    spoil(call())
                try:
                    self.case.check(self.inputs[index], call())
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
    """How many sets of inputs a case rotates through, so that each has left the cache when its turn comes again."""
    if case.cache == "in":
        return 1
    footprint = max(1.0, case.bytes if case.footprint_bytes is None else case.footprint_bytes)
    sets = math.ceil(2 * device.last_level_bytes / footprint) + 1
    if sets > MAX_SETS:
        raise ValueError(f'{case.name}: {footprint:.0f} bytes are too few to measure out of cache; say cache="in"')
    if device.memory_bytes and sets * footprint > device.memory_bytes / 2:
        raise ValueError(f"{case.name}: {sets} sets of {footprint:.0f} bytes exceed half of the memory")
    return sets


def _calibrate(slots: _Slots[Any], timer: Timer, sample_s: float) -> Mapping[str, tuple[int, float]]:
    """For each candidate, how many calls make a sample of at least `sample_s` seconds, and the seconds of one call."""
    found = {}
    for name in slots.calls:
        count = 1
        timer.time(slots.take(name, count))
        while (elapsed_s := timer.time(slots.take(name, count))) < sample_s / 2 and count < MAX_CALLS:
            count *= 2
        call_s = max(elapsed_s / count, sample_s / MAX_CALLS)
        found[name] = max(1, math.ceil(sample_s / call_s)), call_s
    return found


def _sample(
    slots: _Slots[Any], calibrated: Mapping[str, tuple[int, float]], timer: Timer, settings: Settings
) -> list[list[float]]:
    """Seconds per call, by slot and round. Slots 0 and 1 are both the baseline; each round runs every slot once."""
    baseline = slots.case.baseline
    names = [baseline, baseline, *(name for name in slots.calls if name != baseline)]
    warm = min(call_s for _, call_s in calibrated.values()) < WARM_BELOW_S
    order = random.Random(settings.seed)
    samples: list[list[float]] = [[] for _ in names]
    until = timer.now() + settings.seconds
    for done in range(MAX_ROUNDS):
        if done >= MIN_ROUNDS and timer.now() >= until:
            break
        for slot in order.sample(range(len(names)), len(names)):
            name = names[slot]
            count, _ = calibrated[name]
            calls = slots.take(name, count + warm)
            timer.settle()
            if warm:
                timer.time(calls[:1])
            samples[slot].append(timer.time(calls[warm:]) / count)
    return samples


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
        samples = _sample(slots, calibrated, timer, settings)
        timer.settle()
        peak_after = machine.peak_gflops()
        after = machine.cpu_times()
    finally:
        if collecting:
            gc.enable()
    slots.check("after timing")

    others_cores = after.others_since(before) if before and after else None
    aa = ratio_interval(samples[0], samples[1])
    void = judge(aa, (peak_before, peak_after), machine.best_gflops, others_cores)
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
        void = judge(row.aa_ratio, peaks, best_gflops, row.others_cores)
        if void and not row.void:
            yield dataclasses.replace(row, void=void, peak_best_gflops=best_gflops)
