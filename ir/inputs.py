"""What users hand to the oracle: arrays, numbers and sample coordinates, checked and put into its three NumPy types."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .cascade import Cascade, Param, Rank
from .dtypes import DTYPES
from .errors import InputError
from .print import print_param
from .scalar import Array, array_type, convert


def read_inputs(c: Cascade, inputs: Mapping[str, Any]) -> dict[str, Array]:
    """The inputs as float64, int64 or bool arrays that hold only values of the declared types. Raises `InputError`."""
    given: Any = inputs
    if not isinstance(given, Mapping):
        hint = f"write {{{', '.join(f'{p.name!r}: …' for p in c.params)}}}"
        raise InputError("inputs map parameter names to arrays", hint=hint, expected="a dict", got=_kind(given))
    names = ", ".join(p.name for p in c.params) or "none"
    for p in c.params:
        if p.name not in inputs:
            raise InputError(f"`{p.name}` is missing", hint=f"the parameters of `{c.name}` are {names}")
    for extra in inputs:
        if extra not in c.param_of:
            raise InputError(f"`{c.name}` has no parameter `{extra}`", hint=f"its parameters are {names}")
    return {p.name: _read(p, inputs[p.name]) for p in c.params}


def _kind(given: Any) -> str:
    return type(given).__name__


def _read(p: Param, given: Any) -> Array:
    array = _numbers(p, given)
    row = DTYPES[p.dtype]
    if row.is_float:
        return convert(array, p.dtype)
    whole = array.dtype.kind != "f" or bool(np.all(np.isfinite(array) & (array == np.floor(array))))
    if not whole:
        raise InputError(f"`{p.name}` holds values that are no integers", expected=p.dtype, got=str(array.dtype))
    if array.size and not row.lowest <= int(array.min()) <= int(array.max()) <= row.highest:
        raise InputError(
            f"`{p.name}` holds values outside {p.dtype}",
            expected=f"{row.lowest} to {row.highest}",
            got=f"{array.min()} to {array.max()}",
        )
    return array.astype(array_type(p.dtype))


def _numbers(p: Param, given: Any) -> Array:
    """Real numbers in a NumPy array, wherever they come from."""
    try:
        if hasattr(given, "detach"):
            tensor = given.detach().cpu()
            given = tensor.double().numpy() if tensor.is_floating_point() else tensor.numpy()
        array = np.asarray(given)
        if array.dtype.kind == "V" and array.dtype.names is None:
            array = array.astype(np.float64)  # bf16 and the 8-bit floats of ml_dtypes
    except Exception as error:  # arrays come from foreign libraries, which raise what they like
        message = f"`{p.name}` is no array of numbers: {error}".split("\n")[0]
        raise InputError(message, expected=print_param(p), got=_kind(given)) from None
    if array.dtype.kind not in "fiub":
        raise InputError(f"`{p.name}` is no array of real numbers", expected=print_param(p), got=str(array.dtype))
    return array.astype(np.float64) if array.dtype.kind == "f" else array


def sample_points(c: Cascade, at: Any, extents: Mapping[str, int]) -> dict[str, Array]:
    """The sampled coordinates, one array ``[N]`` for each rank of the outputs. Raises `InputError`."""
    ranks = tuple(dict.fromkeys(i.name for name in c.outputs for i in c.indices_of(name) if isinstance(i, Rank)))
    expected = f"a mapping from {', '.join(ranks) or 'no rank'} to coordinates, or integers of shape [N, {len(ranks)}]"
    try:
        if isinstance(at, Mapping):
            given = {str(r): np.atleast_1d(np.asarray(v)) for r, v in at.items()}
            count = max((v.size for v in given.values() if v.size != 1), default=1)
        else:
            table = np.asarray(at)
            if table.ndim != 2 or table.shape[1] != len(ranks):
                raise InputError("`at` does not fit the outputs", expected=expected, got=f"shape {table.shape}")
            given = {r: table[:, i] for i, r in enumerate(ranks)}
            count = len(table)
    except ValueError as error:
        raise InputError(f"`at` is no array: {error}", expected=expected, got=_kind(at)) from None
    for r in (*ranks, *given):
        if r not in given or r not in ranks:
            what = f"`at` gives no coordinates for rank `{r}`" if r in ranks else f"no output has rank `{r}`"
            raise InputError(what, rank=r, hint=f"the outputs' ranks are {', '.join(ranks) or 'none'}")
    return {r: _coordinates(r, v, count, extents[r]) for r, v in given.items()}


def _coordinates(rank: str, given: Array, count: int, extent: int) -> Array:
    if (given.dtype.kind not in "iu" and given.size) or given.ndim != 1 or len(given) not in (1, count):
        got = f"{given.dtype} of shape {given.shape}"
        message = f"the coordinates of `{rank}` do not fit"
        raise InputError(message, rank=rank, expected=f"{count} integers, or one", got=got)
    if given.size and not 0 <= int(given.min()) <= int(given.max()) < extent:
        raise InputError(
            f"a coordinate of `{rank}` lies outside its extent",
            rank=rank,
            expected=f"0 to {extent - 1}" if extent else "none, as it is empty",
            got=f"{given.min()} to {given.max()}",
        )
    return np.broadcast_to(given.astype(np.int64), (count,))
