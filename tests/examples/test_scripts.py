"""The runnable examples run, from any folder, with plain text in a pipe."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_it_runs(script: Path, tmp_path: Path) -> None:
    began = time.monotonic()
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "\x1b" not in done.stdout
    assert time.monotonic() - began < 20
    assert not list(tmp_path.iterdir())


def test_the_demo_checks_what_it_shows(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "demo.py")], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.count("\nok  ") == 6
    assert "WRONG" not in done.stdout
    assert "nothing gives rank `k` an extent" in done.stdout


def test_the_demo_needs_the_core_only(tmp_path: Path) -> None:
    """In an environment where neither torch, Triton, XGBoost nor SciPy can be imported."""
    blocked = "import sys\nfor name in ('torch', 'triton', 'xgboost', 'scipy', 'ray'):\n    sys.modules[name] = None\n"
    (tmp_path / "sitecustomize.py").write_text(blocked)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "demo.py")], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
