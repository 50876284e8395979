"""Which nodes of an ATen graph become castile regions: what belongs together, and whether it is worth a kernel.

Views and what only spells constants or masks are copied into every region that reads them. Chains of pointwise
operations and reductions are merged along their edges as long as no cycle arises. A matrix product stays with torch
unless a softmax ties it to another product: then both, and what lies between, are one region.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch.fx import Graph, Node

from .able import Able
from .nodes import (
    ARITHMETIC,
    ATTENTION,
    COPIES,
    CREATION,
    DEAR,
    EXTREMES,
    PRODUCTS,
    SOFTMAX,
    TAKEN,
    fakes,
    hint,
    is_impure,
    is_map,
    is_mask,
    is_narrow,
    is_view,
    numel,
    op_name,
    repeats,
    size_bytes,
    tensors_of,
    weight_of,
)

# Why a product is in no region.
ALONE = "a matrix product with nothing to fuse stays with torch unless castile's is faster"

# Operations that stand for several sweeps over their data, by how many eager would take if it spelled them out.
SWEEPS = {
    "_softmax.default": 3, "_safe_softmax.default": 3, "_log_softmax.default": 3, "logsumexp.default": 3,
    "native_layer_norm.default": 3, "_fused_rms_norm.default": 3, "native_layer_norm_backward.default": 4,
    "_softmax_backward_data.default": 3, "_log_softmax_backward_data.default": 3, "var_mean.correction": 2,
    "var.correction": 2, "gelu.default": 2, "gelu_backward.default": 3,
}  # fmt: skip

# The cost rule, in µs and bytes/µs on one core of a common machine: what eager spends on each operation, what a kernel
# spends on each call, and how fast either reads and writes.
EAGER_US = 3.0
CALL_US = 12.0
BYTES_PER_US = 1e4

# Nodes past which a region is left as it is.
LARGEST = 40
# A chain does not join one whose tensors are this much smaller: those are computed once and read often. Where they are
# dear, they are not computed twice; a few steps of arithmetic that nothing else reads cost no more than reading them
# back would.
RATIO = 4
FEW_STEPS = 4
# A mask is computed where it is read if what it is made of is this much smaller.
CHEAP = 4
# Operations from which on a product is raced against torch's.
RACED = 1 << 22


@dataclass
class Region:
    """Nodes that are to become one kernel, in order; ``reason`` says why they do or do not."""

    nodes: list[Node]
    kind: str
    chosen: bool = False
    reason: str = ""
    eager_us: float = 0.0
    castile_us: float = 0.0


@dataclass
class Partition:
    """The regions of a graph, and what else there is with the reason why it runs as before."""

    regions: list[Region] = field(default_factory=list)
    left: dict[Node, str] = field(default_factory=dict)


class Partitioner(Able):
    """Cuts one graph into regions."""

    def __init__(self, graph: Graph, always: bool = False) -> None:
        super().__init__(graph)
        self.always = always
        self.order = {n: i for i, n in enumerate(graph.nodes)}
        self.copied = self._copied()
        self.after = self._in_sequence()
        self.compared = self._compared()
        self.group: dict[Node, int] = {}
        self.members: dict[int, list[Node]] = {}
        self.kinds: dict[int, str] = {}

    def run(self) -> Partition:
        self._attention()
        for node in self.graph.nodes:
            if node in self.able and node not in self.group and not is_view(node) and node not in self.copied:
                if op_name(node) not in PRODUCTS and op_name(node) not in CREATION:
                    self._place(node)
        found = Partition()
        for number, nodes in self.members.items():
            region = Region(sorted(nodes, key=self.order.__getitem__), self.kinds[number])
            self._judge(region)
            found.regions.append(region)
        found.regions.sort(key=lambda r: self.order[r.nodes[0]])
        for node in self.graph.nodes:
            if node.op == "call_function" and node not in self.group and not is_view(node):
                if node in self.copied or op_name(node) in CREATION:
                    continue
                found.left[node] = self.why.get(node) or (ALONE if op_name(node) in PRODUCTS else "")
        return found

    def products(self) -> list[Region]:
        """Layers' products that stay with torch, each as a region: castile's kernel may be faster, which a race tells.

        Their second operand is a matrix among the graph's inputs, as it lies or transposed.
        """
        found = []
        for n in self.graph.nodes:
            if n in self.able and n not in self.group and op_name(n) in ("mm.default", "addmm.default"):
                *bias, a, _ = n.args
                plain = not n.kwargs and all(fakes(x)[0].ndim == 1 for x in bias)
                if plain and fakes(n)[0].dtype in (torch.float32, torch.bfloat16) and weight_of(n) is not None:
                    if 2 * numel(n) * hint(fakes(a)[0].shape[1]) >= RACED:
                        found.append(Region([n], "product", reason="raced against torch's"))
        return found

    # What is copied, what has an order

    def _copied(self) -> set[Node]:
        """Pointwise nodes made of little or nothing: they are computed again wherever they are read."""
        copied: set[Node] = set()
        leaves: dict[Node, set[Node]] = {}
        steps: dict[Node, int] = {}
        plain: set[Node] = set()
        for n in self.graph.nodes:
            name = op_name(n)
            if n in self.able and repeats(n):
                copied.add(n)
                continue
            if n not in self.able or not tensors_of(n) or name in TAKEN or name in PRODUCTS | ATTENTION | COPIES:
                continue
            if name in CREATION:
                copied.add(n)
                plain.add(n)
                leaves[n], steps[n] = set(), 1
                continue
            if not is_view(n) and not is_map(name):
                continue
            below: set[Node] = set()
            count = 1
            for a in n.all_input_nodes:
                if a in leaves and (a in copied or is_view(a)):
                    below |= leaves[a]
                    count += steps[a]
                elif tensors_of(a):
                    below.add(a)
            leaves[n], steps[n] = below, count
            if (is_view(n) or name.split(".")[0] in ARITHMETIC) and all(
                a in plain or a not in leaves or a in below for a in n.all_input_nodes
            ):
                plain.add(n)
            cheap = sum(map(numel, below)) * CHEAP <= numel(n) and count <= LARGEST
            if is_view(n):
                if all(a in copied for a in n.all_input_nodes if tensors_of(a)):
                    copied.add(n)
            elif not all(u in self.able for u in n.users):
                continue  # what leaves for the outside has to be stored by somebody
            elif cheap and (not below or n in plain or tensors_of(n)[0].dtype is torch.bool or is_mask(n)):
                copied.add(n)
        return copied

    def _in_sequence(self) -> dict[Node, list[Node]]:
        """Edges that keep what draws random numbers or writes memory in its order: node to those after it."""
        edges: dict[Node, list[Node]] = {}
        last: Node | None = None
        for n in self.graph.nodes:
            if n.op == "call_function" and is_impure(n):
                if last is not None:
                    edges[last] = [n]
                last = n
        return edges

    def _compared(self) -> list[tuple[Node, Node]]:
        """Extremes and what they are the greatest or least of, where both leave the graph or an equality reads both: it
        looks for the very element, which an extreme that is found by another form of what it is of need not be."""
        found = []
        for n in self.graph.nodes:
            if n in self.able and op_name(n) in EXTREMES:
                mine = set(self._readers(n))
                for source in self._sources(n):
                    both = mine & set(self._readers(source))
                    if any(u.op == "output" or op_name(u).startswith(("eq.", "ne.")) for u in both):
                        found.append((n, source))
        return found

    def _compares(self, nodes: Iterable[Node]) -> bool:
        """Whether among some nodes are an extreme and what it is compared with."""
        inside = set(nodes)
        return any(inside.issuperset(pair) for pair in self.compared)

    # Attention

    def _attention(self) -> None:
        for node in self.graph.nodes:
            if node in self.able and op_name(node) in ATTENTION:
                self._new([node], "attention")
        for node in self.graph.nodes:
            if node in self.able and op_name(node) in PRODUCTS and node not in self.group:
                chain = self._chain(node)
                if chain and not self._compares(chain) and not self._cyclic(set(chain)):
                    self._new(chain, "attention")

    def _chain(self, last: Node) -> list[Node]:
        """A product, the softmax that feeds it, and the product that feeds that; nothing if there is no such chain."""
        above: set[Node] = set()
        firsts: set[Node] = set()
        todo = [a for a in last.all_input_nodes if tensors_of(a)]
        while todo:
            n = todo.pop()
            if n in above or n not in self.able or n in self.group or n in self.copied:
                continue
            if op_name(n) in PRODUCTS:
                firsts.add(n)
                continue
            if op_name(n) in ATTENTION:
                continue
            above.add(n)
            todo += n.all_input_nodes
        found: set[Node] = set()
        for first in firsts:
            below = self._below(first, above)
            if not any(op_name(n) in SOFTMAX for n in below) or not is_narrow(first, last):
                continue
            found |= {first} | {n for n in below if not is_view(n)}
        return sorted(found | {last}, key=self.order.__getitem__) if found else []

    def _below(self, first: Node, within: set[Node]) -> set[Node]:
        found: set[Node] = set()
        todo = [first]
        while todo:
            for u in todo.pop().users:
                if u in within and u not in found:
                    found.add(u)
                    todo.append(u)
        return found

    # Chains

    def _place(self, node: Node) -> None:
        """Join the chains that the node reads, else begin one."""
        mine = self._new([node], "chain")
        for source in self._sources(node):
            number = self.group.get(source)
            mine = self.group[node]
            if number is None or number == mine or self.kinds[number] == "attention":
                continue
            both = self.members[number] + self.members[mine]
            touched = {a for n in self.members[number] for a in (n, *n.all_input_nodes)}
            largest = max(map(numel, touched))
            ratio = 1 if any(op_name(n) in DEAR for n in self.members[number]) else RATIO
            if len(both) > LARGEST or (numel(node) > ratio * largest and not self._is_cheap(number, mine)):
                continue
            if self._compares(both) or self._cyclic(set(both)):
                continue
            self.members[number] = both
            for n in self.members.pop(mine):
                self.group[n] = number
            self.kinds.pop(mine)

    def _is_cheap(self, number: int, only: int) -> bool:
        """Whether a chain is a few steps of arithmetic that only one other chain reads."""
        nodes, readers = self.members[number], (number, only)
        return len(nodes) <= FEW_STEPS and all(
            op_name(n).split(".")[0] in ARITHMETIC and all(self.group.get(u) in readers for u in self._readers(n))
            for n in nodes
        )

    def _new(self, nodes: Iterable[Node], kind: str) -> int:
        nodes = list(nodes)
        number = self.order[nodes[0]]
        self.members[number] = nodes
        self.kinds[number] = kind
        for n in nodes:
            self.group[n] = number
        return number

    def _sources(self, node: Node) -> Iterator[Node]:
        """The nodes that a node reads, through views."""
        todo = list(node.all_input_nodes)
        seen: set[Node] = set()
        while todo:
            a = todo.pop(0)
            if a in seen:
                continue
            seen.add(a)
            if is_view(a) and a in self.able:
                todo += a.all_input_nodes
            else:
                yield a

    def _cyclic(self, nodes: set[Node]) -> bool:
        """Whether some path leaves the nodes and comes back, other regions taken as one node each."""
        latest = max(self.order[n] for n in nodes)
        seen: set[Node] = set()
        outside: list[Node] = []
        todo = list(nodes)
        while todo:
            for u in self._users(todo.pop()):
                if u in nodes or u in seen:
                    continue
                seen.add(u)
                if is_view(u) and u in self.able:
                    todo.append(u)
                else:
                    outside.append(u)
        reached: set[Node] = set()
        while outside:
            n = outside.pop()
            if n in nodes:
                return True
            if n in reached:
                continue
            number = self.group.get(n)
            together = self.members[number] if number is not None else [n]
            reached.update(together)
            for m in together:
                for u in self._users(m):
                    if u in nodes:
                        return True
                    if self.order[u] <= latest or u in self.group:
                        outside.append(u)
        return False

    def _users(self, node: Node) -> list[Node]:
        return [*node.users, *self.after.get(node, ())]

    # Worth

    def _judge(self, region: Region) -> None:
        """Decide by the cost rule: one kernel, against an operation of eager each."""
        inside = set(region.nodes)
        read = {a for n in region.nodes for a in self._sources(n) if a not in inside and tensors_of(a)}
        written = [n for n in region.nodes if any(u not in inside for u in self._readers(n))]
        moved = sum(map(size_bytes, read)) + sum(map(size_bytes, written))
        region.castile_us = CALL_US + moved / BYTES_PER_US
        for n in region.nodes:
            touched = size_bytes(n) + sum(size_bytes(a) for a in n.all_input_nodes if tensors_of(a))
            region.eager_us += EAGER_US + touched * SWEEPS.get(op_name(n), 1) / BYTES_PER_US
        work = [n for n in region.nodes if op_name(n) not in COPIES]
        estimate = f"about {region.castile_us:.0f} µs as a kernel, {region.eager_us:.0f} µs as {len(region.nodes)}"
        if region.kind == "attention":
            region.chosen, region.reason = True, "scores and probabilities never leave the chip"
        elif not work:
            region.reason = "a copy alone gains nothing"
        elif self.always:
            region.chosen, region.reason = True, 'asked for by when="always"'
        else:
            region.chosen = region.castile_us < region.eager_us
            region.reason = estimate + (" operation" if len(region.nodes) == 1 else " operations")

    def leave(self, region: Region, why: str) -> None:
        """Take the first node of a region out of it."""
        first, *rest = region.nodes
        region.nodes = rest
        self.why[first] = why

    def _readers(self, node: Node) -> Iterator[Node]:
        """The nodes that read a node, through views."""
        todo = list(node.users)
        while todo:
            u = todo.pop()
            if is_view(u) and u in self.able:
                todo += u.users
            else:
                yield u
