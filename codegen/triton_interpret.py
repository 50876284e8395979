"""Generated Triton under Triton's own interpreter: for tests on any machine, whatever was imported before.

A child process runs it; tensors travel through a shared file, with their strides. The child is started by the first
call, serves all programs of a process, and ends with it.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping as Dict
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..ir.cascade import Param
from ..ir.dtypes import DTYPES, numpy_dtype
from ..ir.errors import EvaluationError, InputError
from ..ir.mapping import Mapping
from .arguments import Arguments, Layout, address, contiguous, is_torch, new_array, new_tensor, scalar_value
from .assembly import Program
from .triton import fits_held, print_triton
from .triton_process import process


class InterpretProgram(Arguments):
    """A cascade as Triton under the interpreter: called with its parameters by name, as `CpuProgram` is."""

    def __init__(self, program: Program, source: str) -> None:
        written = {p.name: p for k in program.kernels for p in k.tensors if p.name in k.outputs}
        super().__init__(program.cascade, tuple(written[name] for name in program.cascade.outputs))
        self.kernels = tuple(program.kernels)
        self.source = source

    @classmethod
    def build(cls, program: Program, mapping: Mapping) -> InterpretProgram:
        """Print a program for the interpreter. Raises `VerifyError` for kernels that mean nothing."""
        return cls(program, print_triton(program, mapping, "interpret"))

    def run(self, inputs: Dict[str, Any], out: Any) -> Any:
        arrays, numbers = self._split(inputs)
        arrays = [
            x if type(x) is np.ndarray else self._accepted(x, p) for x, p in zip(arrays, self.tensors, strict=True)
        ]
        torch = any(map(is_torch, arrays))
        outs = self._given_outputs(out)
        found = self._fitted(arrays, outs)
        fits_held(self.kernels, found.extents)
        if outs:
            self._apart([address(x) for x in outs], found.given, [address(x) for x in arrays], found.layouts)
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
        child = process("triton_child.py", True, os.getpid())
        with child.lock:
            at = child.folder / "data"
            at.write_bytes(bytes(data) or bytes(64))
            source = str(child.keep(self.source))
            answer = child.ask({"source": source, "data": str(at), "arguments": taken, "extents": list(extents)})
            changed = bytearray(at.read_bytes())
        if "outside" in answer:
            raise InputError(answer["outside"], hint="indices count from 0")
        if not answer.get("ok"):
            what = f"generated Triton fails under the interpreter: {answer.get('error')}"
            raise EvaluationError(what, hint=str(answer.get("trace", "")))
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
