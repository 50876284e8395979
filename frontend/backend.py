"""The `torch.compile` backend: AOTAutograd's graphs cut into regions, regions into kernels, all else as before.

torch.compile(model, backend="castile", options={"target": "cpu", "tune": "cached", "fallback": "eager"})
"""

from __future__ import annotations

import heapq
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from itertools import pairwise
from operator import getitem
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from ..codegen import targets
from ..codegen.compiler import cores
from ..driver import NUMERICS
from ..ir.errors import CastileError, UsageError, did_you_mean
from .counting import count
from .fx import fakes, op_name
from .once import once
from .partition import Partition, Partitioner, Region, is_impure, lower_region
from .region import RegionCall, extract, kernel_of, warn_fallback
from .rest import with_inductor
from .tuning import tune_calls

TUNE = ("off", "cached", "quick", "full")
FALLBACK = ("eager", "inductor")
WHEN = ("faster", "always")
# The standard modes, and what they mean here.
MODES: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    "reduce-overhead": {},
    "max-autotune": {"tune": "full"},
    "max-autotune-no-cudagraphs": {"tune": "full"},
}


@dataclass(frozen=True, slots=True)
class Options:
    """What `torch.compile(…, options=)` may say.

    ``target`` is "cpu", "cuda", … or None for what the tensors are on; ``tune`` is "off", "cached", "quick" or "full";
    ``numerics`` is "standard", "strict" or "fast", None for the first; ``fallback`` says what runs the rest, "eager" or
    "inductor"; ``when`` is "faster" (a region becomes a kernel where the cost rule expects a gain) or "always".
    """

    target: str | None = None
    tune: str = "cached"
    numerics: str | None = None
    fallback: str = "eager"
    when: str = "faster"

    @classmethod
    def of(cls, mode: str | None, options: Mapping[str, Any] | None) -> Options:
        """Options checked. Raises `UsageError` for a word that there is not."""
        if mode is not None and mode not in MODES:
            raise UsageError("no mode of that name", expected=", ".join(MODES), got=repr(mode))
        given = {**MODES[mode or "default"], **(options or {})}
        known = [f.name for f in fields(cls)]
        for name in given:
            if name not in known:
                hint = did_you_mean(str(name), known) or f"the options are {', '.join(known)}"
                raise UsageError(f"no option `{name}` of the castile backend", hint=hint)
        for name, words in (("tune", TUNE), ("fallback", FALLBACK), ("when", WHEN), ("numerics", (None, *NUMERICS))):
            if name in given and given[name] not in words:
                spelled = ", ".join(w for w in words if w)
                raise UsageError(f"no such `{name}`", expected=spelled, got=repr(given[name]))
        return cls(**given)


@dataclass
class Compiled:
    """One graph compiled: its partition, the regions that became kernels, and what runs."""

    partition: Partition
    calls: list[tuple[Region, RegionCall]] = field(default_factory=list)
    module: GraphModule | None = None


Listener = Callable[[Compiled], None]


