"""Every example as Triton, under Triton's interpreter, agrees with the oracle."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton")
torch = pytest.importorskip("torch")

from hand import expr, load, store, tile, written  # noqa: E402
from judged import within_bound  # noqa: E402
from test_examples_cpu import CASCADES, NAMES, TILINGS, drawn, fitting  # noqa: E402

import castile  # noqa: E402
from castile.codegen.triton import print_triton  # noqa: E402
from castile.codegen.triton_interpret import InterpretProgram  # noqa: E402
from castile.ir.dtypes import numpy_dtype  # noqa: E402
from castile.ir.errors import InputError  # noqa: E402
from castile.ir.extents import resolve  # noqa: E402
from castile.ir.mapping import Mapping  # noqa: E402
from castile.ir.tile import Fold, For, Map  # noqa: E402
from castile.passes.derive import derive  # noqa: E402
from castile.passes.tile import TileProgram, tile_program  # noqa: E402
from castile.passes.tiling import Tiling  # noqa: E402

# Small tiles that divide nothing; what a GPU would hold on chip is held.
HELD = Tiling(8, 4, 8, hold=True, align=4)
SOME = NAMES[3::9]


def program(c: castile.Cascade, inputs: dict[str, Any], tiling: Tiling, gauge: str) -> TileProgram:
    derivation = derive(c, gauge=gauge)
    steps = {s.einsum.name: s.step for s in derivation.streams if s.einsum is not None and s.step}
    extents = resolve(derivation.cascade, {}, {n: np.shape(x) for n, x in inputs.items()})
    return tile_program(derivation.cascade, tiling, steps=steps, extents=extents)


def check(c: castile.Cascade, inputs: dict[str, Any], tiling: Tiling = HELD, gauge: str = "maximum") -> None:
    run = InterpretProgram.build(program(c, inputs, tiling, gauge), Mapping())
    within_bound(c, inputs, run(**inputs))


@pytest.mark.parametrize("name", SOME)
def test_some_examples(name: str) -> None:
    check(*drawn(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("tiling", "gauge"), [("held", "maximum"), ("odd", "maximum"), ("held", "exponent")])
def test_every_example(name: str, tiling: str, gauge: str) -> None:
    check(*drawn(name), {"held": HELD, **TILINGS}[tiling], gauge)


@pytest.mark.parametrize("q", [0, 1, 7])
@pytest.mark.parametrize("k", [0, 1, 13])
def test_odd_extents(q: int, k: int) -> None:
    c = castile.load(CASCADES / "attention.cascade")
    rng = np.random.default_rng(q + 10 * k)
    shapes = {"Q": (2, 1, q, 5), "K": (2, 1, k, 5), "V": (2, 1, k, 3)}
    inputs = {p.name: rng.standard_normal(shapes.get(p.name, ())) for p in c.params}
    check(c, fitting(c, inputs))


def test_all_masked_rows_and_infinite_values() -> None:
    text = """
def f(S: f32[q, k], V: f32[k, f], n: i32[q]) -> O:
    X[q, k] = where(k < n[q], S[q, k], -inf)
    M[q] = max[k](X[q, k])
    P[q, k] = exp(X[q, k] - M[q])
    L[q] = sum[k](P[q, k])
    O[q, f] = sum[k](P[q, k] / L[q] * V[k, f])
"""
    c = castile.parse(text)
    rng = np.random.default_rng(0)
    v = rng.standard_normal((9, 4))
    v[5], v[6], v[7, 1] = np.inf, -np.inf, np.nan
    n = np.array([0, 3, 5, 6, 7, 9])
    check(c, fitting(c, {"S": rng.standard_normal((6, 9)), "V": v, "n": n}))


def test_nan_wins_in_extremes_and_argmax() -> None:
    c = castile.parse(
        "def f(X: f32[n, k]) -> (A, B, C):\n    A[n] = argmax[k](X[n, k])\n    B[n] = max[k](X[n, k])\n"
        "    C[n] = min[k](X[n, k])\n"
    )
    x = np.array([[1, 2, 2, 0, 1], [1, np.nan, 3, np.nan, 4], [-np.inf] * 5, [np.inf, 1, np.inf, 2, 3]], "f4")
    check(c, {"X": x}, Tiling(2, 2, 2))


def test_a_guard_of_two_conditions_holds_within_the_tile_alone() -> None:
    text = """
