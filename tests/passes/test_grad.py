"""Gradients against torch.autograd in float64: every example, texts for each kind of access, random cascades."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch_cascade
from corpus import NAMES, example, inputs
from torch_gradients import Given, agree, check, exact, given, prepared, wanted

import castile
from castile.ir.cascade import Cascade
from castile.ir.dtypes import DTYPES
from castile.ir.errors import CastileError, UsageError, VerifyError
from castile.ir.evaluate import evaluate
from castile.ir.extents import bindings, resolve, shape_of
from castile.passes.count import count_passes
from castile.passes.derive import derive
from castile.passes.grad import forward, grad

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "ir"))

from strategies import Features, random_case

# Its only output is a place, which has no derivative.
PLACES = {"gemm_argmax"}
SAVED: tuple[tuple[str, ...], ...] = ((), ("lse",))


# Examples


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_means_what_the_oracle_means(name: str) -> None:
    c = exact(example(name))
    values = given(c, inputs(name))
    want = evaluate(c, values)
    for output, got in torch_cascade.run(c, values).items():
        np.testing.assert_allclose(got.numpy(), want[output], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("saved", SAVED, ids=["alone", "lse"])
@pytest.mark.parametrize("name", [n for n in NAMES if n not in PLACES])
def test_gradients_of_examples(name: str, saved: tuple[str, ...]) -> None:
    c = exact(example(name))
    check(c, given(c, inputs(name)), saved)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in PLACES])
def test_gradients_of_each_parameter_alone(name: str) -> None:
    """What is asked for decides what of the forward cascade is left; ranks keep their extents all the same."""
    c = exact(example(name))
    values = given(c, inputs(name))
    for p in wanted(c, grad(c)):
        check(c, values, wrt=(p,))


@pytest.mark.parametrize(
    "name", ["attention", "attention_causal", "attention_gqa", "layernorm", "mlp_swiglu", "softmax_entropy"]
)
def test_any_tensor_may_be_saved(name: str) -> None:
    c = exact(example(name))
    values = given(c, inputs(name))
    tensors = [o.name for e in c.einsums for o in e.outputs]
    for tensor in tensors:
        g = check(c, values, (tensor,))
        assert tensor not in g.einsum_of
    check(c, values, tensors)


@pytest.mark.timing
def test_gradients_are_quick_to_derive() -> None:
    for name in ("attention_rope", "moe_router", "attention_differential", "qk_norm"):
        times = []
        for _ in range(3):
            start = time.process_time()
            grad(example(name), None, "lse")
            times.append(time.process_time() - start)
        assert min(times) < 0.5, (name, times)


# FlashAttention-2's backward

SOFTMAX_ATTENTION = (
    "attention attention_causal attention_window attention_gqa attention_alibi attention_softcap attention_sink "
    "attention_document attention_prefix attention_streaming attention_relative_bias attention_decode"
).split()


def test_the_text_is_that_of_flash_attention_2() -> None:
    assert (
        str(grad(example("attention"), ("Q", "K", "V"), "lse"))
        == '''\
def attention_grad(
    Q: bf16[b, h, q, d],
    K: bf16[b, h, k, d],
    V: bf16[b, h, k, f],
    scale: f32,
    O: bf16[b, h, q, f],
    lse: f32[b, h, q],
    dO: bf16[b, h, q, f],
) -> (dQ, dK, dV):
    """Gradients of attention with respect to Q, K, V. lse[b, h, q] = log(sum[k](exp(S[b, h, q, k])))."""
    S[b, h, q, k] = scale * sum[d](Q[b, h, q, d] * K[b, h, k, d])
    A[b, h, q, k] = exp(S[b, h, q, k] - lse[b, h, q])
    dA[b, h, q, k] = sum[f](dO[b, h, q, f] * V[b, h, k, f])
    D[b, h, q] = sum[f](dO[b, h, q, f] * O[b, h, q, f])
    dS[b, h, q, k] = A[b, h, q, k] * (dA[b, h, q, k] - D[b, h, q])
    dQ[b, h, q, d] = sum[k](dS[b, h, q, k] * scale * K[b, h, k, d])
    dK[b, h, k, d] = sum[q](dS[b, h, q, k] * scale * Q[b, h, q, d])
    dV[b, h, k, f] = sum[q](dO[b, h, q, f] * A[b, h, q, k])
'''
    )


@pytest.mark.parametrize("name", SOFTMAX_ATTENTION)
def test_one_pass_over_keys_and_one_over_queries(name: str) -> None:
    g = grad(example(name), ("Q", "K", "V"), "lse")
    assert {"O", "lse"} <= g.param_of.keys()
    assert "max[" not in str(g)
    for passes in (count_passes(g), derive(g).passes):
        assert passes["k"] == 1
        assert passes.get("q", 1) == 1


def test_the_forward_cascade_returns_what_the_gradient_takes() -> None:
    f = forward(example("attention"), saved="lse")
    assert f.outputs == ("O", "lse")
    assert "lse[b, h, q] = M[b, h, q] + log(L[b, h, q])" in str(f)
    assert derive(f).passes["k"] == 1


def test_a_logarithm_that_is_an_output_is_the_saved_one() -> None:
    c = example("attention_lse")
    g = grad(c, ("Q", "K", "V"), "lse")
    assert "lse" not in g.param_of
    assert set(c.outputs) <= g.param_of.keys()
    assert forward(c, ("Q", "K", "V"), "lse") == c


def test_every_normaliser_has_a_logarithm() -> None:
    c = example("kl_distillation")
    g = grad(c, saved="lse")
    assert {"lse", "lse2"} <= g.param_of.keys()
    assert all(f"{name}[" in g.doc for name in ("lse", "lse2"))


# What masks leave out, and empty ranks


def attention(mask: str) -> Cascade:
    text = f"""
