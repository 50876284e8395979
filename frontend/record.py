"""What the first call of a graph writes down for the later ones: kernels with their arguments filled in, and places."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import getitem
from typing import Any

import numpy as np
import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from ..codegen.arguments import address
from ..codegen.runtime import Bound, thread_count
from .arena import Plan, memory_of, span
from .finish import WITNESS
from .nodes import PRODUCTS, RESHAPES, fakes, is_transposed, is_view, op_name, tensors_of, weight_of
from .races import RACES, faster
from .region import RegionCall
from .rewrite import SHORTER

# Weights on which a product is raced, at most.
MOST_WEIGHTS = 4


@dataclass(frozen=True, slots=True)
class Input:
    """Which input a kernel reads by its address, how it has to lie, and which low bits of the address have to be 0."""

    at: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    odd: int


@dataclass(slots=True)
class Record:
    """A graph as one thread runs it: ``run(kept, threads, *inputs)``; ``kept`` are tensors that lie where they lie."""

    memory: torch.Tensor
    run: Callable[..., Any] = tuple
    kept: list[torch.Tensor] = field(default_factory=list)
    inputs: list[Input] = field(default_factory=list)
    scratch: Any = None

    def fits(self, args: Sequence[Any]) -> bool:
        for i in self.inputs:
            x = args[i.at]
            if x.shape != i.shape or x.stride() != i.strides or x.data_ptr() & i.odd:
                return False
        return True


# Steps


class Step:
    """A kernel with its arguments filled in: called with threads, and those tensors that lie elsewhere each time."""

    def __init__(self, name: str, bound: Bound, moving: Sequence[tuple[int, int]]) -> None:
        self.__name__ = name
        self.words, self.call = bound.words, bound.call
        self.moving = tuple((bound.places[tensor], offset) for tensor, offset in moving)

    def __call__(self, threads: int, *tensors: torch.Tensor) -> None:
        words = self.words
        for x, (places, offset) in zip(tensors, self.moving, strict=True):
            pointer = x.data_ptr() + offset
            for at in places:
                words[at] = pointer
        self.call(threads)


def _as_before(x: torch.Tensor, shape: tuple[int, ...], strides: tuple[int, ...], odd: int) -> torch.Tensor:
    """A tensor that lies as it did when the graph was recorded; almost always the one that is given."""
    if x.stride() == strides and not x.data_ptr() & odd:
        return x
    return torch.empty_strided(shape, strides, dtype=x.dtype).copy_(x)


def _is_viewed(n: Node) -> bool:
    """Whether a tensor is viewed in another shape, be it through views of other kinds."""
    is_tensor = isinstance(n.meta.get("val"), torch.Tensor)
    return is_tensor and any(op_name(u) in RESHAPES or _is_viewed(u) for u in n.users if is_view(u))


class Recorder:
    """Runs a graph once, unit by unit, and writes down what the next runs are to do."""

    def __init__(
        self,
        gm: GraphModule,
        calls: Sequence[RegionCall],
        products: dict[Node, RegionCall],
        plan: Plan,
        memory: torch.Tensor,
        args: Sequence[Any],
    ) -> None:
        self.gm, self.calls, self.products, self.plan = gm, calls, products, plan
        inputs = (n for n in self.gm.graph.nodes if n.op == "placeholder")
        self.inputs = {n: (at, x) for at, (n, x) in enumerate(zip(inputs, args, strict=True))}
        self.record = Record(memory)
        self.graph = Graph()
        self.kept, self.threads = self.graph.placeholder("kept"), self.graph.placeholder("threads")
        self.count = thread_count()
        self.values: dict[Node, Any] = {}
        self.new: dict[Node, Node] = {}
        self.lying: set[Node] = set()  # nodes whose memory never moves: in the arena, or the graph's own constants
        self.steady: dict[Node, Node] = {}  # what comes from outside, sure to lie as it did
        self.bounds: list[Bound] = []
        self.surprised = False

    def results(self) -> Any:
        """Run the graph and write the record."""
        found: Any = ()
        for unit in self.plan.units:
            if isinstance(unit, int):
                self._region(self.calls[unit])
            elif unit.op == "output":
                found = map_arg(unit.args[0], self._value)
                self.graph.output(map_arg(unit.args[0], self._emitted))
            else:
                self._node(unit)
        self._share_scratch()
        self.record.run = GraphModule(self.gm, self.graph).forward
        return self._apart(found)

    def _node(self, n: Node) -> None:
        if n.op == "placeholder":
            self.new[n] = self.graph.placeholder(str(n.target))
            _, self.values[n] = self.inputs[n]
        elif n.op == "get_attr":
            self.values[n] = value = _attribute(self.gm, str(n.target))
            if isinstance(value, torch.Tensor):
                self.lying.add(n)
            else:
                self.new[n] = self.graph.node_copy(n)
        elif _is_plain_view(n):
            self.values[n] = self._called(n.target, n.args, n.kwargs)
            if n.args[0] in self.lying:
                self.lying.add(n)
        elif op_name(n) in PRODUCTS and not n.kwargs:
            self._product(n)
        else:
            target = SHORTER.get(op_name(n), n.target)
            self.values[n] = self._unshared(n, self._called(target, n.args, n.kwargs))
            self.new[n] = self._call(target, n.args, n.kwargs)
            if _is_viewed(n):
                self._lay(n)

    def _lay(self, n: Node) -> None:
        """An operation's result as it lay when the graph was traced, which views of it count on: what an operation does
        may differ from what it says of strides."""
        (fake,), value = fakes(n), self.values[n]
        if any(size > 1 and a != b for size, a, b in zip(value.shape, value.stride(), fake.stride(), strict=True)):
            given = (tuple(value.shape), tuple(fake.stride()), 0)
            self.values[n] = _as_before(value, *given)
            self.new[n] = self.graph.call_function(_as_before, (self.new[n], *given))

    def _product(self, n: Node) -> None:
        """A product of matrices, written to its place; one by a transposed matrix is told so without a view of it."""
        target, args = SHORTER.get(op_name(n), n.target), n.args
        *bias, a, b = args
        if op_name(n) in ("mm.default", "addmm.default") and isinstance(b, Node) and is_transposed(b):
            if all(fakes(x)[0].ndim == 1 for x in bias if isinstance(x, Node)):
                target, args = torch._C._nn.linear, (a, b.args[0], *bias)
        call = self.products.get(n)
        if call is not None and self._wins(call, n, target, args):
            self._region(call)
            return
        (fake,) = fakes(n)
        out = self._place(fake)
        if out is None:
            self.values[n] = self._called(target, args, {})
            self.new[n] = self._call(target, args, {})
            return
        self.values[n] = self._called(target, args, {"out": out})
        place = self._keep(out)
        self._call(target, args, {}).kwargs = {"out": place}
        self.lying.add(n)

    def _wins(self, call: RegionCall, product: Node, target: Any, given: Sequence[Any]) -> bool:
        """Whether castile's kernel of a product is faster than torch's ``target`` of what is given, on the weights of
        all such products in turn: those of a model do not fit into a cache together."""
        args = [self.values[m] for m in call.leaves]
        weight = weight_of(product)
        assert weight is not None
        key = (call.kernel.cascade, tuple((x.shape, x.stride()) for x in args), self.count)

        def race() -> bool:
            alike = [weight_of(m) for m, c in self.products.items() if c.kernel is call.kernel]
            weights = [self.inputs[m][1] for m in alike if m is not None]
            like = self.values[weight]
            weights = [w for w in weights if (w.shape, w.stride()) == (like.shape, like.stride())][:MOST_WEIGHTS]
            plan = call.plan(args)
            inputs = {name: args[at] if view is None else args[at].view(view) for name, at, view in plan.views}
            (result,) = plan.results
            out = result.empty()
            bound = call.kernel.bind(inputs, (result.axes(out),))
            if bound is None or plan.witness is not None:
                return False
            scratch = _scratch(bound.scratch_bytes)
            bound.work_in(_aligned(scratch))
            place = call.leaves.index(weight)
            names = [p.name for p in call.lowered.cascade.params if p.indices]
            (moved,) = (names.index(name) for name, at, _ in plan.views if at == place)
            values = [self.values[m] if isinstance(m, Node) else m for m in given]
            at = given.index(weight)
            theirs_given = [[*values[:at], w, *values[at + 1 :]] for w in weights]

            def mine() -> None:
                for w in weights:
                    bound.move(moved, w.data_ptr())
                    bound.call(self.count)

            def theirs() -> None:
                for each in theirs_given:
                    target(*each, out=out)

            return faster(mine, theirs)

        return RACES.won(key, race)

    # Regions

    def _region(self, call: RegionCall) -> None:
        args = [self.values[n] for n in call.leaves]
        made = self._bound(call, args)
        if made is None:
            results = call(*args)
            node = self.graph.call_function(call, tuple(map(self._emitted, call.leaves)))
            for i, (n, k, _) in enumerate(call.lowered.results):
                for m in _named(n, k):
                    self.values[m], self.new[m] = results[i], self.graph.call_function(getitem, (node, i))
            return
        for (n, k, _), (y, fresh) in zip(call.lowered.results, made, strict=True):
            for m in _named(n, k):
                self.values[m] = y
                if fresh is None:
                    self.lying.add(m)
                else:
                    self.new[m] = fresh

    def _bound(self, call: RegionCall, args: Sequence[Any]) -> list[tuple[torch.Tensor, Node | None]] | None:
        """The results of a region, and the nodes that make those that are made anew at each call; None where its kernel
        cannot be called by addresses alone."""
        if call.failed or not all(isinstance(x, torch.Tensor) for x in args):
            return None
        try:
            plan = call.plan(args)
            inputs = {name: args[at] if view is None else args[at].view(view) for name, at, view in plan.views}
            if plan.witness is not None:
                inputs[WITNESS] = plan.witness
                self.record.kept.append(plan.witness)
            places = [self._place(fakes(n)[max(0, k)]) for n, k, _ in call.lowered.results]
            made = [r.empty() if y is None else y for y, r in zip(places, plan.results, strict=True)]
            out = tuple(r.axes(y) for y, r in zip(made, plan.results, strict=True))
            bound = call.kernel.bind(inputs, out)
        except Exception:  # the call itself will tell
            return None
        if bound is None:
            return None
        moving: list[tuple[int, int]] = []
        given: list[Node] = []
        at = {name: call.leaves[place] for name, place, _ in plan.views}
        names = [p.name for p in call.lowered.cascade.params if p.indices]
        for i, name in enumerate(names):
            if name in at and at[name] not in self.lying:
                if not bound.places[i]:
                    continue
                base, offset = self._base(at[name])
                if (inputs[name].data_ptr()) % inputs[name].element_size():
                    return None
                moving.append((i, offset))
                given.append(self._sure(base, inputs[name].element_size() - 1))
        fresh: list[Node | None] = []
        for i, (y, r) in enumerate(zip(places, plan.results, strict=True)):
            if y is not None:
                fresh.append(None)
                continue
            node = self.graph.call_function(torch.empty_strided, (r.shape, r.strides), {"dtype": r.dtype})
            fresh.append(node)
            if bound.places[len(names) + i]:
                moving.append((len(names) + i, 0))
                given.append(node)
        step = Step(call.__name__, bound, moving)
        self.graph.call_function(step, (self.threads, *given))
        self.bounds.append(bound)
        scratch = _scratch(bound.scratch_bytes)
        bound.work_in(_aligned(scratch))
        bound.call(self.count)
        return list(zip(made, fresh, strict=True))

    def _base(self, leaf: Node) -> tuple[Node, int]:
        """What a leaf is a view of, and how many bytes into it the leaf begins."""
        base = leaf
        while _is_plain_view(base):
            (base, *_) = base.all_input_nodes
        if isinstance(self.values[base], torch.Tensor):
            return base, self.values[leaf].data_ptr() - self.values[base].data_ptr()
        return leaf, 0

    def _sure(self, base: Node, odd: int) -> Node:
        """A tensor from outside, in the record: looked at before it is used, lest it lie in another way."""
        x = self.values[base]
        if base.op == "placeholder":
            needed = Input(self.inputs[base][0], tuple(x.shape), x.stride(), odd)
            if needed not in self.record.inputs:
                self.record.inputs.append(needed)
            return self._emitted(base)
        if base not in self.steady:
            given = (self._emitted(base), tuple(x.shape), x.stride(), odd)
            self.steady[base] = self.graph.call_function(_as_before, given)
        return self.steady[base]

    def _share_scratch(self) -> None:
        """One stretch of memory for what kernels keep on their way: they run one after the other."""
        self.record.scratch = _scratch(max((b.scratch_bytes for b in self.bounds), default=0))
        for b in self.bounds:
            b.work_in(_aligned(self.record.scratch))

    # Values, and what stands for them in the record

    def _value(self, n: Node) -> Any:
        return self.values[n]

    def _called(self, target: Any, args: Any, kwargs: Any) -> Any:
        return target(*map_arg(args, self._value), **map_arg(kwargs, self._value))

    def _call(self, target: Any, args: Any, kwargs: Any) -> Node:
        return self.graph.call_function(target, map_arg(args, self._emitted), map_arg(kwargs, self._emitted))

    def _emitted(self, n: Node) -> Node:
        """What stands for a value in the record: views of what comes from outside are made where they are read."""
        found = self.new.get(n)
        if found is None:
            if n in self.lying:
                found = self._keep(self.values[n])
            else:
                found = self._call(SHORTER.get(op_name(n), n.target), n.args, n.kwargs)
                self.new[n] = found
        return found

    def _keep(self, x: torch.Tensor) -> Node:
        self.record.kept.append(x)
        return self.graph.call_function(getitem, (self.kept, len(self.record.kept) - 1))

    def _place(self, fake: torch.Tensor) -> torch.Tensor | None:
        """The tensor at its place in the arena; None for one that leaves the graph."""
        offset = self.plan.offsets.get(memory_of(fake))
        if offset is None:
            return None
        with torch.inference_mode(False), torch.no_grad():
            stretch = self.record.memory[offset : offset + span(fake) * fake.element_size()]
            return stretch.view(fake.dtype).as_strided(fake.shape, fake.stride())

    # What nobody foresaw

    def _unshared(self, n: Node, value: Any) -> Any:
        """An operation's result; a copy where it turns out to lie in the arena though nothing said so."""
        known = {memory_of(f) for f in tensors_of(n)} & self.plan.offsets.keys()
        return value if known else self._apart(value)

    def _apart(self, value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)(map(self._apart, value))
        storage = self.record.memory.untyped_storage().data_ptr()
        if isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() == storage:
            self.surprised = True
            return value.clone()
        return value


def _is_plain_view(n: Node) -> bool:
    if op_name(n) == "getitem":
        return isinstance(n.args[0], Node) and _is_plain_view(n.args[0])
    return is_view(n)


def _named(n: Node, k: int) -> list[Node]:
    """The nodes that stand for a result of a region."""
    return [n] if k < 0 else [u for u in n.users if op_name(u) == "getitem" and u.args[1] == k]


def _attribute(gm: GraphModule, path: str) -> Any:
    found: Any = gm
    for name in path.split("."):
        found = getattr(found, name)
    return found


def _scratch(size: int) -> Any:
    return np.empty(size + 64, np.uint8)


def _aligned(scratch: Any) -> int:
    return (address(scratch) + 63) // 64 * 64
