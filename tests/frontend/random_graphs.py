"""Random graphs of torch operations, by seed, and whether castile gives what eager gives."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

SIZES = (1, 2, 3, 4, 5, 7, 8, 16, 17, 33)
MOST = 20_000
TYPES = (torch.float32, torch.float32, torch.float32, torch.bfloat16, torch.float16)
NARROW = {torch.bfloat16: 8e-3, torch.float16: 1e-3}

UNARY = (
    torch.exp, torch.tanh, torch.sigmoid, torch.erf, torch.relu, F.gelu, F.silu, torch.neg, torch.abs, torch.square,
    F.softplus, F.elu, F.leaky_relu, F.mish, torch.sin, F.hardtanh, F.hardswish, F.logsigmoid, torch.expm1, torch.sign,
    torch.reciprocal,
)  # fmt: skip
BINARY = (torch.add, torch.sub, torch.mul, torch.maximum, torch.minimum)
COMPARE = (torch.lt, torch.le, torch.gt, torch.ge)

# A node of the graph and what eager makes of it.
Made = tuple[fx.Node, Tensor]


class Impossible(Exception):
    """A step that nothing in the graph so far fits."""


class Builder:
    """A graph while it grows: each step takes tensors that are there already."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        torch.manual_seed(seed)
        self.graph = fx.Graph()
        self.pool: list[Made] = []
        self.inputs: list[Tensor] = []
        self.sizes = [self.draw.choice(SIZES) for _ in range(4)]
        self.dtype = self.draw.choice(TYPES)
        self.grad = self.draw.random() < 0.35
        for _ in range(self.draw.randint(1, 3)):
            self._input(self._layout(torch.randn(self._shape())).to(self._dtype()))
        if self.draw.random() < 0.3:
            self._input(torch.randint(0, self.draw.choice(self.sizes), (self.draw.choice(self.sizes),)))
        if self.draw.random() < 0.3:
            self._input(torch.rand(self.draw.choice(self.inputs).shape) > 0.3)

    def _shape(self) -> list[int]:
        shape = [self.draw.choice(self.sizes) for _ in range(self.draw.randint(1, 4))]
        while math.prod(shape) > MOST:
            shape.pop()
        return shape

    def _layout(self, x: Tensor) -> Tensor:
        """The same numbers as they may lie: across, apart, or one for all."""
        match self.draw.randrange(8):
            case 0:
                return x.transpose(0, -1).contiguous().transpose(0, -1)
            case 1:
                return torch.cat([x, x], -1)[..., ::2]
            case 2:
                return x[..., :1].expand(x.shape)
        return x

    def _dtype(self) -> torch.dtype:
        return self.dtype if self.draw.random() < 0.9 else self.draw.choice(TYPES)

    def _input(self, x: Tensor) -> None:
        self.inputs.append(x)
        self.pool.append((self.graph.placeholder(f"x{len(self.inputs)}"), x))

    def pick(self, fits: Callable[[Tensor], bool] = Tensor.is_floating_point) -> Made:
        """A tensor that fits; later ones rather than earlier ones."""
        found = [made for made in self.pool if fits(made[1])]
        if not found:
            raise Impossible
        return found[max(self.draw.randrange(len(found)), self.draw.randrange(len(found)))]

    def tall(self, least: int = 1) -> Made:
        return self.pick(lambda x: x.is_floating_point() and x.dim() >= least)

    def beside(self, made: Made) -> Made:
        """A tensor that broadcasts with another."""

        def fits(x: Tensor) -> bool:
            try:
                return x.is_floating_point() and torch.broadcast_shapes(x.shape, made[1].shape).numel() <= MOST
            except RuntimeError:
                return False

        return self.pick(fits)

    def put(self, target: Callable[..., Any] | str, *args: Any, **given: Any) -> Made:
        """An operation: a function, or the name of a method."""

        def part(a: Any, at: int) -> Any:
            if isinstance(a, list):
                return [part(x, at) for x in a]
            return a[at] if isinstance(a, tuple) and a and isinstance(a[0], fx.Node) else a

        nodes, values = ([part(a, at) for a in args] for at in (0, 1))
        call = getattr(values[0], target) if isinstance(target, str) else target
        result = call(*(values[1:] if isinstance(target, str) else values), **given)
        if not isinstance(result, Tensor) or result.numel() > 3 * MOST or not result.isfinite().all():
            raise Impossible
        add = self.graph.call_method if isinstance(target, str) else self.graph.call_function
        self.pool.append((add(target, tuple(nodes), given), result))  # type: ignore[arg-type]
        return self.pool[-1]

    def step(self) -> None:
        kinds = (
            (self.unary, 20), (self.binary, 16), (self.choice, 7), (self.reduction, 13), (self.norm, 6),
            (self.layout, 20), (self.product, 10), (self.cast, 5), (self.gather, 4), (self.in_place, 3),
        )  # fmt: skip
        self.draw.choices([k for k, _ in kinds], [w for _, w in kinds])[0]()

    def unary(self) -> None:
        self.put(self.draw.choice(UNARY), self.pick())

    def binary(self) -> None:
        x = self.pick()
        if self.draw.random() < 0.2:
            self.put(torch.mul, x, self.draw.choice([0.5, 2.0, -1.5, 3]))
        elif self.draw.random() < 0.15:
            self.put(torch.div, x, self.put(torch.add, self.put(torch.abs, self.beside(x)), 0.5))
        else:
            self.put(self.draw.choice(BINARY), x, self.beside(x))

    def choice(self) -> None:
        x = self.pick()
        y = self.beside(x)
        asked = self.put(self.draw.choice(COMPARE), x, self.draw.choice([y, 0.25]))
        self.put(torch.where, asked, x, self.draw.choice([y, 0.0]))

    def reduction(self) -> None:
        x = self.tall()
        axis, keep = self.draw.randrange(-x[1].dim(), x[1].dim()), self.draw.random() < 0.5
        match self.draw.randrange(12):
            case 0 | 1:
                self.put(torch.softmax, x, dim=axis)
            case 2:
                self.put(torch.log_softmax, x, dim=axis)
            case 3:
                self.put(torch.logsumexp, x, dim=axis, keepdim=keep)
            case 4 | 5:
                over = self.draw.choice([axis, tuple(range(x[1].dim()))])
                self.put(self.draw.choice([torch.sum, torch.mean]), x, dim=over, keepdim=keep)
            case 6 | 7:
                self.put(self.draw.choice([torch.amax, torch.amin]), x, dim=axis, keepdim=keep)
            case 8:
                self.put(torch.var, x, dim=axis, keepdim=keep, unbiased=False)
            case 9:
                self.put(torch.linalg.vector_norm, x, dim=axis, keepdim=keep)
            case 10:
                self.put(self.draw.choice([torch.cumsum, torch.prod]), x, dim=axis)
            case _:
                self.put(F.normalize, x, dim=axis)

    def norm(self) -> None:
        x = self.pick(lambda x: x.is_floating_point() and x.dim() > 0 and x.shape[-1] > 1)
        self.put(self.draw.choice([F.layer_norm, F.rms_norm]), x, [x[1].shape[-1]], eps=1e-5)

    def layout(self) -> None:
        x = self.pick(lambda x: x.dim() > 0)
        shape = list(x[1].shape)
        axis = self.draw.randrange(len(shape))
        match self.draw.randrange(14):
            case 0 | 1:
                self.put("transpose", x, axis, self.draw.randrange(len(shape)))
            case 2:
                self.put("permute", x, *self.draw.sample(range(len(shape)), len(shape)))
            case 3:
                count = x[1].numel()
                self.put("reshape", x, self.draw.choice([n for n in range(1, count + 1) if count % n == 0]), -1)
            case 4:
                self.put(self.draw.choice(["flatten", "squeeze"]), x)
            case 5:
                self.put("unsqueeze", x, axis)
            case 6:
                start = self.draw.randrange(shape[axis])
                self.put("narrow", x, axis, start, self.draw.randint(1, shape[axis] - start))
            case 7:
                self.put("select", x, axis, self.draw.randrange(shape[axis]))
            case 8:
                self.put(torch.flip, x, [axis])
            case 9 | 10:
                like = self.pick(lambda y: y.dtype == x[1].dtype and list(y.shape) == shape)
                self.put(self.draw.choice([torch.cat, torch.stack]), [x, like], dim=axis)
            case 11:
                value = 0.0 if x[1].dtype == torch.bool else self.draw.choice([0, 1])
                self.put(F.pad, x, [self.draw.randint(0, 2), self.draw.randint(-1, 2)], value=value)
            case 12:
                self.put("repeat", x, *(self.draw.randint(1, 2) for _ in shape))
            case _:
                self.put(self.draw.choice([torch.tril, torch.triu]), x, self.draw.randint(-1, 1))

    def product(self) -> None:
        x = self.tall(2)
        deep = x[1].shape[-1]
        match self.draw.randrange(4):
            case 0:
                self.put(torch.matmul, x, self.pick(lambda y: y.dtype == x[1].dtype and y.shape[-2:-1] == (deep,)))
            case 1:
                self.put(torch.matmul, x, self.put("transpose", x, -1, -2))
            case 2:
                self.put(
                    F.linear, x, self.pick(lambda y: y.dtype == x[1].dtype and y.dim() == 2 and y.shape[1] == deep)
                )
            case _:
                q = x if x[1].dim() == 4 else self.put("reshape", x, 1, 1, -1, deep)
                k, v = self.put(torch.mul, q, 0.7), self.put(torch.tanh, q)
                self.put(F.scaled_dot_product_attention, q, k, v, is_causal=self.draw.random() < 0.4)

    def cast(self) -> None:
        self.put("to", self.pick(), self.draw.choice([torch.float32, torch.bfloat16, torch.float16]))

    def gather(self) -> None:
        x = self.tall()
        if self.draw.random() < 0.5:
            mask = self.pick(lambda y: y.dtype == torch.bool and y.shape == x[1].shape)
            self.put(torch.softmax, self.put(torch.masked_fill, x, mask, -1e9), dim=-1)
        else:
            ids = self.pick(lambda y: y.dtype == torch.int64 and bool((y < x[1].shape[0]).all()))
            self.put(torch.index_select, x, 0, ids)

    def in_place(self) -> None:
        y = self.put("clone", self.tall())
        self.put("mul_", y, 0.5)
        self.put("fill_", self.put("narrow", y, 0, 0, 1), 0.25)
        self.put(torch.add, y, 0.0)

    def build(self, steps: int) -> fx.GraphModule | None:
        for _ in range(steps):
            try:
                self.step()
            except (Impossible, RuntimeError, IndexError, TypeError, ValueError):
                continue
        made = [node for node, _ in self.pool if node.op != "placeholder"]
        if not made:
            return None
        also = self.draw.sample(made, min(len(made), self.draw.randint(0, 2)))
        self.graph.output(tuple(dict.fromkeys([made[-1], *also])))
        return fx.GraphModule(torch.nn.Module(), self.graph)