def attention(Q: f32[q, d], K: f32[k, d], V: f32[k, f], keep: bool[q, k]) -> O:
    S[q, k] = sum[d](Q[q, d] * K[k, d])
    X[q, k] = where({mask}, S[q, k], -inf)
    M[q] = max[k](X[q, k])
    P[q, k] = exp(X[q, k] - M[q])
    L[q] = sum[k](P[q, k])
    A[q, k] = P[q, k] / L[q]
    O[q, f] = sum[k](A[q, k] * V[k, f])
"""
    return exact(castile.parse(text))


def drawn(*sizes: int) -> Given:
    q, k, d, f = sizes
    rng = np.random.default_rng(7)
    keep = rng.random((q, k)) < 0.6
    keep[:1] = False
    keep[:, :1] = False
    shapes = {"Q": (q, d), "K": (k, d), "V": (k, f)}
    return {**{n: rng.standard_normal(s) for n, s in shapes.items()}, "keep": keep}


@pytest.mark.parametrize("level", ["text", "none", "full"])
@pytest.mark.parametrize("saved", SAVED, ids=["alone", "lse"])
@pytest.mark.parametrize("mask", ["keep[q, k]", "(q >= k + 1) & keep[q, k]"])
def test_masked_rows_have_gradient_zero(mask: str, saved: tuple[str, ...], level: str) -> None:
    """The first row keeps nothing; the first key is kept by none, and its value is infinite."""
    c = attention(mask)
    values = drawn(5, 6, 3, 2)
    finite = check(c, values, saved, ("Q", "K", "V"))
    values["V"][0] = np.inf
    full, _ = prepared(c, finite, values)
    full |= evaluate(forward(c, ("Q", "K", "V"), saved), values)
    text = finite if level == "text" else derive(finite, level).cascade
    got = evaluate(text, {p.name: full[p.name] for p in text.params})
    assert all(np.isfinite(x).all() for x in got.values())
    assert not got["dQ"][0].any()
    assert not got["dK"][0].any()
    assert not got["dV"][0].any()


@pytest.mark.parametrize("saved", SAVED, ids=["alone", "lse"])
@pytest.mark.parametrize("sizes", [(0, 4, 3, 2), (4, 0, 3, 2), (4, 5, 0, 2), (4, 5, 3, 0), (1, 1, 1, 1)])
def test_empty_ranks(sizes: tuple[int, ...], saved: tuple[str, ...]) -> None:
    c = attention("keep[q, k]")
    g = grad(c, ("Q", "K", "V"), saved)
    values = drawn(*sizes)
    full, _ = prepared(c, g, values)
    full |= evaluate(forward(c, ("Q", "K", "V"), saved), values)
    for x in evaluate(g, {p.name: full[p.name] for p in g.params}).values():
        assert not x.size or np.isfinite(x).all()


# Accesses and operations

TEXTS = {
    "strided": "def f(X: f32[n, w], W: f32[r]) -> Y:\n    Y[n, p] = sum[r](X[n, 2 * p + r] * W[r])",
    "literal axes": "def f(X: f32[w], W: f32[3]) -> Y:\n    Y[p] = sum[r](X[p + r] ** 2 * W[r])",
    "chained": """
