"""Memory for what a graph makes on its way: each tensor has a place for as long as somebody reads it.

One stretch of memory serves all graphs of a thread, one at a time. What lies in it stays in the caches from step to
step and is never given back to the system, whatever the allocator thinks of freed memory.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from .nodes import PRODUCTS, fakes, op_name, tensors_of
from .partition import Region
from .region import RegionCall
from .rewrite import Unit, ordered

# Graphs that need more than this on their way are not given places: their memory is not to be kept from call to call.
LARGEST_BYTES = 1 << 30

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


# What lies where


@dataclass(frozen=True, slots=True)
class Plan:
    """What runs, in order; where in the arena each result begins, by the memory that its fake lies in; and its size."""

    units: tuple[Unit, ...]
    offsets: dict[int, int]
    bytes: int


def plan_of(gm: GraphModule, calls: Sequence[tuple[Region, RegionCall]]) -> Plan | None:
    """The plan of a graph of fixed sizes; None where it would take too much memory."""
    units = ordered(list(gm.graph.nodes), calls)
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    sizes: dict[int, int] = {}
    for at, unit in enumerate(units):
        read = unit.all_input_nodes if isinstance(unit, Node) else calls[unit][1].leaves
        made: list[torch.Tensor] = []
        if isinstance(unit, int):
            made = [fakes(n)[max(0, k)] for n, k, _ in calls[unit][1].lowered.results]
        elif op_name(unit) in PRODUCTS and not unit.kwargs and fakes(unit)[0].is_contiguous():
            made = [fakes(unit)[0]]
        for f in made:
            if memory_of(f) not in last:  # else it would share the place of what it is made of
                first[memory_of(f)] = last[memory_of(f)] = at
                sizes[memory_of(f)] = span(f) * f.element_size()
        for memory in (memory_of(f) for n in (*read, *_itself(unit)) for f in tensors_of(n)):
            last[memory] = at
    (output,) = (n for n in gm.graph.nodes if n.op == "output")
    for n in output.all_input_nodes:
        for f in tensors_of(n):
            first.pop(memory_of(f), None)
    stays = [Stay(first[m], last[m], sizes[m]) for m in first]
    offsets, total = placed(stays)
    return Plan(tuple(units), dict(zip(first, offsets, strict=True)), total) if total <= LARGEST_BYTES else None


def is_fixed(gm: GraphModule) -> bool:
    """Whether all sizes of a graph are numbers, and all its memory is the CPU's."""
    for f in (f for n in gm.graph.nodes for f in fakes(n)):
        if isinstance(f, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return False
        if isinstance(f, torch.Tensor):
            if f.layout is not torch.strided or f.device.type != "cpu":
                return False
            dims: Iterable[Any] = (*f.shape, *f.stride())
            if not all(isinstance(n, int) for n in dims):
                return False
    return True


def _itself(unit: Unit) -> tuple[Node, ...]:
    return (unit,) if isinstance(unit, Node) else ()


def memory_of(fake: torch.Tensor) -> int:
    """The memory that a result lies in, by the address of what stands for it: views share it."""
    return int(fake.untyped_storage()._cdata)


def span(x: torch.Tensor) -> int:
    """Elements from the first to the last of a tensor."""
    return 0 if x.numel() == 0 else 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
