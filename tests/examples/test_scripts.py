"""The runnable examples run, from any folder, with plain text in a pipe."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SCRIPTS = sorted(path for path in EXAMPLES.glob("*.py") if path.name != "demo.py")
# Tests run beside each other: threads of one would wait for those of another.
ALONE = {**os.environ, "OMP_NUM_THREADS": "1"}


def ran(folder: Path, script: Path, *arguments: str) -> str:
    """What a script says, run in an empty folder: on stdout, as plain text, and it leaves nothing there."""
    command = [sys.executable, str(script), *arguments]
    done = subprocess.run(command, cwd=folder, env=ALONE, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "\x1b" not in done.stdout
    assert not list(folder.iterdir())
    return done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_it_runs(script: Path, tmp_path: Path) -> None:
    began = time.monotonic()
    ran(tmp_path, script)
    assert time.monotonic() - began < 20


def test_the_demo_checks_what_it_shows(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    said = ran(tmp_path, EXAMPLES / "demo.py", "--budget", "4")
    assert said.count("\nok  ") == 7
    assert "WRONG" not in said
    assert "nothing gives rank `k` an extent" in said
    assert "times the speed" in said


def test_the_demo_needs_the_core_only(tmp_path: Path) -> None:
    """In an environment where neither torch, Triton, XGBoost nor SciPy can be imported."""
    blocked = "import sys\nfor name in ('torch', 'triton', 'xgboost', 'scipy', 'ray'):\n    sys.modules[name] = None\n"
    (tmp_path / "sitecustomize.py").write_text(blocked)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "demo.py")], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
