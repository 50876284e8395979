"""The worker: a process of its own that builds, checks and times kernels, and may die of any of them.

It reads one JSON request a line and answers with one line each; arrays are made here, from seeds. Outputs lie against
pages that may not be touched, so a kernel that writes past its end dies here and not in the user's process. The
worker ends with its parent: when requests end, and on Linux by the kernel's signal.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import math
import mmap
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from time import perf_counter, perf_counter_ns
from typing import Any

import numpy as np

from ..codegen import build as builds
from ..codegen import compiler, targets
from ..ir.bound import compare, reference
from ..ir.cascade import Cascade
from ..ir.dtypes import numpy_dtype
from ..ir.errors import CastileError, InputError
from ..ir.extents import resolve, shape_of
from ..ir.mapping import Mapping as Tuned
from ..ir.parse import parse
from ..ir.samples import random_inputs
from ..ir.types import tensor_types
from ..passes.mapped import mapped
from ..passes.work import operations, sizes_of, work

Build = Callable[[Cascade, Tuned, Mapping[str, int], str], Callable[..., Any]]

# Outputs that are compared with the oracle, where all of them would be too many operations.
SAMPLE, WHOLE_WORK = 96, 2_000_000

# What lies around an output where pages are not guarded.
_PATTERN = 0xA5

# A sample of time is at least this long; shorter kernels run several times for one.
_SAMPLE_NS = 200_000


# The variable that names the pipe which the tuner holds open as long as it lives, and the bytes that a build needs.
LIFELINE = "CASTILE_LIFELINE"
_ROOM = 1 << 20


def built(c: Cascade, mapping: Tuned, extents: Mapping[str, int], target: str) -> Callable[..., Any]:
    """The kernels of a cascade under a mapping, ready to run."""
    return targets.build(mapped(c, mapping, extents).program, mapping, target)  # type: ignore[no-any-return]


# Memory with an end


class Guarded:
    """An array ``[shape]`` whose last byte is the last of its page.

    With ``trap`` the pages around it may not be touched; else they hold a pattern, and `damaged` tells whether it is
    still there.
    """

    def __init__(self, shape: tuple[int, ...], dtype: Any, trap: bool) -> None:
        page = mmap.PAGESIZE
        size = math.prod(shape) * np.dtype(dtype).itemsize
        inner = max(page, -(-size // page) * page)
        self._memory = mmap.mmap(-1, inner + 2 * page)
        self._bytes = np.frombuffer(self._memory, dtype=np.uint8)
        self._bytes[:] = _PATTERN
        self._span = (page + inner - size, page + inner)
        flat = self._bytes[self._span[0] : self._span[1]]
        self.array = flat.view(dtype).reshape(shape) if size else np.zeros(shape, dtype)
        if trap:
            start = self._bytes.__array_interface__["data"][0]
            for at in (start, start + page + inner):
                _protect(at, page, 0)
        self._checked = (page, page + inner) if trap else (0, len(self._bytes))

    def lock(self) -> None:
        """From now on the array may only be read."""
        self.array.flags.writeable = False
        start, pages = self._bytes.__array_interface__["data"][0], len(self._bytes) - 2 * mmap.PAGESIZE
        _protect(start + mmap.PAGESIZE, pages, mmap.PROT_READ)

    def fill(self, byte: int) -> None:
        """Fill the array with a byte."""
        self._bytes[self._span[0] : self._span[1]] = byte

    @property
    def damaged(self) -> bool:
        low, high = self._checked
        around = (self._bytes[low : self._span[0]], self._bytes[self._span[1] : high])
        return any(bool((part != _PATTERN).any()) for part in around)


def _protect(start: int, size: int, how: int) -> None:
    if ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(start), ctypes.c_size_t(size), how):
        raise OSError(ctypes.get_errno(), "mprotect")


# What is measured


@dataclass(slots=True)
class Workload:
    """A cascade at some extents on a target, with inputs; the oracle's answer is computed when first needed."""

    cascade: Cascade
    extents: Mapping[str, int]
    target: str
    build: Build
    seed: int
    _inputs: dict[str, Any] | None = None
    _guarded: dict[str, Guarded] = field(default_factory=dict)
    _wanted: Any = None
    _at: Any = None

    @property
    def inputs(self) -> dict[str, Any]:
        if self._inputs is None:
            c = self.cascade
            drawn = random_inputs(c, self.extents, self.seed)
            found = {p.name: np.asarray(drawn[p.name]).astype(numpy_dtype(p.dtype)) for p in c.params}
            self._inputs = {p.name: found[p.name] if p.indices else found[p.name][()] for p in c.params}
        return self._inputs

    def guarded(self) -> dict[str, Any]:
        """The inputs again, before a page that may not be touched and in pages that may not be written to: a candidate
        that writes into them would make the next ones wrong."""
        for name, value in self.inputs.items():
            if name not in self._guarded and isinstance(value, np.ndarray):
                self._guarded[name] = held = Guarded(value.shape, value.dtype, trap=True)
                held.array[...] = value
                held.lock()
        return {name: self._guarded[name].array if name in self._guarded else v for name, v in self.inputs.items()}

    def outputs(self, trap: bool) -> dict[str, Guarded]:
        c, types = self.cascade, tensor_types(self.cascade)
        return {n: Guarded(tuple(shape_of(c, n, self.extents)), numpy_dtype(types[n]), trap) for n in c.outputs}

    def run(self, kernel: Callable[..., Any], outputs: Mapping[str, Guarded], guarded: bool = False) -> None:
        arrays = tuple(o.array for o in outputs.values())
        kernel(**(self.guarded() if guarded else self.inputs), out=arrays if len(arrays) > 1 else arrays[0])

    def verdict(self, outputs: Mapping[str, Guarded]) -> str:
        """What is wrong with the results; nothing if they lie within the derived bound of the oracle."""
        c = self.cascade
        if self._wanted is None:
            self._at = self._points()
            self._wanted = reference(c, self.inputs, self._at)
        got = {}
        for name, o in outputs.items():
            got[name] = o.array
            if self._at is not None:
                ranks = next(w.ranks for e in c.einsums for w in e.outputs if w.name == name)
                got[name] = o.array[tuple(self._at[r] for r in ranks)]
        return "; ".join(str(j) for j in compare(self._wanted, got) if not j.ok)

    def _points(self) -> dict[str, Any] | None:
        """Coordinates to check: corners and random ones; None for all, where that is little work."""
        sizes = sizes_of(self.cascade, self.extents)
        if sum(p.at(sizes) for p in operations(work(self.cascade)).values()) <= WHOLE_WORK:
            return None
        rng = np.random.default_rng([self.seed, 7])
        ranks = dict.fromkeys(
            r for e in self.cascade.einsums for o in e.outputs if o.name in self.cascade.outputs for r in o.ranks
        )
        found = {r: rng.integers(0, self.extents[r], SAMPLE) for r in ranks}
        for corner in range(4):
            for i, r in enumerate(ranks):
                found[r][corner] = (self.extents[r] - 1) * ((corner >> (i % 2)) & 1)
        return found


