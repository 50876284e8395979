"""What numbers of each type are to the oracle: arithmetic that wraps, casts that saturate, declared types."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from evaluated import one
from numpy import inf, nan

from castile.ir.evaluate import evaluate
from castile.ir.parse import parse


@pytest.mark.parametrize(
    ("expression", "params", "inputs", "want"),
    [
        ("a * a", "a: i32", {"a": 1 << 20}, 0),
        ("a + 1", "a: i32", {"a": 2**31 - 1}, -(2**31)),
        ("a + a", "a: i8", {"a": 127}, 254),  # narrow integers compute in i32
        ("i8(a + a)", "a: i8", {"a": 127}, -2),
        ("u8(a)", "a: i32", {"a": -1}, 255),
        ("a - 1", "a: u32", {"a": 0}, 2**32 - 1),
        ("a - b", "a: u32, b: i32", {"a": 0, "b": 1}, -1),  # u32 with a signed type is i64
        ("-a", "a: u32", {"a": 1}, 2**32 - 1),
        ("~a", "a: u32", {"a": 0}, 2**32 - 1),
        ("~a", "a: i32", {"a": 5}, -6),
        ("a << 31", "a: i32", {"a": 3}, -(2**31)),
        ("a << 40", "a: i32", {"a": 3}, 0),
        ("a >> 1", "a: i32", {"a": -3}, -2),
        ("a >> 1", "a: u32", {"a": 2**32 - 1}, 2**31 - 1),
        ("a // b", "a: i64, b: i64", {"a": -7, "b": 2}, -4),
        ("a % b", "a: i64, b: i64", {"a": -7, "b": 3}, 2),
        ("a % b", "a: i64, b: i64", {"a": 7, "b": -3}, -2),
        ("a // b", "a: i32, b: i32", {"a": -(2**31), "b": -1}, -(2**31)),
        ("abs(a)", "a: i64", {"a": -(2**63)}, -(2**63)),
        ("a ** 3", "a: i32", {"a": 1 << 11}, 0),
        ("a / b", "a: i64, b: i64", {"a": 7, "b": 2}, 3.5),
        ("round(a) & 3", "a: i64", {"a": (1 << 60) + 7}, 3),  # of an integer, itself
        ("floor(a) + 1", "a: i64", {"a": (1 << 60) + 1}, (1 << 60) + 2),
        ("round(a)", "a: f64", {"a": 2.5}, 2.0),
        ("round(a)", "a: f64", {"a": -3.5}, -4.0),
        ("a // b", "a: f64, b: f64", {"a": -7.5, "b": 2.0}, -4.0),
        ("a + b", "a: bool, b: bool", {"a": True, "b": True}, 2),
        ("a & b", "a: bool, b: bool", {"a": True, "b": False}, False),
        ("~a", "a: bool", {"a": True}, False),
        ("a < b", "a: i8, b: f64", {"a": 3, "b": 3.5}, True),
        ("i32(a)", "a: f64", {"a": -3.9}, -3),
        ("i32(a)", "a: f64", {"a": 1e300}, 2**31 - 1),
        ("i32(a)", "a: f64", {"a": nan}, 0),
        ("i64(a)", "a: f64", {"a": inf}, 2**63 - 1),
        ("i64(a)", "a: f64", {"a": -inf}, -(2**63)),
        ("u8(a)", "a: f64", {"a": -5.0}, 0),
        ("u8(a)", "a: f64", {"a": 300.0}, 255),
        ("bool(a)", "a: f64", {"a": nan}, True),
        ("bool(a)", "a: i64", {"a": 1 << 62}, True),
        ("f32(a)", "a: bool", {"a": True}, 1.0),
        ("f8e4m3(a)", "a: f64", {"a": 460.0}, 448.0),
        ("f8e5m2(a)", "a: f64", {"a": 1e9}, inf),
        ("1 << 62", "a: f32", {"a": 0.0}, 1 << 62),
        ("where(a > 0, 1, 2.5)", "a: f32", {"a": 1.0}, 1.0),
        ("0.1 + 0.2", "a: f32", {"a": 0.0}, 0.1 + 0.2),
    ],
)
def test_types(expression: str, params: str, inputs: dict[str, Any], want: Any) -> None:
    got = one(expression, params, **inputs)
    assert got == want
    assert isinstance(got, np.floating) == isinstance(want, float)
    assert isinstance(got, np.bool_) == isinstance(want, bool)


def test_not_a_number_comes_out_of_what_makes_none() -> None:
    for expression in ("f8e4m3(a * 1000.0)", "sqrt(-a)", "log(-a)", "a % 0.0", "a * inf - a * inf"):
        assert np.isnan(one(expression, "a: f64", a=3.0)), expression


def test_declared_types_convert() -> None:
    text = "def f(X: f64[n]) -> (A, B, C):\n    A[n]: i8 = X[n]\n    B[n]: bf16 = X[n]\n    C[n]: u32 = i64(X[n])"
    got = evaluate(parse(text), {"X": [1.7, -300.0, 1.00390625]})
    np.testing.assert_array_equal(got["A"], [1, -128, 1])
    np.testing.assert_array_equal(got["B"], [1.703125, -300.0, 1.0])
    np.testing.assert_array_equal(got["C"], [1, 2**32 - 300, 1])
