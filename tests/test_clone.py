"""The checkout works under another folder name, and on other versions of Python."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def run(*command: object, cwd: Path, **environment: str) -> None:
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_clone_of_another_name(clone: Path, tmp_path: Path) -> None:
    assert clone.name == "my-clone"
    # What is on PYTHONPATH goes before an editable install, so `castile` is the clone here.
    (tmp_path / "castile").symlink_to(clone)
    code = "import castile, pathlib; print(pathlib.Path(castile.__file__).resolve().parent)"
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(found.stdout.strip()) == clone.resolve()
    suites = ("tests/test_layering.py", "tests/test_import.py")
    quick = ("-m", "not slow and not nightly and not timing")
    run(sys.executable, "-m", "pytest", "-q", *quick, *suites, cwd=clone, PYTHONPATH=str(tmp_path))


@pytest.mark.nightly
def test_every_python_found(clone: Path) -> None:
    run(sys.executable, "tests/pythons.py", cwd=clone)
