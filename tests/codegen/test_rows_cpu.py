"""Rows of products, whichever way they lie and however many: those that are brought near are those that were there."""

from __future__ import annotations

import platform
from dataclasses import replace

import numpy as np
import pytest
from judged import within_bound

import castile
from castile.codegen.runtime import CpuProgram
from castile.ir.dtypes import numpy_dtype
from castile.ir.extents import resolve
from castile.passes.defaults import default_mapping
from castile.passes.mapped import mapped

ACROSS = "def f(A: {0}[k, m], B: {0}[k, n]) -> C:\n    C[m, n] = sum[k](A[k, m] * B[k, n])\n"
ALONG = "def f(A: {0}[m, k], B: {0}[n, k]) -> C:\n    C[m, n] = sum[k](A[m, k] * B[n, k])\n"
MADE = "def f(A: {0}[k, m], B: {0}[k, n]) -> C:\n    C[m, n] = sum[k](exp(A[k, m]) * B[k, n])\n"

# Around the rows of a block, those that are brought at once, and a panel; and rows across memory that are
# too many, or too long, to be read where they are.
SIZES = [(m, k, n) for m in (1, 6, 7, 23, 24, 25, 49, 100) for k, n in ((1, 5), (33, 64), (64, 130))]
SIZES += [(300, 40, 64), (25, 401, 70)]


@pytest.mark.parametrize("flags", ["", "-DCASTILE_PAIRS=0", "-DCASTILE_PAIRS=1"])
def test_rows(flags: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CASTILE_CXXFLAGS", flags)
    cascades = [castile.parse(t.format(d)) for t in (ACROSS, ALONG, MADE) for d in ("f32", "bf16", "f16", "f8e4m3")]
    programs = []
    for c in cascades:
        extents = resolve(c, {"m": 320, "k": 420, "n": 192})
        programs.append(mapped(c, default_mapping(c, "cpu", extents), extents).program)
    rng = np.random.default_rng(7)
    for c, run in zip(cascades, CpuProgram.build_all(programs), strict=True):
        for m, k, n in SIZES:
            sizes = {"m": m, "k": k, "n": n}
            inputs = {
                p.name: rng.standard_normal([sizes[i.name] for i in p.indices]).astype(numpy_dtype(p.dtype))  # type: ignore[union-attr]
                for p in c.params
            }
            within_bound(c, inputs, run(**inputs))


FEW = "def f(A: {0}[m, k], B: {0}[{1}]) -> C:\n    C[m, n] = sum[k](A[m, k] * B[{1}])\n"
VARIANTS = ["", "-DCASTILE_PAIRS=0", "-DCASTILE_PAIRS=1"]
VARIANTS += ["-march=haswell"] if platform.machine() in ("x86_64", "AMD64") else []


@pytest.mark.parametrize("flags", VARIANTS)
def test_few_rows(flags: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their other operand is read where it lies, along either rank, its rows close to each other or apart. With and
    without sums that are there already, from tiles of ``k`` before."""
    monkeypatch.setenv("CASTILE_CXXFLAGS", flags)
    cascades = [castile.parse(FEW.format(d, b)) for d in ("f32", "bf16") for b in ("k, n", "n, k")]
    programs = []
    for c in cascades:
        mapping = default_mapping(c, "cpu", {"m": 8, "k": 200, "n": 192})
        mapping = replace(mapping, tiles={**mapping.tiles, "k": 64}, knobs={**mapping.knobs, "resident": 0})
        programs.append(mapped(c, mapping, {"m": 8, "k": 200, "n": 192}).program)
    rng = np.random.default_rng(3)
    for c, run in zip(cascades, CpuProgram.build_all(programs), strict=True):
        kind = numpy_dtype(c.params[0].dtype)
        for m in (1, 2, 3, 5, 8, 9, 17):
            for k, n in ((1, 1), (17, 5), (64, 130), (200, 71)):
                sizes = {"m": m, "k": k, "n": n}
                a = rng.standard_normal((m, k)).astype(kind)
                rows, columns = (sizes[i.name] for i in c.params[1].indices)  # type: ignore[union-attr]
                b = rng.standard_normal((rows, columns + 3)).astype(kind)
                for given in (b[:, :columns], np.ascontiguousarray(b[:, 3:])):
                    inputs = {"A": a, "B": given}
                    within_bound(c, inputs, run(**inputs))


def test_rows_of_strips_that_begin_anywhere() -> None:
    """A quotient of rows changes within a strip, though the strip is as high as what rows are divided by."""
    c = castile.parse(
        "def f(A: bf16[m, k], B: bf16[k, n], D: f32[m // 16, 16]) -> Y:\n"
        "    Y[m, n] = sum[k](A[m, k] * B[k, n]) + D[m // 16, m % 16]\n"
    )
    rng = np.random.default_rng(2)
    kind = numpy_dtype("bf16")
    for m in (16, 32, 80):
        apart = rng.standard_normal((m // 16, 20)).astype(np.float32)[:, :16]
        given = {
            "A": rng.standard_normal((m, 48)).astype(kind),
            "B": rng.standard_normal((48, 70)).astype(kind),
            "D": apart,
        }
        extents = {"m": m, "k": 48, "n": 70}
        mapping = default_mapping(c, "cpu", extents)
        for rows in (16, 32):
            tiles = {**mapping.tiles, "m": rows}
            run = CpuProgram.build(mapped(c, replace(mapping, tiles=tiles), extents).program)
            within_bound(c, given, run(**given))
