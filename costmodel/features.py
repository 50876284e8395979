"""What a model knows of a candidate before it runs: numbers read off its kernels, its mapping and the device.

Every feature means the same for every cascade, so that a model may be asked about one that it never saw.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence

from ..ir.device import Device
from ..ir.footprint import Footprint, footprint, tile_shapes
from ..ir.mapping import FORMS, GAUGES, KNOBS
from ..ir.mapping import Mapping as Tuned
from ..ir.tile import TileKernel

# Knobs that say themselves in the operations of a program, which the other features count.
SHOWN = ("apart", "join", "meet", "narrow", "scatter", "stored")

NAMES = (
    "kernels",
    "programs",
    "matrix_flops",
    "vector_ops",
    "special_ops",
    "memory_bytes",
    "moved_bytes",
    "live_bytes",
    "trips",
    "intensity",
    "reuse",
    "live_per_near",
    "live_per_middle",
    "memory_per_far",
    "programs_per_unit",
    "matrix_s",
    "vector_s",
    "special_s",
    "memory_s",
    "innermost",
    "innermost_least",
    "tile_elements",
    "vector_fill",
    "roofline_s",
    *(f"form_{f}" for f in FORMS),
    *(f"gauge_{g}" for g in GAUGES),
    *(f"knob_{k}" for k in KNOBS if k not in SHOWN),
)


def schema(names: Sequence[str] = NAMES) -> str:
    """What tells one list of features from another."""
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]


def usual(name: str) -> float | None:
    """What a feature was before there was such a thing to choose: a knob's default; None for what is no knob."""
    knob = KNOBS.get(name.removeprefix("knob_")) if name.startswith("knob_") else None
    return None if knob is None else float(knob.default)


def seconds(f: Footprint, device: Device) -> dict[str, float]:
    """The least time of each unit, in seconds, were it alone."""
    rate = device.flops_of("f32")
    return {
        "matrix": f.matrix_flops / device.flops_of("bf16"),
        "vector": f.vector_ops / rate,
        "special": f.special_ops / device.special_per_s,
        "memory": f.memory_bytes / device.bytes_per_s,
    }


def roofline_s(kernels: Sequence[TileKernel], extents: Mapping[str, int], device: Device) -> float:
    """The least time of the kernels by the roofline: each as slow as its busiest unit, in seconds."""
    return sum(max(1e-9, *seconds(footprint(k, extents), device).values()) for k in kernels)


def features(
    kernels: Sequence[TileKernel], extents: Mapping[str, int], device: Device, mapping: Tuned
) -> tuple[float, ...]:
    """The features of a candidate in the order of `NAMES`; counts and times as logarithms to base 2."""
    prints = [footprint(k, extents) for k in kernels]
    shapes = [s for k in kernels for s in tile_shapes(k) if s]
    units = [seconds(f, device) for f in prints]
    total = {u: sum(s[u] for s in units) for u in ("matrix", "vector", "special", "memory")}
    work = sum(f.matrix_flops + f.vector_ops + f.special_ops for f in prints)
    memory, moved = sum(f.memory_bytes for f in prints), sum(f.moved_bytes for f in prints)
    live, programs = max((f.live_bytes for f in prints), default=0), sum(f.programs for f in prints)
    lanes = device.vector_bits // 32
    last = [s[-1] for s in shapes] or [1]
    values = {
        "kernels": float(len(prints)),
        "programs": _log(programs),
        "matrix_flops": _log(sum(f.matrix_flops for f in prints)),
        "vector_ops": _log(sum(f.vector_ops for f in prints)),
        "special_ops": _log(sum(f.special_ops for f in prints)),
        "memory_bytes": _log(memory),
        "moved_bytes": _log(moved),
        "live_bytes": _log(live),
        "trips": _log(max((t for f in prints for t in f.trips.values()), default=0)),
        "intensity": _log(work) - _log(memory),
        "reuse": _log(moved) - _log(memory),
        "live_per_near": _log(live) - _log(device.memory[0].bytes),
        "live_per_middle": _log(live) - _log(device.memory[min(1, len(device.memory) - 1)].bytes),
        "memory_per_far": _log(memory) - _log(device.memory[max(0, len(device.memory) - 2)].bytes),
        "programs_per_unit": _log(programs / device.units),
        "innermost": _log(max(last)),
        "innermost_least": _log(min(last)),
        "tile_elements": _log(max((math.prod(s) for s in shapes), default=1)),
        "vector_fill": sum(n / (-(-n // lanes) * lanes) for n in last) / len(last),
        "roofline_s": _log(sum(max(1e-9, *s.values()) for s in units) * 1e9),
    }
    values |= {f"{u}_s": _log(t * 1e9) for u, t in total.items()}
    values |= {f"form_{f}": float(mapping.form == f) for f in FORMS}
    values |= {f"gauge_{g}": float(mapping.gauge == g) for g in GAUGES}
    values |= {f"knob_{k}": float(mapping.knob(k)) for k in KNOBS if k not in SHOWN}
    return tuple(values[n] for n in NAMES)


def _log(x: float) -> float:
    return math.log2(1.0 + max(0.0, x))
