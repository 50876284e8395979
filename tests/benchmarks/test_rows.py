"""Rows on disk and on the screen."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from castile.benchmarks._rows import (
    ROOT,
    Row,
    Versions,
    append_row,
    command_words,
    describe_versions,
    known_peak_gflops,
    read_rows,
    table,
)
from castile.benchmarks._stats import Interval


@pytest.fixture
def row(simulate: Any) -> Row:
    versions = Versions("3", "2", None, "unknown", "cc", "none")
    one = Interval(1.0, 0.99, 1.01)
    return Row(
        id="1",
        name="gemm",
        candidate="castile",
        baseline="torch",
        seconds=Interval(0.0021, 0.002, 0.0022),
        quartiles_s=(0.002, 0.0022),
        ratio=Interval(1.234, 1.2, 1.3),
        aa_ratio=one,
        gflops=123.45,
        gbytes_s=6.7,
        void=None,
        samples_s=(0.002, 0.0022),
        rounds_kept=2,
        rounds_dropped=0,
        calls_per_sample=3,
        cache="out",
        input_sets=16,
        allocates=False,
        allocator="retained",
        threads=2,
        peak_before_gflops=99.0,
        peak_after_gflops=98.0,
        peak_best_gflops=100.0,
        probe="fma",
        others_cores=0.0,
        load_average=0.1,
        seed=0,
        device=simulate().device,
        versions=versions,
        date="2025-01-01T00:00:00+00:00",
        command="python benchmarks/gemm.py",
    )


def test_a_row_survives_the_disk(row: Row, tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.jsonl"
    append_row(row, path)
    assert read_rows(path) == (json.loads(json.dumps(dataclasses.asdict(row))),)


def test_a_later_line_replaces_the_earlier_one_of_its_id(row: Row, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for line in (row, dataclasses.replace(row, id="2"), dataclasses.replace(row, void="peak")):
        append_row(line, path)
    assert [(r["id"], r["void"]) for r in read_rows(path)] == [("1", "peak"), ("2", None)]


def test_a_line_torn_by_a_crash_costs_only_itself(row: Row, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    append_row(row, path)
    with path.open("a") as file:
        file.write('{"id": "torn", "na')
    append_row(dataclasses.replace(row, id="2"), path)
    assert [r["id"] for r in read_rows(path)] == ["1", "2"]


def test_rows_written_at_once_do_not_mix(row: Row, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    long = dataclasses.replace(row, samples_s=(0.123456,) * 2000)

    def write(writer: int) -> None:
        for i in range(10):
            append_row(dataclasses.replace(long, id=f"{writer}-{i}"), path)

    writers = [threading.Thread(target=write, args=(i,)) for i in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(path.read_text().splitlines()) == len(read_rows(path)) == 40


def test_a_row_that_is_no_json_is_refused(row: Row, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        append_row(dataclasses.replace(row, gflops=math.inf), tmp_path / "rows.jsonl")


def test_the_known_peak_is_that_of_the_same_device_threads_and_probe(row: Row, tmp_path: Path) -> None:
    other = dataclasses.replace(row.device, cpu="another")
    for i, peak in enumerate((50.0, 70.0, 60.0)):
        append_row(
            dataclasses.replace(row, id=str(i), peak_after_gflops=peak, peak_before_gflops=40), tmp_path / "a.jsonl"
        )
    append_row(dataclasses.replace(row, device=other, peak_before_gflops=900.0), tmp_path / "b.jsonl")
    append_row(dataclasses.replace(row, probe="numpy-matmul", peak_before_gflops=900.0), tmp_path / "b.jsonl")
    append_row(dataclasses.replace(row, threads=4, peak_before_gflops=900.0), tmp_path / "b.jsonl")
    assert known_peak_gflops(tmp_path, row.device, 2, "fma") == 70.0
    assert known_peak_gflops(tmp_path, row.device, 8, "fma") == 0.0
    assert known_peak_gflops(tmp_path / "none", row.device, 2, "fma") == 0.0


def test_the_table_is_aligned_and_shouts_void(row: Row) -> None:
    baseline = dataclasses.replace(row, candidate="torch", ratio=row.aa_ratio, seconds=Interval(3e-6, 3e-6, 3e-6))
    text = table([baseline, dataclasses.replace(row, void="busy")])
    assert text == (
        "case  candidate    time     ±  GFLOP/s  GB/s        ratio          95%\n"
        "gemm  torch        3 µs  0.0%    123.5   6.7  (A/A) 1.000  0.990-1.010\n"
        "gemm  castile    2.1 ms  4.8%    123.5   6.7        1.234  1.200-1.300  VOID: busy"
    )


def test_versions_and_command_name_no_place_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "orig_argv", ["/some/python", f"{ROOT}{os.sep}benchmarks/gemm.py", "--only", "a b"])
    assert command_words() == "python benchmarks/gemm.py --only 'a b'"
    assert str(ROOT) not in str(describe_versions())
