"""Generated C++ against the oracle, a number at a time: integers at their edges, functions, every cast."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from hand import Written, built, expr, load, store, written

import castile
from castile.codegen.runtime import CpuProgram
from castile.ir.cascade import Access, Cast
from castile.ir.dtypes import DTYPES, numpy_dtype
from castile.ir.evaluate import evaluate
from castile.ir.ops import OPS
from castile.ir.scalar import convert

A: dict[str, Written] = {}

INTEGERS = {
    "add": "a + b",
    "mul": "a * b",
    "sub": "a - b",
    "floordiv": "a // b",
    "mod": "a % b",
    "by 7": "(a // 7) * 8 + a % 7",
    "by -3": "(a // -3) * 8 + a % -3",
    "and": "(a & 255) | (b & ~15)",
    "left": "a << (b & 31)",
    "right": "a >> (b & 31)",
    "far": "(a << 40) + (a >> 40)",
    "low": "minimum(a, b) + maximum(a, 5)",
    "abs": "abs(a) - abs(-b)",
    "pow": "a ** 3 + b ** 0",
    "less": "where((a < b) & (a != 3), a, 7)",
    "wide": "where(a < 3000000000, 1, 2) + a",
    "ratio": "i64(1000.0 * (f64(a) / f64(b)))",
    "round": "floor(a) + round(b)",
}
for _dtype in ("i32", "i64", "u32"):
    for _name, _text in INTEGERS.items():
        A[f"{_name} {_dtype}"] = written(
            f"A: {_dtype}[n], B: {_dtype}[n]",
            {"C": f"{_dtype}[n]"},
            {"n": 64},
            (
                load("a", "A", "n", _dtype),
                load("b", "B", "n", _dtype),
                store("C", "n", Cast(_dtype, expr(_text, f"a:{_dtype} b:{_dtype}"))),
            ),
        )

REALS = "exp exp2 expm1 log log2 log1p sqrt rsqrt tanh sigmoid erf sin cos".split()
for _name in REALS:
    for _dtype in ("f32", "f64"):
        A[f"{_name} {_dtype}"] = written(
            f"X: {_dtype}[n]",
            {"Y": f"{_dtype}[n]"},
            {"n": 4096},
            (load("x", "X", "n", _dtype), store("Y", "n", expr(f"{_name}(x)", f"x:{_dtype}"))),
        )
FLOATS = {
    "floordiv": "a // b",
    "mod": "a % b",
    "min": "minimum(a, b)",
    "max": "maximum(a, b)",
    "pow": "a ** 3 - b ** -2",
}
FLOATS |= {"round": "round(a) + floor(b)", "where": "where(a < b, 1.5, -0.5) * a", "mixed": "where(n < a, a, f32(n))"}
for _name, _text in FLOATS.items():
    A[f"float {_name}"] = written(
        "A: f32[n], B: f32[n]",
        {"C": "f32[n]"},
        {"n": 128},
        (load("a", "A", "n"), load("b", "B", "n"), store("C", "n", expr(_text, "a b"))),
    )

TYPES = tuple(DTYPES)
for _from in TYPES:
    body = [load("x", "X", "n", _from)]
    body += [store(f"Y_{to}", "n", Cast(to, Access("x"))) for to in TYPES]
    A[f"cast {_from}"] = written(f"X: {_from}[n]", {f"Y_{to}": f"{to}[n]" for to in TYPES}, {"n": 4096}, body)


@pytest.fixture(scope="module")
def run() -> dict[str, CpuProgram]:
    return built(A)


@pytest.mark.parametrize("dtype", ["i32", "i64", "u32"])
@pytest.mark.parametrize("name", INTEGERS)
def test_integers(run: dict[str, CpuProgram], name: str, dtype: str) -> None:
    """Exactly as the oracle: int64 arithmetic wrapped into the type."""
    row = DTYPES[dtype]
    edges = [row.lowest, row.lowest + 1, row.highest, row.highest - 1, 0, 1, 2, 3, 7, 100]
    edges += [-1, -2, -7, -100] if row.kind == "int" else []
    rng = np.random.default_rng(0)
    some = [int(v) for v in rng.integers(row.lowest, row.highest, 20, dtype=np.int64, endpoint=True)]
    pairs = [(a, b) for a in edges + some for b in edges + some]
    if name in ("floordiv", "mod", "ratio"):
        pairs = [(a, b) for a, b in pairs if b != 0]
    a, b = (np.array(v, dtype=row.numpy) for v in zip(*pairs, strict=True))
    body = re.sub(r"\b([ab])\b(?!\()", r"\1[n]", INTEGERS[name])
    c = castile.parse(f"def f(a: {dtype}[n], b: {dtype}[n]) -> C:\n    C[n]: {dtype} = {dtype}({body})\n")
    want = evaluate(c, {"a": a, "b": b})["C"]
    np.testing.assert_array_equal(run[f"{name} {dtype}"](A=a, B=b), want.astype(row.numpy))


def every_half() -> Any:
    """f32 around every 16-bit pattern of its upper half: ties and their neighbours, NaN, infinities, subnormals."""
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    return (
        np.concatenate([upper + low for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)])
        .astype(np.uint32)
        .view(np.float32)
    )


def samples(dtype: str) -> Any:
    """Every value of a type of 16 bits or fewer; of a wider one, what lies around each edge of a narrower."""
    row = DTYPES[dtype]
    if row.kind == "bool":
        return np.array([False, True])
    if row.bits <= 16:
        return np.arange(1 << row.bits, dtype=np.int64).astype(f"u{row.bits // 8}").view(numpy_dtype(dtype))
    if dtype == "f32":
        return every_half()
    if dtype == "f64":
        with np.errstate(invalid="ignore"):
            halves = every_half()[::7].astype(np.float64)
        powers = np.ldexp(1.0, np.arange(-1074, 1024, 3))
        edges = np.array(
            [2.0**31, 2.0**32, 2.0**63, 2.0**31 - 1, 2.0**63 * (1 - 2.0**-53), 127, 128, 255, 256, 32767.5]
        )
        x = np.concatenate([halves, powers, edges, -edges])
        with np.errstate(all="ignore"):
            return np.concatenate([x, np.nextafter(x, np.inf), np.nextafter(x, -np.inf), -x])
    powers = 1 << np.arange(row.bits - 1 if row.kind == "int" else row.bits, dtype=np.uint64)
    x = np.concatenate([powers + d for d in (0, 1)] + [powers - np.uint64(1), powers // 3, powers // 7 * 3])
    x = np.concatenate([x, (powers[:, None] + (powers // np.uint64(257))[None]).ravel()])
    signed = x.astype(np.int64)
    return (
        np.concatenate([signed, -signed]).astype(numpy_dtype(dtype))
        if row.kind == "int"
        else x.astype(numpy_dtype(dtype))
    )


@pytest.mark.parametrize("dtype", TYPES)
def test_casts(run: dict[str, CpuProgram], dtype: str) -> None:
    x = samples(dtype)
    with np.errstate(all="ignore"):
        wide = x.astype(np.float64) if DTYPES[dtype].is_float else x if dtype == "bool" else x.astype(np.int64)
        for to, got in zip(TYPES, run[f"cast {dtype}"](X=x), strict=True):
            want = convert(wide, to)
            if DTYPES[to].is_float:
                want = want.astype(np.float32).astype(np.float64) if to == "f32" else want
                same = (got.astype(np.float64) == want) | (np.isnan(got.astype(np.float64)) & np.isnan(want))
            else:
                same = got.astype(want.dtype) == want
            where = np.flatnonzero(~same)
            assert not len(where), f"{to}({x[where[0]]}) = {got[where[0]]}, not {want[where[0]]}"


@pytest.mark.parametrize("name", REALS)
@pytest.mark.parametrize("dtype", ["f32", "f64"])
def test_functions(run: dict[str, CpuProgram], name: str, dtype: str) -> None:
    with np.errstate(all="ignore"):
        x = np.concatenate([every_half(), np.linspace(-20, 20, 100003, dtype=np.float32)]).astype(numpy_dtype(dtype))
        want = np.asarray(OPS[name].numpy(x.astype(np.float64)), dtype=np.float64)
        got = run[f"{name} {dtype}"](X=x)
        if dtype == "f64":
            np.testing.assert_allclose(got, want, rtol=1e-14, atol=1e-300)
            return
        rounded = want.astype(np.float32)
        finite = np.isfinite(rounded)
        assert np.array_equal(got[~finite], rounded[~finite], equal_nan=True)
        quantum = np.ldexp(1.0, np.maximum(np.frexp(want)[1] - 24, -149))
        off = np.where(finite, np.abs(got - want) / quantum, 0.0)
    worst = int(np.argmax(np.where(np.isnan(off), np.inf, off)))
    assert off[worst] <= max(1, OPS[name].ulps), (
        f"{name}({x[worst]}) = {got[worst]}, not {want[worst]}: {off[worst]} ulp"
    )


@pytest.mark.parametrize("name", FLOATS)
def test_floats(run: dict[str, CpuProgram], name: str) -> None:
    edges = np.array([0, -0.0, 1, -1, 2.5, -2.5, 3.5, 7, -7, 0.1, 1e30, -1e-30, np.inf, -np.inf, np.nan], np.float32)
    a, b = (v.ravel() for v in np.meshgrid(edges, edges))
    got = run[f"float {name}"](A=a, B=b)
    n = np.arange(len(a))
    with np.errstate(all="ignore"):
        wanted = {
            "floordiv": lambda: np.floor_divide(a, b),
            "mod": lambda: np.mod(a, b),
            "min": lambda: np.minimum(a, b),
            "max": lambda: np.maximum(a, b),
            "pow": lambda: a * (a * a) - 1 / (b * b),
            "round": lambda: np.rint(a) + np.floor(b),
            "where": lambda: np.where(a < b, 1.5, -0.5) * a,
            "mixed": lambda: np.where(n < a, a, n),
        }
        want = wanted[name]().astype(np.float32)
    np.testing.assert_allclose(got, want, rtol=1e-6)
