"""What masks leave empty is 0 in every form, also where it cancels; and other small cases in which a form was wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from test_random import both_ways, plainly

import castile
from castile.ir.evaluate import evaluate
from castile.ir.mapping import ALTERNATIVES
from castile.passes.derive import derive

ROWS = """
def f(S: f32[q, k], n: i32[q], V: f32[k], v: f32[q]) -> Y:
    X[q, k] = where(k < n[q], S[q, k], -inf)
    M[q] = max[k](X[q, k])
    P[q, k] = exp(X[q, k] - M[q])
    L[q] = sum[k](P[q, k])
    A[q, k] = P[q, k] / L[q]
    Y[q] = """

# What a row is of which masks may leave nothing, and whether it is 0 there also beside a factor that is no number.
EMPTIED = {
    "sum[k](A[q, k])": True,
    "1 - sum[k](A[q, k])": False,
    "L[q] / L[q]": True,
    "L[q] / (L[q] * L[q])": True,
    "L[q] * v[q]": True,
    "sum[k](exp(X[q, k])) * v[q]": True,
    "sum[k](A[q, k] * V[k])": True,
    "sum[k](A[q, k] * V[k]) * v[q]": True,
    "sum[k](A[q, k] * V[k]) / sum[k](A[q, k])": True,
    "max[k](A[q, k])": True,
    "max[k](P[q, k])": True,
    "sum[k](f16(P[q, k]) * V[k]) / L[q]": True,
    "sum[k](f16(A[q, k]) * V[k])": True,
    "sum[k](f8e4m3(A[q, k]) * V[k])": True,
    "sum[k](exp(minimum(X[q, k], 5.0)) * V[k])": True,
    "sum[k](exp(maximum(X[q, k], -10000.0)) * V[k])": False,
    "M[q] + log(L[q])": False,
}


def rows() -> dict[str, Any]:
    rng = np.random.default_rng(3)
    return {
        "S": rng.standard_normal((6, 4)),
        "n": np.array([0, 1, 2, 3, 4, 0]),
        "V": rng.standard_normal(4),
        "v": rng.standard_normal(6),
    }


def check(c: castile.Cascade, given: dict[str, Any]) -> None:
    want = evaluate(c, given)
    for level, gauge in ALTERNATIVES:
        d = derive(c, level, gauge)
        assert castile.parse(str(d.cascade)) == d.cascade
        for found in both_ways(d, given):
            for name, x in want.items():
                finite, said = np.isfinite(x), f"{level} {gauge} {name}"
                np.testing.assert_allclose(found[name][finite], x[finite], 1e-3, 1e-6, err_msg=said)


@pytest.mark.parametrize("value", EMPTIED)
def test_rows_without_a_key(value: str) -> None:
    c, given = castile.parse(ROWS + value + "\n"), rows()
    check(c, given)
    if EMPTIED[value]:
        # What masks leave out may be anything, and so may what multiplies a row of nothing.
        given["S"][:, 3], given["V"][3], given["v"][[0, 5]] = np.nan, np.inf, (np.nan, np.inf)
        check(c, given)


# Sums of what conditions leave out, with a factor that is the same along the sum and infinite where nothing is left.
CONDITIONAL = (
    "sum[k](where(S[q, k] > 0, v[q], 0.0))",
    "sum[k](where(S[q, k] > 0, v[q] * S[q, k], 0.0))",
    "sum[k](where(S[q, k] > 0, S[q, k] / R[q], 0.0))",
    "sum[k](where(S[q, k] > 0, exp(v[q]) * S[q, k], 0.0))",
    "sum[k](where(S[q, k] > 0, v[q] * exp(S[q, k]), 0.0))",
    "sum[k](where(k < q, v[q] * S[q, k], 0.0))",
    "sum[j](sum[k](where(S[q, k] > 0, v[q] * S[q, k] * S[j, k], 0.0)))",
    "sum[k](where(S[q, k] > 0, rsqrt(R[q]) * S[q, k], 0.0))",
    "R[q] + sum[j](sum[k](where(S[j, k] > 0, S[j, k] / R[j], 0.0)))",
    "R[q] + max[j](sum[k](where(S[j, k] > 0, S[j, k] / R[j], 0.0)))",
    "sum[k](where(S[q, k] > 0, v[q] * S[q, k], 0.0) + abs(S[q, k]))",
    "sum[k](where(S[q, k] > 0, s, 0.0))",
    "sum[k](where(S[q, k] > 0, S[q, k] / (s - s), 0.0))",
    "sum[k](where(S[q, k] > 0, -s * S[q, k], 0.0)) + R[q]",
    "max[k](where(S[q, k] > 0, exp(v[q]) * S[q, k], 0.0))",
    "max[k](where(S[q, k] > 0, S[q, k] / R[q], 0.0))",
    "min[k](where(S[q, k] > 0, v[q] ** 2 * (S[q, k] + 1), 0.0))",
)


@pytest.mark.parametrize(("level", "gauge"), ALTERNATIVES)
@pytest.mark.parametrize("value", CONDITIONAL)
def test_an_infinite_factor_of_nothing(value: str, level: str, gauge: str) -> None:
    c = castile.parse(
        f"def f(S: f32[q, k], v: f32[q], s: f32) -> Y:\n    R[q] = sum[k](maximum(S[q, k], 0))\n    Y[q] = {value}\n"
    )
    given = rows()
    given["S"][[0, 5]] = -abs(given["S"][[0, 5]])
    given = {"S": given["S"], "v": np.array([np.inf, 1.0, 2.0, 3.0, 4.0, np.inf]), "s": np.array(np.inf)}
    want = evaluate(c, given)["Y"]
    with plainly():
        got = evaluate(derive(c, level, gauge).cascade, given)["Y"]
    finite = np.isfinite(want)
    assert finite[0]
    np.testing.assert_allclose(got[finite], want[finite], 1e-6)


# What cancels over a rank that is empty, and what another rank or sum beside it makes of that.
CANCELLED = (
    "sum[k](X[q, k]) / sum[k](X[q, k])",
    "sum[k](X[q, k]) / sum[k](2 * X[q, k]) + 1",
    "sum[k](X[q, k] / sum[k](X[q, k]))",
    "sum[k](1.0) / extent(k)",
    "sum[k](X[q, k]) * sum[j, k](U[j, k]) / sum[j, k](U[j, k])",
    "sum[k](exp(X[q, k] - max[k](X[q, k])) / sum[k](exp(X[q, k] - max[k](X[q, k]))))",
    "sum[j](sum[k](U[j, k]) / sum[k](U[j, k]))",
    "sum[k](X[q, k] / sum[k](X[q, k])) + sum[r](W[q, r] / sum[r](W[q, r]))",
)


@pytest.mark.parametrize(("level", "gauge"), [f for f in ALTERNATIVES if f[0] != "none"])
@pytest.mark.parametrize("value", CANCELLED)
def test_what_cancels_over_an_empty_rank(value: str, level: str, gauge: str) -> None:
    c = castile.parse(f"def f(X: f32[q, k], U: f32[j, k], W: f32[q, r]) -> Y:\n    Y[q] = {value}\n")
    for q, j, k in ((3, 2, 0), (3, 0, 2), (3, 2, 2), (0, 2, 2), (0, 0, 0)):
        given = {"X": 1.0 + np.arange(q * k).reshape(q, k), "U": 1.0 + np.arange(j * k).reshape(j, k)}
        given["W"] = np.ones((q, 3))
        want = evaluate(c, given)["Y"]
        with plainly():
            got = evaluate(derive(c, level, gauge).cascade, given)["Y"]
        np.testing.assert_allclose(got, want, 1e-6)


SMALL = {
    "a mask in the other branch of a condition": (
        """
