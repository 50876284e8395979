"""Measuring candidates in processes of their own: whatever a candidate does, it is recorded as a kind and costs
nothing else.

Candidates are compiled side by side, each compiler under a limit, and measured one after the other in one worker. A
worker that hangs is ended with all that it started; one that dies is replaced. A candidate whose outputs are guarded
and that dies is tried once more with unguarded ones: if it then writes beside them, it is an overrun, else a crash.
"""

from __future__ import annotations

import json
import math
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from statistics import median
from time import monotonic
from typing import Any

from ..codegen.compiler import find_compiler, warn_refusal
from ..ir.cascade import Cascade
from ..ir.dtypes import DTYPES
from ..ir.errors import UsageError
from ..ir.extents import shape_of
from ..ir.mapping import Mapping as Tuned
from ..ir.types import tensor_types
from .worker import LIFELINE

GIB = 1 << 30

# How a tuner's temporary folder is called, before its process.
_SCRATCH = "castile-tune-"

# Where a candidate ended so, its worker may no longer be what it was.
_SPOILING = ("overrun", "wrong", "wavering")

# Rounds of a comparison.
ROUNDS = 200

# How a worker is started. The folder that the user is in is no place to import from.
WORKER = (
    sys.executable,
    "-c",
    "import sys; sys.path[:] = [p for p in sys.path if p]; from castile.autotune.worker import main; main()",
)


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds that a step may take, and bytes that a candidate may hold beside its tensors."""

    start_s: float = 60.0
    compile_s: float = 60.0
    run_s: float = 20.0
    memory_bytes: int = 4 * GIB


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a candidate fared: ``times`` in seconds, one for each sample, empty unless ``status`` is "ok"; ``told`` is
    what else the worker said."""

    status: str
    detail: str = ""
    times: tuple[float, ...] = ()
    told: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def time_s(self) -> float | None:
        """The median."""
        return median(self.times) if self.times else None

    @property
    def quiet_s(self) -> float | None:
        """The lower quartile: what else a machine does only ever adds time, so a search goes by this."""
        return sorted(self.times)[(len(self.times) - 1) // 4] if self.times else None


class WorkerDied(Exception):
    """A worker ended, or was ended, before it answered: ``status`` says what that tells of the candidate."""

    def __init__(self, status: str, detail: str) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail


class Worker:
    """A worker process, started when first asked and again after it died."""

    def __init__(
        self, load: Mapping[str, Any], limits: Limits, command: Sequence[str], threads: int | None, folder: Path
    ) -> None:
        self._load, self._limits, self._command, self._threads = load, limits, tuple(command), threads
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self._errors: Any = None
        self._lifeline = -1

    def ask(self, request: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """The reply to a request. Raises `WorkerDied`."""
        if self._process is None:
            self._start()
            try:
                reply = self._exchange(self._load, self._limits.start_s)
            except WorkerDied as death:
                raise WorkerDied("crash", f"the worker did not start: {death.detail}") from None
            if reply["status"] != "ok":
                raise WorkerDied(reply["status"], reply.get("detail", ""))
        return self._exchange(request, seconds)

    def _start(self) -> None:
        # One thread each for the libraries below NumPy: they would be counted as the candidate's memory and time.
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TMPDIR": str(self._folder)}
        if self._threads is not None:
            environment["OMP_NUM_THREADS"] = str(self._threads)
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        theirs, self._lifeline = os.pipe()
        try:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env={**environment, LIFELINE: str(theirs)},
                start_new_session=True,
                pass_fds=(theirs,),
            )
        finally:
            os.close(theirs)

    def _exchange(self, request: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        end = monotonic() + seconds
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
        except OSError:
            raise self._death() from None
        parts: list[bytes] = []
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while not (parts and parts[-1].endswith(b"\n")):
                if not selector.select(max(0.0, end - monotonic())):
                    self.close()
                    raise WorkerDied("hang", f"no answer within {seconds:.3g} s")
                part = os.read(process.stdout.fileno(), 1 << 16)
                if not part:
                    raise self._death()
                parts.append(part)
        reply: dict[str, Any] = json.loads(b"".join(parts))
        if "refused" in reply:  # the worker's warnings are read by nobody
            warn_refusal(find_compiler(), reply.pop("refused"))
        return reply

    def _death(self) -> WorkerDied:
        """What a worker's end tells."""
        process = self._process
        assert process is not None
        try:
            code = process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            code = 0
        self._errors.seek(0)
        said = self._errors.read()[-2000:].decode("utf-8", "replace").strip()
        self.close()
        if code < 0:
            with suppress(ValueError):
                name = signal.Signals(-code).name
                # Nobody but the system ends a worker this way unasked, for want of memory.
                return WorkerDied("memory" if name == "SIGKILL" else "crash", f"{name} {said}".strip())
        return WorkerDied("memory" if "bad_alloc" in said else "crash", said or f"the worker ended with {code}")

    def kill(self) -> None:
        """End the worker and all that it started."""
        process = self._process
        if process is not None:
            with suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)

    def close(self) -> None:
        """End the worker, and forget it."""
        self.kill()
        process, self._process = self._process, None
        if process is None:
            return
        for stream in (process.stdin, process.stdout, self._errors):
            with suppress(OSError):
                if stream is not None:
                    stream.close()
        os.close(self._lifeline)
        process.wait()


def scratch() -> Path:
    """A new temporary folder for what workers write, named for this process; those of processes that were killed go."""
    place = Path(tempfile.gettempdir())
    for left in place.glob(f"{_SCRATCH}*-*"):
        owner = left.name.removeprefix(_SCRATCH).split("-")[0]
        with suppress(OSError):
            if owner.isdecimal() and left.stat().st_uid == os.getuid() and not _alive(int(owner)):
                shutil.rmtree(left, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{_SCRATCH}{os.getpid()}-"))


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


@dataclass(slots=True)
class Measurer:
    """Builds, checks and times mappings of one cascade at some extents. Use it as a context manager."""

    cascade: Cascade
    extents: Mapping[str, int]
    target: str = "cpu"
    seed: int = 0
    limits: Limits = field(default_factory=Limits)
    threads: int | None = None
    builders: int = 1
    command: Sequence[str] = WORKER
    _folder: Path = field(default_factory=scratch)
    _bench: Worker | None = None
    _pool: list[Worker] = field(default_factory=list)
    _free: SimpleQueue[Worker] = field(default_factory=SimpleQueue)
    _threads: ThreadPoolExecutor | None = None

    def __post_init__(self) -> None:
        load = {
            "op": "load",
            "cascade": str(self.cascade),
            "shapes": dict(self.extents),
            "target": self.target,
            "seed": self.seed,
        }
        self._bench = Worker(load, self.limits, self.command, self.threads, self._folder)
        self._pool = [Worker(load, self.limits, self.command, 1, self._folder) for _ in range(self.builders)]
        for worker in self._pool:
            self._free.put(worker)

    def __enter__(self) -> Measurer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        workers = [w for w in (self._bench, *self._pool) if w is not None]
        if self._threads is not None:
            # A thread that waits for an answer hears of the end from its worker; only then may its pipe be closed.
            for worker in workers:
                worker.kill()
            self._threads.shutdown(cancel_futures=True)
            self._threads = None
        for worker in workers:
            worker.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def memory(self) -> int:
        """Bytes that a worker may add to what it holds: the tensors several times over, and the limit."""
        types = tensor_types(self.cascade)
        names = [p.name for p in self.cascade.params] + list(self.cascade.outputs)
        held = sum(
            math.prod(shape_of(self.cascade, n, self.extents)) * max(8, DTYPES[types[n]].bits // 8) for n in names
        )
        return 6 * held + self.limits.memory_bytes

    def compile(self, mappings: Sequence[Tuned], seconds: float = math.inf) -> list[Outcome]:
        """Build mappings side by side; "ok" where one is now in the build cache. ``told["source"]`` is the same for
        mappings that are the same program."""
        return self._side_by_side("build", mappings, seconds)

    def resources(self, mappings: Sequence[Tuned], seconds: float = math.inf) -> list[Outcome]:
        """Compile mappings side by side for a GPU that need not be here: ``told`` holds what each takes of it,
        ``kernels`` one by one and the ``total``; "limit" where that is more than the device has."""
        return self._side_by_side("resources", mappings, seconds)

    def _side_by_side(self, op: str, mappings: Sequence[Tuned], seconds: float) -> list[Outcome]:
        limit = min(seconds, self.limits.compile_s)
        # A system compiler inherits the limit; what compiles within the worker maps more than it needs.
        more = {"memory": self.limits.memory_bytes} if op == "build" else {}

        def one(mapping: Tuned) -> Outcome:
            worker = self._free.get()
            try:
                reply = worker.ask({"op": op, "mapping": mapping.to_dict(), **more}, limit)
                return Outcome(reply["status"], reply.get("detail", ""), told=reply)
            except WorkerDied as death:
                return Outcome("compile_timeout" if death.status == "hang" else "compile_error", death.detail)
            finally:
                self._free.put(worker)

        # A worker dies with the thread that started it, so these threads live as long as the measurer.
        self._threads = self._threads or ThreadPoolExecutor(max(1, len(self._pool)))
        done = list(self._threads.map(one, mappings))
        full = next((o for o in done if o.status == "no_room"), None)
        if full is not None:  # no fault of the candidate
            raise UsageError(
                "there is no room for compiled kernels",
                got=full.detail.split("\n")[0],
                hint="free some space in the temporary folder and in the build cache (castile cache clear)",
            )
        return done

    def check(self, mapping: Tuned, seconds: float = 60.0) -> Outcome:
        """Run a mapping twice and compare it with the oracle; no samples of time are taken. A worker that a candidate
        may have damaged is replaced."""
        outcome = self._checked(mapping, seconds)
        if outcome.status in _SPOILING and self._bench is not None:
            self._bench.close()
        return outcome

    def _checked(self, mapping: Tuned, seconds: float) -> Outcome:
        limit, data = min(seconds, self.limits.run_s), mapping.to_dict()
        try:
            reply = self._ask({"op": "check", "mapping": data, "trap": True}, limit)
        except WorkerDied as death:
            return self._blame(death, data, limit)
        return Outcome(reply["status"], reply.get("detail", ""))

    def measure(self, mapping: Tuned, enough: float = math.inf, repeats: int = 7, seconds: float = 60.0) -> Outcome:
        """Check a mapping and time it; fewer samples where it is slower than ``enough`` seconds."""
        checked = self.check(mapping, seconds)
        if checked.status != "ok":
            return checked
        limit, data = min(seconds, self.limits.run_s), mapping.to_dict()
        try:
            reply = self._ask({"op": "time", "mapping": data, "repeats": repeats, "enough": enough}, limit)
        except WorkerDied as death:
            return self._blame(death, data, limit)
        return Outcome(reply["status"], reply.get("detail", ""), tuple(reply.get("times", ())))

    def _blame(self, death: WorkerDied, data: Mapping[str, Any], limit: float) -> Outcome:
        """Whether a candidate that crashed wrote beside its outputs."""
        if death.status == "crash" and any(s in death.detail for s in ("SIGSEGV", "SIGBUS")):
            with suppress(WorkerDied):
                reply = self._ask({"op": "check", "mapping": data, "trap": False}, limit)
                if reply["status"] == "overrun":
                    return Outcome("overrun", reply["detail"])
        return Outcome(death.status, death.detail)

    def compete(
        self, mappings: Sequence[Tuned], seconds: float, rounds: int = ROUNDS
    ) -> list[tuple[float, ...]] | None:
        """Seconds of several mappings, timed in turn, round after round. None where the worker did not survive it."""
        request = {
            "op": "compete",
            "mappings": [m.to_dict() for m in mappings],
            "seconds": seconds,
            "rounds": rounds,
        }
        try:
            reply = self._ask(request, seconds + self.limits.run_s)
        except WorkerDied:
            return None
        return [tuple(t) for t in reply["times"]] if reply["status"] == "ok" else None

    def _ask(self, request: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        assert self._bench is not None
        return self._bench.ask({**request, "memory": self.memory}, seconds)
