"""A region of an ATen graph as a cascade: every node by its row of `aten`, then parameters, ranks and names settled."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch._prims_common import ELEMENTWISE_TYPE_PROMOTION_KIND, elementwise_dtypes
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import GraphModule, Node

from ..ir.cascade import (
    Access,
    Cascade,
    Const,
    Einsum,
    Expr,
    Param,
    Rank,
    Reduce,
    live_einsums,
    tensors_read,
    walk,
)
from ..ir.dtypes import DTYPES as DTYPE_ROWS
from ..ir.verify import verify
from . import aten_layers, aten_layout, aten_pointwise, sdpa  # noqa: F401, they register their handlers
from .aten import HANDLERS, Site
from .aten_pointwise import POINTWISE
from .finish import WITNESS, cut_axes, digits, one_name, renamed, unshown
from .hidden import may_hide
from .nodes import DTYPES, FLEX, base_name, dtype_of, fakes, hint, op_name
from .values import Size, Unsupported, Value, Workspace, number, product, same

# Einsums past which a region is cut: deriving takes time, and nothing is gained.
LARGEST_REGION = 48


@dataclass(frozen=True, slots=True)
class Argument:
    """What a kernel's parameter is given: a node's result, its axes cut into these sizes. ``sizes`` None: a number."""

    name: str
    node: Node
    sizes: tuple[Size, ...] | None


@dataclass(frozen=True, slots=True)
class Lowered:
    """A region as a cascade. ``results`` name the nodes that its outputs stand for, with the sizes of their axes as
    eager has them; ``orders`` the order in which the outputs' ranks take these.

    ``witness`` holds the sizes of ranks that no argument shows; a tensor of these sizes without memory is passed.
    """

    cascade: Cascade
    arguments: tuple[Argument, ...]
    results: tuple[tuple[Node, int, tuple[Size, ...]], ...]
    orders: tuple[tuple[int, ...], ...]
    witness: tuple[Size, ...]
    hints: Mapping[str, int]


class Lowering:
    """One region on its way to a cascade."""

    def __init__(self) -> None:
        self.ws = Workspace(may_hide=lambda name: may_hide(self.inputs[name][0]))
        self.values: dict[Node, Any] = {}
        self.inputs: dict[str, tuple[Node, tuple[Size, ...] | None]] = {}
        self._symbols: dict[Node, Value] = {}

    # Inputs

    def take(self, node: Node) -> None:
        """A tensor that comes from outside the region."""
        (fake,) = fakes(node)
        dtype = dtype_of(fake)
        sizes = tuple(fake.shape)
        name, value = self.ws.tensor(dtype, sizes)
        self.inputs[name] = (node, sizes)
        self.values[node] = value

    def symbol(self, node: Node) -> Value:
        """A dynamic integer used as a value: a scalar parameter."""
        found = self._symbols.get(node)
        if found is None:
            if not isinstance(fakes(node)[0], torch.SymInt):
                raise Unsupported("a number that is known only when it runs")
            name, found = self.ws.scalar("i64")
            self.inputs[name] = (node, None)
            self._symbols[node] = found
        return found

    # Nodes

    def lower(self, node: Node, often: bool) -> None:
        """Lower one node; what is read often and is not cheap gets a name."""
        if node.target is operator.getitem:
            whole, at = node.args
            value = self.values[whole][at]  # type: ignore[index]
            if value is None:
                raise Unsupported("a result that castile does not compute")
        else:
            value = self.apply(node)
        if isinstance(value, Value):
            value = self.ws.named(value, base_name(node)) if often else self.ws.short(value, base_name(node))
        self.values[node] = value
        if len(self.ws.einsums) > LARGEST_REGION:
            raise Unsupported("a region of too many steps")

    def apply(self, node: Node) -> Any:
        """What the node computes, of the dtype and shape that its fake results have."""
        name = op_name(node)
        made = fakes(node)
        wanted = [f for f in made if isinstance(f, torch.Tensor)]
        if not wanted:
            raise Unsupported(f"`{name}` gives no tensor")
        site = Site(
            self.ws,
            tuple(dtype_of(f) for f in wanted),
            tuple(tuple(f.shape) for f in wanted),
            base_name(node),
            _meeting(node) if name in POINTWISE and wanted[0].dtype is torch.bool else "",
        )
        if name == FLEX:
            return self._fit(self._flex(site, node), made, name)
        handler = HANDLERS.get(name)
        if handler is None:
            raise Unsupported(f"`{name}` has no cascade")
        shaping = name.split(".")[0] in SHAPING
        args = [self._argument(a, shaping) for a in node.args]
        kwargs = {k: self._argument(v, shaping) for k, v in node.kwargs.items() if k not in _IGNORED}
        _one_precision(name, (*site.dtypes, *(v.dtype for v in (*args, *kwargs.values()) if isinstance(v, Value))))
        return self._fit(handler(site, *args, **kwargs), made, name)

    def _argument(self, given: Any, shaping: bool) -> Any:
        if isinstance(given, Node):
            if given in self.values:
                return self.values[given]
            val = given.meta.get("val")
            if isinstance(val, torch.SymInt) and shaping:
                return val
            return self.symbol(given)
        if isinstance(given, (list, tuple)):
            return [self._argument(x, shaping) for x in given]
        return given

    def _fit(self, value: Any, made: Sequence[Any], name: str) -> Any:
        if isinstance(value, Value):
            return self._conform(value, made[0], name)
        return tuple(None if v is None else self._conform(v, f, name) for v, f in zip(value, made, strict=False))

    def _conform(self, value: Value, fake: torch.Tensor, name: str) -> Value:
        """The value checked against the fake result, and rounded to its dtype."""
        value = self.ws.cast(value, dtype_of(fake))
        if len(value.dims) != fake.ndim:
            raise Unsupported(f"`{name}` gives {fake.ndim} dimensions, its cascade {len(value.dims)}")
        dims = list(value.dims)
        for axis, (ranks, size) in enumerate(zip(value.dims, fake.shape, strict=True)):
            found: Size = 1
            for r in ranks:
                found = found * self.ws.sizes[r]
            if same(found, size):
                continue
            raise Unsupported(f"`{name}` gives size {size} on axis {axis}, its cascade {found}")
        return Value(tuple(dims), value.expr, value.dtype)

    # flex_attention

    def _flex(self, site: Site, node: Node) -> Any:
        given: tuple[Any, ...] = node.args
        q, k, v, score_mod, block_mask, scale, _options, score_buffers, mask_buffers = given
        graph = node.graph.owning_module
        mask_mod = block_mask[-1]
        score = self._mod(graph, score_mod, score_buffers)
        mask = self._mod(graph, mask_mod, mask_buffers)
        if not all(isinstance(x, Node) and x in self.values for x in (q, k, v)) or not isinstance(scale, float):
            raise Unsupported("flex_attention with a dynamic scale")
        users = {u.args[1] for u in node.users if u.target is operator.getitem}
        if users - {0, 1}:
            raise Unsupported("the maximum of flex_attention's scores")
        a, b, c = (self.values[x] for x in (q, k, v))
        out, lse = sdpa.flex(site, a, b, c, score, mask, scale, 1 in users)
        return out, lse, None

    def _mod(self, graph: Any, attribute: Any, buffers: Any) -> sdpa.Mod:
        if not isinstance(attribute, Node):
            raise Unsupported("a mod that is no graph")
        module = getattr(graph, str(attribute.target))
        captured = [self._argument(b, False) for b in buffers]
        return lambda *coordinates: self._inline(module, [*coordinates, *captured])

    def _inline(self, module: GraphModule, arguments: Sequence[Value]) -> Value:
        """A mod's graph applied to values of no dimensions, whose expressions vary with the coordinates."""
        local: dict[Node, Any] = {}
        given = iter(arguments)
        for node in module.graph.nodes:
            if node.op == "placeholder":
                local[node] = next(given)
            elif node.op == "output":
                (result,) = node.args if not isinstance(node.args[0], (tuple, list)) else node.args[0]
                return local[result]  # type: ignore[no-any-return]
            elif node.op == "call_function":
                local[node] = self._inlined(node, local)
            elif node.op == "get_attr":
                local[node] = _literal(getattr(module, str(node.target)))
            else:
                raise Unsupported(f"a mod with a `{node.op}`")
        raise Unsupported("a mod without a result")

    def _inlined(self, node: Node, local: Mapping[Node, Any]) -> Any:
        if node.target is torch.ops.aten.index.Tensor:
            table, indices = local[node.args[0]], [local[i] for i in node.args[1]]  # type: ignore[index,union-attr]
            return _looked_up(table, indices)
        outer = self.values
        self.values = {**outer, **local}
        try:
            return self.apply(node)
        finally:
            self.values = outer

    # The end

    def finish(self, outputs: Sequence[Node], name: str) -> Lowered:
        """The cascade that computes the given nodes."""
        wanted: list[tuple[Node, int, Value]] = []
        for node in outputs:
            values = self.values[node]
            if not isinstance(values, tuple):
                wanted.append((node, -1, values))
                continue
            wanted += [(node, at, v) for at, v in enumerate(values) if v is not None and _is_read(node, at)]
        orders = self._orders(wanted)
        names: list[str] = []
        for (_, _, value), order in zip(wanted, orders, strict=True):
            names.append(self._output(value, names, order))
        results = tuple((node, at, self._sizes(value)) for node, at, value in wanted)
        einsums = live_einsums(self.ws.einsums, names)
        read = {t for e in einsums for t in tensors_read(e.expr)}
        params, arguments, einsums = self._parameters(einsums, read)
        hints = {r: hint(n) for r, n in self.ws.sizes.items()}
        cascade = one_name(Cascade(name, params, einsums, tuple(names)), self.ws.sizes)
        missing = unshown(cascade, self.ws.sizes, hints)
        if missing:
            cascade = replace(cascade, params=(*params, Param(WITNESS, "bool", tuple(map(Rank, missing)))))
        witness = tuple(self.ws.sizes[r] for r in missing)
        cascade, new = renamed(cascade)
        verify(cascade)
        known = {new[r]: n for r, n in hints.items() if r in new}
        arguments = tuple(replace(a, name=p.name) for a, p in zip(arguments, cascade.params, strict=False))
        return Lowered(cascade, arguments, results, orders, witness, {r: known[r] for r in cascade.ranks})

    def _sizes(self, value: Value) -> tuple[Size, ...]:
        return tuple(self.ws.sizes[r] for r in value.ranks)

    def _orders(self, results: Sequence[tuple[Node, int, Value]]) -> tuple[tuple[int, ...], ...]:
        """The order of each result's ranks in the cascade: loops follow it, so that of a map goes through memory.

        Results over the same ranks go through them together. Reductions and scans have loops of their own.
        """
        values = [v for _, _, v in results]
        plain = tuple(tuple(range(len(v.ranks))) for v in values)
        exprs = [e.expr for e in self.ws.einsums] + [v.expr for v in values]
        scans = any(e.name in tensors_read(e.expr) for e in self.ws.einsums)
        if scans or any(isinstance(n, Reduce) for e in exprs for n in walk(e)):
            return plain
        found = tuple(_memory_order(fakes(n)[max(0, at)], self._sizes(v)) for n, at, v in results)
        ranks = {tuple(v.ranks[i] for i in order) for v, order in zip(values, found, strict=True)}
        return found if len(ranks) == len(set(map(frozenset, ranks))) else plain

    def _output(self, value: Value, taken: Sequence[str], order: Sequence[int]) -> str:
        """The name of the Einsum that writes exactly this value, a new one if there is none."""
        e, ranks = value.expr, tuple(value.ranks[i] for i in order)
        if isinstance(e, Access) and e.tensor not in taken and e.tensor not in self.inputs:
            if e.indices == tuple(map(Rank, ranks)):
                return e.tensor
        written = self.ws.write(value, "y", ranks)
        assert isinstance(written.expr, Access)
        return written.expr.tensor

    def _parameters(
        self, einsums: Sequence[Einsum], read: set[str]
    ) -> tuple[tuple[Param, ...], tuple[Argument, ...], tuple[Einsum, ...]]:
        """Parameters declared over the ranks by which they are read, axes that are read in parts cut accordingly."""
        params: list[Param] = []
        arguments: list[Argument] = []
        done = tuple(einsums)
        for name, (node, sizes) in self.inputs.items():
            if name not in read:
                continue
            if sizes is None:
                params.append(Param(name, self.ws.scalars[name]))
                arguments.append(Argument(name, node, None))
                continue
            accesses = [n for e in done for n in walk(e.expr) if isinstance(n, Access) and n.tensor == name]
            if not sizes:
                params.append(Param(name, self.ws.types[name], (Const(1),)))
                arguments.append(Argument(name, node, (1,)))
                continue
            parts = [self._parts(accesses, axis, n) for axis, n in enumerate(sizes)]
            if any(p is not None for p in parts):
                done = tuple(replace(e, expr=cut_axes(e.expr, name, parts, self.ws)) for e in done)
                accesses = [n for e in done for n in walk(e.expr) if isinstance(n, Access) and n.tensor == name]
            cut = tuple(x for p, n in zip(parts, sizes, strict=True) for x in (p or (n,)))
            params.append(Param(name, self.ws.types[name], self._axes(accesses, cut)))
            arguments.append(Argument(name, node, cut))
        return tuple(params), tuple(arguments), done

    def _parts(self, accesses: Sequence[Access], axis: int, size: Size) -> tuple[Size, ...] | None:
        """The sizes into which an axis is cut if every access reads it by the same mixed radix."""
        found: tuple[Size, ...] | None = None
        for a in accesses:
            ranks = digits(a.indices[axis], self.ws)
            if ranks is None or len(ranks) < 2:
                return None
            sizes = tuple(self.ws.sizes[r] for r in ranks)
            if found is None:
                found = sizes
            elif len(found) != len(sizes) or not all(map(same, found, sizes)):
                return None
        return found if found and same(product(found), size) else None

    def _axes(self, accesses: Sequence[Access], sizes: Sequence[Size]) -> tuple[Expr, ...]:
        axes: list[Expr] = []
        for axis, size in enumerate(sizes):
            if same(size, 1):
                axes.append(Const(1))
                continue
            read = [a.indices[axis] for a in accesses]
            bare = [i for i in read if isinstance(i, Rank) and i not in axes and same(self.ws.sizes[i.name], size)]
            axes.append(bare[0] if bare else Rank(self.ws.rank(size)))
        return tuple(axes)