def f(T: i32[i], X: f32[i]) -> O:
    O[i] = where((T[i] == -1) | (T[i] == 0), X[extent(i) - 1 - i], 0.0)
"""
    # Beyond the last i no T is loaded, which gives 0, and X is read below its first.
    check(castile.parse(text), {"T": np.array([0, 3, -1, 2, 0], "i4"), "X": np.arange(5, dtype="f4")}, Tiling(8, 8, 8))


def test_an_integer_literal_wraps() -> None:
    text = """
def f(T: u8[i]) -> (A, B):
    A[i]: u8 = -1
    B[i] = T[i] + where(T[i] > 2, u8(-2), T[i])
"""
    check(castile.parse(text), {"T": np.arange(5, dtype="u1")})


def test_coordinates_are_rounded() -> None:
    text = """
def f(T: f32[i]) -> (A, B, C):
    A[i] = bf16(extent(i)) + T[i]
    B[i] = f8e4m3(i + 20) + T[i]
    C[i] = f16(i) + T[i]
"""
    check(castile.parse(text), {"T": np.arange(5, dtype="f4")})


@pytest.mark.parametrize(
    "dtype", ["f64", "f32", "f16", "bf16", "f8e4m3", "f8e5m2", "i64", "i32", "i16", "i8", "u8", "u32"]
)
def test_every_dtype_goes_in_and_out(dtype: str) -> None:
    c = castile.parse(
        f"def f(X: {dtype}[n, k], s: {dtype}) -> (Y, Z):\n    Y[n]: {dtype} = max[k](X[n, k])\n"
        f"    Z[n, k]: {dtype} = {dtype}(f32(X[n, k]) * 1.5) + s\n"
    )
    rng = np.random.default_rng(1)
    x = rng.integers(0, 9, (3, 5)) if dtype[0] in "iu" else rng.standard_normal((3, 5)) * 100
    check(c, fitting(c, {"X": x, "s": np.asarray(2)}))


@pytest.mark.parametrize("dtype", ["i8", "u8", "i32", "u32", "i64", "bool", "bf16", "f16", "f8e4m3", "f8e5m2"])
def test_casts_round_saturate_and_wrap(dtype: str) -> None:
    c = castile.parse(f"def f(X: f32[n]) -> Y:\n    Y[n]: f32 = f32({dtype}(X[n]))\n")
    ends = [0, -0.0, 0.5, 1.5, 2.5, -0.5, 127.5, -128.5, 255.9, 1e10, -1e10, 3e38, np.inf, -np.inf, np.nan]
    small = [2.0**-n for n in range(1, 30)] + [464.0, 464.1, 448, 57344, 61440, 61441, 65519, 65520, 1e-6, 5e-8]
    near = [1 + 2.0**-n for n in range(1, 12)] + [3 + 2.0**-n for n in range(1, 12)]
    check(c, {"X": np.array(ends + small + near, "f4")})


def test_integers_divide_downwards_and_shift() -> None:
    c = castile.parse(
        "def f(X: i32[n], Y: i32[n]) -> (A, B, C, D):\n    A[n] = X[n] // Y[n]\n    B[n] = X[n] % Y[n]\n"
        "    C[n] = X[n] << 3\n    D[n] = X[n] >> (Y[n] & 7)\n"
    )
    x = np.array([7, -7, 7, -7, 0, 2**31 - 1, -(2**31)], "i4")
    check(c, {"X": x, "Y": np.array([2, 2, -2, -2, 5, 3, 7], "i4")})


def test_functions_are_as_exact_as_promised() -> None:
    names = "exp exp2 expm1 log log2 log1p sqrt rsqrt tanh sigmoid erf sin cos floor round abs".split()
    x = np.concatenate([np.linspace(0.001, 9, 41), 10.0 ** np.arange(-6, 2), [80.0]]).astype("f4")
    for name in names:
        c = castile.parse(f"def f(X: f32[n]) -> Y:\n    Y[n] = {name}(X[n])\n")
        check(c, {"X": x})
        if name not in ("log", "log2", "log1p", "sqrt", "rsqrt"):
            check(c, {"X": -x})


@pytest.mark.parametrize("text", ["5.5 // u32(2)", "5.5 % u32(2)", "5.5 // i8(2)", "u32(7) // 2.5", "5 // u32(2)"])
def test_quotients_of_constants(text: str) -> None:
    c = castile.parse(f"def f(X: f32[n]) -> Y:\n    Y[n] = X[n] + ({text})\n")
    check(c, {"X": np.linspace(-2, 3, 5, dtype="f4")})


def test_strides_views_and_outputs_in_place() -> None:
    c = castile.load(CASCADES / "softmax.cascade")
    x = np.random.default_rng(0).standard_normal((6, 10)).astype("f4")
    run = InterpretProgram.build(program(c, {"X": x}, HELD, "maximum"), Mapping())
    want = run(X=x)
    assert np.array_equal(run(X=np.asfortranarray(x)), want)
    assert np.array_equal(run(X=x[::-1])[::-1], want)
    assert torch.equal(run(X=torch.from_numpy(x).t().contiguous().t()), torch.from_numpy(want))
    wide = np.full((6, 20), 7, "f4")
    assert run(X=x, out=wide[:, ::2]) is not None
    assert np.array_equal(wide[:, ::2], want)
    assert (wide[:, 1::2] == 7).all()
    with pytest.raises(InputError, match="overlaps"):
        run(X=x, out=x)
    with pytest.raises(InputError, match="missing"):
        run()


def test_data_that_index_outside_are_refused() -> None:
    c = castile.parse("def f(X: f32[n], i: i32[m]) -> Y:\n    Y[m] = X[i[m]]\n")
    x, i = np.arange(5, dtype="f4"), np.array([0, 4, 2], "i4")
    run = InterpretProgram.build(program(c, {"X": x, "i": i}, HELD, "maximum"), Mapping())
    assert run(X=x, i=i).tolist() == [0, 4, 2]
    for bad in (5, -1):
        with pytest.raises(InputError, match="outside `X`"):
            run(X=x, i=np.array([0, bad, 2], "i4"))


def test_a_backward_loop_with_tiles() -> None:
    loop = For(
        "k",
        3,
        (load("x", "X", "n k"), Fold(tile("l", "n"), "sum", ("k",), expr("x + l * 0.0 + k * 0", "x l"), True)),
        reverse=True,
    )
    w = written(
        "X: f32[n, k]", {"Y": "f32[n]"}, {"n": 2}, [Map(tile("l", "n"), expr("0.0")), loop, store("Y", "n", "l")]
    )
    x = np.arange(14, dtype="f4").reshape(2, 7)
    run = InterpretProgram.build(w, Mapping())
    assert run(X=x).tolist() == x.sum(1).tolist()


def test_names_that_python_and_triton_take() -> None:
    text = "def lambda_(tl: f32[pid, INF], exp_: f32) -> out_:\n    out_[pid] = sum[INF](tl[pid, INF] * exp_)\n"
    c = castile.parse(text)
    check(c, {"tl": np.ones((3, 4), "f4"), "exp_": np.float32(2)})


def test_text_is_the_same_each_time() -> None:
    c, inputs = drawn("attention_causal")
    texts = {print_triton(program(c, inputs, HELD, "maximum"), Mapping(), "cuda:90") for _ in range(3)}
    assert len(texts) == 1


def test_the_child_dies_with_its_parent(tmp_path: Path) -> None:
    text = f"""
