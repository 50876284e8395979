"""Rows of a strip go over the part of a tile that their mask lets through, and loops over data that must be equal end
where they can no longer be: attention under every such mask, compiled for this machine and for AVX2, by the oracle."""

from __future__ import annotations

import platform
from functools import cache
from typing import Any

import numpy as np
import pytest
from judged import within_bound

import castile
from castile.codegen import compiler
from castile.codegen.cpp import print_cpp
from castile.codegen.runtime import CpuProgram
from castile.ir.dtypes import numpy_dtype
from castile.ir.extents import resolve, shape_of
from castile.ir.mapping import Mapping
from castile.passes.defaults import CPU
from castile.passes.mapped import Mapped, mapped

TEXT = """
def attend(Q: bf16[q, d], K: bf16[k, d], V: bf16[k, f], a: i32[q], b: i32[k], w: i32) -> O:
    X[q, k] = where(MASK, sum[d](Q[q, d] * K[k, d]), -inf)
    P[q, k] = exp(X[q, k] - max[k](X[q, k]))
    O[q, f] = sum[k](P[q, k] / sum[k](P[q, k]) * V[k, f])
"""
MASKS = {
    "causal": "(q >= k) & (a[q] + b[k] + w < 1000)",
    "window": "(q >= k) & (q - k < w) & (a[q] + b[k] < 1000)",
    "backwards": "(k >= q) & (a[q] + b[k] + w < 1000)",
    "around": "(q - k < w) & (k - q < w) & (a[q] + b[k] < 1000)",
    "slanted": "(k >= 2 * q) & (a[q] + b[k] + w < 1000)",
    "sink": "(q >= k) & ((k < 4) | (q - k < w)) & (a[q] + b[k] < 1000)",
    "document": "(a[q] == b[k]) & (q >= k) & (q - k < 100 + w)",
    "documents": "(b[k] == a[q]) & (q - k < 100 + w)",
}
SIZES = {"q": 149, "k": 213, "d": 17, "f": 70}
TILES = Mapping(tiles={"q": 96, "k": 160, "f": 80}, knobs={**CPU.knobs, "meet": 1})


@cache
def program(name: str, dtype: str = "bf16") -> tuple[castile.Cascade, Mapped]:
    c = castile.parse(TEXT.replace("MASK", MASKS[name]).replace("bf16", dtype))
    return c, mapped(c, TILES, resolve(c, SIZES))


CASES = [(name, "bf16") for name in MASKS] + [("window", "f32"), ("document", "f32")]


@cache
def library(machine: str) -> dict[tuple[str, str], CpuProgram]:
    before = compiler.VARIANTS
    try:
        if machine != "native":
            compiler.VARIANTS = ((f"-march={machine}", "-fopenmp"), (f"-march={machine}", "-fopenmp-simd", "-pthread"))
        return dict(zip(CASES, CpuProgram.build_all([program(*x)[1].program for x in CASES]), strict=True))
    finally:
        compiler.VARIANTS = before


def inputs(c: castile.Cascade, ids: str) -> dict[str, Any]:
    rng = np.random.default_rng(5)
    given: dict[str, Any] = {"w": 19}
    for p in (p for p in c.params if p.indices):
        shape = shape_of(c, p.name, resolve(c, SIZES))
        given[p.name] = np.asarray(rng.standard_normal(shape)).astype(numpy_dtype(p.dtype))
    for name, rank in (("a", "q"), ("b", "k")):
        drawn = rng.integers(-3, 9, SIZES[rank])
        given[name] = np.sort(drawn).astype(np.int32) if ids == "sorted" else drawn.astype(np.int32)
    if ids == "strangers":
        given["b"] += 100
    return given


def check(case: tuple[str, str], machine: str, ids: str) -> None:
    c = program(*case)[0]
    given = inputs(c, ids)
    within_bound(c, given, library(machine)[case](**given))


@pytest.mark.parametrize("ids", ["sorted", "mixed", "strangers"])
@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_masks_on_this_cpu(case: tuple[str, str], ids: str) -> None:
    check(case, "native", ids)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="AVX2 is of x86-64")
@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_masks_on_avx2(case: tuple[str, str]) -> None:
    check(case, "haswell", "sorted")


def test_a_strip_needs_a_part_of_a_tile() -> None:
    _, m = program("window")
    loops = [line for line in str(m.kernels[0]).split("\n") if "for k" in line]
    assert loops[0].endswith("(partial), each row from q - w + 1 to q + 1")
    text = print_cpp(m.kernels, "attend")
    assert "const int64_t k_skip = panels_before(" in text
    assert ".from_column(k_skip)" in text
    assert ".from_row(k_skip)" in text


def test_documents_are_looked_for_before_their_keys_are_read() -> None:
    _, m = program("document")
    lines = [line.strip() for line in str(m.kernels[0]).split("\n")]
    first, last = (next(t.split(":")[0] for t in lines if t.endswith(f"64 = {x}")) for x in ("extent(k)", "0"))
    assert any(t.startswith(f"for k:160 in {first} … ") and f", {last})" in t for t in lines)
    assert any(t.startswith(f"{first}: i64 min= reduce min[k](where((b_") for t in lines)
