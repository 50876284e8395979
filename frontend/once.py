"""What a graph computes twice is computed once: eager's copies of a bias for every layer, positions, masks."""

from __future__ import annotations

from operator import getitem
from typing import Any

import torch
from torch.fx import Graph, Node

from .nodes import fakes, is_impure


def once(graph: Graph) -> None:
    """Let later nodes that say the same as an earlier one be that one, in place.

    Results of a graph, and whatever shares their memory, stay apart as they are in eager; what draws random numbers or
    writes memory is never taken together, and nothing is taken together across it.
    """
    (output,) = (n for n in graph.nodes if n.op == "output")
    held = {s for n in output.all_input_nodes for s in _storages(n)}
    first: dict[Any, Node] = {}
    for n in list(graph.nodes):
        if n.op != "call_function":
            continue
        if is_impure(n):
            first.clear()
            continue
        key = None if held & _storages(n) else _key(n)
        if key is None:
            continue
        earlier = first.setdefault(key, n)
        if earlier is not n:
            n.replace_all_uses_with(earlier)
            graph.erase_node(n)


def _storages(n: Node) -> set[int]:
    """The memory that a node's results lie in, by the address of what stands for it."""
    return {f.untyped_storage()._cdata for f in fakes(n) if isinstance(f, torch.Tensor) and f.layout is torch.strided}


def _key(n: Node) -> Any:
    """What a node says; None where that cannot be told."""
    if not isinstance(n.target, torch._ops.OpOverload) and n.target is not getitem:
        return None
    try:
        key = (n.target, _said(n.args), _said(n.kwargs))
        hash(key)
    except TypeError:
        return None
    return key


def _said(a: Any) -> Any:
    """An argument with its type: 1, 1.0 and True are equal in Python."""
    if isinstance(a, (list, tuple)):
        return (type(a).__name__, *map(_said, a))
    if isinstance(a, dict):
        return tuple((k, _said(v)) for k, v in sorted(a.items()))
    if isinstance(a, float):
        return ("float", a.hex())
    return (type(a).__name__, a)
