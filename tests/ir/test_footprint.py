"""Footprints against counts by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "codegen"))

from hand import expr, load, store, tile, written

import castile
from castile.ir.footprint import footprint, largest_rank, live_bytes, staged_bytes
from castile.ir.tile import Dot, Fold, For, Map, TileKernel


def gemm(m: int = 16, n: int = 32, k: int = 8) -> TileKernel:
    body = [
        Map(tile("c", "m n"), expr("0.0")),
        For("k", k, (load("a", "A", "m k"), load("b", "B", "k n"), Dot(tile("c", "m n"), "a", "b", ("k",), True))),
        store("C", "m n", "c"),
    ]
    return written("A: f32[m, k], B: f32[k, n]", {"C": "f32[m, n]"}, {"m": m, "n": n}, body).kernels[0]


def test_a_gemm() -> None:
    f = footprint(gemm(), {"m": 64, "n": 64, "k": 20})
    assert f.programs == 4 * 2
    assert f.matrix_flops == 2 * 64 * 64 * 20
    assert f.special_ops == 0
    assert f.memory_bytes == 4 * (64 * 20 + 20 * 64 + 64 * 64)
    # A is read once for each of 2 tiles of n, B for each of 4 tiles of m.
    assert f.moved_bytes == 4 * (2 * 64 * 20 + 4 * 20 * 64 + 64 * 64)
    assert f.trips == {"k": 3}
    assert f.live_bytes == 4 * (16 * 32 + 16 * 8 + 8 * 32)


def test_ragged_tiles_count_as_what_they_hold() -> None:
    f = footprint(gemm(), {"m": 17, "n": 33, "k": 1})
    assert f.programs == 4
    assert f.matrix_flops == 2 * 17 * 33
    assert f.trips == {"k": 1}


def test_nothing_runs_where_a_rank_is_empty() -> None:
    f = footprint(gemm(), {"m": 0, "n": 33, "k": 5})
    assert (f.programs, f.matrix_flops, f.memory_bytes, f.moved_bytes) == (0, 0, 0, 0)


def test_exponentials_and_reductions() -> None:
    body = [
        Map(tile("s", "n"), expr("0.0")),
        For("k", 4, (load("x", "X", "n k"), Fold(tile("s", "n"), "sum", ("k",), expr("exp(x) * 2.0", "x"), True))),
        store("Y", "n", "s"),
    ]
    k = written("X: f32[n, k]", {"Y": "f32[n]"}, {"n": 2}, body).kernels[0]
    f = footprint(k, {"n": 6, "k": 10})
    assert f.special_ops == 60
    assert f.vector_ops == 60 + 60
    assert f.moved_bytes == 4 * (60 + 6)


def test_bounds_halve_a_causal_loop() -> None:
    body = [
        Map(tile("s", "q"), expr("0.0")),
        For(
            "k",
            8,
            (load("x", "X", "q k"), Fold(tile("s", "q"), "sum", ("k",), expr("x", "x"), True)),
            upper=expr("q + 8"),
        ),
        store("Y", "q", "s"),
    ]
    k = written("X: f32[q, k]", {"Y": "f32[q]"}, {"q": 8}, body).kernels[0]
    f = footprint(k, {"q": 64, "k": 64})
    assert f.trips == {"k": pytest.approx(4.5)}
    assert f.vector_ops == 64 * 36


def test_live_bytes_of_loops_and_stages() -> None:
    k = gemm()
    assert staged_bytes(k) == 4 * (16 * 8 + 8 * 32)
    assert live_bytes(k) == 4 * (16 * 32 + 16 * 8 + 8 * 32)
    assert largest_rank(k) == "n"
    assert largest_rank(gemm(128, 32, 8)) == "m"


def test_an_attention_counts_both_contractions() -> None:
    from castile.ir.mapping import Mapping
    from castile.passes.mapped import mapped

    c = castile.load(Path(__file__).resolve().parents[2] / "examples" / "cascades" / "attention.cascade")
    extents = {"b": 1, "h": 2, "q": 128, "k": 256, "d": 64, "f": 64}
    (k,) = mapped(c, Mapping(tiles={"q": 64, "k": 64, "f": 64}, knobs={"hold": 1}), extents).kernels
    f = footprint(k, extents)
    assert f.matrix_flops == 2 * 2 * (2 * 128 * 256 * 64)
    assert f.special_ops >= 2 * 128 * 256
