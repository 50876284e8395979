"""Inputs for a cascade as the command line gives them: extents, scalars, arrays from a file, random for the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..ir.cascade import Cascade, Rank
from ..ir.dtypes import DTYPES, numpy_dtype
from ..ir.errors import InputError, UsageError
from ..ir.extents import bindings, resolve
from ..ir.print import print_param
from ..ir.samples import random_inputs

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
    for name in scalars:
        if c.param_of[name].indices:
            raise InputError(
                f"`{name}` is no scalar",
                expected=print_param(c.param_of[name]),
                got="one number",
                hint="an array comes from a file: --input FILE.npz",
            )
    missing = [p.name for p in c.params if p.name not in values]
    if missing and not random:
        hint = "add --random to draw what is missing" if values else "give --input FILE.npz, or --random to draw them"
        raise InputError(f"no value for {', '.join(f'`{m}`' for m in missing)}", hint=hint)
    origin = {name: "command line" if name in scalars else "file" for name in values}
    given = {name: np.shape(value) for name, value in values.items()}
    return Given(values, origin, complete(c, shapes, given))
