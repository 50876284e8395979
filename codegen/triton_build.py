"""Generated Triton on a GPU, and what is known of it without one: every architecture is compiled for anywhere."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import operator
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from ..ir.device import Device, device_of
from ..ir.dtypes import DTYPES, numpy_dtype
from ..ir.errors import EvaluationError, InputError, UsageError
from ..ir.footprint import largest_rank
from ..ir.mapping import Mapping as Knobs
from ..ir.tile import TileKernel
from .arguments import ANEW, Arguments, address, is_torch, likeness
from .assembly import Program
from .triton import fits_grid, fits_held, print_kernels, print_triton
from .triton_interpret import plain_number
from .triton_kernel import Argument, Printed
from .triton_process import compile_seconds, process

# Triton's names of the element types in memory; bools and 8-bit floats lie there as bytes.
_TYPES = {"f64": "fp64", "f32": "fp32", "f16": "fp16", "bf16": "bf16", "f8e4m3": "u8", "f8e5m2": "u8", "bool": "u8"}


@dataclass(frozen=True, slots=True)
class KernelResources:
    """What one compiled kernel takes of a device.

    ``shared_bytes`` of a block, ``registers`` and ``spill_bytes`` (its stack) of a thread, ``instructions`` by kind
    ("wgmma", "tcgen05", "mma", "mfma", "wmma", "ldgsts", "tma", "mufu") as they stand in the text; ``occupancy`` is
    the share of a unit's threads that run at once; ``compile_s`` what compiling cost in CPU seconds, 0 from the cache.
    """

    name: str
    shared_bytes: int
    registers: int
    spill_bytes: int
    instructions: Mapping[str, int]
    occupancy: float
    compile_s: float = field(default=0.0, compare=False)


@dataclass(frozen=True, slots=True)
class Resources:
    """What the kernels of a program take: the greatest need of any, and their instructions added up."""

    kernels: tuple[KernelResources, ...]

    @property
    def shared_bytes(self) -> int:
        return max((k.shared_bytes for k in self.kernels), default=0)

    @property
    def registers(self) -> int:
        return max((k.registers for k in self.kernels), default=0)

    @property
    def spill_bytes(self) -> int:
        return max((k.spill_bytes for k in self.kernels), default=0)

    @property
    def occupancy(self) -> float:
        return min((k.occupancy for k in self.kernels), default=1.0)

    @property
    def instructions(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for k in self.kernels:
            for name, n in k.instructions.items():
                found[name] = found.get(name, 0) + n
        return found

    def to_dict(self) -> dict[str, Any]:
        return {
            "shared_bytes": self.shared_bytes,
            "registers": self.registers,
            "spill_bytes": self.spill_bytes,
            "occupancy": round(self.occupancy, 4),
            "instructions": self.instructions,
            "kernels": [k.name for k in self.kernels],
        }


def resources(program: Program, mapping: Knobs, target: str) -> Resources:
    """What a program's kernels take of a target, read off binaries that are compiled for it here.

    They are compiled for aligned tensors whose last axis is contiguous and for extents that tiles divide. Raises
    `InputError` for a mapping that does not fit the device, `EvaluationError` where Triton fails.
    """
    device = device_of(target)
    source, kernels = _asked(program, mapping, target)
    request: dict[str, Any] = {"target": _gpu(device), "kernels": kernels}
    child = process("triton_compile.py", False, os.getpid())
    with child.lock:
        request["source"] = str(child.keep(source))
        answer = child.ask(request, compile_seconds())
        if not answer.get("ok") and mapping.knob("specialize"):
            # As a launch does: without, where Triton cannot.
            for row in request["kernels"]:
                row["constants"] |= {name: False for name in row["constants"] if name == "SPECIALIZE"}
            answer = child.ask(request, compile_seconds())
    if not answer.get("ok"):
        raise EvaluationError(
            f"Triton does not compile `{program.cascade.name}` for {target}: {answer.get('error')}",
            hint=str(answer.get("detail", "")),
        )
    rows = []
    for k, row in zip(program.kernels, answer["kernels"], strict=True):
        if device.shared_bytes and row["shared_bytes"] > device.shared_bytes:
            raise _too_large(k, device, row["shared_bytes"])
        occupancy = occupancy_of(device, mapping.knob("warps"), row["registers"], row["shared_bytes"])
        rows.append(KernelResources(**row, occupancy=occupancy))
    return Resources(tuple(rows))


def _asked(program: Program, mapping: Knobs, target: str) -> tuple[str, list[dict[str, Any]]]:
    """A program's module, and what the compiler is told of each of its kernels."""
    types = {p.name: p.dtype for k in program.kernels for p in k.tensors}
    printed = print_kernels(program, mapping, target)
    rows = [_signature(k, types, mapping) for k in printed]
    if program.cascade.numerics == "strict":
        for row in rows:
            row["options"]["enable_fp_fusion"] = False
    return print_triton(program, mapping, target), rows


