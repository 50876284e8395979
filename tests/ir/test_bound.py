"""The error bound: an honest kernel in f32 lies within it, one with a fault outside."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from naive import Meaningless, Naive
from strategies import Case, cases, random_case

from castile.ir.bound import error_bound, judge, reference, relative_error
from castile.ir.errors import EvaluationError
from castile.ir.evaluate import evaluate
from castile.ir.extents import bindings
from castile.ir.parse import load, parse

EXAMPLES = Path(__file__).parents[2] / "examples" / "cascades"
RNG = np.random.default_rng(0)


def single(case: Case) -> dict[str, Any]:
    """The outputs by a slow but honest kernel: f32 after every operation."""
    tensors = Naive(case.cascade, case.inputs, case.extents, single=True).tensors
    shapes = {n: v.shape for n, v in evaluate(case.cascade, case.inputs).items()}
    return {n: np.array([tensors[n][at][0] for at in np.ndindex(s)]).reshape(s) for n, s in shapes.items()}


def within(case: Case) -> float | None:
    """Checks that the honest kernel is within the bound; returns the share of elements of which nothing is demanded."""
    try:
        got = single(case)
        bounds = error_bound(case.cascade, case.inputs)
    except (Meaningless, EvaluationError):
        return None
    for judgement in judge(case.cascade, case.inputs, got):
        assert judgement.ok, str(judgement)
    every = np.concatenate([np.broadcast_to(bounds[n], got[n].shape).ravel() for n in got])
    return float(np.mean(np.isinf(every))) if every.size else None


@settings(max_examples=100)
@given(cases(exact=False))
def test_an_honest_kernel_is_within(case: Case) -> None:
    within(case)


def test_an_honest_kernel_is_within_on_larger_cascades() -> None:
    free = [within(random_case(seed, exact=False, nonfinite=seed % 3 == 0)) for seed in range(400)]
    assert np.mean([f for f in free if f is not None]) < 0.05


@pytest.mark.nightly
def test_an_honest_kernel_is_within_on_many_cascades() -> None:
    for seed in range(400, 20_000):
        within(random_case(seed, exact=False, nonfinite=seed % 3 == 0))


# Faults


def f32(x: Any) -> np.ndarray:
    return np.asarray(x, np.float32)


def bf16(x: Any) -> np.ndarray:
    import ml_dtypes

    return np.asarray(x, np.float32).astype(ml_dtypes.bfloat16).astype(np.float32)


ATTENTION = """
def attention(Q: bf16[q, d], K: bf16[k, d], V: bf16[k, f], scale: f32) -> O:
    S[q, k] = scale * sum[d](Q[q, d] * K[k, d])
    X[q, k] = where(q >= k, S[q, k], -inf)
    P[q, k] = exp(X[q, k] - max[k](X[q, k]))
    O[q, f] = sum[k](P[q, k] * V[k, f]) / sum[k](P[q, k])
