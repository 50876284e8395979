"""Rows that masks leave empty are 0 in compiled kernels, in every form; as are those that only flags could tell of, and
sums over a rank that is empty."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

import castile
from castile.codegen.runtime import CpuProgram
from castile.ir.dtypes import numpy_dtype
from castile.ir.extents import resolve
from castile.ir.mapping import Mapping
from castile.passes.mapped import mapped

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "passes"))

from test_emptied import EMPTIED, ROWS, rows


@pytest.mark.parametrize("form", [("none", "maximum"), ("full", "maximum"), ("full", "exponent")])
def test_rows_without_a_key(form: tuple[str, str]) -> None:
    cases = []
    for value, hides in EMPTIED.items():
        c, given = castile.parse(ROWS + value + "\n"), rows()
        if hides:
            given["S"][:, 3], given["V"][3], given["v"][[0, 5]] = np.nan, np.inf, (np.nan, np.inf)
        inputs = {p.name: given[p.name].astype(numpy_dtype(p.dtype)) for p in c.params}
        extents = resolve(c, {}, {n: np.shape(x) for n, x in inputs.items()})
        mapping = Mapping(*form, {"q": 4, "k": 2}, {}, {})
        cases.append((value, c, inputs, mapped(c, mapping, extents).program))
    for (value, c, inputs, _), run in zip(cases, CpuProgram.build_all([p for *_, p in cases]), strict=True):
        want = castile.evaluate(c, inputs)["Y"]
        finite = np.isfinite(want)
        np.testing.assert_allclose(run(**inputs)[finite], want[finite], 2e-3, 1e-5, err_msg=f"{value} {form}")


@pytest.mark.parametrize("mapping", [None, Mapping("full", "maximum", {"m": 2, "n": 4, "k": 3}, {}, {})])
def test_products_over_an_empty_rank(mapping: Mapping | None) -> None:
    c = castile.parse("""
        def f(X: f32[m, k], W: f32[k, n]) -> (Y, R):
            R[m] = sum[k](X[m, k] ** 2) / extent(k)
            Y[m, n] = sum[k](X[m, k] * rsqrt(R[m]) * W[k, n])
    """)
    kernel = castile.compile(c, "cpu", mapping=mapping)
    for k in (5, 0, 3):
        x, w = np.ones((3, k), np.float32), np.ones((k, 2), np.float32)
        y, r = kernel(X=x, W=w)
        assert np.all(y == k)
        assert np.all(r == min(k, 1))
    assert mapping is None or kernel.mapping == mapping
