"""The verifier on cascades that no text spells: a pass that makes one is told at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from strategies import cascades

from castile.ir.cascade import (
    MAX_DEPTH,
    Access,
    Call,
    Cascade,
    Cast,
    Const,
    Einsum,
    Expr,
    Extent,
    Monoid,
    Output,
    Param,
    Rank,
    Reduce,
    first_mention,
    free_ranks,
    ranks_named,
    substitute,
    transform,
)
from castile.ir.errors import VerifyError
from castile.ir.parse import parse, parse_expr
from castile.ir.types import tensor_types
from castile.ir.verify import MAX_RANKS, Scan, component_dependence, reduced_ranks, scan_step, verify

X = Access("X", (Rank("m"), Rank("k")))
ROWS = Einsum((Output("Y", ("m",)),), Reduce("sum", ("k",), (X,)))
GOOD = Cascade("f", (Param("X", "f32", (Rank("m"), Rank("k"))), Param("s", "f32")), (ROWS,), ("Y",))
PAIR = Monoid(
    "pair", (Const(0.0), Const(1.0)), ("a", "b", "c", "d"), ("p", "q"), (("p", Access("a")), ("q", Access("d")))
)


def expr(e: Expr) -> Cascade:
    """The cascade with another expression for Y."""
    return replace(GOOD, einsums=(replace(ROWS, expr=e),))


def deep(n: int) -> Expr:
    e: Expr = Access("s")
    for _ in range(n - 1):
        e = Call("exp", (e,))
    return e


def monoid(**change: Any) -> Cascade:
    m = replace(PAIR, **change)
    use = Einsum((Output("A", ("m",)), Output("B", ("m",))), Reduce(m.name, ("k",), (X, X)))
    return replace(GOOD, einsums=(ROWS, use), monoids=(m,))


def test_the_good_ones_are_good() -> None:
    verify(GOOD)
    verify(monoid())
    verify(expr(deep(MAX_DEPTH)))


BAD: dict[str, Callable[[], Cascade]] = {
    "no result": lambda: replace(GOOD, outputs=()),
    "a result twice": lambda: replace(GOOD, outputs=("Y", "Y")),
    "another result": lambda: replace(GOOD, outputs=("Z",)),
    "a parameter as result": lambda: replace(GOOD, outputs=("s",)),
    "no Einsum": lambda: replace(GOOD, einsums=()),
    "unknown numerics": lambda: replace(GOOD, numerics="loose"),
    "no name": lambda: replace(GOOD, name=""),
    "a keyword for a name": lambda: replace(GOOD, name="lambda"),
    "a tensor that no text can name": lambda: replace(GOOD, params=(*GOOD.params, Param("a b", "f32"))),
    "a tensor with a word's name": lambda: replace(GOOD, params=(*GOOD.params, Param("sum", "f32"))),
    "a tensor with a keyword's name": lambda: replace(GOOD, params=(*GOOD.params, Param("if", "f32"))),
    "a tensor that NFKC would rename": lambda: replace(GOOD, params=(*GOOD.params, Param("ﬁ", "f32"))),
    "a parameter called out": lambda: replace(GOOD, params=(*GOOD.params, Param("out", "f32"))),
    "a rank with a word's name": lambda: replace(GOOD, params=(*GOOD.params, Param("T", "f32", (Rank("exp"),)))),
    "a rank with a tensor's name": lambda: replace(GOOD, params=(*GOOD.params, Param("T", "f32", (Rank("s"),)))),
    "an unknown dtype": lambda: replace(GOOD, params=(*GOOD.params, Param("T", "f128"))),
    "a real extent": lambda: replace(GOOD, params=(*GOOD.params, Param("T", "f32", (Const(1.5),)))),
    "a constant extent that is no literal": lambda: replace(
        GOOD, params=(*GOOD.params, Param("T", "f32", (Call("add", (Const(1), Const(2))),)))
    ),
    "a data-dependent extent": lambda: replace(GOOD, params=(*GOOD.params, Param("T", "f32", (Access("s"),)))),
    "too many ranks": lambda: replace(
        GOOD, params=(*GOOD.params, Param("T", "f32", tuple(Rank(f"r{i}") for i in range(MAX_RANKS + 1))))
    ),
    "an unknown operation": lambda: expr(Call("frobnicate", (Access("s"),))),
    "arguments too few": lambda: expr(Call("add", (Access("s"),))),
    "an unknown reduction": lambda: expr(Reduce("mean", ("k",), (X,))),
    "a reduction over nothing": lambda: expr(Reduce("sum", (), (X,))),
    "a reduction twice over one rank": lambda: expr(Reduce("sum", ("k", "k"), (X,))),
    "a reduction of two values": lambda: expr(Reduce("sum", ("k",), (X, X))),
    "a cast to no dtype": lambda: expr(Cast("f31", Access("s"))),
    "a negative literal": lambda: expr(Const(-1)),
    "a negative zero": lambda: expr(Const(-0.0)),
    "a literal that is no number": lambda: expr(Const(float("nan"))),
    "a literal past 2^63": lambda: expr(Const(1 << 63)),
    "a literal of a thousand digits": lambda: expr(Const(10**1000)),
    "a word for a literal": lambda: expr(Const("1")),  # type: ignore[arg-type]
    "a tensor that is not there": lambda: expr(Access("Z")),
    "indices too few": lambda: expr(Access("X", (Rank("m"),))),
    "a loose rank": lambda: expr(X),
    "an index that is no integer": lambda: expr(Access("X", (Rank("m"), Access("s")))),
    "an abyss": lambda: expr(deep(MAX_DEPTH + 1)),
    "a bottomless abyss": lambda: expr(deep(100_000)),
    "an iteration space too large": lambda: expr(
        Reduce("sum", tuple(f"r{i}" for i in range(MAX_RANKS)), (Access("s"),))
    ),
    "a dtype on one of several outputs": lambda: replace(
        monoid(), einsums=(replace(monoid().einsums[1], outputs=(Output("A", ("m",), "f32"), Output("Y", ("m",)))),)
    ),
    "a tensor written twice": lambda: replace(GOOD, einsums=(ROWS, ROWS)),
    "an Einsum that writes nothing": lambda: replace(GOOD, einsums=(ROWS, replace(ROWS, outputs=()))),
    "one tensor twice on the left": lambda: replace(
        monoid(), einsums=(ROWS, replace(monoid().einsums[1], outputs=(Output("A", ("m",)),) * 2))
    ),
    "a rank twice on the left": lambda: replace(GOOD, einsums=(replace(ROWS, outputs=(Output("Y", ("m", "m")),)),)),
    "a monoid with a tensor's name": lambda: monoid(name="s"),
    "a monoid with a rank's name": lambda: monoid(name="m"),
    "a monoid with a word's name": lambda: monoid(name="max"),
    "a monoid twice": lambda: replace(monoid(), monoids=(PAIR, PAIR)),
    "a monoid of nothing": lambda: monoid(identity=(), params=(), results=()),
    "a monoid with parameters too few": lambda: monoid(params=("a", "b", "c")),
    "a monoid with a parameter twice": lambda: monoid(params=("a", "b", "c", "a")),
    "a monoid with an identity that is no literal": lambda: monoid(identity=(Const(0.0), Access("a"))),
    "a monoid with a negative identity": lambda: monoid(identity=(Const(0.0), Const(-1.0))),
    "a monoid that reads what is not there": lambda: monoid(body=(("p", Access("z")), ("q", Access("d")))),
    "a monoid that reads an element": lambda: monoid(body=(("p", Access("a", (Const(0),))), ("q", Access("d")))),
    "a monoid that assigns twice": lambda: monoid(body=(("p", Access("a")), ("p", Access("d")), ("q", Access("d")))),
    "a monoid that assigns a parameter": lambda: monoid(body=(("a", Access("b")), ("p", Access("a")))),
    "a monoid without its result": lambda: monoid(body=(("p", Access("a")),)),
    "a monoid over ranks": lambda: monoid(body=(("p", Rank("k")), ("q", Access("d")))),
    "a monoid that reduces": lambda: monoid(body=(("p", Reduce("sum", ("k",), (Access("a"),))), ("q", Access("d")))),
    "a monoid that asks for an extent": lambda: monoid(body=(("p", Extent("k")), ("q", Access("d")))),
    "a monoid that is too deep": lambda: monoid(
        body=(("p", transform(deep(MAX_DEPTH + 1), _in_a)), ("q", Access("d")))
    ),
    "a state as a value": lambda: replace(monoid(), einsums=(replace(ROWS, expr=Reduce("pair", ("k",), (X, X))),)),
    "values too few for a state": lambda: replace(
        monoid(), einsums=(ROWS, replace(monoid().einsums[1], expr=Reduce("pair", ("k",), (X,))))
    ),
}


def _in_a(e: Expr) -> Expr:
    return Access("a") if isinstance(e, Access) else e


@pytest.mark.parametrize("make", BAD.values(), ids=BAD.keys())
def test_what_no_text_could_say_is_refused(make: Callable[[], Cascade]) -> None:
    with pytest.raises(VerifyError) as caught:
        verify(make())
    assert caught.value.hint
    assert len(str(caught.value)) < 3000


# Types


@pytest.mark.parametrize(
    ("body", "dtype"),
    [
        ("a", "f16"),
        ("a + a", "f32"),
        ("a * d", "f64"),
        ("a + i", "f32"),
        ("i + j", "i64"),
        ("i + u", "i64"),
        ("b + b", "i32"),
        ("b & b", "bool"),
        ("b & i", "i32"),
        ("w & 15", "u32"),
        ("w >> 4", "u32"),
        ("w + 1.0", "f32"),
        ("i / j", "f32"),
        ("exp(i)", "f32"),
        ("exp(d)", "f64"),
        ("abs(c)", "i32"),
        ("floor(a)", "f32"),
        ("c", "i8"),
        ("c + c", "i32"),
        ("i < a", "bool"),
        ("1", "i64"),
        ("1.0", "f32"),
        ("True", "bool"),
        ("1 + 1.0", "f32"),
        ("1.0 * d", "f64"),
        ("where(b, 1, 2)", "i64"),
        ("where(b, 1, a)", "f32"),
        ("where(b, b, b)", "bool"),
        ("a ** 2", "f32"),
        ("c ** 2", "i32"),
        ("sum[k](X[k])", "f32"),
        ("max[k](c + 0 * k)", "i64"),
        ("sum[k](c)", "i32"),
        ("sum[k](b)", "i32"),
        ("sum[k](1)", "i64"),
        ("any[k](k > 1)", "bool"),
        ("argmax[k](X[k])", "i64"),
        ("extent(k)", "i64"),
        ("bf16(d)", "bf16"),
        ("minimum(c, u)", "i64"),
    ],
)
def test_inferred_types(body: str, dtype: str) -> None:
    params = "a: f16, b: bool, c: i8, d: f64, i: i32, j: i64, u: u32, w: u32, X: bf16[k]"
    assert tensor_types(parse(f"def f({params}) -> Y:\n    Y = {body}"))["Y"] == dtype


def test_the_types_of_a_state_grow_until_they_hold() -> None:
    text = """
