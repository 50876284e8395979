"""How the oracle cuts its work: every coordinate once, contractions square, and no large array on the way."""

from __future__ import annotations

import tracemalloc
from itertools import product

import numpy as np
import pytest

from castile import evaluate, parse
from castile.ir import blocks
from castile.ir.cascade import Cascade, Reduce
from castile.ir.evaluate import evaluate_values

RNG = np.random.default_rng(3)
GEMM = parse("def gemm(A: f32[m, k], B: f32[k, n]) -> C:\n    C[m, n] = sum[k](A[m, k] * B[k, n])")


def steps(c: Cascade, extents: dict[str, int], contracts: bool = True) -> dict[str, int]:
    e = c.einsums[-1]
    outer = {r: extents[r] for r in e.output.ranks}
    found = blocks.squares(e.expr, outer, extents, lambda n: contracts and n.op == "sum")
    return {rank if at == 0 else f"{rank}'": size for (rank, at), size in found.items()}


@pytest.mark.parametrize("sizes", [(1, 1), (2, 3), (3, 2), (5, 7)])
def test_tiles_cover_a_box_once(sizes: tuple[int, int]) -> None:
    box = ((2, 7), (0, 7))
    found = [p for t in blocks.tiles(box, sizes) for p in product(*(range(a, b) for a, b in t))]
    assert sorted(found) == list(product(range(2, 7), range(7)))


@pytest.mark.parametrize("room", [1, 2, 7, 12, 20, 100])
def test_ordered_tiles_keep_the_order(monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    monkeypatch.setattr(blocks, "BLOCK", room)
    box = ((0, 3), (0, 2), (0, 5))
    tiles = list(blocks.tiles(box, blocks.ordered(box, 1)))
    assert [p for t in tiles for p in product(*(range(a, b) for a, b in t))] == list(np.ndindex(3, 2, 5))
    assert all(np.prod([b - a for a, b in t]) <= room for t in tiles)


def test_contractions_are_cut_square() -> None:
    assert steps(GEMM, {"m": 3000, "n": 3000, "k": 3000}) == {"m": 1500, "n": 1500, "k'": 1500}
    assert steps(GEMM, {"m": 500, "n": 500, "k": 500}) == {"m": 500, "n": 500, "k'": 500}
    assert steps(GEMM, {"m": 1, "n": 1, "k": 1 << 23}) == {"m": 1, "n": 1, "k'": 1 << 22}
    # With the products in memory, a block holds the cube.
    cut = steps(GEMM, {"m": 3000, "n": 3000, "k": 3000}, contracts=False)
    assert blocks.BLOCK / 8 < np.prod(list(cut.values())) <= blocks.BLOCK


def test_an_argmax_is_whole_and_an_inner_rank_its_own() -> None:
    best = parse("def f(X: f32[m, k]) -> Y:\n    Y[m] = argmax[k](X[m, k])")
    assert steps(best, {"m": 1 << 12, "k": 1 << 14}) == {"m": 1 << 8, "k'": 1 << 14}
    shadowed = parse("def f(X: f32[m, k]) -> Y:\n    Y[m, k] = X[m, k] + sum[k](exp(X[m, k]))")
    found = steps(shadowed, {"m": 1 << 13, "k": 1 << 13})
    assert found["m"] * found["k"] <= blocks.BLOCK
    assert found["m"] * found["k'"] <= blocks.BLOCK


def test_an_empty_rank_beside_large_ones_does_not_hide_them() -> None:
    c = parse("def f(X: f32[m], Z: f32[n], W: f32[k]) -> Y:\n    Y[m, n] = X[m] * Z[n] + sum[k](W[k])")
    found = steps(c, {"m": 1 << 13, "n": 1 << 13, "k": 0})
    assert found["m"] * found["n"] <= blocks.BLOCK
    for m, n, k in product((0, 3), repeat=3):
        assert evaluate(c, {"X": np.ones(m), "Z": np.ones(n), "W": np.ones(k)})["Y"].shape == (m, n)


ATTENTION = parse("""
def attention(Q: f32[q, d], K: f32[k, d], V: f32[k, f]) -> O:
    S[q, k] = where(q >= k, sum[d](Q[q, d] * K[k, d]), -inf)
    P[q, k] = exp(S[q, k] - max[k](S[q, k]))
    O[q, f] = sum[k](P[q, k] * V[k, f]) / sum[k](P[q, k])
""")


@pytest.mark.parametrize("infinite", [False, True])
@pytest.mark.parametrize("track", [False, True])
@pytest.mark.parametrize("name", ["gemm", "attention"])
def test_memory_holds_what_is_written_and_a_few_blocks(
    monkeypatch: pytest.MonkeyPatch, name: str, track: bool, infinite: bool
) -> None:
    """The cube of products would be 16 MB, in blocks of 1 MB; a factor that is not finite needs it, piece by piece."""
    n = 128
    c = GEMM if name == "gemm" else ATTENTION
    inputs = {p.name: RNG.standard_normal((n, n)) for p in c.params}
    if infinite:
        inputs[c.params[-1].name][3, 5] = np.inf
    want = evaluate_values(c, inputs, track=track)
    monkeypatch.setattr(blocks, "BLOCK", n * n)
    tracemalloc.start()
    got = evaluate_values(c, inputs, track=track)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * n * n * (60 if track else 30)
    for output in c.outputs:
        np.testing.assert_allclose(got[output].array, want[output].array, rtol=1e-12, atol=1e-12)
        if track:
            # Where the result is not finite, no finite bound means anything.
            a, b = (np.where(np.isfinite(v.array), v.slack(), 0.0) for v in (got[output], want[output]))
            np.testing.assert_allclose(a, b, rtol=0.01, atol=1e-30)


def test_reductions_know_which_sums_are_contractions() -> None:
    from castile.ir.evaluate import Oracle

    c = parse("""
def f(A: f32[m, k], B: f32[k], I: i32[k], J: f32[m, k]) -> (P, Q, R, S, T):
    P[m] = sum[k](A[m, k] * B[k])
    Q[m] = sum[k](A[m, k] * I[k])
    R[m] = sum[k](A[m, k])
    S[m] = max[k](A[m, k] * B[k])
    T[m] = sum[k](J[m, 0] * J[0, 0])
""")
    inputs = {"A": np.ones((2, 3)), "B": np.ones(3), "I": np.ones(3), "J": np.ones((2, 3))}
    oracle = Oracle(c, inputs, {"m": 2, "k": 3})
    found = [oracle.contracts(r) for e in c.einsums for r in e.reductions if isinstance(r, Reduce)]
    assert found == [True, False, False, False, False]
