"""The cost model: boosted trees that say how far above the roofline a candidate will lie, how sure that is, and which
candidates of a workload to try first.

Several ensembles, each trained by XGBoost on rows drawn with replacement, predict the logarithm of time over roofline.
Others predict the speed as a share of the workload's best, the fast rows weighing most: what tells workloads apart is
of no use in choosing among the mappings of one, and what carries over to a workload that was never seen is the order.
A model's folder holds ``model.json``, which says what it was trained on, and ``trees.bin``, arrays with a checksum:
nothing of it is executed, and what is damaged or foreign ends in one `InputError`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..ir.errors import InputError, UsageError
from .features import NAMES
from .trees import Trees, trees_from, trees_of

Array = Any

BAGS, ROUNDS = 5, 200

# What a row of no speed weighs in learning the order, where one that is the fastest of its workload weighs 1 more.
SLOWEST = 0.05
PARAMETERS = {"max_depth": 6, "eta": 0.08, "subsample": 0.8, "min_child_weight": 2.0, "verbosity": 0, "nthread": 1}

LARGEST_BYTES = 64 << 20
FORMAT = 1
_LIST, _TREES = "model.json", "trees.bin"


def _xgboost() -> Any:
    try:
        import xgboost
    except ImportError as error:
        raise UsageError("training a cost model needs xgboost", hint="pip install 'castile[tune]'") from error
    return xgboost


@dataclass(frozen=True, slots=True)
class CostModel:
    """A trained ensemble. ``info`` says what it was trained on; ``names`` are the features that it asks for, which may
    be fewer than those that this castile computes, ``offered``. The last ``orders`` ensembles predict speed."""

    trees: Trees
    info: Mapping[str, Any]
    names: tuple[str, ...] = NAMES
    offered: tuple[str, ...] = NAMES
    orders: int = 0

    @classmethod
    def train(
        cls,
        rows: Array,
        ratios: Array,
        groups: Array,
        seed: int = 0,
        bags: int = BAGS,
        names: tuple[str, ...] = NAMES,
        times: Array | None = None,
    ) -> CostModel:
        """A model of the logarithm of time over roofline. ``rows`` is ``[N, F]`` of features, which are called
        ``names``, ``ratios`` ``[N]``, and ``groups`` ``[N]`` numbers the workload of each row: all weigh the same,
        however many rows they have. With ``times`` ``[N]`` it learns the order within a workload too."""
        xgboost = _xgboost()
        rng = np.random.default_rng(seed)
        _, place, counts = np.unique(groups, return_inverse=True, return_counts=True)
        weights = len(rows) / (len(counts) * counts[place])
        labels = [(ratios, weights)]
        if times is not None:
            best = np.full(len(counts), np.inf)
            np.minimum.at(best, place, times)
            speed = best[place] / times
            labels.append((-speed, weights * (speed + SLOWEST)))
        boosters = []
        for label, weight in labels:
            for bag in range(bags):
                drawn = rng.integers(0, len(rows), len(rows)) if bags > 1 else np.arange(len(rows))
                data = xgboost.DMatrix(rows[drawn], label=label[drawn], weight=weight[drawn], nthread=1)
                boosters.append(xgboost.train({**PARAMETERS, "seed": seed + bag}, data, ROUNDS))
        some = np.asarray(rows[:64], dtype=float)
        asked = xgboost.DMatrix(some, nthread=1)
        trees = trees_from(boosters, some, [b.predict(asked) for b in boosters])
        info = {"rows": len(rows), "workloads": len(counts), "seed": seed}
        return cls(trees, info, names, names, bags * (len(labels) - 1))

    def predict(self, rows: Array) -> tuple[Array, Array]:
        """Mean and deviation of the logarithm of time over roofline, ``[N]`` each, for rows of all features."""
        found = self._asked(rows)[: len(self.trees.roots) - self.orders]
        return found.mean(axis=0), found.std(axis=0)

    def order(self, rows: Array, rooflines: Array) -> Array:
        """Numbers ``[N]`` for candidates of one workload: the least is to be tried first. ``rooflines`` in seconds."""
        if not self.orders:
            first: Array = self.predict(rows)[0] + np.log(rooflines)
            return first
        told: Array = self._asked(rows)[-self.orders :].mean(axis=0)
        return told

    def _asked(self, rows: Array) -> Array:
        columns = [self.offered.index(n) for n in self.names]
        return self.trees.predict(np.asarray(rows)[:, columns])

    def save(self, folder: str | Path) -> None:
        """Write the model into a folder, in place of one that is there: whole, or not at all."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        raw = self.trees.to_bytes()
        about = {
            **self.info,
            "format": FORMAT,
            "features": list(self.names),
            "trees": [len(r) for r in self.trees.roots],
            "orders": self.orders,
            "bases": list(self.trees.bases),
            "sha256": hashlib.sha256(raw).hexdigest(),
        }
        files = {_TREES: raw, _LIST: (json.dumps(about, indent=1) + "\n").encode()}
        made = {name: folder / f".{name}.{os.getpid()}" for name in files}
        try:
            for name, data in files.items():
                made[name].write_bytes(data)
            for name in files:
                os.replace(made[name], folder / name)
        finally:
            for path in made.values():
                with suppress(OSError):
                    path.unlink()

    @classmethod
    def load(cls, folder: str | Path, offered: tuple[str, ...] = NAMES) -> CostModel:
        """Read a model that `save` wrote, to be asked with rows of the features ``offered``. Raises `InputError` for
        files that are damaged, foreign or of features that are not among them."""
        folder = Path(folder)
        info = _list_of(folder, offered)
        raw = _read(folder / _TREES)
        if hashlib.sha256(raw).hexdigest() != info["sha256"]:
            raise InputError(f"{folder / _TREES} is not the file that the model was saved with", hint="train it again")
        try:
            trees = trees_of(raw, info["trees"], info["bases"], len(info["features"]))
        except InputError as error:
            raise InputError(f"{folder / _TREES} holds no model: {error.message}", hint="train it again") from None
        about: dict[str, Any] = {k: info[k] for k in ("rows", "workloads", "seed") if k in info}
        return cls(trees, about, tuple(info["features"]), offered, info.get("orders", 0))


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            raw = file.read(LARGEST_BYTES + 1)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
    if len(raw) > LARGEST_BYTES:
        raise InputError(f"{path} is too large", expected=f"at most {LARGEST_BYTES >> 20} MiB")
    return raw


