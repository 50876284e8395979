"""Records as rows to train on, and how well a model does on workloads that it has not seen."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..costmodel.features import NAMES, features, roofline_s
from ..costmodel.model import BAGS, CostModel
from ..costmodel.shipped import DATA, shipped_rows
from ..ir.cascade import Cascade
from ..ir.device import Device
from ..ir.errors import CastileError
from ..ir.mapping import Mapping as Tuned
from ..ir.parse import parse
from ..passes.mapped import mapped
from .record import Record

Array = Any


@dataclass(frozen=True, slots=True)
class Dataset:
    """``rows`` ``[N, F]``, ``times`` and ``rooflines`` ``[N]`` in seconds; workload and operator of each row."""

    rows: Array
    times: Array
    rooflines: Array
    workloads: Array
    operators: Array

    def __len__(self) -> int:
        return len(self.times)

    @property
    def ratios(self) -> Array:
        return np.log(self.times / self.rooflines)

    def taken(self, which: Array) -> Dataset:
        """Some of the rows."""
        return Dataset(*(getattr(self, f)[which] for f in self.__dataclass_fields__))


def learned(data: Dataset, seed: int = 0, bags: int = BAGS) -> CostModel:
    """A model of the rows: their times, and the order within a workload."""
    return CostModel.train(data.rows, data.ratios, data.workloads, seed, bags, times=data.times)


def row_of(c: Cascade, mapping: Tuned, extents: Mapping[str, int], device: Device) -> tuple[tuple[float, ...], float]:
    """The features of a candidate and its roofline in seconds. Raises `CastileError` where it has no kernels."""
    kernels = mapped(c, mapping, extents).kernels
    return features(kernels, extents, device, mapping), roofline_s(kernels, extents, device)


def _ran(records: Iterable[Record], device: Device) -> Iterator[tuple[Record, tuple[tuple[float, ...], float]]]:
    """The trials that ran on a device's target, each with its features and roofline."""
    cascades: dict[str, Cascade] = {}
    for r in records:
        if r.status != "ok" or r.kind != "trial" or r.time_s is None or r.target != device.target:
            continue
        with suppress(CastileError):  # another castile could make kernels of this
            c = cascades.get(r.cascade) or cascades.setdefault(r.cascade, parse(r.cascade))
            yield r, row_of(c, r.mapping, r.shapes, device)


def dataset(records: Iterable[Record], device: Device) -> Dataset:
    """The trials that ran, as rows."""
    rows, times, rooflines, workloads, operators = [], [], [], [], []
    for r, (row, roofline) in _ran(records, device):
        rows.append(row)
        times.append(r.time_s)
        rooflines.append(roofline)
        workloads.append(f"{r.key} {r.device} {json.dumps(dict(sorted(r.shapes.items())))}")
        operators.append(r.key)
    return Dataset(*(np.array(x) for x in (rows, times, rooflines, workloads, operators)))


@dataclass(frozen=True, slots=True)
class Judged:
    """A trial beside what was known of it before it ran: its work in operations, its bytes of memory, and the time that
    the model foresaw in seconds, None without a model."""

    record: Record
    work: float
    memory_bytes: float
    predicted_s: float | None


def judged(records: Iterable[Record], device: Device, model: CostModel | None) -> list[Judged]:
    """The trials that ran on a device's target, judged."""
    found, rows, rooflines = [], [], []
    for r, (row, roofline) in _ran(records, device):
        found.append(r)
        rows.append(row)
        rooflines.append(roofline)
    if not found:
        return []
    guess = None if model is None else np.exp(model.predict(np.array(rows))[0]) * rooflines
    column = {name: i for i, name in enumerate(NAMES)}
    *units, memory = (
        np.exp2([row[column[name]] for row in rows]) - 1.0
        for name in ("matrix_flops", "vector_ops", "special_ops", "memory_bytes")
    )
    work = np.sum(units, axis=0)
    return [
        Judged(r, float(work[i]), float(memory[i]), None if guess is None else float(guess[i]))
        for i, r in enumerate(found)
    ]


