"""What the CPU's mapping is where nothing was tuned."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import castile
from castile.ir.extents import resolve
from castile.ir.mapping import Mapping
from castile.passes import defaults_cpu
from castile.passes.defaults import default_mapping

CASCADES = Path(__file__).resolve().parents[2] / "examples" / "cascades"


def default(name: str, **extents: int) -> Mapping:
    c = castile.load(CASCADES / f"{name}.cascade")
    return default_mapping(c, "cpu", resolve(c, extents))


@pytest.mark.usefixtures("usual")
@pytest.mark.parametrize(
    ("shape", "tiles"),
    [
        ((1024, 1024, 1024), {"m": 1024, "n": 128, "k": 1024}),
        ((1024, 1024, 16384), {"m": 512, "n": 256, "k": 1024}),
        ((256, 256, 1024), {"m": 192, "n": 64, "k": 1024}),
        ((8, 4096, 4096), {"m": 16, "n": 2048, "k": 512}),
        ((2, 4096, 4096), {"m": 16, "n": 2048, "k": 64}),
    ],
)
def test_tiles_of_a_product_follow_its_rows(shape: tuple[int, int, int], tiles: dict[str, int]) -> None:
    assert default("gemm", **dict(zip("mnk", shape, strict=True))).tiles == tiles


@pytest.mark.usefixtures("usual")
def test_panels_follow_the_second_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but a part of it; and there are as many tiles of columns as keep the cores busy."""
    found = []
    for size in (1 << 19, 1 << 20, 1 << 21):
        monkeypatch.setattr(defaults_cpu, "second_cache", lambda size=size: size)
        found.append(default("gemm", m=4096, n=4096, k=4096).tiles["n"])
    assert found == [64, 64, 128]
    monkeypatch.setattr(defaults_cpu, "cores", lambda: 64)
    assert default("gemm", m=4096, n=4096, k=4096).tiles["n"] == 64


@pytest.mark.parametrize("empty", ["b", "m", "n", "k"])
def test_an_empty_rank_has_a_mapping(empty: str) -> None:
    c = castile.parse(
        "def f(A: f32[b, m, k], B: f32[b, k, n]) -> C:\n    C[b, m, n] = sum[k](A[b, m, k] * B[b, k, n])\n"
    )
    sizes = {"b": 2, "m": 64, "n": 64, "k": 64} | {empty: 0}
    assert all(n > 0 for n in default_mapping(c, "cpu", resolve(c, sizes)).tiles.values())


@pytest.mark.parametrize(("count", "columns"), [(1, 2048), (2, 2048), (3, 1408), (4, 1024), (16, 512)])
def test_few_rows_go_as_far_along_memory_as_cores_leave_each_other(
    count: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(defaults_cpu, "cores", lambda: count)
    assert default("gemm", m=8, n=4096, k=4096).tiles["n"] == columns


def test_a_depth_of_one_tile_is_no_loop() -> None:
    """Few rows go by shallow tiles, unless their numbers are to be those of many."""
    assert default("gemm", m=1024, n=1024, k=1024).knob("resident") == 1024
    assert default("gemm", m=1024, n=1024, k=16384).knob("resident") == 0
    assert default("gemm", m=8, n=1024, k=1024).knob("resident") == 0
    c = replace(castile.load(CASCADES / "gemm.cascade"), numerics="strict")
    few, many = (default_mapping(c, "cpu", resolve(c, {"m": m, "n": 1024, "k": 1024})) for m in (1, 64))
    assert few.tiles["k"] == many.tiles["k"]
    assert few.knob("resident") == many.knob("resident") == 1024


@pytest.mark.parametrize("keys", [1024, 4096, 16384])
def test_keys_of_attention_stream(keys: int) -> None:
    found = default("attention", b=1, h=8, q=512, k=keys, d=64, f=64)
    assert (found.form, found.tiles["k"], found.knob("resident")) == ("full", 512, 0)


@pytest.mark.parametrize("rows", [1, 4, 16])
def test_few_rows_stream_a_transposed_matrix(rows: int) -> None:
    """A linear layer's weights, as PyTorch stores them, lie along the depth: tiles are long there and narrow across."""
    sizes = {"m": rows, "n": 4096, "k": 4096}
    along, across = default("gemm_nt", **sizes), default("gemm", **sizes)
    assert (along.tiles["n"], along.tiles["k"]) == (64, 4096)
    assert across.tiles["n"] > along.tiles["n"]


def test_sums_of_a_row_are_not_made_again_for_each_tile_of_columns() -> None:
    """Merged into the product they would be; attention's stay, as its scores are no little thing to store."""
    sizes = {"m": 1024, "n": 1024, "k": 1024}
    assert default("layernorm_gemm", **sizes).form == "none"
    assert default("rmsnorm_gemm", **sizes).form == "full"
    long = {"b": 1, "h": 2, "q": 512, "k": 512, "d": 64, "f": 1024}
    assert default("attention", **long).form == "full"


def test_more_rows_share_a_band() -> None:
    sizes = {"b": 1, "h": 2, "q": 512, "k": 512, "d": 64, "f": 64}
    assert default("attention_window", **sizes).tiles["q"] > default("attention_causal", **sizes).tiles["q"]
