"""A tuner that is killed loses nothing that it measured, leaves nothing running and is taken up where it was."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from castile.autotune.records import Records

TUNER = Path(__file__).with_name("killed.py")


def tuner(path: Path, seed: int, trials: int, mark: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(TUNER), str(path), str(seed), str(trials)]
    environment = {**os.environ, "CASTILE_TEST_MARK": mark}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )


def left_running(mark: str) -> list[str]:
    """Processes that a tuner started and that still run, told by their environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            environment = (process / "environ").read_bytes()
            running = (process / "stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
        except OSError:
            continue
        if running and f"CASTILE_TEST_MARK={mark}\0".encode() in environment:
            found.append((process / "cmdline").read_text().replace("\0", " "))
    return found


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_kills_at_random_moments(tmp_path: Path, kills: int) -> None:
    path, moments, told = tmp_path / "r", random.Random(kills), set[str]()
    for kill in range(kills):
        mark = f"{tmp_path.name}-{kill}"
        process = tuner(path, seed=0, trials=1000, mark=mark)
        assert process.stdout is not None
        first = ""
        if kill % 3 == 1:
            time.sleep(moments.uniform(0.1, 2.0))  # while it starts
        else:
            first = process.stdout.readline()
            time.sleep(moments.uniform(0.0, 1.0))
        os.kill(process.pid, signal.SIGKILL)
        out, _ = process.communicate()
        lines = (first + out).split("\n")
        told |= {line.split()[-1] for line in lines[:-1] if line}  # the last line may be cut
        for _ in range(100):
            if not (running := left_running(mark)):
                break
            time.sleep(0.1)
        assert not running, f"after kill {kill}"
        if path.exists() and path.stat().st_size:
            with Records(path, read_only=True) as r:
                assert told <= {x.uid for x in r.all()}, f"kill {kill} lost a trial"
    assert len(told) > kills // 2
    print(f"{kills} kills: {len(told)} trials told, all on record")

    last = tuner(path, seed=0, trials=3, mark="last")
    out, err = last.communicate(timeout=100)
    assert last.returncode == 0, err
    assert out.split("\n")[-2].startswith("done ")
    with Records(path) as r:
        found = r.all()
    trials = [x for x in found if x.kind == "trial"]
    assert told <= {x.uid for x in found}
    assert len({x.mapping for x in trials}) == len(trials), "what was on record was measured again"
    assert all(x.status == "ok" and x.mapping.tiles.get("n", 1) < 100 for x in found if x.kind == "final")
    with sqlite3.connect(path) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    db.close()


def test_four_tuners_on_one_file(tmp_path: Path) -> None:
    path = tmp_path / "r"
    tuners = [tuner(path, seed, 3, "four") for seed in range(4)]
    told: list[str] = []
    for process in tuners:
        out, err = process.communicate(timeout=100)
        assert process.returncode == 0, err
        assert "locked" not in err
        told += [line.split()[-1] for line in out.splitlines()]
    assert len(told) == len(set(told)) == 4 * 4
    with Records(path) as r:
        assert sorted(told) == sorted(x.uid for x in r.all())
