"""Running compiled kernels: arguments checked once for each signature of shapes, then little but the call itself.

NumPy arrays and torch tensors go in as they lie in memory, by address and strides; results come in the same kind. torch
is never imported here: its tensors are known by what they can do.
"""

from __future__ import annotations

import ctypes
import math
import operator
import os
import struct
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import accumulate
from typing import Any

import numpy as np

from ..ir.dtypes import DTYPES
from ..ir.errors import InputError, VerifyError
from ..ir.extents import LARGEST_EXTENT
from ..ir.machine import cores
from .arguments import (
    ANEW,
    Arguments,
    Layout,
    Signature,
    address,
    contiguous,
    is_torch,
    likeness,
    looked_at,
    new_array,
    new_tensor,
    param_shape,
    scalar_value,
)
from .assembly import Assembly, Program, assemble
from .build import load
from .cpp import print_cpp
from .interface import check_held, entry_names

# Signatures of which the checked plan is kept.
PLANS = 64

# Where an empty tensor points: a clamped index must meet memory.
_NOTHING = (ctypes.c_char * 64)()
_NOWHERE = ctypes.addressof(_NOTHING)

_SCALAR_CODES = {"f64": "d", "f32": "f4x", "i64": "q", "i32": "i4x", "i16": "h6x", "i8": "b7x", "u8": "B7x"}
_SCALAR_CODES |= {"u32": "I4x", "bool": "?7x", "f16": "H6x", "bf16": "H6x", "f8e4m3": "B7x", "f8e5m2": "B7x"}

# The whole of a kernel's grid, from its first point. Numbers of ctypes' own are passed on sooner than Python's.
_FIRST, _ALL = ctypes.c_int64(0), ctypes.c_int64(-1)

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
    return cores()


# The program


@dataclass(slots=True)
class Plan:
    """All that follows from the signature of a call.

    ``outputs`` make a new array each. A kernel takes the address of its words; those of all kernels follow one another
    in ``words``, where what the signature tells is filled in. ``holes`` are the words that take the address of a
    parameter or of an output, and the number of it; ``own`` are those for what each call has of its own: scratch,
    scalars by value, fault words. ``last`` holds the addresses of the last call's tensors, which share no memory with
    outputs, and the words with these filled in.
    """

    layouts: tuple[Layout, ...]
    outputs: tuple[Callable[[], Any], ...]
    out_layouts: tuple[Layout, ...]
    scratch: tuple[int, ...]
    scratch_bytes: int
    words: bytes
    holes: tuple[tuple[int, int], ...]
    own: tuple[tuple[int, int], ...]
    empty: bool
    last: tuple[list[int], Any] | None = None


