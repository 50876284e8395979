"""What ATen operations mean, one row or one short function each: operands to a value, exactly as eager computes it.

A pointwise operation is a text in castile's own language over its operands `a b c`. A 16-bit operation computes in f32
and rounds once, at its end; that rounding is written by `fx` from the dtype that the operation's fake result has.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

from ..ir.cascade import Access, Call, Const, Expr, Extent, Rank, transform, walk
from ..ir.parse import parse
from .values import Size, Unsupported, Value, Workspace, call, number, same, shift, substitute


@dataclass
class Site:
    """Where an operation is lowered: the workspace, what its results are to be, and a base for names."""

    ws: Workspace
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[Size, ...], ...]
    base: str

    @property
    def dtype(self) -> str:
        return self.dtypes[0]

    @property
    def shape(self) -> tuple[Size, ...]:
        return self.shapes[0]


Handler = Callable[..., Any]
H = TypeVar("H", bound=Handler)
HANDLERS: dict[str, Handler] = {}


def handles(*names: str) -> Callable[[H], H]:
    def register(f: H) -> H:
        for name in names:
            HANDLERS[name] = f
        return f

    return register


# Pointwise operations

# Operation -> text. Names of one letter are operands in order; a scalar operand stands where a tensor may.
POINTWISE = {
    "add.Tensor": "a + c * b", "add.Scalar": "a + c * b", "sub.Tensor": "a - c * b", "sub.Scalar": "a - c * b",
    "rsub.Scalar": "b - c * a", "rsub.Tensor": "b - c * a",
    "mul.Tensor": "a * b", "mul.Scalar": "a * b", "div.Tensor": "a / b", "div.Scalar": "a / b",
    "neg.default": "-a", "abs.default": "abs(a)", "sign.default": "where(a > 0, 1, where(a < 0, -1, 0))",
    "reciprocal.default": "1.0 / a", "square.default": "a * a",
    "exp.default": "exp(a)", "exp2.default": "exp2(a)", "expm1.default": "expm1(a)", "log.default": "log(a)",
    "log2.default": "log2(a)", "log1p.default": "log1p(a)", "log10.default": "log(a) * 0.4342944819032518",
    "sqrt.default": "sqrt(a)", "rsqrt.default": "rsqrt(a)", "tanh.default": "tanh(a)",
    "sigmoid.default": "sigmoid(a)", "erf.default": "erf(a)", "erfc.default": "1.0 - erf(a)",
    "sin.default": "sin(a)", "cos.default": "cos(a)",
    "floor.default": "floor(a)", "ceil.default": "-floor(-a)", "round.default": "round(a)",
    "trunc.default": "where(a < 0, -floor(-a), floor(a))",
    "relu.default": "where(a <= 0, 0, a)", "silu.default": "a * sigmoid(a)",
    "relu6.default": "minimum(maximum(a, 0), 6)",
    "hardsigmoid.default": "minimum(maximum(a + 3.0, 0), 6.0) / 6.0",
    "hardswish.default": "a * minimum(maximum(a + 3.0, 0), 6.0) / 6.0",
    "leaky_relu.default": "where(a > 0, a, a * b)",
    "minimum.default": "minimum(a, b)", "maximum.default": "maximum(a, b)",
    "eq.Tensor": "a == b", "eq.Scalar": "a == b", "ne.Tensor": "a != b", "ne.Scalar": "a != b",
    "lt.Tensor": "a < b", "lt.Scalar": "a < b", "le.Tensor": "a <= b", "le.Scalar": "a <= b",
    "gt.Tensor": "a > b", "gt.Scalar": "a > b", "ge.Tensor": "a >= b", "ge.Scalar": "a >= b",
    "isnan.default": "a != a", "isinf.default": "abs(a) == inf",
    "where.self": "where(a, b, c)", "where.ScalarOther": "where(a, b, c)", "where.ScalarSelf": "where(a, b, c)",
    "where.Scalar": "where(a, b, c)",
    "masked_fill.Scalar": "where(b, c, a)", "masked_fill.Tensor": "where(b, c, a)",
    "addcmul.default": "a + d * b * c", "addcdiv.default": "a + d * b / c",
    "lerp.Scalar": "a + c * (b - a)", "lerp.Tensor": "a + c * (b - a)",
    "sigmoid_backward.default": "a * b * (1.0 - b)", "tanh_backward.default": "a * (1.0 - b * b)",
    "silu_backward.default": "a * sigmoid(b) * (1.0 + b * (1.0 - sigmoid(b)))",
    "threshold_backward.default": "where(b <= c, 0, a)", "threshold.default": "where(a <= b, c, a)",
    "native_dropout_backward.default": "a * b * c",
}  # fmt: skip

# Operations on truth values; on integers they are bitwise.
LOGIC = {
    "logical_and.default": "a & b", "logical_or.default": "a | b", "logical_not.default": "~a",
    "logical_xor.default": "a != b",
    "bitwise_and.Tensor": "a & b", "bitwise_or.Tensor": "a | b", "bitwise_not.default": "~a",
    "bitwise_and.Scalar": "a & b", "bitwise_or.Scalar": "a | b",
}  # fmt: skip

# What a name of a text is if the call leaves it out: `alpha` of an addition, `value` of addcmul.
_KEYWORDS = {"alpha": "c", "value": "d"}
_DEFAULTS: dict[str, dict[str, float]] = {
    **{name: {"c": 1} for name in ("add", "sub", "rsub")},
    **{name: {"d": 1} for name in ("addcmul", "addcdiv")},
    "leaky_relu": {"b": 0.01},
}

_GELU = "0.5 * a * (1.0 + erf(a * 0.7071067811865476))"
_GELU_TANH = "0.5 * a * (1.0 + tanh(0.7978845608028654 * (a + 0.044715 * a * a * a)))"
_GELU_BACKWARD = "a * (0.5 * (1.0 + erf(b * 0.7071067811865476)) + b * exp(b * b * -0.5) * 0.3989422804014327)"
_GELU_TANH_INNER = "0.7978845608028654 * (b + 0.044715 * b * b * b)"
_GELU_TANH_BACKWARD = (
    f"a * (0.5 * (1.0 + tanh({_GELU_TANH_INNER}))"
    f" + 0.5 * b * (1.0 - tanh({_GELU_TANH_INNER}) * tanh({_GELU_TANH_INNER}))"
    " * 0.7978845608028654 * (1.0 + 0.134145 * b * b))"
)


@cache
def template(text: str) -> Expr:
    """The expression of a text over operands `a` to `e`."""
    names = sorted(set(re.findall(r"\b[a-e]\b", text)))
    params = ", ".join(
        f"{n}: {'bool' if _is_condition(text, n) else 'i32' if _is_bits(text) else 'f32'}" for n in names
    )
    return parse(f"def f({params}) -> y:\n    y = {text}\n").einsums[0].expr


def _is_condition(text: str, name: str) -> bool:
    return f"where({name}," in text


def _is_bits(text: str) -> bool:
    return any(op in text for op in "&|~")


def combine(site: Site, text: str, **operands: Any) -> Value:
    """A pointwise text over operands: values broadcast, numbers stand as literals."""
    expr = template(text)
    reads = [n.tensor for n in walk(expr) if isinstance(n, Access)]
    values: dict[str, Value] = {}
    literals: dict[str, Expr] = {}
    for name in dict.fromkeys(reads):
        given = operands[name]
        if isinstance(given, Value):
            often = reads.count(name) > 1
            values[name] = site.ws.named(given, site.base) if often else site.ws.short(given, site.base)
        else:
            literals[name] = number(given)
    dims, exprs = site.ws.broadcast(list(values.values()))
    filled = literals | dict(zip(values, exprs, strict=True))
    result = transform(expr, lambda n: filled.get(n.tensor, n) if isinstance(n, Access) and not n.indices else n)
    result = _simpler(result)
    return Value(dims, result, site.ws.infer(result))


def _simpler(e: Expr) -> Expr:
    """Without factors of one and terms of zero, which texts have where a keyword is left out."""

    def one(n: Expr) -> Expr:
        if isinstance(n, Call) and n.op == "mul":
            a, b = n.args
            if isinstance(a, Const) and a.value == 1 and a.kind == "int":
                return b
            if isinstance(b, Const) and b.value == 1 and b.kind == "int":
                return a
        if isinstance(n, Call) and n.op == "add" and n.args[1] == Const(0):
            return n.args[0]
        return n

    return transform(e, one)


def _pointwise(name: str, text: str) -> Handler:
    family = name.split(".")[0]
    logical = family.startswith(("logical", "bitwise"))

    def handler(site: Site, *args: Any, **kwargs: Any) -> Value:
        operands: dict[str, Any] = dict(_DEFAULTS.get(family, {}))
        operands |= dict(zip("abcde", args, strict=False))
        for key, value in kwargs.items():
            if key not in _KEYWORDS:
                raise Unsupported(f"`{key}` of {family}")
            operands[_KEYWORDS[key]] = value
        if logical:
            operands = {k: _truth(site, v, family) for k, v in operands.items()}
        elif family in ("div", "reciprocal") and all(not _is_float(v) for v in operands.values()):
            operands = {k: site.ws.cast(v, "f32") if isinstance(v, Value) else v for k, v in operands.items()}
        elif family not in ("where", "masked_fill", "native_dropout_backward"):
            operands = {k: _counted(site, v) for k, v in operands.items()}
        elif family == "native_dropout_backward":
            operands["b"] = site.ws.cast(operands["b"], "f32")
        return combine(site, text, **operands)

    return handler


def _is_float(v: Any) -> bool:
    return v.dtype.startswith(("f", "bf")) if isinstance(v, Value) else isinstance(v, float)


def _truth(site: Site, v: Any, family: str) -> Any:
    """An operand of a logical operation: nonzero is true. Bitwise ones take bools and integers as they are."""
    if not isinstance(v, Value):
        return bool(v) if family.startswith("logical") else v
    return site.ws.cast(v, "bool") if family.startswith("logical") else v


def _counted(site: Site, v: Any) -> Any:
    """Truth values take part in arithmetic and comparisons as integers."""
    return site.ws.cast(v, "i32") if isinstance(v, Value) and v.dtype == "bool" else v


for _name, _text in {**POINTWISE, **LOGIC}.items():
    HANDLERS[_name] = _pointwise(_name, _text)


@handles("gelu.default")
def _gelu(site: Site, a: Value, approximate: str = "none") -> Value:
    return combine(site, _GELU if approximate == "none" else _GELU_TANH, a=a)


@handles("gelu_backward.default")
def _gelu_backward(site: Site, a: Value, b: Value, approximate: str = "none") -> Value:
    return combine(site, _GELU_BACKWARD if approximate == "none" else _GELU_TANH_BACKWARD, a=a, b=b)


@handles("div.Tensor_mode", "div.Scalar_mode")
def _divide(site: Site, a: Value, b: Any, rounding_mode: str | None = None) -> Value:
    if rounding_mode is None:
        return combine(site, "a / b", a=a, b=b)
    if not _is_float(a) and not _is_float(b):
        if rounding_mode != "floor":
            raise Unsupported("an integer division that truncates")
        return _floored(site, a, b, "floordiv")
    text = "floor(a / b)" if rounding_mode == "floor" else "where(a / b < 0, -floor(-(a / b)), floor(a / b))"
    if rounding_mode == "floor":
        raise Unsupported("a floor division of floats, which eager corrects by its remainder")
    return combine(site, text, a=a, b=b)


@handles("floor_divide.default")
def _floor_divide(site: Site, a: Value, b: Any) -> Value:
    return _floored(site, a, b, "floordiv")


@handles("remainder.Scalar")
def _remainder(site: Site, a: Value, b: Any) -> Value:
    return _floored(site, a, b, "mod")


def _floored(site: Site, a: Value, b: Any, op: str) -> Value:
    """A quotient rounded down or its remainder, of integers by a literal: one that is 0 is an error in eager."""
    divisor = b.expr.value if isinstance(b, Value) and isinstance(b.expr, Const) else b
    if a.dtype not in ("i32", "i64") or type(divisor) is not int or not 0 < divisor < 1 << 31:
        raise Unsupported("a division of integers by what is no positive literal")
    return Value(a.dims, call(op, a.expr, Const(divisor)), a.dtype)


@handles("pow.Tensor_Scalar")
def _power(site: Site, a: Value, n: int | float) -> Value:
    texts = {0.5: "sqrt(a)", -0.5: "rsqrt(a)", 2: "a * a", 3: "a * a * a", 1: "a", -1: "1.0 / a", -2: "1.0 / (a * a)"}
    if n not in texts or (not _is_float(a) and n not in (1, 2, 3)):
        raise Unsupported(f"a power of {n}")
    return combine(site, texts[n], a=a)


@handles("clamp.default", "clamp.Tensor", "hardtanh.default")
def _clamp(site: Site, a: Value, min: Any = None, max: Any = None) -> Value:
    if site.base == "hardtanh":
        min, max = -1.0 if min is None else min, 1.0 if max is None else max
    for bound, text in ((min, "maximum(a, b)"), (max, "minimum(a, b)")):
        if bound is not None:
            if isinstance(bound, float) and math.isnan(bound):
                raise Unsupported("a bound of NaN")
            a = combine(site, text, a=a, b=bound)
    return a


@handles("clamp_min.default")
def _clamp_min(site: Site, a: Value, bound: Any) -> Value:
    return _clamp(site, a, bound, None)


@handles("clamp_max.default")
def _clamp_max(site: Site, a: Value, bound: Any) -> Value:
    return _clamp(site, a, None, bound)


@handles("softplus.default")
def _softplus(site: Site, a: Value, beta: float = 1, threshold: float = 20) -> Value:
    x = site.ws.named(combine(site, "a * b", a=a, b=beta), site.base)
    soft = combine(site, "where(a > b, c, log1p(exp(a)) / d)", a=x, b=threshold, c=a, d=beta)
    return soft


@handles("elu.default")
def _elu(site: Site, a: Value, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> Value:
    return combine(site, "where(a > 0, a * c, expm1(a * d) * b)", a=a, b=alpha * scale, c=scale, d=input_scale)


@handles("_to_copy.default", "to.dtype")
def _to_copy(site: Site, a: Value, *_: Any, **kwargs: Any) -> Value:
    return site.ws.cast(a, site.dtype)


@handles("convert_element_type.default")
def _convert(site: Site, a: Value, dtype: Any) -> Value:
    return site.ws.cast(a, site.dtype)


@handles("clone.default", "lift_fresh_copy.default", "contiguous.default", "detach.default", "alias.default",
         "detach_.default", "lift_fresh.default")  # fmt: skip
def _same(site: Site, a: Value, **_: Any) -> Value:
    return a


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
            a = Value(a.dims, substitute(a.expr, {r: call("sub", last, Rank(r))}), a.dtype)
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
        piece = substitute(v.expr, new)
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


# Reductions


def _axes(a: Value, dims: Any) -> list[int]:
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
    return total(site, a, _axes(a, dims), keepdim)


def mean(site: Site, a: Value, axes: Sequence[int], keep: bool, base: str = "mean") -> Value:
    n = site.ws.count(a, axes)
    s = total(site, a, axes, keep, base)
    return Value(s.dims, call("div", s.expr, n), "f64" if s.dtype == "f64" else "f32")


@handles("mean.default", "mean.dim")
def _mean(site: Site, a: Value, dims: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Value:
    if dtype is not None:
        a = site.ws.cast(a, site.dtype)
    return mean(site, a, _axes(a, dims), keepdim)


def _extreme(op: str) -> Handler:
    def handler(site: Site, a: Value, dims: Any = None, keepdim: bool = False) -> Value:
        if a.dtype == "bool":
            raise Unsupported("an extreme of truth values")
        a = site.ws.short(a, op)
        return site.ws.reduce(op, a, _axes(a, dims), keepdim, op)

    return handler


for _op in ("max", "min"):
    HANDLERS[f"a{_op}.default"] = HANDLERS[f"{_op}.default"] = _extreme(_op)


def _logical(op: str) -> Handler:
    def handler(site: Site, a: Value, dims: Any = None, keepdim: bool = False) -> Value:
        if site.dtype != "bool":
            raise Unsupported("truth values that are no bool")
        a = site.ws.short(site.ws.cast(a, "bool"), op)
        return site.ws.reduce(op, a, _axes(a, dims), keepdim, op)

    return handler


for _op in ("any", "all"):
    for _form in ("default", "dim", "dims"):
        HANDLERS[f"{_op}.{_form}"] = _logical(_op)


@handles("argmax.default")
def _argmax(site: Site, a: Value, dim: int | None = None, keepdim: bool = False) -> Value:
    if dim is None or not a.dims or not a.dims[dim]:
        raise Unsupported("argmax over several dimensions")
    site.ws.single(a, dim)
    return site.ws.reduce("argmax", site.ws.short(a, "argmax"), _axes(a, dim), keepdim, "argmax", "i64")


def _variance(site: Site, a: Value, dims: Any, correction: Any, keep: bool) -> tuple[Value, Value]:
    """The variance, two passes as written, and the mean."""
    axes = _axes(a, dims)
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
    return _variance(site, a, dims, 1 if correction is None else correction, keepdim)[0]


@handles("std.correction")
def _std(site: Site, a: Value, dims: Any = None, *, correction: Any = None, keepdim: bool = False) -> Value:
    return combine(site, "sqrt(a)", a=_var(site, a, dims, correction=correction, keepdim=keepdim))


@handles("var_mean.correction")
def _var_mean(
    site: Site, a: Value, dims: Any = None, *, correction: Any = None, keepdim: bool = False
) -> tuple[Value, Value]:
    return _variance(site, a, dims, 1 if correction is None else correction, keepdim)


@handles("linalg_vector_norm.default")
def _norm(site: Site, a: Value, ord: Any = 2, dims: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Value:
    axes = _axes(a, dims)
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
    _, e, s = softmax_parts(site, a, dim % len(a.dims))
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
    axes = _axes(a, dims)
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


# Norms


@handles("native_layer_norm.default")
def _layer_norm(
    site: Site, a: Value, shape: Sequence[Any], weight: Value | None, bias: Value | None, eps: float
) -> tuple[Value, Value, Value]:
    dims = list(range(len(a.dims) - len(shape), len(a.dims)))
    a = site.ws.named(a, "x")
    var, mu = _variance(site, a, dims, 0, True)
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
    return keep, substitute(a.expr, new)


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
    if not _is_float(a):
        raise Unsupported("a product of integer matrices")
