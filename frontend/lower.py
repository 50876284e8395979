"""The cascade of a region: what it computes, what is computed again within it, and what it takes from outside."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch.fx import Node

from .fx import Lowered, Lowering
from .nodes import CREATION, TAKEN, is_view, op_name, tensors_of
from .partition import Region
from .values import Unsupported


def lower_region(region: Region, able: set[Node], copied: set[Node], name: str) -> Lowered:
    """The cascade of a region. Raises a `CastileError` where there is none."""
    inside = set(region.nodes)
    lowering = Lowering()
    inner: Callable[[Node], bool] = _Inner(inside, able, copied).__call__

    def need(n: Node) -> None:
        if n in lowering.values or not tensors_of(n):
            return
        if n in inside or inner(n):
            _with_inputs(n)
        elif is_view(n) and n in able and op_name(n) not in TAKEN:
            try:
                _with_inputs(n)
            except Unsupported:
                lowering.take(n)
        else:
            lowering.take(n)

    def _with_inputs(n: Node) -> None:
        for a in n.all_input_nodes:
            need(a)
        users = [u for u in n.users if u in inside or inner(u) or is_view(u)]
        lowering.lower(n, len(users) > 1 and n in inside)

    if region.kind == "product":  # its rows are a matrix already, whatever that is a view of
        for a in region.nodes[0].all_input_nodes[:-1]:
            lowering.take(a)
    for n in region.nodes:
        need(n)
    return lowering.finish(outputs_of(region.nodes), name)


class _Inner:
    """Whether a node is computed within a region: copied into it, or a view of what is in it."""

    def __init__(self, inside: set[Node], able: set[Node], copied: set[Node]) -> None:
        self.inside, self.able, self.copied = inside, able, copied
        self.known: dict[Node, bool] = {}

    def __call__(self, n: Node) -> bool:
        found = self.known.get(n)
        if found is None:
            found = self.known[n] = self._ask(n)
        return found

    def _ask(self, n: Node) -> bool:
        if n not in self.able:
            return False
        if n in self.copied or op_name(n) in CREATION:
            return True
        return is_view(n) and any(a in self.inside or self(a) for a in n.all_input_nodes if tensors_of(a))


def outputs_of(nodes: Sequence[Node]) -> list[Node]:
    """The nodes of a region that something outside reads, perhaps through a view."""
    inside = set(nodes)

    def read_outside(n: Node) -> bool:
        return any(u not in inside and (not is_view(u) or read_outside(u)) for u in n.users)

    return [n for n in nodes if read_outside(n)]
