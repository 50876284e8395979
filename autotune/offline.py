"""Tuning for a GPU that is not here: candidates are compiled for it, rejected by what they take of it, and ranked.

Triton compiles for any architecture anywhere, so shared memory, registers and spills of a candidate are facts; only its
time is an estimate, by the roofline under the occupancy that these leave. Candidates that look best beforehand, by the
registers that a model foresees, are compiled first, for as long as the budget lasts.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic
from typing import Any

import numpy as np

from ..codegen import targets
from ..codegen.triton_build import occupancy_of
from ..costmodel.features import seconds
from ..ir.cascade import Cascade
from ..ir.device import Device, device_of
from ..ir.errors import CastileError, UsageError
from ..ir.extents import resolve
from ..ir.footprint import footprint, staged_bytes
from ..ir.mapping import Mapping as Tuned
from ..ir.tile import TileKernel
from ..passes.inbounds import check_reads
from ..passes.mapped import mapped
from .compiled import foreseen, kernel_row, register_model
from .measure import Limits, Measurer
from .space import space_of

# The share of the budget that goes into ranking before anything is compiled.
DRAFT = 0.15

# Threads of a unit that must be resident, as a share, before memory is read at its full rate.
HIDING = 0.25


@dataclass(frozen=True, slots=True)
class Shortlisted:
    """A candidate that fits: ``estimate_s`` in seconds, what its kernels take (as `Resources.to_dict`), and the
    registers of a thread that were foreseen before it was compiled."""

    mapping: Tuned
    estimate_s: float
    resources: Mapping[str, Any]
    foreseen: float = math.nan


@dataclass(frozen=True, slots=True)
class Shortlist:
    """Candidates that fit a device, by estimated time; ``rejected`` counts the others by reason; ``register_error`` is
    by how much the registers that were foreseen were off, the median of all that were compiled."""

    target: str
    device: str
    candidates: tuple[Shortlisted, ...]
    rejected: Mapping[str, int]
    compiled: int
    space: int
    seconds: float
    register_error: float = math.nan


def shortlist(
    c: Cascade,
    shapes: Mapping[str, int],
    target: str,
    budget_s: float = 60.0,
    trials: int | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Shortlist:
    """Rank the mappings of a cascade for a GPU without one, in ``budget_s`` seconds or ``trials`` compilations.

    Raises `UsageError` for the CPU and where nothing fits, `InputError` for shapes that do not fit the cascade,
    `EvaluationError` for reads outside their tensor.
    """
    began = monotonic()
    target = targets.named(target)
    device = device_of(target)
    if not device.is_gpu or target == "interpret":
        raise UsageError(
            f"`{target}` is not tuned offline", expected="a GPU, such as cuda:90", got=target,
            hint="what is here is measured: leave --offline out" if target == "cpu" else "",
        )  # fmt: skip
    extents = resolve(c, shapes)
    check_reads(c, extents)
    space = space_of(c, extents, target, device)
    mappings = [space.mapping(*one) for one in space.combinations(seed)]
    drafted = _draft(c, mappings, extents, device, seed, DRAFT * budget_s)
    order = list(drafted)[:trials]
    found: list[Shortlisted] = []
    rejected: Counter[str] = Counter()
    compiled = 0
    with Measurer(c, extents, target, seed, Limits(), builders=2) as bench:
        while compiled < len(order) and (monotonic() - began < budget_s or not compiled):
            left = max(1.0, budget_s - (monotonic() - began)) if compiled else math.inf
            places = order[compiled : compiled + bench.builders]
            batch = [mappings[i] for i in places]
            for i, m, outcome in zip(places, batch, bench.resources(batch, left), strict=True):
                if outcome.status != "ok":
                    rejected[outcome.status] += 1
                    continue
                kernels = mapped(c, m, extents).kernels
                time_s = estimate_s(kernels, extents, device, m, outcome.told["kernels"])
                found.append(Shortlisted(m, time_s, outcome.told["total"], drafted[i]))
            compiled += len(batch)
            progress(compiled, len(order))
    kept = _without_spills(found, rejected)
    if not kept:
        reasons = ", ".join(f"{n} {what}" for what, n in rejected.items()) or "nothing was compiled"
        raise UsageError(f"no mapping of `{c.name}` fits {target}", got=reasons, hint="give it more time")
    ranked = tuple(sorted(kept, key=lambda s: s.estimate_s))
    error = float(np.median([abs(s.foreseen / max(1, s.resources["registers"]) - 1) for s in found]))
    took = monotonic() - began
    return Shortlist(target, device.name, ranked, dict(rejected), compiled, len(mappings), took, error)


def _draft(
    c: Cascade, mappings: Sequence[Tuned], extents: Mapping[str, int], device: Device, seed: int, seconds: float
) -> dict[int, float]:
    """Places of the default, then of as many mappings as can be judged in some seconds, the best estimate first; with
    each the registers of a thread that its kernels are foreseen to take."""
    end, model = monotonic() + seconds, register_model()
    programs: dict[int, tuple[TileKernel, ...]] = {}
    rows: list[tuple[float, ...]] = []
    for i in (0, *np.random.default_rng(seed).permutation(np.arange(1, len(mappings)))):
        if monotonic() > end and len(programs) > 1:
            break
        with suppress(CastileError):
            kernels = mapped(c, mappings[i], extents).kernels
            rows += [kernel_row(k, extents, device, mappings[i]) for k in kernels]
            programs[int(i)] = kernels
    known = iter(foreseen(rows, model))
    most, estimates = {}, {}
    for i, kernels in programs.items():
        registers = [float(next(known)) for _ in kernels]
        taken = [_taken(k, device, mappings[i], r) for k, r in zip(kernels, registers, strict=True)]
        estimates[i] = estimate_s(kernels, extents, device, mappings[i], taken)
        most[i] = min(max(registers, default=0.0), float(device.registers_per_thread))
    return {i: most[i] for i in sorted(estimates, key=lambda i: (i != 0, estimates[i]))}


def _taken(k: TileKernel, device: Device, mapping: Tuned, registers: float) -> dict[str, float]:
    """What a kernel will take, as far as it is foreseen: its share of a unit's threads, and what it spills."""
    threads = mapping.knob("warps") * device.warp
    limit = min(device.registers_per_thread, device.registers_per_unit // threads)
    shared = staged_bytes(k) * mapping.knob("stages")
    held = math.ceil(min(registers, limit))
    occupancy = occupancy_of(device, mapping.knob("warps"), held, shared)
    return {"occupancy": occupancy, "spill_bytes": 4.0 * max(0.0, registers - limit)}


def _without_spills(found: Sequence[Shortlisted], rejected: Counter[str]) -> list[Shortlisted]:
    """What spills no more registers than the one that spills least."""
    least = min((s.resources["spill_bytes"] for s in found), default=0)
    kept = [s for s in found if s.resources["spill_bytes"] <= least]
    if len(kept) < len(found):
        rejected["spills"] += len(found) - len(kept)
    return kept


def estimate_s(
    kernels: Sequence[TileKernel],
    extents: Mapping[str, int],
    device: Device,
    mapping: Tuned,
    taken: Sequence[Mapping[str, Any]] | None = None,
) -> float:
    """Seconds by the roofline: whole waves of programs on the units, caches read at the second level's rate, memory at
    the rate that the resident threads can ask for. ``taken`` is what each kernel takes, once it is compiled."""
    total = 0.0
    for place, k in enumerate(kernels):
        f = footprint(k, extents)
        units = seconds(f, device)
        occupancy = taken[place]["occupancy"] if taken else 1.0
        spilled = taken[place]["spill_bytes"] if taken else 0
        threads = device.warp * mapping.knob("warps")
        resident = max(1, int(occupancy * device.threads_per_unit / threads))
        # Programs of a unit share it, so what counts is how evenly they fill the units.
        programs = max(1, f.programs)
        turns = math.ceil(programs / device.units) if programs < device.units * resident else programs / device.units
        uneven = max(1.0, turns * device.units / programs)
        work = uneven * max(units["matrix"], units["vector"], units["special"])
        hidden = min(1.0, max(occupancy, 1e-3) / HIDING)
        near = (f.moved_bytes + 2.0 * spilled * threads * programs) / device.memory[1].bytes_per_s
        total += max(1e-9, work, units["memory"] / hidden, uneven * near)
    return total
