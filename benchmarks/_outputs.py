"""What a candidate returns: its arrays, where they lie, and how to spoil them so that a check can fail."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np


def arrays(outputs: object) -> Iterator[Any]:
    """The NumPy arrays and torch tensors in `outputs`, inside tuples, lists and dicts too."""
    if isinstance(outputs, dict):
        outputs = tuple(outputs.values())
    if isinstance(outputs, tuple | list):
        for output in outputs:
            yield from arrays(output)
    elif isinstance(outputs, np.ndarray) or hasattr(outputs, "data_ptr"):
        yield outputs


def addresses(outputs: object) -> tuple[int, ...]:
    """Where the data of each array lies; empty arrays are left out, for they lie nowhere."""
    found = ((a, a.size if isinstance(a, np.ndarray) else a.numel()) for a in arrays(outputs))
    return tuple(int(a.ctypes.data if isinstance(a, np.ndarray) else a.data_ptr()) for a, size in found if size)


def allocates(call: Callable[[], object]) -> bool | None:
    """Whether two calls in a row return different memory; None where the outputs hold no array."""
    first, second = call(), call()
    where = addresses(first), addresses(second)
    return where[0] != where[1] if where[0] and where[1] else None


def spoil(outputs: object) -> None:
    """Overwrite every array in place with what is surely wrong: NaN, or each bit inverted where NaN does not exist."""
    for array in arrays(outputs):
        if isinstance(array, np.ndarray):
            if not array.flags.writeable:
                continue
            if array.dtype.kind in "iub":
                np.invert(array, out=array)
            else:
                array.fill(math.nan)
        elif array.is_floating_point() or array.is_complex():
            array.fill_(math.nan)
        else:
            array.bitwise_not_()
