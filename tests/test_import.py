"""`import castile` is quick and loads nothing that it does not need."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

import castile

LIMIT_MS = 150


def run(code: str, folder: Path) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_nothing_heavy_is_loaded(tmp_path: Path) -> None:
    heavy = ("torch", "triton", "xgboost", "networkx", "sympy", "scipy", "numpy", "ml_dtypes", "typer", "rich")
    code = f"import sys, castile; print(*(name for name in {heavy!r} if name in sys.modules))"
    assert run(code, tmp_path) == ""


def import_ms(before: str, timed: str, folder: Path) -> float:
    """The least of several runs, each in a fresh process; the interpreter's own start is not counted."""
    code = f"{before}\nfrom time import perf_counter as t\na = t()\n{timed}\nprint((t() - a) * 1e3)"
    return min(float(run(code, folder)) for _ in range(5))


@pytest.mark.timing
def test_import_is_quick(tmp_path: Path) -> None:
    assert import_ms("", "import castile", tmp_path) <= LIMIT_MS


@pytest.mark.timing
def test_the_first_use_is_quick(tmp_path: Path) -> None:
    # NumPy takes 50 to 100 ms of its own, and whoever evaluates has loaded it.
    assert import_ms("import numpy, ml_dtypes", "import castile; castile.parse", tmp_path) <= LIMIT_MS


def test_parsing_loads_no_compiler(tmp_path: Path) -> None:
    heavy = ("torch", "triton", "xgboost", "networkx", "sympy", "typer", "rich")
    text = "def double(x: f32[n]) -> y:\\n    y[n] = 2 * x[n]\\n"
    code = f"import sys, castile; castile.parse('{text}'); print(*(name for name in {heavy!r} if name in sys.modules))"
    assert run(code, tmp_path) == ""


@pytest.mark.parametrize("name", castile.__all__)
def test_every_public_name_is_there(name: str) -> None:
    if name == "explain_model":
        pytest.importorskip("torch")
    assert getattr(castile, name) is not None
    assert name in dir(castile)


def test_a_name_that_needs_torch_says_so(tmp_path: Path) -> None:
    code = "import sys; sys.modules['torch'] = None\nimport castile\ntry:\n    castile.explain_model\n"
    assert "castile.explain_model needs" in run(code + "except ImportError as error:\n    print(error)", tmp_path)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        castile.nonsense  # noqa: B018


def test_version_is_the_installed_one() -> None:
    assert importlib.metadata.version("castile") == castile.__version__
