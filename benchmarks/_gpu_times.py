"""Times of calls on a device: interleaved, the L2 cache flushed before each, launches hidden behind other work."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

# Bytes written before each call, more than any L2 cache.
FLUSH_BYTES = 1 << 28

# Cycles for which the device is kept busy before each call, some 2 ms: a call that takes the host less is launched by
# the time its turn comes. Where that cannot be asked for, so many flushes take about as long.
HOLD_CYCLES, HOLD_FLUSHES = 4_000_000, 24

# Runs of each call in a dry run.
DRY_REPEATS = 2


@dataclass(frozen=True, slots=True)
class Times:
    """Microseconds of each run of a call: on the device, and on the host until the call had returned."""

    device: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, float]:
        """The median and the quartiles on the device, and the median on the host."""
        ordered = sorted(self.device)
        low, high = ordered[len(ordered) // 4], ordered[3 * len(ordered) // 4]
        middle, host = statistics.median(ordered), statistics.median(self.host)
        found = {"median_us": middle, "low_us": low, "high_us": high, "host_us": host}
        return {name: round(us, 2) for name, us in found.items()}


class HostEvent:
    """Stands for an event of a device in a dry run."""

    at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, other: HostEvent) -> float:
        """Milliseconds until the other."""
        return 1e3 * (other.at - self.at)


def times_us(calls: Mapping[str, Callable[[], Any]], dry: bool, repeats: int = 30) -> dict[str, Times]:
    """Microseconds of each call. ``host`` above the time for which the device is held says that the call waited for its
    launch, or for the device."""
    import torch

    for call in calls.values():
        call()
    found = {name: Times() for name in calls}
    flush = torch.empty(1 if dry else FLUSH_BYTES, dtype=torch.uint8, device="cpu" if dry else "cuda")
    for _ in range(DRY_REPEATS if dry else repeats):
        for name, call in calls.items():
            first, last = event(dry), event(dry)
            flush.zero_()
            hold(flush)
            first.record()
            started = time.perf_counter()
            call()
            found[name].host.append(1e6 * (time.perf_counter() - started))
            last.record()
            if not dry:
                torch.cuda.synchronize()
            found[name].device.append(1e3 * first.elapsed_time(last))
    return found


def event(dry: bool) -> Any:
    import torch

    return HostEvent() if dry else torch.cuda.Event(enable_timing=True)


def hold(flush: Any) -> None:
    """Keep the device busy for a while."""
    import torch

    sleep = getattr(torch.cuda, "_sleep", None)
    if sleep is not None and flush.is_cuda:
        sleep(HOLD_CYCLES)
        return
    for _ in range(HOLD_FLUSHES):
        flush.zero_()
