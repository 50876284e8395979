"""A cascade as plain PyTorch in float64, one Einsum after the other: what a generated file compares itself with.

Every rank of an Einsum is an axis and nothing is fused, so a line reads as the Einsum does. Einsums that scan, that
combine by a monoid of their own, or that look for a coordinate have no such form.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ..ir.cascade import Access, Call, Cascade, Cast, Const, Einsum, Expr, Extent, Rank, Reduce, literal_value
from ..ir.dtypes import DTYPES, numpy_dtype
from ..ir.ops import OPS
from ..ir.verify import scan_step

_REDUCTIONS = {"sum": "sum", "prod": "prod", "max": "amax", "min": "amin", "any": "any", "all": "all"}
_FUNCTIONS = frozenset(
    "exp exp2 expm1 log log2 log1p sqrt rsqrt tanh sigmoid erf sin cos floor round abs minimum maximum where".split()
)
_INFIX = frozenset("add sub mul div floordiv mod lt le gt ge eq ne and or pow".split())


def has_reference(c: Cascade) -> bool:
    """Whether `reference` can print a cascade."""
    return all(_plain(e) for e in c.einsums) and all(p.dtype != "u32" for p in c.params)


def _plain(e: Einsum) -> bool:
    ranks: list[str] = list(e.output.ranks)
    for n in e.reductions:
        if n.op not in _REDUCTIONS or set(n.ranks) & set(e.output.ranks):
            return False
        ranks += [r for r in n.ranks if r not in ranks]
    return len(e.outputs) == 1 and scan_step(e) is None and _printable(e.expr)


def _printable(e: Expr) -> bool:
    match e:
        case Const() | Rank() | Extent():
            return True
        case Access(indices=indices):
            return all(map(_printable, indices))
        case Cast(arg=arg):
            return _printable(arg)
        case Reduce(args=args):
            return len(args) == 1 and _printable(args[0])
        case Call(op="pow", args=(base, exponent)):
            return _printable(base) and isinstance(literal_value(exponent), int)
        case Call(op=op, args=args):
            return (op in _INFIX or op in _FUNCTIONS or op in ("neg", "not")) and all(map(_printable, args))


def reference(c: Cascade, names: Mapping[str, str], ranks: Mapping[str, str]) -> Iterator[str]:
    """The lines of ``reference(parameters, extents)`` and of what it needs; ``names`` and ``ranks`` spell tensors and
    ranks as the file does."""
    yield "def along(extents, device):"
    yield '    """The coordinates of ranks, each on an axis of its own."""'
    yield "    shapes = [[-1 if i == axis else 1 for i in range(len(extents))] for axis in range(len(extents))]"
    yield "    return [torch.arange(n, device=device).reshape(shape) for n, shape in zip(extents, shapes)]"
    yield ""
    yield ""
    yield "def value(x):"
    yield '    """A number as a tensor; floats have 64 bits."""'
    yield "    x = torch.as_tensor(x)"
    yield "    if x.is_floating_point():"
    yield "        return x.double()"
    yield "    return x if x.dtype == torch.bool else x.to(torch.int64)"
    yield ""
    yield ""
    yield "def over(x, axes, extents):"
    yield '    """A value that has all coordinates of the axes over which it is reduced."""'
    yield "    x = value(x)"
    yield "    shape = [1] * (len(extents) - x.dim()) + list(x.shape)"
    yield "    return x.expand([n if i in axes else s for i, (n, s) in enumerate(zip(extents, shape))])"
    yield ""
    yield ""
    params = [names[p.name] for p in c.params]
    yield f"def reference({', '.join([*params, *(ranks[r] for r in c.ranks)])}):"
    yield '    """The cascade in float64, one Einsum after the other: slow, and nothing is fused."""'
    tensors = [names[p.name] for p in c.params if p.indices]
    yield f"    device = {tensors[0] + '.device' if tensors else repr('cpu')}"
    yield (
        f"    {', '.join(params)} = (value(x) for x in ({', '.join(params)},))"
        if len(params) > 1
        else (f"    {params[0]} = value({params[0]})" if params else "    pass")
    )
    local = dict(names)
    for e in c.einsums:
        local[e.name] = names.get(e.name) or f"{e.name}_"
        yield from _Lines(c, e, local, ranks).lines()
    yield f"    return {', '.join(local[name] for name in c.outputs)}{',' if len(c.outputs) == 1 else ''}"


class _Lines:
    """The lines of one Einsum."""

    def __init__(self, c: Cascade, e: Einsum, names: Mapping[str, str], ranks: Mapping[str, str]) -> None:
        self.c, self.e, self.names, self.ranks = c, e, names, ranks
        self.axes = list(e.output.ranks)
        for n in e.reductions:
            self.axes += [r for r in n.ranks if r not in self.axes]

    def lines(self) -> Iterator[str]:
        e = self.e
        yield f"    # {e.output.name}[{', '.join(e.output.ranks)}]"
        extents = ", ".join(self.ranks[r] for r in self.axes)
        if self.axes:
            yield f"    extents = [{extents}]"
            places = ", ".join(f"at_{self.ranks[r]}" for r in self.axes)
            yield f"    {places}{',' if len(self.axes) == 1 else ''} = along(extents, device)"
        shape = ", ".join(self.ranks[r] for r in e.output.ranks) + ("," if len(e.output.ranks) == 1 else "")
        text = f"value({_bare(self.text(e.expr))})"
        if self.axes:
            kept = ", ".join(
                [*(self.ranks[r] for r in e.output.ranks), *("1" for _ in self.axes[len(e.output.ranks) :])]
            )
            text = f"{text}.expand([{kept}]).reshape(({shape}))"
        if e.output.dtype is not None:
            text = self.cast(text, e.output.dtype)
        yield f"    {self.names[e.name]} = {text}"

    def cast(self, text: str, dtype: str) -> str:
        row = DTYPES[dtype]
        rounded = f"{text}.to(torch.{numpy_dtype(dtype)})"
        return text if dtype == "f64" else f"{rounded}.double()" if row.is_float else f"value({rounded})"

    def text(self, e: Expr) -> str:
        match e:
            case Const():
                number = literal_value(e)
                special = isinstance(number, float) and (number != number or abs(number) == float("inf"))
                return f'float("{number}")' if special else repr(number)
            case Rank(name=name):
                return f"at_{self.ranks[name]}"
            case Extent(rank=rank):
                return self.ranks[rank]
            case Access(tensor=tensor, indices=()):
                return self.names[tensor]
            case Access(tensor=tensor, indices=indices):
                name = self.names[tensor]
                places = [self.index(x, f"{name}.shape[{i}]") for i, x in enumerate(indices)]
                return f"{name}[{', '.join(places)}]"
            case Cast(dtype=dtype, arg=arg):
                return self.cast(f"value({self.text(arg)})", dtype)
            case Reduce(op=op, ranks=ranks, args=(arg,)):
                axes = [self.axes.index(r) for r in ranks]
                text = f"over({_bare(self.text(arg))}, {axes}, extents)"
                for a in axes:
                    text += f".{_REDUCTIONS[op]}({a}, keepdim=True)"
                return text
            case Call(op="neg", args=(a,)):
                return f"(-{self.text(a)})"
            case Call(op="not", args=(a,)):
                return f"(~value({self.text(a)}))"
            case Call(op=op, args=args) if op in _FUNCTIONS:
                return f"torch.{op}({', '.join(f'value({_bare(self.text(a))})' for a in args)})"
            case Call(op="div", args=(a, b)):
                return f"(value({self.text(a)}).double() / value({self.text(b)}))"
            case Call(op=op, args=(a, b)):
                return f"({self.text(a)} {OPS[op].symbol} {self.text(b)})"
        raise AssertionError(type(e).__name__)

    def index(self, e: Expr, size: str) -> str:
        """An index; one that a condition may have to keep inside is kept inside."""
        if isinstance(e, Rank):
            return self.text(e)
        return f"value({_bare(self.text(e))}).clamp(0, {size} - 1)"


def _bare(text: str) -> str:
    """A text without the parentheses around all of it."""
    depth = 0
    for i, c in enumerate(text):
        depth += (c == "(") - (c == ")")
        if depth == 0:
            return text[1:-1] if text.startswith("(") and i == len(text) - 1 else text
    return text
