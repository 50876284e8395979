"""What counts as a pass: reductions visit the fibers of what they read along a rank."""

from __future__ import annotations

import pytest

import castile
from castile.passes.count import count_passes

CASES = {
    "O = sum[k](X[k] - sum[k](X[k]))": 2,
    "O = sum[k](where(any[j](j > n), 1.0, 0.0))": 0,  # coordinates alone
    "O = sum[k](X[k] * sum[k](1.0))": 1,
    "O = sum[k](X[k]) * sum[k](n * max[j](X[j]))": 1,  # the same for each k
    "A[k] = where(k > 0, A[k - 1], 0.0) + X[k]\n    O = A[n]": 1,
    # Two scans go along the rank side by side.
    "A[k] = where(k > 0, A[k - 1], 0.0) + X[k]\n    B[k] = where(k > 0, B[k - 1] * A[k - 1], X[k])\n    O = B[n]": 1,
    "A[k] = where(k > 0, A[k - 1], 0.0) + X[k]\n    B[k] = where(k > 0, B[k - 1], X[k]) * A[n]\n    O = B[n]": 2,
}


@pytest.mark.parametrize("text", CASES)
def test_passes(text: str) -> None:
    assert count_passes(castile.parse(f"def f(X: f32[k], Y: f32[j], n: i32) -> O:\n    {text}\n"))["k"] == CASES[text]
