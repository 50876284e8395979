"""A cascade of one's own, written as a Python function.

    python examples/custom_cascade.py

The function is read from its source and never called. Before Python 3.14 the module has to begin with the `__future__`
import below, else Python itself looks for `f32`; a linter may want to be told that ranks are no undefined names.
"""
# ruff: noqa: F821, F841

from __future__ import annotations

import numpy as np

import castile
from castile.ir.bound import judge


@castile.monoid(identity=(0.0, 0.0, 0.0))
def welford(count, mean, spread, n, m, s) -> (C, M, S):
    """Mean and variance in one pass (Chan, Golub and LeVeque 1979): counts, means and spreads merge."""
    C = count + n
    w = where(C == 0, 0.0, n / C)
    M = mean + (m - mean) * w
    S = spread + s + (m - mean) * (m - mean) * count * w


@castile.cascade
def layernorm(X: f32[m, k], gamma: f32[k], beta: f32[k], eps: f32) -> Y:
    (C[m], M[m], S[m]) = welford[k](1.0, X[m, k], 0.0)
    R[m] = rsqrt(S[m] / C[m] + eps)
    Y[m, k] = (X[m, k] - M[m]) * R[m] * gamma[k] + beta[k]


def layernorm_numpy(X, gamma, beta, eps):
    """The usual two passes, in float32."""
    centred = X - X.mean(1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(1, keepdims=True) + eps) * gamma + beta


def main() -> None:
    print(castile.explain(layernorm))

    rng = np.random.default_rng(0)
    X = rng.normal(10.0, 1.0, (4, 300)).astype(np.float32)
    inputs = {"X": X, "gamma": np.ones(300, np.float32), "beta": np.zeros(300, np.float32), "eps": 1e-5}
    exact = castile.evaluate(layernorm, inputs)["Y"]
    print(
        "\nrows of the oracle's result have mean",
        np.abs(exact.mean(1)).max().round(6),
        "and variance",
        exact.var(1).round(4),
    )

    # How NumPy in float32 compares with the oracle: `judge` knows the error that a correct kernel may have here.
    got = layernorm_numpy(**inputs)
    for verdict in judge(layernorm, inputs, {"Y": got}):
        print(verdict)


if __name__ == "__main__":
    main()
