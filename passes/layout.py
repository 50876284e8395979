"""Lay out a layered graph: which layer a box is in, in what order, and where.

The method of Sugiyama, Tagawa and Toda (1981): each box lies below what it reads; the order within a layer comes from
the mean of the neighbours; places along a layer are the least-squares ones that keep boxes apart.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

Point = tuple[float, float]
Layers = list[list[int]]

# How strongly a piece of an edge pulls, by how many of its ends are bends of a long edge: long edges run straight.
PULL = (1.0, 2.0, 16.0)
ORDER_SWEEPS, PLACE_SWEEPS = 24, 40


@dataclass(frozen=True, slots=True)
class Node:
    """A box to place: its size, and whether it floats down to just above its first reader."""

    width: float
    height: float
    floats: bool = False


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything lies: the top left corner of each node, each edge's points, and the whole size.

    An edge leaves the middle of its source's lower side; between layers it bends, through a layer it runs straight.
    """

    corners: tuple[Point, ...]
    edges: tuple[tuple[Point, ...], ...]
    width: float
    height: float


def lay_out(nodes: Sequence[Node], edges: Sequence[tuple[int, int]], gap_x: float, gap_y: float) -> Layout:
    """Place nodes in layers from top to bottom. ``edges`` come in an order in which a source precedes its readers."""
    level = _levels(nodes, edges)
    layers: Layers = [[] for _ in range(max(level, default=-1) + 1)]
    for n, depth in enumerate(level):
        layers[depth].append(n)
    widths = [node.width for node in nodes]
    paths = []
    for source, target in edges:
        path = [source]
        for depth in range(level[source] + 1, level[target]):
            layers[depth].append(len(widths))
            path.append(len(widths))
            widths.append(gap_x / 2)
        paths.append([*path, target])
    above, below = _neighbours(len(widths), paths)
    _order(layers, above, below)
    middles = _middles(layers, above, below, widths, len(nodes), gap_x)
    heights = [max((nodes[n].height for n in layer if n < len(nodes)), default=0.0) for layer in layers]
    tops = [0.0]
    for height in heights:
        tops.append(tops[-1] + height + gap_y)
    lines = tuple(_line(path, paths, nodes, level, middles, tops, heights) for path in paths)
    corners = tuple(
        (middles[n] - node.width / 2, tops[level[n]] + (heights[level[n]] - node.height if node.floats else 0.0))
        for n, node in enumerate(nodes)
    )
    right = max((m + w / 2 for m, w in zip(middles, widths, strict=True)), default=0.0)
    return Layout(corners, lines, right, max(0.0, tops[-1] - gap_y))


def _levels(nodes: Sequence[Node], edges: Sequence[tuple[int, int]]) -> list[int]:
    """The longest path from the top; a node that floats stands just above the first that reads it."""
    level = [0 if node.floats else 1 for node in nodes]
    readers: dict[int, list[int]] = {}
    for source, target in edges:
        readers.setdefault(source, []).append(target)
        if not nodes[source].floats:
            level[target] = max(level[target], level[source] + 1)
    for n, node in enumerate(nodes):
        if node.floats:
            level[n] = min((level[r] for r in readers.get(n, ())), default=1) - 1
    least = min(level, default=0)
    return [depth - least for depth in level]


def _neighbours(count: int, paths: Sequence[Sequence[int]]) -> tuple[list[list[int]], list[list[int]]]:
    above: list[list[int]] = [[] for _ in range(count)]
    below: list[list[int]] = [[] for _ in range(count)]
    for path in paths:
        for a, b in pairwise(path):
            above[b].append(a)
            below[a].append(b)
    return above, below


def _order(layers: Layers, above: Sequence[Sequence[int]], below: Sequence[Sequence[int]]) -> None:
    """Order every layer by the mean of its neighbours, down and up in turn; the order with fewest crossings stays."""
    best, fewest = [list(layer) for layer in layers], _crossings(layers, below)
    position = {n: i for layer in layers for i, n in enumerate(layer)}
    for sweep in range(ORDER_SWEEPS):
        near, rows = (above, layers) if sweep % 2 == 0 else (below, layers[::-1])
        for layer in rows:
            wanted = {n: _mean([position[m] for m in near[n]], position[n]) for n in layer}
            layer.sort(key=wanted.__getitem__)
            position.update({n: i for i, n in enumerate(layer)})
        crossings = _crossings(layers, below)
        if crossings < fewest:
            best, fewest = [list(layer) for layer in layers], crossings
    layers[:] = best


