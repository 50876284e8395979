"""Registers and spills foreseen before anything is compiled, held against what compilers then took.

A row is what `benchmarks/bench_cross_compile.py` writes: an example, a target, the mapping, and of the compiled kernels
the registers of a thread and the bytes that it spills. The plain prediction is the register model of `passes`; a cost
model learns by how much a compiler takes more or less.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..costmodel.features import NAMES, features
from ..costmodel.model import CostModel
from ..costmodel.shipped import DATA
from ..ir.cascade import Cascade
from ..ir.device import DEVICES, Device
from ..ir.errors import CastileError, InputError
from ..ir.mapping import Mapping as Tuned
from ..ir.parse import parse
from ..ir.tile import Dot, Fold, For, Load, Map, Store, TileKernel, operations
from ..passes.mapped import mapped, nominal
from ..passes.registers import SHARED, chained, register_bytes, registers_free

Array = Any

# Parts into which the examples are dealt; each is foreseen by a model of the others.
PARTS = 20

KINDS = (Dot, Load, Store, Map, Fold, For)
UNITS = (*sorted(SHARED), "mfma", "wmma")

# What is known of a kernel before it is compiled. The first two are not learned from: they are where learning begins.
OWN = ("registers", "limit", "tiles", "beside", "chained", "warps", "stages", "lanes")
OFFERED = (
    *OWN,
    *(f"operations_{kind.__name__}" for kind in KINDS),
    *("tensors", "indices", "grid"),
    *(f"unit_{u}" for u in UNITS),
    *NAMES,
)

# The model of registers that ships with castile.
SHIPPED = DATA / "registers"


@dataclass(frozen=True, slots=True)
class Compiled:
    """``rows`` ``[N, F]``; and ``[N]`` each: registers of a thread as `passes` foresees them, as there are, as
    were taken; bytes spilled; the example."""

    rows: Array
    plain: Array
    limits: Array
    registers: Array
    spills: Array
    examples: Array

    def __len__(self) -> int:
        return len(self.registers)

    @property
    def needed(self) -> Array:
        """Registers of a thread that kernels would take were there enough: what they spill counts."""
        return self.registers + self.spills / 4


def compiled_rows(lines: Iterable[str], cascades: Path) -> Compiled:
    """Rows of JSON with their features; cascades are read from a folder by the names of the examples.

    Raises `InputError` for what is no such row. Rows of an example that is not there are left out.
    """
    known: dict[str, tuple[Cascade, dict[str, int]] | None] = {}
    found: list[tuple[Any, ...]] = []
    for line in lines:
        row = _row(line)
        name = row["example"]
        if name not in known:
            path = cascades / f"{name}.cascade"
            c = parse(path.read_text(encoding="utf-8")) if os.path.isfile(path) else None
            known[name] = None if c is None else (c, nominal(c))
        here, device = known[name], DEVICES.get(row["target"])
        if here is None or device is None or "error" in row:
            continue
        mapping = Tuned.from_json(row["mapping"])
        try:
            kernels = mapped(here[0], mapping, here[1]).kernels
        except CastileError:
            continue
        most = max((kernel_row(k, here[1], device, mapping) for k in kernels), default=None)
        if most is not None and row["registers"] > 0:
            found.append((most, row["registers"], row["spill_bytes"], name))
    rows = np.array([f for f, *_ in found], dtype=float)
    if not len(rows):
        raise InputError("no row tells of an example that is there", hint="--cascades names their folder")
    taken, spills, names = (np.array([f[i] for f in found]) for i in (1, 2, 3))
    return Compiled(rows, np.minimum(rows[:, 0], rows[:, 1]), rows[:, 1], taken.astype(float), spills, names)


def _row(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
        good = all(isinstance(row[n], str) for n in ("example", "target")) and "/" not in row["example"]
        if good and ("error" in row or (type(row["registers"]) is type(row["spill_bytes"]) is int and row["mapping"])):
            return dict(row)
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    raise InputError(
        "a line is no row of compiled kernels", got=line[:60], hint="benchmarks/bench_cross_compile.py writes them"
    )


def kernel_row(k: TileKernel, extents: Mapping[str, int], device: Device, mapping: Tuned) -> tuple[float, ...]:
    """The features of a kernel (`OFFERED`): the registers of a thread that `passes` foresees and those that there are
    first."""
    warps, stages = mapping.knob("warps"), mapping.knob("stages")
    each = 4 * warps * device.warp
    limit = min(device.registers_per_thread, device.registers_per_unit // (warps * device.warp))
    tiles = register_bytes(k, device, warps, stages) / each
    beside = limit - registers_free(k, device, warps) / each
    counts = Counter(type(op) for op in operations(k.body))
    own = (tiles + beside, limit, tiles, beside, float(bool(chained(k))), warps, stages, device.warp)
    shape = (len(k.tensors), sum(len(p.indices) for p in k.tensors), len(k.grid))
    units = tuple(float(u in device.features) for u in UNITS)
    return (*own, *(counts[kind] for kind in KINDS), *shape, *units, *features((k,), extents, device, mapping))


def trained(data: Compiled, seed: int = 0) -> CostModel:
    """A model of all the rows, for `foreseen`."""
    _, example = np.unique(data.examples, return_inverse=True)
    label = np.log(data.needed) - np.log(np.maximum(1.0, data.plain))
    return CostModel.train(data.rows, label, example, seed, 1, OFFERED)


def register_model(folder: Path = SHIPPED) -> CostModel | None:
    """The model of registers that ships with castile; None where there is none, or one of other features."""
    with suppress(InputError):
        return CostModel.load(folder, OFFERED)
    return None


def foreseen(rows: Sequence[tuple[float, ...]], model: CostModel | None) -> Array:
    """The registers of a thread that kernels will take, ``[N]``, as far as is known before they are compiled; more than
    there are where they will spill. ``rows`` are of `kernel_row`. Without a model, as `passes` foresees them."""
    known = np.array(rows, dtype=float).reshape(len(rows), len(OFFERED))
    plain = known[:, OWN.index("registers")]
    if model is None or not len(rows):
        return plain
    return np.exp(model.predict(known)[0]) * np.maximum(1.0, np.minimum(plain, known[:, OWN.index("limit")]))


def register_scores(data: Compiled, seed: int = 0) -> dict[str, float]:
    """How well registers are foreseen for examples that were left out of training, beside `passes` alone.

    ``error`` is the mean relative error, ``median_error`` its median, ``r2`` of registers themselves; ``spilling`` are
    the rows that spill, ``spills_missed`` and ``spills_feared`` those foreseen wrongly either way, where what is
    foreseen exceeds the registers that there are.
    """
    names, example = np.unique(data.examples, return_inverse=True)
    part = np.random.default_rng(seed).permutation(len(names))[example] % PARTS
    base, guess = np.log(np.maximum(1.0, data.plain)), np.full(len(data), np.nan)
    label = np.log(data.needed) - base
    for p in np.unique(part):
        test = part == p
        if not test.all():
            model = CostModel.train(data.rows[~test], label[~test], example[~test], seed, 1, OFFERED)
            guess[test] = np.exp(model.predict(data.rows[test])[0] + base[test])
    known = np.isfinite(guess)
    if not known.any():
        return {}
    spills, limits = data.spills[known] > 0, data.limits[known]
    found = {"rows": float(known.sum()), "examples": float(len(names)), "spilling": float(spills.sum())}
    for prefix, foreseen in (("", guess[known]), ("plain_", data.rows[known, 0])):
        feared = foreseen > limits
        errors = np.abs(np.minimum(foreseen, limits) / data.registers[known] - 1)
        wrong = np.minimum(foreseen, limits) - data.registers[known]
        spread = np.sum((data.registers[known] - data.registers[known].mean()) ** 2)
        found |= {
            f"{prefix}error": float(errors.mean()),
            f"{prefix}median_error": float(np.median(errors)),
            f"{prefix}r2": float(1 - np.sum(wrong**2) / max(1e-12, float(spread))),
            f"{prefix}spills_missed": float((spills & ~feared).sum()),
            f"{prefix}spills_feared": float((feared & ~spills).sum()),
        }
    return found
