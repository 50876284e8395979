"""Attention calls as cascades: scaled_dot_product_attention and its gradient, flex_attention with its mods.

What a call says is written down as the textbook has it; that it needs one pass is the algebra's business.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..ir.cascade import Access, Call, Cast, Const, Expr, Rank, walk
from .aten import Site, combine, handles
from .aten_layers import accumulator, contract, multiplied
from .aten_reductions import masked_at_infinity, softmax_parts, total
from .values import Unsupported, Value, call, number, same

MINUS_INF: Expr = Call("neg", (Const(math.inf),))


def _scale(d: Any, scale: float | None) -> Expr:
    if scale is not None:
        return number(float(scale))
    if not isinstance(d, int):
        raise Unsupported("a head dimension that is dynamic")
    return number(1 / math.sqrt(d))


def scores(site: Site, q: Value, k: Value, scale: float | None, width: Any) -> Value:
    """scale · Σ_d q k over [batch…, q, k], under a name."""
    if q.dtype != k.dtype:
        raise Unsupported("queries and keys of different types")
    transposed = Value((*k.dims[:-2], k.dims[-1], k.dims[-2]), k.expr, k.dtype)
    s = contract(site, q, transposed, "scores")
    factor = _scale(width, scale)
    last = site.ws.einsums[-1] if site.ws.einsums else None
    if last is not None and isinstance(s.expr, Access) and s.expr.tensor == last.name:
        # One statement, as the textbook has it.
        site.ws.einsums[-1] = replace(last, expr=call("mul", factor, last.expr))
        return s
    return Value(s.dims, call("mul", s.expr, factor), s.dtype)


def _bracketed(site: Site, s: Value, causal: bool, mask: Value | None) -> Value:
    """Scores with a mask added and what is not to be seen left out."""
    if mask is not None and mask.dtype == "bool":
        dims, (m, x) = site.ws.broadcast([mask, s])
        s = Value(dims, call("where", m, x, MINUS_INF), s.dtype)
    elif mask is not None:
        if not _literal(mask.expr):
            mask = masked_at_infinity(site, mask)
        s = combine(site, "a + b", a=s, b=mask)
    if causal:
        if not s.dims[-2] or not s.dims[-1]:
            s = _causal_single(s)
        else:
            row, column = Rank(site.ws.single(s, -2)), Rank(site.ws.single(s, -1))
            s = Value(s.dims, call("where", call("ge", row, column), s.expr, MINUS_INF), s.dtype)
    return s


def _literal(e: Expr) -> bool:
    """Whether every value of an expression is a literal, chosen by whatever conditions: then its -inf are marked."""
    match e:
        case Const() | Call(op="neg", args=(Const(),)):
            return True
        case Call(op="where", args=(_, a, b)):
            return _literal(a) and _literal(b)
        case Cast(arg=arg):
            return _literal(arg)
        case _:
            return False


def _causal_single(s: Value) -> Value:
    """One query sees the first key only; one key is seen by all."""
    if not s.dims[-1]:
        return s
    column = Rank(s.dims[-1][0])
    return Value(s.dims, call("where", call("le", column, Const(0)), s.expr, MINUS_INF), s.dtype)


def attention(site: Site, s: Value, v: Value, lse: bool) -> tuple[Value, Value | None]:
    """Softmax over the last dimension of scores, times values; and the log-sum-exp if it is wanted."""
    if not s.dims[-1]:
        raise Unsupported("attention to a single key")
    s = site.ws.named(s, "s")
    axis = len(s.dims) - 1
    _, e, n = softmax_parts(site, s, axis)
    p = site.ws.named(combine(site, "a / b", a=e, b=n), "p")
    out = contract(site, p, v, "out")
    if not lse:
        return out, None
    highest = site.ws.reduce("max", s, [axis], True, "highest", s.dtype)
    both = combine(site, "log(a) + b", a=n, b=highest)
    return out, Value(both.dims[:-1], both.expr, both.dtype)


def _shared(site: Site, q: Value, k: Value, v: Value) -> tuple[Value, Value]:
    """Keys and values of fewer heads than there are queries': each group of query heads reads one of them."""
    heads, kv = _size(site, q, -3), _size(site, k, -3)
    if same(heads, kv) or same(kv, 1):
        return k, v
    found = []
    for x in (k, v):
        group = site.ws.rank(heads // kv)
        found.append(Value((*x.dims[:-3], (*x.dims[-3], group), *x.dims[-2:]), x.expr, x.dtype))
    return found[0], found[1]


@handles("_scaled_dot_product_flash_attention_for_cpu.default")
def _flash_for_cpu(
    site: Site,
    q: Value,
    k: Value,
    v: Value,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Value | None = None,
    scale: float | None = None,
) -> tuple[Value, Value | None]:
    return _sdpa(site, q, k, v, attn_mask, dropout_p, is_causal, scale, len(site.shapes) > 1)


def _sdpa(
    site: Site,
    q: Value,
    k: Value,
    v: Value,
    mask: Value | None,
    dropout: float,
    causal: bool,
    scale: float | None,
    lse: bool,
) -> tuple[Value, Value | None]:
    if dropout:
        raise Unsupported("dropout: eager's random numbers are eager's own")
    q, k, v = (site.ws.named(x, n) for x, n in ((q, "q"), (k, "k"), (v, "v")))
    k, v = _shared(site, q, k, v)
    s = scores(site, q, k, scale, _size(site, q, -1))
    return attention(site, _bracketed(site, s, causal, mask), v, lse)


def _size(site: Site, v: Value, axis: int) -> Any:
    n: Any = 1
    for r in v.dims[axis]:
        n = n * site.ws.sizes[r]
    return n


@handles("_scaled_dot_product_flash_attention_for_cpu_backward.default")
def _flash_backward(
    site: Site,
    grad: Value,
    q: Value,
    k: Value,
    v: Value,
    out: Value,
    lse: Value,
    dropout_p: float,
    is_causal: bool,
    *,
    attn_mask: Value | None = None,
    scale: float | None = None,
) -> tuple[Value, Value, Value]:
    """FlashAttention-2's gradients: the probabilities are recomputed from the saved log-sum-exp."""
    if dropout_p:
        raise Unsupported("dropout: eager's random numbers are eager's own")
    width, heads = _size(site, q, -1), _size(site, k, -3)
    if not q.dims[-2] or not k.dims[-2]:
        raise Unsupported("gradients of a single query or key")
    k, v = _shared(site, q, k, v)
    s = site.ws.named(_bracketed(site, scores(site, q, k, scale, width), is_causal, attn_mask), "s")
    column = Value((*lse.dims, ()), lse.expr, lse.dtype)
    # A row that sees nothing has a log-sum-exp of -inf and probabilities of 0.
    p = site.ws.named(combine(site, "exp(a - b)", a=s, b=column), "p")
    dp = contract(site, grad, _turned(v), "dp")
    d = total(site, combine(site, "a * b", a=grad, b=out), [len(out.dims) - 1], True, "d")
    ds = combine(site, "a * (b - c)", a=p, b=dp, c=d)
    ds = site.ws.named(Value(ds.dims, call("mul", ds.expr, _scale(width, scale)), ds.dtype), "ds")
    dq = contract(site, ds, k, "dq")
    dk = _gathered(site, _turned(ds), q, heads, "dk")
    dv = _gathered(site, _turned(p), grad, heads, "dv")
    return dq, dk, dv


def _gathered(site: Site, a: Value, b: Value, heads: Any, base: str) -> Value:
    """[…, h, m, k] times […, h, k, n], added up over the query heads h that share one of so many key heads."""
    product = multiplied(site, a, b)
    *batch, every, m, n, k = product.dims
    own: list[str] = []
    size: Any = 1
    while not same(size, heads):
        if len(own) == len(every):
            raise Unsupported("gradients of heads that are shared in no whole groups")
        own.append(every[len(own)])
        size = size * site.ws.sizes[own[-1]]
    dims = (*batch, tuple(own), every[len(own) :], m, n, k)
    last = len(dims) - 1
    return site.ws.reduce(
        "sum", Value(dims, product.expr, product.dtype), [last - 3, last], False, base, accumulator(product)
    )


def _turned(v: Value) -> Value:
    return Value((*v.dims[:-2], v.dims[-1], v.dims[-2]), v.expr, v.dtype)


# flex_attention

Mod = Callable[..., Value]


def flex(
    site: Site,
    q: Value,
    k: Value,
    v: Value,
    score_mod: Mod,
    mask_mod: Mod | None,
    scale: float,
    want_lse: bool,
) -> tuple[Value, Value | None]:
    """flex_attention: the mods are functions of a score and of four coordinates, lowered where the score is."""
    k, v = _shared(site, q, k, v)
    s = scores(site, q, k, scale, _size(site, q, -1))
    coordinates = [_coordinate(site, s, axis) for axis in range(4)]
    score = score_mod(Value((), s.expr, s.dtype), *coordinates)
    if score.dims:
        raise Unsupported("a score mod that gives more than a number")
    expr = score.expr
    read = {n.tensor for n in walk(s.expr) if isinstance(n, Access)}
    if any(isinstance(n, Access) and n.tensor not in read for n in walk(expr)):
        expr = masked_at_infinity(site, Value(s.dims, expr, s.dtype)).expr
    if mask_mod is not None:
        keep = mask_mod(*coordinates)
        if keep.dims:
            raise Unsupported("a mask mod that gives more than a truth value")
        expr = call("where", keep.expr, expr, MINUS_INF) if keep.expr != Const(True) else expr
    out, lse = attention(site, Value(s.dims, expr, s.dtype), v, want_lse)
    # The operation gives it to base 2; what calls it multiplies by ln 2.
    return out, None if lse is None else combine(site, "a * 1.4426950408889634", a=lse)


def _coordinate(site: Site, s: Value, axis: int) -> Value:
    """The coordinate of a dimension as a number."""
    ranks = s.dims[axis]
    if not ranks:
        return Value((), Const(0), "i64")
    e: Expr = Rank(ranks[0])
    for r in ranks[1:]:
        e = site.ws.radix(e, r)
    return Value((), e, "i64")
