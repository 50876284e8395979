"""Reductions in pieces that run apart and are merged agree with the oracle."""

from __future__ import annotations

import numpy as np
import pytest
from test_tile import CASCADES, CASES, interpret

import castile
from castile.ir.bound import judge
from castile.ir.errors import InputError
from castile.ir.evaluate import read_inputs
from castile.ir.extents import resolve
from castile.ir.mapping import Mapping
from castile.passes.defaults import default_mapping
from castile.passes.derive import derive
from castile.passes.mapped import mapped
from castile.passes.split import default_splits, split
from castile.passes.tiling import Tiling


def cuttable(c: castile.Cascade) -> list[str]:
    """The ranks that can be split."""
    found = []
    for rank in c.ranks:
        try:
            split(c, {rank: 3}, ())
        except InputError:
            continue
        found.append(rank)
    return found


@pytest.mark.parametrize("gauge", ["maximum", "exponent"])
@pytest.mark.parametrize("name", sorted(CASES))
def test_examples_in_pieces_agree_with_the_oracle(name: str, gauge: str) -> None:
    cascade = castile.load(CASCADES / f"{name}.cascade")
    inputs = CASES[name].draw()
    derivation = derive(cascade, gauge=gauge)
    ranks = cuttable(derivation.cascade)
    if gauge == "exponent" and (not derivation.streams or not ranks):
        pytest.skip("nothing streams")
    for rank in ranks if gauge == "maximum" else ranks[:1]:
        tiling = Tiling(3, 2, 2, hold=True, group=True, splits={rank: 3})
        for judgement in judge(cascade, inputs, interpret(derivation, inputs, tiling)):
            assert judgement.ok, f"{rank}: {judgement}"


@pytest.mark.parametrize("count", [2, 5, 64])
def test_pieces_may_be_empty_or_wholly_masked(count: int) -> None:
    cascade = castile.load(CASCADES / "attention_causal.cascade")
    inputs = CASES["attention_causal"].draw()
    got = interpret(derive(cascade), inputs, Tiling(3, 2, 4, align=2, splits={"k": count}))
    for judgement in judge(cascade, inputs, got):
        assert judgement.ok, str(judgement)


def test_two_ranks_at_once() -> None:
    text = "def f(X: f32[m, n], Y: f32[k]) -> (A, B):\n    A[n] = sum[m](X[m, n])\n    B = max[k](Y[k]) + 1.0\n"
    cascade = castile.parse(text)
    rng = np.random.default_rng(0)
    inputs = {"X": rng.standard_normal((11, 3)), "Y": rng.standard_normal(7)}
    got = interpret(derive(cascade), inputs, Tiling(3, 2, 2, splits={"m": 2, "k": 3}))
    for judgement in judge(cascade, inputs, got):
        assert judgement.ok, str(judgement)


@pytest.mark.parametrize(("rows", "pieces"), [(1, 8), (2, 4), (3, 4), (5, 2), (8, None)])
def test_few_programs_run_in_no_more_pieces_than_keep_processors_busy(rows: int, pieces: int | None) -> None:
    c = castile.load(CASCADES / "attention.cascade")
    extents = resolve(c, {"b": 1, "h": rows, "q": 1, "k": 1 << 16, "d": 64, "f": 64})
    kernels = mapped(c, Mapping(knobs={"hold": 1, "group": 1}), extents).kernels
    found = default_splits(kernels, {"h": 1, "q": 1, "k": 256, "f": 64}, extents, 8)
    assert found == ({"k": pieces} if pieces is not None else {})


def test_attention_decodes_in_two_kernels() -> None:
    c = castile.load(CASCADES / "attention.cascade")
    found = mapped(c, Mapping(splits={"k": 4}, knobs={"hold": 1, "group": 1}), resolve(c, dict.fromkeys(c.ranks, 64)))
    assert [k.fixed for k in found.kernels] == [{"k_piece": 4}, {"k_piece": 4}]
    assert [p.name for p in found.program.scratch] == ["M_pieces", "L_pieces", "O_sum_pieces"]
    assert found.kernels[1].outputs == ("O",)