# Names of operations whose dynamic integers are sizes, not values.
SHAPING = frozenset(
    "view _unsafe_view reshape squeeze unsqueeze expand slice select split split_with_sizes full new_full new_zeros "
    "new_ones zeros ones arange constant_pad_nd native_layer_norm native_layer_norm_backward _fused_rms_norm cat "
    "nll_loss_forward nll_loss_backward iota flatten permute transpose".split()
)
_IGNORED = frozenset(("device", "pin_memory", "layout", "memory_format", "implicit", "non_blocking", "requires_grad"))


def _memory_order(fake: torch.Tensor, sizes: Sequence[Size]) -> tuple[int, ...]:
    """The axes of a tensor, cut into these sizes, from the outermost in memory to the innermost."""
    shape, strides = (tuple(map(hint, n)) for n in (fake.shape, fake.stride()))
    with unset_fake_temporarily():
        like = torch.empty_strided(shape, strides, device="meta")
        try:
            cut = like.view(tuple(map(hint, sizes)))
        except RuntimeError:
            return tuple(range(len(sizes)))
    far = cut.stride()
    return tuple(sorted(range(len(sizes)), key=lambda i: -far[i]))


def _is_read(node: Node, at: int) -> bool:
    return any(u.target is operator.getitem and u.args[1] == at and u.users for u in node.users)


