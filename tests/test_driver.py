"""`castile.explain`: what it says of a cascade, as values, text and JSON."""

from __future__ import annotations

import io
import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
from rich.console import Console

import castile
from castile.passes.explain import Alternative, Barrier, Explanation, KernelReport, Rewrite, State
from castile.passes.report import si

CASCADES = Path(__file__).resolve().parents[1] / "examples" / "cascades"
EXAMPLES = sorted(CASCADES.glob("*.cascade"))

SOFTMAX = """
def softmax(X: f32[m, n], unread: f32) -> Y:
    M[m] = max[n](X[m, n])
    E[m, n] = exp(X[m, n] - M[m])
    L[m] = sum[n](E[m, n])
    Y[m, n] = E[m, n] / L[m]
    Z[m] = 2 * L[m]
"""


@pytest.fixture(scope="module")
def softmax() -> Explanation:
    return castile.explain(castile.parse(SOFTMAX))


def test_passes(softmax: Explanation) -> None:
    assert softmax.passes.keys() == {"n"}
    assert softmax.passes["n"][0] == 3
    assert [dict(e.passes) for e in softmax.einsums] == [{"n": 1}, {"n": 2}, {"n": 2}, {"n": 3}, {}]
    assert "n   3   M │ E L │ Y" in str(softmax).replace("3 → 2", "3")


def test_ranks_and_tensors(softmax: Explanation) -> None:
    assert [(k.name, k.extent, k.traversed) for k in softmax.ranks] == [
        ("m", "axis 0 of X", ()),
        ("n", "axis 1 of X", ("max in M", "sum in L")),
    ]
    roles = {t.name: t.role for t in softmax.tensors}
    assert roles == {
        "X": "input",
        "unread": "unused",
        "M": "intermediate",
        "E": "intermediate",
        "L": "intermediate",
        "Y": "result",
        "Z": "unused",
    }
    assert {t.name: str(t.bytes) for t in softmax.tensors}["X"] == "4·m·n"


def test_what_einsums_do() -> None:
    text = """
@monoid(identity=0.0)
def add(a, b) -> c:
    c = a + b

def f(X: f32[m, k], W: f32[k, n], h0: f32) -> (A, B, C, D, E):
    A[m, n] = sum[k](X[m, k] * W[k, n])
    B[m] = sum[k](X[m, k] * X[m, k]) + max[k](X[m, k])
    C[m] = add[k](X[m, k])
    D[m, k] = where(k > 0, D[m, k - 1], h0) + X[m, k]
    E[m, k] = where(k + 1 < extent(k), E[m, k + 1], h0)
"""
    does = [e.does for e in castile.explain(castile.parse(text)).einsums]
    assert does == [
        "contraction over k",
        "sum over k, max over k",
        "monoid add over k",
        "scan along k",
        "scan back along k",
    ]


def test_json_is_a_string_with_everything(softmax: Explanation) -> None:
    found = json.loads(softmax.to_json())
    assert found == softmax.to_dict()
    assert found["passes"] == {"n": list(softmax.passes["n"])}
    assert found["key"] == softmax.cascade.key
    assert castile.parse(found["text"]) == softmax.cascade
    assert found["total"]["bytes_least"] == {"formula": "8*m*n", "value": None}
    for field in fields(Explanation):
        assert field.name in found or field.name == "cascade"


def test_extents_give_numbers() -> None:
    c = castile.parse(SOFTMAX)
    r = castile.explain(c, {"m": 1000, "n": 1000})
    assert r.value(r.bytes_least) == 8_000_000
    assert "8·m·n = 8 MB" in str(r)
    with pytest.raises(castile.CastileError, match="rank `n` has no extent"):
        castile.explain(c, {"m": 1000})


def test_rich_and_plain_say_the_same(softmax: Explanation) -> None:
    pipe, terminal = io.StringIO(), io.StringIO()
    Console(file=pipe, soft_wrap=True).print(softmax)
    Console(file=terminal, soft_wrap=True, force_terminal=True, color_system="truecolor").print(softmax)
    assert pipe.getvalue() == str(softmax) + "\n"
    assert "\x1b[" in terminal.getvalue()


def test_what_was_derived_is_told(softmax: Explanation) -> None:
    told = replace(
        softmax,
        passes={"n": (3, 2)},
        rewrites=(Rewrite("separate", "L[m] = sum[n](E[m, n])", "L[m] = ⊕", "exp(M) leaves the sum"),),
        barriers=(Barrier("Y", "n", "abs(X - mu)", "no finite sum"),),
        states=(State("L", "n", ("m", "l"), ("-inf", "0"), ("max", "l*c + s"), "exp(m - n)", "running maximum"),),
        alternatives=(Alternative("three passes", {"n": 3}, "rows that stay in cache"),),
        kernels=(
            KernelReport("softmax", ("M", "E"), ("m",), "n", "one state"),
            KernelReport("rest", ("Y",), (), "", ""),
        ),
    )
    text = str(told)
    for words in (
        "n   3 → 2   M │ E L │ Y",
        "1. separate   exp(M) leaves the sum",
        "before  L[m] = sum[n](E[m, n])",
        "n   no finite sum",
        "because of  abs(X - mu)",
        "in          Y",
        "l   from 0, then l*c + s",
        "three passes   n 3   rows that stay in cache",
        "parallel over m, streams n   one state",
    ):
        assert words in text
    assert "as written" not in text.split("Rewrites")[0]
    assert told.to_dict()["rewrites"][0]["reason"] == "exp(M) leaves the sum"
    assert told.to_dict()["states"][0]["gauge"] == "running maximum"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_is_explained(path: Path) -> None:
    c = castile.load(path)
    r = castile.explain(c)
    json.loads(r.to_json())
    assert all(len(line) < 200 for line in str(r).split("\n"))
    assert {e.name for e in r.einsums} == {e.name for e in c.einsums}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (9999, "9999 B"),
        (10_000, "10 kB"),
        (33_554_432, "33.55 MB"),
        (8.59e9, "8.59 GB"),
        (1e40, "1e+16 YB"),
    ],
)
def test_prefixes(value: float, text: str) -> None:
    assert si(value, "B") == text