def f(X: f32[w], W: f32[r], U: f32[s]) -> Y:
    H[p] = sum[r](X[p + r] * W[r])
    Y[t] = sum[s](H[t + s] * U[s])""",
    "padded": """
def f(X: f32[w], W: f32[r]) -> Y:
    Y[w] = sum[r](where((w + r >= 1) & (w + r <= extent(w)), X[w + r - 1] * W[r], 0))""",
    "reversed": "def f(X: f32[k], Z: f32[k]) -> Y:\n    Y[k] = X[extent(k) - 1 - k] * Z[k] ** 2",
    "transposed": "def f(X: f32[n, k]) -> Y:\n    Y[k, n] = X[n, k] ** 3",
    "diagonal": "def f(X: f32[i, j]) -> Y:\n    Y[i] = X[i, i] * X[i, 0]",
    "pairs": "def f(X: f32[n, d]) -> Y:\n    Y[n, m] = sum[d]((X[n, d] - X[m, d]) ** 2)",
    "gathered": "def f(X: f32[v, d], I: i32[n]) -> Y:\n    Y[n, d] = X[I[n], d] * X[0, d]",
    "ragged": "def f(X: f32[v], base: i32[n], W: f32[k]) -> Y:\n    Y[n] = sum[k](X[base[n] + k] * W[k])",
    "divided": "def f(X: f32[h // 2, k], Z: f32[h, k]) -> Y:\n    Y[h, k] = X[h // 2, k] * Z[h, k]",
    "modulo": "def f(X: f32[k], Z: f32[n]) -> Y:\n    Y[n] = X[n % 3] * Z[n]",
    "own modulo": "def f(X: f32[k]) -> Y:\n    Y = sum[k](X[k % 2] ** 2)",
    "shadowed": "def f(X: f32[n, k]) -> Y:\n    Y[n, k] = X[n, k] * sum[k](X[n, k] ** 2)",
    "shared": """
def f(X: f32[n, k]) -> Y:
    Y[n, k] = X[n, k] / sum[j](exp(X[n, j] * sum[j](X[n, j])))""",
    "extremes": """
def f(X: f32[n, k]) -> (Y, Z):
    Y[n] = max[k](X[n, k] ** 2) * min[k](X[n, k])
    Z = max[n, k](X[n, k])""",
    "ties": "def f(T: f32[n, k]) -> Y:\n    Y[n] = max[k](T[n, k]) ** 2 + min[k](T[n, k])",
    "product": "def f(T: f32[n, k]) -> Y:\n    Y[n] = prod[k](T[n, k] - 1)",
    "guarded product": "def f(X: f32[n, k]) -> Y:\n    Y[n] = prod[k](where(k <= n, X[n, k], 1))",
    "operations": """
