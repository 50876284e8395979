"""The test of monoid laws tells good monoids from bad ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import castile
from castile.ir.cascade import Cascade
from castile.passes.laws import Breach, breaches, monoid_uses

CASCADES = Path(__file__).resolve().parents[2] / "examples" / "cascades"

TEMPLATE = """
@monoid(identity={identity})
def op({params}) -> ({results}):
{body}

def f(X: f32[q, k], W: i32[q, k]) -> ({outputs}):
    ({outputs_q}) = op[k]({arguments})
"""


def cascade(identity: str, params: str, body: list[str], arguments: str) -> Cascade:
    results = [line.split(" = ")[0] for line in body][-len(params.split(",")) // 2 :]
    outputs = [f"out_{r}" for r in results]
    text = TEMPLATE.format(
        identity=identity,
        params=params,
        results=", ".join(results),
        body="\n".join(f"    {line}" for line in body),
        outputs=", ".join(outputs),
        outputs_q=", ".join(f"{o}[q]" for o in outputs),
        arguments=arguments,
    )
    return castile.parse(text)


def broken(c: Cascade, seed: int = 0) -> list[Breach]:
    rng = np.random.default_rng(seed)
    inputs = {"X": rng.normal(size=(3, 5)), "W": rng.integers(0, 9, (3, 5))}
    ((_, use),) = monoid_uses(c)
    return breaches(c, use, inputs, rng, 300)


GOOD = {
    "sum": ("(0.0, 0)", "a, b, c, d", ["A = a + c", "B = b + d"], "X[q, k], W[q, k]"),
    "log-sum-exp": (
        "(-inf, 0.0)", "m, l, n, s", ["M = maximum(m, n)", "L = l * exp(m - M) + s * exp(n - M)"], "X[q, k], 1.0",
    ),
    "Welford": (
        "(0.0, 0.0, 0.0)",
        "c, m, s, d, n, t",
        ["w = where(c + d == 0, 0, d / (c + d))", "C = c + d", "M = m + (n - m) * w", "S = s + t + c * w * (n - m)**2"],
        "1.0, X[q, k], 0.0",
    ),
    "affine maps": ("(1.0, 0.0)", "a, b, c, d", ["A = a * c", "B = b * c + d"], "X[q, k], X[q, k] + 1"),
    "first maximum": (
        "(-inf, 0)", "m, i, n, j", ["M = maximum(m, n)", "I = where(m >= n, i, j)"], "X[q, k], W[q, k]",
    ),
    "wrapping integers": ("(1, 0)", "a, b, c, d", ["A = a * c", "B = b * c + d"], "W[q, k] * 1000000, W[q, k]"),
}  # fmt: skip
BAD = {
    "not rescaled": (
        "(-inf, 0.0)", "m, l, n, s", ["M = maximum(m, n)", "L = l * exp(m - M) + s"], "X[q, k], 1.0", "associativity",
    ),
    "mean of means": ("(0.0, 0.0)", "a, b, c, d", ["A = (a + c) / 2", "B = b + d"], "X[q, k], 1.0", "associativity"),
    "difference": ("(0, 0)", "a, b, c, d", ["A = a - c", "B = b - d"], "W[q, k], W[q, k]", "associativity"),
    "wrong identity": (
        "(0.0, 0.0)", "m, l, n, s", ["M = maximum(m, n)", "L = l * exp(m - M) + s * exp(n - M)"], "X[q, k], 1.0",
        "left identity",
    ),
    "keeps the old": ("(0, 0)", "a, b, c, d", ["A = 1 * a", "B = 1 * b"], "W[q, k], W[q, k]", "left identity"),
    "keeps the new": ("(0, 0)", "a, b, c, d", ["A = 1 * c", "B = 1 * d"], "W[q, k], W[q, k]", "right identity"),
    "slightly off": (
        "(0.0, 0)", "a, b, c, d", ["A = a + c + 0.001 * a * a", "B = b + d"], "X[q, k], W[q, k]", "associativity",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("seed", range(4))
def test_good(name: str, seed: int) -> None:
    assert [str(b) for b in broken(cascade(*GOOD[name]), seed) if not b.excused] == []


@pytest.mark.parametrize("name", BAD)
def test_bad(name: str) -> None:
    *spelled, law = BAD[name]
    found = [b for b in broken(cascade(*spelled)) if not b.excused]  # type: ignore[arg-type]
    assert law in {b.law for b in found}
    assert all(b.monoid == "op" and b.left != b.right for b in found)


def test_infinite_elements_excuse() -> None:
    found = broken(cascade(*GOOD["first maximum"]))
    assert found
    assert all(b.excused for b in found)


def test_a_breach_shows_the_states() -> None:
    *spelled, _ = BAD["difference"]
    breach = next(b for b in broken(cascade(*spelled)) if b.law == "associativity")  # type: ignore[arg-type]
    assert str(breach).startswith("associativity: with a = (")
    assert "one side is" in str(breach)


@pytest.mark.parametrize("path", sorted(CASCADES.glob("*.cascade")), ids=lambda path: path.stem)
def test_only_monoids_are_found(path: Path) -> None:
    c = castile.load(path)
    assert bool(list(monoid_uses(c))) == bool(c.monoids)


def test_arguments_that_mean_nothing_outside_their_guard() -> None:
    """The reduction's argument reads out of bounds where the `where` around it is not taken."""
    c = castile.parse(
        "@monoid(identity=0.0)\ndef add(a, b) -> c:\n    c = a + b\n\n"
        "def f(X: f32[q, k], W: i32[q, k]) -> Y:\n"
        "    Y[q] = where(q > 0, add[k](X[q - 1, k]), 0)\n"
    )
    assert broken(c) == []
