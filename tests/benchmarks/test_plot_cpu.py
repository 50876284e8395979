"""The drawing of CPU kernels is of the rows that the repository has."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree

from castile.benchmarks.plot_cpu import DRAWING, FAMILIES, ROWS, bars, draw


def row(name: str, candidate: str, median: float, void: str | None = None) -> dict[str, object]:
    return {"name": name, "candidate": candidate, "seconds": {"median": median}, "void": void}


def test_the_drawing_is_not_stale() -> None:
    rows = [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()]
    assert draw(bars(rows)) == DRAWING.read_text(encoding="utf-8"), "python benchmarks/plot_cpu.py draws it again"


def test_a_case_is_told_by_its_newest_rows_and_fastest_peer() -> None:
    rows = [
        row("gemm", "torch", 8.0),
        row("gemm", "castile", 1.0),
        row("gemm", "torch", 4.0),
        row("gemm", "inductor", 3.0),
        row("gemm", "castile", 2.0),
        row("gemm", "castile", 1.0, "the machine was busy"),
        row("softmax", "castile", 1.0),
    ]
    (bar,) = bars(rows)
    assert (bar.name, bar.peer, bar.ratio) == ("gemm", "inductor", 1.5)


def test_every_case_has_a_family_and_names_are_escaped() -> None:
    rows = [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()]
    names = {r["name"] for r in rows}
    begins = [b for _, found in FAMILIES for b in found]
    assert all(any(n.startswith(b) for b in begins) for n in names)
    text = draw(bars([row("gemm <&>", "torch", 40.0), row("gemm <&>", "castile", 1.0)]))
    assert "gemm &lt;&amp;&gt;" in text
    assert "40.00 →" in text
    assert ElementTree.fromstring(text).tag.endswith("svg")
