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
from castile.ir.tile import Dot, Fold, Load, operations
from castile.passes.defaults import default_mapping
from castile.passes.derive import derive
from castile.passes.grad import forward, grad
from castile.passes.mapped import mapped
from castile.passes.tile import tile_program
from castile.passes.tiling import Tiling


def backward(name: str) -> tuple[castile.Cascade, dict[str, np.ndarray]]:
    """The gradient of an example from its saved log-sum-exp, in f32, with inputs."""
    c, inputs = castile.load(CASCADES / f"{name}.cascade"), CASES[name].draw()
    g = grad(c, ("Q", "K", "V"), saved="lse")
    values = {**inputs, **evaluate(forward(c, saved="lse"), inputs)}
    rng = np.random.default_rng(3)
    values["dO"] = rng.standard_normal(values["O"].shape)
    return g, {p.name: np.asarray(values[p.name]) for p in g.params}


@pytest.mark.parametrize("splits", [{}, {"q": 2}], ids=str)
@pytest.mark.parametrize("scatter", [False, True], ids=["", "scattered"])
@pytest.mark.parametrize("name", ["attention", "attention_causal", "attention_gqa", "attention_window"])
def test_gradients_of_attention(name: str, scatter: bool, splits: dict[str, int]) -> None:
    g, inputs = backward(name)
    derivation = derive(g)
    splits = {r: n for r, n in splits.items() if r in derivation.cascade.ranks}
    tiling = Tiling(3, 2, 2, hold=True, group=True, join=True, scatter=scatter, align=2, splits=splits)
    got = interpret(derivation, inputs, tiling)
    for judgement in judge(g, inputs, got):
        assert judgement.ok, str(judgement)


def test_keys_and_values_share_their_scores() -> None:
    g, _ = backward("attention")
    extents = resolve(g, dict.fromkeys(g.ranks, 64))
    plain = default_mapping(g, "cpu", extents)
    both = ({**plain.knobs, "join": n, "scatter": 0} for n in (0, 1))
    apart, joined = (mapped(g, replace(plain, knobs=knobs), extents).kernels for knobs in both)
    assert [k.outputs for k in apart][1:] == [("dQ",), ("dK",), ("dV",)]
    assert [set(k.outputs) for k in joined][1:] == [{"dQ"}, {"dK", "dV"}]
    assert sum(isinstance(op, Dot) for op in operations(joined[2].body)) == 4


def test_queries_add_up_their_gradient_where_its_shares_are_made() -> None:
    g, _ = backward("attention_causal")
    extents = resolve(g, {**dict.fromkeys(g.ranks, 64), "q": 600, "k": 600})
    mapping = default_mapping(g, "cpu", extents)
    stream = mapped(g, mapping, extents).kernels[1]
    assert set(stream.outputs) == {"dQ_sum", "dK", "dV"}
    assert [r.rank for r in stream.grid] == ["b", "h"]
    dots = [op for op in operations(stream.body) if isinstance(op, Dot)]
    assert len(dots) == 2 * 5, "five products for the tiles that a mask cuts, five for the others"
    loaded = [op.source for op in operations(stream.body) if isinstance(op, Load) and op.source.tensor == "dQ_sum"]
    assert len(loaded) == 2


@pytest.mark.parametrize("knobs", [{"join": 0, "scatter": 1}, {"join": 1, "scatter": 0}], ids=str)
def test_what_is_not_asked_for_is_not_scattered(knobs: dict[str, int]) -> None:
    g, _ = backward("attention")
    extents = resolve(g, dict.fromkeys(g.ranks, 64))
    plain = default_mapping(g, "cpu", extents)
    kernels = mapped(g, replace(plain, knobs={**plain.knobs, **knobs}), extents).kernels
    assert any(k.outputs == ("dQ",) for k in kernels)


def test_few_heads_stay_parallel_along_their_keys() -> None:
    g, _ = backward("attention")
    for heads, scattered in ((1, 0), (64, 1)):
        mapping = default_mapping(g, "cpu", resolve(g, {**dict.fromkeys(g.ranks, 64), "b": 1, "h": heads}))
        assert mapping.knob("scatter") == scattered


def test_the_batch_decides_nothing_under_strict_numerics() -> None:
    g = replace(backward("attention")[0], numerics="strict")
    sizes = ({**dict.fromkeys(g.ranks, 64), "b": n} for n in (1, 64))
    one, many = (default_mapping(g, "cpu", resolve(g, s)) for s in sizes)
    assert {**one.knobs, "through": 0} == {**many.knobs, "through": 0}


def test_a_mask_goes_into_an_operand_of_the_product() -> None:
    g, _ = backward("attention_causal")
    extents = resolve(g, dict.fromkeys(g.ranks, 64))
    plain = default_mapping(g, "cpu", extents)
    kernels = mapped(g, replace(plain, knobs={**plain.knobs, "scatter": 0}), extents).kernels[1:]
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