"""


def attention(
    q: Any, k: Any, v: Any, scale: float, shift: int = 0, skip: int = -1, leak: bool = False, round_p: bool = False
) -> np.ndarray:
    s = f32(scale) * (f32(q) @ f32(k).T)
    keep = np.arange(len(q))[:, None] >= np.arange(len(k)) + shift
    keep[3, 5] |= leak
    keep[:, skip] &= skip < 0
    s = np.where(keep, s, -np.inf)
    p = np.exp(s - s.max(1, keepdims=True))
    return (bf16(p) if round_p else p) @ f32(v) / p.sum(1, keepdims=True)


def attention_inputs(n: int = 48) -> dict[str, Any]:
    q, k, v = (bf16(RNG.standard_normal((n, 16))) for _ in range(3))
    return {"Q": q, "K": k, "V": v, "scale": 0.25}


def verdict(c_text: str, inputs: dict[str, Any], got: np.ndarray, numerics: str | None = None) -> bool:
    c = parse(c_text)
    return all(j.ok for j in judge(c, inputs, {c.outputs[0]: got}, numerics=numerics))


@pytest.mark.parametrize(
    ("fault", "ok"),
    [
        ({}, True),
        ({"round_p": True}, True),  # the numerics allow it: V is bf16
        ({"leak": True}, False),  # one masked element counts
        ({"shift": 1}, False),
        ({"shift": -1}, False),
        ({"skip": 7}, False),  # one key is left out
    ],
    ids=str,
)
def test_faults_of_attention(fault: dict[str, Any], ok: bool) -> None:
    inputs = attention_inputs()
    if fault == {"shift": 1}:
        with np.errstate(invalid="ignore"):
            got = attention(*inputs.values(), **fault)
    else:
        got = attention(*inputs.values(), **fault)
    assert verdict(ATTENTION, inputs, got) == ok


def test_strict_numerics_allow_no_rounding() -> None:
    inputs = attention_inputs()
    rounded = attention(*inputs.values(), round_p=True)
    assert not verdict(ATTENTION, inputs, rounded, "strict")
    assert verdict(ATTENTION, inputs, attention(*inputs.values()), "strict")


@pytest.mark.parametrize(
    ("statements", "rounded"),
    [
        # The operand of 16 bits stands in a map, in a sum, under a condition, or in all of them.
        (("N[k, f] = V[k, f] * r[k]", "Y[f] = sum[k](a[k] * N[k, f])"), True),
        (("Y[f] = sum[k](0.5 * (a[k] * V[k, f] - r[k] * W[k, f]))",), True),
        (("Y[f] = sum[k](where(k % 2 == 0, a[k] * r[k] * V[k, f] / s, 0.0))",), True),
        (("N[k, f] = V[k, f] + r[k] * W[k, f]", "Y[f] = sum[k](where(k % 2 == 0, N[k, f] * a[k], 0.0))"), True),
        # No operand of 16 bits, or none of f32: products of two such are exact.
        (("N[k, f] = V[k, f] * V[k, f]", "Y[f] = sum[k](0.5 * N[k, f])"), False),
        (("Y[f] = sum[k](W[k, f] * V[k, f] - V[k, f])",), False),
        (("Y[f] = sum[k]((V[k, f] - s) * r[k])",), False),  # what is centred is no operand of 16 bits
        (("N[k, f] = exp(V[k, f])", "Y[f] = sum[k](a[k] * N[k, f])"), False),
        (("N[f] = sum[k](V[k, f] * W[k, f])", "Y[f] = sum[k](a[k] * N[f])"), False),
    ],
    ids=str,
)
def test_a_rounded_operand_counts_wherever_a_kernel_may_find_it(statements: tuple[str, ...], rounded: bool) -> None:
    head = "def f(V: bf16[k, f], W: bf16[k, f], a: f32[k], r: f32[k], s: f32) -> Y:\n    "
    c = parse(head + "\n    ".join(statements) + "\n")
    inputs = {p.name: RNG.uniform(1, 2, (16, 3)[: len(p.indices)]) for p in c.params}
    loose, tight = (error_bound(c, inputs, numerics=mode)["Y"] for mode in ("standard", "strict"))
    wanted = evaluate(parse(str(c).replace("- ", "+ ")), inputs)["Y"]
    # Twice the rounding of one operand, of the size of the products.
    assert np.allclose(loose - tight, 2.0**-7 * wanted if rounded else 0.0, rtol=1e-12)


GEMM = "def gemm(A: {0}[m, k], B: {0}[k, n]) -> C:\n    C[m, n]: {1} = sum[k](A[m, k] * B[k, n])"


def accumulate(a: np.ndarray, b: np.ndarray, rounding: Callable[[Any], np.ndarray], step: int = 1) -> np.ndarray:
    total = np.zeros((a.shape[0], b.shape[1]), np.float32)
    for i in range(0, a.shape[1], step):
        total = rounding(total + rounding(f32(a[:, i : i + step]) @ f32(b[i : i + step])))
    return total


@pytest.mark.parametrize("k", [1, 2, 7, 64, 1000])
def test_accumulation_in_f32_is_within_and_in_bf16_outside(k: int) -> None:
    a, b = bf16(RNG.standard_normal((8, k))), bf16(RNG.standard_normal((k, 8)))
    inputs, text = {"A": a, "B": b}, GEMM.format("bf16", "f32")
    assert verdict(text, inputs, accumulate(a, b, f32))
    assert verdict(text, inputs, accumulate(a, b, f32, 16))
    assert not verdict(text, inputs, accumulate(a, b, bf16))


@pytest.mark.parametrize("k", [4, 100])
def test_one_dropped_or_doubled_term_is_outside(k: int) -> None:
    a, b = f32(RNG.standard_normal((5, k))), f32(RNG.standard_normal((k, 5)))
    inputs, text = {"A": a, "B": b}, GEMM.format("f32", "f32")
    assert verdict(text, inputs, a @ b)
    assert not verdict(text, inputs, a[:, 1:] @ b[1:])
    assert not verdict(text, inputs, a @ b + np.outer(a[:, 0], b[0]))


def test_tf32_is_outside_unless_fast() -> None:
    def tf32(x: np.ndarray) -> np.ndarray:
        return ((x.view(np.uint32) + 0x1000) & np.uint32(0xFFFFE000)).view(np.float32)

    a, b = f32(RNG.standard_normal((8, 256))), f32(RNG.standard_normal((256, 8)))
    inputs, text = {"A": a, "B": b}, GEMM.format("f32", "f32")
    assert not verdict(text, inputs, tf32(a) @ tf32(b))
    assert verdict(text, inputs, tf32(a) @ tf32(b), "fast")


def test_a_result_one_step_of_its_type_off_is_outside_where_it_is_certain() -> None:
    a, b = bf16(RNG.standard_normal((4, 1))), bf16(RNG.standard_normal((1, 4)))
    inputs, text = {"A": a, "B": b}, GEMM.format("bf16", "bf16")
    right = bf16(a @ b)
    assert verdict(text, inputs, right)
    assert not verdict(text, inputs, right * np.float32(1 + 2.0**-5))


@pytest.mark.parametrize(
    ("text", "got", "ok"),
    [
        ("Y[n] = X[n]", [1, 2, 3], True),
        ("Y[n] = X[n]", [1, 2, np.nextafter(np.float32(3), 4)], False),  # a copy is exact
        ("Y[n]: bf16 = X[n]", [1, 2, 3.015625], False),
        ("Y[n] = max[n](X[n]) - X[n]", [2, 1, 0], True),
        ("Y[n] = max[n](X[n]) - X[n]", [2, 1, 1e-30], False),  # a difference of equals is 0
        ("Y[n] = i32(X[n])", [1, 2, 4], False),
        ("Y[n] = n + 1", [1, 2, 3], True),
        ("Y[n] = n + 1", [1, 2, 3 + 1e-9], False),
        ("Y[n] = X[n] > 1.5", [False, True, True], True),
        ("Y[n] = X[n] > 1.5", [True, True, True], False),
        ("Y[n] = X[n] / 3.0 > 1 / 3", [True, True, True], True),  # a third is a third but for a rounding
        ("Y[n] = X[n] / 3.0 > 1 / 3", [True, False, True], False),
        ("Y[n] = i32(X[n] / 3.0 * 3.0)", [1, 2, 2], True),
        ("Y[n] = i32(X[n] / 3.0 * 3.0)", [0, 2, 1], False),
        ("Y[n] = 1 / (X[n] - 2.0)", [-1, np.inf, 1], True),
        ("Y[n] = 1 / (X[n] - 2.0)", [-1, 1e30, 1], False),
        ("Y[n] = 1 / (X[n] / 3.0 * 3.0 - 2.0)", [-1, 1e30, 1], True),  # here it may be a rounding
        ("Y[n] = log(X[n] - 2.0)", [np.nan, -np.inf, 0], True),
        ("Y[n] = log(X[n] - 2.0)", [0, -np.inf, 0], False),
        ("Y[n] = exp(where(X[n] > 1.5, X[n], -inf))", [0, 7.389056, 20.085537], True),
        ("Y[n] = exp(where(X[n] > 1.5, X[n], -inf))", [1e-30, 7.389056, 20.085537], False),  # masked is 0
        ("Y[n] = X[n] * 3e38", [3e38, 1, 1], True),  # what overflows f32 may be anything
        ("Y[n] = where(X[n] / 3.0 * 3.0 >= 3.0, X[n], -X[n])", [-1, -2, -3], True),
        ("Y[n] = where(X[n] / 3.0 * 3.0 >= 3.0, X[n], -X[n])", [-1, 2, 3], False),
        ("Y[n] = argmax[n](X[n]) + 0 * n", [2, 2, 2], True),
        ("Y[n] = argmax[n](X[n]) + 0 * n", [1, 1, 1], False),
        ("Y[n] = prod[n](X[n]) + 0 * n", [6, 6, 6.000001], True),
        ("Y[n] = prod[n](X[n]) + 0 * n", [6, 6, 6.00001], False),
        ("Y[n] = X[n] ** 3", [1, 8, 27.000004], True),
        ("Y[n] = X[n] ** 3", [1, 8, 27.0001], False),
        ("Y[n] = sin(X[n])", np.sin(f32([1, 2, 3])), True),
        ("Y[n] = X[n] // 1.0 % 2.0", [1, 0, 1], True),
        ("Y[n] = X[n] // 1.0 % 2.0", [1, 0, 0], False),
        ("Y[n] = any[n](X[n] / 3.0 * 3.0 >= 3.0) & (n >= 0)", [False] * 3, True),
        ("Y[n] = any[n](X[n] >= 3.0) & (n >= 0)", [False] * 3, False),
    ],
)
def test_what_is_demanded_of_a_kernel(text: str, got: Any, ok: bool) -> None:
    c = parse(f"def f(X: f32[n]) -> Y:\n    {text}")
    found = judge(c, {"X": f32([1, 2, 3])}, {"Y": np.asarray(got)})
    assert found[0].ok == ok, str(found[0])


def test_constants_are_held_in_f32_but_not_beside_f64() -> None:
    text = "def f(X: {0}[n]) -> Y:\n    Y[n] = X[n] * 0.1"
    x = f32([1, 2, 3])
    assert verdict(text.format("f32"), {"X": x}, x * np.float32(0.1))
    assert verdict(text.format("f64"), {"X": x}, x.astype(float) * 0.1)
    assert not verdict(text.format("f64"), {"X": x}, x * np.float64(np.float32(0.1)))


def test_an_f64_input_of_an_f32_parameter_is_rounded_by_a_kernel() -> None:
    x = RNG.random(3)
    assert verdict("def f(X: f32[n]) -> Y:\n    Y[n] = X[n]", {"X": x}, f32(x))
    assert not verdict("def f(X: f64[n]) -> Y:\n    Y[n] = X[n]", {"X": x}, f32(x))


def test_results_of_another_shape_are_outside() -> None:
    c = parse("def f(X: f32[n]) -> Y:\n    Y[n] = X[n]")
    assert not judge(c, {"X": np.ones(3)}, {"Y": np.ones(4)})[0].ok
    assert judge(c, {"X": np.ones(0)}, {"Y": np.ones(0)})[0].ok


def test_a_judgement_says_where() -> None:
    c = parse("def f(X: f32[m, n]) -> Y:\n    Y[m, n] = X[m, n]")
    found = judge(c, {"X": np.zeros((2, 3))}, {"Y": np.eye(2, 3)})[0]
    assert found.where == (0, 0)
    assert "Y[0, 0] = 1, oracle 0: outside the bound" in str(found)


def test_samples_have_the_bound_of_the_whole() -> None:
    c = parse(ATTENTION)
    inputs = attention_inputs(12)
    whole = error_bound(c, inputs)["O"]
    part = error_bound(c, inputs, {"q": [3, 11], "f": [0, 5]})["O"]
    np.testing.assert_allclose(part, whole[[3, 11], [0, 5]], rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "extents", "low", "high"),
    [
        ("gemm", {"m": 32, "n": 32, "k": 1024}, 1e-3, 0.02),  # a bf16 result: 2^-9 and a little
        ("softmax", {"m": 8, "n": 1000}, 1e-8, 2e-5),
        ("attention", {"b": 1, "h": 2, "q": 16, "k": 128, "d": 16, "f": 16}, 1e-3, 0.05),
        ("layernorm", {"m": 8, "n": 256}, 1e-8, 1e-2),
    ],
)
def test_the_relative_error_is_sane(name: str, extents: dict[str, int], low: float, high: float) -> None:
    c = load(EXAMPLES / f"{name}.cascade")
    for error in relative_error(c, {r: extents.get(r, 16) for r in c.ranks}).values():
        assert low < error < high


def test_the_relative_error_of_nothing_is_zero() -> None:
    c = parse("def f(X: f32[m, n]) -> Y:\n    Y[m, n] = X[m, n]")
    assert relative_error(c, {"m": 0, "n": 3}) == {"Y": 0.0}
    assert relative_error(parse("def f(x: f32) -> Y:\n    Y = x * 3.0"), {})["Y"] < 1e-6


@pytest.mark.parametrize("name", ["attention_decode_paged", "attention_gathered", "embedding_bag", "gemm_grouped"])
def test_the_relative_error_reads_only_what_is_there(name: str) -> None:
    c = load(EXAMPLES / f"{name}.cascade")
    bound = {b.rank: 5 for b in bindings(c) if b.param is not None}
    for error in relative_error(c, bound).values():
        assert 0 <= error < 0.05


def test_parts_of_a_difference_are_summed_apart_only_where_something_is_summed() -> None:
    dequantised = "W[k, n] = (U[k, n] - z[n]) * s[n]"
    rng = np.random.default_rng(0)
    values = {"U": rng.integers(0, 16, (64, 8)), "z": np.full(8, 8), "s": np.ones(8, np.float32)}
    alone = parse(f"def f(U: i32[k, n], z: i32[n], s: f32[n]) -> W:\n    {dequantised}\n")
    ((_, bound),) = reference(alone, values).values()
    assert bound.max() < 1e-6
    product = parse(
        f"def f(U: i32[k, n], z: i32[n], s: f32[n], X: f32[m, k]) -> Y:\n    {dequantised}\n"
        "    Y[m, n] = sum[k](X[m, k] * W[k, n])\n"
    )
    ones = {**values, "X": np.ones((4, 64), np.float32)}
    ((want, bound),) = reference(product, ones).values()
    parts = np.float32(values["U"].sum(0)) - np.float32(64 * 8)
    assert np.all(np.abs(parts - want) <= bound)
    assert 0 < bound.max() < 0.02


def test_terms_may_be_added_in_another_order() -> None:
    pooled = "R[p, w] = X[2 * p, w] + X[2 * p + 1, w]\n    Y[p, q] = (R[p, 2 * q] + R[p, 2 * q + 1]) / 4\n"
    above = np.random.default_rng(0).standard_normal((4, 128)).astype(np.float32)
    below = np.float32(1e-6) - above
    X = np.stack([above, below], 1).reshape(8, 128)
    other = ((above[:, ::2] + above[:, 1::2]) + below[:, ::2]) + below[:, 1::2]
    c = parse(f"def f(X: f32[h, w]) -> Y:\n    {pooled}")
    assert all(j.ok for j in judge(c, {"X": X}, {"Y": other / 4}))
    assert not any(j.ok for j in judge(c, {"X": X}, {"Y": other / 4 + np.float32(2e-6)}))
    strict = parse(f'@cascade(numerics="strict")\ndef f(X: f32[h, w]) -> Y:\n    {pooled}')
    assert not any(j.ok for j in judge(strict, {"X": X}, {"Y": other / 4}))


def test_the_least_integer_adds_to_a_bound() -> None:
    c = parse("def f(T: i64[k], x: f32) -> (Y, Z):\n    Y[k] = (x + T[k]) - 1.5\n    Z[k] = 0.5 * T[k]\n")
    given = {"T": np.array([-(2**63), -(2**63) + 1, 2**63 - 1]), "x": np.float32(1)}
    for _, bound in reference(c, given).values():
        np.testing.assert_allclose(bound, bound[2], 1e-6)
        assert bound[0] > 1e10


def test_a_narrower_sum_within_a_sum_has_its_own_roundings() -> None:
    c = parse("def f(A: f64[m], Y: f32[m]) -> R:\n    R[m] = A[m] + (3 - Y[m])\n")
    rng = np.random.default_rng(0)
    a, y = rng.standard_normal(50), rng.standard_normal(50).astype(np.float32)
    kernel = a + (np.float32(3) - y)
    assert all(j.ok for j in judge(c, {"A": a, "Y": y}, {"R": kernel}))
    assert not all(j.ok for j in judge(c, {"A": a, "Y": y}, {"R": kernel + 1e-6}))


@pytest.mark.parametrize("text", ["minimum(A[m], Y[m])", "maximum(Y[m], A[m])", "where(Y[m] > 0, A[m], Y[m])"])
def test_large_integers_are_rounded_where_they_meet_floats(text: str) -> None:
    c = parse(f"def f(A: i32[m], Y: f32[m]) -> R:\n    R[m] = {text}\n")
    a, y = np.int32([2**30 + 1, 2**24 + 1, 5, 1 - 2**31]), np.float32([2e9, 1, 0.5, 3])
    values = {"A": a, "Y": y}
    exact = evaluate(c, values)["R"]
    assert all(j.ok for j in judge(c, values, {"R": exact.astype(np.float32)}))
    assert not all(j.ok for j in judge(c, values, {"R": exact.astype(np.float32) + np.float32([0, 0, 1, 0])}))
