"""Which way an integer expression moves with a rank."""

from __future__ import annotations

import pytest

from castile.ir.cascade import Expr
from castile.ir.interval import slope
from castile.ir.parse import parse


def expression(text: str) -> Expr:
    return (
        parse(f"def f(X: f32[q, k], w: i32, a: i32[q]) -> Y:\n    Y[q, k] = X[q, k] * ({text})\n")
        .einsums[0]
        .expr.args[1]
    )  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("q + 1", 1),
        ("q - w + 1", 1),
        ("w - q", -1),
        ("(q + 1) // 16 * 16", 1),
        ("2 * q + k", 1),
        ("k + w", 0),
        ("maximum(q, k)", 1),
        ("minimum(-q, 3 - q // 2)", -1),
        ("q + (w - q)", None),
        ("minimum(q, w - q)", None),
        ("q % 3", None),
        ("q * w", None),
        ("a[q]", None),
    ],
)
def test_slopes(text: str, wanted: int | None) -> None:
    assert slope(expression(text), "q") == wanted
