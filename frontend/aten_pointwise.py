"""ATen operations on elements, one by one: a row of text each, or a short function."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..ir.cascade import Const
from ..ir.dtypes import DTYPES, round_to, rounds, wrap
from .aten import HANDLERS, Handler, Site, combine, handles, is_float
from .values import Unsupported, Value, call, is_coordinate

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
    "sigmoid.default": "sigmoid(a)", "erf.default": "erf(a)",
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
    "leaky_relu_backward.default": "where(b > 0, a, a * c)",
    "hardtanh_backward.default": "where((b > c) & (b < d), a, 0)",
    "hardsigmoid_backward.default": "where((b > -3.0) & (b < 3.0), a / 6.0, 0)",
    "hardswish_backward.default": "where(b <= -3.0, 0, where(b >= 3.0, a, a * (b / 3.0 + 0.5)))",
    "softplus_backward.default": "where(b * c > d, a, a * sigmoid(b * c))",
    "mish.default": "a * tanh(log1p(exp(a)))",
    "mish_backward.default":
        "a * (tanh(log1p(exp(b))) + b * sigmoid(b) * (1.0 - tanh(log1p(exp(b))) * tanh(log1p(exp(b)))))",
}  # fmt: skip

# Operations on truth values; on integers they are bitwise.
LOGIC = {
    "logical_and.default": "a & b", "logical_or.default": "a | b", "logical_not.default": "~a",
    "logical_xor.default": "a != b",
    "bitwise_and.Tensor": "a & b", "bitwise_or.Tensor": "a | b", "bitwise_not.default": "~a",
    "bitwise_and.Scalar": "a & b", "bitwise_or.Scalar": "a | b",
}  # fmt: skip

# Operations whose literals are rounded to the type in which operands meet; others compute with them in f32.
ROUNDED = frozenset("eq ne lt le gt ge add sub rsub".split())

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
        elif family in ("div", "reciprocal") and all(not is_float(v) for v in operands.values()):
            operands = {k: site.ws.cast(v, "f32") if isinstance(v, Value) else v for k, v in operands.items()}
        elif family not in ("where", "masked_fill", "native_dropout_backward"):
            operands = {k: _met(site, family, k, v) for k, v in operands.items()}
        elif family == "native_dropout_backward":
            operands["b"] = site.ws.cast(operands["b"], "f32")
        return combine(site, text, **operands)

    return handler


def _truth(site: Site, v: Any, family: str) -> Any:
    """An operand of a logical operation: nonzero is true. Bitwise ones take bools and integers as they are."""
    if not isinstance(v, Value):
        return bool(v) if family.startswith("logical") else v
    return site.ws.cast(v, "bool") if family.startswith("logical") else v


def _met(site: Site, family: str, name: str, v: Any) -> Any:
    """An operand in the type to which ATen converts it; truth values take part as integers.

    What is no narrower is converted by castile's own types. A number that multiplies or divides stays as it is.
    """
    meeting = site.meeting or site.dtype
    if not isinstance(v, Value):
        return _rounded(v, meeting) if family in ROUNDED else v
    if v.dtype == "bool":
        return site.ws.cast(v, "i32")
    if family in ("mul", "div") and name == "b" and not v.ranks:
        return v
    to, of = DTYPES[meeting], DTYPES[v.dtype]
    narrower = meeting != v.dtype and to.bits < 32 if to.is_float else to.bits < of.bits
    # castile compares integers with what is no integer exactly.
    inexact = bool(site.meeting) and to.is_float and of.is_integer and not is_coordinate(v.expr)
    return site.ws.cast(v, meeting) if narrower or inexact else v


def _rounded(v: Any, dtype: str) -> Any:
    """The number that a literal is in a type: the literal itself where that is the same."""
    if isinstance(v, bool) or not isinstance(v, int | float):
        return v
    if DTYPES[dtype].is_integer:
        return int(wrap(np.asarray(v), dtype)) if isinstance(v, int) else v
    found = float(round_to(np.asarray(v, np.float64), dtype)) if rounds(dtype) else v
    return v if found == v else found


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
    if not is_float(a) and not is_float(b):
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
    if n not in texts or (not is_float(a) and n not in (1, 2, 3)):
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


@handles("elu_backward.default")
def _elu_backward(
    site: Site, a: Value, alpha: float, scale: float, input_scale: float, is_result: bool, b: Value
) -> Value:
    if is_result:
        raise Unsupported("the gradient of an elu in place, by its result")
    return combine(
        site,
        "where(b > 0, a * c, a * exp(b * d) * e)",
        a=a,
        b=b,
        c=scale,
        d=input_scale,
        e=input_scale * alpha * scale,
    )


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