def f(X: f32[k], Y: f32[k]) -> O:
    O = sum[k](exp(where(k < 2, X[k], where(k > 3, Y[k], -inf))))
""",
        {"X": np.arange(6.0), "Y": -np.arange(6.0)},
    ),
    "a mask in the other branch of a condition, under a function that is 0 there": (
        """
def f(X: f32[k], Y: f32[k]) -> O:
    O = sum[k](sigmoid(where(k < 2, X[k], where(k > 3, Y[k], -inf))))
""",
        {"X": np.arange(6.0), "Y": -np.arange(6.0)},
    ),
    "floats saturate as integers, integers wrap": (
        """
def f(X: f32[k]) -> (A, B, C):
    A[k] = u32(-1.0)
    B[k] = u32(-1.0 * k)
    C[k]: u8 = -3.0
""",
        {"X": np.zeros(3)},
    ),
    "unsigned numbers beside negative ones": (
        """
def f(T: u32[k], X: i32[k]) -> (A, B, C, D):
    A[k]: bool = T[k] == -1
    B[k]: bool = T[k] >= -1
    C[k]: bool = X[k] >= -5
    D[k]: bool = T[k] < -1
""",
        {"T": np.array([0, 1, 2**32 - 1]), "X": np.array([-6, 0, 2**31 - 1])},
    ),
    "a branch that goes had made the other's type": (
        """