import os, numpy as np, castile, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import triton, torch
k = castile.compile(castile.parse("def f(X: f32[n]) -> Y:\\n    Y[n] = X[n] + 1.0\\n"), target="interpret")
print(k(X=np.zeros(3, "f4")).tolist())
from castile.codegen.triton_process import process
print(process("triton_child.py", True, os.getpid()).pid, flush=True)
os._exit(0)
"""
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True, timeout=120)
    result, pid = done.stdout.split("\n")[:2]
    assert result == "[1.0, 1.0, 1.0]"
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split()[2]:
            return
        import time

        time.sleep(0.1)
    raise AssertionError("the child outlived its parent")


def test_a_sum_of_what_does_not_vary_counts_active_coordinates_alone() -> None:
    c = castile.parse("def f(X: f32[n], Z: f32[n, j]) -> Y:\n    Y[n] = sum[j](X[n]) + sum[j](Z[n, j])\n")
    x, z = np.asarray([1.0, 2.0], "f4"), np.ones((2, 7), "f4")
    mapping = Mapping("none", tiles={"n": 1, "j": 3})
    got = castile.compile(c, "interpret", {"n": 2, "j": 7}, mapping)(X=x, Z=z)
    assert got.tolist() == [14.0, 21.0]


EDGES = {
    "a power of 0 of infinities": ("X: f32[n]", "Y[n] = X[n] ** 0", {"X": np.array([np.inf, np.nan, -2], "f4")}),
    "an extent as truth": (
        "X: bool[n]", "Y[n]: i32 = where(X[n] & bool(extent(n)), 1, 0)", {"X": np.array([True, False])},
    ),
    "a rounded shift": ("X: i32[n]", "Y[n] = X[n] - floor(n << 9) - round(n | 4)", {"X": np.arange(4, dtype="i4")}),
    "an unsigned quotient": (
        "X: u32[n]", "Y[n]: u32 = X[n] // 3 + X[n] % 5", {"X": np.array([7, 2**32 - 1], "u4")},
    ),
    "unsigned and below 0": ("X: u32[n]", "Y[n]: u32 = where(n < 1, 2 - 8, X[n])", {"X": np.array([7, 9], "u4")}),
    "a cast literal alone": ("X: f32[n]", "Y[n] = i64(-2)", {"X": np.zeros(3, "f4")}),
    "a literal that a type does not hold": ("X: u32[n]", "Y[n] = u32(f8e4m3(9 << 22)) + X[n]", {"X": np.ones(3, "u4")}),
    "a literal that a type rounds": ("X: f32[n]", "Y[n] = f8e5m2(0.3) * X[n] + i8(300.7)", {"X": np.ones(3, "f4")}),
    "an infinity on the left": (
        "X: f32[n], v: f32", "Y[n] = where(-inf < v * n, inf * X[n], 2.0)", {"X": np.ones(3, "f4"), "v": np.float32(2)},
    ),
    "a cast to its own type": ("X: i64[n]", "Y[n] = i64(X[n] << 3) + n", {"X": np.arange(3)}),
    "terms that all sums leave out": (
        "A: bf16[m, n], B: bf16[n, p], w: f32[n]",
        "Y[m, p] = sum[n](where(w[n] == 0.0, 0.0, A[m, n] * B[n, p] / w[n]))",
        {
            "A": np.where(np.arange(24) % 3 == 1, np.inf, np.ones((17, 24))).astype(numpy_dtype("bf16")),
            "B": np.where(np.arange(24)[:, None] % 3 == 1, np.nan, np.full((24, 18), 2.0)).astype(numpy_dtype("bf16")),
            "w": (np.arange(24) % 3 != 1).astype("f4") * 4,
        },
    ),
    "a sum over nothing, held": (
        "A: f32[m, n], B: f32[n, p]", "Y[m, p] = 1.0 + sum[n](A[m, n] * B[n, p])",
        {"A": np.zeros((3, 0), "f4"), "B": np.zeros((0, 5), "f4")},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EDGES)
def test_edges(name: str) -> None:
    params, text, inputs = EDGES[name]
    check(castile.parse(f"def f({params}) -> Y:\n    {text}\n"), inputs)


def test_no_rank_at_all() -> None:
    c = castile.parse("def f(x: f32, n: i64) -> (A, B):\n    A = 2.0 * x\n    B = 9223372036854775807 - n\n")
    assert castile.compile(c, "interpret")(x=1.5, n=7) == (3, 2**63 - 8)


def test_literals_that_are_compared() -> None:
    k = expr("where((0 < 1) & (x > 2.0), 1.0, 0.0)", "x")
    w = written("X: f32[n]", {"Y": "f32[n]"}, {"n": 4}, [load("x", "X", "n"), store("Y", "n", k)])
    assert InterpretProgram.build(w, Mapping())(X=np.arange(5, dtype="f4")).tolist() == [0, 0, 0, 1, 1]


def test_an_output_without_the_empty_rank() -> None:
    c = castile.parse("""
        @monoid(identity=(-inf, 0.0))
        def lse(m, l, n, s) -> (M, L):
            M = maximum(m, n)
            L = l * exp(m - M) + s * exp(n - M)

        def f(X: f32[k], Y: f32[n]) -> (A, B):
            (A, B[n]) = lse[k](X[k], X[k] * Y[n])
    """)
    x = np.array([1, 3, 2], "f4")
    for tiling in (HELD, *TILINGS.values()):
        a, b = InterpretProgram.build(program(c, {"X": x, "Y": x[:0]}, tiling, "maximum"), Mapping())(X=x, Y=x[:0])
        assert a == 3
        assert b.shape == (0,)