def _list_of(folder: Path, offered: tuple[str, ...]) -> dict[str, Any]:
    """What a model's list says, checked."""
    raw = _read(folder / _LIST)
    try:
        info = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{folder / _LIST} is no JSON: {str(error)[:80]}", hint="train the model again") from None
    names = info.get("features") if isinstance(info, dict) else None
    if not isinstance(names, list) or not names or len(names) > 1000 or not all(isinstance(n, str) for n in names):
        raise InputError(f"{folder / _LIST} lists no model", hint="train the model again")
    if lost := [n for n in names if n not in offered]:
        raise InputError(
            f"{folder} was trained on a feature that this castile does not compute", got=lost[0][:40],
            expected="those of castile costmodel info", hint="train it again: castile costmodel train",
        )  # fmt: skip
    counts, bases = info.get("trees"), info.get("bases")
    good = (
        info.get("format") == FORMAT
        and isinstance(info.get("sha256"), str)
        and isinstance(counts, list)
        and isinstance(bases, list)
        and 0 < len(counts) == len(bases) <= 64
        and all(type(n) is int and 0 < n <= 10_000 for n in counts)
        and all(type(b) in (int, float) and abs(b) < 1e9 and math.isfinite(b) for b in bases)
        and all(type(info.get(n, 0)) is int for n in ("rows", "workloads", "seed", "orders"))
        and 0 <= info.get("orders", 0) < len(counts)
    )
    if not good:
        raise InputError(f"{folder / _LIST} lists no model that this castile reads", hint="train the model again")
    return dict(info)
