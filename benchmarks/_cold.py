"""Cold times: what the first call costs in a process of its own, with every compiler cache empty.

Run as a script it is the child: it loads a file, calls one of its functions and writes down how long both took.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

CACHE_VARIABLES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "CASTILE_CACHE_DIR")


@dataclass(frozen=True, slots=True)
class ColdTime:
    """Seconds of one cold run: importing the function's file, the call itself, and the whole child process."""

    import_s: float
    call_s: float
    process_s: float


@contextlib.contextmanager
def fresh_caches() -> Iterator[Mapping[str, str]]:
    """Environment variables that point every compiler cache at an empty folder of its own, gone afterwards.

    They are for a child's environment: compilers read them once, so setting them in a running process comes too late.
    """
    with tempfile.TemporaryDirectory(prefix="castile-cold-") as folder:
        places = {name: Path(folder, name.lower()) for name in CACHE_VARIABLES}
        for place in places.values():
            place.mkdir(mode=0o700)
        yield {name: str(place) for name, place in places.items()}


def cold(function: Callable[..., object], *, timeout_s: float = 600.0, **arguments: object) -> ColdTime:
    """Call `function(**arguments)` in a fresh process with fresh caches and time it.

    `function` stands at the top level of a file, which the child loads by path; `arguments` travel as JSON.
    Raises `ValueError` for another kind of function, `RuntimeError` with the child's last words if it fails, and
    `subprocess.TimeoutExpired` after `timeout_s` seconds, when the child and all it started are killed.
    """
    file, name = inspect.getsourcefile(function), getattr(function, "__qualname__", "")
    if file is None or not name.isidentifier():
        raise ValueError(f"{name or function!r} is no top-level function of a file, so no other process can load it")
    with fresh_caches() as caches, tempfile.TemporaryDirectory(prefix="castile-cold-") as folder:
        report = Path(folder, "report.json")
        argv = (sys.executable, __file__, os.path.abspath(file), name, json.dumps(arguments), str(report))
        start = time.perf_counter()
        child = subprocess.Popen(
            argv,
            env={**os.environ, **caches},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            _, errors = child.communicate(timeout=timeout_s)
        finally:
            with contextlib.suppress(OSError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        process_s = time.perf_counter() - start
        if child.returncode != 0:
            words = errors.decode(errors="replace").strip().splitlines()[-5:]
            raise RuntimeError(f"{name} failed in its child process (exit {child.returncode}): " + "\n".join(words))
        times = json.loads(report.read_text())
        return ColdTime(times["import_s"], times["call_s"], process_s)


def _child(file: str, name: str, arguments: str, report: str) -> None:
    """Load `file`, call its function `name` with JSON `arguments`, write the times to `report`."""
    start = time.perf_counter()
    spec = importlib.util.spec_from_file_location("castile_cold_target", file)
    if spec is None or spec.loader is None:
        raise ImportError(file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    loaded = time.perf_counter()
    getattr(module, name)(**json.loads(arguments))
    done = time.perf_counter()
    Path(report).write_text(json.dumps({"import_s": loaded - start, "call_s": done - loaded}))


if __name__ == "__main__":
    _child(*sys.argv[1:])
