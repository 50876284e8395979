"""Rows of products that are stored: the examples that have such, and cases with odd extents, agree with the oracle."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from judged import within_bound

import castile
from castile.codegen.runtime import CpuProgram
from castile.ir.dtypes import numpy_dtype
from castile.ir.extents import resolve
from castile.ir.mapping import Mapping
from castile.passes.defaults import default_mapping
from castile.passes.mapped import Mapped, mapped

sys.path.insert(0, str(Path(__file__).resolve().parent))

from test_examples_cpu import CASCADES, CASES, fitting

LAYERNORM = """
def f(X: {0}[m, k], gamma: f32[k], W: {0}[k, n]) -> Y:
    mu[m]   = sum[k](X[m, k]) / extent(k)
    N[m, k] = (X[m, k] - mu[m]) * rsqrt(sum[k]((X[m, k] - mu[m]) ** 2) / extent(k) + 1.0) * gamma[k]
    Y[m, n] = sum[k](N[m, k] * W[k, n])
"""
SWIGLU = """
def f(A: {0}[m, k], B: {0}[m, k], W: {0}[k, n]) -> Y:
    Y[m, n] = sum[k](A[m, k] * sigmoid(A[m, k]) * B[m, k] * W[k, n])
"""
BATCHED = """
def f(A: {0}[b, m, k], s: f32[b, m], W: {0}[b, n, k]) -> Y:
    Y[b, m, n] = maximum(sum[k](exp(A[b, m, k] - s[b, m]) * W[b, n, k]), 0.0)
"""


def small(form: str, rank_tile: int, ranks: tuple[str, ...]) -> Mapping:
    knobs = {"hold": 1, "align": 16, "group": 1, "join": 1, "resident": 1024, "stored": 1}
    return Mapping(form, "maximum", dict.fromkeys(ranks, rank_tile), {}, knobs)


def stores(made: Mapped) -> list[str]:
    """The rows that are stored."""
    return [p.name for p in made.program.scratch if p.name.endswith("_rows")]


@pytest.mark.parametrize("form", ["none", "full"])
def test_examples(form: str) -> None:
    """Every example that has rows to store, at its small extents, in tiles of two columns."""
    cases: list[tuple[castile.Cascade, dict[str, Any], Mapped]] = []
    for name in sorted(CASES):
        c = castile.load(CASCADES / f"{name}.cascade")
        inputs = fitting(c, CASES[name].draw())
        extents = resolve(c, {}, {p.name: np.shape(inputs[p.name]) for p in c.params})
        made = mapped(c, small(form, 2, c.ranks), extents)
        if stores(made):
            cases.append((c, inputs, made))
    assert any(c.name == "layernorm_gemm" for c, *_ in cases) == (form == "none")
    for (c, inputs, _), run in zip(cases, CpuProgram.build_all([m.program for *_, m in cases]), strict=True):
        within_bound(c, inputs, run(**inputs))


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16", "f64"])
@pytest.mark.parametrize("text", [LAYERNORM, SWIGLU, BATCHED])
def test_odd_extents(text: str, dtype: str) -> None:
    c = castile.parse(text.format(dtype))
    judged = {"m": 7, "k": 160, "n": 21, "b": 2}
    extents = resolve(c, {r: n for r, n in judged.items() if r in c.ranks})
    made = mapped(c, small("none", 8, c.ranks), extents)
    assert len(stores(made)) == 1
    run = CpuProgram.build_all([made.program])[0]
    rng = np.random.default_rng(5)
    for m, k, n in ((7, 37, 21), (1, 1, 1), (5, 0, 3), (0, 4, 5), (3, 16, 0), (33, 131, 65)):
        sizes = {"m": m, "k": k, "n": n, "b": 2}
        shapes = {p.name: tuple(sizes[i.name] for i in p.indices) for p in c.params}  # type: ignore[union-attr]
        inputs = {p.name: rng.standard_normal(shapes[p.name]).astype(numpy_dtype(p.dtype)) for p in c.params}
        within_bound(c, inputs, run(**inputs))


def test_not_a_number_stays_in_its_row() -> None:
    c = castile.parse(SWIGLU.format("f32"))
    made = mapped(c, small("full", 4, c.ranks), {"m": 6, "k": 8, "n": 12})
    A, B, W = np.ones((6, 8), "f4"), np.ones((6, 8), "f4"), np.ones((8, 12), "f4")
    A[1, 3], B[4, 2] = np.nan, np.inf
    got = CpuProgram.build_all([made.program])[0](A=A, B=B, W=W)
    assert np.isnan(got[1]).all()
    assert np.isinf(got[4]).all()
    assert np.isfinite(got[[0, 2, 3, 5]]).all()


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_by_default_where_rows_are_dear(dtype: str) -> None:
    def stored(text: str, numerics: str = "standard", **extents: int) -> int:
        c = castile.parse(text.format(dtype))
        return default_mapping(castile.compile(c, "cpu", numerics=numerics).cascade, "cpu", extents).knob("stored")

    large = {"m": 1024, "k": 1024, "n": 1024}
    assert stored(LAYERNORM, **large) == 1
    assert stored(SWIGLU, **large) == 1
    assert stored(SWIGLU, **large, numerics="strict") == 0
    assert stored(SWIGLU, m=1024, k=1024, n=64) == 0
    assert (
        stored("def f(A: {0}[m, k], W: {0}[k, n]) -> Y:\n    Y[m, n] = sum[k](2 * A[m, k] * W[k, n])\n", **large) == 0
    )
