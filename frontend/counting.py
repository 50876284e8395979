"""Integers that a graph makes of nothing: where each is an affine function of its coordinates, a range takes its place.

Models count positions and then look numbers up in them, join them, add them up and compare them:

    positions = arange(n);  cat([positions[:1] - 1, positions]).diff() != 1  →  False, everywhere

What is left is what castile reads as coordinates: `arange` and `full`, by which a mask becomes a bracket.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Graph, Node

from .nodes import RESHAPES, fakes, op_name
from .values import Size, certain, same

INTEGERS = frozenset((torch.int64, torch.int32))


@dataclass(frozen=True, slots=True)
class Count:
    """An integer tensor whose element at i is ``first + Σ steps[a] · i[a]``; a truth value is a ``first`` of 0 or 1."""

    first: Size
    steps: tuple[Size, ...]

    @property
    def constant(self) -> bool:
        return all(same(s, 0) for s in self.steps)


Rule = Callable[["Counting", Node, torch.Tensor], "Count | None"]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    def register(f: Rule) -> Rule:
        for name in names:
            RULES[name] = f
        return f

    return register


class Counting:
    """The counts of a graph's nodes, found in order."""

    def __init__(self) -> None:
        self.known: dict[Node, Count] = {}

    def visit(self, node: Node) -> None:
        fake = node.meta.get("val")
        found = RULES.get(op_name(node))
        if found is None or not isinstance(fake, torch.Tensor) or fake.dtype not in INTEGERS | {torch.bool}:
            return
        count = found(self, node, fake)
        if count is not None:
            # An axis of size 1 has no step, whatever it was part of.
            steps = tuple(0 if same(n, 1) else s for s, n in zip(count.steps, fake.shape, strict=True))
            if _is_short(count.first, *(s * n for s, n in zip(steps, fake.shape, strict=True))):
                self.known[node] = Count(count.first, steps)

    def of(self, given: Any, shape: Sequence[Size]) -> Count | None:
        """What an operand counts over the axes of a result of this shape."""
        n = size_of(given)
        if n is not None:
            return Count(n, (0,) * len(shape))
        found = self.known.get(given) if isinstance(given, Node) else None
        return found and replace(found, steps=(0,) * (len(shape) - len(found.steps)) + found.steps)


def _is_short(*terms: Size) -> bool:
    """Whether the sum of terms fits any integer type, as far as they are known."""
    return sum(abs(n) for n in terms if isinstance(n, int)) < 1 << 31


def size_of(given: Any) -> Size | None:
    """The integer that an argument of a node is, perhaps a dynamic one; None for anything else."""
    if isinstance(given, Node):
        given = given.meta.get("val")
    return given if isinstance(given, (int, torch.SymInt)) else None


# What counts


@rule("arange.default", "arange.start", "arange.start_step")
def _arange(_: Counting, node: Node, fake: torch.Tensor) -> Count | None:
    given = [size_of(a) for a in node.args]
    start, step = (given[0] if len(given) > 1 else 0), (given[2] if len(given) > 2 else 1)
    return None if start is None or step is None else Count(start, (step,))


@rule("full.default", "scalar_tensor.default", "full_like.default", "new_full.default")
def _full(_: Counting, node: Node, fake: torch.Tensor) -> Count | None:
    value = size_of(node.args[{"scalar_tensor": 0, "new_full": 2}.get(op_name(node).split(".")[0], 1)])
    return None if value is None else Count(value, (0,) * fake.ndim)


@rule("zeros.default", "zeros_like.default", "new_zeros.default")
def _zeros(_: Counting, node: Node, fake: torch.Tensor) -> Count:
    return Count(0, (0,) * fake.ndim)


@rule("ones.default", "ones_like.default", "new_ones.default")
def _ones(_: Counting, node: Node, fake: torch.Tensor) -> Count:
    return Count(1, (0,) * fake.ndim)


# Arithmetic


