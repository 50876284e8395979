"""Generated Triton under Triton's own interpreter: for tests on any machine, whatever was imported before.

A child process runs it; tensors travel through a shared file, with their strides. The child is started by the first
call, serves all programs of a process, and ends with it.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from ..ir.cascade import Param
from ..ir.dtypes import DTYPES, numpy_dtype
from ..ir.errors import EvaluationError, InputError, UsageError
from ..ir.mapping import Mapping
from .arguments import Arguments, Layout, address, contiguous, is_torch, new_array, new_tensor, scalar_value
from .assembly import Program
from .triton import print_triton

# The child's first words: its own folder must not be searched, or its neighbour `triton.py` would be Triton.
_START = "import runpy, sys; sys.path.pop(0); runpy.run_path(sys.argv[1], run_name='__main__')"


class InterpretProgram(Arguments):
    """A cascade as Triton under the interpreter: called with its parameters by name, as `CpuProgram` is."""

    def __init__(self, program: Program, source: str) -> None:
        written = {p.name: p for k in program.kernels for p in k.tensors if p.name in k.outputs}
        super().__init__(program.cascade, tuple(written[name] for name in program.cascade.outputs))
        self.source = source

    @classmethod
    def build(cls, program: Program, mapping: Mapping) -> InterpretProgram:
        """Print a program for the interpreter. Raises `VerifyError` for kernels that mean nothing."""
        return cls(program, print_triton(program, mapping, "interpret"))

    def __call__(self, *, out: Any = None, **inputs: Any) -> Any:
        arrays, numbers = self._split(inputs)
        arrays = [
            x if type(x) is np.ndarray else self._accepted(x, p) for x, p in zip(arrays, self.tensors, strict=True)
        ]
        torch = any(map(is_torch, arrays))
        outs = self._given_outputs(out)
        found = self._fitted(arrays, outs)
        if outs:
            self._apart(outs, found.given, [address(x) for x in arrays], found.layouts)
        make = new_tensor if torch else new_array
        results = outs or [make(shape, dtype)() for shape, dtype in found.outputs]
        written = found.given or tuple(contiguous(shape, dtype) for shape, dtype in found.outputs)
        values = [plain_number(p, x) for p, x in zip(self.scalars, numbers, strict=True)]
        extents = [found.extents[r] for r in self.cascade.ranks]
        self._run(
            list(zip(arrays, found.layouts, strict=True)), list(zip(results, written, strict=True)), values, extents
        )
        if out is not None:
            return out
        return results[0] if len(results) == 1 else tuple(results)

    def _run(
        self,
        arrays: Sequence[tuple[Any, Layout]],
        results: Sequence[tuple[Any, Layout]],
        values: Sequence[Any],
        extents: Sequence[int],
    ) -> None:
        child = _child(os.getpid())
        tensors = iter(arrays)
        numbers = iter(values)
        taken: list[dict[str, Any]] = []
        data = bytearray()
        placed: list[tuple[int, Layout]] = []
        pairs = [next(tensors) if p.indices else None for p in self.params]
        for pair in (*pairs, *results):
            if pair is None:
                taken.append({"value": next(numbers)})
                continue
            x, layout = pair
            if any(s < 0 for s in layout.strides):
                # torch has no negative strides.
                layout = contiguous(layout.shape, layout.dtype)
                if len(placed) < len(arrays):
                    x = np.ascontiguousarray(x)
            start = (len(data) + 63) // 64 * 64
            data.extend(bytes(start - len(data)))
            fresh = len(placed) >= len(arrays) and layout.high == 0
            data.extend(b"" if fresh else ctypes.string_at(address(x) + layout.low, layout.high - layout.low))
            placed.append((start, layout))
            taken.append(
                {
                    "start": start,
                    "bytes": layout.high - layout.low,
                    "dtype": str(numpy_dtype(layout.dtype)),
                    "shape": layout.shape,
                    "strides": layout.strides,
                }
            )
        changed = child.run(self.source, bytes(data), taken, extents)
        for (x, layout), (start, there) in zip(results, placed[len(arrays) :], strict=True):
            if there.high:
                np.copyto(_bytes_of(x, layout), _view(changed, start, there))


def _view(data: bytearray, start: int, layout: Layout) -> Any:
    size = DTYPES[layout.dtype].bits // 8
    strides = tuple(s * size for s in layout.strides)
    return np.ndarray(layout.shape, f"u{size}", data, start, strides)


def _bytes_of(x: Any, layout: Layout) -> Any:
    """A tensor's elements as unsigned integers in place."""
    size = DTYPES[layout.dtype].bits // 8
    buffer: Any = (ctypes.c_char * max(1, layout.high - layout.low)).from_address(address(x) + layout.low)
    strides = tuple(s * size for s in layout.strides)
    return np.ndarray(layout.shape, f"u{size}", buffer, -layout.low, strides)


