"""Sums that need the same inner reductions are one kernel, and what they give agrees with the oracle."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from test_tile import CASCADES, CASES, interpret

import castile
from castile.ir.bound import judge
from castile.ir.evaluate import evaluate
from castile.ir.extents import resolve
from castile.ir.tile import Dot, Fold, operations
from castile.passes.derive import derive
from castile.passes.grad import forward, grad
from castile.passes.mapped import default_mapping, mapped
from castile.passes.tile import Tiling, tile_program


def backward(name: str) -> tuple[castile.Cascade, dict[str, np.ndarray]]:
    """The gradient of an example from its saved log-sum-exp, in f32, with inputs."""
    c, inputs = castile.load(CASCADES / f"{name}.cascade"), CASES[name].draw()
    g = grad(c, ("Q", "K", "V"), saved="lse")
    values = {**inputs, **evaluate(forward(c, saved="lse"), inputs)}
    rng = np.random.default_rng(3)
    values["dO"] = rng.standard_normal(values["O"].shape)
    return g, {p.name: np.asarray(values[p.name]) for p in g.params}


@pytest.mark.parametrize("splits", [{}, {"q": 2}], ids=str)
@pytest.mark.parametrize("name", ["attention", "attention_causal", "attention_gqa", "attention_window"])
def test_gradients_of_attention(name: str, splits: dict[str, int]) -> None:
    g, inputs = backward(name)
    derivation = derive(g)
    splits = {r: n for r, n in splits.items() if r in derivation.cascade.ranks}
    got = interpret(derivation, inputs, Tiling(3, 2, 2, hold=True, group=True, join=True, align=2, splits=splits))
    for judgement in judge(g, inputs, got):
        assert judgement.ok, str(judgement)


def test_keys_and_values_share_their_scores() -> None:
    g, _ = backward("attention")
    extents = resolve(g, dict.fromkeys(g.ranks, 64))
    plain = default_mapping(g, "cpu", extents)
    apart, joined = (mapped(g, replace(plain, knobs={**plain.knobs, "join": n}), extents).kernels for n in (0, 1))
    assert [k.outputs for k in apart][1:] == [("dQ",), ("dK",), ("dV",)]
    assert [set(k.outputs) for k in joined][1:] == [{"dQ"}, {"dK", "dV"}]
    assert sum(isinstance(op, Dot) for op in operations(joined[2].body)) == 4


def test_a_mask_goes_into_an_operand_of_the_product() -> None:
    g, _ = backward("attention_causal")
    extents = resolve(g, dict.fromkeys(g.ranks, 64))
    kernels = mapped(g, default_mapping(g, "cpu", extents), extents).kernels[1:]
    masked = [op for k in kernels for op in operations(k.body) if isinstance(op, Dot) and op.annihilates]
    assert len(masked) == 3
    assert not any(isinstance(op, Fold) for k in kernels for op in operations(k.body))


def test_a_mask_that_guards_reads_stays_around_them() -> None:
    c = castile.parse(
        "def f(X: f32[p], W: f32[m, r]) -> Y:\n"
        "    Y[p, m] = sum[r](where((p + r >= 2) & (p + r < extent(p) + 2), X[p + r - 2] * W[m, r], 0.0))\n"
    )
    rng = np.random.default_rng(0)
    inputs = {"X": rng.standard_normal(9), "W": rng.standard_normal((5, 3))}
    got = interpret(derive(c), inputs, Tiling(4, 4, 2))
    for judgement in judge(c, inputs, got):
        assert judgement.ok, str(judgement)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("B[k, f] = sum[q](Y[q, f] * S[q, k] + A[k, f])", "the second needs the first"),
        ("B[k, f] = sum[q](where(q >= k, Y[q, f] * S[q, k], 0.0))", "they go over other coordinates"),
        ("B[k, f] = sum[q](Y[q, f] * Y[q, f] + X[q, k])", "they share no inner reduction"),
    ],
)
def test_what_does_not_belong_together_stays_apart(text: str, why: str) -> None:
    c = castile.parse(
        "def f(X: f32[q, d], Y: f32[q, f], Z: f32[k, d]) -> (A, B):\n"
        "    S[q, k] = sum[d](X[q, d] * Z[k, d])\n"
        f"    A[k, f] = sum[q](Y[q, f] * S[q, k])\n    {text}\n".replace("X[q, k]", "Z[k, 0]")
    )
    program = tile_program(c, Tiling(hold=True, join=True), extents=dict.fromkeys(c.ranks, 64))
    assert all(len(k.outputs) == 1 for k in program.kernels), why
