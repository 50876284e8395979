"""What ships: rows that are whole and a model that loads, both refused where they are not what they were."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from castile.autotune.dataset import regrets, row_of, shipped
from castile.autotune.table import read_table
from castile.costmodel.features import NAMES, schema
from castile.costmodel.shipped import COLUMNS, DATA, device_from_dict, device_to_dict, shipped_model, shipped_rows
from castile.ir.device import DEVICES
from castile.ir.errors import InputError
from castile.ir.mapping import KNOBS, Mapping
from castile.ir.parse import parse


def test_rows_are_whole() -> None:
    rows = shipped_rows()
    families = {"attention", "softmax", "rmsnorm", "gemm", "gemm_int4"}
    assert families <= set(rows.cascades)
    data = shipped()
    assert len(set(data.workloads)) >= 12
    assert len(rows) == len(data) >= 12 * 190
    assert np.isfinite(rows.features).all()
    assert (rows.times > 0).all()
    assert (rows.rooflines > 0).all()
    for name, text in rows.about["cascades"].items():
        assert parse(text).name == name
    for mapping in rows.mappings[::200]:
        assert Mapping.from_json(mapping).to_json() == mapping


def test_a_feature_is_not_taken_for_the_column_of_its_name() -> None:
    rows = shipped_rows()
    foreseen = np.log2(1 + 1e9 * rows.rooflines)
    assert np.allclose(rows.features[:, NAMES.index("roofline_s")], foreseen, atol=0.01)


def test_each_workload_is_a_table_to_replay() -> None:
    (path, *_) = sorted((DATA / "t4").glob("softmax-*.json.gz"))
    table = read_table(path)
    assert len(table) > 150
    assert 0 < table.best < 1e3


def test_they_are_small() -> None:
    assert sum(p.stat().st_size for p in DATA.rglob("*") if p.is_file()) < 3 << 20


def test_the_model_beats_the_roofline_on_its_own_rows() -> None:
    model, data = shipped_model(), shipped()
    assert model is not None
    order = model.order(data.rows, data.rooflines)
    ours, plain = (np.mean(regrets(g, data.times, data.workloads, 1)) for g in (order, np.log(data.rooflines)))
    assert ours < plain
    guess = model.predict(data.rows)[0]
    assert np.median(np.abs(guess - data.ratios)) < 0.1


def test_it_knows_the_kernels_that_castile_makes_now() -> None:
    """Features of a mapping, computed now, lead to the time that was measured."""
    rows, model, off = shipped_rows(), shipped_model(), []
    assert model is not None
    for i in range(0, len(rows), 60):
        c, mapping = parse(rows.about["cascades"][rows.cascades[i]]), Mapping.from_json(rows.mappings[i])
        row, roofline = row_of(c, mapping, json.loads(rows.shapes[i]), device_from_dict(rows.about["device"]))
        off.append(abs(model.predict(np.array([row]))[0][0] + np.log(roofline / rows.times[i])))
    assert np.median(off) < 0.15


def test_damage_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    with pytest.raises(InputError, match="no table"):
        shipped_rows(folder)
    for name in ("rows.csv.gz", "table.json"):
        shutil.copy(DATA / name, folder / name)
    assert len(shipped_rows(folder)) > 0
    about = json.loads((folder / "table.json").read_text())
    (folder / "table.json").write_text(json.dumps({**about, "schema": "x"}))
    with pytest.raises(InputError, match="other features"):
        shipped_rows(folder)
    (folder / "table.json").write_text(json.dumps(about))
    (folder / "rows.csv.gz").write_bytes(gzip.compress(b"a,b\n1,2\n"))
    with pytest.raises(InputError, match="not the file"):
        shipped_rows(folder)


def test_rows_older_than_a_knob_had_its_default(tmp_path: Path) -> None:
    knob = next(n for n in NAMES if n.startswith("knob_"))
    text = gzip.decompress((DATA / "rows.csv.gz").read_bytes()).decode()
    rows = list(csv.reader(io.StringIO(text)))
    at = rows[0].index(knob)
    made = io.StringIO()
    csv.writer(made).writerows([r[:at] + r[at + 1 :] for r in rows])
    packed = gzip.compress(made.getvalue().encode())
    about = json.loads((DATA / "table.json").read_text())
    names = rows[0][:at] + rows[0][at + 1 :]
    names = names[len(COLUMNS) - len(NAMES) :]
    (tmp_path / "rows.csv.gz").write_bytes(packed)
    about |= {"sha256": hashlib.sha256(packed).hexdigest(), "schema": schema(names)}
    (tmp_path / "table.json").write_text(json.dumps(about))
    column = shipped_rows(tmp_path).features[:, NAMES.index(knob)]
    assert (column == KNOBS[knob.removeprefix("knob_")].default).all()


@pytest.mark.parametrize("target", ["cpu", "cuda:90"])
def test_devices_as_json(target: str) -> None:
    assert device_from_dict(json.loads(json.dumps(device_to_dict(DEVICES[target])))) == DEVICES[target]


def test_ties_fall_by_lot() -> None:
    times = np.arange(1.0, 101.0)
    (found,) = regrets(np.zeros(100), times, np.array(["w"] * 100), 1)
    assert found > 0