# Requests


def check(w: Workload, mapping: Tuned, trap: bool) -> dict[str, Any]:
    """Run a candidate twice and compare: with the oracle, with itself, and what lies around its outputs. Inputs are
    guarded in any case, outputs where they are to ``trap``."""
    kernel = w.build(w.cascade, mapping, w.extents, w.target)
    first, second = w.outputs(trap), w.outputs(trap)
    began = perf_counter()
    for outputs, byte in ((first, 0xFF), (second, 0x3C)):
        for o in outputs.values():
            o.fill(byte)
        w.run(kernel, outputs, guarded=True)
    seconds = (perf_counter() - began) / 2
    for name in first:
        if first[name].damaged or second[name].damaged:
            return {"status": "overrun", "detail": f"memory beside `{name}` was written to"}
    wrong = w.verdict(first)
    if wrong:
        return {"status": "wrong", "detail": wrong}
    for name in first:
        if first[name].array.tobytes() != second[name].array.tobytes():
            return {"status": "wavering", "detail": f"two runs on the same inputs differ in `{name}`"}
    return {"status": "ok", "seconds": seconds}


def time_kernel(w: Workload, mapping: Tuned, repeats: int, enough: float) -> dict[str, Any]:
    """Seconds of each of some runs; fewer where the first ones are slower than ``enough``."""
    kernel = w.build(w.cascade, mapping, w.extents, w.target)
    outputs = w.outputs(trap=False)
    times: list[float] = []
    count = calls(w, kernel, outputs)
    while len(times) < repeats and not (len(times) >= 3 and min(times) > enough):
        times.append(once(w, kernel, outputs, count))
    return {"status": "ok", "times": times}


