"""The `torch.compile` backend: AOTAutograd's graphs cut into regions, regions into kernels, all else as before.

torch.compile(model, backend="castile", options={"target": "cpu", "tune": "cached", "fallback": "eager"})
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from typing import Any

from torch.fx import GraphModule

from ..codegen import targets
from ..ir.cascade import NUMERICS
from ..ir.errors import CastileError, UsageError, did_you_mean
from ..ir.machine import cores
from .arena import is_fixed, plan_of
from .counting import count
from .fixed import Fixed
from .lower import lower_region
from .nodes import fakes, numel, op_name
from .once import once
from .partition import Partition, Partitioner, Region
from .region import RegionCall, extract, kernel_of, warn_fallback
from .remade import partition
from .rest import with_inductor
from .rewrite import rewritten
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

    ``target`` is "cpu", "cuda", … or None for "cpu"; ``tune`` is "off", "cached", "quick" or "full";
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
        return cls(**{**given, "target": _here(given.get("target"))})


def _here(target: str | None) -> str:
    """The full spelling of a target whose kernels run on this machine. Raises `UsageError` for any other."""
    found = "cpu" if target is None else targets.named(target)
    if found not in ("cpu", "interpret", targets.present()):
        hint = "leave `target` out, and `castile.compile` compiles for other machines"
        raise UsageError(f"kernels for `{found}` do not run here", expected="cpu", got=repr(target), hint=hint)
    return found


@dataclass
class Compiled:
    """One graph compiled: its partition, the regions that became kernels, the graph with these, and what runs."""

    partition: Partition
    calls: list[tuple[Region, RegionCall]] = field(default_factory=list)
    module: GraphModule | None = None
    run: Callable[..., Any] | None = None


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
        assert done.run is not None
        return make_boxed_func(done.run)

    return aot_autograd(
        fw_compiler=compile_graph, bw_compiler=compile_graph, inference_compiler=compile_graph, partition_fn=partition
    )


def compile_fx(gm: GraphModule, options: Options) -> Compiled:
    """A graph of ATen with its regions as kernels."""
    target = _here(options.target)
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
    fixed = target == "cpu" and options.fallback == "eager" and not check and bool(done.calls) and is_fixed(gm)
    products: list[tuple[Region, RegionCall]] = []
    if fixed and options.tune != "off" and options.numerics in (None, "standard"):
        raced = ((r, _lowered_call(gm, r, partitioner, target, options, check)) for r in partitioner.products())
        products = [(region, call) for region, call in raced if call is not None]
    _serve_alike(products)
    built = {id(call) for _, call in _built([*done.calls, *products])}
    done.calls, products = ([(r, c) for r, c in found if id(c) in built] for found in (done.calls, products))
    done.module = rewritten(gm, done.calls)
    if options.fallback == "inductor":
        done.module = with_inductor(done.module)
    done.run = done.module.forward
    plan = plan_of(gm, done.calls) if fixed else None
    if plan is not None:
        done.run = Fixed(gm, done.calls, products, done.run, plan)
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


def _serve_alike(products: list[tuple[Region, RegionCall]]) -> None:
    """Products of as many rows and as deep share the program of the widest: each would take a second to build."""
    widest: dict[Any, RegionCall] = {}
    for region, call in sorted(products, key=lambda p: -numel(p[0].nodes[0])):
        rows, depth = fakes(region.nodes[0].all_input_nodes[-2])[0].shape
        like = widest.setdefault((id(call.kernel), rows, depth), call)
        call.kernel.serve(call.lowered.hints, like.lowered.hints)


def _built(calls: list[tuple[Region, RegionCall]]) -> list[tuple[Region, RegionCall]]:
    """Build all kernels, several at once; a region whose kernel does not build runs in eager, with a warning."""
    distinct = {(id(call.kernel), tuple(call.lowered.hints.values())): call for _, call in calls}
    errors: dict[int, Exception] = {}

    def build(call: RegionCall) -> None:
        try:
            call.build()
        except Exception as error:  # whatever a compiler does, the model runs
            errors[id(call.kernel)] = error

    with ThreadPoolExecutor(max_workers=min(8, cores())) as pool:
        list(pool.map(build, distinct.values()))
    names = {id(call.kernel): call.__name__ for call in distinct.values()}
    for number, error in errors.items():
        warn_fallback(names[number], error)
    for region, call in calls:
        if id(call.kernel) in errors:
            region.chosen, region.reason = False, f"its kernel does not build: {errors[id(call.kernel)]}"
    return [(r, c) for r, c in calls if id(c.kernel) not in errors]
