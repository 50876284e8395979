"""Operands of a product that are made where they are multiplied: packed weights of any width, with and without groups.

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
from castile.passes.mapped import Mapped, mapped

CASCADES = Path(__file__).resolve().parents[2] / "examples" / "cascades"

GROUPED = (CASCADES / "gemm_int4.cascade").read_text(encoding="utf-8")
TILED = (CASCADES / "gemm_int4_tiles.cascade").read_text(encoding="utf-8")
PLAIN = """
def f(A: bf16[m, k], W: u32[k // 8, n]) -> C:
    C[m, n] = sum[k](A[m, k] * ((W[k // 8, n] >> (4 * (k % 8)) & 15) - 8))
"""
# One bit field of 3 in 32 bits would leave some over: 10 to a word do not divide a tile. 2 bits, and 8 with a sign.
TERNARY = """
def f(A: bf16[m, k], W: u32[k // 16, n], s: f32[n]) -> C:
    C[m, n]: bf16 = s[n] * sum[k](A[m, k] * ((W[k // 16, n] >> (2 * (k % 16)) & 3) - 1))
"""
BYTES = """
def f(A: bf16[m, k], W: i8[k, n], s: bf16[k // 64, n]) -> C:
    C[m, n] = sum[k](A[m, k] * (s[k // 64, n] * W[k, n]))
"""
# Integers times fields of words in tiles of columns: whole numbers of either side.
TILED_BYTES = """
def f(A: i8[m, k], W: u32[n // 64, k // 8, 64]) -> C:
    C[m, n] = sum[k](A[m, k] * i32(W[n // 64, k // 8, n % 64] >> (4 * (k % 8)) & 15))
"""
# What is made may need a value of its own for each k, and may be a float: nothing may be read past the last.
SHIFTED = """
def f(A: f32[m, k], B: f32[k, n], b: f32[k], c: f32[n]) -> C:
    C[m, n] = sum[k](A[m, k] * maximum(B[k, n] + b[k], c[n]))
"""
ROUNDED = SHIFTED.replace("A: f32", "A: bf16")
# Where the summed rank stands, alone and in remainders that repeat soon, late and with no tile, may be asked for.
PLACED = """
def f(A: f32[m, k], B: f32[k, n]) -> C:
    P[k] = where(k < 31, -1, 1) + k % 2
    C[m, n] = sum[k](A[m, k] * (B[k, n] * P[k] - where(k % 7 > k % 32, k // 4, k // 3)))
"""
# A condition on the summed rank alone is on both operands, and one of rows on the left one; a divisor is with its like.
DIVIDED = """
def f(A: bf16[m, k], B: bf16[k, n], w: f32[k], s: f32[m]) -> C:
    C[m, n] = sum[k](where(w[k] > 0.0, A[m, k] * B[k, n] / (w[k] + s[m] ** 2), 0.0))
"""
BANDED = DIVIDED.replace("w[k] > 0.0", "(w[k] > 0.0) & (k <= 3 * m)").replace("bf16", "f32")

# Few rows, which are multiplied as the operand is made; some; and more than a strip of them.
CASES: dict[str, Case] = {
    "grouped 1": (GROUPED, {"m": 1, "n": 70, "k": 299}, None),
    "grouped 3": (GROUPED, {"m": 3, "n": 33, "k": 256}, None),
    "grouped 9": (GROUPED, {"m": 9, "n": 130, "k": 257}, None),
    "grouped 45": (GROUPED, {"m": 45, "n": 97, "k": 384}, None),
    "tiled 1": (TILED, {"m": 1, "n": 70, "k": 299}, None),
    "tiled 3": (TILED, {"m": 3, "n": 150, "k": 256}, None),
    "tiled bytes 2": (TILED_BYTES, {"m": 2, "n": 128, "k": 264}, None),
    "tiled bytes 9": (TILED_BYTES, {"m": 9, "n": 150, "k": 257}, None),
    "tiled 9": (TILED, {"m": 9, "n": 150, "k": 257}, None),
    "tiled 45": (TILED, {"m": 45, "n": 600, "k": 256}, None),
    "tiled wide": (TILED, {"m": 1, "n": 330, "k": 264}, Mapping(tiles={"k": 128, "n": 256}, knobs={"apart": 1})),
    "grouped in pieces": (
        GROUPED,
        {"m": 2, "n": 70, "k": 1000},
        Mapping(tiles={"k": 128, "n": 64}, splits={"k": 3}, knobs={"apart": 1}),
    ),
    "plain": (PLAIN, {"m": 5, "n": 70, "k": 83}, None),
    "plain 1": (PLAIN, {"m": 1, "n": 70, "k": 83}, None),
    "ternary": (TERNARY, {"m": 21, "n": 70, "k": 83}, None),
    "bytes": (BYTES, {"m": 21, "n": 70, "k": 131}, None),
    "shifted": (SHIFTED, {"m": 21, "n": 70, "k": 83}, None),
    "shifted 2": (SHIFTED, {"m": 2, "n": 70, "k": 83}, None),
    "placed": (PLACED, {"m": 21, "n": 70, "k": 83}, None),
    "placed 2": (PLACED, {"m": 2, "n": 70, "k": 64}, None),
    "placed bf16": (PLACED.replace("A: f32", "A: bf16"), {"m": 21, "n": 70, "k": 83}, None),
    "divided": (DIVIDED, {"m": 21, "n": 70, "k": 83}, None),
    "divided 2": (DIVIDED, {"m": 2, "n": 70, "k": 83}, None),
    "banded": (BANDED, {"m": 21, "n": 70, "k": 83}, None),
    "rounded": (ROUNDED, {"m": 21, "n": 70, "k": 83}, None),
}
NAMES = sorted(CASES)

# Zero points; other integers are of every size.
RANGES = {"zero": (0, 16)}


def program(name: str) -> Mapped:
    return program_of(CASES[name])


@cache
def library(variant: str) -> dict[str, CpuProgram]:
    return built(CASES, variant)


@pytest.mark.parametrize("name", NAMES)
def test_made_operands_on_this_cpu(name: str) -> None:
    c = castile.parse(CASES[name][0])
    given = drawn(c, CASES[name][1], RANGES)
    within_bound(c, given, library("native")[name](**given))


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="AVX2 is of x86-64")
@pytest.mark.parametrize("name", NAMES)
def test_made_operands_on_avx2(name: str) -> None:
    c = castile.parse(CASES[name][0])
    given = drawn(c, CASES[name][1], RANGES)
    within_bound(c, given, library("haswell")[name](**given))


@pytest.mark.parametrize("name", ["grouped 1", "grouped 9"])
def test_weights_in_another_order_of_memory(name: str) -> None:
    c = castile.parse(CASES[name][0])
    given = drawn(c, CASES[name][1], RANGES)
    given = {n: np.asfortranarray(x) for n, x in given.items()}
    within_bound(c, given, library("native")[name](**given))


@pytest.mark.parametrize("name", ["grouped 1", "grouped 9"])
def test_weights_that_are_all_zero_points(name: str) -> None:
    """The sums that a group's product is made of cancel, and what is left lies within the bound."""
    c = castile.parse(CASES[name][0])
    given = drawn(c, CASES[name][1], RANGES)
    given["W"][:] = 0x55555555
    given["zero"][:] = 5
    within_bound(c, given, library("native")[name](**given))


@pytest.mark.parametrize("name", ["divided", "divided 2", "banded"])
def test_terms_that_are_left_out_may_be_anything(name: str) -> None:
    c = castile.parse(CASES[name][0])
    given = drawn(c, CASES[name][1], RANGES)
    out = given["w"] <= 0
    given["A"][:, out], given["B"][out] = np.inf, np.nan
    within_bound(c, given, library("native")[name](**given))


def test_what_is_made_is_in_no_tile() -> None:
    """One word is read for eight values; its fields have literal places; nothing else is stored of them."""
    text = print_cpp(program("grouped 45").kernels, "f")
    assert "Field<28, 4, 0>{" in text
    assert "pack_made<bf16, 8>(" in text
    assert "shift_right" not in text
    assert "floormod" not in text


def test_groups_leave_the_product() -> None:
    (kernel,) = program("grouped 45").kernels
    assert "dot[k](A_2, right_4) in bf16" in str(kernel)
    assert "= W_3 >> 4 * (k % 8) & 15" in str(kernel)
    assert "+ scale_8 * (part_5 - zero_7 * ones_6)" in str(kernel)


def test_strict_numerics_keep_groups_inside() -> None:
    c = castile.parse(GROUPED.replace("def ", '@cascade(numerics="strict")\ndef '))
    extents = resolve(c, {"m": 45, "n": 97, "k": 384})
    assert not default_mapping(c, "cpu", extents).knob("apart")
    (kernel,) = mapped(c, Mapping(tiles={"k": 128}, knobs={"apart": 1}), extents).kernels
    assert "part" not in str(kernel)
