"""Between which integers values lie that are made of data."""

from __future__ import annotations

import pytest

from castile.ir.parse import parse
from castile.ir.spans import span
from castile.ir.types import TypeChecker, tensor_types


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("W[k] & 15", (0, 15)),
        ("W[k] >> 28", (0, 15)),
        ("W[k] >> (4 * (k % 8)) & 15", (0, 15)),
        ("(W[k] & 15) - Z[k]", (-255, 15)),
        ("S[k] & 7", (0, 7)),
        ("S[k] + 1", (-127, 128)),
        ("S[k] >> 1", (-64, 63)),
        ("(W[k] & 3) | 4", (0, 7)),
        ("(W[k] & 3) * (W[k] & 3)", (0, 9)),
        ("where(k > 3, S[k] + 0, Z[k] + 0)", (-128, 255)),
        # What may wrap is anywhere in its type.
        ("W[k] + 1", (0, (1 << 32) - 1)),
        ("W[k] << 4", (0, (1 << 32) - 1)),
        ("i32(W[k])", (-(1 << 31), (1 << 31) - 1)),
        ("F[k] + 1", None),
    ],
)
def test_spans(text: str, wanted: tuple[int, int] | None) -> None:
    c = parse(f"def f(W: u32[k], S: i8[k], Z: u8[k], F: f32[k]) -> O:\n    O[k] = {text}\n")
    checker = TypeChecker(tensor_types(c), {})
    assert span(c.einsums[0].expr, checker) == wanted
