"""The command line that benchmarks share."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from castile.benchmarks import _command
from castile.benchmarks._command import Options, main, parse_options
from castile.benchmarks._rows import ROOT, read_rows
from castile.benchmarks.harness import Candidate, Case


@dataclass(frozen=True, slots=True)
class Bench:
    """A benchmark of a case that is right and one that is wrong, on a simulated machine whose peaks are scripted."""

    machine: Any
    folder: Path
    monkeypatch: pytest.MonkeyPatch

    def cases(self, options: Options) -> Iterator[Case[np.ndarray]]:
        def build(factor: int) -> Callable[[np.ndarray], Callable[[], np.ndarray]]:
            def call(inputs: np.ndarray) -> np.ndarray:
                self.machine.spend(0.01)
                return factor * inputs

            return lambda inputs: lambda: call(inputs)

        for name, factor in (("right", 2), ("wrong", 3)):
            yield Case(
                name=name,
                inputs=lambda rng: rng.standard_normal(8 if options.quick else 16),
                candidates=(Candidate("numpy", build(2), True), Candidate("other", build(factor), True)),
                baseline="numpy",
                check=lambda inputs, out: np.testing.assert_array_equal(np.asarray(out), 2 * inputs),
                flops=16,
                bytes=256,
                cache="in",
            )

    def run(self, *argv: str, only: str = "right", out: str = "rows.jsonl") -> int:
        self.monkeypatch.setattr(_command, "this_machine", lambda threads: contextlib.nullcontext(self.machine))
        self.monkeypatch.setattr(_command, "RESULTS", self.folder)  # where earlier rows are looked for
        arguments = ("--only", only, "--out", str(self.folder / out), *argv)
        return main("t", self.cases, arguments, self.machine.timer())

    def rows(self, out: str = "rows.jsonl") -> tuple[Mapping[str, object], ...]:
        return read_rows(self.folder / out)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, simulate: Any, tmp_path: Path) -> Callable[..., Bench]:
    return lambda *peaks: Bench(simulate(peaks=peaks), tmp_path, monkeypatch)


def test_quick_checks_and_times_nothing(bench: Callable[..., Bench], capsys: pytest.CaptureFixture[str]) -> None:
    made = bench(100.0)
    assert made.run("--quick", "--json") == 0
    assert json.loads(capsys.readouterr().out) == [{"name": "right", "wrong": None}]
    assert made.run("--quick", "--json", only="*") == 1
    assert "wrong: other: without timing" in json.loads(capsys.readouterr().out)[1]["wrong"]
    assert not (made.folder / "rows.jsonl").exists()


def test_rows_are_printed_and_kept(bench: Callable[..., Bench], capsys: pytest.CaptureFixture[str]) -> None:
    made = bench(100.0)
    assert made.run("--json", "--repeat", "2") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == list(made.rows())
    assert [row["candidate"] for row in printed] == ["numpy", "other"] * 2
    assert made.run() == 0
    assert capsys.readouterr().out.startswith("case ")


def test_a_void_case_is_measured_again_and_every_row_kept(bench: Callable[..., Bench]) -> None:
    made = bench(100.0, 50.0)
    assert made.run("--attempts", "2") == 3
    assert ["below" in str(row["void"]) for row in made.rows()] == [True] * 4


def test_one_attempt_that_is_not_void_is_enough(bench: Callable[..., Bench]) -> None:
    made = bench(100.0, 50.0, 100.0, 100.0, 0.0)
    assert made.run("--attempts", "3") == 0
    assert ["below" in str(row["void"]) for row in made.rows()] == [True, True, False, False]


def test_a_machine_that_was_slow_from_the_start_is_found_later(bench: Callable[..., Bench]) -> None:
    made = bench(50.0, 50.0, 100.0)
    assert made.run("--repeat", "2") == 0
    assert len((made.folder / "rows.jsonl").read_text().splitlines()) == 6
    assert ["50.0% below" in str(row["void"]) for row in made.rows()] == [True, True, False, False]


def test_earlier_rows_remember_the_peak(bench: Callable[..., Bench]) -> None:
    assert bench(100.0).run(out="a.jsonl") == 0
    assert bench(50.0).run(out="b.jsonl") == 3
    assert bench(50.0).run("--recalibrate", out="c.jsonl") == 0


def test_a_wrong_case_is_told_and_the_others_measured(
    bench: Callable[..., Bench], capsys: pytest.CaptureFixture[str]
) -> None:
    made = bench(100.0)
    assert made.run(only="*") == 1
    assert "WRONG    wrong: other: before timing" in capsys.readouterr().err
    assert {row["name"] for row in made.rows()} == {"right"}


def test_defaults() -> None:
    options = parse_options("t", [])
    assert options.out == ROOT / "benchmarks" / "results" / "t.jsonl"
    assert (options.quick, options.repeat, options.allocator) == (False, 1, "retained")


SHOW = """
import os
from castile.benchmarks._command import ensure_environment
print(os.getpid())
ensure_environment(3, {allocator!r})
names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_")
print(os.getpid(), *(os.environ.get(name) for name in names))
"""


@pytest.mark.parametrize(("allocator", "limits"), [("retained", ["0", str(1 << 40)]), ("default", ["None", "None"])])
def test_the_environment_is_set_by_one_restart(tmp_path: Path, allocator: str, limits: list[str]) -> None:
    script = tmp_path / "show.py"
    script.write_text(SHOW.format(allocator=allocator))
    environment = os.environ | {"MALLOC_MMAP_MAX_": "7", "OMP_NUM_THREADS": "1"}
    environment.pop(_command.RESTARTED, None)
    shown = subprocess.run((sys.executable, script), env=environment, capture_output=True, text=True, check=True)
    first, second, last = (line.split() for line in shown.stdout.splitlines())
    assert first == second == last[:1]
    assert last[1:] == ["3", "3", *limits]


def test_an_environment_that_cannot_be_had_does_not_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(_command.RESTARTED, "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with pytest.raises(RuntimeError, match="not as wanted after a restart"):
        _command.ensure_environment(3)


def test_the_selfcheck_runs_quickly() -> None:
    script = ROOT / "benchmarks" / "selfcheck.py"
    done = subprocess.run((sys.executable, script, "--quick", "--json"), capture_output=True, text=True, check=True)
    assert len(json.loads(done.stdout)) == 6
