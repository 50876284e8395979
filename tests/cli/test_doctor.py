"""`castile doctor`, in good health and in bad."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from castile.cli import doctor
from castile.codegen.compiler import Compiler


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch takes seconds to import."""
    monkeypatch.setattr(doctor, "gpu", lambda: doctor.Finding("GPU", "GPU", "info", "not asked"))


def findings(outcome: Any) -> dict[str, Any]:
    return {finding["name"]: finding for finding in outcome.json["findings"]}


def test_text_and_json(castile: Any) -> None:
    text = castile("doctor")
    assert (text.code, text.err) == (0, "")
    for word in ("Python", "CPU", "caches", "numpy", "torch", "triton", "xgboost", "ray", "folder"):
        assert f"  {word}" in text.out
    found = findings(castile("doctor", "--json"))
    assert found["numpy"]["detail"] == metadata.version("numpy")
    assert found["castile"]["state"] == "ok"


def test_nothing_is_installed(castile: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda names: "")
    done = castile("doctor")
    assert done.code == 0
    assert "without it, no GPU kernels" in done.out
    assert "pip install triton" in done.out
    assert "missing" in done.out.splitlines()[-1]


def test_no_compiler(castile: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.delenv("CXX", raising=False)
    found = findings(castile("doctor", "--json"))
    assert found["C++"]["state"] == "missing"
    assert "no CPU kernels" in found["C++"]["costs"]
    assert "install g++" in found["C++"]["remedy"]


def test_a_compiler_without_openmp(castile: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_compiler", lambda: Compiler(("/usr/bin/c++", "-m64"), ""))
    monkeypatch.setattr(doctor, "_output", lambda command, timeout=10: "a compiler 1.0")
    monkeypatch.setattr(doctor.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1))
    found = findings(castile("doctor", "--json"))
    assert found["c++ -m64"]["state"] == "ok"
    assert found["OpenMP"]["state"] == "missing"
    assert "start their threads" in found["OpenMP"]["costs"]


def test_nowhere_to_build(castile: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    assert findings(castile("doctor", "--json"))["OpenMP"]["state"] == "missing"


def test_the_compiler_is_the_one_that_kernels_are_built_with(castile: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", f"{sys.executable} -I")
    assert "Python" in findings(castile("doctor", "--json"))[f"{Path(sys.executable).name} -I"]["detail"]
    monkeypatch.setenv("CXX", "no-such-compiler -O9")
    assert "no-such-compiler -O9" in findings(castile("doctor", "--json"))["C++"]["detail"]


def test_an_unreadable_machine(castile: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_read", lambda path: "")
    found = findings(castile("doctor", "--json"))
    assert found["vectors"]["detail"] == "unknown"
    assert found["caches"]["detail"] == "unknown"


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CASTILE_CACHE_DIR", str(tmp_path / "here"))
    assert doctor.cache().detail == f"{tmp_path / 'here'} (not yet made)"
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "link").symlink_to(tmp_path)
    for unusable in ("file", "file/below", "link"):  # as `castile cache list` says
        monkeypatch.setenv("CASTILE_CACHE_DIR", str(tmp_path / unusable))
        assert doctor.cache().state == "missing"
    monkeypatch.setenv("CASTILE_CACHE_DIR", str(tmp_path / "here"))
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    assert doctor.cache().state == "missing"
    assert "CASTILE_CACHE_DIR" in doctor.cache().remedy
