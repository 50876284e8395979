"""Child processes in which Triton works for castile: one that interprets, one that compiles.

Each reads a JSON request a line and answers with a line; it is started by the first request, serves its parent's whole
life and ends with it. A crash of a compiler costs one request.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import os
import select
import subprocess
import sys
import tempfile
import threading
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from ..ir.errors import EvaluationError, UsageError

# The child's first words: its own folder must not be searched, or its neighbour `triton.py` would be Triton.
_START = "import runpy, sys; sys.path.pop(0); runpy.run_path(sys.argv[1], run_name='__main__')"


# The environment variable with the seconds that Triton may take to compile a program, and how many it else may.
LIMIT, SECONDS = "CASTILE_COMPILE_SECONDS", 300.0


def compile_seconds() -> float:
    """How long Triton may compile. Raises `UsageError` where `LIMIT` is no number above 0."""
    given = os.environ.get(LIMIT, "")
    with contextlib.suppress(ValueError):
        found = float(given or SECONDS)
        if found > 0:
            return found
    raise UsageError(f"`{LIMIT}` is no number of seconds", expected="a number above 0", got=repr(given))


class Process:
    """One child, running a script of this folder. Hold ``lock`` while using it or its folder."""

    def __init__(self, script: str, interpret: bool) -> None:
        self.lock = threading.RLock()
        # In memory where the system has such a folder.
        shared = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        self._temporary = tempfile.TemporaryDirectory(prefix="castile-triton-", dir=shared)
        self.folder = Path(self._temporary.name)
        self._errors = open(self.folder / "stderr", "w+b")  # noqa: SIM115
        env = {**os.environ, "TRITON_INTERPRET": "1" if interpret else "0", "PYTHONWARNINGS": "ignore"}
        files = resources.files(__package__)
        with resources.as_file(files / "triton_guest.py") as guest, resources.as_file(files / script) as path:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _START, str(guest), str(path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env=env,
                text=True,
            )
        self.pid = self._process.pid
        self._owner = os.getpid()
        atexit.register(self.close)

    def keep(self, source: str) -> Path:
        """The path of a file with this text."""
        path = self.folder / f"{hashlib.sha256(source.encode()).hexdigest()[:32]}.py"
        if not path.exists():
            path.write_text(source, encoding="utf-8")
        return path

    def ask(self, request: dict[str, Any], seconds: float | None = None) -> dict[str, Any]:
        """The answer to a request. Raises `UsageError` without Triton, `EvaluationError` when the process ends or no
        answer comes in so many seconds; then the process is ended, and the next request starts another."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        with contextlib.suppress(OSError):
            stdin.write(json.dumps(request) + "\n")
            stdin.flush()
            if seconds is not None and not select.select([stdout], [], [], seconds)[0]:
                process.cache_clear()
                self.close()
                raise EvaluationError(f"Triton took more than {seconds:.0f} s", hint=f"{LIMIT} sets how many it may")
            answer = stdout.readline()
            if answer:
                found: dict[str, Any] = json.loads(answer)
                return found
        self._errors.seek(0)
        said = self._errors.read().decode("utf-8", "replace").strip().split("\n")[-1]
        process.cache_clear()
        status = self._process.wait()
        self.close()
        if "No module named" in said:
            raise UsageError(f"torch and triton are needed: {said}", hint="pip install 'castile[torch,triton]'")
        raise EvaluationError(f"the process that runs Triton ended with status {status}: {said}")

    def close(self) -> None:
        """End the process and remove its folder; a fork's copy leaves both alone."""
        if os.getpid() != self._owner:
            return
        with contextlib.suppress(OSError):
            self._process.kill()
            self._process.wait()
        self._errors.close()
        with contextlib.suppress(OSError):
            self._temporary.cleanup()


@cache
def process(script: str, interpret: bool, owner: int) -> Process:
    """The child of the process ``owner`` that runs a script; a fork starts its own."""
    return Process(script, interpret)