@pytest.mark.parametrize(
    ("name", "rank", "said"),
    [
        ("softmax", "m", "reduces nothing"),
        ("cumulative_sum", "k", "reduces nothing"),
        ("gemm_row_max", "m", "reduces nothing"),
    ],
)
def test_what_cannot_be_cut_is_refused(name: str, rank: str, said: str) -> None:
    c = castile.load(CASCADES / f"{name}.cascade")
    rank = rank if rank in c.ranks else c.ranks[0]
    extents = resolve(c, {}, {n: a.shape for n, a in read_inputs(c, CASES[name].draw()).items()})
    with pytest.raises(InputError, match=said):
        mapped(c, Mapping(splits={rank: 2}), extents)


def test_strict_numerics_keep_the_order() -> None:
    c = castile.load(CASCADES / "gemm.cascade")
    with pytest.raises(InputError, match="strict"):
        castile.compile(c, numerics="strict", mapping=Mapping(splits={"k": 2}), shapes=dict.fromkeys(c.ranks, 64))


BOTH = castile.parse("""
def both(A: f32[m, k], B: f32[k, n]) -> (C, S):
    C[m, n] = sum[k](A[m, k] * B[k, n])
    S[n] = sum[k](B[k, n])
""")


@pytest.mark.parametrize(
    ("k", "cut"),
    [
        (8, ["S_pieces"]),  # 64 * 64 results of a product for 8 coordinates
        (64, ["C_pieces", "S_pieces"]),
    ],
)
def test_reductions_of_many_results_stay_whole_beside_others(k: int, cut: list[str]) -> None:
    extents = {"m": 64, "n": 64, "k": k}
    found = mapped(BOTH, Mapping(splits={"k": 2}), extents)
    assert [p.name for p in found.program.scratch] == cut
    rng = np.random.default_rng(0)
    inputs = {"A": rng.standard_normal((64, k)).astype("f4"), "B": rng.standard_normal((k, 64)).astype("f4")}
    kernel = castile.compile(BOTH, "cpu", extents, Mapping(splits={"k": 2}))
    got = dict(zip(BOTH.outputs, kernel(**inputs), strict=True))
    for judgement in judge(BOTH, inputs, got):
        assert judgement.ok, str(judgement)


def test_a_reduction_of_many_results_is_cut_where_there_is_no_other() -> None:
    c = castile.load(CASCADES / "gemm.cascade")
    found = mapped(c, Mapping(splits={"k": 2}), {"m": 64, "n": 64, "k": 8})
    assert len(found.program.scratch) == 1


def test_default_splits_of_a_gpu_leave_large_products_whole() -> None:
    extents = dict.fromkeys("mnk", 4096)
    mapping = default_mapping(BOTH, "cuda:90", extents)
    assert mapping.splits["k"] > 1
    assert [p.name for p in mapped(BOTH, mapping, extents).program.scratch] == ["S_pieces"]


@pytest.mark.parametrize(
    ("name", "extents", "cut"),
    [
        ("gemm", dict.fromkeys("mnk", 1024), True),
        ("gemm", {"m": 16, "n": 8192, "k": 8192}, True),
        ("rmsnorm_gemm", dict.fromkeys("mnk", 2048), False),  # the product would wait for the sum of squares
        ("gemm_int4", {"m": 128, "n": 8192, "k": 8192}, True),
        ("softmax", {"n": 16, "k": 1 << 20}, True),
    ],
)
def test_pieces_are_made_by_default_unless_a_large_tensor_would_wait(
    name: str, extents: dict[str, int], cut: bool
) -> None:
    c = castile.load(CASCADES / f"{name}.cascade")
    assert (default_mapping(c, "cuda:90", extents).splits.get("k", 1) > 1) is cut
