"""Partial results: any pieces of a rank, merged in any association, give what the whole gives."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
from corpus import NAMES, derived, example, inputs

import castile
from castile.ir.bound import judge
from castile.ir.cascade import Call, Cascade, Cast, Const, Rank, walk
from castile.ir.dtypes import rounds
from castile.ir.errors import CastileError, InputError, UsageError, VerifyError
from castile.ir.extents import resolve
from castile.ir.print import print_einsum
from castile.ir.verify import verify
from castile.passes.partial import Partial, merge, partial

Arrays = dict[str, Any]

# Why an example may have no partial results over a rank that one derived pass is enough for.
REASONS = (
    "runs along rank",
    "is no axis that could be cut",
    "does not tell the extent",
    "under rank",
    "beyond the piece",
    "is a scan along rank",
    "only where a condition holds",
    "a second pass over rank",
)


@cache
def attempt(name: str, rank: str) -> Partial | CastileError:
    try:
        return partial(example(name), rank)
    except CastileError as error:
        return error


def once() -> list[tuple[str, str]]:
    """Every example with each rank that it reduces in one derived pass."""
    return [(n, r) for n in NAMES for r, passes in derived(n).passes.items() if passes == 1]


SPLIT = [(n, r) for n, r in once() if isinstance(attempt(n, r), Partial)]


def extent_of(c: Cascade, given: Arrays, rank: str) -> int:
    return resolve(c, {}, {p.name: np.shape(given[p.name]) for p in c.params})[rank]


def piece(p: Partial, c: Cascade, given: Arrays, low: int, high: int) -> Arrays:
    """The inputs of the piece ``low`` to ``high`` (excluded) of the rank."""
    mine: Arrays = {}
    for q in p.cascade.params:
        if q.name == p.start:
            mine[q.name] = low
            continue
        if q.name == p.extent:
            mine[q.name] = extent_of(c, given, p.rank)
            continue
        array = np.asarray(given[q.name])
        for axis, index in enumerate(q.indices):
            if index == Rank(p.rank):
                array = np.take(array, range(low, high), axis)
            elif isinstance(index, Call) and index.args[0] == Rank(p.rank):
                assert isinstance(index.args[1], Const)
                by = int(index.args[1].value)
                array = np.take(array, range(low // by, -(-high // by) if high > low else low // by), axis)
        mine[q.name] = array
    return mine


def cuts(rng: random.Random, size: int, align: int) -> list[tuple[int, int]]:
    """Pieces in order, some empty and some of size 1, each beginning at a multiple of ``align``."""
    places = [rng.randrange(0, size + align, align) for _ in range(rng.randrange(5))]
    if align == 1 and size > 1:
        at = rng.randrange(size)
        places += [at, at, at + 1]
    ends = [0, *sorted(min(p, size) for p in places), size]
    starts = [-(-e // align) * align for e in ends[:-1]]
    return [(min(a, b), b) for a, b in zip(starts, ends[1:], strict=True)]


def states_of(p: Partial, c: Cascade, given: Arrays, pieces: Sequence[tuple[int, int]]) -> list[Arrays]:
    return [castile.evaluate(p.cascade, piece(p, c, given, a, b)) for a, b in pieces]


def others(cascade: Cascade, given: Arrays, stacked: Mapping[str, Any]) -> Arrays:
    return {q.name: stacked[q.name] if q.name in stacked else given[q.name] for q in cascade.params}


def results(p: Partial, c: Cascade, given: Arrays, states: list[Arrays]) -> Arrays:
    return castile.evaluate(merge(p), others(merge(p), given, p.stack(states)))


def associated(p: Partial, states: list[Arrays], rng: random.Random) -> list[Arrays]:
    """The states merged by random groups of neighbours, until few are left."""
    while len(states) > 2:
        a = rng.randrange(len(states) - 1)
        b = rng.randrange(a + 1, min(len(states), a + 3)) + 1
        states = [*states[:a], castile.evaluate(p.combine, p.stack(states[a:b])), *states[b:]]
    return states


def check(c: Cascade, given: Arrays, got: Arrays) -> None:
    assert tuple(got) == c.outputs
    for verdict in judge(c, given, got):
        assert verdict.ok, verdict
    rounded = any(o.dtype is not None and rounds(o.dtype) for e in c.einsums for o in e.outputs)
    if not rounded and not any(isinstance(n, Cast) and rounds(n.dtype) for e in c.einsums for n in walk(e.expr)):
        for name, want in castile.evaluate(c, given).items():
            np.testing.assert_allclose(got[name], want, rtol=1e-9, atol=1e-11, err_msg=name)


@pytest.mark.parametrize(("name", "rank"), SPLIT)
def test_pieces_merge_to_the_whole(name: str, rank: str) -> None:
    c, given, p = example(name), inputs(name), attempt(name, rank)
    assert isinstance(p, Partial)
    rng = random.Random(name + rank)
    pieces = cuts(rng, extent_of(c, given, rank), p.align)
    states = states_of(p, c, given, pieces)
    check(c, given, results(p, c, given, states))
    check(c, given, results(p, c, given, associated(p, states, rng)))


@pytest.mark.parametrize(("name", "rank"), SPLIT)
def test_every_cascade_verifies_and_prints(name: str, rank: str) -> None:
    p = attempt(name, rank)
    assert isinstance(p, Partial)
    for made in (p.cascade, p.combine, p.merged):
        verify(made)
        assert castile.parse(str(made)) == made
    assert p.cascade.outputs == p.combine.outputs == p.states
    assert p.merged.outputs == example(name).outputs
    assert all(q.indices[0] == Rank(p.piece) for q in p.combine.params)
    assert p.rank not in p.merged.ranks


def test_every_refusal_says_why() -> None:
    assert len(SPLIT) >= 120
    for name, rank in once():
        error = attempt(name, rank)
        if isinstance(error, Partial):
            continue
        assert isinstance(error, VerifyError), (name, rank)
        assert error.rank == rank
        assert error.hint
        assert any(reason in error.message for reason in REASONS), error


def test_the_states_of_attention_read_like_attention() -> None:
    c = example("attention_causal")
    p = castile.partial(c, "k")
    stream, last = castile.merge(p).einsums
    assert print_einsum(stream) == (
        "(M[b, h, q], L[b, h, q], O_sum[b, h, q, f]) = "
        "stream1[piece](M_pieces[piece, b, h, q], L_pieces[piece, b, h, q], O_sum_pieces[piece, b, h, q, f])"
    )
    assert last == derived("attention_causal").cascade.einsums[-1]
    assert p.start == "k_start"
    assert "q >= k + k_start" in str(p.cascade)


CAUSAL = """
def causal(Q: f32[q, d], K: f32[k, d], V: f32[k, f], first: i64) -> O:
    S[q, k] = where(q + first >= k, sum[d](Q[q, d] * K[k, d]), -inf)
    M[q] = max[k](S[q, k])
    P[q, k] = exp(S[q, k] - M[q])
    L[q] = sum[k](P[q, k])
    O[q, f] = sum[k](P[q, k] / L[q] * V[k, f])
