"""Running compiled kernels: arguments checked once for each signature of shapes, then little but the call itself.

NumPy arrays and torch tensors go in as they lie in memory, by address and strides; results come in the same kind. torch
is never imported here: its tensors are known by what they can do.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np

from ..ir.dtypes import DTYPES
from ..ir.errors import InputError, VerifyError
from ..ir.extents import LARGEST_EXTENT
from .arguments import (
    Arguments,
    Layout,
    Signature,
    address,
    contiguous,
    is_torch,
    new_array,
    new_tensor,
    param_shape,
    scalar_value,
    signature_of,
)
from .assembly import Assembly, Program, assemble
from .build import load
from .cpp import print_cpp, standalone
from .interface import entry_names

# Signatures of which the checked plan is kept.
PLANS = 64

# Where an empty tensor points: a clamped index must meet memory.
_NOTHING = (ctypes.c_char * 64)()
_NOWHERE = ctypes.addressof(_NOTHING)

_SCALAR_CODES = {"f64": "d", "f32": "f4x", "i64": "q", "i32": "i4x", "i16": "h6x", "i8": "b7x", "u8": "B7x"}
_SCALAR_CODES |= {"u32": "I4x", "bool": "?7x", "f16": "H6x", "bf16": "H6x", "f8e4m3": "B7x", "f8e5m2": "B7x"}

# A program whose arguments were checked: it takes numbers and addresses.
Launcher = Callable[[Sequence[Any], list[int]], None]

# Threads


class _Process:
    """Whether this process was forked from one that may have had threads: OpenMP's runtime does not survive that."""

    forked = False


def _forget_threads() -> None:
    _Process.forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)


def thread_count() -> int:
    """Threads that a kernel may use: torch's number if torch is loaded, else ``OMP_NUM_THREADS``, else the CPUs that
    this process may run on; one after a fork."""
    if _Process.forked:
        return 1
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "get_num_threads"):
        return int(torch.get_num_threads())
    return threads_without_torch()


@cache
def threads_without_torch() -> int:
    """As `thread_count` where torch is not loaded; found out once."""
    named = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if named.isdecimal() and int(named) > 0:
        return int(named)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# The program


@dataclass(frozen=True, slots=True)
class Plan:
    """All that follows from the signature of a call.

    ``outputs`` make a new array each. ``words`` are the kernels' argument structs with what is known filled in;
    ``holes`` says which pointer goes where. Pointers are numbered: parameters, outputs, scratch, scalars by value,
    fault words.
    """

    layouts: tuple[Layout, ...]
    outputs: tuple[Callable[[], Any], ...]
    out_layouts: tuple[Layout, ...]
    scratch: tuple[int, ...]
    scratch_bytes: int
    words: tuple[tuple[int, ...], ...]
    holes: tuple[tuple[tuple[int, int], ...], ...]
    empty: bool


