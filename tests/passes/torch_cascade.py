"""A small interpreter of cascades in torch, in float64, so that `torch.autograd` differentiates what they mean.

Dense broadcasting over ranks, as the oracle has it: masked flags, guards, gathers, scans by stepping, monoids by
folding. Casts between floats are the identity, as gradients have it. An operand that a flag or a guard makes
irrelevant is replaced before the operation, so that no NaN of an untaken path comes back in a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch

from castile.ir.cascade import (
    Access,
    Call,
    Cascade,
    Cast,
    Const,
    Einsum,
    Expr,
    Extent,
    Monoid,
    Rank,
    Reduce,
    is_minus_infinity,
)
from castile.ir.dtypes import DTYPES, wrap
from castile.ir.extents import resolve
from castile.ir.ops import OPS, REDUCTIONS
from castile.ir.scalar import convert
from castile.ir.types import TypeChecker, settle, tensor_types
from castile.ir.verify import scan_step

Tensor = torch.Tensor
INF = math.inf

_FUNCTIONS = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": lambda a, b: a.double() / b.double(),
    "floordiv": lambda a, b: torch.div(a, b, rounding_mode="floor"),
    "mod": torch.remainder,
    "neg": torch.neg,
    "lt": torch.lt,
    "le": torch.le,
    "gt": torch.gt,
    "ge": torch.ge,
    "eq": torch.eq,
    "ne": torch.ne,
    "and": torch.bitwise_and,
    "or": torch.bitwise_or,
    "not": torch.bitwise_not,
    "lshift": torch.bitwise_left_shift,
    "rshift": torch.bitwise_right_shift,
    "minimum": torch.minimum,
    "maximum": torch.maximum,
    "abs": torch.abs,
    "floor": lambda a: torch.floor(a) if a.is_floating_point() else a,
    "round": lambda a: torch.round(a) if a.is_floating_point() else a,
    **{n: getattr(torch, n) for n in "exp exp2 expm1 log log2 log1p sqrt rsqrt tanh sigmoid erf sin cos".split()},
}


@dataclass(frozen=True)
class Value:
    """A tensor over the axes in scope (size 1 where it does not vary) and where a mask made it 0 or -inf."""

    data: Tensor
    masked: Tensor | None = None

    def flag(self) -> Tensor:
        return torch.zeros((1,) * self.data.ndim, dtype=torch.bool) if self.masked is None else self.masked


@dataclass(frozen=True)
class Scope:
    """Ranks in scope: for each its axis and its coordinates."""

    axes: Mapping[str, tuple[int, range]]
    ndim: int

    def extend(self, ranks: Sequence[str], spans: Sequence[range]) -> Scope:
        new = {r: (self.ndim + i, s) for i, (r, s) in enumerate(zip(ranks, spans, strict=True))}
        return Scope({**self.axes, **new}, self.ndim + len(new))

    def coordinate(self, rank: str) -> Tensor:
        axis, span = self.axes[rank]
        return torch.tensor(list(span), dtype=torch.int64).reshape([-1 if i == axis else 1 for i in range(self.ndim)])

    @property
    def shape(self) -> list[int]:
        sizes = [1] * self.ndim
        for axis, span in self.axes.values():
            sizes[axis] = len(span)
        return sizes


def run(c: Cascade, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The outputs of a cascade, differentiable with respect to the float inputs that are tensors with gradients."""
    tensors = {p.name: _read(inputs[p.name], p.dtype) for p in c.params}
    extents = resolve(c, {}, {n: tuple(t.shape) for n, t in tensors.items()})
    machine = _Machine(c, {n: Value(t) for n, t in tensors.items()}, extents)
    for e in c.einsums:
        machine.einsum(e)
    return {o: machine.tensors[o].data for o in c.outputs}


def gradients(
    c: Cascade, inputs: Mapping[str, Any], wrt: Sequence[str], adjoints: Mapping[str, Any]
) -> dict[str, np.ndarray[Any, Any]]:
    """d Σ dO · O / dX for every X of ``wrt``, by torch.autograd."""
    leaves = {n: torch.tensor(np.asarray(inputs[n], np.float64), requires_grad=True) for n in wrt}
    results = run(c, {**inputs, **leaves})
    loss = torch.zeros((), dtype=torch.float64)
    for name, d in adjoints.items():
        loss = loss + (results[name] * torch.as_tensor(np.asarray(d))).sum()
    if not loss.requires_grad:
        return {n: np.zeros(x.shape) for n, x in leaves.items()}
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {n: np.zeros(x.shape) if g is None else g.numpy() for (n, x), g in zip(leaves.items(), found, strict=True)}


