"""What tiles take of a GPU's registers, and default mappings that keep to them."""

from __future__ import annotations

from pathlib import Path

import pytest

import castile
from castile.ir.device import DEVICES, device_of
from castile.ir.mapping import Mapping
from castile.passes.defaults_gpu import KNOBS
from castile.passes.mapped import default_mapping, mapped, nominal
from castile.passes.registers import register_bytes, registers_free

CASCADES = Path(__file__).resolve().parents[2] / "examples" / "cascades"
GPUS = [t for t, d in DEVICES.items() if d.is_gpu]


def pressure(name: str, target: str, mapping: Mapping | None = None) -> tuple[int, int]:
    c = castile.load(CASCADES / f"{name}.cascade")
    extents = nominal(c)
    mapping = mapping or default_mapping(c, target, extents)
    device, warps = device_of(target), mapping.knob("warps")
    kernels = mapped(c, mapping, extents).kernels
    worst = max(kernels, key=lambda k: register_bytes(k, device))
    return register_bytes(worst, device), registers_free(worst, device, warps)


@pytest.mark.parametrize("target", GPUS)
@pytest.mark.parametrize("name", ["attention_dq", "attention_relative_bias", "groupnorm", "gemm"])
def test_defaults_stay_within_the_registers(name: str, target: str) -> None:
    taken, free = pressure(name, target)
    assert 0 < taken <= free


def test_larger_tiles_take_more_and_more_warps_have_more() -> None:
    knobs = {**KNOBS, "warps": 4}
    small = pressure("gemm", "cuda:80", Mapping(tiles={"m": 64, "n": 64, "k": 32}, knobs=knobs))
    large = pressure("gemm", "cuda:80", Mapping(tiles={"m": 128, "n": 128, "k": 32}, knobs=knobs))
    assert large[0] >= 2 * small[0]
    assert pressure("gemm", "cuda:80", Mapping(tiles={"m": 64}, knobs={**knobs, "warps": 8}))[1] > small[1]


def test_operands_lie_in_shared_memory_where_the_matrix_unit_reads_them_there() -> None:
    mapping = Mapping(tiles={"m": 128, "n": 128, "k": 64}, knobs=KNOBS)
    assert pressure("gemm", "cuda:90", mapping)[0] < pressure("gemm", "cuda:80", mapping)[0]