def _meeting(node: Node) -> str:
    """The type to which ATen converts operands before it compares them."""
    given = [fakes(a)[0] if isinstance(a, Node) else a for a in node.args]
    return DTYPES[elementwise_dtypes(*given, type_promotion_kind=ELEMENTWISE_TYPE_PROMOTION_KIND.NO_OPMATH)[1]]


def _one_precision(name: str, dtypes: Iterable[str]) -> None:
    """Raises `Unsupported` for f64 beside another float: rewrites compute an expression in one of the two."""
    floats = {d for d in dtypes if DTYPE_ROWS[d].is_float}
    if "f64" in floats and len(floats) > 1:
        raise Unsupported(f"`{name}` of f64 beside {min(floats - {'f64'})}")


def _literal(constant: Any) -> Value:
    """A number that tracing keeps as a tensor."""
    if not isinstance(constant, torch.Tensor) or constant.ndim or constant.dtype not in DTYPES:
        raise Unsupported("a mod with a tensor of its own")
    with unset_fake_temporarily():
        return Value((), number(constant.item()), DTYPES[constant.dtype])


def _looked_up(table: Value, indices: Sequence[Value]) -> Value:
    """An element of a captured tensor at coordinates."""
    if not isinstance(table.expr, Access) or len(indices) != len(table.dims):
        raise Unsupported("a mod that reads a part of a captured tensor")
    where = tuple(Const(0) if not d else i.expr for d, i in zip(table.dims, indices, strict=True))
    return Value((), Access(table.expr.tensor, where or (Const(0),)), table.dtype)
