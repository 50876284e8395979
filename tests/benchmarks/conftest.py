"""A simulated machine: time passes only when a call says so, and how fast it is can be scripted."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from castile.benchmarks._machine import CpuTimes, Device
from castile.benchmarks.harness import WallTimer

DEVICE = Device(
    "simulated", "none", cores=2, isa=(), l1_bytes=1 << 10, l2_bytes=1 << 12, l3_bytes=1 << 14, memory_bytes=0
)


@dataclass(slots=True)
class Simulation:
    """Clock and machine in one. `slowness(now)` stretches calls, `noise` varies them, `peaks` are read in turn."""

    seed: int = 0
    noise: float = 0.0
    slowness: Callable[[float], float] = lambda now: 1.0
    peaks: tuple[float, ...] = (100.0,)
    others_cores: float | None = 0.0
    clock_s: float = 0.0
    readings: int = 0
    best_gflops: float = 0.0
    threads: int = 2
    probe_name: str = "simulated"
    device: Device = DEVICE
    rng: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)

    def spend(self, seconds: float) -> None:
        """Let a call take `seconds`, more where the machine is slow, more or less with noise."""
        self.clock_s += seconds * self.slowness(self.clock_s) * self.rng.lognormvariate(0.0, self.noise)

    def rest(self, seconds: float) -> None:
        """Let time pass."""
        self.clock_s += seconds

    def timer(self) -> WallTimer:
        """A timer that reads the simulated clock."""
        return WallTimer(now=lambda: self.clock_s, sleep=self.rest, running=lambda: False)

    def peak_gflops(self) -> float:
        """The next of `peaks`; the last one again when all are read."""
        reading = self.peaks[min(self.readings, len(self.peaks) - 1)]
        self.readings += 1
        self.best_gflops = max(self.best_gflops, reading)
        return reading

    def scaling(self) -> float:
        """All threads scale."""
        return 1.0

    def steady(self) -> bool:
        """Whether the machine is not slow now."""
        return self.slowness(self.clock_s) < 1.1

    def cpu_times(self) -> CpuTimes | None:
        """Times in which others hold `others_cores`, and this process one."""
        if self.others_cores is None:
            return None
        return CpuTimes(self.clock_s, self.clock_s * (1.0 + self.others_cores), self.clock_s)


@pytest.fixture
def simulate() -> type[Simulation]:
    """The class: each test scripts its own machine."""
    return Simulation
