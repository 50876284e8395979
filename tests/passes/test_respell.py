"""Fusion is derived, not matched: other words for a workload give the same passes and the same values."""

from __future__ import annotations

import numpy as np
import pytest
from corpus import derived, example, inputs
from respell import respell

from castile.ir.cascade import Cascade
from castile.ir.evaluate import evaluate, evaluate_values
from castile.ir.verify import verify
from castile.passes.derive import derive

# The workloads of the table in the theory's notes, negatives included.
TABLE = (
    "logsumexp softmax cross_entropy linear_cross_entropy softmax_entropy kl_distillation attention attention_gqa "
    "attention_mla attention_alibi attention_softcap attention_window attention_document attention_sink "
    "attention_differential attention_dq weighted_variance attention_linear variance kurtosis layernorm layernorm_gemm "
    "rmsnorm_gemm pearson cosine qk_norm nrm2 argmax argmax_softmax moe_router gumbel_sample infonce gat "
    "softmax_sigma_values mean_absolute_deviation softmax_softmax_values gemm_amax_quant"
).split()
SPELLINGS = 100


def counts(c: Cascade) -> list[int]:
    return list(derive(c).passes.values())


def spelled(name: str, seed: int) -> Cascade:
    c = respell(example(name), np.random.default_rng(seed))
    verify(c)
    return c


@pytest.mark.parametrize("name", TABLE)
def test_respellings_derive_to_the_same_passes(name: str) -> None:
    want = derived(name).passes
    order = example(name).ranks
    bad = []
    for seed in range(SPELLINGS):
        c = spelled(name, seed)
        d = derive(c)
        # Ranks keep their places whatever their names.
        got = {order[c.ranks.index(r)] if set(c.ranks) != set(order) else r: n for r, n in d.passes.items()}
        if sorted(got.values()) != sorted(want.values()):
            bad.append(f"spelling {seed}: {d.passes} for {want}\n{c}")
    assert not bad, f"{len(bad)} of {SPELLINGS}\n" + bad[0]


@pytest.mark.parametrize("name", TABLE)
def test_respellings_keep_their_values(name: str) -> None:
    given = inputs(name)
    want = evaluate_values(example(name), given, track=True)
    for seed in range(0, SPELLINGS, 10):
        got = evaluate(derive(spelled(name, seed)).cascade, given)
        for output, value in want.items():
            off = np.abs(got[output].astype(float) - value.array)
            assert np.all(off <= 4 * value.slack() + 1e-9 * np.abs(value.array)), (seed, output)
