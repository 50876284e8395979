"""The cost model: boosted trees that say how far above the roofline a candidate will lie, and how sure that is.

Several models, each trained on rows drawn with replacement, predict the logarithm of time over roofline. Files are
XGBoost's JSON with a list of checksums. XGBoost's loader may crash on a file that was tampered with, so a model is
read in a child process first; only one that the child survives is read here.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..ir.errors import InputError, UsageError
from .features import NAMES, schema

Array = Any

BAGS, ROUNDS = 5, 200
PARAMETERS = {"max_depth": 6, "eta": 0.08, "subsample": 0.8, "min_child_weight": 2.0, "verbosity": 0, "nthread": 1}

LARGEST_BYTES = 64 << 20
_LIST = "model.json"


def _xgboost() -> Any:
    try:
        import xgboost
    except ImportError as error:
        raise UsageError("the cost model needs xgboost", hint="pip install 'castile[tune]'") from error
    return xgboost


@dataclass(frozen=True, slots=True)
class CostModel:
    """A trained ensemble. ``info`` says what it was trained on."""

    boosters: tuple[Any, ...]
    info: Mapping[str, Any]

    @classmethod
    def train(cls, rows: Array, ratios: Array, groups: Array, seed: int = 0, bags: int = BAGS) -> CostModel:
        """A model of the logarithm of time over roofline. ``rows`` is ``[N, F]`` of features, ``ratios`` ``[N]``, and
        ``groups`` ``[N]`` numbers the workload of each row: all weigh the same, however many rows they have."""
        xgboost = _xgboost()
        rng = np.random.default_rng(seed)
        _, place, counts = np.unique(groups, return_inverse=True, return_counts=True)
        weights = len(rows) / (len(counts) * counts[place])
        boosters = []
        for bag in range(bags):
            drawn = rng.integers(0, len(rows), len(rows)) if bags > 1 else np.arange(len(rows))
            data = xgboost.DMatrix(rows[drawn], label=ratios[drawn], weight=weights[drawn], nthread=1)
            boosters.append(xgboost.train({**PARAMETERS, "seed": seed + bag}, data, ROUNDS))
        return cls(tuple(boosters), {"schema": schema(), "rows": len(rows), "workloads": len(counts), "seed": seed})

    def predict(self, rows: Array) -> tuple[Array, Array]:
        """Mean and deviation of the logarithm of time over roofline, ``[N]`` each."""
        data = _xgboost().DMatrix(np.asarray(rows, dtype=float), nthread=1)
        found = np.array([b.predict(data) for b in self.boosters])
        return found.mean(axis=0), found.std(axis=0)

    def save(self, folder: str | Path) -> None:
        """Write the model into a folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        sums = {}
        for i, b in enumerate(self.boosters):
            raw = bytes(b.save_raw("ubj"))
            (folder / f"trees-{i}.ubj").write_bytes(raw)
            sums[f"trees-{i}.ubj"] = hashlib.sha256(raw).hexdigest()
        (folder / _LIST).write_text(json.dumps({**self.info, "files": sums}, indent=1) + "\n")

    @classmethod
    def load(cls, folder: str | Path, trusted: bool = False) -> CostModel:
        """Read a model that `save` wrote; one that is ``trusted``, since it came with castile, without trying it in a
        child process first. Raises `InputError` for files that are damaged, foreign or of features that this castile
        does not compute."""
        folder = Path(folder)
        info = _list_of(folder)
        files = []
        for name, wanted in sorted(info["files"].items()):
            raw = _read(folder / name)
            if hashlib.sha256(raw).hexdigest() != wanted:
                raise InputError(
                    f"{folder / name} is not the file that the model was saved with", hint="train it again"
                )
            files.append(raw)
        if not trusted:
            _try_in_child(folder, files)
        xgboost = _xgboost()
        boosters = []
        for raw in files:
            b = xgboost.Booster({"nthread": 1})
            b.load_model(bytearray(raw))
            boosters.append(b)
        return cls(tuple(boosters), {k: v for k, v in info.items() if k != "files"})


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            raw = file.read(LARGEST_BYTES + 1)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
    if len(raw) > LARGEST_BYTES:
        raise InputError(f"{path} is too large", expected=f"at most {LARGEST_BYTES >> 20} MiB")
    return raw


def _list_of(folder: Path) -> dict[str, Any]:
    raw = _read(folder / _LIST)
    try:
        info = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{folder / _LIST} is no JSON: {str(error)[:80]}", hint="train the model again") from None
    files = info.get("files") if isinstance(info, dict) else None
    good = isinstance(files, dict) and 0 < len(files) <= 64
    if not good or not all(n == f"trees-{i}.ubj" for i, n in enumerate(sorted(files or ()))):
        raise InputError(f"{folder / _LIST} lists no model", hint="train the model again")
    if info.get("schema") != schema():
        raise InputError(
            f"{folder} was trained on other features", expected=schema(), got=str(info.get("schema"))[:40],
            hint="train it again: castile costmodel train",
        )  # fmt: skip
    return dict(info)


_CHILD = """
import sys
sys.path[:] = [p for p in sys.path if p]
import json, resource
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
import numpy, xgboost
raw = bytearray(sys.stdin.buffer.read())
b = xgboost.Booster({'nthread': 1})
b.load_model(raw)
width = int(sys.argv[1])
out = b.predict(xgboost.DMatrix(numpy.zeros((2, width)), nthread=1))
assert b.num_features() == width and out.shape == (2,) and numpy.isfinite(out).all()
"""


def _try_in_child(folder: Path, files: list[bytes]) -> None:
    """Load the trees in a process that may crash."""
    for i, raw in enumerate(files):
        command = [sys.executable, "-c", _CHILD, str(len(NAMES))]
        try:
            done = subprocess.run(command, input=raw, capture_output=True, timeout=60, check=False)
            code = done.returncode
        except subprocess.TimeoutExpired:
            code = -1
        if code:
            raise InputError(f"{folder / f'trees-{i}.ubj'} is no model that can be loaded", hint="train it again")
