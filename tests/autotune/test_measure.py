"""Candidates that go wrong are recorded as the kind that they are, and cost nothing else."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import castile
from castile.autotune import space
from castile.autotune.measure import WORKER, Limits, Measurer, Outcome
from castile.autotune.records import Records
from castile.autotune.tuner import tune, verdict
from castile.autotune.worker import Guarded
from castile.ir.errors import CastileError, InputError, UsageError
from castile.ir.mapping import Mapping

FAULTY = Path(__file__).with_name("faulty.py")
SOFTMAX = castile.parse(
    "def softmax(X: f32[n, k]) -> Y:\n"
    "    M[n] = max[k](X[n, k])\n"
    "    P[n, k] = exp(X[n, k] - M[n])\n"
    "    Y[n, k] = P[n, k] / sum[k](P[n, k])\n"
)
SHAPES = {"n": 24, "k": 40}

# Tiles of `n` to choose from; those from 101 on are faults of `faulty.py`.
TILES = (1, 2, 3, 4, 6, 8, 12, 24, 101, 103, 104, 105, 106, 107, 110)

LIMITS = Limits(compile_s=2.0, run_s=2.0, memory_bytes=1 << 30)


def faulty(builders: int = 1) -> Measurer:
    return Measurer(SOFTMAX, SHAPES, limits=LIMITS, builders=builders, command=(sys.executable, str(FAULTY)))


def tile(n: int) -> Mapping:
    return Mapping(tiles={"n": n})


@pytest.fixture(scope="module")
def bench() -> Iterator[Measurer]:
    with faulty() as measurer:
        yield measurer


@pytest.mark.parametrize(
    ("n", "kinds"),
    [
        (101, {"crash"}),
        (102, {"hang"}),
        (103, {"memory"}),
        (104, {"overrun"}),
        (105, {"wrong"}),
        (106, {"wavering"}),
        (109, {"overrun"}),
        (110, {"crash"}),
        (111, {"wrong"}),
        (112, {"wrong"}),
        (113, {"crash"}),
        (114, {"memory"}),
        (115, {"crash"}),
        (116, {"crash"}),
        (118, {"memory"}),
    ],
)
def test_a_fault_is_known_and_the_next_candidate_runs(bench: Measurer, n: int, kinds: set[str]) -> None:
    outcome = bench.measure(tile(n))
    assert outcome.status in kinds, outcome
    assert outcome.times == ()
    assert bench.measure(tile(4), repeats=2).status == "ok"


def test_faults_of_compiling(bench: Measurer) -> None:
    kinds = [o.status for o in bench.compile([tile(107), tile(4), tile(108), tile(4), tile(117), tile(4)])]
    assert kinds == ["compile_error", "ok", "compile_timeout", "ok", "memory", "ok"]


def test_no_room_is_no_fault_of_the_candidate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CASTILE_CACHE_DIR", str(tmp_path / "cache"))
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, -1)); "
    command = (WORKER[0], WORKER[1], limited + WORKER[2])
    with (
        Measurer(SOFTMAX, SHAPES, limits=LIMITS, command=command) as full,
        pytest.raises(UsageError, match="no room"),
    ):
        full.compile([tile(4)])


def test_slow_candidates_are_not_timed_for_long(bench: Measurer) -> None:
    assert len(bench.measure(tile(4), enough=1e-6, repeats=20).times) == 3


def test_guarded_memory() -> None:
    free = Guarded((3, 5), np.float32, trap=False)
    free.fill(0)
    assert not free.damaged
    assert free.array.shape == (3, 5)
    free._bytes[free._span[1]] = 1
    assert free.damaged
    assert Guarded((0, 4), np.float32, trap=True).array.size == 0


@pytest.mark.parametrize("what", ["compiling", "running"])
def test_a_worker_dies_with_its_parent(what: str) -> None:
    """And with it what it started, such as a compiler; its temporary folder goes with the next tuner."""
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[1])\n"
        "from test_measure import faulty, tile\n"
        "m = faulty(); print(m.compile([tile(4)])[0].status, m.measure(tile(4), repeats=1).status, flush=True)\n"
        "print(m._bench._process.pid, m._pool[0]._process.pid, m._folder, flush=True)\n"
        "m.compile([tile(108)]) if sys.argv[2] == 'compiling' else m.measure(tile(102), seconds=50)\n"
    )
    command = [sys.executable, "-c", code, str(FAULTY.parent), what]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    assert parent.stdout.readline() == "ok ok\n"
    *words, folder = parent.stdout.readline().split()
    workers = [int(word) for word in words]
    time.sleep(0.3)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    for _ in range(100):
        if not any(group_alive(w) for w in workers):
            break
        time.sleep(0.1)
    else:
        pytest.fail("a worker, or what it started, outlived its parent")
    with faulty():
        assert not Path(folder).exists()


def group_alive(group: int) -> bool:
    """Whether any process of a group runs."""
    states = subprocess.run(["ps", "-eo", "pgid=,stat="], capture_output=True, text=True, check=True).stdout
    return any(int(g) == group and s[0] != "Z" for g, s in (line.split() for line in states.splitlines()))


# The whole


def test_verdict() -> None:
    slow, fast = [2.0, 2.1, 1.9, 2.0, 2.05] * 4, [1.0, 1.1, 0.9, 1.0, 1.05] * 4
    assert verdict([slow, fast], 0)[0] == 1
    assert verdict([fast, slow], 0)[0] == 0
    chosen, ratio, interval = verdict([fast, list(reversed(fast))], 0)
    assert (chosen, ratio, interval) == (0, 1.0, (1.0, 1.0))
    assert verdict([slow, fast], None)[0] == 1


def with_faults(setattr: Callable[..., None]) -> None:
    """Let the space offer candidates that go wrong, and compare the best only shortly."""
    tiles, compete = space._tiles, Measurer.compete

    def more(*args: Any) -> Iterator[space.Choice]:
        for choice in tiles(*args):
            ours = choice.name == "n"
            yield space.Choice(choice.part, choice.name, TILES, 1) if ours else choice

    setattr(space, "_tiles", more)
    setattr(Measurer, "compete", lambda self, mappings, seconds: compete(self, mappings, seconds, 20))


def test_tuning_with_faults_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The search meets some faults, none wins, and another session takes up where it ended."""
    with_faults(monkeypatch.setattr)
    path = tmp_path / "r"
    result = tune(SOFTMAX, SHAPES, budget_s=60, trials=9, path=path, measurer=faulty(2))
    assert result.best.status == "ok"
    assert result.best.mapping.tiles["n"] < 100
    assert any(r.status != "ok" for r in result.records)
    with Records(path) as records:
        first = records.all()
    assert len(first) == 10
    again = tune(SOFTMAX, SHAPES, budget_s=60, trials=3, path=path, measurer=faulty(2))
    measured = {r.mapping for r in first}
    assert all(r.mapping not in measured for r in again.records if r.kind == "trial")