def _read(x: Any, dtype: str) -> Tensor:
    t = x if isinstance(x, torch.Tensor) else torch.as_tensor(np.asarray(x))
    row = DTYPES[dtype]
    return t.double() if row.is_float else t.bool() if row.kind == "bool" else t.long()


def _common(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if a.dtype == b.dtype:
        return a, b
    kind = torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.int64
    return a.to(kind), b.to(kind)


def _safe(x: Tensor, bad: Tensor | None) -> Tensor:
    """The tensor with a harmless value where it does not matter."""
    if bad is None or x.dtype == torch.bool or not bool(bad.any()):
        return x
    return torch.where(bad, torch.ones((), dtype=x.dtype), x)


class _Machine:
    def __init__(self, c: Cascade, tensors: dict[str, Value], extents: Mapping[str, int]) -> None:
        self.c = c
        self.tensors = tensors
        self.extents = extents
        self.types = tensor_types(c)
        self.checker = TypeChecker(self.types, c.monoid_of)

    # Einsums

    def einsum(self, e: Einsum) -> None:
        spans = [range(self.extents[r]) for r in e.ranks]
        if len(e.outputs) > 1:
            self._state(e, spans)
            return
        scan = scan_step(e)
        if scan is None:
            self.tensors[e.name] = self._stored(e, spans)
            return
        shape = [len(s) for s in spans]
        dtype = torch.float64 if DTYPES[self.types[e.name]].is_float else torch.int64
        shape[scan.axis] = 1
        empty = Value(torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=torch.bool))
        done = [empty] * len(spans[scan.axis])
        for t in spans[scan.axis] if scan.direction > 0 else reversed(spans[scan.axis]):
            self.tensors[e.name] = _joined(done, scan.axis)
            step = [range(t, t + 1) if i == scan.axis else s for i, s in enumerate(spans)]
            done[t] = self._stored(e, step)
        self.tensors[e.name] = _joined(done, scan.axis) if done else empty

    def _stored(self, e: Einsum, spans: Sequence[range]) -> Value:
        scope = Scope({}, 0).extend(e.output.ranks, spans)
        value = self.at(e.expr, scope, None)
        row = DTYPES[self.types[e.name]]
        data = value.data.double() if row.is_float else self._whole(value.data, self.types[e.name])
        masked = None if value.masked is None else value.masked.broadcast_to(scope.shape)
        return Value(data.broadcast_to(scope.shape), masked)

    def _state(self, e: Einsum, spans: Sequence[range]) -> None:
        assert isinstance(e.expr, Reduce)
        scope = Scope({}, 0).extend(e.ranks, spans)
        for o, v in zip(e.outputs, self._fold(e.expr, scope, None), strict=True):
            full = [len(s) if r in o.ranks else 1 for r, s in zip(e.ranks, spans, strict=True)]
            kept = [r for r in e.ranks if r in o.ranks]
            order = [kept.index(r) for r in o.ranks]

            drop = [i for i, r in enumerate(e.ranks) if r not in o.ranks]

            def placed(x: Tensor, full: list[int] = full, drop: list[int] = drop, order: list[int] = order) -> Tensor:
                for axis in range(x.ndim):
                    if full[axis] == 1:
                        x = x.narrow(axis, 0, 1)
                x = x.broadcast_to(full)
                return (x.squeeze(drop) if drop else x).permute(order)

            self.tensors[o.name] = Value(placed(v.data), None if v.masked is None else placed(v.masked))

    # Expressions

    def at(self, e: Expr, scope: Scope, guard: Tensor | None) -> Value:
        match e:
            case Const(value=value, kind=kind):
                dtype = {"int": torch.int64, "float": torch.float64, "bool": torch.bool}[kind]
                return Value(torch.full((1,) * scope.ndim, value, dtype=dtype))
            case Rank(name=name):
                return Value(scope.coordinate(name))
            case Extent(rank=rank):
                return Value(torch.full((1,) * scope.ndim, self.extents[rank], dtype=torch.int64))
            case Cast(dtype=dtype, arg=arg):
                return self._cast(self.at(arg, scope, guard), dtype)
            case Access():
                return self._access(e, scope, guard)
            case Reduce():
                return self._reduce(e, scope, guard)
            case Call(op="where", args=(condition, a, b)):
                chosen = self.at(condition, scope, guard).data
                left = self.at(a, scope, chosen if guard is None else guard & chosen)
                right = self.at(b, scope, ~chosen if guard is None else guard & ~chosen)
                return _select(e, chosen, left, right)
            case Call():
                return self._call(e, [self.at(a, scope, guard) for a in e.args], guard)

    def _cast(self, x: Value, dtype: str) -> Value:
        if DTYPES[dtype].is_float:
            return Value(x.data.double(), x.masked)
        return Value(self._whole(x.data, dtype))

    def _whole(self, x: Tensor, dtype: str) -> Tensor:
        return torch.as_tensor(np.asarray(convert(x.detach().numpy(), dtype)))

    def _access(self, e: Access, scope: Scope, guard: Tensor | None) -> Value:
        source = self.tensors[e.tensor]
        if not e.indices:
            ones = (1,) * scope.ndim
            return Value(source.data.reshape(ones), None if source.masked is None else source.masked.reshape(ones))
        indices = []
        for axis, i in enumerate(e.indices):
            index, size = self.at(i, scope, guard).data, source.data.shape[axis]
            outside = (index < 0) | (index >= size)
            assert not bool((outside if guard is None else outside & guard).any()), f"{e.tensor} axis {axis}"
            indices.append(index.clamp(0, max(0, size - 1)))
        indices = list(torch.broadcast_tensors(*indices))
        if 0 in source.data.shape:
            return Value(torch.zeros(indices[0].shape, dtype=source.data.dtype))
        return Value(source.data[tuple(indices)], None if source.masked is None else source.masked[tuple(indices)])

    def _call(self, e: Call, args: list[Value], guard: Tensor | None) -> Value:
        op = OPS[e.op]
        datas = [a.data for a in args]
        to_zero, to_minus = _flags(e.op, args)
        bad = None if guard is None else ~guard
        if to_zero is not None and to_minus is not None:
            bad = to_zero | to_minus if bad is None else bad | to_zero | to_minus
        if op.rule in ("divide", "real"):
            datas = [a.double() for a in datas]
        elif op.rule in ("arith", "same", "power"):
            datas = [a.long() if a.dtype == torch.bool else a for a in datas]
        if len(datas) == 2 and op.rule != "power":
            datas = list(_common(*datas))
        datas = [_safe(a, bad) for a in datas]
        if e.op in ("floordiv", "mod") and not datas[1].is_floating_point():
            datas[1] = _safe(datas[1], datas[1] == 0)
        if op.rule == "power":
            y = datas[0] ** int(datas[1].flatten()[0])
        else:
            y = _FUNCTIONS[e.op](*datas)
        if y.dtype == torch.int64:
            dtype = settle(self.checker.infer(e))
            y = torch.as_tensor(wrap(y.numpy(), dtype)) if DTYPES[dtype].bits < 64 else y
        if to_zero is None or to_minus is None or not y.is_floating_point():
            return Value(y)
        y = torch.where(to_zero, 0.0, torch.where(to_minus, -INF, y))
        return Value(y, (to_zero | to_minus).broadcast_to(y.shape))

    # Reductions

    def _reduce(self, e: Reduce, scope: Scope, guard: Tensor | None) -> Value:
        if e.op in self.c.monoid_of:
            return self._fold(e, scope, guard)[0]
        inner = scope.extend(e.ranks, [range(self.extents[r]) for r in e.ranks])
        wide = None if guard is None else guard.reshape(*guard.shape, *(1,) * len(e.ranks))
        value = self.at(e.arg, inner, wide)
        shape = [*value.data.shape[: scope.ndim], *inner.shape[scope.ndim :]]
        data = value.data.broadcast_to(shape)
        if data.dtype == torch.bool and e.op not in ("any", "all"):
            data = data.long()
        masked = None
        if e.op not in ("argmax", "any", "all") and (value.masked is not None or 0 in shape[scope.ndim :]):
            flags = value.flag().broadcast_to(shape)
            masked = flags.flatten(scope.ndim).all(-1)
            if e.op == "sum" and data.is_floating_point():
                masked = masked | (flags & (data == -INF)).flatten(scope.ndim).any(-1)
            if e.op == "prod":
                masked = (flags & (data == 0)).flatten(scope.ndim).any(-1)
        if 0 in shape[scope.ndim :]:
            identity = float(REDUCTIONS[e.op].identity or 0)
            dtype = torch.int64 if e.op == "argmax" else data.dtype
            return Value(torch.full(shape[: scope.ndim], identity, dtype=torch.float64).to(dtype), masked)
        flat = data.flatten(scope.ndim)
        match e.op:
            case "sum":
                y = flat.sum(-1)
            case "prod":
                y = flat.prod(-1)
            case "max":
                y = flat.amax(-1)
            case "min":
                y = flat.amin(-1)
            case "argmax":
                y = torch.as_tensor(np.asarray(np.argmax(flat.detach().numpy(), -1)))
            case "any":
                y = flat.any(-1)
            case _:
                y = flat.all(-1)
        return Value(y, masked)

    def _fold(self, e: Reduce, scope: Scope, guard: Tensor | None) -> list[Value]:
        monoid = self.c.monoid_of[e.op]
        state = []
        for i in monoid.identity:
            data = self.at(i, scope, None).data.double()
            state.append(Value(data, (data == 0) | (data == -INF)))
        spans = [range(self.extents[r]) for r in e.ranks]
        for place in product(*spans):
            inner = scope.extend(e.ranks, [range(p, p + 1) for p in place])
            wide = None if guard is None else guard.reshape(*guard.shape, *(1,) * len(e.ranks))
            element = [_narrow(self.at(a, inner, wide), scope.ndim) for a in e.args]
            state = self._combine(monoid, state, element, scope)
        return state

    def _combine(self, m: Monoid, state: list[Value], element: list[Value], scope: Scope) -> list[Value]:
        names = dict(zip(m.params, [*state, *element], strict=True))
        for name, value in m.body:
            inner = _Machine.__new__(_Machine)
            inner.c, inner.extents, inner.types = self.c, {}, dict.fromkeys(names, "f64")
            inner.checker = TypeChecker(inner.types, {})
            inner.tensors = {}
            names[name] = inner._scalar(value, names, scope, None)
        return [names[r] for r in m.results]

    def _scalar(self, e: Expr, names: Mapping[str, Value], scope: Scope, guard: Tensor | None) -> Value:
        match e:
            case Access(tensor=name):
                return names[name]
            case Call(op="where", args=(condition, a, b)):
                chosen = self._scalar(condition, names, scope, guard).data
                left = self._scalar(a, names, scope, chosen if guard is None else guard & chosen)
                right = self._scalar(b, names, scope, ~chosen if guard is None else guard & ~chosen)
                return _select(e, chosen, left, right)
            case Call():
                return self._call(e, [self._scalar(a, names, scope, guard) for a in e.args], guard)
            case Cast(dtype=dtype, arg=arg):
                return self._cast(self._scalar(arg, names, scope, guard), dtype)
            case _:
                return self.at(e, scope, guard)