def castile(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """The backend that `torch.compile(model, backend="castile")` finds by its entry point."""
    chosen = Options.of(mode, options)
    compiled: Callable[..., Any] = backend(chosen)(gm, example_inputs)
    return compiled


def backend(options: Options, listener: Listener | None = None) -> Callable[..., Any]:
    """A `torch.compile` backend with given options; ``listener`` is told of every graph."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch._aot_autograd.utils import make_boxed_func

    def compile_graph(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        done = compile_fx(gm, options)
        if listener is not None:
            listener(done)
        assert done.module is not None
        return make_boxed_func(done.module.forward)

    return aot_autograd(fw_compiler=compile_graph, bw_compiler=compile_graph, inference_compiler=compile_graph)


def compile_fx(gm: GraphModule, options: Options) -> Compiled:
    """A graph of ATen with its regions as kernels."""
    target = targets.named(options.target) if options.target else "cpu"
    check = os.environ.get("CASTILE_CHECK", "") not in ("", "0")
    once(gm.graph)
    count(gm.graph)
    partitioner = Partitioner(gm.graph, options.when == "always")
    done = Compiled(partitioner.run())
    for region in done.partition.regions:
        if region.chosen:
            call = _lowered_call(gm, region, partitioner, target, options, check)
            if call is not None:
                done.calls.append((region, call))
    tune_calls(done.calls, target, options.tune)
    done.calls = _built(done.calls)
    done.module = _rewritten(gm, done.calls)
    if options.fallback == "inductor":
        done.module = with_inductor(done.module)
    return done


def _lowered_call(
    gm: GraphModule, region: Region, partitioner: Partitioner, target: str, options: Options, check: bool
) -> RegionCall | None:
    """The region as a callable, or None with the reason noted where castile has no cascade for it."""
    while True:
        try:
            lowered = lower_region(region, partitioner.able, partitioner.copied, region_name(region))
            break
        except CastileError as error:
            # What comes first often is what stands in the way; without it, the rest may do.
            if region.kind == "attention" or len(region.nodes) < 3:
                region.chosen, region.reason = False, f"castile cannot say it: {error.message}"
                return None
            partitioner.leave(region, f"castile cannot say it together with what reads it: {error.message}")
        except RecursionError:
            region.chosen, region.reason = False, "castile cannot say it: it is too deep"
            return None
    name = region_name(region)
    try:
        reference, leaves = extract(gm, lowered.results, lowered.arguments)
        kernel = kernel_of(lowered.cascade, target, options.numerics, options.tune)
        return RegionCall(name, lowered, leaves, reference, kernel, check)
    except CastileError as error:
        region.chosen, region.reason = False, f"castile cannot compile it: {error.message}"
    return None


def region_name(region: Region) -> str:
    """A name from what the region does, the same for the same operations."""
    words = [op_name(n).split(".")[0].strip("_") for n in region.nodes]
    words = list(dict.fromkeys(w for w in words if w.isidentifier()))
    if region.kind == "attention":
        return "attention_backward" if any("backward" in w for w in words) else "attention"
    return "_".join(words[:4]) or "region"


def _built(calls: list[tuple[Region, RegionCall]]) -> list[tuple[Region, RegionCall]]:
    """Build all kernels, several at once; a region whose kernel does not build runs in eager, with a warning."""
    distinct = {id(call.kernel): call for _, call in calls}
    errors: dict[int, Exception] = {}

    def build(call: RegionCall) -> None:
        try:
            call.build()
        except Exception as error:  # whatever a compiler does, the model runs
            errors[id(call.kernel)] = error

    with ThreadPoolExecutor(max_workers=min(8, cores())) as pool:
        list(pool.map(build, distinct.values()))
    for number, error in errors.items():
        warn_fallback(distinct[number].__name__, error)
    for region, call in calls:
        if id(call.kernel) in errors:
            region.chosen, region.reason = False, f"its kernel does not build: {errors[id(call.kernel)]}"
    return [(r, c) for r, c in calls if id(c.kernel) not in errors]


# The graph with its regions replaced

# The same operations by the shorter way from Python.
SHORTER: Mapping[str, Callable[..., Any]] = {
    "view.default": torch.Tensor.view, "t.default": torch.t, "transpose.int": torch.transpose,
    "permute.default": torch.permute, "unsqueeze.default": torch.unsqueeze, "mm.default": torch.mm,
    "bmm.default": torch.bmm, "addmm.default": torch.addmm,
}  # fmt: skip


def _rewritten(gm: GraphModule, calls: Sequence[tuple[Region, RegionCall]]) -> GraphModule:
    """A copy of the graph in which each region is one call."""
    nodes = list(gm.graph.nodes)
    at = {n: i for i, n in enumerate(nodes)}
    owner = {n: c for c, (region, _) in enumerate(calls) for n in region.nodes}
    leaves = [call.leaves for _, call in calls]
    units = _ordered(nodes, at, owner, calls, leaves)
    graph = Graph()
    env: dict[Node, Node] = {}
    for unit in units:
        if isinstance(unit, Node):
            env[unit] = graph.node_copy(unit, env.__getitem__)
            env[unit].target = SHORTER.get(op_name(unit), unit.target)
            continue
        _, call = calls[unit]
        made = graph.call_function(call, tuple(env[n] for n in leaves[unit]))
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


def _ordered(
    nodes: Sequence[Node],
    at: Mapping[Node, int],
    owner: Mapping[Node, int],
    calls: Sequence[tuple[Region, RegionCall]],
    leaves: Sequence[Sequence[Node]],
) -> list[Node | int]:
    """What is needed, each after what it needs, else in the order of the graph."""

    def unit_of(n: Node) -> Node | int:
        if n in owner:
            return owner[n]
        if op_name(n) == "getitem" and n.args[0] in owner:
            return owner[n.args[0]]  # type: ignore[index]
        return n

    def needs(unit: Node | int) -> set[Node | int]:
        read = unit.all_input_nodes if isinstance(unit, Node) else leaves[unit]
        found = {unit_of(n) for n in read}
        if unit in before:
            found.add(before[unit])
        return found

    before: dict[Node | int, Node | int] = {}
    impure: list[Node] = [n for n in nodes if n.op == "call_function" and is_impure(n)]
    for earlier, later in pairwise(impure):
        before[later] = earlier
    wanted: dict[Node | int, set[Node | int]] = {}
    todo: list[Node | int] = [*(n for n in nodes if n.op in ("placeholder", "output")), *impure]
    while todo:
        unit = todo.pop()
        if unit not in wanted:
            wanted[unit] = needs(unit)
            todo += wanted[unit]
    place = {u: at[u] if isinstance(u, Node) else at[calls[u][0].nodes[-1]] for u in wanted}
    waiting = {u: len(n) for u, n in wanted.items()}
    readers: dict[Node | int, list[Node | int]] = {u: [] for u in wanted}
    for u, found in wanted.items():
        for n in found:
            readers[n].append(u)
    # Placeholders first and in their order, whoever reads them.
    heap = [(place[u], i, u) for i, u in enumerate(wanted) if not waiting[u]]
    heapq.heapify(heap)
    ordered: list[Node | int] = []
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
