"""Every example, derived and mapped to tile programs, agrees with the oracle when the programs are interpreted."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from interpreted import interpreted

import castile
from castile.ir.bound import judge
from castile.ir.cascade import Access, Call, Const, Param, Rank
from castile.ir.errors import VerifyError
from castile.ir.extents import resolve
from castile.ir.tile import (
    Dot,
    Fold,
    For,
    GridRank,
    HeldRank,
    Load,
    Map,
    Store,
    Tile,
    TileKernel,
    operations,
    verify_kernel,
)
from castile.ir.types import tensor_types
from castile.passes.derive import Derivation, derive
from castile.passes.tile import tile_program
from castile.passes.tiling import Tiling

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

import example_attention  # noqa: E402, F401
import example_gemm  # noqa: E402, F401
import example_scan  # noqa: E402, F401
import example_softmax  # noqa: E402, F401
from example_case import CASES  # noqa: E402

CASCADES = EXAMPLES.parents[1] / "examples" / "cascades"


def interpret(derivation: Derivation, inputs: dict[str, object], tiling: Tiling) -> dict[str, np.ndarray]:
    """Map a derivation and run its kernels."""
    derived = derivation.cascade
    steps = {s.einsum.name: s.step for s in derivation.streams if s.einsum is not None and s.step}
    extents = resolve(derived, {}, {n: np.shape(x) for n, x in inputs.items()})
    user = {m.name for m in derived.monoids} - {s.monoid.name for s in derivation.streams if s.monoid}
    program = tile_program(derived, tiling, steps=steps, extents=extents, user=user)
    return interpreted(program, inputs, extents)


@pytest.mark.parametrize("gauge", ["maximum", "exponent"])
@pytest.mark.parametrize("shift", [100.0, -200.0])
def test_a_condition_over_scaled_values_keeps_their_scale(shift: float, gauge: str) -> None:
    cascade = castile.load(CASCADES / "top_p.cascade")
    inputs = CASES["top_p"].draw()
    inputs = {**inputs, "X": np.asarray(inputs["X"], "f4") + np.float32(shift)}
    got = interpret(derive(cascade, gauge=gauge), inputs, Tiling(3, 2, 4))
    for judgement in judge(cascade, inputs, got):
        assert judgement.ok, str(judgement)


@pytest.mark.parametrize("gauge", ["maximum", "exponent"])
@pytest.mark.parametrize("name", sorted(CASES))
def test_examples_agree_with_the_oracle(name: str, gauge: str) -> None:
    cascade = castile.load(CASCADES / f"{name}.cascade")
    inputs = CASES[name].draw()
    tiling = Tiling(3, 2, 4) if gauge == "exponent" else Tiling(3, 2, 4, hold=True, align=2)
    got = interpret(derive(cascade, gauge=gauge), inputs, tiling)
    for judgement in judge(cascade, inputs, got):
        assert judgement.ok, str(judgement)


def agrees(text: str, inputs: dict[str, object], tiling: Tiling, level: str = "full") -> None:
    c = castile.parse(text)
    with np.errstate(all="ignore"):
        got = interpret(derive(c, level), inputs, tiling)
    for judgement in judge(c, inputs, got):
        assert judgement.ok, str(judgement)


@pytest.mark.parametrize("level", ["none", "full"])
@pytest.mark.parametrize(
    "body",
    [
        "Y[k] = x[k] * f64(0.1)",
        "Y[k] = x[k] * f64(1.0) * 0.1",
        "Y[k] = f64(0.1)",
        "Y[k] = where(x[k] < f64(0.1), 1.0, 2.0)",
        "Y[k] = where(k > 1, x[k], f64(0.3)) * 0.1",
        "Y[k] = where(k <= k + 1, x[k], z[k]) * 0.1",
        "Y[k] = x[k] * z[k] * x[k] + x[k]",
        "Y[k] = exp(f64(0.1)) * x[k]",
        "Y[k] = (where(k < 2, 1.75, -0.375) * where(k < 2, z[k], -1.5)) ** -1",
        "Y[k] = log1p(f64(k))",
        "Y[k] = exp(maximum(f64(f16(0.0)), 1.0))",
        "Y[k] = log(where(k > 0, z[k] ** 0 * 3.0, 0.1))",
        "Y[k] = where(k > 0, z[k] ** 0, 0.1) / where(k > 1, z[k] ** 0, 3.0)",
        "Y[k] = tanh(where(k > 0, z[k] - z[k], 0.1) + 0.1)",
        "Y[k] = sqrt(where(k > 2, z[k] / z[k], where(k > 0, 0.1, 0.2)))",
        "Y = max[k](where(k > 2, z[k] / z[k], where(k > 0, 0.1, 0.2)))",
        "Y = exp(sum[k](where(k > 2, z[k] / z[k], where(k > 0, 0.1, 0.2))))",
        "Y = exp(minimum(max[k](where(k > 2, z[k] / z[k], 0.1)), 0.7))",
        "Y[k] = sigmoid(f64(z[k] > 0.1))",
        "Y[k] = exp(0.1 * f64(x[k] > 0.1))",
        "Y[k] = log1p(where(x[k] > 0.1, f64(0.3), where(x[k] > z[k], 0.1, 0.7)))",
        "Y[k] = 0.1 / (f64(x[k] > 0.5) + 2)",
        "Y = exp(max[k](where(x[k] > 0.5, f64(0.1), 0.7)))",
        "Y[k] = sigmoid(f64(max[k](x[k]) != 0.5) - 0.3)",
        "Y = sum[k](f64(x[0]) * 0.1)",
        "Y = sum[k](where(z[k] > 0, f64(x[0]) * 0.1, 0.0))",
        "Y = sum[k](where(z[k] > 0, f64(x[0]) * 0.1 + f64(x[1]), z[1]))",
    ],
)
def test_a_number_keeps_the_type_that_a_cast_or_a_statement_gave_it(body: str, level: str) -> None:
    text = f"def f(x: f32[k], z: f64[k], i: i32[k]) -> Y:\n    {body}\n"
    x = np.float32([0.1, 0.7, -0.3, 1 / 3, 2.9])
    inputs: dict[str, object] = {"x": x, "z": x.astype(float) / 3, "i": np.arange(5, dtype=np.int32) * 500_000_000}
    c = castile.parse(text)
    assert tensor_types(derive(c, level).cascade)["Y"] == tensor_types(c)["Y"]
    agrees(text, inputs, Tiling(3, 2, 4), level)


@pytest.mark.parametrize("level", ["none", "full"])
@pytest.mark.parametrize(
    "body",
    [
        "Y[k]: i16 = i16(x[k] * (0.5 * x[k]))",
        "Y[k]: i8 = 3.0 / x[k]",
        "Y[k]: i32 = i32(x[k] * 2.0 + i[k])",
        "Y[k]: i64 = x[k] * i[k] - 3",
        "Y[k]: i16 = where(x[k] > 1.0, 1.5 + i[k], y * 3.0)",
        "Y: i16 = sum[k](x[k] * 2.0)",
        "Y: i64 = sum[k](x[k] * y) / 7.0 - max[k](x[k] * x[0])",
        "Y: i64 = sum[k](x[k] * i[k]) + max[k](i[k])",
        "Y[k] = u8(where(x[k] > 1.0, 300.0, 0.0))",
        "Y[k] = u8(where(x[k] > 1.0, 300, 0))",
        "Y[k] = i8(where(k < 2, 200, where(k < 3, 100, -3)))",
        "Y[k] = u8(where(k < 2, 16384, 0)) * floor(x[k])",
        "Y = i8(sum[k](where(x[k] > 0, 100.0, 50.0)))",
        "Y = i8(sum[k](where(x[k] > 0, 100, 50)))",
    ],
)
def test_a_float_that_becomes_an_integer_is_computed_as_a_float(body: str, level: str) -> None:
    text = f"def f(x: f32[k], y: f32, i: i32[k]) -> Y:\n    {body}\n"
    x = np.float32([1.125, -2.625, 3.375, 0.625, -1.875])
    inputs = {"x": x, "y": np.float32(2.625), "i": np.array([3, -2, 5, 7, -4], np.int32)}
    agrees(text, inputs, Tiling(3, 2, 4), level)


def test_a_select_between_factors_masks_none_of_them() -> None:
    text = "def f(x: f32[k], y: f32) -> Y:\n    Y = prod[k](where(k == 0, x[k], y))\n"
    agrees(text, {"x": np.float32([2, 3, 5]), "y": np.float32(7)}, Tiling(3, 2, 4))


@pytest.mark.parametrize("level", ["defer", "full"])
def test_what_may_be_masked_leaves_no_sum_of_what_conditions_leave_out(level: str) -> None:
    text = """