def f(X: f32[k], Z: f32[k]) -> Y:
    A[k] = exp2(X[k]) + log2(Z[k] ** 2) + log1p(X[k] ** 2) + expm1(Z[k])
    B[k] = rsqrt(X[k] ** 2 + 1) + sqrt(Z[k] ** 2 + 1) + tanh(X[k]) + sigmoid(Z[k])
    C[k] = erf(X[k]) + sin(Z[k]) + cos(X[k]) + abs(Z[k]) + X[k] / Z[k] + X[k] ** -2 + floor(X[k]) + round(Z[k])
    Y[k] = A[k] * B[k] * C[k] + minimum(X[k], Z[k]) * maximum(X[k], 0) - (X[k] % 2.0)""",
    "scan": """
def f(X: f32[n, t], a: f32[t]) -> (H, Y):
    H[n, t] = where(t > 0, a[t] * H[n, t - 1], 0) + X[n, t]
    Y[n] = sum[t](H[n, t] ** 2)""",
    "backward scan": """
def f(X: f32[t], done: bool[t]) -> H:
    H[t] = X[t] + where((t < extent(t) - 1) & ~done[t], 0.5 * H[t + 1] ** 2, 0)""",
    "two steps": "def f(X: f32[t]) -> H:\n    H[t] = where(t > 1, H[t - 1] * H[t - 2], 1) + X[t]",
    "matrix scan": """
def f(T: f32[s, r], E: f32[t, s]) -> F:
    F[t, r] = where(t > 0, sum[s](F[t - 1, s] * T[s, r]), 1) * E[t, r]""",
    "scan with a reduction": """
def f(X: f32[t, k], W: f32[k]) -> H:
    H[t] = where(t > 0, H[t - 1], 0) * tanh(sum[k](X[t, k] * W[k])) + max[k](X[t, k])""",
    "scan of extremes": """
def f(T: f32[s, r], E: f32[t, s]) -> F:
    F[t, r] = where(t > 0, max[s](F[t - 1, s] + T[s, r]), 0) + E[t, r]""",
    "own name": "def f(dY: f32[k], X: f32[k]) -> Y:\n    Y[k] = X[k] * dY[k]",
    "scalars": "def f(X: f32[k], a: f32, b: f32) -> Y:\n    Y = sum[k](a * X[k] ** 2) / b",
    "through another output": "def f(X: f32[k]) -> (Y, Z):\n    Y[k] = exp(X[k])\n    Z = sum[k](Y[k] ** 2)",
    "monoid": """
@monoid(identity=(1.0, 0.0))
def affine(a, b, p, q) -> (A, B):
    A = a * p
    B = b * p + q

def f(X: f32[n, k], Z: f32[k]) -> Y:
    (A, B[n]) = affine[k](Z[k], X[n, k] ** 2)
    Y[n] = A * B[n]""",
}


@pytest.mark.parametrize("saved", SAVED, ids=["alone", "lse"])
@pytest.mark.parametrize("name", TEXTS)
def test_accesses_and_operations(name: str, saved: tuple[str, ...]) -> None:
    c = exact(castile.parse(TEXTS[name]))
    sizes = {"n": 5, "k": 7, "w": 11, "r": 3, "s": 3, "d": 4, "v": 9, "h": 6, "t": 6, "i": 5, "j": 5}
    bound = {b.rank for b in bindings(c) if b.param is not None}
    extents = resolve(c, {r: sizes[r] for r in bound})
    rng = np.random.default_rng(3)
    values: Given = {}
    for p in c.params:
        shape = shape_of(c, p.name, extents)
        if DTYPES[p.dtype].is_float:
            values[p.name] = rng.integers(-2, 3, shape) / 2.0 if p.name == "T" else rng.standard_normal(shape)
        else:
            values[p.name] = rng.integers(0, 3, shape) if p.dtype != "bool" else rng.random(shape) < 0.4
    for wrt in [None, *([name] for name in wanted(c, grad(c)))]:
        check(c, values, saved, wrt)


def test_gradients_sum_before_they_spread() -> None:
    """The adjoint of a sum inside a statement over k has no k: a pass over k, not one for each element."""
    c = castile.parse("def f(X: f32[n, k], Z: f32[n, j]) -> Y:\n    Y[n, k] = X[n, k] * sum[j](exp(Z[n, j]))")
    g = grad(c, "Z")
    assert "dY_sum[n] = sum[k](dY[n, k] * X[n, k])" in str(g)
    assert "dZ[n, j] = dY_sum[n] * exp(Z[n, j])" in str(g)


def test_a_maximum_that_cancels_gets_no_gradient() -> None:
    text = str(grad(example("softmax")))
    assert "dM" not in text
    assert "ties" not in text


def test_a_rank_of_the_forward_text_alone_keeps_its_extent() -> None:
    """H's extent comes from what it reads of X; where the gradient does not read X, it takes H to have it."""
    c = castile.parse(TEXTS["chained"])
    assert "H" in grad(c, "X").param_of
    assert "H" not in grad(c).param_of