def plain_number(p: Param, given: Any) -> float | int | bool:
    """A scalar argument as a Python number, rounded to its dtype. Raises `InputError` for what does not fit."""
    value = scalar_value(p, given)
    row = DTYPES[p.dtype]
    if row.is_float and row.bits < 32:
        return float(np.asarray(value, f"u{row.bits // 8}").view(numpy_dtype(p.dtype)).astype(np.float64))
    if p.dtype == "f32":
        with np.errstate(all="ignore"):
            return float(np.float32(value))
    return bool(value) if row.kind == "bool" else float(value) if row.is_float else int(value)


# The child


class _Child:
    """The interpreter's process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # In memory where the system has such a folder.
        shared = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        self._folder = tempfile.TemporaryDirectory(prefix="castile-interpret-", dir=shared)
        self._errors = open(Path(self._folder.name) / "stderr", "w+b")  # noqa: SIM115
        script = resources.files(__package__).joinpath("triton_child.py")
        with resources.as_file(script) as path:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _START, str(path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore"},
                text=True,
            )
        self._owner = os.getpid()
        atexit.register(self.close)

    def run(self, source: str, data: bytes, arguments: Sequence[Any], extents: Sequence[int]) -> bytearray:
        """Launch a module on tensors in a copy of the data; gives back the data as the kernels left it."""
        folder = Path(self._folder.name)
        path = folder / f"{hashlib.sha256(source.encode()).hexdigest()[:32]}.py"
        with self._lock:
            if not path.exists():
                path.write_text(source, encoding="utf-8")
            at = folder / "data"
            at.write_bytes(data or bytes(64))
            request = {"source": str(path), "data": str(at), "arguments": arguments, "extents": list(extents)}
            answer = self._ask(json.dumps(request))
            if answer.get("ok"):
                return bytearray(at.read_bytes())
        if "outside" in answer:
            raise InputError(answer["outside"], hint="indices count from 0")
        raise EvaluationError(
            f"generated Triton fails under the interpreter: {answer.get('error')}", hint=str(answer.get("trace", ""))
        )

    def _ask(self, line: str) -> dict[str, Any]:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        with contextlib.suppress(OSError):
            stdin.write(line + "\n")
            stdin.flush()
            answer = stdout.readline()
            if answer:
                found: dict[str, Any] = json.loads(answer)
                return found
        self._errors.seek(0)
        said = self._errors.read().decode("utf-8", "replace").strip().split("\n")[-1]
        _child.cache_clear()
        if "No module named" in said:
            raise UsageError(
                f"the interpreter needs torch and triton: {said}", hint="pip install 'castile[torch,triton]'"
            )
        raise EvaluationError(f"the process that interprets Triton ended: {said or self._process.poll()}")

    def close(self) -> None:
        """End the process and remove its folder; a fork's copy leaves both alone."""
        if os.getpid() != self._owner:
            return
        with contextlib.suppress(OSError):
            self._process.kill()
            self._process.wait()
        self._errors.close()
        with contextlib.suppress(OSError):
            self._folder.cleanup()


@cache
def _child(_: int) -> _Child:
    """The child of this process; a fork starts its own."""
    return _Child()
