"""Draw a cascade: the DAG of its Einsums as one self-contained SVG, readable on light and dark pages.

`layout` says where things lie; here is what a box says and how it looks.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from ..ir.cascade import Cascade, Einsum, tensors_read
from ..ir.ops import REDUCTIONS
from ..ir.print import print_einsum, print_expr, print_param
from ..ir.types import tensor_types
from ..ir.verify import scan_step
from .count import count_passes, traversals
from .explain import does
from .layout import Layout, Node, lay_out
from .work import is_contraction

# Sizes in SVG units. A character of a monospaced font is 0.6 em wide; the rest is slack.
HEAD, TITLE, SMALL = 18.0, 13.5, 11.5
ADVANCE = 0.61
LINE, PAD, STRIPE = 17.0, 12.0, 4.0
GAP_X, GAP_Y, MARGIN = 26.0, 44.0, 28.0
WRAP, MAX_LINES = 56, 2

# What a box can be, in the order of the legend, with its colour on light and on dark pages.
KINDS = (
    ("input", "#8c959f", "#7d8590"),
    ("contraction", "#0969da", "#58a6ff"),
    ("reduction", "#1a7f37", "#3fb950"),
    ("scan", "#8250df", "#bc8cff"),
    ("monoid", "#bf3989", "#f778ba"),
    ("map", "#57606a", "#adbac7"),
)

_LIGHT = "#ffffff #1f2328 #59636e #f6f8fa #d1d9e0 #8c959f #9a6700".split()
_DARK = "#0d1117 #e6edf3 #9198a1 #151b23 #3d444d #7d8590 #e3b341".split()


@dataclass(frozen=True, slots=True)
class Box:
    """A parameter or an Einsum: its kind, its lines (the first is the title) and its size."""

    name: str
    kind: str
    lines: tuple[str, ...]
    hint: str
    result: bool

    @property
    def width(self) -> float:
        if self.kind == "input":
            return len(self.lines[0]) * SMALL * ADVANCE + 2 * PAD + 8
        title = len(self.lines[0]) * TITLE + (8 * SMALL if self.result else 0)
        widest = max([title, *(len(line) * SMALL for line in self.lines[1:])])
        return widest * ADVANCE + 2 * PAD + STRIPE

    @property
    def height(self) -> float:
        if self.kind == "input":
            return 28.0
        return len(self.lines) * LINE + 2 * PAD - 6


@dataclass(frozen=True, slots=True)
class Edge:
    """A box reads another; ``barrier`` names the rank whose whole traversal it waits for, "" for none."""

    source: str
    target: str
    barrier: str


def to_svg(c: Cascade) -> str:
    """The drawing, as the text of an SVG file.

    Boxes are parameters and Einsums, top to bottom; a dashed amber edge is a barrier: what it leads to waits until its
    source has seen a whole rank, so that rank is traversed once more.
    """
    boxes, edges = boxes_of(c), edges_of(c)
    place = {name: number for number, name in enumerate(boxes)}
    nodes = [Node(box.width, box.height, box.kind == "input") for box in boxes.values()]
    layout = lay_out(nodes, [(place[e.source], place[e.target]) for e in edges], GAP_X, GAP_Y)
    return _svg(c, boxes, edges, layout)


def boxes_of(c: Cascade) -> dict[str, Box]:
    """A box for each tensor that is a parameter and read, and for each Einsum. Scalars stand below the title."""
    read = {t for e in c.einsums for t in tensors_read(e.expr)}
    found = {}
    for p in c.params:
        if p.indices and p.name in read:
            found[p.name] = Box(p.name, "input", (print_param(p),), "parameter " + print_param(p), False)
    types, passes, counted = tensor_types(c), count_passes(c), traversals(c)
    for e in c.einsums:
        turns = [
            f"pass {counted[r][e.name]} of {n} over {r}" for r, n in passes.items() if n > 1 and e.name in counted[r]
        ]
        names = ", ".join(_written(o.name, o.ranks) + f": {types[o.name]}" for o in e.outputs)
        lines = (names, *_wrapped("= " + print_expr(e.expr)), does(e), *turns)
        found[e.name] = Box(e.name, kind_of(e), lines, print_einsum(e), any(o.name in c.outputs for o in e.outputs))
    return found


def _written(name: str, ranks: Sequence[str]) -> str:
    return f"{name}[{', '.join(ranks)}]" if ranks else name


def _wrapped(text: str) -> list[str]:
    lines = textwrap.wrap(text, WRAP, subsequent_indent="    ", break_on_hyphens=False)
    if len(lines) > MAX_LINES:
        lines = [*lines[: MAX_LINES - 1], lines[MAX_LINES - 1][: WRAP - 2] + " …"]
    return lines


def kind_of(e: Einsum) -> str:
    """The name of the Einsum's row in `KINDS`."""
    if scan_step(e) is not None:
        return "scan"
    if any(r.op not in REDUCTIONS for r in e.reductions):
        return "monoid"
    if any(is_contraction(r) for r in e.reductions):
        return "contraction"
    return "reduction" if e.reductions else "map"