# Random cascades


@pytest.mark.parametrize("part", range(8))
def test_random_cascades(part: int) -> None:
    """Whatever the language can say of floats, where the forward pass is finite."""

    checked = 0
    for seed in range(200 * part, 200 * part + 200):
        case = random_case(seed, Features(monoids=False))
        c = exact(case.cascade)
        values = given(c, case.inputs)
        everything = replace(c, outputs=tuple(o.name for e in c.einsums for o in e.outputs))
        try:
            tensors = evaluate(everything, values)
        except CastileError:
            continue
        floats = {n: x for n, x in tensors.items() if x.dtype == np.float64}
        if not all(np.isfinite(x).all() for x in floats.values()):
            continue
        saved = SAVED[seed % 2]
        try:
            g = grad(c, None, saved)
        except VerifyError as error:
            if "depends differentiably" not in str(error):
                raise
            names = [p.name for p in c.params if DTYPES[p.dtype].is_float]
            adjoints = {o: np.ones(tensors[o].shape) for o in c.outputs if o in floats}
            found = torch_cascade.gradients(c, values, names, adjoints)
            assert not any(np.nan_to_num(x).any() for x in found.values()), seed
            continue
        full, adjoints = prepared(c, g, values, seed)
        full |= evaluate(forward(c, None, saved), values)
        want = torch_cascade.gradients(c, values, wanted(c, g), adjoints)
        if not all(np.isfinite(x).all() for x in want.values()):
            continue
        agree(evaluate(g, {p.name: full[p.name] for p in g.params}), want, wanted(c, g), f"seed {seed}")
        checked += 1
    assert checked >= 50


# Errors


def test_names_that_do_not_fit() -> None:
    c = example("attention")
    with pytest.raises(UsageError, match="no float parameter `X`") as caught:
        grad(c, "X")
    assert "Q, K, V, scale" in str(caught.value)
    with pytest.raises(UsageError, match="no float parameter `doc_q`"):
        grad(example("attention_document"), "doc_q")
    with pytest.raises(UsageError, match="computes no tensor `T`"):
        grad(c, "Q", "T")
    with pytest.raises(UsageError, match="distinct"):
        grad(c, ("Q", "Q"))


def test_what_has_no_gradient() -> None:
    with pytest.raises(VerifyError, match="no output of `gemm_argmax` depends differentiably"):
        grad(example("gemm_argmax"))
    with pytest.raises(VerifyError, match="no output of `top_p` depends differentiably on `p`"):
        grad(example("top_p"), "p")
    with pytest.raises(VerifyError, match="argument 2") as caught:
        grad(castile.parse("def f(X: f32[k]) -> Y:\n    Y[k] = 5.0 % X[k]"))
    assert caught.value.loc is not None
