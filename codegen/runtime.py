"""Running compiled kernels: arguments checked once for each signature of shapes, then little but the call itself.

NumPy arrays and torch tensors go in as they lie in memory, by address and strides; results come in the same kind. torch
is never imported here: its tensors are known by what they can do.
"""

from __future__ import annotations

import ctypes
import math
import os
import struct
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np

from ..ir.cascade import Param
from ..ir.dtypes import DTYPES, numpy_dtype
from ..ir.errors import InputError, VerifyError, did_you_mean
from ..ir.extents import LARGEST_EXTENT, extent_of, resolve, shape_of
from ..ir.print import print_param
from .assembly import Assembly, Program, assemble
from .build import load
from .cpp import entry_names, print_cpp, standalone

# Signatures of which the checked plan is kept.
PLANS = 64

# Where an empty tensor points: a clamped index must meet memory.
_NOTHING = (ctypes.c_char * 64)()
_NOWHERE = ctypes.addressof(_NOTHING)

_SCALAR_CODES = {"f64": "d", "f32": "f4x", "i64": "q", "i32": "i4x", "i16": "h6x", "i8": "b7x", "u8": "B7x"}
_SCALAR_CODES |= {"u32": "I4x", "bool": "?7x", "f16": "H6x", "bf16": "H6x", "f8e4m3": "B7x", "f8e5m2": "B7x"}

Signature = tuple[Any, ...]


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


# Arrays of either kind


