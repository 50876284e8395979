"""Generated C++ against NumPy: every operation of tile programs, written by hand; names and comments of the text."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hand import Written, access, built, expr, load, store, tile, written

from castile.codegen.cpp import print_cpp
from castile.codegen.names import comment, safe
from castile.codegen.runtime import CpuProgram
from castile.ir.cascade import Access, Call, Const, Rank
from castile.ir.dtypes import DTYPES, numpy_dtype
from castile.ir.errors import InputError, VerifyError
from castile.ir.tile import Dot, Fold, For, Load, Map, Store

INF = Call("neg", (Const(float("inf")),))
A: dict[str, Written] = {}


def gemm(
    left: str, right: str, dtype: str = "f32", total: str = "f32", operand: str | None = None, **more: bool
) -> Written:
    """C[m, n] over tiles of A and B in the given orders of axes."""
    body = (
        Map(tile("c", "m n", total), Const(0) if DTYPES[total].is_integer else Const(0.0)),
        For(
            "k",
            32,
            (
                load("a", "A", left, dtype),
                load("b", "B", right, dtype),
                Dot(tile("c", "m n", total), "a", "b", ("k",), True, operand, **more),
            ),
        ),
        store("C", "m n", "c"),
    )
    axes = ", ".join
    signature = f"A: {dtype}[{axes(left.split())}], B: {dtype}[{axes(right.split())}]"
    return written(signature, {"C": f"{total}[m, n]"}, {"m": 13, "n": 80}, body)


for _left in ("m k", "k m"):
    for _right in ("k n", "n k"):
        A[f"gemm {_left} {_right}"] = gemm(_left, _right)
A["gemm bf16"] = gemm("m k", "k n", "bf16")
A["gemm rounded"] = gemm("m k", "n k", operand="bf16")
A["gemm f64"] = gemm("m k", "k n", "f64", "f64")
A["gemm i8"] = gemm("m k", "n k", "i8", "i32")
A["gemm annihilates f32"] = gemm("m k", "k n", annihilates=True)
for _right, _dtype in (("k n", "bf16"), ("n k", "f16"), ("k n", "f8e5m2"), ("k n", "f8e4m3")):
    A[f"gemm annihilates {_dtype}"] = gemm("m k", _right, _dtype, annihilates=True)

A["batched"] = written(
    "A: f32[m, b, k, j], B: f32[b, j, k, n]",
    {"C": "f32[m, b, n]"},
    {"b": 3, "m": 5},
    (
        load("a", "A", "m b k j"),
        load("b_", "B", "b j k n"),
        Dot(tile("c", "m b n"), "a", "b_", ("j", "k")),
        store("C", "m b n", "c"),
    ),
    {"k": 7, "j": 2, "n": 21},
)

A["softmax"] = written(
    "X: f32[q, k]",
    {"Y": "f32[q, k]"},
    {"q": 3},
    (
        load("x", "X", "q k"),
        Fold(tile("m", "q"), "max", ("k",), Access("x")),
        Fold(tile("s", "q"), "sum", ("k",), expr("exp(x - m)", "x m")),
        store("Y", "q k", expr("exp(x - m) / s", "x m s")),
    ),
    {"k": 83},
)

A["online"] = written(
    "X: f32[q, k]",
    {"M": "f32[q]", "L": "f32[q]"},
    {"q": 4},
    (
        Map(tile("m", "q"), INF),
        Map(tile("s", "q"), Const(0.0)),
        For(
            "k",
            70,
            (
                load("x", "X", "q k"),
                Fold(tile("n", "q"), "max", ("k",), Access("x")),
                Map(tile("n", "q"), expr("maximum(m, n)", "m n")),
                Map(tile("s", "q"), expr("s * exp(m - n)", "s m n")),
                Fold(tile("s", "q"), "sum", ("k",), expr("exp(x - n)", "x n"), True),
                Map(tile("m", "q"), Access("n")),
            ),
        ),
        store("M", "q", "m"),
        store("L", "q", "s"),
    ),
)

for _reverse in (False, True):
    A[f"scan {_reverse}"] = written(
        "X: f64[q, t]",
        {"Y": "f64[q, t]"},
        {"q": 3},
        (
            Map(tile("s", "q", "f64"), Const(0.0)),
            For(
                "t",
                1,
                (
                    Load(tile("x", "q", "f64"), access("X", "q t")),
                    Map(tile("s", "q", "f64"), expr("0.5 * s + x", "s:f64 x:f64")),
                    Store(access("Y", "q t"), ("q",), Access("s")),
                ),
                reverse=_reverse,
            ),
        ),
    )

# Bounds that follow the grid's point, and tiles that do not divide them.
for _reverse in (False, True):
    A[f"bounds {_reverse}"] = written(
        "X: i32[q, k]",
        {"S": "i64[q]"},
        {"q": 1},
        (
            Map(tile("s", "", "i64"), Const(0)),
            For(
                "k",
                4,
                (
                    Load(tile("x", "k", "i32"), access("X", "q k")),
                    Fold(tile("s", "", "i64"), "sum", ("k",), expr("x * k", "x:i32"), True),
                ),
                lower=expr("q - 3"),
                upper=expr("2 * q + 2"),
                reverse=_reverse,
            ),
            Store(access("S", "q"), (), Access("s")),
        ),
    )

A["gather"] = written(
    "T: f32[v, d], I: i64[n]",
    {"Y": "f32[n, d]"},
    {"n": 4},
    (
        load("i", "I", "n", "i64"),
        Load(tile("x", "n d"), Access("T", (Access("i"), Rank("d")))),
        store("Y", "n d", "x"),
    ),
    {"d": 5},
)

# A shifted read that is guarded where it leaves the tensor.
A["guarded"] = written(
    "X: f32[n]",
    {"Y": "f32[n]"},
    {"n": 7},
    (
        Load(tile("x", "n"), Access("X", (expr("n - 2"),)), expr("n >= 2"), -1.5),
        store("Y", "n", "x"),
    ),
)

A["folds"] = written(
    "X: f32[q, k], I: i32[q, k]",
    {"P": "f32[q]", "U": "f32[k]", "V": "f32", "G": "i64[q]", "N": "i32[k]", "H": "bool[q]", "E": "bool[k]"},
    {},
    (
        load("x", "X", "q k"),
        load("i", "I", "q k", "i32"),
        Fold(tile("p", "q"), "prod", ("k",), Access("x")),
        Fold(tile("u", "k"), "max", ("q",), Access("x")),
        Fold(tile("v"), "sum", ("q", "k"), Access("x")),
        Fold(tile("g", "q", "i64"), "argmax", ("k",), Access("x")),
        Fold(tile("n", "k", "i32"), "min", ("q",), Access("i")),
        Fold(tile("h", "q", "bool"), "any", ("k",), expr("(x > 1.0) & (i < 3)", "x i:i32")),
        Fold(tile("e", "k", "bool"), "all", ("q",), expr("x > -2.0", "x")),
        store("P", "q", "p"),
        store("U", "k", "u"),
        store("V", "", "v"),
        store("G", "q", "g"),
        store("N", "k", "n"),
        store("H", "q", "h"),
        store("E", "k", "e"),
    ),
    {"q": 5, "k": 150},
)

A["hostile"] = written(
    "int: f32[double, α], _q: f32[α], args: f32",
    {"SIZE_MAX": "f32[double, α]"},
    {"double": 2, "α": 3},
    (
        load("fold", "int", "double α"),
        load("X_0", "_q", "α"),
        store("SIZE_MAX", "double α", Call("add", (Call("mul", (Access("fold"), Access("args"))), Access("X_0")))),
    ),
)


@pytest.fixture(scope="module")
def run() -> dict[str, CpuProgram]:
    return built(A)


def normal(rng: np.random.Generator, *shape: int, dtype: str = "f32") -> Any:
    if DTYPES[dtype].is_float:
        return rng.standard_normal(shape).astype(numpy_dtype(dtype))
    return rng.integers(-50, 50, shape).astype(numpy_dtype(dtype))


@pytest.mark.parametrize("name", [n for n in A if n.startswith("gemm")])
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [
        (1, 1, 1),
        (13, 80, 32),
        (29, 97, 45),
        (14, 131, 65),
        (5, 70, 83),
        (8, 130, 65),
        (16, 97, 515),
        (0, 3, 4),
        (3, 4, 0),
        (2, 0, 1),
    ],
)
def test_gemm(run: dict[str, CpuProgram], name: str, m: int, n: int, k: int) -> None:
    program = run[name]
    dtype = program.params[0].dtype
    rng = np.random.default_rng(m * n * k)
    sizes = {"m": m, "n": n, "k": k}
    a, b = (normal(rng, *(sizes[i.name] for i in p.indices), dtype=dtype) for p in program.params)  # type: ignore[union-attr]
    left, right = ["".join(i.name for i in p.indices) for p in program.params]  # type: ignore[union-attr]
    exact = np.einsum(f"{left},{right}->mn", a.astype(np.float64), b.astype(np.float64))
    bound = np.einsum(f"{left},{right}->mn", np.abs(a.astype(np.float64)), np.abs(b.astype(np.float64)))
    got = program(A=a, B=b)
    unit = {"gemm f64": 2.0**-50, "gemm i8": 0.0, "gemm rounded": 2.0**-8}.get(name, 2.0**-20)
    assert got.dtype == numpy_dtype(program.outputs[0].dtype)
    assert got.shape == (m, n)
    assert np.all(np.abs(got - exact) <= unit * bound)


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16", "f8e5m2", "f8e4m3"])
def test_a_zero_of_the_left_annihilates(run: dict[str, CpuProgram], dtype: str) -> None:
    rng = np.random.default_rng(0)
    a, b = normal(rng, 13, 40, dtype=dtype), normal(rng, 40, 80, dtype=dtype)
    a[:, 3] = 0.0
    b[3, 77] = -np.inf  # the only one: it must be seen wherever it stands
    program = run[f"gemm annihilates {dtype}"]
    across = program.params[1].indices[0] == Rank("n")
    assert np.isfinite(program(A=a, B=b.T if across else b)).all()
    b[3] = np.inf
    b[7, 5] = np.nan
    got = program(A=a, B=b.T if across else b)
    b[3] = 0.0
    with np.errstate(all="ignore"):
        np.testing.assert_allclose(got, a.astype("f4") @ b.astype("f4"), rtol=1e-4, atol=1e-5)
    assert np.isnan(got[:, 5]).all()


def test_batched(run: dict[str, CpuProgram]) -> None:
    rng = np.random.default_rng(0)
    a, b = normal(rng, 11, 4, 7, 2), normal(rng, 4, 2, 7, 21)
    np.testing.assert_allclose(run["batched"](A=a, B=b), np.einsum("mbkj,bjkn->mbn", a, b), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [0, 1, 8])
def test_softmax(run: dict[str, CpuProgram], rows: int) -> None:
    x = normal(np.random.default_rng(0), rows, 83) * 30
    if rows > 2:
        x[0, 5], x[1, 3], x[2] = np.nan, -np.inf, 1e38
    got = run["softmax"](X=x)
    with np.errstate(all="ignore"):
        e = np.exp(x.astype(float) - x.max(1, keepdims=True))
        np.testing.assert_allclose(got, e / e.sum(1, keepdims=True), rtol=1e-5, atol=1e-37)


@pytest.mark.parametrize("k", [0, 1, 69, 70, 281])
def test_online(run: dict[str, CpuProgram], k: int) -> None:
    x = normal(np.random.default_rng(k), 6, k) * 20
    m, s = run["online"](X=x)
    np.testing.assert_array_equal(m, x.max(1, initial=-np.inf))
    if k:
        np.testing.assert_allclose(s, np.exp(x.astype(float) - m[:, None]).sum(1), rtol=1e-5)


@pytest.mark.parametrize("reverse", [False, True])
def test_scan(run: dict[str, CpuProgram], reverse: bool) -> None:
    x = np.random.default_rng(0).standard_normal((5, 9))
    want, state = np.empty_like(x), np.zeros(5)
    for t in range(8, -1, -1) if reverse else range(9):
        state = 0.5 * state + x[:, t]
        want[:, t] = state
    np.testing.assert_allclose(run[f"scan {reverse}"](X=x), want, rtol=1e-12)


@pytest.mark.parametrize("reverse", [False, True])
def test_bounds(run: dict[str, CpuProgram], reverse: bool) -> None:
    x = np.arange(9 * 12, dtype=np.int32).reshape(9, 12)
    ranges = [range(max(0, q - 3), min(12, 2 * q + 2)) for q in range(9)]
    want = [sum(int(x[q, k]) * k for k in r) for q, r in enumerate(ranges)]
    np.testing.assert_array_equal(run[f"bounds {reverse}"](X=x), want)


def test_gather(run: dict[str, CpuProgram]) -> None:
    t = normal(np.random.default_rng(0), 6, 5)
    i = np.array([5, 0, 3, 3, 1])
    np.testing.assert_array_equal(run["gather"](T=t, I=i), t[i])
    for bad in (6, -1, 1 << 40):
        i[3] = bad
        with pytest.raises(InputError, match="outside `T`"):
            run["gather"](T=t, I=i)
    with pytest.raises(InputError, match="outside `T`"):
        run["gather"](T=t[:0], I=i)


def test_guarded(run: dict[str, CpuProgram]) -> None:
    x = np.arange(10, dtype=np.float32)
    np.testing.assert_array_equal(run["guarded"](X=x), [-1.5, -1.5, *range(8)])


def test_folds(run: dict[str, CpuProgram]) -> None:
    rng = np.random.default_rng(0)
    x, i = normal(rng, 5, 150), rng.integers(-9, 9, (5, 150), dtype=np.int32)
    x[1, 100], x[2, 140], x[2, 149], x[3, 7], x[3, 90] = 9, np.nan, np.nan, 8, 8
    with np.errstate(all="ignore"):
        p, u, v, g, n, h, e = run["folds"](X=x, I=i)
        np.testing.assert_allclose(p, x.astype(float).prod(1).astype(np.float32), rtol=1e-4, atol=1e-40)
        np.testing.assert_array_equal(u, x.max(0))
        np.testing.assert_array_equal(g, x.argmax(1))
        np.testing.assert_array_equal(n, i.min(0))
        np.testing.assert_array_equal(h, ((x > 1) & (i < 3)).any(1))
        np.testing.assert_array_equal(e, (x > -2).all(0))
        assert np.isnan(v)
        x[2] = 1
        np.testing.assert_allclose(run["folds"](X=x, I=i)[2], x.sum(dtype=float), rtol=1e-5)


def test_hostile_names(run: dict[str, CpuProgram]) -> None:
    rng = np.random.default_rng(0)
    x, q = normal(rng, 5, 7), normal(rng, 7)
    np.testing.assert_allclose(run["hostile"](int=x, _q=q, args=2.0), x * 2 + q, rtol=1e-6)


@pytest.mark.parametrize(
    "name", ["int", "linux", "NULL", "EOF", "α", "_x", "__x", "a__b", "1", "tiles", "exp", "M_PI", ""]
)
def test_safe_names(name: str) -> None:
    text = safe(name)
    assert text.isidentifier()
    assert text.isascii()
    assert "__" not in text
    assert text[0] != "_"
    assert text != name


@pytest.mark.parametrize("text", ["a\\", "a\nint main()", "a\r", "??/", "\u2028x", "\u202ex", "a\\\n"])
def test_a_comment_stays_on_its_line(text: str) -> None:
    line = comment(text)
    assert len(line.splitlines()) == 1
    assert not line.endswith(("\\", "??/"))
    assert line.isprintable()


def test_the_text_is_deterministic() -> None:
    kernels = [k for w in A.values() for k in w.kernels]
    assert print_cpp(kernels, "all") == print_cpp(kernels, "all")


def test_what_cannot_be_printed_is_refused() -> None:
    odd = written(
        "X: f32[n]", {"Y": "f32[n]"}, {"n": 4}, (load("x", "X", "n"), Fold(tile("s"), "median", ("n",), Access("x")))
    )
    with pytest.raises(VerifyError, match="no reduction"):
        print_cpp(odd.kernels, "odd")
