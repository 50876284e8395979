"""Kernels under their default mappings at sizes that leave remainders everywhere: strips, vectors, panels, masks, rows.

One library for this machine's CPU and one for AVX2: the sample of compiled code that every run of the tests takes.
"""

from __future__ import annotations

import ctypes
import platform
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from judged import within_bound

import castile
from castile.codegen import build, compiler, runtime
from castile.codegen.cpp import INCLUDE, print_cpp
from castile.codegen.runtime import CpuProgram
from castile.ir.dtypes import numpy_dtype
from castile.ir.extents import resolve, shape_of
from castile.passes.defaults import default_mapping
from castile.passes.mapped import Mapped, mapped

CASCADES = Path(__file__).resolve().parents[2] / "examples" / "cascades"

# Extents by example: none a multiple of a vector but where it must be, some rows masked out.
SIZES = {
    "attention_causal": {"b": 1, "h": 2, "q": 203, "k": 131, "d": 20, "f": 24},
    "attention_document": {"b": 1, "h": 1, "q": 71, "k": 71, "d": 16, "f": 16},
    "attention_window": {"b": 1, "h": 1, "q": 197, "k": 197, "d": 16, "f": 17},
    "gemm": {"m": 29, "n": 131, "k": 65},
    "softmax": {"n": 9, "k": 77},
    "layernorm": {"n": 9, "k": 33},
    "rmsnorm_gemm": {"m": 21, "n": 70, "k": 35},
}
NAMES = sorted(SIZES)
WIDE = "f32"


def cascade(name: str, dtype: str) -> castile.Cascade:
    return castile.parse((CASCADES / f"{name}.cascade").read_text(encoding="utf-8").replace("bf16", dtype))


def program(name: str, dtype: str) -> Mapped:
    c = cascade(name, dtype)
    extents = resolve(c, SIZES[name])
    return mapped(c, default_mapping(c, "cpu", extents), extents)


@cache
def library(variant: str) -> dict[tuple[str, str], CpuProgram]:
    """All cases in one library, compiled for a variant of the CPU."""
    cases = [(n, d) for n in NAMES for d in ("bf16", WIDE) if d == WIDE or cascade(n, "bf16") != cascade(n, WIDE)]
    before = compiler.VARIANTS
    try:
        if variant != "native":
            compiler.VARIANTS = ((f"-march={variant}", "-fopenmp"), (f"-march={variant}", "-fopenmp-simd", "-pthread"))
        return dict(zip(cases, CpuProgram.build_all([program(n, d).program for n, d in cases]), strict=True))
    finally:
        compiler.VARIANTS = before


def inputs(c: castile.Cascade, sizes: dict[str, int]) -> dict[str, object]:
    rng = np.random.default_rng(7)
    given: dict[str, object] = {}
    for p in c.params:
        shape = shape_of(c, p.name, resolve(c, sizes))
        if p.dtype == "i32":
            given[p.name] = np.asarray(61, np.int32)[()] if not shape else rng.integers(0, 3, shape, dtype=np.int32)
        else:
            drawn = np.asarray(rng.standard_normal(shape)).astype(numpy_dtype(p.dtype))
            given[p.name] = drawn if shape else np.abs(drawn)[()]
    return given


def check(name: str, dtype: str, variant: str) -> None:
    run = library(variant)[name, dtype]
    c = cascade(name, dtype)
    given = inputs(c, SIZES[name])
    within_bound(c, given, run(**given))


@pytest.mark.parametrize("dtype", ["bf16", WIDE])
@pytest.mark.parametrize("name", NAMES)
def test_default_mappings_on_this_cpu(name: str, dtype: str) -> None:
    if (name, dtype) not in library("native"):
        pytest.skip("has no 16-bit form")
    check(name, dtype, "native")


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="AVX2 is of x86-64")
@pytest.mark.parametrize("name", NAMES)
def test_default_mappings_on_avx2(name: str) -> None:
    check(name, WIDE, "haswell")


def test_a_cached_row_is_one_kernel_without_loops() -> None:
    (kernel,) = program("softmax", WIDE).kernels
    assert "for " not in "\n".join(line for line in str(kernel).split("\n") if "//" not in line)
    text = print_cpp([kernel], "softmax")
    assert "fold_vectors<Max>" in text
    assert "fold_vectors<Sum>" in text


def test_a_choice_that_a_row_decides_is_made_before_its_loop() -> None:
    """And ids of documents are compared in lanes."""
    text = print_cpp(program("attention_document", "bf16").kernels, "attention")
    assert "if (M_10_one == (-inf)) {" in text
    assert "load(&doc_k_11_some[k])" in text
    # Only the integers that bound the loop are folded one by one.
    assert text.count("fold<") == text.count("fold<Min, int") + text.count("fold<Max, int") == 4


def test_rows_apart_are_fetched_ahead_and_tiles_of_one_row_are_not() -> None:
    (row,) = program("softmax", WIDE).kernels
    assert "prefetch(" in print_cpp([row], "softmax")
    assert "prefetch(" not in print_cpp(program("attention_causal", WIDE).kernels, "attention")