def f(X: f32[n], T: f32[k]) -> Y:
    S[n] = where(n < 2, X[n], -inf) - 2.0 * X[n]
    Y[n] = sum[k](where(T[k] > 9.0, T[k] * S[n], 0.0))
"""
    agrees(text, {"X": np.arange(4.0), "T": np.arange(3.0)}, Tiling(2, 2, 2), level)


def test_a_read_that_a_loop_guards_stays_in_the_loop() -> None:
    """Where no coordinate of the loop fits the condition, nothing says that what is read is there."""
    text = """
def f(x: f32[m], y: f32[k], w: f32[n]) -> Y:
    Y[n] = w[n] + sum[k](where((n >= 3) & (n - 3 < extent(m)), y[k] * x[n - 3], 0.0))
"""
    rng = np.random.default_rng(0)
    inputs = {name: rng.standard_normal(size) for name, size in (("x", 4), ("y", 5), ("w", 9))}
    for tiling in (Tiling(4, 2, 4), Tiling(1, 1, 2)):
        agrees(text, inputs, tiling, "none")


def test_a_loop_over_the_rank_around_it_ends_with_the_rank() -> None:
    text = """
def f(X: f32[i], T: f32[i], n: i32) -> (A, B):
    A[i] = where(T[i] > 0, sum[i](where(extent(i) <= 4, X[i // 1], 0.0)), 0.0)
    B[i] = where(T[i] > 0, sum[i](where(i <= n, X[i // 1], 0.0)), 0.0)
"""
    agrees(text, {"X": np.arange(3.0), "T": np.ones(3), "n": np.array(100)}, Tiling(2, 2, 2), "none")


@pytest.mark.parametrize("level", ["none", "full"])
def test_rows_that_are_bound_anew_are_others(level: str) -> None:
    text = """
def f(X: f32[n, e], t: i32[e]) -> (L, Y):
    L[n] = sum[e](X[n, e])
    Y[n] = sum[e](X[n, e] * sum[n](where(t[e] == n, exp(L[n]), 0.0)))
"""
    given = {"X": np.arange(36.0).reshape(9, 4) / 32, "t": np.array([3, 0, 8, 1])}
    agrees(text, given, Tiling(16, 2, 2, hold=True, group=True), level)


def test_a_state_over_the_rank_that_it_reduces() -> None:
    text = """
@monoid(identity=(1.0, 0.0))
def affine(a, b, p, q) -> (A, B):
    A = a * p
    B = b * p + q

def f(X: f32[n], Y: f32[n]) -> (A, B):
    (A[n], B[n]) = affine[n](X[n], Y[n])
"""
    agrees(text, {"X": np.array([np.inf, 2.0, 3.0]), "Y": np.ones(3)}, Tiling(2, 2, 2))


def test_attention_is_one_kernel_that_streams_its_keys() -> None:
    derivation = derive(castile.load(CASCADES / "attention_causal.cascade"))
    steps = {s.einsum.name: s.step for s in derivation.streams if s.einsum is not None}
    extents = dict.fromkeys(derivation.cascade.ranks, 64)
    (kernel,) = tile_program(derivation.cascade, Tiling(), steps=steps, extents=extents).kernels
    loops = [op for op in kernel.body if isinstance(op, For)]
    assert [(op.rank, op.phase) for op in loops] == [("k", "full"), ("k", "partial")]
    dots = [op for op in operations(kernel.body) if isinstance(op, Dot)]
    assert [d.annihilates for d in dots] == [False, False, False, True]
    assert {d.operand for d in dots} == {"bf16"}
    assert kernel.outputs == ("O",)


def test_a_contraction_becomes_a_dot() -> None:
    program = tile_program(castile.load(CASCADES / "gemm.cascade"))
    assert sum(isinstance(op, Dot) for k in program.kernels for op in operations(k.body)) == 1


def test_kernels_beside_a_contraction_have_programs_of_few_rows() -> None:
    """A tile of a thousand rows is for what they share of a product; the sums of these rows share nothing."""
    c = castile.load(CASCADES / "rmsnorm_gemm.cascade")
    program = tile_program(c, Tiling(ranks={"m": 1024, "n": 128, "k": 64}), extents=dict.fromkeys(c.ranks, 2048))
    rows = {any(isinstance(op, Dot) for op in operations(k.body)): k.grid[0] for k in program.kernels}
    assert {dot: (g.rank, g.size) for dot, g in rows.items()} == {True: ("m", 1024), False: ("m", 16)}
    shares = castile.parse("""def f(A: f32[m, k], B: f32[k, n], x: f32[m]) -> (C, D, E):
    C[m, n] = sum[k](A[m, k] * B[k, n])
    D[m, n] = max[k](A[m, k] + B[k, n])
    E[m]    = exp(x[m])
""")
    kernels = tile_program(shares, Tiling(ranks={"m": 1024, "n": 128, "k": 64})).kernels
    assert {k.outputs: k.grid[0].size for k in kernels} == {("C",): 1024, ("D",): 1024, ("E",): 1024}
    c = castile.load(CASCADES / "softmax.cascade")
    alone = tile_program(c, Tiling(ranks={c.ranks[0]: 1024}))
    assert {k.grid[0].size for k in alone.kernels} == {1024}


def kernels_of(c: castile.Cascade, /, **extents: int) -> list[TileKernel]:
    """The kernels of a cascade, derived, with inner reductions held."""
    full = derive(c)
    derived = full.cascade
    steps = {s.einsum.name: s.step for s in full.streams if s.einsum is not None and s.step}
    sizes = {r: extents.get(r, 512) for r in c.ranks}
    return list(tile_program(derived, Tiling(hold=True), steps=steps, extents=sizes).kernels)


def test_a_quotient_and_a_condition_leave_a_sum_of_products_a_contraction() -> None:
    """What divides goes with a factor that varies as it does; a condition on what is summed goes with both."""
    text = """def f(A: f32[m, k], B: f32[k, n], w: f32[k], s: f32[m]) -> C:
    C[m, n] = sum[k](where(w[k] == 0.0, 0.0, A[m, k] * B[k, n] / (w[k] * s[m])))
"""
    (kernel,) = kernels_of(castile.parse(text))
    (dot,) = [op for op in operations(kernel.body) if isinstance(op, Dot)]
    assert not dot.annihilates
    made = {op.tile.name: str(op.expr) for op in operations(kernel.body) if isinstance(op, Map)}
    assert all("where" in made[t] for t in (dot.left, dot.right))
    apart = castile.parse(text.replace("s: f32[m]", "s: f32[m, n, k]").replace("s[m]", "s[m, n, k]"))
    assert not any(isinstance(op, Dot) for k in kernels_of(apart) for op in operations(k.body))


@pytest.mark.parametrize("name", ["attention", "attention_causal", "attention_mla", "attention_pair_bias"])
def test_gradients_of_attention_are_contractions(name: str) -> None:
    """What a gradient sums over queries, keys or features has one row left, or is a product of matrices."""
    g = castile.grad(castile.load(CASCADES / f"{name}.cascade"))
    for kernel in kernels_of(g, d=64, f=64, c=64, r=64, b=2, h=4, s=3):
        for op in operations(kernel.body):
            assert not isinstance(op, Fold) or len(op.tile.axes) < 2 or {*op.over} <= {"b", "s"}, str(op)


def test_what_products_make_is_not_held_for_every_sequence() -> None:
    """A sum over b of products that vary with two ranks more is a loop, unless b is small."""
    g = castile.grad(castile.load(CASCADES / "retnet_parallel.cascade"))
    for sequences, held in ((64, False), (4, True)):
        kernels = kernels_of(g, d=64, f=64, b=sequences)
        (kernel,) = [k for k in kernels if "ddecay" in k.outputs]
        assert any(h.of == "b" for h in kernel.held) == held


def test_text_names_every_operation() -> None:
    text = str(tile_program(castile.load(CASCADES / "gemm.cascade"), Tiling(8, 4, 16)).kernels[0])
    assert "grid m:4, n:8" in text
    assert "for k:16" in text
    assert "dot[k](" in text
    assert "store C[m, n]" in text


X = Param("X", "f32", (Rank("m"), Rank("k")))
Y = Param("Y", "f32", (Rank("m"),))
LOADED = Load(Tile("x", ("m", "k"), "f32"), Access("X", (Rank("m"), Rank("k"))))


def kernel(*body: object) -> TileKernel:
    held = (HeldRank("k", 8, "k"),)
    return TileKernel("f", (X, Y), ("Y",), (GridRank("m", 4),), tuple(body), held=held)  # type: ignore[arg-type]


def test_the_verifier_accepts_a_row_sum() -> None:
    verify_kernel(
        kernel(
            LOADED,
            Fold(Tile("s", ("m",), "f32"), "sum", ("k",), Access("x")),
            Store(Access("Y", (Rank("m"),)), ("m",), Access("s")),
        )
    )


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ((Map(Tile("y", ("m",), "f32"), Access("x")),), "before it is made"),
        ((LOADED, Map(Tile("y", ("m",), "f32"), Access("x"))), "does not broadcast"),
        ((LOADED, Fold(Tile("s", ("m", "k"), "f32"), "sum", ("k",), Access("x"))), "reduces a rank that it keeps"),
        ((LOADED, Map(Tile("x", ("m",), "f32"), Const(0.0))), "two shapes"),
        ((Map(Tile("y", ("q",), "f32"), Const(0.0)),), "out of scope"),
        ((Map(Tile("y", ("m",), "f32"), Rank("z")),), "not in scope"),
        ((Store(Access("X", (Rank("m"), Rank("k"))), ("m",), Const(0.0)),), "no element of an output"),
        ((Fold(Tile("s", ("m",), "f32"), "sum", ("k",), Rank("k"), accumulate=True),), "accumulates onto nothing"),
        ((Map(Tile("y", ("m",), "f32"), Call("exp", (Access("X", (Rank("m"), Rank("k"))),))),), "read by `load`"),
    ],
)
def test_the_verifier_refuses(body: tuple[object, ...], said: str) -> None:
    with pytest.raises(VerifyError, match=said):
        verify_kernel(kernel(*body))
