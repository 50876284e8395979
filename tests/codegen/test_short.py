"""Products of short numbers: bytes, whose sums are exact, fields of words with bytes, floats of 8 bits.

Compiled for this machine and for AVX2, at sizes that leave remainders everywhere; judged by the oracle's bound.
"""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from judged import within_bound
from variants import Case, built, drawn, program_of

import castile
from castile.codegen.cpp import print_cpp
from castile.codegen.runtime import CpuProgram
from castile.ir.extents import resolve
from castile.ir.mapping import Mapping
from castile.passes.defaults import default_mapping
from castile.passes.mapped import Mapped

CASCADES = Path(__file__).resolve().parents[2] / "examples" / "cascades"

PLAIN = """
def f(A: {a}[m, k], B: {b}[{order}]) -> C:
    C[m, n]{out} = sum[k](A[m, k] * B[{order}])
"""


def plain(a: str, b: str, order: str, out: str = "") -> str:
    return PLAIN.format(a=a, b=b, order=order, out=out)


def example(name: str) -> str:
    return (CASCADES / f"{name}.cascade").read_text(encoding="utf-8")


# Zero points on either side, a sum in 64 bits, words of nibbles with bytes, and integers too long for bytes.
POINTS = """
def f(A: u8[m, k], B: i8[n, k], z: u8[m]) -> C:
    C[m, n] = sum[k]((A[m, k] - z[m]) * B[n, k])
"""
NIBBLES = """
def f(A: i8[m, k], W: u32[k // 8, n], z: i8[n]) -> C:
    C[m, n] = sum[k](A[m, k] * ((W[k // 8, n] >> (4 * (k % 8)) & 15) - z[n]))
"""
SIGNED = """
def f(A: i8[m, k], B: i8[k, n]) -> C:
    C[m, n] = sum[k](A[m, k] * maximum(B[k, n], -100))
"""
LONG = """
def f(A: i16[m, k], B: i8[k, n]) -> C:
    C[m, n] = sum[k](A[m, k] * B[k, n])
"""
# What leaves a group is no power of two here, and holds a NaN of its own; a group is shorter than a vector.
SCALED = """
def f(A: f8e5m2[m, k], B: f8e4m3[k, n], s: f32[m, k // 16], t: f32[k // 16, n]) -> C:
    C[m, n] = sum[k](A[m, k] * B[k, n] * (s[m, k // 16] + t[k // 16, n]))
"""

SAID = """
def f(A: i8[m, k], B: i8[k, n]) -> C:
    C[m, n] = sum[k](i32(A[m, k]) * i32(B[k, n]))
"""

SOME, FEW, ROW = {"m": 45, "n": 97, "k": 203}, {"m": 3, "n": 70, "k": 128}, {"m": 1, "n": 33, "k": 71}
SMALL = Mapping(tiles={"m": 16, "n": 32, "k": 48}, knobs={"narrow": 1})
CASES: dict[str, Case] = {
    "i8 i8": (plain("i8", "i8", "n, k"), SOME, None),
    "i8 i8 wide": (plain("i8", "i8", "n, k"), {"m": 14, "n": 128, "k": 260}, None),
    "i8 i8 across": (plain("i8", "i8", "k, n"), SOME, None),
    "i8 i8 said": (SAID, SOME, None),
    "i8 i8 said few": (SAID, FEW, None),
    "i8 i8 few": (plain("i8", "i8", "n, k"), FEW, None),
    "i8 i8 row": (plain("i8", "i8", "k, n"), ROW, None),
    "i8 i8 pieces": (plain("i8", "i8", "n, k"), SOME, SMALL),
    "i8 i8 f32": (plain("i8", "i8", "n, k", ": f32"), SOME, None),
    "u8 i8": (plain("u8", "i8", "k, n"), SOME, None),
    "i8 u8": (plain("i8", "u8", "n, k"), SOME, None),
    "u8 u8": (plain("u8", "u8", "k, n"), SOME, None),
    "u8 u8 wide": (plain("u8", "u8", "n, k"), {"m": 14, "n": 128, "k": 260}, None),
    "zero points": (POINTS, SOME, None),
    "nibbles": (NIBBLES, SOME, None),
    "nibbles row": (NIBBLES, ROW, None),
    "signed": (SIGNED, SOME, None),
    "signed few": (SIGNED, FEW, None),
    "long": (LONG, ROW, None),
    "example int8": (example("gemm_int8"), SOME, None),
    "example ternary": (example("gemm_ternary"), SOME, None),
    "example ternary few": (example("gemm_ternary"), FEW, None),
    "example ternary pieces": (example("gemm_ternary"), SOME, SMALL),
    "f8e4m3 f8e4m3": (plain("f8e4m3", "f8e4m3", "n, k"), SOME, None),
    "f8e4m3 wide": (plain("f8e4m3", "f8e4m3", "n, k"), {"m": 14, "n": 128, "k": 260}, None),
    "f8e5m2 f8e4m3": (plain("f8e5m2", "f8e4m3", "k, n"), {"m": 14, "n": 131, "k": 67}, None),
    "f8e5m2 bf16": (plain("f8e5m2", "bf16", "k, n"), FEW, None),
    "scaled": (SCALED, SOME, None),
    "scaled row": (SCALED, ROW, None),
    "example mxfp8": (example("gemm_mxfp8"), SOME, None),
    "example mxfp8 row": (example("gemm_mxfp8"), ROW, None),
}
NAMES = sorted(CASES)

