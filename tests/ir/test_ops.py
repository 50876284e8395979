"""The laws of the op table: what a row says of an operation holds for what the row computes."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from castile.ir.cascade import Access, Call, Const
from castile.ir.dtypes import DTYPES
from castile.ir.evaluate import evaluate
from castile.ir.ops import FUNCTIONS, OPS, REDUCTIONS, RESERVED, Op
from castile.ir.parse import parse, parse_expr
from castile.ir.print import print_expr
from castile.ir.verify import verify

INF = np.inf
REALS = np.array([-30.0, -7.5, -2.0, -1.0, -0.625, -1e-3, 0.0, 1e-3, 0.5, 1.0, 1.75, 3.0, 20.0])
FLOATS = [op for op in OPS.values() if op.rule in ("arith", "divide", "real", "same", "power")]


def domain(op: Op) -> np.ndarray:
    """Where a function of one argument is real and its slope finite."""
    return {
        "log": REALS[REALS > 0], "log2": REALS[REALS > 0], "rsqrt": REALS[REALS > 0], "sqrt": REALS[REALS > 0],
        "log1p": REALS[REALS > -1],
    }.get(op.name, REALS)  # fmt: skip


def value(text: str, **inputs: Any) -> np.ndarray:
    """An expression of the language over f64 arrays ``[n]``."""
    params = ", ".join(f"{name}: f64[n]" for name in inputs)
    body = parse_expr(text, inputs)
    indexed = print_expr(_indexed(body))
    return evaluate(parse(f"def f({params}) -> Y:\n    Y[n] = {indexed}"), inputs)["Y"]


def _indexed(e: Any) -> Any:
    from castile.ir.cascade import Rank, transform

    return transform(e, lambda n: Access(n.tensor, (Rank("n"),)) if isinstance(n, Access) else n)


@pytest.mark.parametrize("op", [o for o in OPS.values() if o.derivative], ids=lambda o: o.name)
def test_derivatives_are_slopes(op: Op) -> None:
    assert op.derivative is not None
    assert len(op.derivative) == op.arity
    points = [domain(op)] if op.arity == 1 else [REALS[np.abs(REALS) > 0.01] + 0.013] * op.arity
    if op.name == "where":
        points[0] = np.array([0.0, 1.0])
    if op.name == "pow":
        points[1] = np.array([-2.0, 1.0, 2.0, 3.0])
    grid = [g.ravel() for g in np.meshgrid(*points, indexing="ij")]
    if op.arity == 2 and op.name in ("minimum", "maximum"):
        apart = grid[0] != grid[1]
        grid = [g[apart] for g in grid]
    if op.name in ("floor", "round", "floordiv", "mod", "abs"):
        # Away from the steps.
        grid[0] = grid[0] + 0.137
    with np.errstate(all="ignore"):
        y = op.numpy(*(g != 0 if op.name == "where" and i == 0 else g for i, g in enumerate(grid)))
    for i, text in enumerate(op.derivative):
        if text is None:
            continue
        if op.name == "pow":
            _power_slope(text, grid, y)
            continue
        step = 1e-6 * np.maximum(np.abs(grid[i]), 1)
        ends = []
        for sign in (-1, 1):
            moved = [g + sign * step if j == i else g for j, g in enumerate(grid)]
            ends.append(op.numpy(*(g != 0 if op.name == "where" and j == 0 else g for j, g in enumerate(moved))))
        slope = (ends[1] - ends[0]) / (2 * step)
        names = dict(zip("abc", grid, strict=False))
        given = text.replace("where(a,", "where(a != 0,") if op.name == "where" else text
        got = value(given, **names, y=np.asarray(y, np.float64))
        np.testing.assert_allclose(got, slope, rtol=1e-5, atol=1e-7, err_msg=op.name)


def _power_slope(text: str, grid: list[np.ndarray], y: np.ndarray) -> None:
    """The exponent is a literal, so the derivative is one text for each."""
    for n in (-2, 1, 2, 3):
        at = grid[0][grid[1] == n]
        got = value(text.replace("(b - 1)", f"{n - 1}").replace("b *", f"{n} *"), a=at)
        np.testing.assert_allclose(got, n * at ** (n - 1.0))


@pytest.mark.parametrize("op", OPS.values(), ids=lambda o: o.name)
def test_rows_are_well_formed(op: Op) -> None:
    assert op.arity == len(op.monotone) or not op.monotone
    assert set(op.monotone) <= {"+", "-", ""}
    assert (op.symbol == "") == (op.binds == 0) == (op.name in FUNCTIONS)
    for template in (op.triton, op.cpp):
        assert not template or all(f"{{{name}}}" in template for name in "abc"[: op.arity])
    assert op.cost[0] in ("vector", "special")
    assert op.cost[1] > 0
    assert op.ulps >= 0.5
    assert op.inverse in ("", *OPS)


@pytest.mark.parametrize("op", [o for o in OPS.values() if o.monotone], ids=lambda o: o.name)
def test_monotone_in_the_arguments_that_say_so(op: Op) -> None:
    for i, direction in enumerate(op.monotone):
        if not direction:
            continue
        fixed = [(x,) for x in REALS] if op.arity == 2 else [()]
        for others in fixed:
            xs = np.sort(domain(op)) if op.arity == 1 else REALS
            args = [*others[:i], xs, *others[i:]]
            change = np.diff(op.numpy(*np.broadcast_arrays(*args)))
            assert np.all(change >= 0 if direction == "+" else change <= 0)


@pytest.mark.parametrize("op", [o for o in OPS.values() if o.identity is not None], ids=lambda o: o.name)
def test_identities_are_two_sided(op: Op) -> None:
    xs = np.array([True, False]) if isinstance(op.identity, bool) else np.append(REALS, [INF, -INF])
    np.testing.assert_array_equal(op.numpy(xs, op.identity), xs)
    np.testing.assert_array_equal(op.numpy(op.identity, xs), xs)


@pytest.mark.parametrize("op", [o for o in OPS.values() if o.commutes], ids=lambda o: o.name)
def test_commutes(op: Op) -> None:
    xs = np.array([True, False]) if op.rule == "logic" else np.append(REALS, [INF, -INF])
    a, b = np.meshgrid(xs, xs)
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(op.numpy(a, b), op.numpy(b, a))


def test_every_operation_that_commutes_says_so() -> None:
    a, b = np.meshgrid(REALS, REALS)
    for op in OPS.values():
        if op.arity == 2 and op.rule in ("arith", "divide", "compare"):
            with np.errstate(all="ignore"):
                assert np.array_equal(op.numpy(a, b), op.numpy(b, a), equal_nan=True) == op.commutes, op.name


@pytest.mark.parametrize("op", [o for o in OPS.values() if o.inverse], ids=lambda o: o.name)
def test_inverses_undo(op: Op) -> None:
    undo = OPS[op.inverse]
    xs = REALS[(np.abs(REALS) < 20) & (REALS != 0)]
    with np.errstate(all="ignore"):
        if op.arity == 1:
            xs = xs[np.isfinite(op.numpy(xs)) & (xs > 0)]
            np.testing.assert_allclose(undo.numpy(op.numpy(xs)), xs, rtol=1e-9)
        else:
            a, b = np.meshgrid(xs, xs)
            np.testing.assert_allclose(undo.numpy(op.numpy(a, b), b), a, rtol=1e-12)


@pytest.mark.parametrize("op", [o for o in FLOATS if o.arity == 1], ids=lambda o: o.name)
def test_where_a_mask_passes_through(op: Op) -> None:
    """at_zero and at_neg_inf are f(0) and f(-inf), and every row that could say so does."""
    with np.errstate(all="ignore"):
        for x, said in ((0.0, op.at_zero), (-INF, op.at_neg_inf)):
            y = float(op.numpy(np.array([x]))[0])
            assert said == (y if y in (0, -INF) else None), x


@pytest.mark.parametrize("op", [o for o in FLOATS if o.nonnegative], ids=lambda o: o.name)
def test_never_below_zero(op: Op) -> None:
    assert np.all(op.numpy(domain(op)) >= 0)


def test_every_function_that_is_never_below_zero_says_so() -> None:
    for op in FLOATS:
        if op.arity == 1:
            assert bool(np.all(op.numpy(domain(op)) >= 0)) == (op.nonnegative or op.name in ("log1p",)) or op.name in (
                "log1p",
            ), op.name


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_parse(name: str) -> None:
    op = OPS[name]
    text = f"{name}({', '.join('abc'[: op.arity])})"
    assert parse_expr(text, "abc") == Call(name, tuple(map(Access, "abc"[: op.arity])))


def test_functions_at_their_edges() -> None:
    with np.errstate(all="ignore"):
        sigmoid = OPS["sigmoid"].numpy(np.array([-INF, -1e4, -40.0, 0.0, 40.0, 1e4, INF, np.nan]))
        np.testing.assert_array_equal(sigmoid[[0, 1, 3, 5, 6]], [0, 0, 0.5, 1, 1])
        assert 0 < sigmoid[2] < 1e-17
        assert np.isnan(sigmoid[7])
        erf = OPS["erf"].numpy(np.array([[-INF, INF], [0.0, np.nan]]))
        np.testing.assert_array_equal(erf, [[-1, 1], [0, np.nan]])
        assert OPS["erf"].numpy(np.zeros((0, 3))).shape == (0, 3)
        np.testing.assert_array_equal(OPS["rsqrt"].numpy(np.array([0.0, INF, 4.0])), [INF, 0, 0.5])


@pytest.mark.parametrize("name", REDUCTIONS)
def test_reductions_fold_their_operation(name: str) -> None:
    row = REDUCTIONS[name]
    if not row.combine:
        assert row.identity is None
        return
    op = OPS[row.combine]
    assert row.identity == op.identity
    assert op.commutes
    xs = np.array([True, False, True]) if isinstance(row.identity, bool) else np.array([3.0, -1.5, 2.0])
    folded = row.identity
    for x in xs:
        folded = op.numpy(folded, x)
    assert row.numpy(xs) == folded


def test_reserved_words_are_those_of_the_language() -> None:
    assert frozenset((*DTYPES, *FUNCTIONS, *REDUCTIONS, "inf", "extent", "cascade", "monoid")) == RESERVED
    for a, b in itertools.combinations((DTYPES, FUNCTIONS, REDUCTIONS), 2):
        assert not set(a) & set(b)


def test_every_operation_verifies_and_evaluates() -> None:
    for op in OPS.values():
        kind = "bool" if op.rule == "logic" else "i32" if op.rule == "integer" else "f32"
        names = "abc"[: op.arity]
        args = [Access(n) for n in names]
        text = print_expr(Call(op.name, (*args[:-1], Const(2)) if op.name == "pow" else tuple(args)))
        params = ", ".join(f"{n}: {'bool' if op.name == 'where' and n == 'a' else kind}" for n in names)
        c = parse(f"def f({params}) -> Y:\n    Y = {text}")
        verify(c)
        inputs = {n: np.array(1) if kind == "i32" or "bool" in (kind, params[3:7]) else np.array(0.5) for n in names}
        assert evaluate(c, inputs)["Y"].shape == ()
