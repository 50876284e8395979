"""Other mappings than the default on a GPU: one change at a time for a cost model, and a climb from change to change.

What another mapping computes is compared with the default's outputs, on the device.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import castile
from castile.autotune.space import Choice, space_of
from castile.benchmarks._gpu_check import alike, checked_again, tensors
from castile.benchmarks._gpu_races import Race
from castile.benchmarks._gpu_run import Options, Row, usable
from castile.benchmarks._gpu_times import times_us
from castile.ir.device import device_of
from castile.ir.errors import CastileError
from castile.ir.extents import resolve
from castile.ir.mapping import Mapping as Tuned
from castile.passes.defaults import default_mapping
from castile.passes.defaults_gpu import need
from castile.passes.mapped import mapped

# The least tile that is tried.
LEAST_TILE = 16

# What a row of the profile changes of the default mapping.
CHANGES: tuple[Mapping[str, int], ...] = (
    {},
    {"descriptors": 1},
    # With 8 warps Triton 3.6 shares nothing out.
    {"descriptors": 1, "specialize": 1, "warps": 4},
    {"ahead": 1, "stages": 3},
    {"persistent": 1},
    {"warps": 4},
    {"warps": 8},
    {"stages": 2},
    {"stages": 3},
    {"stages": 4},
    {"ahead": 1, "stages": 4},
    {"descriptors": 1, "persistent": 1},
    {"descriptors": 1, "specialize": 1},
    {"swizzle": 1},
    {"heavy": 0},
    {"heavy": 2},
)

# Seconds for which a climb tries mappings, those for a job's other work being left; calls of each; and the share of the
# best time below which another mapping takes its place.
CLIMB_S, TRIED_CALLS, BETTER = 90.0, 7, 0.98


def changed(mapping: Tuned, knobs: Mapping[str, int]) -> Tuned:
    return replace(mapping, knobs={**mapping.knobs, **knobs})


def label(change: Mapping[str, int]) -> str:
    return ",".join(f"{k}={v}" for k, v in change.items()) or "default"


def extents_of(r: Race, options: Options) -> dict[str, int]:
    return resolve(r.cascade, dict(r.tiny if options.dry else r.extents))


def fits(r: Race, mapping: Tuned, extents: Mapping[str, int], target: str) -> bool:
    """Whether registers and shared memory are thought to hold the kernels of a mapping."""
    return need(mapped(r.cascade, mapping, extents).kernels, mapping, device_of(target)) <= 1


# One change


def other_tiles(r: Race, options: Options) -> list[tuple[str, int]]:
    """Tiles of half and of twice the default's size, as far as they fit."""
    extents = extents_of(r, options)
    mapping = default_mapping(r.cascade, options.target, extents)
    found = []
    for rank, size in mapping.tiles.items():
        for other in (size // 2, 2 * size):
            if not LEAST_TILE <= other <= 2 * extents[rank]:
                continue
            if fits(r, replace(mapping, tiles={**mapping.tiles, rank: other}), extents, options.target):
                found.append((rank, other))
    return found


def profile_row(r: Race, change: Mapping[str, int], tiles: Mapping[str, int], options: Options, row: Row) -> None:
    """Times of the default mapping with a change; `AssertionError` where it computes something else.

    What the kernels take of the device is not asked here: `Kernel.resources` tells it from the row without a GPU, and
    compiles once more.
    """
    extents = extents_of(r, options)
    default = default_mapping(r.cascade, options.target, extents)
    mapping = changed(replace(default, tiles={**default.tiles, **tiles}), change)
    kernel = castile.compile(r.cascade, options.target, extents, mapping)
    row |= {"key": r.cascade.key, "extents": dict(extents), "mapping": mapping.to_dict()}
    inputs = r.prepare(tensors(r.cascade, extents, 0, options.device))
    outs = kernel(**inputs)
    times = times_us({"castile": partial(kernel, **inputs, out=outs)}, options.dry)["castile"]
    row |= {**times.summary(), "times_us": [round(t, 2) for t in times.device]}
    if mapping != default:
        alike(_every(castile.compile(r.cascade, options.target, extents, default)(**inputs)), outs)


def _every(outs: Any) -> tuple[Any, ...]:
    return outs if isinstance(outs, tuple) else (outs,)


# A climb


def tune_row(r: Race, options: Options, row: Row) -> None:
    """Climb from the default mapping by one choice at a time, then race the best against it.

    Every mapping tried stands in ``trials`` with its time or what was wrong with it.
    """
    extents = extents_of(r, options)
    target = options.target
    default = best = default_mapping(r.cascade, target, extents)
    inputs = r.prepare(tensors(r.cascade, extents, 0, options.device))
    usual = castile.compile(r.cascade, target, extents, default)
    wanted = usual(**inputs)
    calls = {"default": partial(usual, **inputs, out=wanted)}
    best_us = times_us(calls, options.dry, TRIED_CALLS)["default"].summary()["median_us"]
    row |= {"key": r.cascade.key, "extents": dict(extents), "default": default.to_dict()}
    trials = row["trials"] = [{"mapping": default.to_dict(), "median_us": best_us}]
    tried = {default}
    choices = space_of(r.cascade, extents, target, device_of(target)).choices
    end = time.monotonic() + min(CLIMB_S, 0.6 * options.left_s()) / (60 if options.dry else 1)
    climbing = True
    while climbing:
        climbing = False
        for mapping in neighbours(best, choices):
            if time.monotonic() > end:
                break
            if mapping in tried:
                continue
            tried.add(mapping)
            trial: Row = {"mapping": mapping.to_dict()}
            try:
                if not fits(r, mapping, extents, target):
                    continue
                kernel = castile.compile(r.cascade, target, extents, mapping)
                outs = kernel(**inputs)
                alike(_every(wanted), outs)
                measured = times_us({"it": partial(kernel, **inputs, out=outs)}, options.dry, TRIED_CALLS)["it"]
                trial["median_us"] = measured.summary()["median_us"]
            except Exception as error:  # what does not compile, does not fit or computes something else
                trial["error"] = f"{type(error).__name__}: {error}"[:400]
                if not usable(options):
                    row["at fault"] = trial
                    raise
            trials.append(trial)
            if trial.get("median_us", best_us) < BETTER * best_us:
                best, best_us, climbing = mapping, trial["median_us"], True
                break
    row["mapping"] = best.to_dict()
    kernel = castile.compile(r.cascade, target, extents, best)
    outs = kernel(**inputs)
    calls["best"] = partial(kernel, **inputs, out=outs)
    row["times"] = {name: times.summary() for name, times in times_us(calls, options.dry).items()}
    row["speed"] = round(row["times"]["default"]["median_us"] / row["times"]["best"]["median_us"], 4)
    row["worst"] = checked_again(kernel, extents, inputs, outs, 0)


def neighbours(at: Tuned, choices: tuple[Choice, ...]) -> Iterator[Tuned]:
    """Mappings that differ by one choice, by a step up or down where there are many values; and what goes together."""
    yield from (changed(at, change) for change in CHANGES if len(change) > 1)
    for choice in choices:
        part = getattr(at, choice.part)
        value = part.get(choice.name, choice.default)
        above = min((v for v in choice.values if v > value), default=None)
        below = max((v for v in choice.values if v < value), default=None)
        for other in (above, below):
            if other is None or (choice.part == "tiles" and other < min(LEAST_TILE, value)):
                continue
            try:
                parts = {**part, choice.name: other}
                if choice.part == "splits":
                    parts = {rank: pieces for rank, pieces in parts.items() if pieces > 1}
                yield replace(at, **{choice.part: parts})
            except CastileError:
                continue
