"""Arguments of a compiled cascade, whatever runs it: arrays of either kind, their layouts, and what is wrong with them.

torch is never imported here: its tensors are known by what they can do.
"""

from __future__ import annotations

import ctypes
import math
import operator
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ..ir.cascade import Cascade, Param
from ..ir.dtypes import DTYPES, numpy_dtype
from ..ir.errors import InputError, VerifyError, did_you_mean
from ..ir.extents import resolve, scratch_sizes, shape_of
from ..ir.print import print_param

Signature = tuple[Any, ...]

# What `Arguments.again` gives where the arguments have to be looked at anew.
ANEW = object()


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


def _is_strided(x: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is None or x.layout is torch.strided


def _names_of(dtype: str) -> tuple[str, ...]:
    """What NumPy and torch call a dtype."""
    return (str(numpy_dtype(dtype)), f"torch.{numpy_dtype(dtype)}")


def _data_offset() -> int:
    """Where an array object keeps the address of its data: behind the head of every object, by NumPy's C API. 0 where
    objects cannot be looked into so; it is a seventh of what ``x.ctypes.data`` costs."""
    sample, at = np.empty(3, np.uint8)[1:], object.__basicsize__
    known = sys.implementation.name == "cpython" and np.ndarray.__basicsize__ > at
    return at if known and _word_at(id(sample) + at).value == sample.ctypes.data else 0


_word_at = ctypes.c_size_t.from_address
_DATA_OFFSET = _data_offset()


def address(x: Any) -> int:
    """The address of the first element of an array or a tensor."""
    if type(x) is np.ndarray:
        return _word_at(id(x) + _DATA_OFFSET).value if _DATA_OFFSET else int(x.ctypes.data)
    return int(x.data_ptr())


def looked_at(arrays: Sequence[Any]) -> tuple[list[int], Signature]:
    """Where arrays lie, and all else of them: signatures are equal for arrays of which one plan holds, and which are
    accepted or refused alike.

    A call takes longer to look at its tensors than to start a kernel, so all are looked at at once. Raises
    `AttributeError` or `RuntimeError` for what is neither an array nor a strided tensor.
    """
    if _DATA_OFFSET and set(map(type, arrays)) == {np.ndarray}:
        return [_word_at(id(x) + _DATA_OFFSET).value for x in arrays], tuple(map(_layout, arrays))
    places: list[int] = []
    layouts: list[Signature] = []
    for x in arrays:
        if type(x) is np.ndarray:
            places.append(address(x))
            layouts.append(_layout(x))
        else:  # one that is not strided has no address
            places.append(x.data_ptr())
            layouts.append((x.shape, x.stride(), x.dtype, x.is_cpu, x.is_neg()))
    return places, tuple(layouts)


_layout = operator.attrgetter("shape", "strides", "dtype")


def likeness(arrays: Sequence[Any]) -> Callable[..., bool]:
    """Whether tensors, given one by one, are like these in all that `looked_at` looks at but for their addresses.

    PyTorch's guards of compiled code look at all of them in one call, a fifth of the time. They ask for more, such as
    the same class, so that a no means little; it is the answer for what else there may be.
    """
    try:
        guards = sys.modules["torch"]._C._dynamo.guards.TensorGuards(
            *arrays, dynamic_dims_sizes=None, dynamic_dims_strides=None
        )
        return guards.check if guards.check(*arrays) else unlike
    except (KeyError, AttributeError, TypeError, RuntimeError):
        return unlike


def unlike(*_: Any) -> bool:
    return False


def layout_of(x: Any, p: Param, role: str = "") -> Layout:
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
    if 0 in layout.shape:
        return False
    reach = 0
    for stride, size in sorted((abs(s), n) for n, s in zip(layout.shape, layout.strides, strict=True) if n > 1):
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def _share(a: tuple[int, Layout], b: tuple[int, Layout]) -> bool:
    """Whether two tensors, whose stretches of memory overlap, share some of it, given their addresses and layouts."""
    (at, x), (bt, y) = a, b
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


@dataclass(frozen=True, slots=True)
class Checked:
    """What the shapes and dtypes of a call tell: ``given`` holds the layouts of ``out``."""

    extents: Mapping[str, int]
    layouts: tuple[Layout, ...]
    outputs: tuple[tuple[tuple[int, ...], str], ...]
    given: tuple[Layout, ...]


class Arguments(ABC):
    """The signature of a cascade: checks what it is called with.

    Tensors may be NumPy arrays or torch tensors of any strides, on the ``where`` that a subclass names.
    """

    where, bring = "the CPU", "cpu"

    def __init__(self, cascade: Cascade, outputs: tuple[Param, ...]) -> None:
        self.cascade = cascade
        self.outputs = outputs
        self.params = cascade.params
        self.tensors = tuple(p for p in self.params if p.indices)
        self.scalars = tuple(p for p in self.params if not p.indices)
        self._tensor_names = [p.name for p in self.tensors]
        self._scalar_names = [p.name for p in self.scalars]

    def __call__(self, *, out: Any = None, **inputs: Any) -> Any:
        return self.run(inputs, out)

    @abstractmethod
    def run(self, inputs: Mapping[str, Any], out: Any) -> Any:
        """What a call does, its parameters in a dictionary."""

    def again(self, inputs: Mapping[str, Any], out: Any) -> Any:
        """As `run` for arguments that are like those of the last call but for addresses and numbers; `ANEW`, and
        nothing done, for others."""
        return ANEW

    def _split(self, inputs: Mapping[str, Any]) -> tuple[list[Any], list[Any]]:
        """The arrays and the numbers of a call. Raises `InputError` for names that are missing or unknown."""
        try:
            arrays = [inputs[name] for name in self._tensor_names]
            numbers = [inputs[name] for name in self._scalar_names]
        except KeyError:
            raise self._misnamed(inputs) from None
        if len(inputs) != len(self.params):
            raise self._misnamed(inputs)
        return arrays, numbers

    def _here(self, x: Any) -> bool:
        """Whether a torch tensor lies where the kernel runs."""
        return bool(getattr(x, "is_cpu", True))

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
            if not self._here(x) or not _is_strided(x):
                raise InputError(
                    f"`{p.name}` is a {getattr(x, 'layout', '')} tensor on {getattr(x, 'device', '')}",
                    expected=f"a strided tensor on {self.where}",
                    got=f"{getattr(x, 'layout', '')} on {getattr(x, 'device', '')}",
                    hint=f"bring it there: {p.name}.{self.bring}()",
                )
            return x.resolve_neg() if x.is_neg() else x
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
        if all(type(x) is np.ndarray and x.flags.writeable for x in outs):
            return outs
        for x, p in zip(outs, self.outputs, strict=True):
            if type(x) is np.ndarray and x.flags.writeable:
                continue
            checked = self._accepted(x, p)
            # What had to be copied cannot be written through.
            if is_torch(x):
                if checked is x and not x.requires_grad:
                    continue
                refused, why = True, "needs a gradient" if x.requires_grad else "is a negated view"
            else:
                if not isinstance(x, np.ndarray):
                    raise InputError(f"`out` for `{p.name}` is no array", got=type(x).__name__, expected=print_param(p))
                refused, why = not x.flags.writeable, "is read-only"
            if refused:
                raise InputError(f"`out` for `{p.name}` {why}", hint="give memory that may be written")
        return [x if type(x) is np.ndarray or is_torch(x) else np.asarray(x) for x in outs]

    def _apart(
        self, written: list[int], given: tuple[Layout, ...], addresses: list[int], layouts: tuple[Layout, ...]
    ) -> None:
        """Raises `InputError` where an output shares memory with an input or with another output, or is askew.

        ``written`` are the outputs' addresses and ``given`` their layouts; then those of the inputs.
        """
        taken = list(zip(addresses, layouts, strict=True))
        for at, p, layout in zip(written, self.outputs, given, strict=True):
            if at % (DTYPES[p.dtype].bits // 8):
                raise InputError(f"`out` for `{p.name}` is not aligned to its elements")
            low, high = at + layout.low, at + layout.high
            for i, (bt, other) in enumerate(taken):
                if low < bt + other.high and bt + other.low < high and _share((at, layout), (bt, other)):
                    name = (*self.tensors, *self.outputs)[i].name
                    raise InputError(
                        f"`out` for `{p.name}` overlaps `{name}`", hint="write into memory that is no input"
                    )
            taken.append((at, layout))

    def _fitted(self, arrays: list[Any], outs: list[Any]) -> Checked:
        """The extents and layouts of arguments; raises `InputError` where these do not fit."""
        for x, p in zip(arrays, self.tensors, strict=True):
            if not is_torch(x) and any(s % x.dtype.itemsize for s in x.strides):
                raise InputError(f"the strides of `{p.name}` are no multiples of its element", hint="copy it first")
        shapes = {p.name: tuple(map(int, x.shape)) for x, p in zip(arrays, self.tensors, strict=True)}
        shapes |= {p.name: () for p in self.scalars}
        extents = resolve(self.cascade, {}, shapes)
        layouts = tuple(layout_of(x, p) for x, p in zip(arrays, self.tensors, strict=True))
        outputs = tuple((shape_of(self.cascade, p.name, extents), p.dtype) for p in self.outputs)
        given = tuple(layout_of(x, p, "`out` for ") for x, p in zip(outs, self.outputs, strict=True)) if outs else ()
        for layout, (shape, _), p in zip(given, outputs, self.outputs, strict=False):
            if layout.shape != shape:
                raise InputError(
                    f"`out` for `{p.name}` has the wrong shape", expected=f"{shape}", got=f"{layout.shape}"
                )
            if _overlaps_itself(layout):
                raise InputError(
                    f"elements of `out` for `{p.name}` share memory", hint="give an array without stride 0"
                )
        return Checked(extents, layouts, outputs, given)


def contiguous(shape: tuple[int, ...], dtype: str) -> Layout:
    """The layout of a shape in C order: strides in elements, and the bytes of it all."""
    strides, step = [], 1
    for n in reversed(shape):
        strides.append(step)
        step *= n
    size = math.prod(shape)
    return Layout(
        shape, tuple(reversed(strides)) if size else (0,) * len(shape), dtype, 0, size * DTYPES[dtype].bits // 8
    )


def param_shape(p: Param, extents: Mapping[str, int]) -> tuple[int, ...]:
    """A parameter's shape for some extents. Raises `VerifyError` where these do not give it."""
    shape = scratch_sizes(p.indices, extents)
    if any(n is None for n in shape):
        raise VerifyError(f"the shape of scratch tensor `{p.name}` is not known")
    return tuple(int(n or 0) for n in shape)


def new_array(shape: tuple[int, ...], dtype: str) -> Callable[[], Any]:
    """What makes a NumPy array of a shape, uninitialised."""
    return partial(np.empty, shape, numpy_dtype(dtype))


def new_tensor(shape: tuple[int, ...], dtype: str) -> Callable[[], Any]:
    """What makes a torch tensor of a shape on the CPU, uninitialised."""
    torch = sys.modules["torch"]
    return partial(torch.empty, shape, dtype=getattr(torch, str(numpy_dtype(dtype))))


def scalar_value(p: Param, given: Any) -> Any:
    """A number in the form that `struct` packs for its dtype: narrow floats by their bits."""
    row = DTYPES[p.dtype]
    if type(given) in (float, np.float32, np.float64) and row.bits >= 32 and row.is_float and abs(given) < 1e38:
        return float(given)
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
