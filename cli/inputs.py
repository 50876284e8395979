"""Inputs for a cascade: extents, arrays from a file, and random values that mean something to it.

Random integers respect what the cascade does with them: a page table stays inside its pages, a length inside its rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..ir.cascade import Access, Call, Cascade, Expr, Param, Rank, free_ranks, transform, walk
from ..ir.dtypes import DTYPES, numpy_dtype
from ..ir.errors import InputError, UsageError
from ..ir.extents import bindings, extent_of, interval, resolve, shape_of

Array = npt.NDArray[Any]

# The extent of a rank that nobody gave, and how much an input file may unpack to.
SMALL_EXTENT = 8
MAX_FILE_BYTES = 1 << 34


def complete(c: Cascade, given: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """The extent of every rank: as given, as the arrays have it, else a small one."""
    known = dict(given)
    bound = {i.name for p in c.params if p.name in shapes for i in p.indices if isinstance(i, Rank)}
    for b in bindings(c):
        if b.param is not None and b.rank not in known and b.rank not in bound:
            known[b.rank] = SMALL_EXTENT
    return resolve(c, known, shapes)


def random_inputs(c: Cascade, extents: Mapping[str, int], seed: int) -> dict[str, Array]:
    """Inputs of the declared types: normal floats, positive scalars, integers within what the cascade can take.

    The same cascade, extents and seed give the same values.
    """
    spans = integer_spans(c, extents)
    positive = set(_under_roots(c))
    found = {}
    for number, p in enumerate(c.params):
        rng = np.random.default_rng([seed, number])
        found[p.name] = _draw(p, shape_of(c, p.name, extents), rng, spans.get(p.name), p.name in positive)
    return found


def _draw(
    p: Param, shape: tuple[int, ...], rng: np.random.Generator, span: tuple[int, int] | None, positive: bool
) -> Array:
    row = DTYPES[p.dtype]
    if row.is_float:
        if positive or not shape:
            return rng.uniform(0.125, 0.875, shape)
        return rng.standard_normal(shape)
    if row.kind == "bool":
        return rng.integers(0, 2, shape).astype(bool)
    low, high = span or _usual(p.dtype)
    low, high = max(low, row.lowest), min(high, row.highest)
    return rng.integers(low, max(low, high), shape, endpoint=True)


def _usual(dtype: str) -> tuple[int, int]:
    """Integers of which nothing is known: words of bits are full, numbers are small."""
    return {"u32": (0, 2**32 - 1), "u8": (0, 255), "i8": (-8, 7), "i16": (-8, 7)}.get(dtype, (0, 7))


def _nodes(c: Cascade) -> Iterator[Expr]:
    for e in c.einsums:
        yield from walk(e.expr)


def _under_roots(c: Cascade) -> Iterator[str]:
    """Parameters of which a root or a logarithm is taken."""
    for node in _nodes(c):
        match node:
            case Call(op="log" | "log2" | "sqrt" | "rsqrt", args=(Access(tensor=name),)):
                yield name
            case _:
                pass


def integer_spans(c: Cascade, extents: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """For integer parameters, the values with which the cascade works, read off its indices and operations."""
    integers = {p.name for p in c.params if DTYPES[p.dtype].is_integer}
    found: dict[str, tuple[int, int]] = {}

    def narrow(name: str, low: int, high: int) -> None:
        a, b = found.get(name, (low, high))
        found[name] = (max(a, low), min(b, high))

    for node in _nodes(c):
        match node:
            case Access(tensor=tensor, indices=indices):
                for size, index in zip(shape_of(c, tensor, extents), indices, strict=True):
                    names = {n.tensor for n in walk(index) if isinstance(n, Access)} & integers
                    if names and size:
                        high = _greatest(index, names, size, extents)
                        for name in names:
                            narrow(name, 0, high)
            case Call(op="floordiv" | "mod", args=(_, Access(tensor=name))) if name in integers:
                narrow(name, 1, 7)
            case Call(op="lshift" | "rshift", args=(_, Access(tensor=name))) if name in integers:
                narrow(name, 0, 7)
            case Call(op="lt" | "le" | "gt" | "ge" | "eq" | "ne" as op, args=args):
                for a, b in (args, args[::-1]):
                    if isinstance(a, Access) and a.tensor in integers and (reach := _reach(b, extents)):
                        narrow(a.tensor, *((0, reach - 1) if op in ("eq", "ne") else (1, reach)))
            case Call(op="exp2", args=(arg,)):
                # A power-of-two scale, stored with the bias of an 8-bit exponent.
                for name in {n.tensor for n in walk(arg) if isinstance(n, Access)} & integers:
                    narrow(name, 120, 134)
            case _:
                pass
    return {name: (low, high) for name, (low, high) in found.items() if low <= high}


def _reach(e: Expr, extents: Mapping[str, int]) -> int | None:
    """How far the coordinates of an expression of ranks go; None for anything else."""
    return extent_of(e, extents) if isinstance(e, Rank) or (isinstance(e, Call) and free_ranks(e)) else None


def _greatest(index: Expr, names: set[str], size: int, extents: Mapping[str, int]) -> int:
    """The greatest value that the named tensors may hold for the index to stay below ``size``."""
    box = {r: (0, max(0, extents[r] - 1)) for r in free_ranks(index)}
    stand_in = "\0value"  # no rank can be called that
    plain = transform(index, lambda e: Rank(stand_in) if isinstance(e, Access) and e.tensor in names else e)

    def fits(value: int) -> bool:
        span = interval(plain, {**box, stand_in: (0, value)}, extents)
        return span is not None and span[1] < size

    low, high = 0, size
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def read_npz(path: Path, c: Cascade) -> dict[str, Array]:
    """The arrays of an .npz file, by parameter. Raises `InputError`; nothing in the file is executed or unpickled."""
    import zipfile
    import zlib

    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > MAX_FILE_BYTES:
            raise InputError(f"{path} unpacks to {size} bytes; at most {MAX_FILE_BYTES} are read")
        with np.load(path) as arrays:
            return {name: _unpacked(arrays[name], name, c) for name in arrays.files}
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
    except zipfile.BadZipFile:
        raise InputError(f"{path} is not an .npz file", hint="write one with numpy.savez(path, Q=q, K=k)") from None
    except ValueError as error:
        objects = "allow_pickle" in str(error)
        raise InputError(
            f"{path} holds {'Python objects, not numbers' if objects else 'an array that cannot be read'}",
            hint="save plain arrays: numpy.savez(path, Q=q, K=k)",
        ) from None
    except (EOFError, KeyError, MemoryError, OverflowError, RuntimeError, SyntaxError, TypeError, zlib.error):
        raise InputError(f"{path} is damaged", hint="write it again with numpy.savez") from None


def _unpacked(array: Array, name: str, c: Cascade) -> Array:
    """NumPy's files do not know bf16 and the 8-bit floats: their bytes come back as opaque items of the same size."""
    p = c.param_of.get(name)
    if p is not None and array.dtype.kind == "V" and array.dtype.itemsize * 8 == DTYPES[p.dtype].bits:
        return array.view(numpy_dtype(p.dtype)).astype(np.float64)
    return array


