"""Fixtures that several test files use."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# The same examples in every run, so that a red test is a change's fault; a nightly run may draw others.
settings.register_profile("castile", deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
settings.load_profile("castile")

ROOT = Path(__file__).resolve().parent.parent

# What somebody tuned on this machine must not decide what a test compiles.
os.environ["CASTILE_RECORDS"] = os.environ["CASTILE_MODEL"] = os.path.join(os.devnull, "castile")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write what the tests got as the goldens")


@pytest.fixture
def usual(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine that default mappings for the CPU follow: two cores with a second cache of 1 MB each."""
    from castile.passes import defaults_cpu

    monkeypatch.setattr(defaults_cpu, "cores", lambda: 2)
    monkeypatch.setattr(defaults_cpu, "second_cache", lambda: 1 << 20)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compares a text with a file of tests/golden, or writes it there under --update-golden."""

    def compare(name: str, text: str) -> None:
        path = ROOT / "tests" / "golden" / name
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        assert path.exists(), f"{path} is missing; --update-golden writes it"
        assert text == path.read_text(encoding="utf-8"), f"{name} has changed; --update-golden accepts it"

    return compare


@pytest.fixture(scope="session")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout in a folder called `my-clone`: what git tracks or would add, as it is on disk now."""
    target = tmp_path_factory.mktemp("clone") / "my-clone"
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, names):
        if (source := ROOT / name).is_file():  # a tracked file may be deleted and the deletion not committed yet
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target / name)
    return target