"""


def causal_inputs(queries: int, keys: int, first: int) -> Arrays:
    rng = np.random.default_rng(queries * keys)
    return {
        "Q": rng.normal(size=(queries, 5)),
        "K": rng.normal(size=(keys, 5)),
        "V": rng.normal(size=(keys, 3)),
        "first": first,
    }


def test_split_keys_of_decoding() -> None:
    """Flash-decoding: one query, its keys in pieces over programs; the last pieces are empty."""
    c = castile.parse(CAUSAL)
    given = causal_inputs(1, 37, 36)
    p = partial(c, "k")
    for size in (1, 8, 16, 64):
        pieces = [(a, min(a + size, 37)) for a in range(0, 37, size)] + [(37, 37)] * 2
        check(c, given, results(p, c, given, states_of(p, c, given, pieces)))


def test_pieces_that_no_query_sees_leave_nothing() -> None:
    c = castile.parse(CAUSAL)
    given = causal_inputs(4, 32, 0)
    p = partial(c, "k")
    (state,) = states_of(p, c, given, [(16, 32)])
    assert np.all(state["M"] == -np.inf)
    assert np.all(state["L"] == 0)
    check(c, given, results(p, c, given, states_of(p, c, given, [(0, 3), (3, 16), (16, 32)])))
    # Masked all over, the result is 0, however it is cut.
    hidden = {**given, "first": -40}
    got = results(p, c, hidden, states_of(p, c, hidden, [(0, 3), (3, 32)]))
    assert np.all(got["O"] == 0)
    check(c, hidden, got)


def test_a_prefix_is_shared() -> None:
    """The state of a prefix for all queries is computed once and merged with the state of each one's own keys."""
    c = castile.parse(CAUSAL)
    p = partial(c, "k")
    prefix = causal_inputs(3, 20, 20)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        own = {"K": rng.normal(size=(3, 5)), "V": rng.normal(size=(3, 3))}
        whole = {**prefix, **{n: np.concatenate([prefix[n], own[n]]) for n in own}}
        shared = castile.evaluate(p.cascade, {**prefix, p.start: 0})
        mine = castile.evaluate(p.cascade, {**prefix, **own, p.start: 20})
        check(c, whole, castile.evaluate(merge(p), p.stack([shared, mine])))