class CpuProgram(Arguments):
    """A cascade compiled for the CPU: called with its parameters by name.

    ``program(X=x, scale=0.5)`` takes NumPy arrays or torch tensors and Python numbers for scalars; it returns the same
    kind, a tuple for several outputs, in their order. ``out=`` takes one array or a tuple of them to write into.
    Raises `InputError` for arguments that do not fit.
    """

    def __init__(self, assembly: Assembly, functions: Sequence[Any]) -> None:
        super().__init__(assembly.cascade, assembly.outputs)
        self.entries = assembly.entries
        self.scratch = assembly.scratch
        self.source = assembly.source
        self._packs = tuple(struct.Struct(f"={len(e.fields)}q").pack for e in self.entries)
        self._functions = tuple(functions)
        self._scalar_pack = struct.Struct("=" + "".join(_SCALAR_CODES[p.dtype] for p in self.scalars))
        self._sizes = tuple(DTYPES[p.dtype].bits // 8 for p in self.tensors)
        self._checked = any(f.kind == "fault" for e in self.entries for f in e.fields)
        # Pointers by name, in one numbering for all kernels.
        names = [p.name for p in (*self.tensors, *self.outputs, *self.scratch, *self.scalars)]
        self._number = {name: i for i, name in enumerate(names)}
        self._plans: dict[Signature, Plan] = {}

    @classmethod
    def build(cls, program: Program) -> CpuProgram:
        """Compile a program's kernels into one library, or take it from the cache.

        Raises `VerifyError` for kernels that mean nothing and `UsageError` where there is no working compiler.
        """
        return cls.build_all([program])[0]

    @classmethod
    def build_all(cls, programs: Sequence[Program]) -> tuple[CpuProgram, ...]:
        """Several programs in one library: one run of the compiler for all."""
        kernels = [k for p in programs for k in p.kernels]
        source = print_cpp(kernels, programs[0].cascade.name if programs else "nothing")
        library = load(standalone(source))
        symbols = iter(entry_names(kernels))
        made = []
        for p in programs:
            a = assemble(p, source)
            functions = [_function(library, next(symbols)) for _ in a.entries]
            made.append(cls(a, functions))
        return tuple(made)

    @classmethod
    def of(cls, assembly: Assembly) -> CpuProgram:
        """Compile an assembly, or take its library from the cache. Raises `UsageError` without a working compiler."""
        library = load(standalone(assembly.source))
        return cls(assembly, [_function(library, e.symbol) for e in assembly.entries])

    def __call__(self, *, out: Any = None, **inputs: Any) -> Any:
        arrays, numbers = self._split(inputs)
        torch = False
        for i, x in enumerate(arrays):
            if type(x) is not np.ndarray:
                arrays[i] = x = self._accepted(x, self.tensors[i])
                torch = torch or is_torch(x)
        addresses = [address(x) for x in arrays]
        for i, size in enumerate(self._sizes):
            if addresses[i] % size:
                # A copy may lie in another way, so it comes before layouts are looked at.
                arrays[i] = x = arrays[i].clone() if is_torch(arrays[i]) else arrays[i].copy()
                addresses[i] = address(x)
        outs = self._given_outputs(out)
        signature = (torch, *map(signature_of, arrays), *map(signature_of, outs))
        plan = self._plans.get(signature)
        if plan is None:
            plan = self._plan(arrays, outs, torch)
            while len(self._plans) >= PLANS:
                self._plans.pop(next(iter(self._plans)), None)
            self._plans[signature] = plan
        if outs:
            results, written = outs, self._apart(outs, plan.out_layouts, addresses, plan.layouts)
        else:
            results = [new() for new in plan.outputs]
            written = [address(x) for x in results]
        self._launch(plan, numbers, addresses + written)
        if out is not None:
            return out
        return results[0] if len(results) == 1 else tuple(results)

    def launcher(self, inputs: Mapping[str, Any], out: Sequence[Any]) -> Launcher:
        """The program for tensors that lie as these do, called with the values of scalars and with addresses: of the
        tensors in the order of the cascade, then of the outputs. It checks nothing but what indices read from data.

        Raises `InputError` for arguments that do not fit.
        """
        arrays, _ = self._split(inputs)
        arrays = [self._accepted(x, p) for x, p in zip(arrays, self.tensors, strict=True)]
        return partial(self._launch, self._plan(arrays, self._given_outputs(out), any(map(is_torch, arrays))))

    def _launch(self, plan: Plan, numbers: Sequence[Any], pointers: list[int]) -> None:
        if plan.empty:
            pointers = [a or _NOWHERE for a in pointers]
        if plan.scratch_bytes:
            scratch = np.empty(plan.scratch_bytes + 64, np.uint8)
            base = (address(scratch) + 63) // 64 * 64
            pointers += [base + at for at in plan.scratch]
        else:
            pointers += [_NOWHERE for _ in plan.scratch]
        if self.scalars:
            values = ctypes.create_string_buffer(self._scalar_pack.size)
            self._scalar_pack.pack_into(values, 0, *map(scalar_value, self.scalars, numbers))
            first = ctypes.addressof(values)
            pointers += [first + 8 * i for i in range(len(self.scalars))]
        faults = None
        if self._checked:
            faults = (ctypes.c_int64 * len(self.entries))()
            first = ctypes.addressof(faults)
            pointers += [first + 8 * i for i in range(len(self.entries))]
        threads = thread_count()
        for function, pack, words, holes in zip(self._functions, self._packs, plan.words, plan.holes, strict=True):
            filled = list(words)
            for at, number in holes:
                filled[at] = pointers[number]
            function(pack(*filled), 0, -1, threads)
        if faults is not None and any(faults):
            raise self._outside(list(faults))

    def _outside(self, faults: list[int]) -> InputError:
        at, number = next((i, f) for i, f in enumerate(faults) if f)
        name = self.entries[at].tensors[number - 1]
        return InputError(f"an index that was read from data lies outside `{name}`", hint="indices count from 0")

    # Plans

    def _plan(self, arrays: list[Any], outs: list[Any], torch: bool) -> Plan:
        """Check a signature and work out all that follows from it."""
        found = self._fitted(arrays, outs)
        extents, layouts, outputs, given = found.extents, found.layouts, found.outputs, found.given
        written = given or tuple(contiguous(shape, dtype) for shape, dtype in outputs)
        scratch, offsets, size = [], [], 0
        for p in self.scratch:
            layout = contiguous(param_shape(p, extents), p.dtype)
            scratch.append(layout)
            offsets.append(size)
            size += (layout.high + 63) // 64 * 64
        by_name = dict(zip(self._number, (*layouts, *written, *scratch), strict=False))
        new = new_tensor if torch else new_array
        makers = tuple(new(shape, dtype) for shape, dtype in outputs)
        filled = [self._fill(i, by_name, extents) for i in range(len(self.entries))]
        empty = any(0 in x.shape for x in (*layouts, *written))
        words, holes = tuple(w for w, _ in filled), tuple(h for _, h in filled)
        return Plan(layouts, makers, given, tuple(offsets), size, words, holes, empty)

    def _fill(
        self, at: int, layouts: Mapping[str, Layout], extents: Mapping[str, int]
    ) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
        """The argument struct of a kernel: its words, and where pointers are to be put."""
        e = self.entries[at]
        for rank, size in e.held.items():
            if extents.get(rank, 0) > size:
                raise InputError(
                    f"this kernel keeps rank `{rank}` on chip and was compiled for fewer elements of it",
                    rank=rank,
                    expected=f"at most {size}",
                    got=str(extents[rank]),
                    hint="compile it for these shapes",
                )
        words, holes = [], []
        for i, f in enumerate(e.fields):
            value = 0
            match f.kind:
                case "pointer":
                    holes.append((i, self._number[f.name]))
                case "fault":
                    holes.append((i, len(self._number) + at))
                case "stride":
                    value = layouts[f.name].strides[f.axis]
                case "size":
                    value = layouts[f.name].shape[f.axis]
                case "extent":
                    if f.name not in extents and f.name not in e.bounded:
                        raise VerifyError(f"kernel `{e.symbol}` iterates rank `{f.name}`, which has no extent")
                    value = extents.get(f.name, LARGEST_EXTENT)
            words.append(value)
        return tuple(words), tuple(holes)


def _function(library: ctypes.CDLL, name: str) -> Any:
    function = library[name]
    function.argtypes = [ctypes.c_char_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64]
    function.restype = None
    return function
