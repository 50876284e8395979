"""What the oracle takes: inputs and samples of every kind, those that do not fit, and none of them changed."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from evaluated import run
from numpy import nan

from castile.ir.errors import InputError
from castile.ir.evaluate import evaluate
from castile.ir.parse import parse

GEMV = (
    "def gemv(A: bf16[m, k], x: f32[k], s: f32, i: i8[m], keep: bool[m]) -> Y:\n    Y[m] = s * sum[k](A[m, k] * x[k])"
)
GOOD: dict[str, Any] = {"A": np.ones((2, 3)), "x": np.ones(3), "s": 2.0, "i": [1, 2], "keep": [True, False]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"A": None}, "`A` is missing"),
        ({"Z": 1.0}, "`gemv` has no parameter `Z`"),
        ({"A": np.ones(3)}, "`A` has 1 axis, not 2"),
        ({"x": np.ones(4)}, "rank `k` has two extents: 3 by axis 1 of `A`, 4 by axis 0 of `x`"),
        ({"s": np.ones(1)}, "`s` has 1 axis, not 0"),
        ({"x": "abc"}, "`x` is no array of real numbers"),
        ({"x": ["a", "b", "c"]}, "`x` is no array of real numbers"),
        ({"x": [[1.0], [2.0, 3.0]]}, "`x` is no array of numbers"),
        ({"x": np.array([None, 1.0, 2.0])}, "`x` is no array of real numbers"),
        ({"x": np.ones(3, complex)}, "`x` is no array of real numbers"),
        ({"x": np.ones(3, "datetime64[s]")}, "`x` is no array of real numbers"),
        ({"x": np.zeros(3, [("a", "f4")])}, "`x` is no array of real numbers"),
        ({"s": object()}, "`s` is no array of real numbers"),
        ({"s": {}}, "`s` is no array of real numbers"),
        ({"i": [1.5, 2.0]}, "`i` holds values that are no integers"),
        ({"i": [nan, 2.0]}, "`i` holds values that are no integers"),
        ({"i": [1, 128]}, "`i` holds values outside i8"),
        ({"i": np.array([1, 2**64 - 1], np.uint64)}, "`i` holds values outside i8"),
        ({"keep": [0, 2]}, "`keep` holds values outside bool"),
    ],
)
def test_inputs_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    inputs = {k: v for k, v in {**GOOD, **change}.items() if v is not None}
    with pytest.raises(InputError) as caught:
        evaluate(parse(GEMV), inputs)
    assert message in str(caught.value)
    assert caught.value.hint or (caught.value.expected and caught.value.got)


def test_inputs_that_are_no_mapping() -> None:
    with pytest.raises(InputError, match="inputs map parameter names"):
        evaluate(parse(GEMV), [1.0])  # type: ignore[arg-type]


def test_inputs_of_every_kind() -> None:
    c = parse(GEMV)
    want = evaluate(c, GOOD)["Y"]
    torch = pytest.importorskip("torch")
    others: dict[str, list[Any]] = {
        "A": [np.ones((2, 3), np.float16), np.ones((2, 3), ml_dtypes.bfloat16), np.ones((2, 3), int), torch.ones(2, 3),
              torch.ones(2, 3, dtype=torch.bfloat16, requires_grad=True), torch.ones(3, 2).T, [[1, 1, 1], [1, 1, 1]]],
        "s": [2, np.float32(2), torch.tensor(2.0), np.array(2.0), True + 1],
        "i": [np.array([1.0, 2.0]), torch.tensor([1, 2]), np.array([1, 2], np.uint64)],
        "keep": [[1, 0], np.array([1.0, 0.0]), torch.tensor([True, False])],
    }  # fmt: skip
    for name, values in others.items():
        for value in values:
            np.testing.assert_array_equal(evaluate(c, {**GOOD, name: value})["Y"], want)


def test_inputs_are_rounded_to_narrow_types() -> None:
    text = "def f(A: bf16[n], B: f8e4m3[n], C: f32[n]) -> Y:\n    Y[n] = A[n] + B[n] + C[n]"
    x = np.array([0.1])
    a, b = x.astype(ml_dtypes.bfloat16), x.astype(ml_dtypes.float8_e4m3fn)
    assert run(text, A=x, B=x, C=x) == a.astype(float) + b.astype(float) + x


@pytest.mark.parametrize(
    ("at", "message"),
    [
        ({"m": [0]}, "gives no coordinates for rank `n`"),
        ({"m": [0], "n": [0], "k": [0]}, "no output has rank `k`"),
        ({"m": [0, 1], "n": [0, 1, 2]}, "the coordinates of `m` do not fit"),
        ({"m": [0.5], "n": [0]}, "the coordinates of `m` do not fit"),
        ({"m": [[0]], "n": [0]}, "the coordinates of `m` do not fit"),
        ({"m": [True], "n": [0]}, "the coordinates of `m` do not fit"),
        ({"m": [2], "n": [0]}, "a coordinate of `m` lies outside its extent"),
        ({"m": [-1], "n": [0]}, "a coordinate of `m` lies outside its extent"),
        ([0, 0], "`at` does not fit the outputs"),
        ([[0, 0, 0]], "`at` does not fit the outputs"),
        ([[0, 0], [0]], "`at` is no array"),
        ("mn", "`at` does not fit the outputs"),
        ({"m": "a", "n": 0}, "the coordinates of `m` do not fit"),
    ],
)
def test_samples_that_do_not_fit(at: Any, message: str) -> None:
    c = parse("def f(A: f32[m, k], B: f32[k, n]) -> C:\n    C[m, n] = sum[k](A[m, k] * B[k, n])")
    with pytest.raises(InputError) as caught:
        evaluate(c, {"A": np.ones((2, 3)), "B": np.ones((3, 4))}, at)
    assert message in str(caught.value)


def test_samples_of_every_kind() -> None:
    c = parse(
        "def f(A: f32[m], B: f32[n]) -> (C, D, s):\n    C[m, n] = A[m] * B[n]\n    D[n] = B[n]\n    s = sum[m](A[m])"
    )
    inputs = {"A": np.arange(3.0), "B": np.arange(4.0) + 1}
    for at in ({"m": [1, 2], "n": 3}, {"n": [3, 3], "m": np.array([1, 2], np.uint8)}, [[1, 3], [2, 3]]):
        got = evaluate(c, inputs, at)
        assert list(got) == ["C", "D", "s"]
        np.testing.assert_array_equal(got["C"], [4, 8])
        np.testing.assert_array_equal(got["D"], [4, 4])
        np.testing.assert_array_equal(got["s"], [3, 3])
    for at in ({"m": [], "n": []}, np.zeros((0, 2), int), {"m": [], "n": [1]}):
        assert [v.shape for v in evaluate(c, inputs, at).values()] == [(0,), (0,), (0,)]


def test_inputs_are_not_changed() -> None:
    c = parse("def f(X: bf16[n]) -> Y:\n    Y[n] = X[n] * 2")
    x = np.array([0.1, 0.2])
    kept = x.copy()
    y = evaluate(c, {"X": x})["Y"]
    y += 1
    np.testing.assert_array_equal(x, kept)
