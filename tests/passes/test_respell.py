"""Fusion is derived, not matched: other words for a workload give the same passes and the same values."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from corpus import derived, example, inputs
from respell import EVERY_RULE, RULES, Rule, cast_operand, respell

from castile.ir.cascade import Cascade
from castile.ir.evaluate import evaluate, evaluate_values
from castile.ir.key import rename
from castile.ir.verify import verify
from castile.passes.derive import derive
from castile.passes.read import Reader
from castile.passes.separate import Reductions

# The workloads of the table in the theory's notes, negatives included.
TABLE = (
    "logsumexp softmax cross_entropy linear_cross_entropy softmax_entropy kl_distillation attention attention_gqa "
    "attention_mla attention_alibi attention_softcap attention_window attention_document attention_sink "
    "attention_differential attention_dq weighted_variance attention_linear variance kurtosis layernorm layernorm_gemm "
    "rmsnorm_gemm pearson cosine qk_norm nrm2 argmax argmax_softmax moe_router gumbel_sample infonce gat "
    "softmax_sigma_values mean_absolute_deviation softmax_softmax_values gemm_amax_quant"
).split()
SPELLINGS = 100


def spelled(name: str, seed: int, rules: tuple[Rule, ...] = RULES) -> Cascade:
    c = respell(example(name), np.random.default_rng(seed), rules=rules)
    verify(c)
    return c


def meaning(c: Cascade) -> tuple[bytes, ...] | None:
    """The normal forms that the outputs have, ranks named by their order; None where not all is in them.

    Derivation works on these: spellings with equal ones are derived once.
    """
    plain = rename(c, {}, {r: f"rank{i}" for i, r in enumerate(c.ranks)})
    reader = Reader(plain, Reductions("full", c.numerics, {r: i for i, r in enumerate(plain.ranks)}))
    reader.read()
    if reader.opaque:
        return None
    return tuple(reader.forms[o].digest for o in plain.outputs)


@pytest.mark.parametrize("name", TABLE)
def test_respellings_derive_to_the_same_passes(name: str) -> None:
    want = derived(name).passes
    order = example(name).ranks
    known: set[tuple[bytes, ...]] = set()
    bad = []
    for seed in range(SPELLINGS):
        c = spelled(name, seed, EVERY_RULE)
        key = meaning(c)
        if key is not None and key in known and seed % 10:
            continue
        d = derive(c)
        # Ranks keep their places whatever their names.
        got = {order[c.ranks.index(r)] if set(c.ranks) != set(order) else r: n for r, n in d.passes.items()}
        if sorted(got.values()) != sorted(want.values()):
            bad.append(f"spelling {seed}: {d.passes} for {want}\n{c}")
        elif key is not None:
            known.add(key)
    assert not bad, f"{len(bad)} of {SPELLINGS}\n" + bad[0]


# Workloads in which one factor leaves each sum, so that a rounding of the summed product lets it pass.
ONE_FACTOR = (
    "attention attention_gqa attention_alibi attention_window attention_document attention_sink attention_causal "
    "attention_qk_norm rmsnorm_gemm"
).split()


@pytest.mark.parametrize("name", ONE_FACTOR)
def test_casts_that_standard_may_move(name: str) -> None:
    c = cast_operand(example(name), "bf16")
    assert c != example(name)
    assert derive(c).passes == derived(name).passes


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f8e4m3"])
@pytest.mark.parametrize("name", ONE_FACTOR)
def test_casts_that_stay_block_and_say_so(name: str, dtype: str) -> None:
    """Under strict no cast moves; f16 and f8 have not the range of f32, so theirs never do."""
    numerics = "strict" if dtype == "bf16" else "standard"
    c = replace(cast_operand(example(name), dtype), numerics=numerics)
    d = derive(c)
    assert sum(d.passes.values()) > sum(derived(name).passes.values())
    assert any(f"rounding to {dtype}" in b.reason for b in d.barriers), d.barriers


@pytest.mark.parametrize("name", TABLE)
def test_respellings_keep_their_values(name: str) -> None:
    given = inputs(name)
    want = evaluate_values(example(name), given, track=True)
    for seed in range(0, SPELLINGS, 10):
        got = evaluate(derive(spelled(name, seed)).cascade, given)
        for output, value in want.items():
            off = np.abs(got[output].astype(float) - value.array)
            assert np.all(off <= 4 * value.slack() + 1e-9 * np.abs(value.array)), (seed, output)
