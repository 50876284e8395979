"""Gradients derive like anything else: fewer passes, the same values, safe in float32."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpus import NAMES, example, float_tensors, inputs
from gradients import random_gradient
from test_random import disagreement
from test_trees import rng_of, worst
from trees import tree_evaluate

import castile
from castile.ir.cascade import Cascade
from castile.ir.dtypes import DTYPES
from castile.ir.evaluate import evaluate
from castile.ir.mapping import ALTERNATIVES, GAUGES
from castile.passes.count import count_passes
from castile.passes.derive import derive
from castile.passes.grad import forward, grad

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "ir"))

from strategies import Features

# Its only output is a place, which has no derivative.
SMOOTH = [n for n in NAMES if n != "gemm_argmax"]
SAVED: tuple[tuple[str, ...], ...] = ((), ("lse",))


@cache
def gradient(name: str, saved: tuple[str, ...]) -> tuple[Cascade, dict[str, Any]]:
    """The gradient of an example, and its inputs: the example's own, what is saved, and random adjoints."""
    c = example(name)
    g = grad(c, saved=saved)
    values = {n: np.asarray(v, float) if n in float_tensors(c) else v for n, v in inputs(name).items()}
    values |= evaluate(forward(c, saved=saved), values)
    rng = rng_of("adjoints", name)
    for p in g.params:
        if p.name not in values:
            output = next(o for o in c.outputs if p.name in (f"d{o}", f"d{o}2"))
            values[p.name] = rng.standard_normal(values[output].shape)
    return g, {p.name: values[p.name] for p in g.params}


def agrees(name: str, saved: tuple[str, ...], gauge: str) -> None:
    g, given = gradient(name, saved)
    d = derive(g, gauge=gauge)
    before = count_passes(g)
    assert all(d.passes[r] <= n for r, n in before.items())
    want = evaluate(g, given)
    scale = max(float(np.max(np.abs(v[np.isfinite(v)]), initial=1e-3)) for v in want.values())
    for output, got in evaluate(d.cascade, given).items():
        # What rounds in the forward pass rounds alike in both; all else is float64.
        off = np.abs(got - want[output])
        assert np.all((off <= 1e-7 * scale) | ~np.isfinite(want[output])), (output, float(np.max(off)))


@pytest.mark.parametrize("name", SMOOTH)
def test_derived_gradients_are_the_gradients(name: str) -> None:
    agrees(name, (), GAUGES[SMOOTH.index(name) % 2])


@pytest.mark.slow
@pytest.mark.parametrize("gauge", GAUGES)
@pytest.mark.parametrize("saved", SAVED, ids=["alone", "lse"])
@pytest.mark.parametrize("name", SMOOTH)
def test_derived_gradients_are_the_gradients_in_every_form(name: str, saved: tuple[str, ...], gauge: str) -> None:
    agrees(name, saved, gauge)


# Scores far beyond the range of a bare exponential in float32.
LARGE = [
    "attention_dropout",
    "attention_sink",
    "attention_qk_norm",
    "gat",
    "kl_distillation",
    "softmax_entropy",
    "infonce",
    "weighted_variance",
]
COSTLY = ["attention", "attention_causal", "attention_monoid", "attention_decode_paged", "attention_dq"]  # fmt: skip


@pytest.mark.parametrize("name", [*LARGE, *(pytest.param(n, marks=pytest.mark.slow) for n in COSTLY)])
def test_derived_gradients_hold_in_float32_for_large_scores(name: str) -> None:
    g, given = gradient(name, ())
    floats = {p.name for p in g.params if DTYPES[p.dtype].is_float}
    single = {n: np.float32(np.asarray(v) * 30) if n in floats else v for n, v in given.items()}
    gauge = GAUGES[[*LARGE, *COSTLY].index(name) % 2]
    got = tree_evaluate(derive(g, gauge=gauge).cascade, single, rng_of(name, gauge), "f32")
    assert worst(g, single, got, 2.0) <= 1.0


@pytest.mark.parametrize("name", ["attention", "attention_causal", "attention_gqa", "attention_sink", "attention_mla"])
def test_unsaved_gradients_of_attention_take_two_passes(name: str) -> None:
    """One pass over the keys gives lse, D and dQ; dK and dV are of the second. Over the queries there is one."""
    g, _ = gradient(name, ())
    passes = derive(g).passes
    assert count_passes(g)["k"] == 4
    assert (passes["k"], passes["q"]) == (2, 1)


DECODE = """
def f(Q: f32[h, q, d], K: f32[h, k, d], V: f32[h, k, f], length: i32[h]) -> O:
    S[h, q, k] = sum[d](Q[h, q, d] * K[h, k, d])
    X[h, q, k] = where(k < length[h], S[h, q, k], -inf)
    P[h, q, k] = exp(X[h, q, k] - max[k](X[h, q, k]))
    O[h, q, f] = sum[k](P[h, q, k] / sum[k](P[h, q, k]) * V[h, k, f])
"""


def test_keys_that_are_masked_for_every_query_cost_no_pass() -> None:
    """Under the mask of its keys a probability is at most 1, so the sums of dK and dV need no maximum over queries."""
    g = grad(castile.parse(DECODE))
    passes = derive(g).passes
    assert (passes["k"], passes["q"]) == (2, 1)


def finite_throughout(g: Cascade, given: dict[str, Any]) -> bool:
    tensors = evaluate(replace(g, outputs=tuple(o.name for e in g.einsums for o in e.outputs)), given)
    return all(np.isfinite(x.astype(float)).all() for x in tensors.values())


@pytest.mark.parametrize("first", range(0, 200, 50))
def test_gradients_of_random_cascades(first: int) -> None:
    found, checked = [], 0
    for seed in range(first, first + 50):
        drawn = random_gradient(seed, Features(monoids=False))
        if drawn is None or not finite_throughout(*drawn):
            continue
        g, given = drawn
        d = derive(g, *ALTERNATIVES[seed % len(ALTERNATIVES)])
        streams = {s.monoid.name for s in d.streams if s.monoid is not None}
        text = disagreement(g, d.cascade, given, any(0 in np.shape(x) for x in given.values()), streams)
        found += [f"seed {seed}: {text}"] if text else []
        checked += 1
    assert checked > 5
    assert not found, "\n".join(found)
