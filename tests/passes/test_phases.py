"""Streamed loops visit what a bracket lets through, each coordinate once, and only full ones go without the mask."""

from __future__ import annotations

import numpy as np
import pytest

import castile
from castile.ir.cascade import Call, Cascade, Expr, Rank, Reduce, walk
from castile.ir.interpret import Span, _Run
from castile.ir.tile import TileKernel
from castile.passes.phases import ALL, bracket, conjuncts, phases, tile_end, without

EXTENT = 29
TEXTS = (
    "q >= k",
    "k > q",
    "(q >= k) & (q - k < w)",
    "(q >= k) & ((k < s) | (q - k < w))",
    "(s > k) | (q >= k)",
    "(q - k < w) & (k - q < w)",
    "k >= 2 * q",
    "(q >= k) & ((q - k) % 3 == 0)",
    "(q >= k) & (k < 0)",
)
BOX = TileKernel("f", castile.parse("def f(w: i32, s: i32) -> Y:\n    Y = w + s\n").params, (), (), ())


def condition(text: str) -> Expr:
    """A predicate over q and k, with scalars w and s."""
    c = castile.parse(f"def f(X: f32[q, k], w: i32, s: i32) -> Y:\n    Y[q, k] = where({text}, X[q, k], 0.0)\n")
    e = c.einsums[0].expr
    assert isinstance(e, Call)
    return e.args[0]


def values(e: Expr, at: dict[str, int], q: Span, k: Span) -> np.ndarray:
    """An expression over spans of coordinates, with scalars by name."""
    arrays = {n: np.asarray(x) for n, x in at.items()}
    run = _Run(BOX, arrays, {"q": EXTENT, "k": EXTENT}, {"q": q, "k": k})
    return np.broadcast_to(run.expr(e, ("q", "k")), (q.stop - q.start, k.stop - k.start))


@pytest.mark.parametrize("align", [1, 4])
@pytest.mark.parametrize("size", [1, 7, 16])
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize(("w", "s"), [(5, 3), (1, 0), (100, 100), (0, 7)])
def test_loops_cover_what_is_let_through_once(text: str, size: int, align: int, w: int, s: int) -> None:
    p = condition(text)
    found = phases(frozenset(conjuncts(p)), "k", {"w", "s"}, lambda r, last: tile_end(r, size, last), align)
    scalars = {"w": w, "s": s}
    for first in range(0, EXTENT, size):
        here = Span(first, first + 1)
        visits, full = np.zeros(EXTENT, int), np.zeros(EXTENT, bool)
        for phase in found:
            low, high = (
                default if e is None else int(values(e, scalars, here, here)[0, 0])
                for e, default in ((phase.lower, 0), (phase.upper, EXTENT))
            )
            coordinates = slice(max(0, low), max(0, low, min(EXTENT, high)))
            visits[coordinates] += 1
            full[coordinates] |= phase.name == "full"
        holds = values(p, scalars, Span(first, min(first + size, EXTENT)), Span(0, EXTENT))
        assert visits.max(initial=0) <= 1
        assert not (holds & (visits == 0)).any()
        assert not (~holds & full).any()


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize(("w", "s"), [(5, 3), (1, 0), (100, 100), (0, 7)])
def test_nothing_comes_through_outside_a_rows_own_bounds(text: str, w: int, s: int) -> None:
    p = condition(text)
    found = phases(
        frozenset(conjuncts(p)), "k", {"w", "s"}, lambda r, last: tile_end(r, 7, last), 4, lambda r, _: Rank(r)
    )
    scalars = {"w": w, "s": s}
    for phase in found:
        assert phase.name == "partial" or phase.own == (None, None)
        for q in range(EXTENT):
            here, first = Span(q, q + 1), Span(q - q % 7, q - q % 7 + 1)
            ends = zip((phase.lower, phase.upper), (0, EXTENT), strict=True)
            low, high = (d if e is None else int(values(e, scalars, first, here)[0, 0]) for e, d in ends)
            own = zip(phase.own, (0, EXTENT), strict=True)
            least, beyond = (d if e is None else int(values(e, scalars, here, here)[0, 0]) for e, d in own)
            lets = values(p, scalars, here, Span(0, EXTENT))[0]
            assert not any(lets[k] and not least <= k < beyond for k in range(max(0, low), min(EXTENT, high)))


def test_causal_tiles_are_full_below_the_diagonal() -> None:
    (full, partial) = phases([condition("q >= k")], "k", (), lambda r, last: tile_end(r, 64, last), 16)
    assert (full.name, full.lower) == ("full", None)
    assert partial.name == "partial"
    assert full.upper == partial.lower


def test_no_bracket_is_one_loop() -> None:
    assert phases((), "k", (), lambda r, last: tile_end(r, 64, last), 16) == (ALL,)


def cascade(text: str) -> Cascade:
    return castile.parse(f"def f(X: f32[q, k], V: f32[k]) -> Y:\n    Y[q] = {text}\n")


def test_brackets_are_found_around_factors_and_extremes() -> None:
    e = cascade("sum[k](where(q >= k, X[q, k], 0.0) * V[k])").einsums[0].reductions[0]
    assert len(bracket("sum", e.arg)) == 1
    e = cascade("max[k](where(q >= k, X[q, k], -inf))").einsums[0].reductions[0]
    assert len(bracket("max", e.arg)) == 1
    e = cascade("max[k](where(q >= k, X[q, k], 0.0))").einsums[0].reductions[0]
    assert not bracket("max", e.arg)


def test_a_known_condition_goes_but_not_inside_a_reduction_of_its_own() -> None:
    e = cascade("sum[k](where(q >= k, X[q, k], 0.0) * sum[k](where(q >= k, X[q, k], 0.0)))").einsums[0].expr
    assert isinstance(e, Reduce)
    left = without(e.arg, frozenset(conjuncts(condition("q >= k"))), e.ranks)
    assert sum(isinstance(n, Call) and n.op == "where" for n in walk(left)) == 1