def shipped(folder: Path = DATA) -> Dataset:
    """The rows that came with castile. Raises `InputError` where they are damaged."""
    rows = shipped_rows(folder)
    workloads = np.array([f"{c} {s}" for c, s in zip(rows.cascades, rows.shapes, strict=True)])
    return Dataset(rows.features, rows.times, rows.rooflines, workloads, np.array(rows.cascades))


def joined(a: Dataset, b: Dataset) -> Dataset:
    """The rows of both."""
    if not len(a) or not len(b):
        return a if len(a) else b
    return Dataset(*(np.concatenate([getattr(a, f), getattr(b, f)]) for f in a.__dataclass_fields__))


# How rows are held back: whole workloads, whole operators, or a tenth of the rows drawn at random. The last says
# little, as rows of the same workload remain; it stands here since others report it.
SPLITS = ("shape", "operator", "random")


def leave_one_out(data: Dataset, what: str, seed: int = 0) -> dict[str, float]:
    """How a model does on what was held back (`SPLITS`) when trained on the rest; shapes, of operators with several.

    Regret is by how much the best among the first choices is slower than the best of the workload, the mean over
    workloads; ``error`` is the mean relative error of time, ``r2`` that of its logarithm; ``roofline_*`` is what the
    roofline alone does.
    """
    if what == "random":
        keys = np.random.default_rng(seed).permutation(len(data)) % 10
    else:
        keys = data.workloads if what == "shape" else data.operators
    guess, order = np.full(len(data), np.nan), np.full(len(data), np.nan)
    for key in np.unique(keys):
        test = keys == key
        if not test.all():
            model = learned(data.taken(~test), seed)
            guess[test] = model.predict(data.rows[test])[0] + np.log(data.rooflines[test])
            order[test] = model.order(data.rows[test], data.rooflines[test])
    known = np.isfinite(guess)
    if not known.any():
        return {}
    if what == "shape":  # what has no other shape to learn from is a matter of the split by operator
        counts = {o: len(set(data.workloads[data.operators == o])) for o in np.unique(data.operators)}
        known &= np.array([counts[o] > 1 for o in data.operators])
        if not known.any():
            return {}
    result = scores(guess[known], data.times[known])
    result["workloads"] = float(len(set(data.workloads[known])))
    if what != "random":
        orders = {"": order, "roofline_": np.log(data.rooflines)}
        for (name, first), top in itertools.product(orders.items(), (1, 8)):
            found = regrets(first[known], data.times[known], data.workloads[known], top)
            result[f"{name}top{top}"] = float(np.mean(found))
    plain = scores(np.log(data.rooflines[known]), data.times[known])
    return {**result, **{f"roofline_{name}": value for name, value in plain.items()}}


def scores(guess: Array, times: Array) -> dict[str, float]:
    """Mean relative error of time, and R² of its logarithm, for guessed logarithms ``[N]``."""
    truth = np.log(times)
    spread = max(1e-12, float(np.sum((truth - truth.mean()) ** 2)))
    return {
        "error": float(np.mean(np.abs(np.exp(guess - truth) - 1))),
        "r2": float(1 - np.sum((guess - truth) ** 2) / spread),
    }


def regrets(order: Array, times: Array, workloads: Array, top: int) -> list[float]:
    """For each workload, by how much the best of its ``top`` rows of least ``order`` is slower than its best. Where
    rows tie, it is by lot which goes first: their place in a table tells of how it was made."""
    lots = np.random.default_rng(0).permutation(len(times))
    found = []
    for workload in np.unique(workloads):
        rows = workloads == workload
        here = times[rows]
        chosen = np.lexsort((lots[rows], order[rows]))[:top]
        found.append(float(here[chosen].min() / here.min() - 1))
    return found
