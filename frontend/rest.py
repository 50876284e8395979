"""`fallback="inductor"`: what castile leaves of a graph, between its regions, compiled by Inductor."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from .nodes import is_impure, is_view
from .region import RegionCall


class Rest(torch.nn.Module):
    """A piece of a graph as Inductor compiled it."""

    def __init__(self, run: Callable[[list[Any]], Sequence[Any]], single: bool) -> None:
        super().__init__()
        self.run, self.single = run, single

    def forward(self, *args: Any) -> Any:
        results = self.run(list(args))
        return results[0] if self.single else tuple(results)


def with_inductor(gm: GraphModule) -> GraphModule:
    """The graph with each piece between regions compiled by Inductor.

    What draws random numbers or writes memory stays as it is, so that it does so in its order and as eager does. A
    piece that Inductor does not compile, or would lay out in another way, runs in eager, with a warning.
    """
    from torch.fx.passes.split_module import split_module

    pieces = _pieces(gm)
    whole: GraphModule = split_module(gm, None, pieces.__getitem__, keep_original_order=True)  # type: ignore[arg-type]
    for name, piece in list(whole.named_children()):
        assert isinstance(piece, GraphModule)
        if any(_computes(n) for n in piece.graph.nodes) and not any(map(_is_apart, piece.graph.nodes)):
            try:
                setattr(whole, name, _compiled(piece))
            except Exception as error:  # whatever Inductor does, the model runs
                said = str(error).splitlines()[0] if str(error) else type(error).__name__
                warnings.warn(f"castile: a part of the rest runs in eager: {said}", RuntimeWarning, stacklevel=2)
    return whole


def _pieces(gm: GraphModule) -> dict[Node, int]:
    """The number of each node's piece: regions and what has to stay have their own."""
    found: dict[Node, int] = {}
    number, last = 0, False
    for n in gm.graph.nodes:
        apart = _is_apart(n) or (bool(n.all_input_nodes) and _item_of(n))
        number += apart != last
        found[n], last = number, apart
    return found


def _is_apart(n: Node) -> bool:
    if n.op != "call_function":
        return False
    return isinstance(n.target, (RegionCall, torch._ops.HigherOrderOperator)) or is_impure(n)


def _item_of(n: Node) -> bool:
    """Whether a node is an item, of whatever depth, of what stands apart."""
    while n.op == "call_function" and "getitem" in str(n.target) and n.args and isinstance(n.args[0], Node):
        n = n.args[0]
        if _is_apart(n):
            return True
    return False


def _computes(n: Node) -> bool:
    return n.op == "call_function" and not is_view(n) and isinstance(n.meta.get("val"), (torch.Tensor, tuple, list))


def _compiled(piece: GraphModule) -> Rest:
    from torch._guards import TracingContext, tracing
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.utils._python_dispatch import _disable_current_modes

    fakes = [n.meta["val"] for n in piece.graph.nodes if n.op == "placeholder"]
    (output,) = (n for n in piece.graph.nodes if n.op == "output")
    single = isinstance(output.args[0], Node)
    results = [output.args[0]] if single else list(output.args[0])

    def run(*args: Any) -> tuple[Any, ...]:
        found = piece(*args)
        return (found,) if single else tuple(found)

    mode = next(f.fake_mode for f in fakes if isinstance(f, torch._subclasses.FakeTensor))
    with torch.no_grad(), mode:
        traced = make_fx(run, decomposition_table=select_decomp_table())(*fakes)
    (last,) = (n for n in traced.graph.nodes if n.op == "output")
    for mine, theirs in zip(last.args[0], results, strict=True):
        if isinstance(theirs.meta["val"], torch.Tensor) and mine.meta["val"].stride() != theirs.meta["val"].stride():
            raise ValueError("Inductor would give other strides than eager")
    last.meta["user_visible_output_idxs"] = list(range(len(results)))
    # A tracing context of its own: Inductor notes there how the results of whole graphs lie.
    apart = tracing(TracingContext(mode))
    with apart, config.patch(fallback_random=True), _disable_current_modes():
        return Rest(compile_fx_inner(traced, fakes, is_inference=True), single)
