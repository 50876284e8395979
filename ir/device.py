"""Devices as values: the units, rates, memory levels and limits that mappings are judged by.

The rows are datasheet numbers of one representative of each target; `castile device measure` replaces rates by
measured ones. Limits that a compiler enforces (shared memory of a block, registers of a thread) are those of the
architecture, not of one card. Sources: the CUDA C++ programming guide's table of compute capabilities and the
whitepapers of A100, Ada, H100, B200 and RTX Blackwell; AMD's CDNA 3, CDNA 4 and RDNA 3 guides and data sheets.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from .errors import UsageError

KIB, MIB, GIB = 1024, 1024**2, 1024**3


@dataclass(frozen=True, slots=True)
class MemoryLevel:
    """One level of memory, nearest first.

    ``bytes`` is the capacity of one instance, ``shared_by`` how many units share it, ``bytes_per_s`` the rate of the
    whole device.
    """

    name: str
    bytes: int
    shared_by: int
    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class Device:
    """One device: what it can do at best, and what a kernel may use.

    ``units`` counts the independent processors (SMs, compute units, cores). ``flops`` maps "f64", "f32", "tf32",
    "f16", "bf16", "f8", "i8" to the peak rate of products in FLOP/s, on the matrix unit where there is one;
    ``special_per_s`` counts exponentials and the like. ``vector_bits`` is the width of a SIMD register (CPU) or 32
    times the warp (GPU). A limit of 0 means that the target has none.
    """

    name: str
    target: str
    units: int
    flops: Mapping[str, float]
    special_per_s: float
    memory: tuple[MemoryLevel, ...]
    vector_bits: int
    warp: int = 1
    shared_bytes: int = 0
    registers_per_thread: int = 0
    registers_per_unit: int = 0
    threads_per_unit: int = 0
    threads_per_block: int = 0
    features: frozenset[str] = frozenset()

    @property
    def is_gpu(self) -> bool:
        return self.target != "cpu"

    @property
    def bytes_per_s(self) -> float:
        """The rate of main memory."""
        return self.memory[-1].bytes_per_s

    def flops_of(self, dtype: str) -> float:
        """Peak FLOP/s of products of a dtype; narrower types without a unit of their own run as f32."""
        key = {"f8e4m3": "f8", "f8e5m2": "f8", "u8": "i8"}.get(dtype, dtype)
        return self.flops.get(key, self.flops["f32"])


def _rates(**tera: float) -> Mapping[str, float]:
    return MappingProxyType({k: v * 1e12 for k, v in tera.items()})


def _gpu_memory(
    shared: int, units: int, l2: int, size: int, shared_rate: float, l2_rate: float, rate: float
) -> tuple[MemoryLevel, ...]:
    return (
        MemoryLevel("shared", shared, 1, shared_rate),
        MemoryLevel("L2", l2, units, l2_rate),
        MemoryLevel("memory", size, units, rate),
    )


_nvidia = {
    "warp": 32,
    "vector_bits": 1024,
    "registers_per_thread": 255,
    "registers_per_unit": 65536,
    "threads_per_block": 1024,
}
_ROWS = (
    Device(
        "NVIDIA A100 80GB",
        "cuda:80",
        108,
        _rates(f64=19.5, f32=19.5, tf32=156, f16=312, bf16=312, i8=624),
        2.4e12,
        _gpu_memory(163 * KIB, 108, 40 * MIB, 80 * GIB, 19.5e12, 5.0e12, 2.0e12),
        shared_bytes=163 * KIB,
        threads_per_unit=2048,
        features=frozenset({"mma", "cp.async"}),
        **_nvidia,
    ),
    Device(
        "NVIDIA L40S",
        "cuda:89",
        142,
        _rates(f64=1.4, f32=91.6, tf32=183, f16=362, bf16=362, f8=733, i8=733),
        5.7e12,
        _gpu_memory(99 * KIB, 142, 96 * MIB, 48 * GIB, 45e12, 5.0e12, 0.864e12),
        shared_bytes=99 * KIB,
        threads_per_unit=1536,
        features=frozenset({"mma", "cp.async"}),
        **_nvidia,
    ),
    Device(
        "NVIDIA H200",
        "cuda:90",
        132,
        _rates(f64=67, f32=67, tf32=395, f16=790, bf16=790, f8=1580, i8=1580),
        3.9e12,
        _gpu_memory(227 * KIB, 132, 50 * MIB, 141 * GIB, 33e12, 5.5e12, 4.8e12),
        shared_bytes=227 * KIB,
        threads_per_unit=2048,
        features=frozenset({"mma", "wgmma", "cp.async", "tma"}),
        **_nvidia,
    ),
    Device(
        "NVIDIA B200",
        "cuda:100",
        148,
        _rates(f64=40, f32=80, tf32=1100, f16=2250, bf16=2250, f8=4500, i8=4500),
        4.4e12,
        _gpu_memory(227 * KIB, 148, 126 * MIB, 180 * GIB, 37e12, 10e12, 8.0e12),
        shared_bytes=227 * KIB,
        threads_per_unit=2048,
        features=frozenset({"mma", "tcgen05", "cp.async", "tma"}),
        **_nvidia,
    ),
    Device(
        "NVIDIA RTX 5090",
        "cuda:120",
        170,
        _rates(f64=1.6, f32=105, tf32=105, f16=210, bf16=210, f8=419, i8=838),
        6.5e12,
        _gpu_memory(99 * KIB, 170, 96 * MIB, 32 * GIB, 52e12, 6.0e12, 1.79e12),
        shared_bytes=99 * KIB,
        threads_per_unit=1536,
        features=frozenset({"mma", "cp.async", "tma"}),
        **_nvidia,
    ),
    Device(
        "AMD Instinct MI300X",
        "hip:gfx942",
        304,
        _rates(f64=163, f32=163, tf32=654, f16=1307, bf16=1307, f8=2615, i8=2615),
        10e12,
        _gpu_memory(64 * KIB, 304, 256 * MIB, 192 * GIB, 82e12, 17e12, 5.3e12),
        vector_bits=2048,
        warp=64,
        shared_bytes=64 * KIB,
        registers_per_thread=512,
        registers_per_unit=131072,
        threads_per_unit=2048,
        threads_per_block=1024,
        features=frozenset({"mfma"}),
    ),
    Device(
        "AMD Instinct MI355X",
        "hip:gfx950",
        256,
        _rates(f64=79, f32=157, f16=2500, bf16=2500, f8=5000, i8=5000),
        9.8e12,
        _gpu_memory(160 * KIB, 256, 256 * MIB, 288 * GIB, 79e12, 17e12, 8.0e12),
        vector_bits=2048,
        warp=64,
        shared_bytes=160 * KIB,
        registers_per_thread=512,
        registers_per_unit=131072,
        threads_per_unit=2048,
        threads_per_block=1024,
        features=frozenset({"mfma", "lds.load"}),
    ),
    Device(
        "AMD Radeon RX 7900 XTX",
        "hip:gfx1100",
        96,
        _rates(f64=1.9, f32=61, f16=123, bf16=123, i8=123),
        7.7e12,
        _gpu_memory(64 * KIB, 96, 96 * MIB, 24 * GIB, 30e12, 3.5e12, 0.96e12),
        vector_bits=1024,
        warp=32,
        shared_bytes=64 * KIB,
        registers_per_thread=256,
        registers_per_unit=98304,
        threads_per_unit=1024,
        threads_per_block=1024,
        features=frozenset({"wmma"}),
    ),
    # One core of a current server, all units counted as one; a measured row replaces it.
    Device(
        "generic CPU core",
        "cpu",
        1,
        _rates(f64=0.05, f32=0.1, bf16=0.1, f16=0.1, i8=0.1),
        2e9,
        (
            MemoryLevel("L1", 32 * KIB, 1, 200e9),
            MemoryLevel("L2", MIB, 1, 100e9),
            MemoryLevel("L3", 16 * MIB, 1, 50e9),
            MemoryLevel("memory", 16 * GIB, 1, 15e9),
        ),
        vector_bits=256,
    ),
)

DEVICES: Mapping[str, Device] = MappingProxyType({row.target: row for row in _ROWS})

# Every spelling of a target: "interpret" runs a kernel under Triton's interpreter, "cuda" is the device present.
TARGETS = (*DEVICES, "interpret", "cuda")


def device_of(target: str) -> Device:
    """The shipped device of a target. Raises `UsageError` for a target that does not exist."""
    if target in DEVICES:
        return DEVICES[target]
    if target == "interpret":
        return DEVICES["cuda:80"]
    close = difflib.get_close_matches(str(target), TARGETS, n=1, cutoff=0.5)
    hint = f"did you mean `{close[0]}`?" if close else ""
    raise UsageError(f"no target is called `{target}`", hint=hint or "the targets are " + " ".join(TARGETS))