@dataclass(frozen=True, slots=True)
class Layout:
    """How a tensor lies in memory: strides in elements, and the span of bytes around its first element."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    low: int
    high: int


def is_torch(x: object) -> bool:
    return hasattr(x, "data_ptr") and hasattr(x, "stride")


def _names_of(dtype: str) -> tuple[str, ...]:
    """What NumPy and torch call a dtype."""
    return (str(numpy_dtype(dtype)), f"torch.{numpy_dtype(dtype)}")


def _address(x: Any) -> int:
    if type(x) is np.ndarray:
        return int(x.__array_interface__["data"][0])
    return int(x.data_ptr())


def _signature(x: Any) -> Signature:
    if type(x) is np.ndarray:
        return (x.shape, x.strides, x.dtype)
    return (x.shape, x.stride(), x.dtype, "torch")


def _layout(x: Any, p: Param, role: str = "") -> Layout:
    """The layout of a tensor that is to be the parameter; refused unless the dtype is the declared one."""
    row = DTYPES[p.dtype]
    if str(x.dtype) not in _names_of(p.dtype):
        spelled = _names_of(p.dtype)[1 if is_torch(x) else 0]
        raise InputError(
            f"{role}`{p.name}` is {x.dtype}, not {p.dtype}",
            expected=print_param(p),
            got=str(x.dtype),
            hint=f"convert it: {p.name}.{'to' if is_torch(x) else 'astype'}({spelled.removeprefix('torch.')!r})"
            if not is_torch(x)
            else f"convert it: {p.name}.to({spelled})",
        )
    if is_torch(x):
        shape, strides = tuple(map(int, x.shape)), tuple(map(int, x.stride()))
    else:
        size = row.bits // 8
        shape, strides = x.shape, tuple(s // size for s in x.strides)
    low = sum(min(0, (n - 1) * s) for n, s in zip(shape, strides, strict=True))
    high = sum(max(0, (n - 1) * s) for n, s in zip(shape, strides, strict=True)) + 1
    if 0 in shape:
        strides, low, high = (0,) * len(shape), 0, 0
    return Layout(shape, strides, p.dtype, low * row.bits // 8, high * row.bits // 8)


def _overlaps_itself(layout: Layout) -> bool:
    """Whether two elements may share memory."""
    reach = 0
    for stride, size in sorted((abs(s), n) for n, s in zip(layout.shape, layout.strides, strict=True) if n > 1):
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def _share(a: tuple[int, Layout], b: tuple[int, Layout]) -> bool:
    """Whether two tensors share memory, given their addresses and layouts."""
    (at, x), (bt, y) = a, b
    if at + x.high <= bt + y.low or bt + y.high <= at + x.low:
        return False
    if 0 in x.shape or 0 in y.shape:
        return False
    # The exact question can be hard; past this much work the answer is yes.
    exact: Callable[..., bool] = np.shares_memory
    try:
        return bool(exact(_shadow(at, x), _shadow(bt, y), max_work=10000))
    except np.exceptions.TooHardError:
        return True


class _Memory:
    """Memory by its address, for NumPy to look at."""

    def __init__(self, address: int, layout: Layout) -> None:
        size = DTYPES[layout.dtype].bits // 8
        self.__array_interface__ = {
            "version": 3,
            "data": (address, True),
            "typestr": f"|V{size}",
            "shape": layout.shape,
            "strides": tuple(s * size for s in layout.strides),
        }


def _shadow(address: int, layout: Layout) -> Any:
    return np.asarray(_Memory(address, layout))


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


class CpuProgram:
    """A cascade compiled for the CPU: called with its parameters by name.

    ``program(X=x, scale=0.5)`` takes NumPy arrays or torch tensors and Python numbers for scalars; it returns the same
    kind, a tuple for several outputs, in their order. ``out=`` takes one array or a tuple of them to write into.
    Raises `InputError` for arguments that do not fit.
    """

    def __init__(self, assembly: Assembly, functions: Sequence[Any]) -> None:
        self.cascade = assembly.cascade
        self.entries = assembly.entries
        self.outputs = assembly.outputs
        self.scratch = assembly.scratch
        self.source = assembly.source
        self.params = self.cascade.params
        self.tensors = tuple(p for p in self.params if p.indices)
        self.scalars = tuple(p for p in self.params if not p.indices)
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
        try:
            arrays = [inputs[p.name] for p in self.tensors]
            numbers = [inputs[p.name] for p in self.scalars]
        except KeyError:
            raise self._misnamed(inputs) from None
        if len(inputs) != len(self.params):
            raise self._misnamed(inputs)
        torch = False
        for i, x in enumerate(arrays):
            if type(x) is not np.ndarray:
                arrays[i] = x = self._accepted(x, self.tensors[i])
                torch = torch or is_torch(x)
        outs = self._given_outputs(out)
        signature = (torch, *map(_signature, arrays), *map(_signature, outs))
        plan = self._plans.get(signature)
        if plan is None:
            plan = self._plan(arrays, outs, torch)
            while len(self._plans) >= PLANS:
                self._plans.pop(next(iter(self._plans)), None)
            self._plans[signature] = plan
        addresses = [_address(x) for x in arrays]
        for i, size in enumerate(self._sizes):
            if addresses[i] % size:
                arrays[i] = arrays[i].copy()
                addresses[i] = _address(arrays[i])
        results = self._results(outs, plan, addresses)
        self._run(plan, addresses, results, numbers)
        if out is not None:
            return out
        return results[0] if len(results) == 1 else tuple(results)

    def _run(self, plan: Plan, addresses: list[int], results: Sequence[Any], numbers: list[Any]) -> None:
        pointers = addresses + [_address(x) for x in results]
        if plan.empty:
            pointers = [a or _NOWHERE for a in pointers]
        if plan.scratch_bytes:
            scratch = np.empty(plan.scratch_bytes + 64, np.uint8)
            base = (_address(scratch) + 63) // 64 * 64
            pointers += [base + at for at in plan.scratch]
        else:
            pointers += [_NOWHERE for _ in plan.scratch]
        if self.scalars:
            values = ctypes.create_string_buffer(self._scalar_pack.size)
            self._scalar_pack.pack_into(values, 0, *map(_scalar, self.scalars, numbers))
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

    # Arguments

    def _misnamed(self, inputs: Mapping[str, Any]) -> InputError:
        names = ", ".join(p.name for p in self.params) or "none"
        for p in self.params:
            if p.name not in inputs:
                return InputError(f"`{p.name}` is missing", hint=f"the parameters of `{self.cascade.name}` are {names}")
        extra = next(name for name in inputs if name not in self.cascade.param_of)
        hint = did_you_mean(extra, self.cascade.param_of) or f"its parameters are {names}"
        return InputError(f"`{self.cascade.name}` has no parameter `{extra}`", hint=hint)

    def _accepted(self, x: Any, p: Param) -> Any:
        """A tensor on this machine's CPU, or a NumPy array of exactly that class."""
        if is_torch(x):
            if not getattr(x, "is_cpu", True) or str(getattr(x, "layout", "torch.strided")) != "torch.strided":
                raise InputError(
                    f"`{p.name}` is a {getattr(x, 'layout', '')} tensor on {getattr(x, 'device', '')}",
                    expected="a strided tensor on the CPU",
                    got=f"{getattr(x, 'layout', '')} on {getattr(x, 'device', '')}",
                    hint=f"bring it there: {p.name}.cpu()",
                )
            return x.resolve_neg() if getattr(x, "is_neg", bool)() else x
        if isinstance(x, np.ndarray) and not isinstance(x, np.ma.MaskedArray):
            return np.asarray(x)
        if isinstance(x, np.generic):
            return np.asarray(x)
        raise InputError(
            f"`{p.name}` is no array",
            expected=f"{print_param(p)} as a NumPy array or torch tensor",
            got=type(x).__name__,
            hint="wrap it: np.asarray(…)",
        )

    def _given_outputs(self, out: Any) -> list[Any]:
        if out is None:
            return []
        outs = list(out) if isinstance(out, (tuple, list)) else [out]
        if len(outs) != len(self.outputs):
            raise InputError(
                f"`out` holds {len(outs)} arrays for {len(self.outputs)} outputs",
                expected=", ".join(p.name for p in self.outputs),
                got=str(len(outs)),
            )
        for x, p in zip(outs, self.outputs, strict=True):
            checked = self._accepted(x, p)
            # What had to be copied cannot be written through.
            if is_torch(x):
                refused = checked is not x or getattr(x, "requires_grad", False)
                why = "needs a gradient" if refused else ""
            else:
                if not isinstance(x, np.ndarray):
                    raise InputError(f"`out` for `{p.name}` is no array", got=type(x).__name__, expected=print_param(p))
                refused, why = not x.flags.writeable, "is read-only"
            if refused:
                raise InputError(f"`out` for `{p.name}` {why}", hint="give memory that may be written")
        return [x if is_torch(x) else np.asarray(x) for x in outs]

    def _results(self, outs: list[Any], plan: Plan, addresses: list[int]) -> Sequence[Any]:
        """The arrays to write: those given, if they may be, else new ones."""
        if not outs:
            return [new() for new in plan.outputs]
        taken = list(zip(addresses, plan.layouts, strict=True))
        names = [p.name for p in self.tensors]
        for x, p, layout in zip(outs, self.outputs, plan.out_layouts, strict=True):
            mine = (_address(x), layout)
            if mine[0] % (DTYPES[p.dtype].bits // 8):
                raise InputError(f"`out` for `{p.name}` is not aligned to its elements")
            for name, other in zip(names, taken, strict=True):
                if _share(mine, other):
                    raise InputError(
                        f"`out` for `{p.name}` overlaps `{name}`", hint="write into memory that is no input"
                    )
            taken.append(mine)
            names.append(p.name)
        return outs

    # Plans

    def _plan(self, arrays: list[Any], outs: list[Any], torch: bool) -> Plan:
        """Check a signature and work out all that follows from it."""
        for x, p in zip(arrays, self.tensors, strict=True):
            if not is_torch(x) and any(s % x.dtype.itemsize for s in x.strides):
                raise InputError(f"the strides of `{p.name}` are no multiples of its element", hint="copy it first")
        shapes = {p.name: tuple(map(int, x.shape)) for x, p in zip(arrays, self.tensors, strict=True)}
        shapes |= {p.name: () for p in self.scalars}
        extents = resolve(self.cascade, {}, shapes)
        layouts = tuple(_layout(x, p) for x, p in zip(arrays, self.tensors, strict=True))
        outputs = tuple((shape_of(self.cascade, p.name, extents), p.dtype) for p in self.outputs)
        given = tuple(_layout(x, p, "`out` for ") for x, p in zip(outs, self.outputs, strict=True)) if outs else ()
        for layout, (shape, _), p in zip(given, outputs, self.outputs, strict=False):
            if layout.shape != shape:
                raise InputError(
                    f"`out` for `{p.name}` has the wrong shape", expected=f"{shape}", got=f"{layout.shape}"
                )
            if _overlaps_itself(layout):
                raise InputError(
                    f"elements of `out` for `{p.name}` share memory", hint="give an array without stride 0"
                )
        written = given or tuple(_contiguous(shape, dtype) for shape, dtype in outputs)
        scratch, offsets, size = [], [], 0
        for p in self.scratch:
            layout = _contiguous(_shape_of(p, extents), p.dtype)
            scratch.append(layout)
            offsets.append(size)
            size += (layout.high + 63) // 64 * 64
        by_name = dict(zip(self._number, (*layouts, *written, *scratch), strict=False))
        new = _new_tensor if torch else _new_array
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
        for rank, fixed in e.whole.items():
            if extents.get(rank, fixed) != fixed:
                raise InputError(
                    f"this kernel holds for rank `{rank}` of extent {fixed} only",
                    rank=rank,
                    expected=str(fixed),
                    got=str(extents[rank]),
                    hint="compile it for these shapes",
                )
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


def _contiguous(shape: tuple[int, ...], dtype: str) -> Layout:
    strides, step = [], 1
    for n in reversed(shape):
        strides.append(step)
        step *= n
    size = math.prod(shape)
    return Layout(
        shape, tuple(reversed(strides)) if size else (0,) * len(shape), dtype, 0, size * DTYPES[dtype].bits // 8
    )


def _shape_of(p: Param, extents: Mapping[str, int]) -> tuple[int, ...]:
    shape = tuple(extent_of(i, extents) for i in p.indices)
    if any(n is None for n in shape):
        raise VerifyError(f"the shape of scratch tensor `{p.name}` is not known")
    return tuple(int(n or 0) for n in shape)


def _new_array(shape: tuple[int, ...], dtype: str) -> Callable[[], Any]:
    return partial(np.empty, shape, numpy_dtype(dtype))


def _new_tensor(shape: tuple[int, ...], dtype: str) -> Callable[[], Any]:
    torch = sys.modules["torch"]
    return partial(torch.empty, shape, dtype=getattr(torch, str(numpy_dtype(dtype))))


def _scalar(p: Param, given: Any) -> Any:
    """A number in the form that `struct` packs for its dtype: narrow floats by their bits."""
    row = DTYPES[p.dtype]
    if type(given) is float and row.bits >= 32 and row.is_float and abs(given) < 1e38:
        return given
    if type(given) is int and row.is_integer and row.lowest <= given <= row.highest:
        return given
    if hasattr(given, "detach"):
        given = given.detach().cpu()
        if math.prod(given.shape) == 1 and len(given.shape) == 0:
            given = given.item()
    array = np.asarray(given)
    if array.shape != () or array.dtype.kind not in "fiubV":
        raise InputError(
            f"`{p.name}` is no number",
            expected=f"a number, {print_param(p)}",
            got=f"shape {array.shape} of {array.dtype}" if array.shape else type(given).__name__,
        )
    if not row.is_float and array.dtype.kind not in "iub":
        raise InputError(f"`{p.name}` is no integer", expected=print_param(p), got=str(given))
    if row.is_integer and not row.lowest <= int(array) <= row.highest:
        raise InputError(
            f"`{p.name}` does not fit {p.dtype}", expected=f"{row.lowest} to {row.highest}", got=str(given)
        )
    with np.errstate(all="ignore"):
        value = array.astype(numpy_dtype(p.dtype))
    if row.is_float and row.bits < 32:
        return int(value.view(f"u{row.bits // 8}"))
    return value.item()
