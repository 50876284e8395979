"""Tensors in tiles are read as they were before."""

from __future__ import annotations

import numpy as np
import pytest

import castile

COPY = """
def f(W: i32[n // 16, k, 16], c: f32[n]) -> Y:
    Y[k, n] = W[n // 16, k, n % 16] * c[n]
"""


@pytest.mark.parametrize("n", [1, 16, 37])
def test_what_is_laid_in_tiles_reads_the_same(n: int) -> None:
    x = np.arange(3 * n, dtype=np.int32).reshape(3, n)
    tiles = castile.in_tiles(x, 16)
    assert tiles.shape == (-(-n // 16), 3, 16)
    assert tiles.flags.c_contiguous
    c = castile.parse(COPY)
    given = {"W": tiles, "c": np.ones(n)}
    assert (castile.evaluate(c, given)["Y"] == x).all()


def test_tensors_of_torch() -> None:
    torch = pytest.importorskip("torch")
    x = torch.arange(2 * 3 * 5).reshape(2, 3, 5)
    assert (castile.in_tiles(x, 2).numpy() == castile.in_tiles(x.numpy(), 2)).all()


def test_a_number_has_no_axis() -> None:
    with pytest.raises(castile.CastileError, match="no axis"):
        castile.in_tiles(1.0)