@pytest.mark.slow
def test_a_default_that_failed_is_tried_again(tmp_path: Path) -> None:
    path = tmp_path / "r"
    default = tune(SOFTMAX, SHAPES, budget_s=60, trials=1, path=path, measurer=faulty(2)).best
    with sqlite3.connect(path) as db:
        db.execute("UPDATE trial SET status = 'memory', time_s = NULL, times = '[]', kind = 'trial'")
    db.close()
    again = tune(SOFTMAX, SHAPES, budget_s=60, trials=2, path=path, measurer=faulty(2))
    assert again.records[0].mapping == default.mapping
    assert again.default is not None


def test_tuning_a_real_kernel(tmp_path: Path) -> None:
    result = tune(SOFTMAX, SHAPES, budget_s=30, trials=3, path=tmp_path / "r")
    assert result.best.status == "ok"
    assert [r.kind for r in result.records] == ["trial"] * 3 + ["final"]


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        tune(SOFTMAX, SHAPES, "cuda:90", path=tmp_path / "r")
    with pytest.raises(UsageError):
        tune(SOFTMAX, SHAPES, budget_s=0, path=tmp_path / "r")
    with pytest.raises(InputError):
        tune(SOFTMAX, {"zz": 3}, path=tmp_path / "r")
    (tmp_path / "text").write_text("no records")
    with pytest.raises(CastileError):
        tune(SOFTMAX, SHAPES, path=tmp_path / "text")


def test_outcomes() -> None:
    assert Outcome("ok", times=(3.0, 1.0, 2.0)).time_s == 2.0
    assert Outcome("crash").time_s is None
    assert Outcome("crash").quiet_s is None