def results(f: Callable[..., Any], inputs: Sequence[Tensor], grad: bool) -> list[Tensor]:
    """What a function gives, and with ``grad`` the gradients of a weighted sum of it all."""
    given = [x.detach().requires_grad_(grad and x.is_floating_point()) for x in inputs]
    with torch.set_grad_enabled(grad):
        found = list(f(*given))
        total = torch.zeros((), dtype=torch.float64)
        for y in found:
            if y.requires_grad:
                weights = torch.linspace(0.5, 1.5, max(1, y.numel()), dtype=torch.float64)
                total = total + (y.double() * weights[: y.numel()].reshape(y.shape)).sum()
        if total.requires_grad:
            wanted = [x for x in given if x.requires_grad]
            found += [g for g in torch.autograd.grad(total, wanted, allow_unused=True) if g is not None]
    return [y.detach() for y in found]


def widened(module: fx.GraphModule) -> fx.GraphModule:
    """The same graph in f64."""
    graph = fx.Graph()
    new: dict[fx.Node, fx.Node] = {}
    for n in module.graph.nodes:
        new[n] = graph.node_copy(n, new.__getitem__)
        if n.op == "call_method" and n.target == "to":
            new[n].args = (new[n].args[0], torch.float64)
    return fx.GraphModule(torch.nn.Module(), graph)


