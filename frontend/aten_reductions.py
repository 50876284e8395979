"""ATen operations over whole dimensions: sums, means, extremes, norms of vectors, softmax and its gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .aten import HANDLERS, Handler, Site, combine, handles
from .hidden import left_out
from .values import Unsupported, Value, call, number, product


def axes_of(a: Value, dims: Any) -> list[int]:
    if dims is None or dims == []:
        return list(range(len(a.dims)))
    return [d % max(1, len(a.dims)) for d in ([dims] if isinstance(dims, int) else dims) if a.dims]


def _summable(site: Site, a: Value, dtype: str | None = None) -> Value:
    """What a sum adds up: integers and truth values as i64, floats in f32 at least."""
    return a if a.dtype.startswith(("f", "bf")) else site.ws.cast(a, "f32" if (dtype or "").startswith("f") else "i64")


def total(site: Site, a: Value, axes: Sequence[int], keep: bool, base: str = "sum") -> Value:
    """A sum in the precision in which castile adds: f32, f64 or i64."""
    a = site.ws.short(_summable(site, a, site.dtype), base)
    wide = a.dtype if a.dtype in ("f64", "i64") else "f32"
    return site.ws.reduce("sum", a, axes, keep, base, wide)


@handles("sum.default", "sum.dim_IntList")
def _sum(site: Site, a: Value, dims: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Value:
    if dtype is not None:
        a = site.ws.cast(a, site.dtype)
    return total(site, a, axes_of(a, dims), keepdim)


def mean(site: Site, a: Value, axes: Sequence[int], keep: bool, base: str = "mean") -> Value:
    n = site.ws.count(a, axes)
    s = total(site, a, axes, keep, base)
    return Value(s.dims, call("div", s.expr, n), "f64" if s.dtype == "f64" else "f32")


@handles("mean.default", "mean.dim")
def _mean(site: Site, a: Value, dims: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Value:
    if dtype is not None:
        a = site.ws.cast(a, site.dtype)
    return mean(site, a, axes_of(a, dims), keepdim)


def _extreme(op: str) -> Handler:
    def handler(site: Site, a: Value, dims: Any = None, keepdim: bool = False) -> Value:
        if a.dtype == "bool":
            raise Unsupported("an extreme of truth values")
        a = site.ws.short(a, op)
        return site.ws.reduce(op, a, axes_of(a, dims), keepdim, op)

    return handler


for _op in ("max", "min"):
    HANDLERS[f"a{_op}.default"] = HANDLERS[f"{_op}.default"] = _extreme(_op)


def _logical(op: str) -> Handler:
    def handler(site: Site, a: Value, dims: Any = None, keepdim: bool = False) -> Value:
        if site.dtype != "bool":
            raise Unsupported("truth values that are no bool")
        a = site.ws.short(site.ws.cast(a, "bool"), op)
        return site.ws.reduce(op, a, axes_of(a, dims), keepdim, op)

    return handler


for _op in ("any", "all"):
    for _form in ("default", "dim", "dims"):
        HANDLERS[f"{_op}.{_form}"] = _logical(_op)


@handles("argmax.default")
def _argmax(site: Site, a: Value, dim: int | None = None, keepdim: bool = False) -> Value:
    if dim is None or not a.dims or not a.dims[dim]:
        raise Unsupported("argmax over several dimensions")
    site.ws.single(a, dim)
    return site.ws.reduce("argmax", site.ws.short(a, "argmax"), axes_of(a, dim), keepdim, "argmax", "i64")


def variance(site: Site, a: Value, dims: Any, correction: Any, keep: bool) -> tuple[Value, Value]:
    """The variance, two passes as written, and the mean."""
    axes = axes_of(a, dims)
    many = product(site.ws.sizes[r] for axis in axes for r in a.dims[axis])
    if isinstance(many, int) and many <= correction:
        raise Unsupported("a variance of too few elements, which is no number")
    a = site.ws.named(a, "x")
    mu = site.ws.named(mean(site, a, axes, True), "mean")
    n = site.ws.count(a, axes)
    centred = combine(site, "a - b", a=a, b=mu)
    square = total(site, combine(site, "a * a", a=site.ws.named(centred, "centred")), axes, keep, "squares")
    if correction:
        n = call("sub", n, number(correction))
    if not keep:
        mu = Value(tuple(d for i, d in enumerate(mu.dims) if i not in axes), mu.expr, mu.dtype)
    return Value(square.dims, call("div", square.expr, n), square.dtype), mu


@handles("var.correction")
def _var(site: Site, a: Value, dims: Any = None, *, correction: Any = None, keepdim: bool = False) -> Value:
    return variance(site, a, dims, 1 if correction is None else correction, keepdim)[0]


@handles("std.correction")
def _std(site: Site, a: Value, dims: Any = None, *, correction: Any = None, keepdim: bool = False) -> Value:
    return combine(site, "sqrt(a)", a=_var(site, a, dims, correction=correction, keepdim=keepdim))


@handles("var_mean.correction")
def _var_mean(
    site: Site, a: Value, dims: Any = None, *, correction: Any = None, keepdim: bool = False
) -> tuple[Value, Value]:
    return variance(site, a, dims, 1 if correction is None else correction, keepdim)


@handles("linalg_vector_norm.default")
def _norm(site: Site, a: Value, ord: Any = 2, dims: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Value:
    axes = axes_of(a, dims)
    if dtype is not None:
        a = site.ws.cast(a, site.dtype)
    if ord == 2:
        return combine(site, "sqrt(a)", a=total(site, combine(site, "a * a", a=a), axes, keepdim, "squares"))
    if ord == 1:
        return total(site, combine(site, "abs(a)", a=a), axes, keepdim, "sum")
    if ord == math.inf:
        return site.ws.reduce("max", combine(site, "abs(a)", a=a), axes, keepdim, "max")
    raise Unsupported(f"a norm of order {ord}")


def softmax_parts(site: Site, a: Value, axis: int) -> tuple[Value, Value, Value]:
    """The shifted input x - max x, its exponential and the sum of that, over a dimension."""
    a = site.ws.named(a, "x")
    highest = site.ws.reduce("max", a, [axis], True, "highest", a.dtype)
    shifted = combine(site, "a - b", a=a, b=highest)
    e = site.ws.named(combine(site, "exp(a)", a=shifted), "e")
    return shifted, e, total(site, e, [axis], True, "normaliser")


@handles("_softmax.default")
def _softmax(site: Site, a: Value, dim: int, half_to_float: bool = False) -> Value:
    if not a.dims:
        raise Unsupported("a softmax of a number")
    axis = dim % len(a.dims)
    _, e, s = softmax_parts(site, left_out(site.ws, a, axis), axis)
    return combine(site, "a / b", a=e, b=s)


@handles("_safe_softmax.default")
def _safe_softmax(site: Site, a: Value, dim: int, dtype: Any = None) -> Value:
    """A softmax whose rows of nothing but -inf are 0: what is -inf counts as masked."""
    return _softmax(site, masked_at_infinity(site, a), dim)


def masked_at_infinity(site: Site, a: Value) -> Value:
    a = site.ws.named(a, "x")
    hidden = call("eq", a.expr, number(-math.inf))
    return Value(a.dims, call("where", hidden, number(-math.inf), a.expr), a.dtype)


@handles("_log_softmax.default")
def _log_softmax(site: Site, a: Value, dim: int, half_to_float: bool = False) -> Value:
    if not a.dims:
        raise Unsupported("a softmax of a number")
    shifted, _, s = softmax_parts(site, a, dim % len(a.dims))
    return combine(site, "a - log(b)", a=shifted, b=s)


@handles("logsumexp.default")
def _logsumexp(site: Site, a: Value, dims: Any, keepdim: bool = False) -> Value:
    axes = axes_of(a, dims)
    a = site.ws.named(a, "x")
    highest = site.ws.reduce("max", a, axes, True, "highest", a.dtype)
    # Eager subtracts no infinite maximum, so rows of -inf give -inf and no NaN.
    safe = site.ws.named(combine(site, "where(abs(a) == inf, 0, a)", a=highest), "finite")
    e = combine(site, "exp(a - b)", a=a, b=safe)
    s = total(site, e, axes, True, "normaliser")
    r = combine(site, "log(a) + b", a=s, b=safe)
    return r if keepdim else Value(tuple(d for i, d in enumerate(r.dims) if i not in axes), r.expr, r.dtype)


@handles("_softmax_backward_data.default")
def _softmax_backward(site: Site, grad: Value, y: Value, dim: int, input_dtype: Any) -> Value:
    product = site.ws.named(combine(site, "a * b", a=grad, b=y), "product")
    s = total(site, product, [dim % len(y.dims)], True, "dot")
    return combine(site, "a - b * c", a=product, b=y, c=s)


@handles("_log_softmax_backward_data.default")
def _log_softmax_backward(site: Site, grad: Value, y: Value, dim: int, input_dtype: Any) -> Value:
    grad = site.ws.named(grad, "grad")
    s = total(site, grad, [dim % len(y.dims)], True, "sum")
    return combine(site, "a - exp(b) * c", a=grad, b=y, c=s)
