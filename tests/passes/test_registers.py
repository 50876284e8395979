"""What tiles take of a GPU's registers, and default mappings that keep to them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import castile
from castile.ir.device import DEVICES, device_of
from castile.ir.mapping import Mapping
from castile.ir.tile import Dot, Fold, For, Op, TileKernel, operations
from castile.passes.defaults import default_mapping
from castile.passes.defaults_gpu import GPU_KNOBS
from castile.passes.few_rows import FEW_ROWS
from castile.passes.mapped import mapped, nominal
from castile.passes.registers import chained, copies, register_bytes, registers_free

CASCADES = Path(__file__).resolve().parents[2] / "examples" / "cascades"
GPUS = [t for t, d in DEVICES.items() if d.is_gpu]


def pressure(name: str, target: str, mapping: Mapping | None = None) -> tuple[int, int]:
    c = castile.load(CASCADES / f"{name}.cascade")
    extents = nominal(c)
    mapping = mapping or default_mapping(c, target, extents)
    device, warps = device_of(target), mapping.knob("warps")
    kernels = mapped(c, mapping, extents).kernels
    worst = max(kernels, key=lambda k: register_bytes(k, device, warps))
    return register_bytes(worst, device, warps), registers_free(worst, device, warps)


@pytest.mark.parametrize("target", GPUS)
@pytest.mark.parametrize("name", ["attention_lse", "attention_relative_bias", "groupnorm", "gemm"])
def test_defaults_stay_within_the_registers(name: str, target: str) -> None:
    taken, free = pressure(name, target)
    assert 0 < taken <= free


def test_larger_tiles_take_more_and_more_warps_have_more() -> None:
    knobs = {**GPU_KNOBS, "warps": 4}
    small = pressure("gemm", "cuda:80", Mapping(tiles={"m": 64, "n": 64, "k": 32}, knobs=knobs))
    large = pressure("gemm", "cuda:80", Mapping(tiles={"m": 128, "n": 128, "k": 32}, knobs=knobs))
    assert large[0] >= 2 * small[0]
    assert pressure("gemm", "cuda:80", Mapping(tiles={"m": 64}, knobs={**knobs, "warps": 8}))[1] > small[1]


def test_operands_lie_in_shared_memory_where_the_matrix_unit_reads_them_there() -> None:
    mapping = Mapping(tiles={"m": 128, "n": 128, "k": 64}, knobs=GPU_KNOBS)
    assert pressure("gemm", "cuda:90", mapping)[0] < pressure("gemm", "cuda:80", mapping)[0]


def kernels(name: str, tiles: dict[str, int], splits: dict[str, int] | None = None) -> tuple[TileKernel, ...]:
    c = castile.load(CASCADES / f"{name}.cascade")
    return mapped(c, Mapping(tiles=tiles, splits=splits or {}, knobs=GPU_KNOBS), nominal(c)).kernels


def test_warps_that_find_no_rows_hold_what_others_hold() -> None:
    (k,) = kernels("attention", {"q": 64, "k": 32, "f": 64})
    assert len(chained(k)) == 1
    assert copies(k, device_of("cuda:80"), 4) == 1
    assert copies(k, device_of("cuda:80"), 8) == 2
    assert copies(k, device_of("cuda:90"), 8) == 1
    assert copies(k, device_of("hip:gfx942"), 8) == 4
    (product,) = kernels("gemm", {"m": 64, "n": 64, "k": 32})
    assert not chained(product)
    assert copies(product, device_of("cuda:80"), 8) == 1


def test_what_an_unrolled_loop_loads_early_counts() -> None:
    device = device_of("cuda:90")
    tiles = {"q": 128, "k": 64, "d": 64}
    merge = kernels("attention_dq", tiles, {"k": 8})[-1]
    state = FEW_ROWS * 64 * 4
    # The old and the new state, what is loaded, and what the next turn loads.
    assert register_bytes(merge, device, 8) > 8 * state


@pytest.mark.parametrize("target", GPUS)
def test_no_more_warps_than_have_rows_unless_registers_are_scarce(target: str) -> None:
    c = castile.load(CASCADES / "attention_decode.cascade")
    mapping = default_mapping(c, target, nominal(c))
    # Each has 8 columns of the scores on most of NVIDIA's; on matrix cores of AMD's two have all rows.
    wanted = {"cuda:90": 4, "hip:gfx942": 2, "hip:gfx950": 2}.get(target, 8)
    assert mapping.knob("warps") == wanted
    if "wmma" not in device_of(target).features:
        made = mapped(c, mapping, nominal(c)).kernels
        assert wanted == 2 or all(copies(k, device_of(target), wanted) == 1 for k in made)


def test_one_stage_where_tiles_of_the_next_turn_would_wait_in_registers() -> None:
    c = castile.load(CASCADES / "attention_causal.cascade")
    assert default_mapping(c, "hip:gfx1100", nominal(c)).knob("stages") == 1
    assert default_mapping(c, "hip:gfx942", nominal(c)).knob("stages") == 2


def test_conditions_that_several_operations_ask_are_held_in_between() -> None:
    twice = kernels("top_p", {"n": 1, "k": 512, "j": 16})[1]
    folds = [op for op in operations(twice.body) if isinstance(op, Fold)]
    assert len(folds) == 2
    once = replace(twice, body=tuple(_without(op, folds[1]) for op in twice.body))
    device = device_of("cuda:90")
    assert register_bytes(twice, device, 4) >= register_bytes(once, device, 4) + 512 * 16


def _without(op: Op, other: Op) -> Op:
    return replace(op, body=tuple(x for x in op.body if x != other)) if isinstance(op, For) else op


def test_a_factor_that_may_be_infinite_passes_through_registers() -> None:
    k = kernels("attention_sigmoid", {"q": 128, "k": 64, "f": 128})[1]
    plain = replace(k, body=tuple(_plain(op) for op in k.body))
    device = device_of("cuda:90")
    # The tile of V, and a result of its own for what is rare.
    assert register_bytes(k, device, 8) >= register_bytes(plain, device, 8) + 64 * 128 * 2


def _plain(op: Op) -> Op:
    if isinstance(op, For):
        return replace(op, body=tuple(map(_plain, op.body)))
    return replace(op, annihilates=False) if isinstance(op, Dot) else op


def test_products_without_a_matrix_unit_are_shared_out_over_all_threads() -> None:
    device = device_of("hip:gfx1100")
    wide, low = (
        next(k for k in kernels("attention_mla", {"q": q, "k": 16, "f": 64, "d": 64}) if chained(k)) for q in (32, 16)
    )
    assert copies(low, device, 8) == 2 * copies(wide, device, 8)
    assert register_bytes(low, device, 8) < register_bytes(wide, device, 8)


@pytest.mark.parametrize("target", ["cuda:80", "cuda:90"])
def test_nothing_is_loaded_ahead_of_what_spills_whatever_it_does(target: str) -> None:
    c = castile.grad(castile.load(CASCADES / "attention_monoid.cascade"))
    assert default_mapping(c, target, nominal(c)).knob("stages") == 1
