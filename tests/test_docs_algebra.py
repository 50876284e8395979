"""docs/algebra.md says what is true: its cascades parse, derive as it claims, and its numbers are computed here.

A cascade stands in a ```python block whose info string holds the claims: ``k=3→1`` (passes before and after),
``strict=2`` (after, under strict numerics), ``barrier=abs(`` (what the blocking expression contains), or
``form-of=NAME k=1`` (the block computes what NAME computes, in so many passes).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import castile
from castile.ir.cascade import Cascade, literal_value
from castile.ir.evaluate import combine_states
from castile.ir.scalar import Value
from castile.passes.count import count_passes
from castile.passes.derive import alternatives, derive
from castile.passes.grad import grad

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "algebra.md"
TEXT = PAGE.read_text(encoding="utf-8")
F = np.float32


@dataclass(frozen=True)
class Block:
    claims: dict[str, str]
    text: str

    @property
    def cascade(self) -> Cascade:
        return castile.parse(self.text)


@cache
def blocks() -> tuple[Block, ...]:
    found = re.findall(r"^```python ?(.*?)\n(.*?)^```$", TEXT, re.M | re.S)
    return tuple(Block(dict(claim.split("=", 1) for claim in info.split()), text) for info, text in found)


ORIGINALS = {b.cascade.name: b for b in blocks() if "form-of" not in b.claims}
FORMS = {b.claims["form-of"]: b for b in blocks() if "form-of" in b.claims}
BARRIERS = {name: b for name, b in ORIGINALS.items() if "barrier" in b.claims}


def arrow(claim: str) -> tuple[int, int]:
    before, after = claim.split("→")
    return int(before), int(after)


def inputs(c: Cascade, offset: float = 0.0) -> dict[str, Any]:
    """Square tensors of 5 in every rank; a scalar is 1e-3."""
    rng = np.random.default_rng(7)
    return {p.name: rng.standard_normal((5,) * len(p.indices)) + offset if p.indices else 1e-3 for p in c.params}


def assert_same(c: Cascade, other: Cascade, given: dict[str, Any], rtol: float = 1e-9) -> None:
    want, got = castile.evaluate(c, given), castile.evaluate(other, given)
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=rtol, atol=1e-12, err_msg=name)


def shown(*values: float, places: int = 6) -> None:
    """The page shows each number, rounded."""
    for v in values:
        assert f"{v:.{places}f}" in TEXT, f"{v:.{places}f} is not on the page"


# Cascades


def test_the_page_has_its_cascades() -> None:
    assert set(ORIGINALS) >= {"attention", "softmax", "layernorm_gemm", "best", "causal", "rounded"} | set(BARRIERS)
    assert set(FORMS) == {"softmax", "attention", "layernorm_gemm"}
    assert len(BARRIERS) == 5
    assert TEXT.count("```") == 2 * (len(blocks()) + 1), "a fence that this test does not read"


@pytest.mark.parametrize("name", ORIGINALS)
def test_passes_are_as_claimed(name: str) -> None:
    block = ORIGINALS[name]
    c, (before, after) = block.cascade, arrow(block.claims["k"])
    d = derive(c)
    assert count_passes(c)["k"] == before
    assert d.passes["k"] == after == count_passes(d.cascade)["k"]
    assert_same(c, d.cascade, inputs(c), rtol=2e-2 if "bf16(" in block.text else 1e-9)
    for other in alternatives(c):
        assert after <= other.passes["k"] <= before
        assert_same(c, other.cascade, inputs(c), rtol=2e-2 if "bf16(" in block.text else 1e-9)
    if "strict" in block.claims:
        assert derive(replace(c, numerics="strict")).passes["k"] == int(block.claims["strict"])
    if "barrier" in block.claims:
        assert any(block.claims["barrier"] in b.expression and b.reason for b in d.barriers)
    else:
        assert not d.barriers


@pytest.mark.parametrize("name", FORMS)
def test_forms_compute_the_same_in_the_passes_claimed(name: str) -> None:
    block, original = FORMS[name], ORIGINALS[name]
    c = block.cascade
    assert count_passes(c)["k"] == int(block.claims["k"]) == arrow(original.claims["k"])[1]
    assert [p.name for p in c.params] == [p.name for p in original.cascade.params]
    for offset in (0.0, 100.0):
        assert_same(original.cascade, c, inputs(c, offset), rtol=1e-6 if offset else 1e-9)


@pytest.mark.parametrize("name", FORMS)
def test_monoids_on_the_page_keep_their_laws(name: str) -> None:
    """On finite elements, at f64: any association, any order, and the empty state at either side."""
    (m,) = FORMS[name].cascade.monoids
    width = len(m.identity)
    rng = np.random.default_rng(4)
    empty = [np.full(300, literal_value(x), float) for x in m.identity]

    def merge(a: list[Any], b: list[Any]) -> list[Any]:
        values = combine_states(m, ("f64",) * width, [Value(x) for x in a], [Value(x) for x in b])
        return [v.array for v in values]

    def element() -> list[Any]:
        state = [3 * rng.standard_normal(300) for _ in range(width)]
        if name == "layernorm_gemm":  # count 1, nothing about its own mean
            state[0], state[2], state[4] = np.ones(300), np.zeros(300), np.zeros(300)
        else:
            state[1] = np.ones(300)
        return state

    a, b, c, d = (element() for _ in range(4))
    with np.errstate(invalid="ignore"):
        left = merge(merge(merge(a, b), c), d)
        for other in (merge(merge(a, b), merge(c, d)), merge(d, merge(merge(empty, c), merge(b, merge(a, empty))))):
            np.testing.assert_allclose(other, left, rtol=1e-10, atol=1e-10)
        for state in (a, left, empty):
            np.testing.assert_array_equal(merge(empty, state), state)
            np.testing.assert_array_equal(merge(state, empty), state)


@pytest.mark.parametrize("name", FORMS)
def test_derived_monoids_carry_what_the_page_says(name: str) -> None:
    derived = derive(ORIGINALS[name].cascade).cascade
    (mine,), (theirs,) = FORMS[name].cascade.monoids, derived.monoids
    # LayerNorm's also carries the sum of x - r.
    assert len(theirs.identity) == len(mine.identity) + (name == "layernorm_gemm")


def test_the_recurrence_by_hand() -> None:
    c = ORIGINALS["attention"].cascade
    for name, t in (("M", 1), ("L", 2), ("O", 3)):
        assert f"`t({name}) = {t}`" in TEXT
        assert count_passes(replace(c, outputs=(name,)))["k"] == t
    assert count_passes(c)["d"] == 1


def test_spelling_does_not_matter() -> None:
    want = derive(ORIGINALS["softmax"].cascade)
    for spelled in (
        "Z[n] = sum[k](exp(X[n, k]))\n    Y[n, k] = exp(X[n, k]) / Z[n]",
        "M[n] = max[k](X[n, k])\n    R[n] = 1 / sum[k](exp(X[n, k] - M[n]))\n    Y[n, k] = exp(X[n, k] - M[n]) * R[n]",
        "Z[n] = log(sum[k](exp(X[n, k])))\n    Y[n, k] = exp(X[n, k] - Z[n])",
        "S[n, k] = X[n, k] * 1.4426950408889634\n    M[n] = max[k](S[n, k])\n"
        "    Y[n, k] = exp2(S[n, k] - M[n]) / sum[k](exp2(S[n, k] - M[n]))",
    ):
        c = castile.parse(f"def softmax(X: f32[n, k]) -> Y:\n    {spelled}\n")
        assert derive(c).passes["k"] == want.passes["k"]
        assert_same(ORIGINALS["softmax"].cascade, derive(c).cascade, inputs(c), rtol=1e-7)


@pytest.mark.parametrize(("power", "after"), [(7, 1), (8, 2)])
def test_at_most_eight_terms_are_carried(power: int, after: int) -> None:
    text = f"def f(X: f32[n, k]) -> Y:\n    r[n] = sum[k](X[n, k])\n    Y[n] = sum[k]((X[n, k] - r[n]) ** {power})\n"
    d = derive(castile.parse(text))
    assert d.passes["k"] == after
    assert bool(d.barriers) == (after > 1)


def test_place_and_top_of_a_softmax() -> None:
    text = str(derive(ORIGINALS["best"].cascade).cascade)
    assert "argmax[k](X[n, k])" in text
    assert re.search(r"top\[n\] = 1 / \w+\[n\]", text)


def test_a_row_without_keys_is_zero() -> None:
    c = ORIGINALS["causal"].cascade
    for form in (c, derive(c).cascade):
        row = castile.evaluate(form, {"X": np.ones((3, 4))})["Y"]
        np.testing.assert_allclose(row[:2], [[0, 0, 0, 0], [1, 0, 0, 0]], atol=1e-15)
    softmax = ORIGINALS["softmax"].cascade
    assert np.isnan(castile.evaluate(softmax, {"X": np.full((1, 4), -np.inf)})["Y"]).all()


@pytest.mark.parametrize(
    ("name", "rank", "before", "after"),
    re.findall(r"^\| \[`(\w+)`\]\(\.\./examples/cascades/\w+\.cascade\) \| (\w+): (\d) → (\d) \|", TEXT, re.M),
)
def test_the_table_of_the_corpus(name: str, rank: str, before: str, after: str) -> None:
    c = castile.load(ROOT / "examples" / "cascades" / f"{name}.cascade")
    assert count_passes(c)[rank] == int(before)
    assert derive(c).passes[rank] == int(after)


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((\.[^)#]+)\)", TEXT):
        assert (PAGE.parent / target).exists(), target
    for path in re.findall(r"`(tests/[\w/.]+)`", TEXT):
        assert (ROOT / path).exists(), path


# What castile prints


def printed() -> str:
    lines = []
    for name, block in BARRIERS.items():
        for b in derive(block.cascade).barriers:
            lines += [f"{name}: {b.expression}", f"    {b.reason}"]
    return "\n".join(lines) + "\n"


def test_reasons_are_those_that_castile_prints(request: pytest.FixtureRequest) -> None:
    """Word by word where `--update-golden` can refresh them; without that option only in structure."""
    match = re.search(r"^```text barriers\n(.*?)^```$", TEXT, re.M | re.S)
    assert match is not None
    update = request.config.getoption("--update-golden", default=None)
    if update:
        PAGE.write_text(TEXT[: match.start(1)] + printed() + TEXT[match.end(1) :], encoding="utf-8")
    elif update is not None:
        assert match[1] == printed(), "run pytest with --update-golden"
    else:
        names = re.findall(r"^(\w+): ", match[1], re.M)
        assert names == re.findall(r"^(\w+): ", printed(), re.M) == list(BARRIERS)


# Numbers


def test_softmax_of_1_2_3_in_two_pieces() -> None:
    values = np.array([10.0, 20.0, 30.0])
    m, l, o = 2.0, math.exp(-1) + 1, 10 * math.exp(-1) + 20
    merged, out = l * math.exp(m - 3) + 1, o * math.exp(m - 3) + 30
    assert merged == pytest.approx(sum(math.exp(x - 3) for x in (1, 2, 3)))
    y = np.exp([1.0, 2.0, 3.0]) / np.exp([1.0, 2.0, 3.0]).sum()
    assert out / merged == pytest.approx(float(y @ values))
    shown(l, merged, *y, o, out, out / merged)
    got = castile.evaluate(FORMS["softmax"].cascade, {"X": [[1.0, 2.0, 3.0]]})["Y"][0]
    np.testing.assert_allclose(got, y)
    whole = {"Q": [[1.0]], "K": [[1.0], [2.0], [3.0]], "V": values[:, None]}
    assert castile.evaluate(FORMS["attention"].cascade, whole)["O"].item() == pytest.approx(out / merged)


def test_extended_exponents_of_a_row() -> None:
    with np.errstate(over="ignore"):
        assert np.isinf(np.exp(F(89)))
    row = (1.2, 2.4, 3.1)
    n = [round(x) for x in row]
    p = [math.exp(x - k) for x, k in zip(row, n, strict=True)]
    assert n == [1, 2, 3]
    left = p[0] * math.exp(n[0] - n[1]) + p[1]
    merged = left * math.exp(n[1] - n[2]) + p[2]
    assert merged * math.e**3 == pytest.approx(sum(map(math.exp, row)))
    shown(*p, left, merged, merged * math.e**3)


def floats() -> np.ndarray[Any, np.dtype[np.float32]]:
    """Floats of every magnitude, and those beside halves and powers of two."""
    rng = np.random.default_rng(1)
    bits = rng.integers(0, 0xFF << 23, 200_000, dtype=np.uint32)  # up to the greatest finite float
    near = np.concatenate([np.arange(0, 40, 0.5, F), F(2) ** np.arange(-10, 60, dtype=F)])
    x = np.concatenate([bits.view(F), rng.uniform(0, 1e5, 50_000).astype(F)])
    x = np.concatenate([x, near, np.nextafter(near, F(0)), np.nextafter(near, F(np.inf))])
    return np.concatenate([x, -x])


def test_a_float_minus_the_nearest_integer_is_exact() -> None:
    x = floats()
    n = np.rint(x)
    assert np.array_equal((x - n).astype(float), x.astype(float) - n.astype(float))
    assert np.abs(x - n).max() == 0.5
    assert not (x - n)[np.abs(x) >= 2.0**23].any()


def test_what_powers_of_two_would_lose() -> None:
    parts = (0.6875, 0.005615234375, math.log(2) - 0.6875 - 0.005615234375)
    assert parts[:2] == (Fraction(11, 16), Fraction(23, 4096))
    assert F(parts[2]) == F(3.1946185e-05)
    assert 729_000 * 23 < 2**24

    def off(top: float, constants: tuple[float, ...]) -> float:
        x = np.random.default_rng(2).uniform(-top, top, 200_000).astype(F)
        n = np.rint(x * F(1 / math.log(2)))
        left = x
        for c in constants:
            left = left - n * F(c)
        return float(np.abs(left - (x.astype(float) - n.astype(float) * math.log(2))).max())

    assert 3e-3 < off(1e5, (math.log(2),)) < 5e-3
    assert off(1e5, parts) < 6e-7
    assert 1e-4 < off(1e6, parts) < 2.6e-4
    assert off(1e7, parts) > 0.1
    twos = "M = max[k](X[k])\n    Y = log(sum[k](exp2(X[k] - M))) + M * 0.6931471805599453\n"
    text = str(derive(castile.parse(f"def f(X: f32[k]) -> Y:\n    {twos}"), gauge="exponent").cascade)
    assert all(repr(x) in text for x in parts)


def test_variance_cancels_when_it_is_expanded() -> None:
    x = np.array([10001, 10002, 10004, 10005], F)
    total = square = F(0)
    for v in x:
        total, square = F(total + v), F(square + F(v * v))
    assert F(square - F(F(total * total) / F(4))) / 4 == 8.0
    assert np.var(x.astype(float)) == 2.5


@pytest.mark.parametrize("offset", [0, 10_000])
def test_layernorm_by_hand(offset: int) -> None:
    """The merge of the page, in f32, with and without an offset."""
    x, w = np.array([1, 2, 4, 5], F) + F(offset), np.array([1, 0, 2, 1], F)

    def piece(x: Any, w: Any) -> tuple[Any, ...]:
        d = x - F(x.mean())
        return F(len(x)), F(x.sum()), F((d * d).sum()), F(w.sum()), F((d * w).sum())

    a, b = piece(x[:2], w[:2]), piece(x[2:], w[2:])
    assert (a[2:], b[2:]) == ((0.5, 1, -0.5), (0.5, 3, -0.5))
    n, s = a[0] + b[0], a[1] + b[1]
    r = F(s / n)
    shift = [F(F(p[1] / p[0]) - r) for p in (a, b)]
    q = sum(p[2] + p[0] * d**2 for p, d in zip((a, b), shift, strict=True))
    g = sum(p[4] + p[3] * d for p, d in zip((a, b), shift, strict=True))
    assert (n, r, q, a[3] + b[3], g) == (4, 3 + offset, 10, 4, 2)
    exact = x.astype(float) - (3 + offset)
    assert (q, g) == ((exact**2).sum(), (exact * w).sum())


@pytest.mark.parametrize(
    ("integrand", "rank"),
    [
        (lambda x, r: np.exp(x[0] - r), 1),
        (lambda x, r: (x[0] - r) * x[1], 2),
        (lambda x, r: (x[0] - r) ** 2, 3),
        (lambda x, r: np.cos(x[0] - r), 2),
        (lambda x, r: np.abs(x[0] - r), 12),
        (lambda x, r: np.exp(x[0] * r), 12),
        (lambda x, r: np.where(x[0] > r, 1.0, 0.0), 12),
    ],
)
def test_j_is_the_rank(integrand: Any, rank: int) -> None:
    """The matrix f(x_i; r_j): of rank J, or full however many points it has (12 here)."""
    x = np.linspace(-1.0, 1.0, 24) * np.array([[2.0], [0.0]])
    x[1] = np.random.default_rng(3).standard_normal(24)
    r = np.linspace(-1.9, 1.9, 12)
    assert np.linalg.matrix_rank(integrand(x[:, :, None], r), tol=1e-11) == rank


# Gradients


def test_gradients_of_attention() -> None:
    c = ORIGINALS["attention"].cascade
    g = grad(c, saved="lse")
    d = derive(g)
    assert (d.passes["k"], d.passes["q"]) == (1, 1)
    assert "max[" not in str(d.cascade)
    row_sum = r"sum\[f\]\(-?\(?(O\[q, f\] \* dO\[q, f\]|dO\[q, f\] \* O\[q, f\])"
    assert re.search(row_sum, str(g)), "no row sum of dO * O"
    assert "attention_dq" in TEXT
    given = inputs(c)
    o = castile.evaluate(c, given)["O"]
    s = given["Q"] @ given["K"].T
    do = np.random.default_rng(5).standard_normal(o.shape)
    lse = np.log(np.exp(s).sum(1))
    p = np.exp(s - lse[:, None])
    dp = do @ given["V"].T
    row = (p * dp).sum(1)
    np.testing.assert_allclose(row, (do * o).sum(1))
    ds = p * (dp - row[:, None])
    got = castile.evaluate(d.cascade, {**given, "lse": lse, "O": o, "dO": do})
    np.testing.assert_allclose(got["dQ"], ds @ given["K"], atol=1e-12)
    np.testing.assert_allclose(got["dK"], ds.T @ given["Q"], atol=1e-12)
    np.testing.assert_allclose(got["dV"], p.T @ do, atol=1e-12)


def test_the_maximum_gets_no_gradient() -> None:
    with_max = ORIGINALS["softmax"].cascade
    without = castile.parse("def softmax(X: f32[n, k]) -> Y:\n    Y[n, k] = exp(X[n, k]) / sum[k](exp(X[n, k]))\n")
    given = {"X": np.random.default_rng(6).standard_normal((2, 5)), "dY": np.random.default_rng(8).random((2, 5))}
    assert_same(grad(with_max), grad(without), given)
