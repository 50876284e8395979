"""Extents and intervals: what a rank's size follows from, and between which values an index lies."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from castile.ir.cascade import Call, Const, Expr, Extent, Rank, negative
from castile.ir.errors import InputError, VerifyError
from castile.ir.extents import LARGEST_EXTENT, bindings, extent_of, resolve, shape_of
from castile.ir.interval import MAX_TRIED, exact_interval, interval, is_affine
from castile.ir.parse import parse, parse_expr

# Intervals


@st.composite
def indices(draw: Any, depth: int = 3) -> Expr:
    """A quasi-affine index over the ranks i, j and k."""
    if depth == 0 or draw(st.integers(0, 3)) == 0:
        leaf = draw(st.integers(0, 5))
        return [Rank("i"), Rank("j"), Rank("k"), Extent("i"), Const(draw(st.integers(0, 9)))][min(leaf, 4)]
    op = draw(st.sampled_from("add sub mul floordiv mod minimum maximum neg abs lshift rshift".split()))
    a = draw(indices(depth=depth - 1))
    if op in ("neg", "abs"):
        return Call(op, (a,))
    if op in ("floordiv", "mod"):
        return Call(op, (a, Const(draw(st.integers(1, 5)))))
    if op in ("lshift", "rshift"):
        return Call(op, (a, Const(draw(st.integers(0, 3)))))
    if op == "mul" and draw(st.booleans()):
        return Call(op, (negative(draw(st.integers(-3, 3))), a))
    return Call(op, (a, draw(indices(depth=depth - 1))))


def value(e: Expr, at: dict[str, int], extents: dict[str, int]) -> int:
    match e:
        case Const(value=v):
            return int(v)
        case Rank(name=name):
            return at[name]
        case Extent(rank=rank):
            return extents[rank]
        case Call(op=op, args=args):
            x = [value(a, at, extents) for a in args]
            return {
                "add": lambda: x[0] + x[1], "sub": lambda: x[0] - x[1], "mul": lambda: x[0] * x[1],
                "floordiv": lambda: x[0] // x[1], "mod": lambda: x[0] % x[1], "minimum": lambda: min(x),
                "maximum": lambda: max(x), "neg": lambda: -x[0], "abs": lambda: abs(x[0]),
                "lshift": lambda: x[0] << x[1], "rshift": lambda: x[0] >> x[1],
            }[op]()  # fmt: skip
    raise AssertionError(e)


BOX = {"i": (0, 4), "j": (1, 3), "k": (-2, 5)}


@given(indices())
def test_intervals_against_enumeration(e: Expr) -> None:
    extents = {"i": 5, "j": 4, "k": 6}
    every = [
        value(e, dict(zip(BOX, at, strict=True)), extents)
        for at in itertools.product(*(range(a, b + 1) for a, b in BOX.values()))
    ]
    wide = interval(e, BOX, extents)
    assert wide is not None
    assert wide[0] <= min(every)
    assert max(every) <= wide[1]
    exact = exact_interval(e, BOX, extents)
    assert exact is not None
    assert wide[0] <= exact[0] <= min(every)
    assert max(every) <= exact[1] <= wide[1]
    assert all(type(x) is int for x in (*wide, *exact))


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("i", (0, 4)),
        ("2 * i + j - 1", (0, 10)),
        ("i // 2", (0, 2)),
        ("i % 2", (0, 1)),
        ("2 * i % 4", (0, 2)),  # its values are 0 and 2
        ("i - i", (0, 0)),
        ("i + 1 - 2 * (i % 2)", (0, 5)),
        ("(i // 2) * 2 + 1 - i % 2", (0, 5)),
        ("abs(i - 2)", (0, 2)),
        ("(i - j) * (i - j)", (0, 9)),
        ("extent(i) - 1 - i", (0, 4)),
        ("i * 4611686018427387904", (0, 4 << 62)),  # past int64, and exact all the same
        ("(i % 3) * 4611686018427387904", (0, 2 << 62)),
    ],
)
def test_exact_intervals(text: str, want: tuple[int, int]) -> None:
    assert exact_interval(parse_expr(text, []), BOX, {"i": 5}) == want


def test_intervals_that_are_not_known() -> None:
    for text in (
        "q",
        "extent(q)",
        "i / 2",
        "exp(i)",
        "j // i",
        "i % k",
        "i << j",
        "where(i > 2, i, 0)",
        "1.5",
        "i // 0",
    ):
        assert interval(parse_expr(text, []), BOX, {}) is None, text
    assert interval(parse_expr("T[i]", ["T"]), BOX, {}) is None


def test_large_boxes_are_enclosed() -> None:
    e = parse_expr("i - i % 2", [])
    assert exact_interval(e, {"i": (0, MAX_TRIED - 1)}, {}) == (0, MAX_TRIED - 2)
    assert exact_interval(e, {"i": (0, MAX_TRIED)}, {}) == (-1, MAX_TRIED)


def test_what_is_affine() -> None:
    assert is_affine(parse_expr("2 * i + extent(j) // 3", []))
    assert not is_affine(parse_expr("i + T[j]", ["T"]))
    assert not is_affine(parse_expr("sum[i](i)", []))


@pytest.mark.parametrize(
    ("index", "want"),
    [("k", 7), ("k // 4", 2), ("k + 2", 9), ("2 * k", 13), ("k % 4", 4), ("6 - k", 7), ("k // 100", 1)],
)
def test_the_extent_of_an_index_is_one_past_its_greatest_value(index: str, want: int) -> None:
    assert extent_of(parse_expr(index, []), {"k": 7}) == want
    assert extent_of(parse_expr(index, []), {"k": 0}) == 0
    assert extent_of(parse_expr(index, []), {}) is None


# Which extent a rank takes


def extents(signature: str, body: str, **shapes: Any) -> dict[str, int]:
    c = parse(f"def f({signature}) -> Y:\n    " + body.replace("; ", "\n    "))
    return resolve(c, {}, {name: np.shape(np.empty(s)) for name, s in shapes.items()})


@pytest.mark.parametrize(
    ("signature", "body", "shapes", "want"),
    [
        ("X: f32[k]", "Y[p] = X[p]", {"X": 7}, {"p": 7}),
        ("x: f32[w], f: f32[r]", "Y[p] = sum[r](x[p + r] * f[r])", {"x": 7, "f": 3}, {"p": 5}),
        ("x: f32[w], f: f32[r]", "Y[p] = sum[r](x[2 * p + r] * f[r])", {"x": 7, "f": 3}, {"p": 3}),
        ("x: f32[w], f: f32[r]", "Y[p] = sum[r](x[2 * p + r] * f[r])", {"x": 8, "f": 3}, {"p": 3}),
        ("x: f32[w], f: f32[r]", "Y[p] = sum[r](x[p + r] * f[r])", {"x": 2, "f": 3}, {"p": 0}),
        ("x: f32[w], f: f32[r]", "Y[p] = sum[r](x[p + 2 * r] * f[r])", {"x": 9, "f": 3}, {"p": 5}),
        ("x: f32[w], f: f32[r]", "Y[p] = sum[r](x[p + r] * f[r])", {"x": 5, "f": 0}, {"p": 5}),
        # All unguarded indices count, and the least of what they allow.
        ("x: f32[w]", "Y[p] = x[p] + x[p + 1]", {"x": 7}, {"p": 6}),
        ("x: f32[w], y: f32[v]", "Y[p] = x[p] + y[p // 2]", {"x": 7, "y": 3}, {"p": 6}),
        # Where a `where` guards them all, the bare ones come first, then the others.
        ("x: f32[w]", "Y[w] = sum[r](where(w + r < extent(w), x[w + r] * K[r], 0))".replace("K", "f"),
         {"x": 7, "f": 3}, {"r": 3}),
        ("x: f32[w]", "Y[p] = where(p > 0, x[p - 1], 0)", {"x": 7}, {"p": 8}),
        # A literal axis.
        ("X: f32[3, k]", "Y[k] = sum[j](X[j, k])", {"X": (3, 2)}, {"j": 3}),
        ("X: f32[64]", "Y[d] = X[d + 1 - 2 * (d % 2)]", {"X": 64}, {"d": 64}),
        ("X: f32[64]", "Y[d] = X[63 - d]", {"X": 64}, {"d": 64}),
        ("X: f32[64]", "Y[d] = X[extent(d) - 1 - d]", {"X": 64}, {"d": 64}),
        ("X: f32[6]", "Y[b, c] = X[2 * b + c] + X[b] + X[c]", {"X": 6}, {}),
        # Through a tensor that the cascade writes.
        ("X: f32[m]", "S[m] = X[m]; Y[p] = S[p + 2]", {"X": 7}, {"p": 5}),
        ("X: f32[m]", "S[a] = X[a + 1]; Y[p] = S[2 * p]", {"X": 8}, {"a": 7, "p": 4}),
        ("X: f32[m]", "S[a] = where(a > 0, X[a - 1], 0); Y = sum[a](S[a])", {"X": 7}, {"a": 8}),
        # A derived axis bounds its rank; a bare one elsewhere binds it and the derived one is checked.
        ("W: f32[k // 8]", "Y[k] = W[k // 8]", {"W": 3}, {"k": 24}),
        ("W: f32[k // 8], X: f32[k]", "Y[k] = W[k // 8]", {"W": 3, "X": 17}, {"k": 17}),
    ],
)  # fmt: skip
def test_extents(signature: str, body: str, shapes: dict[str, Any], want: dict[str, int]) -> None:
    if "f" in shapes and "f:" not in signature:
        signature += ", f: f32[3]"
    found = extents(signature, body, **shapes)
    assert {r: found[r] for r in want} == want


def test_bindings_say_where_an_extent_comes_from() -> None:
    c = parse("def f(x: f32[w], f: f32[r]) -> Y:\n    Y[p] = sum[r](x[p + r] * f[r])")
    found = {b.rank: b for b in bindings(c)}
    assert found["w"].param == ("x", 0)
    assert found["r"].param == ("f", 0)
    assert found["p"].param is None
    assert [(u.tensor, u.axis, u.guarded) for u in found["p"].within] == [("x", 0, False)]
    order = [b.rank for b in bindings(c)]
    assert order.index("p") > order.index("r")


@pytest.mark.parametrize(
    "body",
    [
        "Y[p] = 1.0",
        "Y = extent(p)",
        "Y[p, q] = X[p + q]",
        "S[p] = 1.0; Y = sum[p](S[p])",
        "Y[p] = X[t[0] + p]",
        "Y[p] = where(t[0] > 0, 1, 2) + p",
    ],
)
def test_a_rank_that_nothing_bounds_is_an_error(body: str) -> None:
    with pytest.raises(VerifyError, match="nothing gives rank `p` an extent"):
        extents("X: f32[k], t: i32[2]", body)


def test_a_periodic_index_bounds_nothing() -> None:
    with pytest.raises(InputError, match="no index bounds it"):
        extents("X: f32[k]", "Y[p] = X[p % 2]", X=7)


GEMM = parse("def f(A: f32[m, k], B: f32[k, 8], s: f32) -> C:\n    C[m, n] = s * sum[k](A[m, k] * B[k, n])")


def test_extents_by_name_shapes_or_both() -> None:
    want = {"m": 3, "k": 5, "n": 8}
    assert resolve(GEMM, {"m": 3, "k": 5}) == want
    assert resolve(GEMM, {}, {"A": (3, 5), "B": (5, 8), "s": ()}) == want
    assert resolve(GEMM, {"m": np.int64(3)}, {"B": (5, 8)}) == want
    assert shape_of(GEMM, "B", want) == (5, 8)
    assert shape_of(GEMM, "C", want) == (3, 8)
    assert shape_of(GEMM, "s", want) == ()


@pytest.mark.parametrize(
    ("known", "shapes", "message"),
    [
        ({"m": 3}, {}, "rank `k` has no extent: it is axis 1 of `A`"),
        ({"m": 3, "k": 5, "q": 1}, {}, "the cascade has no rank `q`"),
        ({"m": -1, "k": 5}, {}, "rank `m` cannot have extent -1"),
        ({"m": LARGEST_EXTENT + 1, "k": 5}, {}, "rank `m` cannot have extent"),
        ({"m": 2.5, "k": 5}, {}, "the extent of rank `m` is an integer"),
        ({"m": True, "k": 5}, {}, "the extent of rank `m` is an integer"),
        ({"m": "3", "k": 5}, {}, "the extent of rank `m` is an integer"),
        ({"m": 3}, {"A": (4, 5)}, "rank `m` has two extents: 3 by the extent given, 4 by axis 0 of `A`"),
        ({}, {"A": (3, 5), "B": (6, 8)}, "rank `k` has two extents: 5 by axis 1 of `A`, 6 by axis 0 of `B`"),
        ({}, {"A": (3, 5), "B": (5, 9)}, "axis 1 of `B` has size 9, not 8"),
        ({}, {"A": (3,), "B": (5, 8)}, "`A` has 1 axis, not 2"),
    ],
)
def test_extents_that_do_not_fit(known: dict[str, Any], shapes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        resolve(GEMM, known, shapes)
    assert message in str(caught.value)


def test_the_shape_of_what_is_not_known() -> None:
    with pytest.raises(InputError, match="the shape of `A` is not known"):
        shape_of(GEMM, "A", {"m": 3})
