"""Drawings: well-formed, self-contained, escaped, and nothing lies on anything else."""

from __future__ import annotations

import itertools
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import castile
from castile.passes.draw import boxes_of, edges_of, kind_of, to_svg
from castile.passes.layout import Node, lay_out

EXAMPLES = sorted((Path(__file__).resolve().parents[2] / "examples" / "cascades").glob("*.cascade"))
SVG = "{http://www.w3.org/2000/svg}"


def example(name: str) -> castile.Cascade:
    return castile.load(next(path for path in EXAMPLES if path.stem == name))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_is_drawn(path: Path) -> None:
    c = castile.load(path)
    text = to_svg(c)
    root = ElementTree.fromstring(text)
    assert not re.search(r"(href|src|url\(|<script|<image)", text.replace('xmlns="http://www.w3.org/2000/svg"', ""))
    drawn = [t.text for t in root.iter(f"{SVG}text") if t.get("class") == "name"]
    assert len(drawn) == len(c.einsums)
    assert text == to_svg(c)


def test_boxes_and_edges() -> None:
    c = example("attention")
    assert {name: box.kind for name, box in boxes_of(c).items()} == {
        "Q": "input", "K": "input", "V": "input",
        "S": "contraction", "M": "reduction", "P": "map", "L": "reduction", "A": "map", "O": "contraction",
    }  # fmt: skip
    edges = {(e.source, e.target): e.barrier for e in edges_of(c)}
    assert {pair for pair, rank in edges.items() if rank} == {("M", "P"), ("L", "A")}
    assert edges["M", "P"] == "k"
    assert ("S", "P") in edges
    assert boxes_of(c)["O"].result
    assert "pass 2 of 3 over k" in boxes_of(c)["L"].lines


def test_kinds_of_scans_and_monoids() -> None:
    delta, flash = example("delta_rule"), example("attention_monoid")
    assert kind_of(delta.einsums[0]) == "scan"
    assert [kind_of(e) for e in flash.einsums] == ["contraction", "monoid", "map"]


def test_scalars_are_listed_and_not_drawn() -> None:
    text = to_svg(example("attention"))
    assert "scale: f32" in text
    assert "scale" not in boxes_of(example("attention"))


def test_names_are_escaped() -> None:
    c = castile.parse("def f(X: f32[m]) -> Y:\n    Y[m] = where(X[m] < 2, X[m], 0)\n")
    assert "where(X[m] &lt; 2, X[m], 0)" in to_svg(c)
    ElementTree.fromstring(to_svg(castile.parse("def f(größe: f32[ш]) -> 結果:\n    結果[ш] = größe[ш]\n")))


def test_a_long_expression_is_cut_and_whole_in_its_hint() -> None:
    terms = " + ".join(f"X[m] * {n}" for n in range(40))
    c = castile.parse(f"def f(X: f32[m]) -> Y:\n    Y[m] = {terms}\n")
    box = boxes_of(c)["Y"]
    assert max(map(len, box.lines)) < 70
    assert terms in box.hint


def test_five_hundred_einsums() -> None:
    lines = ["def chain(X: f32[m, k]) -> Y499:", "    Y0[m, k] = X[m, k]"]
    lines += [f"    Y{n}[m, k] = Y{n - 1}[m, k] + {n}" for n in range(1, 500)]
    c = castile.parse("\n".join(lines) + "\n")
    drawn = "".join(ElementTree.fromstring(to_svg(c)).itertext())
    assert all(f"Y{n}[m, k]" in drawn for n in range(500))


graphs = st.integers(1, 12).flatmap(
    lambda n: st.tuples(
        st.lists(st.tuples(st.floats(10, 300), st.floats(10, 90)), min_size=n, max_size=n),
        st.lists(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)), max_size=24, unique=True),
        st.integers(0, n),
    )
)


@settings(deadline=None)
@given(graphs)
def test_layout(graph: tuple[list[tuple[float, float]], list[tuple[int, int]], int]) -> None:
    """No two boxes overlap, every edge goes down, everything lies inside."""
    sizes, pairs, floating = graph
    nodes = [Node(w, h, n < floating) for n, (w, h) in enumerate(sizes)]
    edges = sorted({(a, b) for a, b in pairs if a < b and not nodes[b].floats}, key=lambda e: e[1])
    found = lay_out(nodes, edges, 20, 40)
    boxes = [(x, y, x + n.width, y + n.height) for (x, y), n in zip(found.corners, nodes, strict=True)]
    for a, b in itertools.combinations(boxes, 2):
        assert a[2] <= b[0] + 1e-6 or b[2] <= a[0] + 1e-6 or a[3] <= b[1] + 1e-6 or b[3] <= a[1] + 1e-6
    for box in boxes:
        assert box[0] >= -1e-6
        assert box[2] <= found.width + 1e-6
        assert box[3] <= found.height + 1e-6
    for (source, target), line in zip(edges, found.edges, strict=True):
        heights = [y for _, y in line]
        assert heights == sorted(heights)
        assert heights[0] == pytest.approx(boxes[source][3])
        assert heights[-1] == pytest.approx(found.corners[target][1])
