"""ATen operations that make tensors, look at them in another shape, or put them side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..ir.cascade import Const, Expr, Extent, Rank
from .aten import Site, handles
from .values import Unsupported, Value, call, number, same, shift, substitute

# Creation


@handles("new_full.default")
def _new_full(site: Site, _like: Any, _size: Any, value: Any, **_: Any) -> Value:
    return _full(site, None, value)


@handles("full.default", "scalar_tensor.default", "full_like.default")
def _full(site: Site, a: Any, value: Any = None, **_: Any) -> Value:
    value = a if site.base == "scalar_tensor" else value
    if isinstance(value, Value):
        raise Unsupported("a tensor filled with a tensor")
    literal = (
        float(value) if site.dtype.startswith(("f", "bf")) else bool(value) if site.dtype == "bool" else int(value)
    )
    dims = tuple(() if same(n, 1) else (site.ws.rank(n),) for n in site.shape)
    return Value(dims, number(literal), site.dtype)


@handles("zeros.default", "zeros_like.default", "new_zeros.default")
def _zeros(site: Site, *_: Any, **__: Any) -> Value:
    return _full(Site(site.ws, site.dtypes, site.shapes, "scalar_tensor"), 0)


@handles("ones.default", "ones_like.default", "new_ones.default")
def _ones(site: Site, *_: Any, **__: Any) -> Value:
    return _full(Site(site.ws, site.dtypes, site.shapes, "scalar_tensor"), 1)


@handles("arange.default", "arange.start", "arange.start_step", "iota.default")
def _arange(site: Site, *args: Any, **kwargs: Any) -> Value:
    if site.base == "iota":
        start, step = kwargs.get("start", 0), kwargs.get("step", 1)
    else:
        start, step = (args[0] if len(args) > 1 else 0), (args[2] if len(args) > 2 else 1)
    if not all(isinstance(n, int) for n in (start, step)):
        raise Unsupported("a range that does not count in known integers")
    if same(site.shape[0], 1):
        return Value(((),), number(start), site.dtype)
    r = site.ws.rank(site.shape[0])
    e: Expr = Rank(r)
    if step != 1:
        e = call("mul", e, number(step))
    if start != 0:
        e = call("add", e, number(start))
    return site.ws.cast(Value(((r,),), e, "i64"), site.dtype)


# Views


@handles("view.default", "_unsafe_view.default", "reshape.default", "squeeze.dim", "squeeze.dims", "squeeze.default",
         "unsqueeze.default", "flatten.using_ints")  # fmt: skip
def _view(site: Site, a: Value, *_: Any) -> Value:
    return site.ws.reshape(a, site.shape)


@handles("permute.default")
def _permute(site: Site, a: Value, order: Sequence[int]) -> Value:
    return Value(tuple(a.dims[i] for i in order), a.expr, a.dtype)


@handles("transpose.int")
def _transpose(site: Site, a: Value, i: int, j: int) -> Value:
    dims = list(a.dims)
    dims[i], dims[j] = dims[j], dims[i]
    return Value(tuple(dims), a.expr, a.dtype)


@handles("t.default")
def _t(site: Site, a: Value) -> Value:
    return Value(a.dims[::-1], a.expr, a.dtype)


@handles("expand.default")
def _expand(site: Site, a: Value, *_: Any, **__: Any) -> Value:
    old = ((),) * (len(site.shape) - len(a.dims)) + a.dims
    dims = tuple((site.ws.rank(n),) if not d and not same(n, 1) else d for d, n in zip(old, site.shape, strict=True))
    return Value(dims, a.expr, a.dtype)


@handles("select.int")
def _select(site: Site, a: Value, axis: int, index: Any) -> Value:
    axis %= len(a.dims)
    if not isinstance(index, int):
        raise Unsupported("an index that is not known")
    if a.dims[axis]:
        size = site.ws.sizes[site.ws.single(a, axis)]
        if index < 0:
            if not isinstance(size, int):
                raise Unsupported("an index from the end of a dynamic dimension")
            index += size
        a = site.ws.indexed(a, axis, 1, shift(index))
    return Value(a.dims[:axis] + a.dims[axis + 1 :], a.expr, a.dtype)


@handles("slice.Tensor")
def _slice(site: Site, a: Value, axis: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Value:
    axis %= len(a.dims)
    if not a.dims[axis] or step != 1:
        if same(site.shape[axis], 1) and not a.dims[axis]:
            return a
        raise Unsupported("a slice with steps, or to nothing")
    size = site.ws.sizes[site.ws.single(a, axis)]
    if same(size, site.shape[axis]):
        return a
    start = 0 if start is None else start
    if not isinstance(start, int) or (start < 0 and not isinstance(size, int)):
        raise Unsupported("a slice from where nobody knows")
    start = max(0, start + size) if start < 0 else start
    return site.ws.indexed(a, axis, site.shape[axis], shift(start))


@handles("split.Tensor", "split_with_sizes.default", "unbind.int", "chunk.default")
def _split(site: Site, a: Value, _sizes: Any = None, dim: int = 0) -> tuple[Value, ...]:
    if site.base == "unbind":
        axis = (_sizes or 0) % len(a.dims)
        return tuple(_select(site, a, axis, i) for i in range(len(site.shapes)))
    axis, at, found = dim % len(a.dims), 0, []
    for dtype, shape in zip(site.dtypes, site.shapes, strict=True):
        if not isinstance(shape[axis], int):
            raise Unsupported("pieces of dynamic sizes")
        found.append(_slice(Site(site.ws, (dtype,), (shape,), site.base), a, axis, at))
        at += shape[axis]
    return tuple(found)


@handles("flip.default")
def _flip(site: Site, a: Value, axes: Sequence[int]) -> Value:
    for axis in axes:
        if a.dims[axis]:
            r = site.ws.single(a, axis)
            last = call("sub", Extent(r), Const(1))
            a = Value(a.dims, substitute(a.expr, {r: call("sub", last, Rank(r))}, site.ws.sizes), a.dtype)
    return a


# Layout: what copies


@handles("cat.default")
def _cat(site: Site, tensors: Sequence[Value], dim: int = 0) -> Value:
    """Pieces side by side: each is read where its coordinates are."""
    rank = len(site.shape)
    axis = dim % rank
    pieces = [v for v in tensors if len(v.dims) == rank]
    if len(pieces) != len(tensors):
        raise Unsupported("an empty piece")
    # All other dimensions agree; bring every piece over the ranks of the first.
    if not isinstance(site.shape[axis], int):
        raise Unsupported("pieces of dynamic sizes")
    whole = site.ws.rank(site.shape[axis])
    others = [Value((*v.dims[:axis], (), *v.dims[axis + 1 :]), Const(0), "i64") for v in pieces]
    dims, _ = site.ws.broadcast(others)
    dims = (*dims[:axis], (whole,), *dims[axis + 1 :])
    result: Expr | None = None
    ends = site.shape[axis]
    for v in reversed(pieces):
        size = 1 if not v.dims[axis] else site.ws.sizes[site.ws.single(v, axis)]
        start = ends - size
        at = shift(-start)(Rank(whole))
        v = site.ws.short(v, site.base)
        new: dict[str, Expr] = {v.dims[axis][0]: at} if v.dims[axis] else {}
        for mine, theirs in zip(dims, v.dims, strict=True):
            if theirs and theirs != v.dims[axis]:
                ranks, left, right = site.ws.refine(mine, theirs)
                if left or ranks != mine:
                    raise Unsupported("pieces that were merged in different ways")
                new |= right
        piece = substitute(v.expr, new, site.ws.sizes)
        result = piece if result is None else call("where", call("lt", Rank(whole), Const(ends)), piece, result)
        ends = start
    if result is None:
        raise Unsupported("nothing to put side by side")
    return Value(dims, result, site.ws.infer(result))


@handles("constant_pad_nd.default")
def _pad(site: Site, a: Value, pads: Sequence[Any], value: float = 0) -> Value:
    if not all(isinstance(n, int) for n in pads):
        raise Unsupported("a padding of dynamic width")
    literal = number(float(value) if site.dtype.startswith(("f", "bf")) else int(value))
    for i in range(len(pads) // 2):
        before, after = pads[2 * i], pads[2 * i + 1]
        axis = len(a.dims) - 1 - i
        if before == after == 0:
            continue
        if not a.dims[axis] or not isinstance(site.shape[axis], int):
            raise Unsupported("a padded dimension of size 1, or of dynamic size")
        size = site.ws.sizes[site.ws.single(a, axis)]
        a = site.ws.indexed(site.ws.short(a, site.base), axis, site.shape[axis], shift(-before))
        if not a.dims[axis]:
            raise Unsupported("a padding to size 1")
        r = Rank(a.dims[axis][0])
        inside = call("and", call("ge", r, Const(max(before, 0))), call("lt", r, Const(size + before)))
        a = Value(a.dims, call("where", inside, a.expr, literal), a.dtype)
    return a


@handles("tril.default", "triu.default")
def _triangle(site: Site, a: Value, diagonal: int = 0) -> Value:
    row, column = (Rank(site.ws.single(a, i)) for i in (-2, -1))
    if not isinstance(diagonal, int):
        raise Unsupported("a diagonal that is not known")
    edge = call("add", row, number(diagonal)) if diagonal else row
    keep = call("le" if site.base == "tril" else "ge", column, edge)
    zero = Const(False) if a.dtype == "bool" else Const(0)
    return Value(a.dims, call("where", keep, a.expr, zero), a.dtype)