def f(T: i32[j]) -> V:
    V = (sum[j](T[j]) << 27) * where(True, sum[j](T[j]), argmax[j](T[j]))
""",
        {"T": np.array([2, 4, 6, 2, 0, 2, 6])},
    ),
    "a quotient of what a monoid makes of masks": (
        """
@monoid(identity=0.0)
def plus(a, b) -> c:
    c = a + b

def f(X: f32[q, k]) -> O:
    T[q] = plus[k](exp(where(k < q, X[q, k], -inf)))
    O[q] = T[q] / T[q]
""",
        {"X": np.ones((3, 3))},
    ),
    "an index that is read, narrower than a coordinate": (
        """
def f(T: i32[j], X: f32[k]) -> (W, O):
    W[k] = (k << 39) - (k << 19)
    O[j] = W[T[j]]
""",
        {"T": np.array([4, 0, 1]), "X": np.zeros(5)},
    ),
    "means of as many as there are, or of none": (
        """
def f(V: f32[q, k], n: i32[q]) -> (A, B):
    A[q] = sum[k](where(k < n[q], V[q, k] / n[q], 0.0))
    B[q] = sum[k](where(k < n[q], V[q, k] * rsqrt(f32(n[q])), 0.0))
""",
        {"V": np.ones((3, 4)), "n": np.array([0, 2, 4])},
    ),
    "no number beside a sum of what two masks leave out": (
        """
def f(X: f32[k], Y: f32[k]) -> O:
    O[k] = log(X[k]) * where(k < 2, Y[k], exp(where(k > 3, Y[k], -inf)))
""",
        {"X": np.array([1.0, 2.0, -1.0, -2.0, 3.0]), "Y": np.arange(5.0)},
    ),
    "a variance of what a condition chose": (
        """
def f(X: f32[m, n]) -> V:
    P[m, n] = where(n < 2, 1.0, X[m, n])
    U[m] = sum[n](P[m, n]) / extent(n)
    V[m] = sum[n]((P[m, n] - U[m]) ** 2)
""",
        {"X": np.arange(21.0).reshape(3, 7) % 5},
    ),
    "a variance of signs": (
        """
def f(X: f32[m, n]) -> V:
    S[m, n] = where(X[m, n] > 0, 1.0, where(X[m, n] < 0, -1.0, 0.0))
    U[m] = sum[n](S[m, n]) / extent(n)
    V[m] = sum[n]((S[m, n] - U[m]) ** 2)
""",
        {"X": np.arange(21.0).reshape(3, 7) % 5 - 2},
    ),
    "a variance under weights of two conditions": (
        """
def f(X: f32[m, n], K: f32[m, n]) -> V:
    W[m, n] = where(K[m, n] > 0, 1.0, 0.0) + where(K[m, n] < 2, 2.0, 0.0)
    L[m] = sum[n](W[m, n])
    U[m] = sum[n](W[m, n] * X[m, n]) / L[m]
    V[m] = sum[n](W[m, n] * (X[m, n] - U[m]) ** 2)
""",
        {"X": np.arange(21.0).reshape(3, 7) ** 2 % 11, "K": np.arange(21.0).reshape(3, 7) % 4},
    ),
    "a sum under a condition beside another, in a sum that is multiplied": (
        """
def f(X: f32[b], K: bool[b], Z: f32[b], s: f32) -> Y:
    M = sum[b](X[b])
    G[b] = where(K[b], 0.0, (X[b] - M) * s)
    N = sum[b](G[b])
    Y = sum[b]((G[b] - Z[b] * N) * 2.0)
""",
        {"X": np.arange(5.0), "K": np.array([1, 0, 1, 1, 0], bool), "Z": np.arange(5.0) ** 2, "s": 0.5},
    ),
    "comparisons of what a stream has scaled": (
        """
def f(X: f32[b, h], v: f32[h]) -> (A, B, C, D, E, F):
    M[h] = max[b](X[b, h])
    S[h] = sum[b](exp(X[b, h] - M[h]))
    L[h] = log(S[h]) + M[h]
    P[b, h] = exp(X[b, h] - M[h]) / S[h]
    A[h] = S[h] > 1.5
    B[h] = L[h] > v[h]
    C[h] = ~(S[h] > 1.5) | (L[h] < 0.25)
    D[b, h] = P[b, h] > 0.3
    E = any[h](L[h] > 2.5)
    F = all[b, h](P[b, h] < 0.8)
""",
        {"X": np.sin(np.arange(21.0) ** 2).reshape(3, 7) * 3, "v": np.cos(np.arange(7.0))},
    ),
    "a quotient that stands outside of a sum under a condition": (
        """
