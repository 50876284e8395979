"""Run the tests of ir and passes on every supported Python found, each in a virtual environment with little in it.

    python tests/pythons.py [--checkout DIR] [VERSION ...]      # for example 3.10 3.13; all of them by default

castile is installed into each environment as a user would get it: the core dependencies, nothing editable, no torch.
What is slow, measures time or needs torch (gradients beside torch.autograd) is left to `make test-all`.
Environments are kept below `build/pythons` and rebuilt when pyproject.toml or constraints.txt change.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

SUPPORTED = ("3.10", "3.11", "3.12", "3.13")
ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("setuptools", "wheel", "pytest", "pytest-xdist", "hypothesis", "scipy")
SUITES = ("tests/ir", "tests/passes", "tests/test_import.py", "tests/test_layering.py")


def candidates() -> Iterator[str]:
    """Paths at which a Python may lie; a version manager's stand-in on PATH may not run."""
    yield sys.executable
    for version in SUPPORTED:
        if found := shutil.which(f"python{version}"):
            yield found
    yield from map(str, sorted(Path.home().glob(".pyenv/versions/*/bin/python")))


def version_of(python: str) -> str | None:
    """`3.12` for an interpreter that runs and can make virtual environments, else None."""
    code = "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2])"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def find_pythons() -> dict[str, str]:
    """Version -> interpreter, for each supported version that is here."""
    found: dict[str, str] = {}
    for python in candidates():
        version = version_of(python)
        if version in SUPPORTED:
            found.setdefault(version, python)
    return dict(sorted(found.items(), key=lambda item: SUPPORTED.index(item[0])))


def environment(version: str, python: str, checkout: Path) -> Path:
    """The interpreter of an environment for this version, with castile's dependencies and the test tools."""
    inputs = b"".join((checkout / name).read_bytes() for name in ("pyproject.toml", "constraints.txt"))
    inputs += " ".join(TOOLS).encode()
    folder = ROOT / "build" / "pythons" / version
    stamp = folder / "inputs.sha256"
    inside = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    digest = hashlib.sha256(inputs).hexdigest()
    if not (stamp.exists() and stamp.read_text() == digest):
        subprocess.run([python, "-m", "venv", "--clear", str(folder)], check=True)
        install(inside, checkout, *TOOLS)
        stamp.write_text(digest)
    shutil.rmtree(checkout / "build" / "lib", ignore_errors=True)  # setuptools would ship what an earlier build left
    install(inside, checkout, "--no-build-isolation", str(checkout))
    return inside


def install(python: Path, checkout: Path, *what: str) -> None:
    constraints = str(checkout / "constraints.txt")
    pip = [str(python), "-m", "pip", "install", "-qq", "--disable-pip-version-check", "-c", constraints]
    subprocess.run([*pip, *what], check=True)


def run_tests(python: Path, checkout: Path) -> bool:
    suites = [suite for suite in SUITES if (checkout / suite).exists()]
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PYTEST"))}
    quick = ("-n", "2", "-m", "not slow and not nightly and not timing")
    tests = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", *quick, *suites]
    return subprocess.run(tests, cwd=checkout, env=clean).returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("versions", nargs="*", metavar="VERSION", help=", ".join(SUPPORTED))
    parser.add_argument("--checkout", type=Path, default=ROOT, help="the checkout to test (default: this one)")
    arguments = parser.parse_args()
    pythons = find_pythons()
    wanted = arguments.versions or list(pythons)
    if missing := [version for version in wanted if version not in pythons]:
        parser.error(f"no Python {', '.join(missing)} here; found {', '.join(pythons)}")

    checkout = arguments.checkout.resolve()
    passed: dict[str, bool] = {}
    for version in wanted:
        print(f"== Python {version}", flush=True)
        passed[version] = run_tests(environment(version, pythons[version], checkout), checkout)
    for version in SUPPORTED:
        print(f"Python {version}: {'not run' if version not in passed else 'passed' if passed[version] else 'FAILED'}")
    return 0 if all(passed.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