class Bound:
    """A program and its arguments, for calls that change nothing but the addresses of a few of them.

    ``bound.call(threads)`` runs the kernels; ``places[i]`` are the words that hold the address of tensor ``i``, in the
    order of the cascade, then of the outputs. Nobody checks anything: layouts and dtypes must be those of the tensors
    that it was made with. Not for two threads at once.
    """

    __slots__ = ("_functions", "_scratch", "places", "scratch_bytes", "words")

    def __init__(self, words: Any, functions: Sequence[tuple[Any, int]], plan: Plan, tensors: int) -> None:
        base = ctypes.addressof(words)
        self.words = words
        self._functions = tuple((function, base + at) for function, at in functions)
        self.places = tuple(tuple(at for at, n in plan.holes if n == i) for i in range(tensors))
        self.scratch_bytes = plan.scratch_bytes
        self._scratch = tuple((at, offset) for i, offset in enumerate(plan.scratch) for at, n in plan.own if n == i)

    def move(self, tensor: int, to: int) -> None:
        """Say where a tensor lies from now on, by its address."""
        for at in self.places[tensor]:
            self.words[at] = to

    def work_in(self, base: int) -> None:
        """Say where `scratch_bytes` lie that the kernels may write into, by an address that 64 divides."""
        for at, offset in self._scratch:
            self.words[at] = base + offset

    def call(self, threads: int) -> None:
        number = ctypes.c_int64(threads)
        for function, at in self._functions:
            function(at, _FIRST, _ALL, number)


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
        sizes = [len(e.fields) for e in self.entries]
        starts = tuple(accumulate(sizes, initial=0))
        self._calls = tuple(zip(functions, (8 * at for at in starts), strict=False))
        # What a call passes by its address: the words of all kernels, then scalars, then fault words.
        self._scalars_at = starts[-1]
        self._faults_at = self._scalars_at + len(self.scalars)
        self._scalar_pack = struct.Struct("=" + "".join(_SCALAR_CODES[p.dtype] for p in self.scalars)).pack_into
        self._sizes = tuple(DTYPES[p.dtype].bits // 8 for p in self.tensors)
        self._checked = any(f.kind == "fault" for e in self.entries for f in e.fields)
        self._words = ctypes.c_int64 * (self._faults_at + self._checked * len(self.entries))
        # Pointers by name, in one numbering for all kernels.
        names = [p.name for p in (*self.tensors, *self.outputs, *self.scratch, *self.scalars)]
        self._number = {name: i for i, name in enumerate(names)}
        self._plans: dict[Signature, Plan] = {}
        # Most calls are like the one before: to compare is quicker than to look up. Its signature and plan, and what
        # tells tensors that are like its own once a second call was.
        self._latest: tuple[Any, Any, Callable[..., bool] | None] = (None, None, None)

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
        library = load(source)
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
        library = load(assembly.source)
        return cls(assembly, [_function(library, e.symbol) for e in assembly.entries])

    def run(self, inputs: Mapping[str, Any], out: Any) -> Any:
        arrays, numbers = self._split(inputs)
        outs = self._given_outputs(out)
        torch = False
        for i, x in enumerate(arrays):
            if type(x) is not np.ndarray:
                arrays[i] = x = self._accepted(x, self.tensors[i])
                torch = torch or is_torch(x)
        places, signature = looked_at([*arrays, *outs])
        if any(map(operator.mod, places, self._sizes)):
            # A copy may lie in another way, so it comes before plans are looked for.
            arrays = [_aligned(x, size) for x, size in zip(arrays, self._sizes, strict=True)]
            places, signature = looked_at([*arrays, *outs])
        if 0 in places:
            self._refuse_without_memory([*arrays, *outs], places)
        latest, plan, _ = self._latest
        if signature != latest:
            plan = self._plans.get(signature) or self._kept(signature, self._plan(arrays, outs, torch))
            self._latest = signature, plan, None
        return self._results(plan, numbers, places, outs, out)

    def _refuse_without_memory(self, tensors: Sequence[Any], places: Sequence[int]) -> None:
        """Raises `InputError` for a tensor of some elements that lies nowhere, such as a FakeTensor."""
        for x, place, p in zip(tensors, places, (*self.tensors, *self.outputs), strict=False):
            if place == 0 and math.prod(x.shape):
                raise InputError(
                    f"`{p.name}` has no memory: it is a {type(x).__name__}",
                    expected="a tensor that holds its elements",
                    hint="call the kernel with real tensors, outside FakeTensorMode and torch.compile",
                )

    def again(self, inputs: Mapping[str, Any], out: Any) -> Any:
        latest, plan, alike = self._latest
        try:
            arrays, numbers = self._split(inputs)
            outs = [] if out is None else list(out) if isinstance(out, (tuple, list)) else [out]
            if alike is not None and alike(*arrays, *outs):
                places = [x.data_ptr() for x in (*arrays, *outs)]
            else:
                outs = self._given_outputs(out)
                places, signature = looked_at([*arrays, *outs])
                if signature != latest:
                    return ANEW
                if alike is None:
                    self._latest = latest, plan, likeness([*arrays, *outs])
        except (AttributeError, RuntimeError, TypeError):
            return ANEW
        if 0 in places or any(map(operator.mod, places, self._sizes)):
            return ANEW
        return self._results(plan, numbers, places, outs, out)

    def _results(self, plan: Plan, numbers: Sequence[Any], places: list[int], outs: list[Any], out: Any) -> Any:
        """Run the kernels; new outputs, or those that were given."""
        results = outs
        if not outs:
            results = [new() for new in plan.outputs]
            places += [address(x) for x in results]
        elif plan.last is None or plan.last[0] != places:
            self._apart(places[len(self.tensors) :], plan.out_layouts, places[: len(self.tensors)], plan.layouts)
        self._launch(plan, numbers, places)
        if out is not None:
            return out
        return results[0] if len(results) == 1 else tuple(results)

    def _kept(self, signature: Signature, plan: Plan) -> Plan:
        while len(self._plans) >= PLANS:
            self._plans.pop(next(iter(self._plans)), None)
        self._plans[signature] = plan
        return plan

    def launcher(self, inputs: Mapping[str, Any], out: Sequence[Any]) -> Launcher:
        """The program for tensors that lie as these do, called with the values of scalars and with addresses: of the
        tensors in the order of the cascade, then of the outputs. It checks nothing but what indices read from data.

        Raises `InputError` for arguments that do not fit.
        """
        arrays, _ = self._split(inputs)
        arrays = [self._accepted(x, p) for x, p in zip(arrays, self.tensors, strict=True)]
        return partial(self._launch, self._plan(arrays, self._given_outputs(out), any(map(is_torch, arrays))))

    def bind(self, inputs: Mapping[str, Any], out: Sequence[Any]) -> Bound | None:
        """The program with these arguments, its scratch memory left to be named; None for one that takes numbers, looks
        at what it reads, or is given nothing to work on.

        Raises `InputError` for arguments that do not fit.
        """
        if self.scalars or self._checked:
            return None
        arrays, _ = self._split(inputs)
        arrays = [self._accepted(x, p) for x, p in zip(arrays, self.tensors, strict=True)]
        plan = self._plan(arrays, self._given_outputs(out), any(map(is_torch, arrays)))
        if plan.empty:
            return None
        tensors = [*arrays, *out]
        bound = Bound(self._words.from_buffer_copy(plan.words), self._calls, plan, len(tensors))
        for i, x in enumerate(tensors):
            bound.move(i, address(x))
        return bound

    def _launch(self, plan: Plan, numbers: Sequence[Any], pointers: list[int]) -> None:
        if plan.empty:
            pointers = [a or _NOWHERE for a in pointers]
        last = plan.last
        if last is None or last[0] != pointers:
            filled = self._words.from_buffer_copy(plan.words)
            for at, number in plan.holes:
                filled[at] = pointers[number]
            plan.last = last = (list(pointers), filled)  # a launcher's caller may use its list again
        words = self._words.from_buffer_copy(last[1]) if plan.own else last[1]
        base = ctypes.addressof(words)
        if plan.scratch_bytes:
            scratch = np.empty(plan.scratch_bytes + 64, np.uint8)
            first = (address(scratch) + 63) // 64 * 64
            own = [first + at for at in plan.scratch]
        else:
            own = [_NOWHERE] * len(plan.scratch)
        if self.scalars:
            first = base + 8 * self._scalars_at
            self._scalar_pack(words, 8 * self._scalars_at, *map(scalar_value, self.scalars, numbers))
            own += range(first, first + 8 * len(self.scalars), 8)
        if self._checked:
            first = base + 8 * self._faults_at
            own += range(first, first + 8 * len(self.entries), 8)
        for at, number in plan.own:
            words[at] = own[number]
        threads = ctypes.c_int64(thread_count())
        for function, at in self._calls:
            function(base + at, _FIRST, _ALL, threads)
        if self._checked and any(faults := words[self._faults_at :]):
            raise self._outside(faults)

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
        empty = any(0 in x.shape for x in (*layouts, *written))
        words = self._words()
        tensors = len(self.tensors) + len(self.outputs)
        holes: list[tuple[int, int]] = []
        own: list[tuple[int, int]] = []
        at = 0
        for i in range(len(self.entries)):
            for known, number in self._words_of(i, by_name, extents):
                if known is not None:
                    words[at] = known
                elif number < tensors:
                    holes.append((at, number))
                else:
                    own.append((at, number - tensors))
                at += 1
        return Plan(layouts, makers, given, tuple(offsets), size, bytes(words), tuple(holes), tuple(own), empty)

    def _words_of(
        self, kernel: int, layouts: Mapping[str, Layout], extents: Mapping[str, int]
    ) -> Iterator[tuple[int | None, int]]:
        """The words of a kernel: a number that is known, or the number of an address."""
        e = self.entries[kernel]
        check_held(e.held, extents)
        for f in e.fields:
            match f.kind:
                case "pointer":
                    yield None, self._number[f.name]
                case "fault":
                    yield None, len(self._number) + kernel
                case "stride":
                    yield layouts[f.name].strides[f.axis], 0
                case "size":
                    yield layouts[f.name].shape[f.axis], 0
                case _:
                    if f.name not in extents and f.name not in e.bounded:
                        raise VerifyError(f"kernel `{e.symbol}` iterates rank `{f.name}`, which has no extent")
                    yield extents.get(f.name, LARGEST_EXTENT), 0


def _aligned(x: Any, size: int) -> Any:
    """An array at a multiple of its elements' size: itself, or a copy of it."""
    if address(x) % size == 0:
        return x
    return x.clone() if is_torch(x) else x.copy()


def _function(library: ctypes.CDLL, name: str) -> Any:
    function = library[name]
    function.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64]
    function.restype = None
    return function