def edges_of(c: Cascade) -> list[Edge]:
    """One edge for each box and each box that it reads, in order."""
    counted = traversals(c)
    writer = {o.name: e.name for e in c.einsums for o in e.outputs}
    found: dict[tuple[str, str], Edge] = {}
    for e in c.einsums:
        for tensor in tensors_read(e.expr):
            source = writer.get(tensor, tensor)
            if source == e.name or (tensor in c.param_of and not c.param_of[tensor].indices):
                continue
            ranks = (
                next((o.ranks for o in c.einsum_of[tensor].outputs if o.name == tensor), ()) if tensor in writer else ()
            )
            waits = [
                r
                for r, turns in counted.items()
                if r not in ranks and turns.get(e.name, 0) > turns.get(tensor, len(c.einsums)) and tensor in writer
            ]
            old = found.get((source, e.name))
            found[source, e.name] = Edge(source, e.name, waits[0] if waits else old.barrier if old else "")
    return list(found.values())


# SVG


def _svg(c: Cascade, boxes: Mapping[str, Box], edges: Sequence[Edge], layout: Layout) -> str:
    legend, legend_width = _legend(boxes, edges)
    scalars = ", ".join(print_param(p) for p in c.params if not p.indices)
    heading = max(len(c.name) * HEAD, len(scalars) * SMALL) * ADVANCE
    width = 2 * MARGIN + max(layout.width, legend_width, heading)
    top = MARGIN + HEAD + (40 if scalars else 22)
    height = top + layout.height + 58 + MARGIN / 2
    size = f'viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">',
        f"<title>{escape(c.name)}: {len(c.einsums)} Einsums</title>",
        f"<style>{_style()}</style>",
        '<rect class="page" width="100%" height="100%"/>',
        f'<text class="head" x="{MARGIN:g}" y="{MARGIN + 14:g}">{escape(c.name)}</text>',
        f'<text class="note" x="{MARGIN:g}" y="{MARGIN + 34:g}">{escape(scalars)}</text>',
        f'<g transform="translate({MARGIN:g},{top:g})">',
        *(_edge(edge, points) for edge, points in zip(edges, layout.edges, strict=True)),
        *(_box(box, x, y) for box, (x, y) in zip(boxes.values(), layout.corners, strict=True)),
        "</g>",
        f'<g transform="translate({MARGIN:g},{top + layout.height + 48:.0f})">{legend}</g>',
        "</svg>\n",
    ]
    return "\n".join(parts)


def _box(box: Box, x: float, y: float) -> str:
    parts = [f'<g class="{box.kind}{" result" * box.result}"><title>{escape(box.hint)}</title>']
    radius = box.height / 2 if box.kind == "input" else 6.0
    size = f'width="{box.width:.1f}" height="{box.height:.1f}" rx="{radius:.1f}"'
    parts.append(f'<rect class="box" x="{x:.1f}" y="{y:.1f}" {size}/>')
    if box.kind == "input":
        at = f'x="{x + box.width / 2:.1f}" y="{y + box.height / 2 + 4:.1f}" text-anchor="middle"'
        return "".join([*parts, f'<text class="code" {at}>{escape(box.lines[0])}</text></g>'])
    stripe = f'x="{x + 5:.1f}" y="{y + 6:.1f}" width="{STRIPE:g}" height="{box.height - 12:.1f}" rx="2"'
    parts.append(f'<rect class="stripe" {stripe}/>')
    for number, line in enumerate(box.lines):
        style = "name" if number == 0 else "code" if line.startswith(("= ", "  ")) else "note"
        indent = (len(line) - len(line.lstrip())) * SMALL * ADVANCE
        at = f'x="{x + PAD + STRIPE + indent:.1f}" y="{y + PAD + 9 + number * LINE:.1f}"'
        parts.append(f'<text class="{style}" {at}>{escape(line.strip())}</text>')
    if box.result:
        at = f'x="{x + box.width - PAD:.1f}" y="{y + PAD + 9:.1f}" text-anchor="end"'
        parts.append(f'<text class="note tag" {at}>result</text>')
    return "".join(parts) + "</g>"