def test_machines_merge_in_any_order() -> None:
    """Derived states and ties of argmax do not mind in which order pieces come."""
    c = castile.parse(
        "def best(X: f32[n, k]) -> (I, Y):\n    I[n] = argmax[k](X[n, k])\n    Y[n] = sum[k](exp(X[n, k]))\n"
    )
    p = partial(c, "k")
    rng = random.Random(3)
    for _ in range(20):
        x = np.array([[rng.choice([0.0, 1.0, 2.0, -np.inf]) for _ in range(9)] for _ in range(4)])
        states = states_of(p, c, {"X": x}, cuts(rng, 9, 1))
        rng.shuffle(states)
        check(c, {"X": x}, results(p, c, {"X": x}, associated(p, states, rng)))


def test_argmax_takes_the_first_nan_and_any_integer() -> None:
    c = castile.parse("def best(X: f32[k]) -> I:\n    I = argmax[k](X[k])\n")
    p = partial(c, "k")
    for x in ([1.0, np.nan, 3.0, np.nan], [-np.inf] * 4, [np.inf, 2.0, np.inf, np.nan]):
        given = {"X": np.array(x)}
        for at in range(5):
            states = states_of(p, c, given, [(0, at), (at, 4)])
            assert results(p, c, given, states)["I"] == castile.evaluate(c, given)["I"]
    c = castile.parse("def best(X: i64[k]) -> I:\n    I = argmax[k](X[k])\n")
    p = partial(c, "k")
    for low in ([-(1 << 63)] * 3, [1 << 62, (1 << 62) + 1, 5]):
        given = {"X": np.array(low)}
        states = states_of(p, c, given, [(0, 0), (0, 1), (1, 3)])
        assert results(p, c, given, states)["I"] == castile.evaluate(c, given)["I"]


def test_every_reduction_has_a_state() -> None:
    c = castile.parse("""
def every(X: f32[n, k], seen: bool[n, k], N: i32[n, k]) -> (A, B, C, D, E, F, G):
    A[n] = sum[k](X[n, k])
    B[n] = prod[k](X[n, k])
    C[n] = max[k](X[n, k])
    D[n] = min[k](N[n, k])
    E[n] = any[k](seen[n, k] & (k > 2))
    F[n] = all[k](seen[n, k] | (k < extent(k) - 1))
    G[n] = sum[k](N[n, k]) + n * extent(k)
""")
    p = partial(c, "k")
    rng = random.Random(11)
    for size in (0, 1, 7):
        draw = np.random.default_rng(size)
        given = {
            "X": draw.normal(size=(3, size)),
            "seen": draw.random((3, size)) < 0.5,
            "N": draw.integers(-9, 9, (3, size)),
        }
        states = states_of(p, c, given, cuts(rng, size, 1))
        check(c, given, results(p, c, given, states))
        check(c, given, results(p, c, given, associated(p, states, rng)))
    assert (p.start, p.extent) == ("k_start", "k_extent")


def test_the_mean_is_over_the_whole() -> None:
    """``extent(k)`` after the reduction is carried as the sum of the pieces' sizes."""
    c = castile.parse("def mean(X: f32[n, k]) -> Y:\n    Y[n] = sum[k](X[n, k]) / extent(k)\n")
    p = partial(c, "k")
    given = {"X": np.arange(14.0).reshape(2, 7)}
    states = states_of(p, c, given, [(0, 3), (3, 3), (3, 7)])
    assert [int(s["k_size"]) for s in states] == [3, 0, 4]
    assert p.extent == ""
    check(c, given, results(p, c, given, states))