def number(text: str) -> float | int:
    """A scalar from the command line."""
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"`{text[:40]}` is no number", hint="write --set scale=0.125") from None


@dataclass(frozen=True, slots=True)
class Given:
    """Inputs, where each came from ("file", "command line" or "random"), and the extent of every rank."""

    values: Mapping[str, Any]
    origin: Mapping[str, str]
    extents: Mapping[str, int]

    def filled(self, c: Cascade, seed: int) -> Given:
        """With random values for what is missing."""
        missing = [p.name for p in c.params if p.name not in self.values]
        drawn = random_inputs(c, self.extents, seed) if missing else {}
        values = {p.name: self.values[p.name] if p.name in self.values else drawn[p.name] for p in c.params}
        return Given(values, {name: self.origin.get(name, "random") for name in values}, self.extents)


def gather(
    c: Cascade, shapes: Mapping[str, int], path: Path | None, scalars: Mapping[str, float | int], random: bool
) -> Given:
    """What the command line and a file give, and the extents that follow. ``random`` allows inputs to be missing."""
    arrays = read_npz(path, c) if path is not None else {}
    values: dict[str, Any] = {**arrays, **scalars}
    names = ", ".join(p.name for p in c.params)
    for name in values:
        if name not in c.param_of:
            raise InputError(f"`{c.name}` has no parameter `{name}`", hint=f"its parameters are {names}")
    missing = [p.name for p in c.params if p.name not in values]
    if missing and not random:
        hint = "add --random to draw what is missing" if values else "give --input FILE.npz, or --random to draw them"
        raise InputError(f"no value for {', '.join(f'`{m}`' for m in missing)}", hint=hint)
    origin = {name: "command line" if name in scalars else "file" for name in values}
    given = {name: np.shape(value) for name, value in values.items()}
    return Given(values, origin, complete(c, shapes, given))