def disagreement(seed: int) -> str:
    """How castile differs from eager on a graph; "" if it does not."""
    draw = random.Random(-1 - seed)
    builder = Builder(seed)
    module = builder.build(draw.randint(3, 14))
    if module is None:
        return ""
    narrow = [u for t, u in NARROW.items() if str(t) in module.code or any(x.dtype == t for x in builder.inputs)]
    off = 3e-7 if builder.dtype == torch.float32 else 4e-3
    dynamic = draw.random() < 0.15
    return compared(module, widened(module), builder.inputs, builder.grad, dynamic, off, max([1e-5, *narrow]))


def compared(
    f: Callable[..., Any],
    exact: Callable[..., Any],
    inputs: Sequence[Tensor],
    grad: bool,
    dynamic: bool,
    off: float = 3e-7,
    unit: float = 1e-5,
) -> str:
    """How a compiled function differs from eager's; "" if it does not.

    The tolerance is what eager differs by from f64 (``exact``), and f64 from itself with inputs that are a little
    ``off``.
    """
    try:
        theirs, near = results(f, inputs, grad), []
        wide = [x.double() if x.is_floating_point() else x for x in inputs]
        for k in range(4):
            torch.manual_seed(k)
            moved = [x * (1 + off * (k > 0) * torch.randn_like(x)) if x.is_floating_point() else x for x in wide]
            near.append(results(exact, moved, grad))
    except (RuntimeError, TypeError):
        return ""  # eager cannot, or not in f64
    torch._dynamo.reset()
    run = torch.compile(f, backend="castile", options={"when": "always"}, dynamic=dynamic)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        mine = results(run, inputs, grad)
    fell = [str(w.message) for w in said if "runs in eager" in str(w.message)]
    if fell:
        return fell[0]
    for i, (a, b, e, *others) in enumerate(zip(mine, theirs, *near, strict=True)):
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            return f"result {i}: {a.dtype} {tuple(a.shape)} for {b.dtype} {tuple(b.shape)}"
        if not b.is_floating_point():
            if not torch.equal(a, b) and all(torch.equal(x, b) for x in (e, *others)):
                return f"result {i}: {a} for {b}"
            continue
        if not b.numel() or not all(x.isfinite().all() for x in (b, e, *others)):
            continue
        apart = torch.stack([(x - e).abs() for x in others] + [(b.double() - e).abs()]).max()
        allowed = 20 * apart + 4 * unit * e.abs().max() + 1e-7
        if not (a.double() - b.double()).abs().max() <= allowed:
            return f"result {i}: off by {(a.double() - b.double()).abs().max():.3g}, allowed {allowed:.3g}"
    return ""
