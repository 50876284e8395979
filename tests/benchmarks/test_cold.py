"""Cold times: a fresh process, fresh caches, and nothing left behind."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import time
from pathlib import Path
from types import ModuleType

import pytest

from castile.benchmarks._cold import CACHE_VARIABLES, cold, fresh_caches

SOURCE = """
import json, os, time

def note(path, pause_s):
    names = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "CASTILE_CACHE_DIR")
    places = {name: os.environ[name] for name in names}
    empty = all(os.listdir(place) == [] for place in places.values())
    for place in places.values():
        open(os.path.join(place, "used"), "w").close()
    with open(path, "a") as file:
        file.write(json.dumps({"pid": os.getpid(), "places": places, "empty": empty}) + "\\n")
    time.sleep(pause_s)

def fail():
    raise ArithmeticError("too hot")
"""


@pytest.fixture
def module(tmp_path: Path) -> ModuleType:
    path = tmp_path / "chilled.py"
    path.write_text(SOURCE)
    spec = importlib.util.spec_from_file_location("chilled", path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def test_each_run_has_a_process_and_empty_caches_of_its_own(module: ModuleType, tmp_path: Path) -> None:
    log = tmp_path / "log"
    times = [cold(module.note, path=str(log), pause_s=0.05) for _ in range(2)]
    first, second = (json.loads(line) for line in log.read_text().splitlines())
    assert first["empty"]
    assert second["empty"]
    assert len({first["pid"], second["pid"], os.getpid()}) == 3
    assert not set(first["places"].values()) & set(second["places"].values())
    assert not any(Path(place).exists() for place in second["places"].values())
    assert all(0.05 <= t.call_s < t.process_s and 0 < t.import_s < t.process_s for t in times)


def test_a_failure_is_told_with_its_last_words(module: ModuleType) -> None:
    with pytest.raises(RuntimeError, match="ArithmeticError: too hot"):
        cold(module.fail)


def test_a_hanging_child_is_killed(module: ModuleType, tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(subprocess.TimeoutExpired):
        cold(module.note, timeout_s=0.5, path=str(tmp_path / "log"), pause_s=60)
    assert time.monotonic() - start < 30


def test_what_no_other_process_can_load_is_refused() -> None:
    def inner() -> None:
        pass

    for function in (inner, lambda: None, print):
        with pytest.raises((ValueError, TypeError)):
            cold(function)


def test_fresh_caches_leave_this_process_alone() -> None:
    before = dict(os.environ)
    with fresh_caches() as places:
        assert set(places) == set(CACHE_VARIABLES)
        assert all(Path(place).is_dir() for place in places.values())
        assert dict(os.environ) == before
    assert not any(Path(place).exists() for place in places.values())