@rule("add.Tensor", "sub.Tensor")
def _sum(counting: Counting, node: Node, fake: torch.Tensor) -> Count | None:
    a, b = (counting.of(x, fake.shape) for x in node.args)
    if a is None or b is None or node.kwargs or fake.dtype is torch.bool:
        return None
    apply = operator.add if op_name(node) == "add.Tensor" else operator.sub
    return Count(apply(a.first, b.first), tuple(map(apply, a.steps, b.steps)))


@rule("mul.Tensor")
def _product(counting: Counting, node: Node, fake: torch.Tensor) -> Count | None:
    a, b = (counting.of(x, fake.shape) for x in node.args)
    if a is None or b is None or not (a.constant or b.constant):
        return None
    factor, other = (a.first, b) if a.constant else (b.first, a)
    return Count(factor * other.first, tuple(factor * s for s in other.steps))


@rule("_to_copy.default", "clone.default", "alias.default", "detach.default", "expand.default")
def _same(counting: Counting, node: Node, fake: torch.Tensor) -> Count | None:
    source = node.args[0]
    count = counting.of(source, fake.shape)
    if fake.dtype is torch.bool and isinstance(source, Node) and fakes(source)[0].dtype is not torch.bool:
        return None
    return count


@rule("cumsum.default")
def _running(counting: Counting, node: Node, fake: torch.Tensor) -> Count | None:
    axis = size_of(node.args[1])
    count = counting.of(node.args[0], fake.shape)
    if count is None or not count.constant or not isinstance(axis, int) or not fake.ndim:
        return None
    steps: list[Size] = [0] * fake.ndim
    steps[axis] = count.first
    return Count(count.first, tuple(steps))


COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")
}
OPPOSITE = {"eq": "ne", "ne": "eq", "lt": "ge", "ge": "lt", "gt": "le", "le": "gt"}


@rule(*(f"{name}.{kind}" for name in COMPARISONS for kind in ("Tensor", "Scalar")))
def _compared(counting: Counting, node: Node, fake: torch.Tensor) -> Count | None:
    """Decided where both sides are at the same distance everywhere."""
    a, b = (counting.of(x, fake.shape) for x in node.args)
    if a is None or b is None or not all(map(same, a.steps, b.steps)):
        return None
    name = op_name(node).split(".")[0]
    for verdict, word in ((1, name), (0, OPPOSITE[name])):
        if certain(COMPARISONS[word](a.first, b.first)):
            return Count(verdict, (0,) * fake.ndim)
    return None


@rule("bitwise_and.Tensor", "logical_and.default", "bitwise_or.Tensor", "logical_or.default")
def _logic(counting: Counting, node: Node, fake: torch.Tensor) -> Count | None:
    decides = 0 if "and" in op_name(node) else 1
    operands = [counting.of(x, fake.shape) for x in node.args]
    if fake.dtype is not torch.bool or any(not _is_truth(x) for x in node.args):
        return None
    values = [c.first if c is not None and c.constant else None for c in operands]
    if decides in values:
        return Count(decides, (0,) * fake.ndim)
    return None if None in values else Count(1 - decides, (0,) * fake.ndim)


@rule("bitwise_not.default", "logical_not.default")
def _not(counting: Counting, node: Node, fake: torch.Tensor) -> Count | None:
    count = counting.of(node.args[0], fake.shape)
    if count is None or not _is_truth(node.args[0]) or not isinstance(count.first, int):
        return None
    return Count(1 - count.first, count.steps)


def _is_truth(given: Any) -> bool:
    return isinstance(given, Node) and fakes(given)[0].dtype is torch.bool


# Views


@rule("view.default", "_unsafe_view.default", "unsqueeze.default", "squeeze.dim", "squeeze.dims", "squeeze.default")
def _view(counting: Counting, node: Node, fake: torch.Tensor) -> Count | None:
    """A view that only puts axes of size 1 in or takes them out."""
    source: Any = node.args[0]
    count = counting.known.get(source)
    if count is None:
        return None
    old = [(n, s) for n, s in zip(fakes(source)[0].shape, count.steps, strict=True) if not same(n, 1)]
    kept = [n for n in fake.shape if not same(n, 1)]
    if len(kept) != len(old) or not all(same(n, m) for n, (m, _) in zip(kept, old, strict=True)):
        return None
    steps = iter(s for _, s in old)
    return Count(count.first, tuple(0 if same(n, 1) else next(steps) for n in fake.shape))