def _edge(edge: Edge, points: Sequence[tuple[float, float]]) -> str:
    (x, y), *rest = points
    d = f"M{x:.1f},{y:.1f}"
    for nx, ny in rest:
        bend = (ny - y) / 2
        d += f" C{x:.1f},{y + bend:.1f} {nx:.1f},{ny - bend:.1f} {nx:.1f},{ny:.1f}" if x != nx else f" V{ny:.1f}"
        x, y = nx, ny
    words = f"{edge.target} reads {edge.source}"
    if edge.barrier:
        words = f"{edge.target} waits until {edge.source} has seen all of {edge.barrier}"
    style = "edge barrier" if edge.barrier else "edge"
    tip = f'<path class="tip" d="M{x:.1f},{y:.1f} l-4,-7.5 h8 z"/>'
    return f'<g class="{style}"><title>{escape(words)}</title><path class="line" d="{d}"/>{tip}</g>'


def _legend(boxes: Mapping[str, Box], edges: Sequence[Edge]) -> tuple[str, float]:
    """The legend, of what occurs in the drawing, and its width."""
    used = {box.kind for box in boxes.values()}
    parts, x = [], 0.0
    for kind, *_ in KINDS:
        if kind in used:
            parts.append(
                f'<g class="{kind}"><rect class="stripe" x="{x:.0f}" y="-9" width="10" height="10" rx="2"/></g>'
            )
            parts.append(f'<text class="note" x="{x + 16:.0f}" y="0">{kind}</text>')
            x += 16 + len(kind) * SMALL * ADVANCE + 18
    if any(edge.barrier for edge in edges):
        words = "waits for a whole pass"
        parts.append(f'<g class="barrier"><path class="line" d="M{x:.0f},-4 h20"/></g>')
        parts.append(f'<text class="note" x="{x + 26:.0f}" y="0">{words}</text>')
        x += 26 + len(words) * SMALL * ADVANCE
    return "".join(parts), x


def _style() -> str:
    """Colours for light pages, then those that dark pages override."""
    fonts = 'ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace'
    fixed = (
        f"text{{font-family:{fonts};white-space:pre}}"
        f".head{{font-size:{HEAD:g}px;font-weight:700}}.name{{font-size:{TITLE:g}px;font-weight:700}}"
        f".code,.note{{font-size:{SMALL:g}px}}.tag{{font-weight:700}}"
        ".line{fill:none;stroke-width:1.4}.barrier .line{stroke-width:2;stroke-dasharray:6 4}"
        ".box{stroke-width:1}.result .box{stroke-width:2}"
    )
    return fixed + _colours(_LIGHT, 1) + f"@media(prefers-color-scheme:dark){{{_colours(_DARK, 2)}}}"


def _colours(page: Sequence[str], column: int) -> str:
    back, ink, soft, fill, rim, line, wait = page
    rules = [
        f".page{{fill:{back}}}.head,.name{{fill:{ink}}}.code{{fill:{ink}}}.note{{fill:{soft}}}",
        f".box{{fill:{fill};stroke:{rim}}}.input .box{{fill:{back}}}.line{{stroke:{line}}}.tip{{fill:{line}}}",
        f".barrier .line{{stroke:{wait}}}.barrier .tip{{fill:{wait}}}",
    ]
    for row in KINDS:
        rules.append(f".{row[0]} .stripe{{fill:{row[column]}}}.result.{row[0]} .box{{stroke:{row[column]}}}")
    return "".join([*rules, f".tag{{fill:{ink}}}"])