@monoid(identity=(0, 0, 0))
def chain(a, b, c, x, y, z) -> (A, B, C):
    A = a + x
    B = b + A
    C = c + B / 2

def f(X: f64[k], I: i8[k]) -> (A, B, C):
    (A, B, C) = chain[k]({}, I[k], I[k])
"""
    assert [*tensor_types(parse(text.format("I[k]"))).values()][2:] == ["i32", "i32", "f32"]
    assert [*tensor_types(parse(text.format("X[k]"))).values()][2:] == ["f64", "f64", "f64"]


# Scans


@pytest.mark.parametrize(
    ("statement", "want"),
    [
        ("Y[t, i] = where(t > 0, Y[t - 1, i], 0)", Scan("t", 0, 1)),
        ("Y[t, i] = where(t > 0, Y[t + 1, i], 0)", Scan("t", 0, -1)),
        ("Y[t, i] = where(t > 0, Y[1 + t, i], 0)", Scan("t", 0, -1)),
        ("Y[i, t] = where(t > 2, Y[i, t - 3] + Y[i, t - 1], 0)", Scan("t", 1, 1)),
        ("Y[t, i] = where(t > 0, Y[t - 1, i + 1], 0)", Scan("t", 0, 1)),
        ("Y[t, i] = where(t > 0, Y[t - 1, i - 1] + Y[t, i - 1], 0)", Scan("i", 1, 1)),
        ("Y[t, i] = where(t > 0, sum[j](Y[t - 1, j]), 0)", Scan("t", 0, 1)),
        ("Y[t, i] = X[t, i]", None),
    ],
)
def test_scans(statement: str, want: Scan | None) -> None:
    c = parse(f"def f(X: f32[t, i]) -> Y:\n    {statement}")
    assert scan_step(c.einsums[0]) == want


@pytest.mark.parametrize(
    "statement",
    [
        "Y[t, i] = Y[t, i]",
        "Y[t, i] = Y[t - 0, i]",
        "Y[t, i] = Y[t - 1, i] + Y[t + 1, i]",
        "Y[t, i] = Y[t - 1, i] + Y[t, i - 1]",
        "Y[t, i] = Y[i - 1, t]",
        "Y[t, i] = Y[2 * t - 1, i]",
        "Y[t, i] = Y[t // 2, i]",
        "Y[t, i] = sum[t](Y[t - 1, i])",
        "Y = Y + 1",
    ],
)
def test_what_is_no_scan(statement: str) -> None:
    with pytest.raises(VerifyError) as caught:
        parse(f"def f(X: f32[t, i]) -> Y:\n    {statement}")
    assert caught.value.hint


def test_components_depend_on_each_other() -> None:
    lse = parse(
        "@monoid(identity=(-inf, 0.0, 0.0))\ndef m(a, b, c, x, y, z) -> (A, B, C):\n    A = maximum(a, x)\n"
        "    t = exp(a - A)\n    B = b * t + y\n    C = c + z\n\n"
        "def f(X: f32[k]) -> (P, Q, R):\n    (P, Q, R) = m[k](X[k], 1.0, 1.0)"
    ).monoids[0]
    assert component_dependence(lse) == (frozenset((0,)), frozenset((0, 1)), frozenset((2,)))


# Walking


def test_ranks_of_an_expression() -> None:
    e = parse_expr("sum[k](X[m, k] * sum[m](X[m, j])) + extent(q)", ["X"])
    assert free_ranks(e) == {"m", "j"}
    assert set(ranks_named(e)) == {"k", "m", "j", "q"}
    assert reduced_ranks((e,)) == {"k", "m"}


def test_substitution_respects_inner_ranks() -> None:
    e = parse_expr("X[m, k] + sum[k](X[m, k])", ["X"])
    assert substitute(e, {"k": Const(3), "m": Rank("q")}) == parse_expr("X[q, 3] + sum[k](X[q, k])", ["X"])
    assert substitute(e, {"j": Const(3)}) == e


def test_a_rank_is_found_where_it_is_first_named() -> None:
    c = parse("def f(X: f32[m, k // 2]) -> Y:\n    Y[m] = sum[k](X[m, k // 2])")
    for rank, place in (("m", (1, 14)), ("k", (1, 17))):
        loc = first_mention(c, rank)
        assert loc is not None
        assert (loc.line, loc.column) == place
    assert first_mention(c, "z") is None
    assert first_mention(GOOD, "m") is None


@settings(max_examples=50)
@given(cascades())
def test_transform_without_change_is_the_same_value(c: Cascade) -> None:
    for e in c.einsums:
        assert transform(e.expr, lambda n: n) is e.expr