def test_a_rounded_result_is_rounded_once() -> None:
    c = castile.parse("def total(X: f32[n, k]) -> Y:\n    Y[n]: bf16 = sum[k](X[n, k])\n")
    p = partial(c, "k")
    given = {"X": np.full((1, 300), 1.01)}
    states = states_of(p, c, given, [(0, 100), (100, 300)])
    assert states[0][p.states[0]][0] == pytest.approx(101.0, rel=1e-12)
    check(c, given, results(p, c, given, states))


def test_a_place_found_by_data_is_looked_up_in_its_piece() -> None:
    c = castile.parse("def loss(X: f32[n, v], t: i64[n]) -> Y:\n    Y[n] = log(sum[v](exp(X[n, v]))) - X[n, t[n]]\n")
    p = partial(c, "v")
    given = {"X": np.random.default_rng(0).normal(size=(5, 11)), "t": np.array([0, 4, 5, 9, 10])}
    check(c, given, results(p, c, given, states_of(p, c, given, [(0, 5), (5, 5), (5, 10), (10, 11)])))


def test_packed_axes_are_cut_where_a_word_begins() -> None:
    c, given = example("gemm_int4"), inputs("gemm_int4")
    p = partial(c, "k")
    assert p.align == 128
    size = extent_of(c, given, "k")
    check(
        c, given, results(p, c, given, states_of(p, c, given, [(0, 128), (128, size)] if size > 128 else [(0, size)]))
    )


def test_names_do_not_collide() -> None:
    c = castile.parse("""
def named(X: f32[piece, k], k_start: f32[piece], Y_pieces: f32[piece]) -> (Y, Z):
    Y[piece] = sum[k](X[piece, k] * k) + k_start[piece] * Y_pieces[piece]
    Z[piece] = max[k](X[piece, k])
""")
    p = partial(c, "k")
    draw = np.random.default_rng(1)
    given = {"X": draw.normal(size=(3, 8)), "k_start": draw.normal(size=3), "Y_pieces": draw.normal(size=3)}
    assert p.piece not in c.ranks
    check(c, given, results(p, c, given, states_of(p, c, given, [(0, 3), (3, 8)])))


@pytest.mark.parametrize(
    ("text", "rank", "kind", "message"),
    [
        ("Y[n] = sum[k](X[n, k])", "kk", UsageError, "`f` has no rank `kk`\nhint: did you mean `k`?"),
        ("Y[n] = sum[k](X[n, k])", "n", VerifyError, "runs along rank `n` itself"),
        ("Y = sum[k](W[k])", "n", VerifyError, "nothing is reduced over rank `n`"),
        ("Y[n, k] = X[n, k] / sum[k](X[n, k])", "k", VerifyError, "the result `Y` runs along rank `k` itself"),
        ("Y[n] = sum[k](abs(X[n, k] - max[k](X[n, k])))", "k", VerifyError, r"second pass over rank `k`.*\n.*blocks"),
        ("Y[n] = sum[k](X[n, k] * W[(k + 1) % extent(k)])", "k", VerifyError, "beyond the piece of rank `k`"),
        ("Y[n] = sum[k](X[n, k]) + sum[j](W[j])", "k", VerifyError, "under rank `j`"),
        ("H[k] = where(k > 0, H[k - 1], 0) + W[k]\n    Y = max[k](H[k])", "k", VerifyError, "a scan along rank `k`"),
    ],
)
def test_what_cannot_be_split_is_refused(text: str, rank: str, kind: type[CastileError], message: str) -> None:
    c = castile.parse(f"def f(X: f32[n, k], W: f32[k]) -> Y:\n    {text}\n")
    with pytest.raises(kind, match=message) as caught:
        partial(c, rank)
    assert caught.value.rank == rank
    assert caught.value.hint


def test_no_states_are_no_state() -> None:
    p = partial(castile.parse("def f(X: f32[k]) -> Y:\n    Y = sum[k](X[k])\n"), "k")
    with pytest.raises(InputError, match="no states came"):
        p.stack([])
