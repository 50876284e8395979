"""Rows of products that are stored once: which, and as what."""

from __future__ import annotations

import castile
from castile.ir.cascade import Einsum
from castile.ir.types import tensor_types
from castile.passes.operands import with_operands

LARGE = {"m": 512, "k": 512, "n": 512, "q": 512, "d": 64}
TILES = {"m": 64, "n": 64, "q": 64}


def stored(text: str, **tiles: int) -> list[Einsum]:
    c = castile.parse(text)
    sizes = {r: LARGE.get(r, 64) for r in c.ranks}
    changed, names = with_operands(c, tensor_types(c), sizes, TILES | tiles)
    return [e for e in changed.einsums if e.name in names]


def texts(text: str, **tiles: int) -> list[str]:
    return [str(e.output.name) + str(list(e.output.ranks)) for e in stored(text, **tiles)]


PLAIN = "def f(A: f32[m, k], W: bf16[k, n]) -> Y:\n    Y[m, n] = sum[k]({} * W[k, n])\n"


def test_rows_that_are_computed_are_stored_as_the_product_takes_them() -> None:
    (e,) = stored(PLAIN.format("exp(A[m, k])"))
    assert (e.output.name, e.output.ranks, e.output.dtype) == ("Y_rows", ("m", "k"), "bf16")
    (e,) = stored(PLAIN.format("exp(A[m, k])").replace("bf16", "f32"))
    assert e.output.dtype is None


def test_maps_on_the_way_are_part_of_them() -> None:
    text = (
        "def f(A: f32[m, k], W: f32[k, n]) -> Y:\n    B[m, k] = exp(A[m, k])\n    Y[m, n] = sum[k](B[m, k] * W[k, n])\n"
    )
    assert texts(text) == ["Y_rows['m', 'k']"]


def test_what_is_a_tensor_already_is_not_stored() -> None:
    assert not texts(PLAIN.format("A[m, k]"))


def test_what_one_tile_of_columns_makes_is_not_stored() -> None:
    assert not texts(PLAIN.format("exp(A[m, k])"), n=512)


def test_what_takes_more_room_than_its_source_is_not_stored() -> None:
    text = "def f(A: u8[m, k], W: f32[k, n]) -> Y:\n    Y[m, n] = sum[k](exp(f32(A[m, k])) * W[k, n])\n"
    assert not texts(text)


def test_floats_of_8_bits_are_not_stored() -> None:
    assert not texts(PLAIN.format("f8e4m3(A[m, k] / 3)"))


def test_results_as_large_as_the_rows_are_not_stored() -> None:
    """The weights of attention's gradient would take memory by the square of its length."""
    text = """
def f(Q: f32[q, d], K: f32[k, d], V: f32[k, n]) -> O:
    S[q, k] = sum[d](Q[q, d] * K[k, d])
    O[q, n] = sum[k](exp(S[q, k]) * V[k, n])
"""
    assert not texts(text)


def test_names_that_are_taken() -> None:
    assert texts(PLAIN.format("exp(A[m, k])").replace("W", "Y_rows")) == ["Y_rows2['m', 'k']"]