def calls(w: Workload, kernel: Callable[..., Any], outputs: Mapping[str, Guarded]) -> int:
    """How many calls make one sample of time; the kernel is warm afterwards."""
    w.run(kernel, outputs)
    took = max(1, int(once(w, kernel, outputs, 1) * 1e9))
    return max(1, min(1000, -(-_SAMPLE_NS // took)))


def once(w: Workload, kernel: Callable[..., Any], outputs: Mapping[str, Guarded], count: int) -> float:
    """The seconds of one call, as the mean of ``count`` in a row."""
    arrays = tuple(o.array for o in outputs.values())
    out, inputs = arrays if len(arrays) > 1 else arrays[0], w.inputs
    began = perf_counter_ns()
    for _ in range(count):
        kernel(**inputs, out=out)
    return (perf_counter_ns() - began) / count / 1e9


def compete(w: Workload, mappings: list[Tuned], seconds: float, rounds: int) -> dict[str, Any]:
    """Time several candidates in turn, round after round, in an order that changes."""
    end = perf_counter() + seconds
    outputs = w.outputs(trap=False)
    kernels = [w.build(w.cascade, m, w.extents, w.target) for m in mappings]
    counts = [calls(w, k, outputs) for k in kernels]
    rng = np.random.default_rng(w.seed)
    times: list[list[float]] = [[] for _ in mappings]
    while len(times[0]) < rounds and (perf_counter() < end or len(times[0]) < 2):
        for i in rng.permutation(len(kernels)):
            times[i].append(once(w, kernels[i], outputs, counts[i]))
    return {"status": "ok", "times": times}


def answer(request: Mapping[str, Any], w: Workload | None, build: Build) -> tuple[dict[str, Any], Workload | None]:
    """The reply to one request, and the workload from now on."""
    op = request["op"]
    if op == "load":
        c = parse(request["cascade"])
        extents = resolve(c, request["shapes"])
        return {"status": "ok"}, Workload(c, extents, request["target"], build, request["seed"])
    assert w is not None
    if op == "compete":
        found = [Tuned.from_json(m) for m in request["mappings"]]
        return compete(w, found, request["seconds"], request["rounds"]), w
    mapping = Tuned.from_json(request["mapping"])
    if op == "check":
        return check(w, mapping, request["trap"]), w
    if op == "time":
        return time_kernel(w, mapping, request["repeats"], request["enough"]), w
    if op == "resources":
        return taken(w, mapping), w
    source = getattr(w.build(w.cascade, mapping, w.extents, w.target), "source", "")
    return {"status": "ok", "source": hashlib.sha256(str(source).encode()).hexdigest() if source else ""}, w


def taken(w: Workload, mapping: Tuned) -> dict[str, Any]:
    """What a candidate takes of a GPU, which need not be here."""
    from ..codegen.triton_build import resources

    try:
        found = resources(mapped(w.cascade, mapping, w.extents).program, mapping, w.target)
    except InputError as error:
        return {"status": "limit", "detail": error.message}
    kernels = [{"occupancy": k.occupancy, "spill_bytes": k.spill_bytes} for k in found.kernels]
    return {"status": "ok", "total": found.to_dict(), "kernels": kernels}


def main(build: Build = built) -> None:
    """Serve requests until they end."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a kernel or a compiler prints is no reply
    _die_with_parent()
    _watch()
    requests: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_listen, args=(requests,), daemon=True).start()
    w: Workload | None = None
    while True:
        line = requests.get()
        request = json.loads(line)
        try:
            if "memory" in request:
                _limit(request["memory"])
            reply, w = answer(request, w, build)
        except CastileError as error:
            reply = {"status": "compile_error" if _room() else "no_room", "detail": str(error)[:2000]}
        except Exception as error:  # a candidate may raise what it likes, and must cost nothing else
            status = "compile_error" if request["op"] in ("build", "resources") else "crash"
            if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
                status = "memory"
            reply = {"status": status, "detail": f"{type(error).__name__}: {error}"[:2000]}
        if slow := compiler.refused():
            reply["refused"] = slow
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def _listen(requests: queue.Queue[str]) -> None:
    """Pass requests on; when they end, so does the process, whatever a kernel is doing."""
    for line in sys.stdin:
        requests.put(line)
    with suppress(OSError):
        if os.getpgrp() == os.getpid():
            os.killpg(0, signal.SIGKILL)
    os._exit(0)


def _die_with_parent() -> None:
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG


def _watch() -> None:
    """Let another process end this one's group when the tuner is gone. The kernel's signal reaches only this process,
    not a compiler that it started, and this process may be stuck in a candidate."""
    lifeline = os.environ.pop(LIFELINE, "")
    if lifeline.isdecimal():
        subprocess.Popen(["/bin/sh", "-c", "read -r _; kill -9 0"], stdin=int(lifeline))
        os.close(int(lifeline))


def _room() -> bool:
    """Whether the folders that a build writes to take a file."""
    for folder in (None, builds.cache_folder()):
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(bytes(_ROOM))
        except OSError:
            return False
    return True


def _limit(limit: int) -> None:
    """Cap the address space of this process at what it has now and so many bytes more, where the system can."""
    if sys.platform != "linux":
        return
    import resource

    with suppress(OSError, ValueError):
        with open("/proc/self/statm", encoding="ascii") as file:
            held = int(file.read().split()[0]) * mmap.PAGESIZE
        resource.setrlimit(resource.RLIMIT_AS, (held + limit, resource.RLIM_INFINITY))


if __name__ == "__main__":
    main()
