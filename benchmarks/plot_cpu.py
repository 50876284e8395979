"""Draws docs/cpu.svg from the rows of benchmarks/results/kernels_cpu.jsonl: castile beside the fastest of its peers.

    python benchmarks/plot_cpu.py

One bar a case, as long as castile is faster, on a scale of powers of two. A case's newest rows count; void ones do not.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ROWS, DRAWING = ROOT / "benchmarks" / "results" / "kernels_cpu.jsonl", ROOT / "docs" / "cpu.svg"

# Families of cases, by how their names begin, in the order of the drawing.
FAMILIES = (
    ("Attention", ("attention", "window", "decode", "backward")),
    ("Products", ("gemm", "layernorm+gemm", "rmsnorm+gemm")),
    ("Narrow weights", ("int4", "int8", "fp8")),
    ("Rows", ("softmax", "rmsnorm", "layernorm", "kl", "linear")),
)

# Sizes in SVG units: height of a line and of a heading, where bars begin, the width of a doubling, margins.
LINE, HEADING, LEFT, DOUBLING, MARGIN = 19, 30, 300, 118, 16

# The ends of the scale, as powers of two; what is beyond the last is cut off there and says so.
LEAST, MOST = -0.5, 4.0

STYLE = """
  text { font: 12px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; fill: #1f2328 }
  .heading { font-weight: 600; font-size: 13px }
  .soft { fill: #59636e }
  .grid { stroke: #d1d9e0 }
  .one { stroke: #59636e }
  .faster { fill: #1a7f37 }
  .slower { fill: #9a6700 }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 }
    .soft { fill: #9198a1 }
    .grid { stroke: #3d444d }
    .one { stroke: #9198a1 }
    .faster { fill: #3fb950 }
    .slower { fill: #d29922 }
  }
"""


@dataclass(frozen=True, slots=True)
class Bar:
    """A case: its fastest peer, and how many times as long as castile that takes."""

    name: str
    peer: str
    ratio: float


def bars(rows: Iterable[Mapping[str, Any]]) -> list[Bar]:
    """The cases of a file of rows, by their newest rows that are not void.

    Of rounds that were timed in turn the median ratio counts where there is one, else the ratio of medians.
    """
    found: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        if not row.get("void"):
            found.setdefault(row["name"], {})[row["candidate"]] = row
    made = []
    for name, candidates in found.items():
        own = candidates.pop("castile", None)
        if own and candidates:
            seconds = {peer: row["seconds"]["median"] for peer, row in candidates.items()}
            peer = min(seconds, key=lambda p: seconds[p])
            paired = own.get("ratio") if own.get("baseline") == peer else None
            made.append(Bar(name, peer, paired["median"] if paired else seconds[peer] / own["seconds"]["median"]))
    return made


def draw(cases: Iterable[Bar]) -> str:
    """The drawing as SVG, the same for the same bars."""
    cases = list(cases)
    y, lines = 2 * MARGIN + 8, []
    for family, begins in FAMILIES:
        # Of two beginnings that fit the longer one says where a case belongs.
        own = [c for c in cases if _family(c.name) == family]
        if not own:
            continue
        lines.append(f'<text class="heading" x="{MARGIN}" y="{y + 18}">{escape(family)}</text>')
        y += HEADING
        for c in sorted(own, key=lambda c: (begins.index(_beginning(c.name)), _natural(c.name))):
            lines += _bar(c, y)
            y += LINE
    width, height = LEFT + round((MOST - LEAST) * DOUBLING) + 8 * MARGIN, y + MARGIN
    grid = []
    for power in range(math.ceil(LEAST), math.floor(MOST) + 1):
        x, kind = _place(2.0**power), "one" if power == 0 else "grid"
        grid.append(f'<line class="{kind}" x1="{x}" y1="{2 * MARGIN}" x2="{x}" y2="{y}"/>')
        grid.append(f'<text class="soft" x="{x}" y="{MARGIN + 8}" text-anchor="middle">{2**power}×</text>')
    title = "How many times as long the fastest peer takes"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
    body = [head, f"<title>{title}</title>", f"<style>{STYLE}</style>", *grid, *lines, "</svg>"]
    return "\n".join(body) + "\n"


def _beginning(name: str) -> str:
    fits = [b for _, begins in FAMILIES for b in begins if name.startswith(b)]
    return max(fits, key=len, default="")


def _family(name: str) -> str:
    return next((family for family, begins in FAMILIES if _beginning(name) in begins), "")


def _natural(name: str) -> list[tuple[int, str]]:
    """A key by which 2 comes before 16."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]


def _place(ratio: float) -> int:
    return LEFT + round((min(max(math.log2(ratio), LEAST), MOST) - LEAST) * DOUBLING)


def _bar(c: Bar, y: int) -> list[str]:
    one, end = _place(1.0), _place(c.ratio)
    kind = "faster" if c.ratio >= 1 else "slower"
    ratio = f"{c.ratio:.2f}" + (" →" if math.log2(c.ratio) > MOST else "")
    return [
        f'<text x="{MARGIN}" y="{y + 13}">{escape(c.name)}</text>',
        f'<rect class="{kind}" x="{min(one, end)}" y="{y + 3}" width="{max(1, abs(end - one))}" height="{LINE - 6}"/>',
        f'<text x="{max(one, end) + 6}" y="{y + 13}">{ratio} <tspan class="soft">{escape(c.peer)}</tspan></text>',
    ]


def main() -> None:
    rows = [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()]
    DRAWING.write_text(draw(bars(rows)), encoding="utf-8")


if __name__ == "__main__":
    main()
