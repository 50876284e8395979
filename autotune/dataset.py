"""Records as rows to train on, and how well a model does on workloads that it has not seen."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..costmodel.features import features, roofline_s
from ..costmodel.model import CostModel
from ..ir.cascade import Cascade
from ..ir.device import Device
from ..ir.errors import CastileError
from ..ir.mapping import Mapping as Tuned
from ..ir.parse import parse
from ..passes.mapped import mapped
from .records import Record

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


def row_of(c: Cascade, mapping: Tuned, extents: Mapping[str, int], device: Device) -> tuple[tuple[float, ...], float]:
    """The features of a candidate and its roofline in seconds. Raises `CastileError` where it has no kernels."""
    kernels = mapped(c, mapping, extents).kernels
    return features(kernels, extents, device, mapping), roofline_s(kernels, extents, device)


def dataset(records: Iterable[Record], device: Device) -> Dataset:
    """The trials that ran, as rows."""
    rows, times, rooflines, workloads, operators = [], [], [], [], []
    cascades: dict[str, Cascade] = {}
    for r in records:
        if r.status != "ok" or r.kind != "trial" or r.time_s is None or r.target != device.target:
            continue
        c = cascades.setdefault(r.cascade, parse(r.cascade))
        try:
            row, roofline = row_of(c, r.mapping, r.shapes, device)
        except CastileError:
            continue  # another castile could make kernels of this
        rows.append(row)
        times.append(r.time_s)
        rooflines.append(roofline)
        workloads.append(f"{r.key} {r.device} {json.dumps(dict(sorted(r.shapes.items())))}")
        operators.append(r.key)
    return Dataset(*(np.array(x) for x in (rows, times, rooflines, workloads, operators)))


def leave_one_out(data: Dataset, what: str, seed: int = 0) -> dict[str, float]:
    """How a model does on each workload (``what="shape"``) or operator (``what="operator"``) when trained on the rest.

    Regret is by how much the best among the first choices is slower than the best of the workload, the mean over
    workloads; ``error`` is the mean relative error of time, ``r2`` that of its logarithm; ``roofline_*`` is what the
    roofline alone does.
    """
    keys = data.workloads if what == "shape" else data.operators
    found: dict[str, list[float]] = {n: [] for n in ("top1", "top8", "roofline_top1", "roofline_top8")}
    guesses, truths = [], []
    for key in np.unique(keys):
        test = keys == key
        if test.all() or not test.any():
            continue
        model = CostModel.train(data.rows[~test], data.ratios[~test], data.workloads[~test], seed)
        guess = model.predict(data.rows[test])[0] + np.log(data.rooflines[test])
        guesses.append(guess)
        truths.append(np.log(data.times[test]))
        for workload in np.unique(data.workloads[test]):
            here = data.workloads[test] == workload
            times = data.times[test][here]
            for name, order in (("", guess[here]), ("roofline_", data.rooflines[test][here])):
                chosen = np.argsort(order, kind="stable")
                for top in (1, 8):
                    found[f"{name}top{top}"].append(float(times[chosen[:top]].min() / times.min() - 1))
    if not guesses:
        return {}
    guess, truth = np.concatenate(guesses), np.concatenate(truths)
    result = {name: float(np.mean(values)) for name, values in found.items()}
    result["error"] = float(np.mean(np.abs(np.exp(guess - truth) - 1)))
    result["r2"] = float(1 - np.sum((guess - truth) ** 2) / max(1e-12, float(np.sum((truth - truth.mean()) ** 2))))
    return result
