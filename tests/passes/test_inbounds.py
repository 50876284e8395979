"""Reads outside their tensor are found before a kernel runs, and no others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from castile.ir.errors import CastileError, EvaluationError
from castile.ir.evaluate import evaluate
from castile.ir.extents import bindings, resolve, shape_of
from castile.ir.mapping import Mapping
from castile.ir.parse import load, parse
from castile.ir.print import print_expr
from castile.ir.tile import Load, operations
from castile.passes.inbounds import always_read, check_reads
from castile.passes.mapped import mapped, nominal

CASCADES = sorted((Path(__file__).resolve().parents[2] / "examples" / "cascades").glob("*.cascade"))

BODIES = [
    "Y[k] = X[k] + X[k + 1]",
    "Y[k] = where(k + 1 < extent(k), X[k + 1], 0.0)",
    "Y[k] = where(k < 3, 0.0, X[k - 3])",
    "Y[k] = where(k < 3, 0.0, X[k + 1])",
    "Y[k] = where((k >= 2) & (k % 2 == 0), X[k // 2 - 1], X[k])",
    "Y[k] = where((k < 2) | (k > 5), 1.0, X[2 * (k - 2)])",
    "H[k] = where(k > 0, H[k - 1], 0.0) + X[k]\n    Y[k] = H[k]",
    "H[k] = H[k - 1] + X[k]\n    Y[k] = H[k]",
    "Y[k] = sum[j](where(k >= j, X[k - j], 0.0) * X[j])",
    "Y[k] = sum[j](where(k > j, X[k - j], X[j + k]) * X[j])",
]


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("n", [0, 1, 4, 7])
def test_it_says_what_the_oracle_finds(body: str, n: int) -> None:
    ranks = "X: f32[k], Z: f32[j]" if "j" in body else "X: f32[k]"
    c = parse(f"def f({ranks}) -> Y:\n    {body}\n")
    inputs = {p.name: np.ones(n) for p in c.params}
    extents = resolve(c, {}, {p.name: (n,) for p in c.params})

    def verdict(act: object) -> bool:
        try:
            act() if callable(act) else None
        except EvaluationError:
            return False
        return True

    assert verdict(lambda: check_reads(c, extents)) == verdict(lambda: evaluate(c, inputs))


@pytest.mark.parametrize("path", CASCADES, ids=lambda p: p.stem)
def test_examples_read_inside(path: Path) -> None:
    c = load(path)
    for size in (8, 24):
        extents = resolve(c, {b.rank: size for b in bindings(c) if b.param is not None})
        check_reads(c, extents)
        assert all(shape_of(c, p.name, extents) is not None for p in c.params)


def test_the_error_names_the_place() -> None:
    c = parse("def f(X: f32[k]) -> Y:\n    Y[k] = X[k] + where(k < 3, 0.0, X[k + 1])\n")
    with pytest.raises(CastileError, match=r"`X\[k \+ 1\]` is read outside `X` at k=6") as caught:
        check_reads(c, {"k": 7})
    assert "where(k + 1 < 7, X[k + 1], 0.0)" in str(caught.value)
    assert caught.value.line == 2


def test_a_read_under_no_condition_needs_none_elsewhere() -> None:
    c = parse(
        "def f(X: f32[n], C: f32[k]) -> Y:\n"
        "    R[n] = X[n] * C[n]\n"
        "    Y[n] = sum[k](where(n >= k, R[n] * C[k], 0.0)) + where(n > 3, C[n - 1], 0.0)\n"
    )
    assert {print_expr(a): set(ranks) for a, ranks in always_read(c).items()} == {"X[n]": {"n"}, "C[n]": {"n"}}


def test_a_rotation_in_a_masked_score_is_read_once_and_without_guards() -> None:
    c = load(next(p for p in CASCADES if p.stem == "attention_rope"))
    extents = nominal(c)
    (k,) = mapped(c, Mapping(), extents).kernels
    loads = [op for op in operations(k.body) if isinstance(op, Load)]
    assert loads
    assert all(op.guard is None for op in loads)
