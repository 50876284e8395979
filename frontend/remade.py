"""What a backward graph makes anew: positions and masks that are made of nothing are not kept from the forward pass.

Kept, a mask has to be stored by the forward graph, and the backward graph reads numbers of which nobody knows what they
leave out. Made where they are read, both are coordinates.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from .nodes import fakes, is_impure, op_name

# Operations that take a tensor for its size alone: what they fill another with, or which argument says it.
FILLED_WITH = {"new_ones": 1, "ones_like": 1, "new_zeros": 0, "zeros_like": 0}
FILLED_BY = {"new_full": 2, "full_like": 1}


def partition(joint: GraphModule, inputs: Any, **given: Any) -> tuple[GraphModule, GraphModule]:
    """PyTorch's own cut of a joint graph in two, after which the backward graph makes for itself what is free."""
    from torch._functorch.partitioners import default_partition

    _make_anew(joint.graph)
    forward, backward = default_partition(joint, inputs, **given)
    return forward, backward


def _make_anew(graph: Graph) -> None:
    """Let what waits for a gradient read copies of what is made of nothing, behind the forward part."""
    after: dict[Node, None] = {}  # in their order
    free: set[Node] = set()
    for n in graph.nodes:
        if (n.op == "placeholder" and "tangents" in str(n.target)) or any(a in after for a in n.all_input_nodes):
            after[n] = None
        elif _is_free(n, free):
            free.add(n)
    copies: dict[Node, Node] = {}
    readers = [n for n in after if n.op == "call_function"]
    for reader in readers:
        for source in reader.all_input_nodes:
            if source in free:
                reader.replace_input_with(source, _copied(graph, source, readers[0], free, copies))


def _is_free(n: Node, free: set[Node]) -> bool:
    """Whether a node computes tensors of no tensor but such ones, the same whenever it is asked."""
    if n.op != "call_function" or not isinstance(n.target, torch._ops.OpOverload) or n.target.namespace != "aten":
        return False
    if _filled(n) is not None:
        return True
    tensors = [a for a in n.all_input_nodes if not isinstance(a.meta.get("val"), torch.SymInt)]
    if not free.issuperset(tensors) or is_impure(n):
        return False
    return all(isinstance(f, torch.Tensor) for f in fakes(n))


def _filled(n: Node) -> Any:
    """The number that a node fills a tensor with, of which another only tells the size; None for anything else."""
    name = op_name(n).split(".")[0]
    value: Any = FILLED_WITH.get(name)
    if name in FILLED_BY and len(n.args) > FILLED_BY[name]:
        value = n.args[FILLED_BY[name]]
    if not isinstance(value, (int, float)):
        return None
    (fake,) = fakes(n)
    static = all(isinstance(s, int) for s in fake.shape)
    return value if static and fake.is_contiguous() else None


def _copied(graph: Graph, n: Node, before: Node, free: set[Node], copies: dict[Node, Node]) -> Node:
    """A node's copy, and those of what it is made of, in front of another node."""
    if n in free and n not in copies:
        value = _filled(n)
        for a in n.all_input_nodes if value is None else ():
            _copied(graph, a, before, free, copies)
        with graph.inserting_before(before):
            if value is None:
                copies[n] = graph.node_copy(n, lambda a: copies.get(a, a))
            else:
                (fake,) = fakes(n)
                kind = {"dtype": fake.dtype, "device": fake.device}
                copies[n] = graph.call_function(torch.ops.aten.full.default, (list(fake.shape), value), kind)
        copies[n].meta = {**n.meta, "partitioner_tag": "is_backward"}
    return copies.get(n, n)