# Scales near one; of other types every byte there is, the least and the greatest among them.
RANGES = {"sa": (120, 135), "sb": (120, 135)}


def program(name: str) -> Mapped:
    return program_of(CASES[name])


@cache
def library(variant: str) -> dict[str, CpuProgram]:
    return built(CASES, variant)


VARIANTS = ["native", *(["haswell", "x86-64-v2"] if platform.machine() in ("x86_64", "AMD64") else [])]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", NAMES)
def test_short_numbers(name: str, variant: str) -> None:
    c = castile.parse(CASES[name][0])
    given = drawn(c, CASES[name][1], RANGES)
    within_bound(c, given, library(variant)[name](**given))


@pytest.mark.parametrize("name", ["i8 i8", "i8 i8 few", "f8e4m3 f8e4m3", "example ternary"])
def test_another_order_of_memory(name: str) -> None:
    c = castile.parse(CASES[name][0])
    given = drawn(c, CASES[name][1], RANGES)
    given = {n: np.asfortranarray(x) if x.ndim else x for n, x in given.items()}
    within_bound(c, given, library("native")[name](**given))


@pytest.mark.parametrize("least", [-128, 127])
def test_sums_that_are_as_large_as_can_be(least: int) -> None:
    c = castile.parse(CASES["i8 i8"][0])
    given = {n: np.full_like(x, least if n == "A" else -128) for n, x in drawn(c, CASES["i8 i8"][1], RANGES).items()}
    within_bound(c, given, library("native")["i8 i8"](**given))


@pytest.mark.parametrize("name", ["f8e4m3 wide", "f8e5m2 f8e4m3"])
def test_every_float_of_eight_bits(name: str) -> None:
    """Each code as A times one: subnormal numbers, infinities and NaN are themselves."""
    c = castile.parse(CASES[name][0])
    given = drawn(c, CASES[name][1], RANGES)
    a = given["A"]
    a[:] = np.resize(np.arange(256, dtype=np.uint8), a.shape).view(a.dtype)
    a[1:] = np.where(np.isfinite(a[1:].astype(np.float32)), a[1:], a.dtype.type(0))
    within_bound(c, given, library("native")[name](**given))


def test_bytes_are_multiplied_as_bytes() -> None:
    text = print_cpp(program("example ternary").kernels, "f")
    assert "pack_made<Whole<int8_t, uint8_t>, 16>(" in text
    assert "fold<Sum" in text
    assert "int64_t sum" not in text
    assert "dot_packed<Whole<int8_t, int8_t>, int8_t>(" in print_cpp(program("i8 i8").kernels, "f")


def test_integers_that_bytes_do_not_hold_stay_as_they_are() -> None:
    assert "dot" not in str(program("long").kernels[0])
    assert not program("long").mapping.knob("narrow")


def test_strict_numerics_have_them_too() -> None:
    """Sums of integers have no order, and bf16 holds what is shorter."""
    c = castile.parse(CASES["i8 i8"][0].replace("def ", '@cascade(numerics="strict")\ndef ', 1))
    assert default_mapping(c, "cpu", resolve(c, SOME)).knob("narrow")