def _crossings(layers: Layers, below: Sequence[Sequence[int]]) -> int:
    count = 0
    for upper, lower in pairwise(layers):
        position = {n: i for i, n in enumerate(lower)}
        seen: list[int] = []
        for n in upper:
            ends = sorted(position[m] for m in below[n])
            count += sum(len(seen) - bisect_right(seen, end) for end in ends)
            for end in ends:
                insort(seen, end)
    return count


def _mean(values: Sequence[float], default: float) -> float:
    return sum(values) / len(values) if values else default


def _middles(
    layers: Layers,
    above: Sequence[Sequence[int]],
    below: Sequence[Sequence[int]],
    widths: Sequence[float],
    real: int,
    gap: float,
) -> list[float]:
    """The horizontal middle of everything: near the mean of its neighbours, apart from what stands beside it."""
    middles = [0.0] * len(widths)
    for layer in layers:
        x = 0.0
        for n in layer:
            middles[n] = x + widths[n] / 2
            x += widths[n] + gap
    for sweep in range(PLACE_SWEEPS):
        both = sweep >= PLACE_SWEEPS // 2
        for layer in layers if sweep % 2 == 0 else layers[::-1]:
            wanted, weights = [], []
            for n in layer:
                near = [*above[n], *below[n]] if both else (above if sweep % 2 == 0 else below)[n]
                pulls = [PULL[(n >= real) + (m >= real)] for m in near]
                weights.append(sum(pulls) or 0.1)
                pulled = sum(pull * middles[m] for pull, m in zip(pulls, near, strict=True))
                wanted.append(pulled / weights[-1] if near else middles[n])
            for n, x in zip(layer, _apart(wanted, weights, [widths[n] for n in layer], gap), strict=True):
                middles[n] = x
    left = min((m - w / 2 for m, w in zip(middles, widths, strict=True)), default=0.0)
    return [m - left for m in middles]


def _apart(wanted: Sequence[float], weights: Sequence[float], widths: Sequence[float], gap: float) -> list[float]:
    """The places closest to those wanted, in the least-squares sense, that keep order and distance.

    With the distances subtracted, places need only not decrease: isotonic regression, by pooling adjacent violators.
    """
    offsets = [0.0]
    for a, b in pairwise(widths):
        offsets.append(offsets[-1] + (a + b) / 2 + gap)
    pools: list[tuple[float, float, int]] = []
    for want, offset, weight in zip(wanted, offsets, weights, strict=True):
        value, mass, count = want - offset, weight, 1
        while pools and pools[-1][0] > value:
            before, old, more = pools.pop()
            value, mass, count = (before * old + value * mass) / (old + mass), old + mass, count + more
        pools.append((value, mass, count))
    flat = [value for value, _, count in pools for _ in range(count)]
    return [value + offset for value, offset in zip(flat, offsets, strict=True)]


def _drop(node: Node, height: float) -> float:
    """How far a node's lower side lies above its layer's; those that float stand on it."""
    return 0.0 if node.floats else height - node.height


def _line(
    path: Sequence[int],
    paths: Sequence[Sequence[int]],
    nodes: Sequence[Node],
    level: Sequence[int],
    middles: Sequence[float],
    tops: Sequence[float],
    heights: Sequence[float],
) -> tuple[Point, ...]:
    """The points of an edge; where several meet at one box, they arrive side by side in the order of their origins."""
    source, target = path[0], path[-1]
    leaves = tops[level[source]] + heights[level[source]]
    points = [(middles[source], leaves - _drop(nodes[source], heights[level[source]])), (middles[source], leaves)]
    for depth, n in enumerate(path[1:-1], level[source] + 1):
        points += [(middles[n], tops[depth]), (middles[n], tops[depth] + heights[depth])]
    arriving = sorted((p for p in paths if p[-1] == target), key=lambda p: middles[p[-2]])
    spread = min(nodes[target].width * 0.6, 34.0 * (len(arriving) - 1))
    place = next(i for i, p in enumerate(arriving) if p is path) / max(1, len(arriving) - 1) - 0.5
    shift = place * spread if len(arriving) > 1 else 0.0
    return (*points, (middles[target] + shift, tops[level[target]]))
