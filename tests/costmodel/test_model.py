"""The cost model: learns, is saved and read back, and is not read where it was tampered with."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

import castile
from castile.autotune.dataset import Dataset, dataset, learned, leave_one_out, regrets, row_of
from castile.autotune.record import Record
from castile.costmodel import model as module
from castile.costmodel.features import NAMES, roofline_s
from castile.costmodel.model import CostModel
from castile.costmodel.trees import NODE, trees_of
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
    return learned(synthetic(), bags=2)


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
    assert np.mean(regrets(trained.order(data.rows, data.rooflines), data.times, data.workloads, 2)) < 0.05
    plain = CostModel.train(data.rows, data.ratios, data.workloads, bags=1)
    assert np.array_equal(plain.order(data.rows, data.rooflines), plain.predict(data.rows)[0] + np.log(data.rooflines))
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
    rows, rooflines = synthetic().rows, synthetic().rooflines
    found = CostModel.load(tmp_path / "m")
    assert np.allclose(found.predict(rows)[0], trained.predict(rows)[0], atol=1e-6)
    assert np.allclose(found.order(rows, rooflines), trained.order(rows, rooflines), atol=1e-6)
    assert found.info["workloads"] == 6


def test_a_model_serves_a_castile_with_more_features(trained: CostModel, tmp_path: Path) -> None:
    data = synthetic()
    fewer = CostModel(trained.trees, trained.info, (*NAMES[1:], NAMES[0]), orders=trained.orders)
    turned = np.concatenate([data.rows[:, -1:], data.rows[:, :-1]], axis=1)
    fewer.save(tmp_path)
    assert np.allclose(CostModel.load(tmp_path).predict(turned)[0], trained.predict(data.rows)[0])


def test_what_was_tampered_with_is_not_read(trained: CostModel, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    trained.save(folder)
    trees, listed = folder / "trees.bin", folder / "model.json"
    good, names = trees.read_bytes(), listed.read_text()
    trees.write_bytes(good.replace(b"\0", b"\1", 5))
    with pytest.raises(InputError, match="saved with"):
        CostModel.load(folder)
    trees.unlink()
    with pytest.raises(InputError, match="cannot read"):
        CostModel.load(folder)
    trees.write_bytes(good)
    about = json.loads(names)
    changes = [
        {"features": ["x"]},
        {"features": []},
        {"format": 2},
        {"trees": []},
        {"trees": [-1]},
        {"trees": ["1"]},
        {"bases": [1e400] * 2},
    ]
    changes += [{"trees": [10**9]}, {"sha256": 3}, {"rows": "many"}, {"bases": None}, {"trees": {"a": 1}}]
    for text in ("", "{}", "[" * 5000, "3", *(json.dumps({**about, **change}) for change in changes)):
        listed.write_text(text)
        with pytest.raises(InputError):
            CostModel.load(folder)


def mutated(good: bytes, rng: np.random.Generator) -> bytes:
    """Bytes flipped, cut out, doubled or cut off."""
    bad, at = bytearray(good), int(rng.integers(len(good)))
    match int(rng.integers(5)):
        case 0:
            for place in rng.integers(0, len(bad), int(rng.integers(1, 9))):
                bad[place] ^= 1 << int(rng.integers(8))
        case 1:
            bad[at : at + 4] = rng.bytes(4)
        case 2:
            del bad[at : at + int(rng.integers(1, 64))]
        case 3:
            bad[at:at] = bad[at : at + int(rng.integers(1, 64))]
        case _:
            del bad[at:]
    return bytes(bad)


def test_mutated_files_end_in_one_error(trained: CostModel, tmp_path: Path) -> None:
    """Each mutation is refused by its checksum; with a checksum forged to fit it is refused, or a model all the same
    that says finite numbers of any row."""
    folder, rng = tmp_path / "m", np.random.default_rng(0)
    trained.save(folder)
    trees, listed = folder / "trees.bin", folder / "model.json"
    good, names = trees.read_bytes(), listed.read_bytes()
    about, refused = json.loads(names), 0
    rows = np.random.default_rng(1).normal(size=(40, len(NAMES)))
    for _ in range(300):
        bad = mutated(good, rng)
        if bad != good:
            trees.write_bytes(bad)
            listed.write_bytes(names)
            with pytest.raises(InputError):
                CostModel.load(folder)
        listed.write_text(json.dumps({**about, "sha256": hashlib.sha256(bad).hexdigest()}))
        try:
            assert np.isfinite(CostModel.load(folder).predict(rows)[0]).all()
        except InputError:
            refused += 1
        assert trees.read_bytes() == bad
    assert refused > 100
    trees.write_bytes(good)
    for _ in range(300):
        listed.write_bytes(mutated(names, rng))
        with contextlib.suppress(InputError):
            assert np.isfinite(CostModel.load(folder).predict(rows)[0]).all()


def test_saving_where_nothing_fits_leaves_the_old_model(
    trained: CostModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained.save(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    write = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        write(path, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        trained.save(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_trees_that_run_in_circles_or_deep_are_refused() -> None:
    leaf = (0, 1, 1, 2.0)
    assert trees_of(raw([(3, 1, 1, 0.5), leaf]), [1], [0.0], 4).predict(np.zeros((1, 4))) == [[2.0]]
    for nodes in (
        [(3, 0, 1, 0.5), leaf],
        [(3, 1, 2, 0.5), leaf],
        [(4, 1, 1, 0.5), leaf],
        [(-1, 1, 1, 0.5), leaf],
        [(3, 1, 1, float("nan")), leaf],
        [(0, i + 1, i + 1, 0.0) for i in range(100)] + [(0, 100, 100, 1.0)],
    ):
        with pytest.raises(InputError):
            trees_of(raw(nodes), [1], [0.0], 4)


def raw(nodes: list[tuple[int, int, int, float]]) -> bytes:
    return np.zeros(1, "<i4").tobytes() + np.array(nodes, NODE).tobytes()


def test_rows_from_records() -> None:
    base = Record(TEXT, "cpu", "a CPU", {"n": 64, "k": 512}, Mapping(), time_s=1e-3, key="a")
    bad = Record(TEXT, "cpu", "a CPU", {"n": 64, "k": 512}, Mapping(), "crash", key="a")
    data = dataset([base, bad], CPU)
    assert len(data) == 1
    assert data.ratios[0] == pytest.approx(np.log(1e-3 / data.rooflines[0]))