def f(X: f32[q, k], K: bool[q, k], L: f32[q]) -> (A, B):
    A[q] = sum[k](where(K[q, k], X[q, k], 0.0)) / L[q]
    B[q] = sum[k](where(K[q, k], X[q, k], 0.0)) / sum[k](where(K[q, k], 1.0, 0.0))
""",
        {"X": np.ones((2, 3)), "K": np.array([[1, 0, 1], [0, 0, 0]], bool), "L": np.array([2.0, 0.0])},
    ),
    "a softmax of probabilities of which a mask leaves whole rows": (
        """
def f(Z: f32[b, c], v: f32[b]) -> T:
    X[b, c] = where(v[b] > 0, Z[b, c], -inf)
    M[c] = max[b](X[b, c])
    E[b, c] = exp(X[b, c] - M[c])
    P[b, c] = E[b, c] / sum[b](E[b, c])
    N[b] = max[c](P[b, c])
    F[b, c] = exp(P[b, c] - N[b])
    T[b] = max[c](F[b, c] / sum[c](F[b, c]))
""",
        {"Z": np.sin(np.arange(12.0)).reshape(4, 3), "v": np.array([1.0, -1.0, 2.0, 0.0])},
    ),
    "a mask that asks for what a stream has scaled": (
        """
def f(u: f32[a]) -> T:
    M = max[a](u[a])
    S = sum[a](exp(u[a] - M))
    X[a] = where(u[a] < M + log(S), u[a] * u[a], -inf)
    N = max[a](X[a])
    L = sum[a](exp(X[a] - N))
    T = sqrt(abs(L))
""",
        {"u": np.array([2.0, 1.5, 1.0, 1.2])},
    ),
    "sums of what masks leave empty, in sums": (
        """
def f(Z: f32[b, c], v: f32[b]) -> (T, U, V):
    X[b, c] = where(v[b] > 0, Z[b, c], -inf)
    M[b] = max[c](X[b, c])
    L[b] = sum[c](exp(X[b, c] - M[b]))
    T = sum[b](L[b] - v[b])
    A = sum[b](L[b]) / extent(b)
    U = sum[b]((L[b] - A) ** 2)
    V[b] = L[b] - A
""",
        {"Z": np.sin(np.arange(12.0)).reshape(4, 3), "v": np.array([1.0, -1.0, 2.0, 0.0])},
    ),
    "a value of some depth that reads a stream's end": (
        """
def f(X: f32[a, b]) -> L:
    N[a, b] = sum[b](X[a, b]) + 0.1
    R[a, b] = N[a, b] * (sum[a](N[a, b] ** 2) + 0.1)
    G[b] = sum[a](X[a, b])
    C[b] = sum[a](where(R[a, b] < G[b], 1.0, 0.0))
    M = max[b](C[b])
    E[b] = exp(C[b] - M)
    L = sum[b](E[b])
""",
        {"X": np.sin(np.arange(21.0)).reshape(3, 7)},
    ),
    "a number that is none, under a mask": (
        """
def f(X: f32[k]) -> O:
    O = sum[k](where(k > 9, log(-0.5), X[k]))
""",
        {"X": np.ones(3)},
    ),
    "integers of more digits than a double has": (
        """
def f(T: i64[k]) -> (A, B, C):
    A[k]: i64 = (T[k] + 9007199254740993) % 10
    B[k]: i64 = (0 - 9223372036854775807 - 1) // T[k]
    C[k]: i64 = (T[k] * 4611686018427387904 - 9223372036854775807) >> 3
""",
        {"T": np.array([3, -7, 1])},
    ),
    "floats larger than any integer": (
        """
def f(X: f32[k]) -> (A, B, C):
    A[k] = maximum(X[k], -9223372036854775808.0) - minimum(X[k], 9223372036854775808.0)
    B[k] = where(X[k] >= 9223372036854775808.0, 1.0, where(floor(X[k]) < -3e38, 3.0, X[k]))
    C[k] = exp(where(k > 1, X[k], -3.3895313892515355e+38))
""",
        {"X": np.array([0.5, 1e20, 9223372036854775808.0, -3.2e38, -1.5])},
    ),
    "declared integers made of bools": (
        """
def f(X: f32[k]) -> O:
    O[k]: i32 = i32((X[k] > 0.0) | (k > 1))
""",
        {"X": np.array([-1.0, 1.0, -1.0])},
    ),
}


@pytest.mark.parametrize("name", SMALL)
def test_small_cases(name: str) -> None:
    text, given = SMALL[name]
    check(castile.parse(text), given)
