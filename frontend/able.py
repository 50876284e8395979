"""Which nodes of an ATen graph castile can say: each is tried alone, and what cannot be said has a reason."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from ..ir.errors import CastileError
from .aten import HANDLERS
from .fx import Lowering
from .nodes import CREATION, FLEX, fakes, is_map, is_view, jumps, op_name, tensors_of


class Able:
    """The nodes of one graph that have a cascade, ``able``; ``why`` tells of others why they have none."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.why: dict[Node, str] = {}
        self._known: dict[Any, str] = {}
        self.able = {n for n in graph.nodes if n.op == "call_function" and self._is_able(n)}
        self._leave_what_jumps()

    def _is_able(self, node: Node) -> bool:
        name = op_name(node)
        if name == "getitem":
            return isinstance(node.args[0], Node) and op_name(node.args[0]) in HANDLERS
        if name not in HANDLERS and name != FLEX:
            self.why[node] = f"`{name or node.target}` has no cascade"
            return False
        if _cancels(node):
            self.why[node] = "what is infinite or no number does not cancel"
            return False
        signature = _signature(node)
        if signature not in self._known:
            self._known[signature] = self._trial(node)
        if self._known[signature]:
            self.why[node] = self._known[signature]
        return not self._known[signature]

    def _trial(self, node: Node) -> str:
        """Why a node alone has no cascade; "" if it has one."""
        for x in (*tensors_of(node), *(t for a in node.all_input_nodes for t in tensors_of(a))):
            if x.device.type != "cpu":
                return f"a tensor on {x.device.type}"
            if any(isinstance(n, int) and n == 0 for n in x.shape):
                return "an empty tensor"
        try:
            lowering = Lowering()
            for a in node.all_input_nodes:
                if tensors_of(a):
                    if len(fakes(a)) > 1 or isinstance(a.meta.get("val"), (tuple, list)):
                        return "a result of several tensors"
                    lowering.take(a)
            lowering.lower(node, False)
            if not is_view(node) and op_name(node) not in CREATION:
                _finish_alone(lowering, node)
        except CastileError as error:
            return error.message
        except (TypeError, IndexError, KeyError, ValueError, AttributeError):
            return f"`{op_name(node)}` is called in a way that castile does not know"
        return ""

    def _leave_what_jumps(self) -> None:
        """What becomes an integer jumps where its last bit does: eager computes it, and the floats that lead there."""
        todo = [n for n in self.able if jumps(n)]
        seen: set[Node] = set()
        while todo:
            n = todo.pop()
            if n in seen or n not in self.able:
                continue
            seen.add(n)
            self.able.discard(n)
            self.why[n] = "it becomes an integer, and a last bit would decide which"
            for a in n.all_input_nodes:
                floats = any(f.is_floating_point() for f in tensors_of(a))
                if floats and (is_view(a) or is_map(op_name(a))):
                    todo.append(a)


def _cancels(node: Node) -> bool:
    """Whether algebra takes an operation for a number: x - x, x / x, x * 0, by which code asks what is finite."""
    name, (a, *more) = op_name(node).split(".")[0], (*node.args, None)
    if not any(f.is_floating_point() for f in tensors_of(node)):
        return False
    same = isinstance(a, Node) and more[:1] == [a] and not node.kwargs
    return (name in ("sub", "div") and same) or (name == "mul" and 0 in (a, more[0]))


def _signature(node: Node) -> Any:
    def of(a: Any) -> Any:
        if isinstance(a, Node):
            return tuple(
                (f.dtype, tuple(map(str, f.shape)), f.device.type) if isinstance(f, torch.Tensor) else str(f)
                for f in fakes(a)
            )
        if isinstance(a, (list, tuple)):
            return tuple(map(of, a))
        return (type(a).__name__, str(a))

    return (op_name(node), of(node.args), of(tuple(sorted(node.kwargs.items()))), of(node), _used(node))


def _used(node: Node) -> tuple[Any, ...]:
    return tuple(sorted(str(u.args[1]) for u in node.users if op_name(u) == "getitem"))


def _finish_alone(lowering: Lowering, node: Node) -> None:
    lowering.finish([node], "trial")
