"""The benchmark of first results runs, for correctness only."""

from __future__ import annotations

import pytest

from castile.benchmarks import bench_start


def test_every_example_exists() -> None:
    assert all((bench_start.CASCADES / f"{name}.cascade").is_file() for name in bench_start.NAMES)


@pytest.mark.parametrize("measure", sorted(bench_start.MEASURES))
def test_each_measure_gives_a_time(measure: str) -> None:
    assert bench_start.MEASURES[measure]("softmax") > 0