def compiled_digest(program: Program, mapping: Knobs, target: str) -> str:
    """16 hexadecimal digits that stand for all that `resources` has compiled: kernels without their comments, their
    signatures and options. Rows of resources that were kept elsewhere hold as long as it is the same.
    """
    source, kernels = _asked(program, mapping, target)
    lines = source.split("\n")
    parts = []
    for x in ast.parse(source).body:
        if isinstance(x, ast.Assign | ast.AnnAssign) or _is_jit(x):
            parts += [t for t in lines[x.lineno - 1 : x.end_lineno] if not t.lstrip().startswith("#")]
    text = json.dumps([target, parts, kernels], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _is_jit(x: ast.stmt) -> bool:
    return isinstance(x, ast.FunctionDef) and [ast.unparse(d) for d in x.decorator_list] == ["triton.jit"]


def _too_large(k: TileKernel, device: Device, shared: int) -> InputError:
    rank = largest_rank(k)
    return InputError(
        f"kernel `{k.name}` takes more shared memory than a block of {device.target} has",
        rank=rank,
        expected=f"at most {device.shared_bytes} bytes",
        got=f"{shared} bytes",
        hint=f"tile rank `{rank}` smaller, or take fewer stages",
    )


def _gpu(device: Device) -> tuple[str, int | str, int]:
    backend, _, arch = device.target.partition(":")
    return ("cuda", int(arch), 32) if backend == "cuda" else ("hip", arch, device.warp)


def _signature(k: Printed, types: Mapping[str, str], mapping: Knobs) -> dict[str, Any]:
    """A kernel's signature for the compiler: every argument's type, constants, and what is a multiple of 16."""
    last: dict[str, int] = {}
    for a in k.arguments:
        if a.kind == "stride":
            last[a.name] = max(last.get(a.name, 0), a.axis)
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    divisible = []
    for i, a in enumerate(k.arguments):
        constant = _constant(a, last)
        if constant is not None:
            signature[a.text], constants[a.text] = "constexpr", constant
            continue
        if a.kind in ("pointer", "fault"):
            dtype = types.get(a.name, "i32") if a.kind == "pointer" else "i32"
            signature[a.text] = "*" + _TYPES.get(dtype, dtype)
            divisible.append(i)
        elif a.kind == "descriptor":
            dtype = types[a.name]
            signature[a.text] = f"tensordesc<{_TYPES.get(dtype, dtype)}[{', '.join(map(str, a.block))}]>"
        elif a.kind == "scalar":
            row = DTYPES[types[a.name]]
            signature[a.text] = "*fp64" if row.name == "f64" else "fp32" if row.is_float else "i32"
        else:
            signature[a.text] = "i32"
            divisible += [i] if a.kind in ("stride", "extent") else []
    stages = 1 if k.sequential else mapping.knob("stages")
    options = {"num_warps": mapping.knob("warps"), "num_stages": stages}
    return {
        "name": k.name,
        "signature": signature,
        "constants": constants,
        "divisible": divisible,
        "options": options,
    }


def _constant(a: Argument, last: Mapping[str, int]) -> Any:
    match a.kind:
        case "stride" if last[a.name] == a.axis:
            return 1
        case "even":
            return True
        case "constant":
            return a.value
        case "index":
            return "index"
        case "specialize":
            return True
    return None


def occupancy_of(device: Device, warps: int, registers: int, shared: int) -> float:
    """The share of a unit's threads that are resident, given a block's warps, a thread's registers and a block's bytes
    of shared memory; a warp's registers come in steps of 256."""
    threads = warps * device.warp
    if threads == 0 or device.threads_per_unit == 0:
        return 1.0
    blocks = device.threads_per_unit // threads
    if registers:
        warp = -(-registers * device.warp // 256) * 256
        blocks = min(blocks, device.registers_per_unit // (warp * max(1, warps)))
    if shared:
        blocks = min(blocks, device.memory[0].bytes // shared)
    return min(1.0, blocks * threads / device.threads_per_unit)


# On a GPU


@dataclass(frozen=True, slots=True)
class Known:
    """A call whose arguments were checked: whether others are like them, where they lay if outputs were given, and
    what a call like it needs; ``outputs`` are made anew where none are given."""

    alike: Callable[..., bool]
    places: list[int]
    extents: list[int]
    outputs: list[Callable[[], Any]]
    device: Any


class CudaProgram(Arguments):
    """A cascade as Triton on a GPU: called with its parameters by name, torch tensors on the GPU or NumPy arrays.

    ``source`` and `resources` are there without one; a call then raises `UsageError`.
    """

    where, bring = "the GPU", "cuda"

    def __init__(self, program: Program, mapping: Knobs, target: str) -> None:
        written = {p.name: p for k in program.kernels for p in k.tensors if p.name in k.outputs}
        super().__init__(program.cascade, tuple(written[name] for name in program.cascade.outputs))
        self.program, self.mapping, self.target = program, mapping, target
        self.kernels = tuple(program.kernels)
        self.source = print_triton(program, mapping, target)
        self._known: Known | None = None

    @classmethod
    def build(cls, program: Program, mapping: Knobs, target: str) -> CudaProgram:
        """Print a program for a GPU; it is compiled when it is first called. Raises `VerifyError` and `InputError`."""
        return cls(program, mapping, target)

    @cached_property
    def resources(self) -> Resources:
        """What the kernels take of the target's device; see `resources`."""
        return resources(self.program, self.mapping, self.target)

    def _here(self, x: Any) -> bool:
        return bool(getattr(x, "is_cuda", False))

    @cached_property
    def _launch(self) -> Any:
        _torch(self.target)
        if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
            hint = 'unset it, or compile for the target "interpret"'
            raise UsageError("`TRITON_INTERPRET` is set, so Triton runs nothing on a GPU", hint=hint)
        # Triton reads a kernel's text from its file, also long after the import.
        self._folder = tempfile.TemporaryDirectory(prefix="castile-triton-")
        path = Path(self._folder.name) / "generated.py"
        path.write_text(self.source, encoding="utf-8")
        spec = importlib.util.spec_from_file_location(f"castile_generated_{id(self)}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.launch

    def run(self, inputs: Mapping[str, Any], out: Any) -> Any:
        arrays, numbers = self._split(inputs)
        torch = _torch(self.target)
        launch = self._launch
        arrays = [
            x if type(x) is np.ndarray else self._accepted(x, p) for x, p in zip(arrays, self.tensors, strict=True)
        ]
        outs = self._given_outputs(out)
        found = self._fitted(arrays, outs)
        fits_held(self.kernels, found.extents)
        fits_grid(self.kernels, found.extents)
        on_gpu = [x for x in (*arrays, *outs) if is_torch(x)]
        if len({x.device for x in on_gpu}) > 1:
            raise InputError("the tensors lie on several GPUs", hint="bring them to one")
        device = on_gpu[0].device if on_gpu else torch.device("cuda")
        if outs and on_gpu:
            self._apart_on(outs, arrays, found)
        numpy = not any(map(is_torch, arrays))
        tensors = iter(
            [x if is_torch(x) else _moved(x, p.dtype, device) for x, p in zip(arrays, self.tensors, strict=True)]
        )
        values = iter([plain_number(p, x) for p, x in zip(self.scalars, numbers, strict=True)])
        results = [
            x if is_torch(x) else torch.empty(shape, dtype=getattr(torch, str(numpy_dtype(dtype))), device=device)
            for x, (shape, dtype) in zip(outs or [None] * len(self.outputs), found.outputs, strict=True)
        ]
        words = [next(tensors) if p.indices else next(values) for p in self.params]
        extents = [found.extents[r] for r in self.cascade.ranks]
        self._started(launch, device, words, results, extents)
        self._known = None
        if all(map(is_torch, (*arrays, *outs))) and all(map(operator.is_, self._split(inputs)[0], arrays)):
            made: list[Callable[[], Any]] = []
            made += [] if outs else [partial(torch.empty, x.shape, dtype=x.dtype, device=device) for x in results]
            # Whether outputs lie apart from all else depends on where everything lies.
            places = [x.data_ptr() for x in (*arrays, *outs)] if outs else []
            self._known = Known(likeness([*arrays, *outs]), places, extents, made, device)
        if outs:
            for x, made in zip(outs, results, strict=True):
                if not is_torch(x):
                    x[...] = _back(made, x.dtype)
            return out
        if numpy:
            results = [_back(x, numpy_dtype(p.dtype)) for x, p in zip(results, self.outputs, strict=True)]
        return results[0] if len(results) == 1 else tuple(results)

    def again(self, inputs: Mapping[str, Any], out: Any) -> Any:
        known = self._known
        try:
            arrays, numbers = self._split(inputs)
            outs = [] if out is None else list(out) if isinstance(out, (tuple, list)) else [out]
            if known is None or (out is None) is not bool(known.outputs) or not known.alike(*arrays, *outs):
                return ANEW
            if outs and [x.data_ptr() for x in (*arrays, *outs)] != known.places:
                return ANEW
        except (AttributeError, RuntimeError, TypeError):
            return ANEW
        tensors = iter(arrays)
        values = iter([plain_number(p, x) for p, x in zip(self.scalars, numbers, strict=True)])
        words = [next(tensors) if p.indices else next(values) for p in self.params]
        results = outs or [new() for new in known.outputs]
        self._started(self._launch, known.device, words, results, known.extents)
        if outs:
            return out
        return results[0] if len(results) == 1 else tuple(results)

    def _started(
        self, launch: Any, device: Any, words: Sequence[Any], results: Sequence[Any], extents: Sequence[int]
    ) -> None:
        """Start the kernels on a device; raises `InputError` where an index that was read lies outside."""
        import torch

        with torch.cuda.device(device):
            try:
                launch(*words, *results, *extents)
            except IndexError as error:
                raise InputError(str(error), hint="indices count from 0") from None

    def _apart_on(self, outs: Sequence[Any], arrays: Sequence[Any], found: Any) -> None:
        """As `_apart`, for what lies on the device."""
        here = [(x, y) for x, y in zip(arrays, found.layouts, strict=True) if is_torch(x)]
        if len(here) == len(arrays) and all(map(is_torch, outs)):
            addresses = [address(x) for x, _ in here]
            self._apart([address(x) for x in outs], found.given, addresses, tuple(y for _, y in here))


def _torch(target: str) -> Any:
    """torch with a GPU, else one clear error."""
    try:
        import torch
    except ImportError:
        raise UsageError("a GPU kernel needs torch", hint="pip install 'castile[torch,triton]'") from None
    if not torch.cuda.is_available():
        raise UsageError(
            f"a kernel for {target} cannot run here: there is no GPU",
            expected="a GPU that torch can use",
            got="none",
            hint="its source and resources are known all the same; to run it, compile for cpu or interpret",
        )
    return torch


def _moved(x: Any, dtype: str, device: Any) -> Any:
    """A NumPy array as a tensor on a device."""
    import torch

    row = numpy_dtype(dtype)
    flat = torch.from_numpy(np.ascontiguousarray(x).reshape(-1).view(np.uint8).copy())
    return flat.view(getattr(torch, str(row))).reshape(x.shape).to(device)


def _back(x: Any, dtype: Any) -> Any:
    """A tensor as a NumPy array of a dtype of the same bits."""
    import torch

    host = x.detach().contiguous().cpu()
    return (
        host.reshape(-1).view(torch.uint8).numpy().view(dtype).reshape(tuple(x.shape))
        if x.numel()
        else np.empty(tuple(x.shape), dtype)
    )