@rule("permute.default", "transpose.int")
def _turned(counting: Counting, node: Node, fake: torch.Tensor) -> Count | None:
    count = counting.of(node.args[0], fake.shape)
    if count is None:
        return None
    order: Any = node.args[1] if op_name(node) == "permute.default" else list(range(fake.ndim))
    if op_name(node) == "transpose.int":
        i, j = (int(a) for a in node.args[1:])  # type: ignore[arg-type]
        order[i], order[j] = order[j], order[i]
    return Count(count.first, tuple(count.steps[i] for i in order))


@rule("slice.Tensor")
def _slice(counting: Counting, node: Node, fake: torch.Tensor) -> Count | None:
    source: Any = node.args[0]
    given: Any = (*node.args[1:], *(0, None, None, 1)[len(node.args) - 1 :])
    axis, start, _, step = given
    count, at, by = counting.known.get(source), size_of(0 if start is None else start), size_of(step)
    if count is None or at is None or by != 1 or not isinstance(axis, int):
        return None
    size = fakes(source)[0].shape[axis]
    if not certain(at >= 0):
        at = at + size
    # eager moves a start that lies outside
    if not (certain(at >= 0) and certain(at <= size)):
        return None
    return Count(count.first + at * count.steps[axis], count.steps)


@rule("cat.default")
def _joined(counting: Counting, node: Node, fake: torch.Tensor) -> Count | None:
    """Pieces of which each goes on where the last one ended."""
    pieces: Any = node.args[0]
    axis = (int(node.args[1]) if len(node.args) > 1 else 0) % fake.ndim  # type: ignore[arg-type]
    counts = [counting.known.get(p) for p in pieces]
    if any(c is None or len(c.steps) != fake.ndim for c in counts):
        return None
    known = [c for c in counts if c is not None]
    sizes: list[Size] = [fakes(p)[0].shape[axis] for p in pieces]
    long = [c for c, n in zip(known, sizes, strict=True) if not same(n, 1)]
    step = long[0].steps[axis] if long else known[-1].first - known[-2].first if len(known) > 1 else 0
    at: Size = 0
    steps = list(known[0].steps)
    steps[axis] = step
    for c, n in zip(known, sizes, strict=True):
        mine = list(c.steps)
        mine[axis] = step if same(n, 1) else mine[axis]
        if not all(map(same, mine, steps)) or not same(c.first, known[0].first + at * step):
            return None
        at = at + n
    return Count(known[0].first, tuple(steps))


@rule("index.Tensor")
def _looked_up(counting: Counting, node: Node, fake: torch.Tensor) -> Count | None:
    """Counted numbers read at counted places: one after the other."""
    table, given = node.args
    count = counting.known.get(table)  # type: ignore[arg-type]
    indices = [counting.of(i, fake.shape) for i in given]  # type: ignore[union-attr]
    if count is None or len(indices) != len(count.steps):
        return None
    first, steps = count.first, (0,) * fake.ndim
    for index, by, size in zip(indices, count.steps, fakes(table)[0].shape, strict=True):  # type: ignore[arg-type]
        if index is None or not _within(index, fake.shape, size):
            return None
        first = first + by * index.first
        steps = tuple(s + by * i for s, i in zip(steps, index.steps, strict=True))
    return Count(first, steps)


def _within(index: Count, shape: Sequence[Size], size: Size) -> bool:
    """Whether an index stays between 0 and a size."""
    if not all(certain(s >= 0) for s in index.steps):
        return False
    last = index.first
    for s, n in zip(index.steps, shape, strict=True):
        last = last + s * (n - 1)
    return certain(index.first >= 0) and certain(last <= size - 1)


