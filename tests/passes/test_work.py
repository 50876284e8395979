"""Operations and bytes, as formulas and as numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import castile
from castile.ir.dtypes import DTYPES
from castile.ir.extents import resolve, shape_of
from castile.ir.types import tensor_types
from castile.passes.work import Poly, least_bytes, operations, sizes_of, tensor_bytes, work

EXAMPLES = sorted((Path(__file__).resolve().parents[2] / "examples" / "cascades").glob("*.cascade"))


def told(text: str) -> list[str]:
    """For each Einsum its space, operations and bytes."""
    c = castile.parse(text)
    found = []
    for w in work(c):
        spent = ", ".join(f"{p} {unit}" for unit, p in w.operations.items() if p.terms) or "none"
        found.append(f"{' '.join(w.space)}: {spent}; {w.bytes_read} in, {w.bytes_written} out")
    return found


def test_attention() -> None:
    text = """
def attention(Q: bf16[q, d], K: bf16[k, d], V: bf16[k, f], scale: f32) -> O:
    S[q, k] = scale * sum[d](Q[q, d] * K[k, d])
    M[q] = max[k](S[q, k])
    P[q, k] = exp(S[q, k] - M[q])
    O[q, f]: bf16 = sum[k](P[q, k] * V[k, f])
"""
    assert told(text) == [
        "q k d: 2·q·k·d matrix, q·k vector; 2·k·d + 2·q·d + 4 in, 4·q·k out",
        "q k: q·k vector; 4·q·k in, 4·q out",
        "q k: q·k vector, q·k special; 4·q·k + 4·q in, 4·q·k out",
        "q f k: 2·q·f·k matrix; 2·f·k + 4·q·k in, 2·q·f out",
    ]
    assert str(least_bytes(castile.parse(text))) == "2·f·k + 2·k·d + 2·q·d + 2·q·f + 4"


def test_a_value_is_computed_once_for_what_it_varies_with() -> None:
    assert told("def f(A: f32[m, k], s: f32[m]) -> Y:\n    Y[m] = sum[k](A[m, k] * exp(s[m]))\n") == [
        "m k: 2·m·k vector, m special; 4·m·k + 4·m in, 4·m out"
    ]


def test_coordinates_are_free() -> None:
    assert told("def f(A: f32[q, k]) -> Y:\n    Y[q, k] = where((q >= k) & (q - k < 8), A[q, k], -inf)\n") == [
        "q k: q·k vector; 4·q·k in, 4·q·k out"
    ]


def test_packed_words_gathers_and_literals() -> None:
    text = """
def f(W: u32[k // 8, n], T: f32[v, d], token: i32[n], X: bool[n, 3]) -> (A, B, C):
    A[k, n] = W[k // 8, n] >> 4*(k % 8) & 15
    B[n, d] = T[token[n], d]
    C[n] = X[n, 0] & X[n, 2]
"""
    assert told(text) == [
        "k n: 2·k·n vector; 4·n·⌈k/8⌉ in, 8·k·n out",
        "n d: none; 4·n·d + 4·n in, 4·n·d out",
        "n: n vector; n in, n out",
    ]
    assert work(castile.parse(text))[0].bytes_read.formula() == "4*n*ceil(k/8)"


def test_a_scan_keeps_its_state() -> None:
    assert told("def f(a: f32[t], x: f32[t]) -> H:\n    H[t] = where(t > 0, a[t] * H[t - 1], 0) + x[t]\n") == [
        "t: 3·t vector; 8·t in, 4·t out"
    ]


def test_a_monoid_counts_each_component_over_its_ranks() -> None:
    text = """
@monoid(identity=(0.0, 0.0))
def op(l, o, s, v) -> (L, O):
    L = l + s
    O = o + v * s

def f(S: f32[q, k], V: f32[k, f]) -> (L, O):
    (L[q], O[q, f]) = op[k](S[q, k], V[k, f])
"""
    assert told(text) == ["q f k: 2·q·f·k + q·k vector; 4·f·k + 4·q·k in, 4·q·f + 4·q out"]


def test_products_that_are_no_matrix_products() -> None:
    assert told("def f(A: f32[k], B: f32[k]) -> y:\n    y = sum[k](A[k] * B[k])\n")[0].startswith("k: 2·k vector")
    gemv = "def f(A: f32[m, k], x: f32[k]) -> y:\n    y[m] = sum[k](A[m, k] * x[k])\n"
    assert told(gemv)[0].startswith("m k: 2·m·k vector")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_bytes_are_those_of_the_arrays(path: Path) -> None:
    c = castile.load(path)
    free = {i.name: 3 for p in c.params for i in p.indices if type(i).__name__ == "Rank"}
    extents = resolve(c, free)
    sizes, types = sizes_of(c, extents), tensor_types(c)
    for name, formula in tensor_bytes(c).items():
        count = 1
        for n in shape_of(c, name, extents):
            count *= n
        assert formula.at(sizes) == count * DTYPES[types[name]].bits // 8, name
    assert all(p.at(sizes) >= 0 for p in operations(work(c)).values())


polys = st.lists(
    st.tuples(st.lists(st.sampled_from("abc"), max_size=3).map(lambda s: tuple(sorted(s))), st.integers(-3, 9)),
    max_size=4,
).map(lambda terms: sum((Poly((term,)) for term in terms), Poly()))


@given(polys, polys, st.fixed_dictionaries({name: st.integers(0, 9) for name in "abc"}))
def test_polynomials_add(p: Poly, q: Poly, sizes: dict[str, int]) -> None:
    assert (p + q).at(sizes) == p.at(sizes) + q.at(sizes)
    assert p + q == q + p
    assert p.times(3).at(sizes) == 3 * p.at(sizes)
    assert all(coefficient for _, coefficient in (p + q).terms)
