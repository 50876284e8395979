"""Memory for what a graph makes on its way: each tensor has a place for as long as somebody reads it.

One stretch of memory serves all graphs of a thread, one at a time. What lies in it stays in the caches from step to
step and is never given back to the system, whatever the allocator thinks of freed memory.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch

# Places begin at a cache line of their own, and not all at the same line of a page: what is read together would meet
# in the same few lines of a cache.
LINE, APART = 64, 320


@dataclass(frozen=True, slots=True)
class Stay:
    """How long a tensor is wanted: the steps that first and last touch it; and its bytes."""

    first: int
    last: int
    bytes: int


def placed(stays: Sequence[Stay]) -> tuple[list[int], int]:
    """An offset in bytes for each stay, and what all need together; those that overlap in time lie apart.

    Each, in the order of their beginnings, takes the lowest place that is free.
    """
    offsets = [0] * len(stays)
    taken: list[tuple[int, int, int]] = []  # begin, end, last step
    total = 0
    for i in sorted(range(len(stays)), key=lambda i: (stays[i].first, i)):
        stay = stays[i]
        taken = sorted(t for t in taken if t[2] >= stay.first)
        size = (stay.bytes + LINE - 1) // LINE * LINE + APART
        at = 0
        for begin, end, _ in taken:
            if begin - at >= size:
                break
            at = max(at, end)
        offsets[i] = at
        taken.append((at, at + size, stay.last))
        total = max(total, at + size)
    return offsets, total


class Arena(threading.local):
    """This thread's stretch of memory. ``busy`` while a graph uses it: one that is called from within has its own."""

    memory: torch.Tensor | None = None
    busy: bool = False

    def of(self, wanted: int) -> torch.Tensor:
        """At least so many bytes; another tensor than before where there were fewer."""
        if self.memory is None or self.memory.numel() < wanted:
            # An inference tensor could not be written to outside of that mode.
            with torch.inference_mode(False), torch.no_grad():
                self.memory = torch.empty(wanted, dtype=torch.uint8)
        return self.memory