# The graph rewritten

# What reads a tensor by its strides, as the outputs hand it on with them: a range has those of a view.
STRIDED = RESHAPES | {"as_strided.default"}

# Nodes that are as they should be.
PLAIN = frozenset(("arange", "full", "scalar_tensor", "zeros", "ones", "new_zeros", "new_ones", "new_full"))


def count(graph: Graph) -> None:
    """Put ranges and constants in the place of what is found to be one, where something else reads it."""
    counting = Counting()
    for node in graph.nodes:
        if node.op == "call_function":
            counting.visit(node)
    for node in list(graph.nodes):
        _neutral(node, counting)
    for node in [n for n in counting.known if op_name(n).split(".")[0] not in PLAIN]:
        outside = [u for u in node.users if u not in counting.known]
        if outside:
            with graph.inserting_before(node):
                made = _ranges(graph, counting.known[node], node)
            if made is not None:
                laid = all(map(same, fakes(made)[0].stride(), fakes(node)[0].stride()))
                for u in outside:
                    if laid or (u.op != "output" and op_name(u) not in STRIDED):
                        u.replace_input_with(node, made)
    for node in reversed(list(graph.nodes)):
        if node in counting.known and not node.users:
            graph.erase_node(node)


def _neutral(node: Node, counting: Counting) -> None:
    """`a & True` and `a | False` are `a`, where that has the shape of both."""
    if node in counting.known or op_name(node) not in ("bitwise_and.Tensor", "bitwise_or.Tensor"):
        return
    neutral = 1 if op_name(node) == "bitwise_and.Tensor" else 0
    fake = fakes(node)[0]
    for a, b in (node.args, node.args[::-1]):
        found = counting.of(a, fake.shape)
        if found is None or not found.constant or found.first != neutral or not (_is_truth(a) and _is_truth(b)):
            continue
        if (
            isinstance(b, Node)
            and len(fakes(b)[0].shape) == fake.ndim
            and all(map(same, fakes(b)[0].shape, fake.shape))
        ):
            node.replace_all_uses_with(b)
            node.graph.erase_node(node)
            return


def _alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.ndim == b.ndim and all(map(same, a.shape, b.shape))


def _ranges(graph: Graph, found: Count, node: Node) -> Node | None:
    """Nodes that compute a count in the shape and type of a node; None if a dynamic size of it has no node."""
    fake = fakes(node)[0]
    sizes = {str(n.meta["val"]): n for n in graph.nodes if isinstance(n.meta.get("val"), torch.SymInt) and n < node}
    arguments = [n if isinstance(n, int) else sizes.get(str(n)) for n in (*fake.shape, found.first, *found.steps)]
    if None in arguments:
        return None
    shape, first, steps = arguments[: fake.ndim], arguments[fake.ndim], arguments[fake.ndim + 1 :]
    aten = torch.ops.aten

    def call(target: Any, *args: Any, **kwargs: Any) -> Node:
        made = graph.call_function(target, args, kwargs)
        plain = torch.fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        with fake.fake_mode:
            made.meta["val"] = target(*plain[0], **plain[1])
        return made

    if found.constant:
        value = bool(first) if fake.dtype is torch.bool else first
        return call(aten.full.default, shape, value, dtype=fake.dtype, device=fake.device)
    whole: Node | None = None
    for axis, step in enumerate(steps):
        if isinstance(step, int) and step == 0:
            continue
        one = call(aten.arange.default, shape[axis], dtype=fake.dtype, device=fake.device)
        one = one if isinstance(step, int) and step == 1 else call(aten.mul.Tensor, one, step)
        for _ in range(fake.ndim - axis - 1):
            one = call(aten.unsqueeze.default, one, -1)
        whole = one if whole is None else call(aten.add.Tensor, whole, one)
    assert whole is not None
    if not (isinstance(first, int) and first == 0):
        whole = call(aten.add.Tensor, whole, first)
    return call(aten.expand.default, whole, shape)
