"""Tuning for a GPU that is not here: the estimate, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

import castile
from castile.autotune import offline
from castile.autotune.offline import Shortlisted, _without_spills, estimate_s, shortlist
from castile.autotune.presets import preset
from castile.ir.device import device_of
from castile.ir.errors import UsageError
from castile.ir.mapping import Mapping
from castile.passes.defaults import default_mapping
from castile.passes.mapped import mapped

GEMM, _ = preset("gemm")
H200 = device_of("cuda:90")


def estimate(m: int, taken: list[dict[str, float]] | None = None) -> float:
    extents = {"m": m, "n": 1024, "k": 1024}
    mapping = default_mapping(GEMM, "cuda:90", extents)
    return estimate_s(mapped(GEMM, mapping, extents).kernels, extents, H200, mapping, taken)


def test_the_estimate_grows_with_the_work_and_with_what_hinders() -> None:
    assert estimate(8192) > estimate(4096) > 0
    free = estimate(4096, [{"occupancy": 1.0, "spill_bytes": 0}])
    assert estimate(4096, [{"occupancy": 0.01, "spill_bytes": 0}]) > free
    assert estimate(4096, [{"occupancy": 1.0, "spill_bytes": 4000}]) > free


def test_what_spills_is_rejected() -> None:
    from collections import Counter

    rejected: Counter[str] = Counter()
    found = [Shortlisted(Mapping(), 1.0, {"spill_bytes": n}) for n in (0, 8, 0)]
    assert len(_without_spills(found, rejected)) == 2
    assert rejected == {"spills": 1}


@pytest.mark.parametrize("target", ["cpu", "interpret", "cuda:1"])
def test_other_targets_are_refused(target: str) -> None:
    with pytest.raises(UsageError):
        shortlist(GEMM, {"m": 64, "n": 64, "k": 64}, target)


def test_a_shortlist() -> None:
    pytest.importorskip("triton")
    c = castile.parse("def double(x: f32[n]) -> y:\n    y[n] = 2 * x[n]\n")
    found = shortlist(c, {"n": 4096}, "cuda:90", budget_s=30, trials=2)
    assert found.compiled == 2
    assert found.candidates
    assert found.candidates[0].resources["registers"] > 0
    times = [s.estimate_s for s in found.candidates]
    assert times == sorted(times)
    assert all(0 < s.foreseen <= 255 for s in found.candidates)
    assert found.register_error >= 0


def test_what_will_spill_is_compiled_last(monkeypatch: pytest.MonkeyPatch) -> None:
    extents = {"m": 1024, "n": 1024, "k": 1024}
    usual = default_mapping(GEMM, "cuda:90", extents)
    others = [replace(usual, tiles={**usual.tiles, "m": m}) for m in (64, 256)]

    def order() -> list[int]:
        drafted = offline._draft(GEMM, [usual, *others], extents, H200, 0, 60.0)
        assert all(0 < registers <= 255 for registers in drafted.values())
        return list(drafted)

    assert order()[0] == 0
    for spills in (64, 256):
        rows = lambda k, extents, device, m, spills=spills: (4000.0 if m.tiles["m"] == spills else 40.0,)  # noqa: E731
        monkeypatch.setattr(offline, "kernel_row", rows)
        monkeypatch.setattr(offline, "foreseen", lambda rows, model: [r[0] for r in rows])
        assert order()[-1] == 1 + [64, 256].index(spills)