def _select(e: Call, chosen: Tensor, a: Value, b: Value) -> Value:
    a, b = (
        Value(v.data, torch.ones((1,) * v.data.ndim, dtype=torch.bool)) if is_minus_infinity(branch) else v
        for v, branch in ((a, e.args[1]), (b, e.args[2]))
    )
    left, right = _common(a.data, b.data)
    y = torch.where(chosen, left, right)
    if a.masked is None and b.masked is None:
        return Value(y)
    return Value(y, torch.where(chosen, a.flag(), b.flag()).broadcast_to(y.shape))


def _joined(parts: Sequence[Value], axis: int) -> Value:
    return Value(
        torch.cat([p.data for p in parts], axis), torch.cat([p.flag().broadcast_to(p.data.shape) for p in parts], axis)
    )


def _narrow(v: Value, ndim: int) -> Value:
    """An element at one place of the reduced ranks, without their axes."""

    def first(x: Tensor) -> Tensor:
        while x.ndim > ndim:
            x = x.select(-1, 0)
        return x

    return Value(first(v.data), None if v.masked is None else first(v.masked))


def _flags(name: str, args: Sequence[Value]) -> tuple[Tensor | None, Tensor | None]:
    """Where flagged operands make a result 0, and where -inf."""
    if all(a.masked is None for a in args) or OPS[name].rule == "compare":
        return None, None
    zero = [a.flag() & (a.data == 0) for a in args]
    minus = [a.flag() & (a.data == -INF) for a in args]
    never = torch.zeros((1,) * args[0].data.ndim, dtype=torch.bool)

    def scales(x: Value) -> Tensor:
        return (x.data > 0) & torch.isfinite(x.data)

    match name:
        case "mul":
            gone = zero[0] | zero[1]
            return gone, ((minus[0] & scales(args[1])) | (minus[1] & scales(args[0]))) & ~gone
        case "div":
            return zero[0], minus[0] & scales(args[1])
        case "add":
            return zero[0] & zero[1], minus[0] | minus[1]
        case "sub":
            return zero[0] & zero[1], minus[0]
        case "maximum" | "minimum":
            pick = torch.maximum if name == "maximum" else torch.minimum
            y = pick(*_common(args[0].data, args[1].data))
            both = args[0].flag() & args[1].flag()
            return both & (y == 0), both & (y == -INF)
        case "pow":
            return zero[0] & (args[1].data > 0), never
        case _ if len(args) == 1:
            op = OPS[name]
            gone, low = never, never
            for at, where in ((op.at_zero, zero[0]), (op.at_neg_inf, minus[0])):
                gone = gone | where if at == 0 else gone
                low = low | where if at == -INF else low
            return gone, low
        case _:
            return None, None
