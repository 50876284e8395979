"""The harness on a simulated machine: it finds what is planted, and believes nothing it should not."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from castile.benchmarks._machine import read_cpu_times, this_machine
from castile.benchmarks._rows import Row, Versions
from castile.benchmarks._stats import Interval
from castile.benchmarks.harness import (
    AA_LIMIT,
    MIN_ROUNDS,
    Candidate,
    Case,
    Settings,
    WallTimer,
    WrongOutput,
    check,
    compare,
    judge,
    rejudge,
)

Simulate = Callable[..., Any]
VERSIONS = Versions("3", "2", None, "unknown", "cc", "none")
CALL_S = 0.002


def spending(simulation: Any, seconds: dict[str, float], **changes: Any) -> Case[None]:
    """A case whose candidates do nothing but take `seconds` each; the first is the baseline."""

    def build(call_s: float) -> Callable[[None], Callable[[], object]]:
        return lambda _: lambda: simulation.spend(call_s)

    case: Case[None] = Case(
        name="spend",
        inputs=lambda _: None,
        candidates=tuple(Candidate(name, build(call_s), allocates=False) for name, call_s in seconds.items()),
        baseline=next(iter(seconds)),
        check=lambda _, out: None,
        flops=2e6,
        bytes=1e6,
        cache="in",
    )
    return dataclasses.replace(case, **changes)


def measure(simulation: Any, seconds: dict[str, float], seed: int = 0, **changes: Any) -> tuple[Row, ...]:
    case = spending(simulation, seconds, **changes)
    return compare(case, simulation, Settings(seed=seed), simulation.timer(), VERSIONS)


# What is planted is found.


def test_exact_times_are_reported_exactly(simulate: Simulate) -> None:
    base, other = measure(simulate(), {"base": CALL_S, "other": CALL_S / 4})
    assert base.seconds.median == pytest.approx(CALL_S)
    assert other.seconds.median == pytest.approx(CALL_S / 4)
    assert other.ratio.median == pytest.approx(4.0)
    assert other.gflops == pytest.approx(2e6 / (CALL_S / 4) / 1e9)
    assert other.gbytes_s == pytest.approx(1e6 / (CALL_S / 4) / 1e9)
    assert (base.ratio, base.candidate) == (base.aa_ratio, base.baseline)


@pytest.mark.parametrize("seed", range(10))
def test_a_slowdown_of_a_tenth_is_found_under_noise(simulate: Simulate, seed: int) -> None:
    _, slow = measure(simulate(seed, noise=0.05), {"base": CALL_S, "slow": 1.1 * CALL_S}, seed)
    slowdown = slow.ratio.reciprocal()
    assert slow.void is None
    assert slowdown.low > 1
    assert slowdown.median == pytest.approx(1.1, rel=0.02)


def test_equal_code_comes_out_equal_as_often_as_promised(simulate: Simulate) -> None:
    times = {"base": 10 * CALL_S, "same": 10 * CALL_S}
    rows = [measure(simulate(s, noise=0.05), times, s)[1] for s in range(50)]
    assert all(row.void is None for row in rows)
    assert sum(row.ratio.contains(1.0) for row in rows) >= 45
    assert sum(row.aa_ratio.contains(1.0) for row in rows) >= 45


def test_a_drifting_clock_cancels_in_the_ratio(simulate: Simulate) -> None:
    simulation = simulate(noise=0.01, slowness=lambda now: 1.0 + now / 40)
    _, slow = measure(simulation, {"base": CALL_S, "slow": 1.1 * CALL_S})
    assert slow.seconds.high > 1.01 * slow.seconds.low
    assert slow.ratio.reciprocal().median == pytest.approx(1.1, rel=0.01)


# What cannot be believed is void, and says why.

GOOD = {"aa": Interval(1, 0.99, 1.01), "peaks": (100, 100), "best": 100, "others": 0.0, "kept": 20, "dropped": 0}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"aa": Interval(1.049, 0.9, 1.2)}, None),
        ({"aa": Interval(1.051, 1.04, 1.06)}, "A/A: the baseline differs from itself by 5.1%"),
        ({"aa": Interval(0.94, 0.93, 1.06)}, "A/A: the baseline differs from itself by 6.0%"),
        ({"peaks": (96.1, 96.1)}, None),
        ({"peaks": (95, 100)}, "peak: 95 GFLOP/s is 5.0% below this machine's 100"),
        ({"peaks": (100, 50)}, "peak: 50 GFLOP/s is 50.0% below"),
        ({"others": None}, None),
        ({"others": 0.04}, None),
        ({"others": 1.0}, "busy: other processes held 1.00 cores"),
        ({"dropped": 20}, None),
        ({"dropped": 21}, "unsteady: the machine was slow around 21 of 41 rounds"),
        ({"peaks": (50, 50), "others": 1.0}, "; busy"),
    ],
)
def test_judge(change: dict[str, Any], reason: str | None) -> None:
    g = GOOD | change
    void = judge(g["aa"], g["peaks"], g["best"], g["others"], g["kept"], g["dropped"])
    assert void is None if reason is None else void is not None and reason in void


def test_a_baseline_that_differs_from_itself_voids_every_row(simulate: Simulate) -> None:
    voided = 0
    for seed in range(15):
        rows = measure(simulate(seed, noise=0.5), {"base": CALL_S, "other": CALL_S}, seed)
        differs = abs(rows[0].aa_ratio.median - 1) > AA_LIMIT
        voided += differs
        assert {row.void is not None for row in rows} == {differs}
    assert 0 < voided < 15


@pytest.mark.parametrize("peaks", [(100.0, 90.0), (90.0, 100.0), (100.0, 150.0)])
def test_a_low_peak_before_or_after_voids_the_row(simulate: Simulate, peaks: tuple[float, float]) -> None:
    assert "peak" in str(measure(simulate(peaks=peaks), {"base": CALL_S})[0].void)


def test_a_busy_machine_voids_the_row(simulate: Simulate) -> None:
    assert "busy" in str(measure(simulate(others_cores=0.5), {"base": CALL_S})[0].void)
    assert measure(simulate(others_cores=None), {"base": CALL_S})[0].others_cores is None


def test_a_higher_peak_seen_later_voids_earlier_rows(simulate: Simulate) -> None:
    rows = measure(simulate(), {"base": CALL_S, "other": CALL_S})
    assert list(rejudge(rows, best_gflops=101.0)) == []
    later = list(rejudge(rows, best_gflops=200.0))
    assert [row.id for row in later] == [row.id for row in rows]
    assert all("50.0% below" in str(row.void) for row in later)
    assert list(rejudge(later, best_gflops=300.0)) == []


def test_rounds_in_slow_moments_are_dropped_and_counted(simulate: Simulate) -> None:
    halved = simulate(slowness=lambda now: 2.0 if now % 1.0 > 0.7 else 1.0)
    base, other = measure(halved, {"base": CALL_S, "other": CALL_S})
    assert base.void is None
    assert 0 < base.rounds_dropped < base.rounds_kept == len(base.samples_s)
    assert base.seconds.high == pytest.approx(CALL_S)
    assert other.ratio.median == pytest.approx(1.0)


def test_a_hiccup_does_not_shorten_the_samples(simulate: Simulate) -> None:
    stalls = simulate(slowness=lambda now: 1000.0 if now < 1e-4 else 1.0)
    row = measure(stalls, {"base": 1e-5}, seed=0)[0]
    assert row.calls_per_sample == pytest.approx(500, abs=1)


def test_a_machine_that_is_mostly_slow_voids_the_row(simulate: Simulate) -> None:
    slow = simulate(slowness=lambda now: 2.0 if now > 0.5 else 1.0)
    base = measure(slow, {"base": CALL_S})[0]
    assert "unsteady" in str(base.void)
    assert len(base.samples_s) >= MIN_ROUNDS


def test_a_machine_that_is_always_slow_ends(simulate: Simulate) -> None:
    base = measure(simulate(slowness=lambda now: 2.0), {"base": CALL_S})[0]
    assert (base.rounds_kept, len(base.samples_s)) == (0, base.rounds_dropped)
    assert "unsteady" in str(base.void)


@pytest.mark.skipif(read_cpu_times() is None, reason="this system does not tell what other processes use")
def test_a_process_that_holds_a_core_voids_the_row() -> None:
    """For real, and safe on a machine that is busy anyway: who else uses it only adds to what must be found."""

    def build(matrix: np.ndarray) -> Callable[[], np.ndarray]:
        out = np.empty_like(matrix)
        return lambda: np.add(matrix, 1.0, out=out)

    case = Case(
        name="add",
        inputs=lambda rng: rng.standard_normal(1 << 16),
        candidates=(Candidate("numpy", build, allocates=False),),
        baseline="numpy",
        check=lambda matrix, out: np.testing.assert_array_equal(np.asarray(out), matrix + 1),
        flops=1 << 16,
        bytes=16 << 16,
        cache="in",
    )
    child = subprocess.Popen((sys.executable, "-c", "print(flush=True)\nwhile True: pass"), stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None
        child.stdout.readline()
        with this_machine() as machine:
            row = compare(case, machine, Settings(seconds=0.3), versions=VERSIONS)[0]
    finally:
        child.kill()
        child.communicate()
    assert row.others_cores is not None
    assert row.others_cores > 0.2
    assert "busy: other processes held" in str(row.void)


# Outputs are checked, and a check can fail.


def doubling(build: Callable[[np.ndarray], Callable[[], object]], allocates: bool = False) -> Case[np.ndarray]:
    """A case that asks for twice its inputs."""
    return Case(
        name="double",
        inputs=lambda rng: rng.standard_normal(64),
        candidates=(Candidate("it", build, allocates),),
        baseline="it",
        check=lambda inputs, out: np.testing.assert_array_equal(np.asarray(out), 2 * inputs),
        flops=64,
        bytes=1024,
        cache="in",
    )


def doubles(inputs: np.ndarray) -> Callable[[], np.ndarray]:
    out = np.empty_like(inputs)
    return lambda: np.multiply(inputs, 2, out=out)


def doubles_once(inputs: np.ndarray) -> Callable[[], np.ndarray]:
    out = 2 * inputs
    return lambda: out


def doubles_all_but_one(inputs: np.ndarray) -> Callable[[], np.ndarray]:
    out = 2 * inputs

    def call() -> np.ndarray:
        np.multiply(inputs[1:], 2, out=out[1:])
        return out

    return call


def test_right_outputs_pass() -> None:
    check(doubling(doubles))
    check(doubling(lambda inputs: lambda: 2 * inputs, allocates=True))


@pytest.mark.parametrize("build", [doubles_once, doubles_all_but_one])
def test_results_left_over_from_before_are_found(build: Callable[[np.ndarray], Callable[[], object]]) -> None:
    with pytest.raises(WrongOutput, match="double: it: without timing"):
        check(doubling(build))


def test_candidates_must_agree_on_allocation(simulate: Simulate) -> None:
    case = spending(simulate(), {"a": 1.0, "b": 1.0})
    a, b = case.candidates
    with pytest.raises(ValueError, match="both sides or on none: a allocates, b does not"):
        dataclasses.replace(case, candidates=(dataclasses.replace(a, allocates=True), b))
    with pytest.raises(ValueError, match="share a name"):
        dataclasses.replace(case, candidates=(a, a))
    with pytest.raises(ValueError, match="baseline 'c' is none of a, b"):
        dataclasses.replace(case, baseline="c")


def test_wrong_declarations_of_allocation_are_found() -> None:
    with pytest.raises(WrongOutput, match="returns the same memory at each call, but declares allocates=True"):
        check(doubling(doubles, allocates=True))
    with pytest.raises(WrongOutput, match="returns new memory at each call, but declares allocates=False"):
        check(doubling(lambda inputs: lambda: 2 * inputs))


def test_what_goes_wrong_during_timing_is_found(simulate: Simulate) -> None:
    simulation = simulate()

    def build(inputs: np.ndarray) -> Callable[[], np.ndarray]:
        out = np.empty_like(inputs)

        def call() -> np.ndarray:
            simulation.spend(CALL_S)
            return np.multiply(inputs, 2 if simulation.clock_s < 1 else 3, out=out)

        return call

    with pytest.raises(WrongOutput, match="after timing"):
        compare(doubling(build), simulation, Settings(), simulation.timer(), VERSIONS)


# The timer.


def test_the_wall_timer_synchronises_before_each_reading() -> None:
    events: list[str] = []
    clock = itertools.count()

    def now() -> float:
        events.append("now")
        return float(next(clock))

    timer = WallTimer(now=now, sync=lambda: events.append("sync"))
    assert timer.time([lambda: events.append("call")] * 2) == 1.0
    assert events == ["sync", "now", "call", "call", "sync", "now"]


@pytest.mark.parametrize(("spins_s", "waits_s"), [(0.0, 0.001), (0.0095, 0.010), (9.0, 0.25)])
def test_settling_waits_for_spinning_threads_but_not_for_ever(spins_s: float, waits_s: float) -> None:
    clock = [0.0]

    def sleep(seconds: float) -> None:
        clock[0] += seconds

    WallTimer(now=lambda: clock[0], sleep=sleep, running=lambda: clock[0] < spins_s).settle()
    assert clock[0] == pytest.approx(waits_s, abs=0.0015)
