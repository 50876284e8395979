"""ATen operations of layers: norms with their gradients, losses, matrix products."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..ir.cascade import Const, Expr, Rank
from .aten import Site, combine, handles, is_float
from .aten_reductions import mean, total, variance
from .values import Unsupported, Value, call, number, substitute

# Norms


@handles("native_layer_norm.default")
def _layer_norm(
    site: Site, a: Value, shape: Sequence[Any], weight: Value | None, bias: Value | None, eps: float
) -> tuple[Value, Value, Value]:
    dims = list(range(len(a.dims) - len(shape), len(a.dims)))
    a = site.ws.named(a, "x")
    var, mu = variance(site, a, dims, 0, True)
    rstd = site.ws.named(combine(site, "rsqrt(a + b)", a=var, b=eps), "rstd")
    y = combine(site, "(a - b) * c", a=a, b=mu, c=rstd)
    if weight is not None:
        y = combine(site, "a * b", a=y, b=weight)
    if bias is not None:
        y = combine(site, "a + b", a=y, b=bias)
    return y, mu, rstd


@handles("native_layer_norm_backward.default")
def _layer_norm_backward(
    site: Site,
    grad: Value,
    a: Value,
    shape: Sequence[Any],
    mu: Value,
    rstd: Value,
    weight: Value | None,
    bias: Value | None,
    mask: Sequence[bool],
) -> tuple[Value | None, ...]:
    rank = len(a.dims)
    inner, outer = list(range(rank - len(shape), rank)), list(range(rank - len(shape)))
    grad = site.ws.named(grad, "grad")
    xhat = site.ws.named(combine(site, "(a - b) * c", a=a, b=mu, c=rstd), "xhat")
    g = grad if weight is None else site.ws.named(combine(site, "a * b", a=grad, b=weight), "weighted")
    dx = dw = db = None
    if mask[0]:
        b = mean(site, g, inner, True, "mean")
        c = mean(site, combine(site, "a * b", a=g, b=xhat), inner, True, "along")
        dx = combine(site, "(a - b - c * d) * e", a=g, b=b, c=xhat, d=c, e=rstd)
    if mask[1] and weight is not None:
        dw = total(site, combine(site, "a * b", a=grad, b=xhat), outer, False, "dw")
    if mask[2] and bias is not None:
        db = total(site, grad, outer, False, "db")
    return dx, dw, db


@handles("_fused_rms_norm.default")
def _rms_norm(
    site: Site, a: Value, shape: Sequence[Any], weight: Value | None, eps: float | None
) -> tuple[Value, Value]:
    dims = list(range(len(a.dims) - len(shape), len(a.dims)))
    if eps is None:
        eps = {"f64": 2.220446049250313e-16, "bf16": 0.0078125, "f16": 0.0009765625}.get(
            a.dtype, 1.1920928955078125e-07
        )
    a = site.ws.named(a, "x")
    square = mean(site, combine(site, "a * a", a=a), dims, True, "square")
    rstd = site.ws.named(combine(site, "rsqrt(a + b)", a=square, b=eps), "rstd")
    y = combine(site, "a * b", a=a, b=rstd)
    return (combine(site, "a * b", a=y, b=weight) if weight is not None else y), rstd


# Losses


@handles("nll_loss_forward.default")
def _nll_loss(
    site: Site, a: Value, target: Value, weight: Value | None, reduction: int, ignore: int
) -> tuple[Value, Value]:
    """Minus the entry of each row at its target; rows whose target is to be ignored count as nothing."""
    if weight is not None:
        raise Unsupported("class weights")
    a = site.ws.named(a, "x")
    target = site.ws.named(target, "target")
    keep, picked = _picked(site, a, target, ignore)
    loss = Value(target.dims, call("where", keep, call("neg", picked), Const(0.0)), a.dtype)
    ones = Value(target.dims, call("where", keep, Const(1.0), Const(0.0)), "f32")
    everywhere = list(range(len(target.dims)))
    if reduction == 0:
        return loss, Value((), Const(0.0), site.dtypes[1])
    n = total(site, ones, everywhere, False, "count")
    s = total(site, loss, everywhere, False, "loss")
    return (combine(site, "a / b", a=s, b=n) if reduction == 1 else s), n


def _picked(site: Site, a: Value, target: Value, ignore: int) -> tuple[Expr, Expr]:
    """Whether a row counts, and its entry at the target."""
    if len(a.dims) != len(target.dims) + 1 or not a.dims[-1]:
        raise Unsupported("a loss over one class")
    keep = call("ne", target.expr, number(ignore))
    new: dict[str, Expr] = {site.ws.single(a, len(a.dims) - 1): target.expr}
    if len(target.dims) == 1 and a.dims[0] != target.dims[0]:
        ranks, left, right = site.ws.refine(target.dims[0], a.dims[0])
        if left or ranks != target.dims[0]:
            raise Unsupported("rows that were merged in different ways")
        new |= right
    return keep, substitute(a.expr, new, site.ws.sizes)


@handles("nll_loss_backward.default")
def _nll_loss_backward(
    site: Site, grad: Value, a: Value, target: Value, weight: Value | None, reduction: int, ignore: int, n: Value
) -> Value:
    if weight is not None or len(a.dims) != 2 or not a.dims[1]:
        raise Unsupported("class weights, or a loss over one class")
    classes = site.ws.rank(site.shape[1])
    column = Value(((), (classes,)), Rank(classes), "i64")
    t = site.ws.named(Value((*target.dims, ()), target.expr, target.dtype), "target")
    g = grad if not grad.dims else Value((*grad.dims, ()), grad.expr, grad.dtype)
    if reduction == 1:
        g = site.ws.named(combine(site, "a / b", a=g, b=n), "share")
    hit = combine(site, "(a == b) & (a != c)", a=t, b=column, c=ignore)
    return combine(site, "where(a, -b, 0)", a=hit, b=g)


@handles("mse_loss.default")
def _mse_loss(site: Site, a: Value, b: Value, reduction: int = 1) -> Value:
    d = combine(site, "a * a", a=site.ws.named(combine(site, "a - b", a=a, b=b), "difference"))
    axes = list(range(len(d.dims)))
    return d if reduction == 0 else mean(site, d, axes, False) if reduction == 1 else total(site, d, axes, False)


# Contractions


def contract(site: Site, a: Value, b: Value, base: str = "product") -> Value:
    """[…, m, k] times […, k, n], over whatever ranks those are."""
    product = multiplied(site, a, b)
    return site.ws.reduce("sum", product, [len(product.dims) - 1], False, base, accumulator(product))


def accumulator(product: Value) -> str:
    """What products are added up in."""
    return "f64" if product.dtype == "f64" else "f32"


def multiplied(site: Site, a: Value, b: Value) -> Value:
    """The products […, m, n, k] of […, m, k] and […, k, n] before they are added up over k."""
    a, b = site.ws.short(a, "left"), site.ws.short(b, "right")
    dims_a = (*a.dims[:-1], (), a.dims[-1])
    dims_b = (*b.dims[:-2], (), b.dims[-1], b.dims[-2])
    left, right = Value(dims_a, a.expr, a.dtype), Value(dims_b, b.expr, b.dtype)
    dims, (x, y) = site.ws.broadcast([left, right])
    product = call("mul", x, y)
    return Value(dims, product, site.ws.infer(product))


@handles("mm.default", "bmm.default")
def _mm(site: Site, a: Value, b: Value) -> Value:
    _only_floats(a)
    return contract(site, a, b)


@handles("addmm.default", "baddbmm.default")
def _addmm(site: Site, c: Value, a: Value, b: Value, *, beta: float = 1, alpha: float = 1) -> Value:
    _only_floats(a)
    product = contract(site, a, b)
    if beta == 0:
        return combine(site, "a * b", a=product, b=alpha)
    return combine(site, "a * d + b * c", a=c, b=product, c=alpha, d=beta)


def _only_floats(a: Value) -> None:
    if not is_float(a):
        raise Unsupported("a product of integer matrices")
