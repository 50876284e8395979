"""The oracle on what is deep, large or computed in pieces."""

from __future__ import annotations

import numpy as np
import pytest
from evaluated import close

from castile.ir.errors import EvaluationError
from castile.ir.evaluate import evaluate, evaluate_values
from castile.ir.parse import parse

RNG = np.random.default_rng(0)


def test_samples_of_a_deep_cascade() -> None:
    """A sample recurses through every Einsum, far deeper than Python's own limit."""
    lines = [f"    X{i + 1}[k] = X{i}[k] + 1" for i in range(2000)]
    c = parse("def f(X0: f32[k]) -> X2000:\n" + "\n".join(lines))
    assert evaluate(c, {"X0": np.zeros(3)}, {"k": [1]})["X2000"] == 2000


def test_deep_expressions() -> None:
    for deep in ("exp(" * 98 + "X[k]" + ")" * 98, "-" * 98 + "X[k]", "X[k]" + " + 1" * 98):
        c = parse(f"def f(X: f64[k]) -> Y:\n    Y[k] = {deep}")
        assert evaluate(c, {"X": np.zeros(2)}, {"k": [1]})["Y"].shape == (1,)
        assert evaluate(c, {"X": np.zeros(2)})["Y"].shape == (2,)


def test_a_large_sample_takes_little_memory() -> None:
    """One element of a product of large matrices, and of attention over many keys, in well under a second each."""
    n = 2000
    a = RNG.standard_normal((n, n)).astype(np.float32)
    c = parse(
        "def f(A: f32[m, k], B: f32[k, n]) -> C:\n    D[m, n] = sum[k](A[m, k] * B[k, n])\n    C[m, n] = exp(D[m, n])"
    )
    got = evaluate(c, {"A": a, "B": a}, {"m": [7], "n": [1999]})["C"]
    close(got, np.exp(np.sum(a[7].astype(float) * a[:, 1999])))


def test_what_is_too_large_to_hold_is_refused() -> None:
    c = parse("def f(A: f32[m], B: f32[n]) -> C:\n    C[m, n] = A[m] * B[n]")
    wide = np.broadcast_to(np.float32(1), 1 << 20)
    with pytest.raises(EvaluationError, match="too many to hold") as caught:
        evaluate(c, {"A": wide, "B": wide})
    assert "sample" in caught.value.hint
    assert evaluate(c, {"A": wide, "B": wide}, {"m": [1 << 19], "n": [3]})["C"] == 1


def test_reductions_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is computed in many small blocks is what is computed at once."""
    from castile.ir import blocks

    text = """
def f(X: f32[a, b, c], keep: bool[a, b, c], I: i32[a, b, c]) -> (S, P, M, N, G, H, A, B, D):
    S[a] = sum[b, c](exp(where(keep[a, b, c], X[a, b, c], -inf)))
    P[a] = prod[b, c](X[a, b, c])
    M[a] = max[b, c](where(keep[a, b, c], X[a, b, c], -inf))
    N[a] = min[c](sum[b](X[a, b, c]))
    G[a] = sum[b, c](I[a, b, c] * 1000000007)
    H[a] = argmax[c](X[a, 0, c])
    A[a] = any[b, c](keep[a, b, c])
    B[a] = all[b](any[c](keep[a, b, c]))
    D[a, c] = max[b](X[a, b, c]) - min[b](X[a, b, c])
"""
    c = parse(text)
    inputs = {
        "X": RNG.standard_normal((3, 5, 7)).astype(np.float32),
        "keep": RNG.random((3, 5, 7)) < 0.3,
        "I": RNG.integers(-9, 9, (3, 5, 7)),
    }
    inputs["keep"][1] = False
    want = evaluate_values(c, inputs, track=True)
    for block in (1, 3, 16):
        monkeypatch.setattr(blocks, "BLOCK", block)
        got = evaluate_values(c, inputs, track=True)
        for name in want:
            close(got[name].array, want[name].array)
            np.testing.assert_array_equal(*np.broadcast_arrays(got[name].flag(), want[name].flag()))
            a, b = np.broadcast_arrays(got[name].slack(), want[name].slack())
            np.testing.assert_allclose(a, b, rtol=0.5, atol=1e-30)