def test_attention_runs_by_strips_with_packed_operands() -> None:
    text = print_cpp(program("attention_causal", "bf16").kernels, "attention")
    assert "dot_packed<bf16, bf16>(" in text
    assert "in_panels<bf16, bf16>(" in text
    # A row's masks are looked at in the vectors at their ends.
    assert "lanes_below(" in text
    assert "whole_vectors(0, " in text


LSE = """
@monoid(identity=(-inf, 0.0))
def lse(m, l, n, s) -> (M, L):
    M = maximum(m, n)
    L = l * exp(m - M) + s * exp(n - M)

def f(X: f32[q, k]) -> (A, B):
    (A[q], B[q]) = lse[k](where(k >= q, X[q, k], -inf), 1.0)
"""


def test_a_users_monoid_skips_what_is_masked() -> None:
    """Also before anything else has come in, and where nothing does."""
    c = castile.parse(LSE)
    x = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
    run = castile.compile(c, "cpu")
    within_bound(c, {"X": x}, run(X=x))


@pytest.mark.parametrize("numerics", ["standard", "strict"])
@pytest.mark.parametrize("value", ["exp(c * X[k] - 1.5)", "exp(X[k] - 1.5)", "exp2(X[k])"])
def test_exponentials_of_any_size(value: str, numerics: str) -> None:
    """What is exponentiated after it was rounded takes fewer steps, unless strict; ends are the same."""
    c = castile.parse(f"@cascade(numerics={numerics!r})\ndef f(X: f32[k], c: f32) -> Y:\n    Y[k] = {value}\n")
    size = np.concatenate([np.geomspace(1e-40, 200, 3000), np.linspace(80, 160, 3000), [0, 1e9, 1e38, np.inf]])
    x = np.concatenate([size, -size, [np.nan]]).astype(np.float32)
    (run,) = CpuProgram.build_all([mapped(c, default_mapping(c, "cpu", {"k": x.size}), {"k": x.size}).program])
    rough = "c *" in value and numerics == "standard"
    assert ("exp_rough(" in run.source) == rough
    got = run(X=x, c=np.float32(1))
    within_bound(c, {"X": x, "c": np.float32(1)}, got)
    with np.errstate(over="ignore"):
        exact = np.exp2(x.astype(float)) if "exp2" in value else np.exp((x - np.float32(1.5)).astype(float))
        want = exact.astype(np.float32)
    np.testing.assert_allclose(got, want, 2e-5 if rough else 1e-6, 3e-45)


FLUSHED = (
    INCLUDE
    + """
namespace castile {
extern "C" void flushed(const float* x, float* y, int64_t n) {
  const Underflow<Subnormals::FLUSHED> underflow;
  for (int64_t i = 0; i < n; i += LANES) store(y + i, exp_flushed(load(x + i)));
}
}  // namespace castile
"""
)


@pytest.mark.parametrize("flags", ["", "-march=haswell", "-march=x86-64"])
def test_exponentials_beside_products(flags: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They end where those of data do, at 0 and infinity, but for subnormal results; each NaN stays one."""
    if flags and platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("flags of x86-64")
    monkeypatch.setenv("CASTILE_CXXFLAGS", flags)
    size = np.concatenate([np.geomspace(1e-40, 200, 3000), np.linspace(80, 160, 3001), [0, 88.7228, 1e9, 1e38, np.inf]])
    nans = np.array([0x7FC00000, 0xFFC00001, 0x7FFFFFFF, 0x7F800001], np.uint32).view(np.float32)
    x = np.concatenate([np.concatenate([size, -size]).astype(np.float32), nans])
    x = np.pad(x, (0, -x.size % 64))
    y = np.empty_like(x)
    at = [ctypes.c_void_p(a.ctypes.data) for a in (x, y)]
    build.load(FLUSHED).flushed(*at, ctypes.c_int64(x.size))
    with np.errstate(over="ignore", under="ignore"):
        want = np.exp(x.astype(float)).astype(np.float32)
    np.testing.assert_allclose(y, want, 2e-5, 2.0**-126)
    assert np.all(y[x < -88] == 0)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("numerics", ["standard", "strict"])
def test_subnormal_results_become_zeros(numerics: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where exponentials meet products, unless strict; never in the caller's thread, nor in other kernels."""
    monkeypatch.setattr(runtime, "thread_count", lambda: threads)
    values = {
        "A": np.full((300, 64), -90, np.float32),
        "B": np.full((64, 70), 1e-3, np.float32),
    }
    made = {}
    for value in ("exp(A[m, k])", "A[m, k]"):
        c = castile.parse(
            f"@cascade(numerics={numerics!r})\n"
            "def f(A: f32[m, k], B: f32[k, n]) -> Y:\n"
            f"    E[m, k] = {value}\n"
            "    Y[m, n] = sum[k](E[m, k] * B[k, n])\n"
        )
        given = values if "exp" in value else values | {"B": np.full((64, 70), 1e-42, np.float32)}
        made[value] = castile.compile(c, "cpu")(**given)
        within_bound(c, given, made[value])
        assert np.all(values["A"] * np.float32(1e-42) < 0)
    assert np.all(made["A[m, k]"] < 0)
    if numerics == "strict":
        assert np.all(made["exp(A[m, k])"] > 0)
    elif platform.machine() in ("x86_64", "AMD64"):
        assert not made["exp(A[m, k])"].any()
