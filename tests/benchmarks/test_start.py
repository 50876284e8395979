"""The benchmark of first results runs, for correctness only."""

from __future__ import annotations

import re
import subprocess

import pytest

from castile.benchmarks import bench_start
from castile.benchmarks._rows import ROOT


def test_every_example_exists() -> None:
    assert all((bench_start.CASCADES / f"{name}.cascade").is_file() for name in bench_start.NAMES)


@pytest.mark.parametrize("measure", sorted(bench_start.MEASURES))
def test_each_measure_gives_a_time(measure: str) -> None:
    assert bench_start.MEASURES[measure]("softmax") > 0


def test_every_benchmark_of_make_bench_can_be_quick() -> None:
    made = subprocess.run(["make", "-n", "bench", "PY=python"], cwd=ROOT, capture_output=True, text=True, check=True)
    (line,) = re.findall(r"for file in (.*?);", made.stdout)
    assert len(line.split()) > 5
    for file in line.split():
        text = (ROOT / file).read_text(encoding="utf-8")
        assert '"--quick"' in text or "castile.benchmarks._command" in text, file
