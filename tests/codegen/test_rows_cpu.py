"""Rows of products, whichever way they lie and however many: those that are brought near are those that were there."""

from __future__ import annotations

import numpy as np
import pytest
from judged import within_bound

import castile
from castile.codegen.runtime import CpuProgram
from castile.ir.dtypes import numpy_dtype
from castile.ir.extents import resolve
from castile.passes.mapped import default_mapping, mapped

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
