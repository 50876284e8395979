"""Registers foreseen before compiling, against rows of what compilers took."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("xgboost")

from castile.autotune.compiled import compiled_rows, foreseen, register_model, register_scores, trained
from castile.ir.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples" / "cascades"
TABLE = ROOT / "benchmarks" / "results" / "cross_compile.jsonl"


def some_lines() -> list[str]:
    return [x for x in TABLE.read_text().splitlines() if json.loads(x)["target"] == "cuda:90"][::3]


def test_what_is_learned_is_nearer_than_the_plain_model() -> None:
    data = compiled_rows(some_lines(), EXAMPLES)
    found = register_scores(data)
    assert found["rows"] == len(data) > 30
    assert found["error"] < found["plain_error"]
    assert found["spilling"] == (data.spills > 0).sum()


def test_a_model_is_kept_and_asked(tmp_path: Path) -> None:
    data = compiled_rows(some_lines(), EXAMPLES)
    rows = [tuple(row) for row in data.rows]
    trained(data).save(tmp_path)
    ours, plain = (foreseen(rows, model) for model in (register_model(tmp_path), None))
    assert np.array_equal(plain, data.rows[:, 0])
    off = [np.abs(np.minimum(x, data.limits) / data.registers - 1).mean() for x in (ours, plain)]
    assert off[0] < 0.5 * off[1]
    assert len(foreseen([], register_model(tmp_path))) == 0


def test_a_model_that_is_no_model_is_not_asked(tmp_path: Path) -> None:
    assert register_model(tmp_path) is None
    (tmp_path / "model.json").write_text("{}")
    assert register_model(tmp_path) is None


def test_foreign_rows_are_one_error() -> None:
    for line in ("", "{}", "[1]", '{"example": "../x", "target": "cuda:90", "registers": 1, "spill_bytes": 0}'):
        with pytest.raises(InputError, match="no row of compiled kernels"):
            compiled_rows([line], EXAMPLES)
    with pytest.raises(InputError, match="no row tells of an example"):
        compiled_rows(some_lines()[:1], EXAMPLES / "nowhere")
