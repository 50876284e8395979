"""A region at run time: arguments cut into the kernel's axes, results in eager's strides, eager where castile fails."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from .. import driver
from ..autotune.places import records_path
from ..codegen.kernel import Kernel
from ..ir.cascade import Cascade
from ..ir.errors import CastileError
from .finish import WITNESS
from .fx import Argument, Lowered
from .nodes import fakes
from .values import Size, Unsupported, same

# Dynamic shapes of which a region's sizes are remembered.
SHAPES = 1024

# What a kernel may differ from eager, relative to the largest entry, when `CASTILE_CHECK=1` compares them.
CHECKED = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# And, absolutely, how many times what it moves by where last bits of its inputs change.
NUDGES = 32


class RegionError(CastileError):
    """With `CASTILE_CHECK=1`: a region whose kernel does not agree with eager."""

    stage = "check"


def kernel_of(cascade: Cascade, target: str | None, numerics: str | None, tune: str = "cached") -> Kernel:
    """The kernel of a cascade, one for all regions that say the same; unless ``tune`` is "off", as it is on record."""
    return _kernel(cascade, target, numerics, tune, None if tune == "off" else _records_stamp())


@lru_cache(maxsize=2048)
def _kernel(cascade: Cascade, target: str | None, numerics: str | None, tune: str, _stamp: Any) -> Kernel:
    return driver.compile(cascade, target=target, numerics=numerics, tuned=tune != "off")


def _records_stamp() -> tuple[str, int] | None:
    """What changes when something is tuned: kernels made before know nothing of it."""
    path = records_path()
    try:
        return str(path), path.stat().st_mtime_ns
    except OSError:
        return None


@dataclass(frozen=True, slots=True)
class Result:
    """A result as eager lays it out: shape, strides, and the sizes of the kernel's axes, which it takes in an order."""

    shape: tuple[Size, ...]
    strides: tuple[Size, ...]
    sizes: tuple[Size, ...]
    order: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Made:
    """A `Result` of known sizes."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    sizes: tuple[int, ...]
    order: tuple[int, ...]
    dtype: torch.dtype

    def empty(self) -> torch.Tensor:
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype)

    def axes(self, y: torch.Tensor) -> torch.Tensor:
        """The result as the kernel takes it."""
        return y.view(self.sizes).permute(self.order)


@dataclass(frozen=True, slots=True)
class Plan:
    """Sizes as integers, for one set of dynamic shapes: arguments as the kernel takes them, results as eager has them.

    ``views`` gives for each parameter the argument's place and, where it is not the argument's own, its shape;
    ``results`` what the kernel writes. ``empty`` says that some size is 0: a mean of nothing is no number in eager, and
    0 in the language.
    """

    views: tuple[tuple[str, int, tuple[int, ...] | None], ...]
    witness: torch.Tensor | None
    results: tuple[Made, ...]
    empty: bool


@dataclass(frozen=True, slots=True)
class Quick:
    """What is left of a call once arguments that lie like these have been seen to fit: addresses in, new tensors out.

    ``tensors`` says which argument each parameter of the kernel is, and which low bits of its address have to be 0;
    ``numbers`` which are scalars.
    """

    tensors: tuple[tuple[int, int], ...]
    numbers: tuple[int, ...]
    plan: Plan
    launch: Callable[[Sequence[Any], list[int]], None]


class RegionCall:
    """What stands in the graph for a region: a callable of the tensors and sizes that the region reads."""

    def __init__(
        self,
        name: str,
        lowered: Lowered,
        leaves: Sequence[Node],
        reference: GraphModule,
        kernel: Kernel,
        check: bool,
    ) -> None:
        self.__name__ = name
        self.lowered = lowered
        self.leaves = tuple(leaves)
        self.kernel = kernel
        self.reference = reference
        self.check = check
        self.failed = False
        place = {n: i for i, n in enumerate(leaves)}
        self._arguments = tuple((a.name, place[a.node], a.sizes, _shape(a)) for a in lowered.arguments)
        self._results = tuple(_result(*r, order) for r, order in zip(lowered.results, lowered.orders, strict=True))
        self._symbols = _symbols(self._expressions(), leaves)
        self._plans: dict[tuple[int, ...], Plan] = {}
        self._quick: dict[tuple[Any, ...], Quick] = {}
        self._run: Callable[..., Any] = kernel

    def _expressions(self) -> list[Size]:
        found: list[Size] = [n for _, _, sizes, _ in self._arguments for n in sizes or ()]
        for r in self._results:
            found += [*r.shape, *r.strides, *r.sizes]
        return found + list(self.lowered.witness)

    def build(self) -> None:
        """Compile the kernel for the shapes that the graph was traced with. Raises what the compiler raises."""
        self.kernel.runner(dict(self.lowered.hints))

    def __call__(self, *args: Any) -> Any:
        if self.failed:
            return self.reference(*args)
        try:
            results = self._compute(args)
        except Exception as error:  # whatever a kernel does, the model runs
            results = self.reference(*args)  # what eager refuses as well is no fault of the kernel's
            self.failed = True
            warn_fallback(self.__name__, error)
            return results
        if self.check:
            self._compare(results, args)
        return results

    def _compute(self, args: Sequence[Any]) -> tuple[Any, ...]:
        layouts = tuple([a if type(a) is int else (a.shape, a.stride()) for a in args])
        quick = self._quick.get(layouts)
        if quick is not None:
            results = _launched(quick, args)
            if results is not None:
                return results
        plan = self.plan(args)
        if plan.empty:
            return tuple(self.reference(*args))
        inputs = {name: args[at] if view is None else args[at].view(view) for name, at, view in plan.views}
        if plan.witness is not None:
            inputs[WITNESS] = plan.witness
        made = tuple(r.empty() for r in plan.results)
        out = tuple(r.axes(y) for r, y in zip(plan.results, made, strict=True))
        self._run(out=out, **inputs)
        launch = self.kernel.launcher(inputs, out)
        if launch is not None:
            while len(self._quick) >= SHAPES:
                self._quick.pop(next(iter(self._quick)), None)
            self._quick[layouts] = self._quickly(plan, inputs, launch)
        return made

    def _quickly(self, plan: Plan, inputs: Mapping[str, Any], launch: Callable[..., None]) -> Quick:
        at = {name: place for name, place, _ in plan.views}
        params = self.lowered.cascade.params
        tensors = tuple((at.get(p.name, -1), inputs[p.name].element_size() - 1) for p in params if p.indices)
        return Quick(tensors, tuple(at[p.name] for p in params if not p.indices), plan, launch)

    def plan(self, args: Sequence[Any]) -> Plan:
        """What the sizes of these arguments make of arguments and results."""
        key = tuple([source(args) for _, source in self._symbols])
        found = self._plans.get(key)
        if found is None:
            while len(self._plans) >= SHAPES:
                self._plans.pop(next(iter(self._plans)), None)
            found = self._plans[key] = self._planned(dict(zip([s for s, _ in self._symbols], key, strict=True)))
        return found

    def _planned(self, symbols: Mapping[Any, int]) -> Plan:
        def ints(sizes: Sequence[Size]) -> tuple[int, ...]:
            return tuple(_number(n, symbols) for n in sizes)

        views = tuple(
            (name, at, None if sizes is None or _alike(sizes, shape) else ints(sizes))
            for name, at, sizes, shape in self._arguments
        )
        witness = None
        if self.lowered.witness:
            witness = torch.zeros((), dtype=torch.bool).expand(ints(self.lowered.witness))
        made = tuple(Made(ints(r.shape), ints(r.strides), ints(r.sizes), r.order, r.dtype) for r in self._results)
        read = [n for _, _, sizes, _ in self._arguments for n in ints(sizes or ())]
        written = [n for r in made for n in r.sizes]
        return Plan(views, witness, made, 0 in (*read, *written, *ints(self.lowered.witness)))

    def _compare(self, results: Sequence[Any], args: Sequence[Any]) -> None:
        expected = self.reference(*args)
        if all(map(_agrees, results, expected)):
            return
        # Where nearly all cancels, what is left is rounding in eager too: as much as last bits of the inputs make.
        nudged = self.reference(*map(_nudged, args))
        for i, (mine, theirs, near) in enumerate(zip(results, expected, nudged, strict=True)):
            if not _agrees(mine, theirs, NUDGES * _distance(near, theirs)):
                raise RegionError(
                    f"result {i} of region `{self.__name__}` differs from eager's",
                    expected=str(theirs.flatten()[:8].tolist()),
                    got=str(mine.flatten()[:8].tolist()),
                    hint=f"please report this cascade:\n{self.lowered.cascade}",
                )


def _launched(quick: Quick, args: Sequence[Any]) -> tuple[Any, ...] | None:
    """The results of arguments that lie as `quick` knows; None where one starts at an odd address."""
    pointers = []
    for at, odd in quick.tensors:
        pointer = args[at].data_ptr() if at >= 0 else quick.plan.witness.data_ptr()  # type: ignore[union-attr]
        if pointer & odd:
            return None
        pointers.append(pointer)
    made = tuple([r.empty() for r in quick.plan.results])
    pointers += [y.data_ptr() for y in made]
    quick.launch([args[at] for at in quick.numbers], pointers)
    return made


def warn_fallback(name: str, error: Exception) -> None:
    """One warning that a region runs as in eager, why, and what to do."""
    said = str(error) or type(error).__name__
    todo = "" if getattr(error, "hint", "") else "\nhint: castile.explain_model(model, *inputs) shows its cascade"
    warnings.warn(f"castile: `{name}` runs in eager: {said}{todo}", RuntimeWarning, stacklevel=3)


def _nudged(x: Any) -> Any:
    """A tensor of floats with its last bits changed, up and down in turn."""
    if not isinstance(x, torch.Tensor) or not x.dtype.is_floating_point:
        return x
    signs = torch.randint(2, x.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return (x.double() * (1 + torch.finfo(x.dtype).eps * signs)).to(x.dtype)


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """The greatest difference of finite entries."""
    apart = (a.double() - b.double()).abs()
    apart = apart[apart.isfinite()]
    return float(apart.max()) if apart.numel() else 0.0


def _agrees(mine: torch.Tensor, theirs: torch.Tensor, slack: float = 0.0) -> bool:
    if mine.shape != theirs.shape or mine.dtype != theirs.dtype:
        return False
    if not theirs.dtype.is_floating_point:
        return bool(torch.equal(mine, theirs))
    # A row that masks leave empty is 0 where eager gives NaN.
    known = ~theirs.isnan()
    a, b = mine.double()[known], theirs.double()[known]
    largest = float(b[b.isfinite()].abs().max()) if bool(b.isfinite().any()) else 0.0
    tolerance = CHECKED[theirs.dtype] * max(1e-6, largest) + slack
    return bool(((a == b) | ((a - b).abs() <= tolerance)).all())


def _shape(a: Argument) -> tuple[Size, ...]:
    fake = fakes(a.node)[0]
    return tuple(fake.shape) if isinstance(fake, torch.Tensor) else ()


def _alike(a: Sequence[Size], b: Sequence[Size]) -> bool:
    return len(a) == len(b) and all(map(same, a, b))


def _result(node: Node, at: int, sizes: tuple[Size, ...], order: tuple[int, ...]) -> Result:
    fake = fakes(node)[max(0, at)]
    return Result(tuple(fake.shape), tuple(fake.stride()), sizes, order, fake.dtype)


# Dynamic sizes


def _number(n: Size, symbols: Mapping[Any, int]) -> int:
    if isinstance(n, int):
        return n
    return int(n.node.expr.xreplace(dict(symbols)))


def _symbols(sizes: Sequence[Size], leaves: Sequence[Node]) -> tuple[tuple[Any, Callable[[Any], int]], ...]:
    """Where each symbol of the sizes is read off at run time: an argument, or an axis of one."""
    wanted = {s for n in sizes if not isinstance(n, int) for s in n.node.expr.free_symbols}
    found: dict[Any, Callable[[Any], int]] = {}
    for i, leaf in enumerate(leaves):
        fake: Any = fakes(leaf)[0]
        if isinstance(fake, torch.SymInt):
            found.setdefault(fake.node.expr, _argument(i))
        elif isinstance(fake, torch.Tensor):
            dims: Any = fake.shape
            for axis, n in enumerate(dims):
                if not isinstance(n, int):
                    found.setdefault(n.node.expr, _axis(i, axis))
    if wanted - found.keys():
        raise Unsupported(f"nothing shows the size {min(map(str, wanted - found.keys()))}")
    return tuple((s, found[s]) for s in sorted(wanted, key=str))


def _argument(i: int) -> Callable[[Any], int]:
    return lambda args: int(args[i])


def _axis(i: int, axis: int) -> Callable[[Any], int]:
    return lambda args: int(args[i].shape[axis])


# The region as eager runs it


def extract(
    gm: GraphModule, results: Sequence[tuple[Node, int, Any]], arguments: Sequence[Argument]
) -> tuple[GraphModule, list[Node]]:
    """The graph that computes results from arguments, operation by operation; and all that it reads, in order."""
    graph = Graph()
    env: dict[Node, Node] = {}
    leaves: list[Node] = []
    stop = {a.node for a in arguments}

    def leaf(n: Node) -> Node:
        leaves.append(n)
        new = graph.placeholder(f"a{len(leaves)}")
        new.meta = dict(n.meta)
        return new

    for a in arguments:
        if a.node not in env:
            env[a.node] = leaf(a.node)
    needed = _nodes_between([n for n, _, _ in results], stop)
    for n in needed:
        if n.op == "placeholder" or (
            n.op == "call_function"
            and not isinstance(fakes(n)[0], torch.Tensor)
            and not isinstance(n.meta.get("val"), (tuple, list))
        ):
            env[n] = leaf(n)
    for n in needed:
        if n not in env:
            env[n] = graph.node_copy(n, env.__getitem__)
    outputs = []
    for n, at, _ in results:
        outputs.append(env[n] if at < 0 else graph.call_function(_item, (env[n], at)))
    graph.output(tuple(outputs))
    return GraphModule(gm, graph), leaves


def _item(values: Sequence[Any], at: int) -> Any:
    return values[at]


def _nodes_between(last: Sequence[Node], stop: set[Node]) -> list[Node]:
    """Everything that the last nodes need down to those at which to stop, each after what it reads."""
    done: dict[Node, None] = {}
    todo: list[tuple[Node, bool]] = [(n, False) for n in last]
    while todo:
        n, ready = todo.pop()
        if n in done or n in stop:
            continue
        if ready:
            done[n] = None
            continue
        todo.append((n, True))
        todo += [(a, False) for a in n.all_input_nodes]
    return list(done)
