"""The device table: complete, consistent, and helpful about a wrong target."""

from __future__ import annotations

import pytest

from castile.ir.device import DEVICES, TARGETS, device_of
from castile.ir.errors import UsageError


@pytest.mark.parametrize("target", DEVICES)
def test_rows_are_consistent(target: str) -> None:
    device = DEVICES[target]
    assert device.target == target
    assert device_of(target) is device
    sizes = [level.bytes for level in device.memory]
    rates = [level.bytes_per_s for level in device.memory]
    assert sizes == sorted(sizes)
    assert rates == sorted(rates, reverse=True)
    assert device.bytes_per_s == rates[-1]
    assert device.flops_of("bf16") >= device.flops_of("f32") > 0
    assert device.flops_of("f8e4m3") >= device.flops_of("f32")
    if device.is_gpu:
        assert 0 < device.shared_bytes == device.memory[0].bytes
        assert device.warp in (32, 64)
        assert device.registers_per_thread > 0


def test_every_design_target_is_there() -> None:
    wanted = "cpu interpret cuda:80 cuda:89 cuda:90 cuda:100 cuda:120 hip:gfx942 hip:gfx950 hip:gfx1100 cuda".split()
    assert set(wanted) == set(TARGETS)


def test_a_wrong_target_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean `cuda:90`"):
        device_of("cuda:91")
