"""Tensors laid in tiles: what a cascade that reads ``W[n // 64, k, n % 64]`` is given."""

from __future__ import annotations

from typing import Any

import numpy as np

from .errors import InputError


def in_tiles(x: Any, size: int = 64) -> Any:
    """A tensor with its last axis in tiles of ``size``, whose number comes first: ``[…, n]`` → ``[n / size, …, size]``.

    Each tile lies in memory by itself, so that a kernel reads it as one stream. ``x`` is a NumPy array or a torch
    tensor, and so is the result; where the last tile is not full, zeros fill it up. Raises `InputError` for a number,
    and for a size below 1.

    in_tiles(W)     W: u32[k // 8, n] → u32[n // 64, k // 8, 64], read at [n // 64, k // 8, n % 64]
    """
    if not hasattr(x, "shape") or not len(x.shape):
        raise InputError("there is no axis to lay in tiles", expected="an array of one axis or more", got=repr(x)[:60])
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise InputError("a tile has a whole number of elements", expected="1 or more", got=repr(size)[:60])
    *rest, n = x.shape
    count = -(-n // size)
    if isinstance(x, np.ndarray):
        whole = np.zeros((*rest, count * size), x.dtype)
        whole[..., :n] = x
        return np.ascontiguousarray(np.moveaxis(whole.reshape(*rest, count, size), -2, 0))
    whole = x.new_zeros((*rest, count * size))
    whole[..., :n] = x
    return whole.reshape(*rest, count, size).movedim(-2, 0).contiguous()
