"""What the harness runs, on a simulated machine: both sides alike, warmed, in rounds, over enough sets of inputs."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from castile.benchmarks._rows import Row, Versions
from castile.benchmarks.harness import (
    MIN_ROUNDS,
    Candidate,
    Case,
    Settings,
    WallTimer,
    compare,
)

Simulate = Callable[..., Any]
VERSIONS = Versions("3", "2", None, "unknown", "cc", "none")
CALL_S = 0.002


@dataclass(frozen=True, slots=True)
class Named:
    """A call that knows its candidate and its set of inputs."""

    simulation: Any
    candidate: str
    index: int
    call_s: float

    def __call__(self) -> None:
        self.simulation.spend(self.call_s)


@dataclass(frozen=True, slots=True)
class Recorder:
    """A timer that keeps what it timed: after each `settle`, the warming calls and the sample."""

    timer: WallTimer
    groups: list[list[list[Named]]] = field(default_factory=list)

    def now(self) -> float:
        return self.timer.now()

    def settle(self) -> None:
        self.groups.append([])
        self.timer.settle()

    def time(self, calls: list[Named]) -> float:
        if self.groups:
            self.groups[-1].append(calls)
        return self.timer.time(calls)

    def samples(self) -> list[list[Named]]:
        return [group[1] for group in self.groups if group]

    def touched(self) -> list[int]:
        return [call.index for group in self.groups for calls in group for call in calls]


def record(
    simulation: Any, seed: int = 0, seconds: float = 4.0, call_s: float = CALL_S, **changes: Any
) -> tuple[Recorder, Row]:
    """Measure two equal candidates, `a` and `b`, and keep every call."""

    def build(name: str) -> Callable[[int], Callable[[], object]]:
        return lambda index: Named(simulation, name, index, call_s)

    counter = itertools.count()
    case: Case[int] = Case(
        name="record",
        inputs=lambda _: next(counter),
        candidates=tuple(Candidate(name, build(name), allocates=False) for name in "ab"),
        baseline="a",
        check=lambda index, out: None,
        flops=0,
        bytes=1 << 10,
        cache="in",
    )
    recorder = Recorder(simulation.timer())
    case = dataclasses.replace(case, **changes)
    return recorder, compare(case, simulation, Settings(seconds, seed=seed), recorder, VERSIONS)[0]


def test_rounds_run_every_slot_once_in_an_order_drawn_from_the_seed(simulate: Simulate) -> None:
    def rounds(seed: int) -> list[str]:
        names = [sample[0].candidate for sample in record(simulate(), seed)[0].samples()]
        return ["".join(names[i : i + 3]) for i in range(0, len(names), 3)]

    orders = rounds(seed=1)
    assert set(orders) == {"aab", "aba", "baa"}
    assert rounds(seed=1) == orders
    assert rounds(seed=2) != orders


def test_samples_are_long_enough_and_each_is_warmed(simulate: Simulate) -> None:
    recorder, row = record(simulate(), call_s=1e-5, seconds=0.5)
    assert row.calls_per_sample == pytest.approx(500, abs=1)
    for warming, sample in filter(None, recorder.groups):
        assert len(sample) == pytest.approx(500, abs=1)
        assert len(warming) * 1e-5 == pytest.approx(0.002, abs=2e-5)
        assert {call.candidate for call in warming} == {call.candidate for call in sample}


def test_a_long_call_is_sampled_once_a_round_and_rounds_have_a_minimum(simulate: Simulate) -> None:
    recorder, row = record(simulate(), seconds=0.1, call_s=2.0)
    assert row.calls_per_sample == 1
    assert len(row.samples_s) == MIN_ROUNDS
    assert len(recorder.samples()) == 3 * MIN_ROUNDS


def test_in_cache_a_sample_stays_on_one_set_and_samples_use_many(simulate: Simulate) -> None:
    recorder, row = record(simulate())
    assert row.input_sets == 16
    for group in filter(None, recorder.groups):
        assert len({call.index for calls in group for call in calls}) == 1
    assert {sample[0].index for sample in recorder.samples() if sample[0].candidate == "b"} == set(range(16))


@pytest.mark.parametrize("call_s", [1e-4, CALL_S, 0.1])
def test_out_of_cache_no_call_finds_its_inputs_in_the_cache(simulate: Simulate, call_s: float) -> None:
    footprint, cache = 1 << 10, 1 << 14
    recorder, row = record(simulate(), call_s=call_s, seconds=2.0, cache="out", bytes=footprint)
    touched = recorder.touched()
    assert len(set(touched)) > row.input_sets / 2
    last: dict[int, int] = {}
    for position, index in enumerate(touched):
        if index in last:
            between = set(touched[last[index] + 1 : position])
            assert len(between) * footprint >= 4 / 3 * cache
        last[index] = position


def test_big_inputs_come_in_fewer_sets(simulate: Simulate) -> None:
    assert record(simulate(), footprint_bytes=1 << 28)[1].input_sets == 4
    assert record(simulate(), footprint_bytes=1 << 40)[1].input_sets == 1
    assert record(simulate(), footprint_bytes=1 << 40, cache="out")[1].input_sets == 2


def test_what_does_not_fit_is_refused(simulate: Simulate) -> None:
    with pytest.raises(ValueError, match='too few to measure out of cache; say cache="in"'):
        record(simulate(), bytes=1, cache="out")
    small = dataclasses.replace(simulate().device, memory_bytes=1 << 14)
    with pytest.raises(ValueError, match="exceed half of the memory"):
        record(simulate(device=small), cache="out")
