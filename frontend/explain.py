"""What became of a model: which parts are kernels, with their passes before and after, what is not, and why."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .. import driver
from ..ir.cascade import Cascade
from ..ir.errors import CastileError
from .backend import Compiled, Options, backend
from .fx import Lowered
from .nodes import op_name
from .partition import Region


@dataclass(frozen=True, slots=True)
class RegionReport:
    """A region of a graph: the ATen operations in it, whether it is a kernel, and why.

    ``passes`` gives for each rank how often it is traversed as written and as derived; ``cascade`` is None where there
    is none; ``extents`` are those of its ranks in this call, as `castile.tune` takes them.
    """

    graph: int
    name: str
    kind: str
    operations: tuple[str, ...]
    kernel: bool
    reason: str
    cascade: Cascade | None
    passes: dict[str, tuple[int, int]]
    extents: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        return {
            "graph": self.graph,
            "name": self.name,
            "kind": self.kind,
            "operations": list(self.operations),
            "kernel": self.kernel,
            "reason": self.reason,
            "cascade": None if self.cascade is None else str(self.cascade),
            "key": None if self.cascade is None else self.cascade.key,
            "passes": {r: list(p) for r, p in self.passes.items()},
            "extents": dict(self.extents),
        }


@dataclass(frozen=True, slots=True)
class ModelExplanation:
    """What `castile.explain_model` found. ``str()`` is for people, `to_json` for programs.

    ``graphs`` is the number of graphs that Dynamo made; ``left`` says of each graph which operations run as without
    castile, as (operation, reason, how many).
    """

    graphs: int
    regions: tuple[RegionReport, ...]
    left: tuple[tuple[int, str, str, int], ...]

    @property
    def kernels(self) -> tuple[Cascade, ...]:
        """The distinct kernels; layers of a model share theirs."""
        return tuple(dict.fromkeys(r.cascade for r in self.regions if r.kernel and r.cascade is not None))

    def to_dict(self) -> dict[str, Any]:
        return {
            "graphs": self.graphs,
            "kernels": len(self.kernels),
            "regions": [r.to_dict() for r in self.regions],
            "left": [{"graph": g, "operation": op, "reason": reason, "count": n} for g, op, reason, n in self.left],
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        inside = sum(len(r.operations) for r in self.regions if r.kernel)
        calls = sum(r.kernel for r in self.regions)
        lines = [
            f"{_count(self.graphs, 'graph')}: {inside} operations in {calls} calls of "
            f"{_count(len(self.kernels), 'kernel')}",
        ]
        for cascade in self.kernels:
            mine = [r for r in self.regions if r.kernel and r.cascade == cascade]
            passes = ", ".join(f"{r} {a} → {b}" for r, (a, b) in mine[0].passes.items())
            lines += ["", f"{cascade.name} × {len(mine)}   {mine[0].reason}"]
            lines += [f"  passes over {passes}"] if passes else []
            lines += [f"  {line}" for line in str(cascade).rstrip().splitlines()]
        refused = Counter((" ".join(r.operations[:6]), r.reason) for r in self.regions if not r.kernel)
        if refused:
            lines += ["", "regions that are no kernel"]
            lines += [f"  {what} × {n}   {why}" for (what, why), n in refused.items()]
        left: Counter[tuple[str, str]] = Counter()
        for _, op, reason, n in self.left:
            left[op, reason] += n
        if left:
            lines += ["", "operations that run as before"]
            lines += [f"  {op} × {n}   {why}" for (op, why), n in left.items()]
        return "\n".join(lines) + "\n"


def explain_model(
    model: Callable[..., Any],
    *inputs: Any,
    options: dict[str, Any] | None = None,
    dynamic: bool | None = None,
    **kwargs: Any,
) -> ModelExplanation:
    """Compile a model (or any function of tensors) with castile, call it once, and tell what became of it.

    ``inputs`` and ``kwargs`` are what the model is called with, ``options`` those of the backend. What a call changes
    (buffers, the state of random numbers) it changes here too. Raises what the model raises, and `UsageError` for
    options that there are not.
    """
    import torch

    seen: list[Compiled] = []
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend(Options.of(None, options), seen.append), dynamic=dynamic)
    compiled(*inputs, **kwargs)
    return report(seen)


def report(graphs: list[Compiled]) -> ModelExplanation:
    """The explanation of compiled graphs."""
    regions: list[RegionReport] = []
    left: Counter[tuple[int, str, str]] = Counter()
    for number, graph in enumerate(graphs):
        lowered = {id(r): call.lowered for r, call in graph.calls}
        for region in graph.partition.regions:
            regions.append(_region(number, region, lowered.get(id(region))))
        for node, why in graph.partition.left.items():
            left[number, op_name(node) or str(node.target), why or "castile has nothing to gain here"] += 1
    return ModelExplanation(len(graphs), tuple(regions), tuple((*key, n) for key, n in left.items()))


def _region(graph: int, region: Region, lowered: Lowered | None) -> RegionReport:
    cascade = lowered.cascade if lowered is not None else None
    extents = dict(lowered.hints) if lowered is not None else {}
    operations = tuple(op_name(n) for n in region.nodes)
    passes: dict[str, tuple[int, int]] = {}
    if cascade is not None:
        try:
            passes = dict(driver.explain(cascade).passes)
        except CastileError:
            passes = {}
    name = cascade.name if cascade is not None else operations[0]
    return RegionReport(graph, name, region.kind, operations, region.chosen, region.reason, cascade, passes, extents)


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"
