"""The wheel holds the package, all of it and nothing else, and works where it is installed."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy
import pytest

import castile

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("ir", "passes", "codegen", "costmodel", "autotune", "frontend", "cli")


def run(*command: object, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def wheel(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check")
    run(*pip, "--no-deps", "--no-build-isolation", "--wheel-dir", out, clone, cwd=out)
    (built,) = out.glob("*.whl")
    return built


def expected(clone: Path) -> set[str]:
    files = {*clone.glob("*.py"), clone / "py.typed", *(clone / "codegen").rglob("*.h")}
    for folder in FOLDERS:
        files |= set((clone / folder).rglob("*.py"))
    files |= {path for path in (clone / "costmodel" / "data").rglob("*") if path.is_file()}
    return {f"castile/{path.relative_to(clone).as_posix()}" for path in files}


def test_wheel_holds_the_package_and_nothing_else(wheel: Path, clone: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")}
    info = f"castile-{castile.__version__}.dist-info/"
    assert {name for name in names if not name.startswith(info)} == expected(clone)
    assert f"{info}licenses/LICENSE" in names
    assert "castile = castile.cli.main:main" in zipfile.ZipFile(wheel).read(f"{info}entry_points.txt").decode()


def test_installed_wheel_works_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    fresh, elsewhere = tmp_path / "fresh", tmp_path / "elsewhere"
    elsewhere.mkdir()
    run(sys.executable, "-m", "venv", "--without-pip", fresh, cwd=tmp_path)
    python = fresh / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path)
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    run(*pip, "--no-deps", "--target", site, wheel, cwd=tmp_path)
    # The dependencies are borrowed from the environment of the tests. Its editable castile does not come along: a path
    # on PYTHONPATH is searched, its .pth files are not read; and site-packages of `fresh` is put in front.
    borrowed = os.pathsep.join([site, str(Path(numpy.__file__).parent.parent)])
    code = "import castile, castile.ir; print(castile.__file__); [getattr(castile, name) for name in castile.__all__]"
    where = run(python, "-c", code, cwd=elsewhere, PYTHONPATH=borrowed)
    assert "explain" in run(python, "-m", "castile", "--help", cwd=elsewhere, PYTHONPATH=borrowed)
    assert Path(where).resolve() == Path(site).resolve() / "castile" / "__init__.py"
