"""What ATen operations mean: the table of their handlers, and what those are written with.

A handler takes operands as values and returns values, exactly as eager computes them. A pointwise operation is a text
in castile's own language over its operands `a b c`. A 16-bit operation computes in f32 and rounds once, at its end;
that rounding is written by `fx` from the dtype that the operation's fake result has. Handlers stand in

    aten_pointwise    elements, one by one            aten_reductions   sums, extremes, softmax
    aten_layout       creation, views, what copies    aten_layers       norms, losses, matrix products
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

from ..ir.cascade import Access, Call, Const, Expr, transform, walk
from ..ir.parse import parse
from .values import Size, Value, Workspace, number


@dataclass
class Site:
    """Where an operation is lowered: the workspace, what its results are to be, and a base for names.

    ``meeting`` is the type to which ATen converts the operands of a pointwise operation, if it is not the result's.
    """

    ws: Workspace
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[Size, ...], ...]
    base: str
    meeting: str = ""

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


def is_float(v: Any) -> bool:
    return v.dtype.startswith(("f", "bf")) if isinstance(v, Value) else isinstance(v, float)
