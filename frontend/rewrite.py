"""A graph with its regions replaced: each is one call, the rest as before, all in an order in which it can run."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from operator import getitem
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from ..ir.errors import CastileError
from .nodes import RESHAPES, fakes, is_impure, op_name
from .partition import Region
from .region import RegionCall

# What runs as one: an operation of the graph, or a region by its number.
Unit = Node | int

# The same operations by the shorter way from Python.
SHORTER: Mapping[str, Callable[..., Any]] = {
    "view.default": torch.Tensor.view, "t.default": torch.t, "transpose.int": torch.transpose,
    "permute.default": torch.permute, "unsqueeze.default": torch.unsqueeze, "mm.default": torch.mm,
    "bmm.default": torch.bmm, "addmm.default": torch.addmm,
}  # fmt: skip


def rewritten(gm: GraphModule, calls: Sequence[tuple[Region, RegionCall]]) -> GraphModule:
    """A copy of the graph in which each region is one call.

    Views in another shape copy where they must: what an operation gives may lie otherwise than the trace says.
    """
    graph = Graph()
    env: dict[Node, Node] = {}
    for unit in ordered(list(gm.graph.nodes), calls):
        if isinstance(unit, Node):
            env[unit] = graph.node_copy(unit, env.__getitem__)
            name = op_name(unit)
            env[unit].target = torch.reshape if name in RESHAPES else SHORTER.get(name, unit.target)
            continue
        _, call = calls[unit]
        made = graph.call_function(call, tuple(env[n] for n in call.leaves))
        for i, (n, k, _) in enumerate(call.lowered.results):
            item = graph.call_function(getitem, (made, i))
            item.meta["val"] = fakes(n)[max(0, k)]
            if k < 0:
                env[n] = item
            else:
                for u in n.users:
                    if op_name(u) == "getitem" and u.args[1] == k:
                        env[u] = item
    return GraphModule(gm, graph)


def ordered(nodes: Sequence[Node], calls: Sequence[tuple[Region, RegionCall]]) -> list[Unit]:
    """What is needed, each after what it needs, else in the order of the graph: nodes, and calls by their number."""
    at = {n: i for i, n in enumerate(nodes)}
    owner = {n: c for c, (region, _) in enumerate(calls) for n in region.nodes}

    def unit_of(n: Node) -> Unit:
        if n in owner:
            return owner[n]
        if op_name(n) == "getitem" and n.args[0] in owner:
            return owner[n.args[0]]  # type: ignore[index]
        return n

    def needs(unit: Unit) -> set[Unit]:
        read = unit.all_input_nodes if isinstance(unit, Node) else calls[unit][1].leaves
        found = {unit_of(n) for n in read}
        if unit in before:
            found.add(before[unit])
        return found

    before: dict[Unit, Unit] = {}
    impure: list[Node] = [n for n in nodes if n.op == "call_function" and is_impure(n)]
    for earlier, later in pairwise(impure):
        before[later] = earlier
    wanted: dict[Unit, set[Unit]] = {}
    todo: list[Unit] = [*(n for n in nodes if n.op in ("placeholder", "output")), *impure]
    while todo:
        unit = todo.pop()
        if unit not in wanted:
            wanted[unit] = needs(unit)
            todo += wanted[unit]
    place = {u: at[u] if isinstance(u, Node) else at[calls[u][0].nodes[-1]] for u in wanted}
    waiting = {u: len(n) for u, n in wanted.items()}
    readers: dict[Unit, list[Unit]] = {u: [] for u in wanted}
    for u, found in wanted.items():
        for n in found:
            readers[n].append(u)
    # Placeholders first and in their order, whoever reads them.
    heap = [(place[u], i, u) for i, u in enumerate(wanted) if not waiting[u]]
    heapq.heapify(heap)
    ordered: list[Unit] = []
    count = len(heap)
    while heap:
        _, _, u = heapq.heappop(heap)
        ordered.append(u)
        for r in readers[u]:
            waiting[r] -= 1
            if not waiting[r]:
                count += 1
                heapq.heappush(heap, (place[r], count + len(wanted), r))
    if len(ordered) != len(wanted):
        raise CastileError("the regions of a graph wait for each other", hint="please report this model")
    return ordered
