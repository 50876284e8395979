"""The cost model: learns, is saved and read back, and is not read where it was tampered with."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import castile
from castile.autotune.dataset import Dataset, dataset, leave_one_out, row_of
from castile.autotune.records import Record
from castile.costmodel import model as module
from castile.costmodel.features import NAMES, roofline_s
from castile.costmodel.model import CostModel
from castile.ir.device import DEVICES
from castile.ir.errors import InputError
from castile.ir.mapping import Mapping
from castile.passes.mapped import mapped

pytest.importorskip("xgboost")

TEXT = "def softmax(X: f32[n, k]) -> Y:\n    E[n, k] = exp(X[n, k])\n    Y[n, k] = E[n, k] / sum[k](E[n, k])\n"
CPU = DEVICES["cpu"]


def synthetic(count: int = 180) -> Dataset:
    """Rows whose time over roofline follows from two features, in 6 workloads of 2 operators."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(count, len(NAMES)))
    rooflines = np.full(count, 1e-3)
    times = rooflines * np.exp(1 + np.abs(rows[:, 3]) + 0.5 * rows[:, 7])
    workloads = np.array([f"w{i % 6}" for i in range(count)])
    return Dataset(rows, times, rooflines, workloads, np.array([w[1] in "012" and "a" or "b" for w in workloads]))


@pytest.fixture(autouse=True)
def fewer_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BAGS", 2)
    monkeypatch.setattr(module, "ROUNDS", 60)


@pytest.fixture(scope="module")
def trained() -> CostModel:
    data = synthetic()
    return CostModel.train(data.rows, data.ratios, data.workloads, bags=2)


def test_features_are_finite_and_named() -> None:
    c = castile.parse(TEXT)
    row, roofline = row_of(c, Mapping(), {"n": 64, "k": 512}, CPU)
    assert len(row) == len(NAMES)
    assert np.isfinite(row).all()
    other, _ = row_of(c, Mapping(tiles={"n": 4}), {"n": 64, "k": 512}, CPU)
    assert other != row
    assert 1e-9 < roofline < 1


def test_the_roofline_grows_with_the_work() -> None:
    c = castile.parse(TEXT)
    times = [roofline_s(mapped(c, Mapping(), {"n": n, "k": 512}).kernels, {"n": n, "k": 512}, CPU) for n in (64, 640)]
    assert times[1] == pytest.approx(10 * times[0], rel=0.05)


def test_it_learns(trained: CostModel) -> None:
    data = synthetic()
    mean, deviation = trained.predict(data.rows)
    assert np.corrcoef(mean, data.ratios)[0, 1] > 0.9
    assert (deviation >= 0).all()
    first, second = (CostModel.train(data.rows, data.ratios, data.workloads, 3, bags=1) for _ in range(2))
    assert np.array_equal(first.predict(data.rows)[0], second.predict(data.rows)[0])


def test_left_out_workloads() -> None:
    scores = leave_one_out(synthetic(), "shape")
    assert scores["top8"] <= scores["top1"]
    assert scores["top1"] < scores["roofline_top1"]
    assert scores["r2"] > 0.4
    assert leave_one_out(synthetic(), "operator")["top8"] >= 0


def test_save_and_load(trained: CostModel, tmp_path: Path) -> None:
    trained.save(tmp_path / "m")
    rows = synthetic().rows
    found = CostModel.load(tmp_path / "m")
    assert np.allclose(found.predict(rows)[0], trained.predict(rows)[0], atol=1e-6)
    assert found.info["workloads"] == 6


def test_what_was_tampered_with_is_not_read(
    trained: CostModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "m"
    trained.save(folder)
    trees, listed = folder / "trees-0.ubj", folder / "model.json"
    good, names = trees.read_bytes(), listed.read_text()
    trees.write_bytes(good.replace(b"0", b"1", 5))
    with pytest.raises(InputError, match="saved with"):
        CostModel.load(folder)
    trees.write_bytes(good)
    for text in ("", "{}", "[" * 5000, names.replace("trees-1", "../x"), names.replace('"schema": "', '"schema": "x')):
        listed.write_text(text)
        with pytest.raises(InputError):
            CostModel.load(folder)
    # A forged list does not help: what crashes the loader crashes a child.
    listed.write_text(names)
    monkeypatch.setattr(module, "LARGEST_BYTES", 1 << 26)
    bad = good[: len(good) // 2]
    trees.write_bytes(bad)
    forged = json.loads(names)
    forged["files"]["trees-0.ubj"] = module.hashlib.sha256(bad).hexdigest()
    listed.write_text(json.dumps(forged))
    with pytest.raises(InputError, match="no model"):
        CostModel.load(folder)


def test_rows_from_records() -> None:
    base = Record(TEXT, "cpu", "a CPU", {"n": 64, "k": 512}, Mapping(), time_s=1e-3, key="a")
    bad = Record(TEXT, "cpu", "a CPU", {"n": 64, "k": 512}, Mapping(), "crash", key="a")
    data = dataset([base, bad], CPU)
    assert len(data) == 1
    assert data.ratios[0] == pytest.approx(np.log(1e-3 / data.rooflines[0]))
