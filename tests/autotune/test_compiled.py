"""Registers foreseen before compiling, against rows of what compilers took."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("xgboost")

from castile.autotune.compiled import compiled_rows, register_scores
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


def test_foreign_rows_are_one_error() -> None:
    for line in ("", "{}", "[1]", '{"example": "../x", "target": "cuda:90", "registers": 1, "spill_bytes": 0}'):
        with pytest.raises(InputError, match="no row of compiled kernels"):
            compiled_rows([line], EXAMPLES)
    with pytest.raises(InputError, match="no row tells of an example"):
        compiled_rows(some_lines()[:1], EXAMPLES / "nowhere")
