"""Random inputs that mean something to a cascade.

Integers respect what the cascade does with them: a page table stays inside its pages, a length inside its rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from .cascade import Access, Call, Cascade, Expr, Param, Rank, free_ranks, transform, walk
from .dtypes import DTYPES
from .extents import extent_of, interval, shape_of
from .scalar import Array


def random_inputs(c: Cascade, extents: Mapping[str, int], seed: int) -> dict[str, Array]:
    """Inputs of the declared types: normal floats, positive scalars, integers within what the cascade can take.

    The same cascade, extents and seed give the same values.
    """
    spans = integer_spans(c, extents)
    positive = set(_under_roots(c))
    found = {}
    for number, p in enumerate(c.params):
        rng = np.random.default_rng([seed, number])
        found[p.name] = _draw(p, shape_of(c, p.name, extents), rng, spans.get(p.name), p.name in positive)
    return found


def _draw(
    p: Param, shape: tuple[int, ...], rng: np.random.Generator, span: tuple[int, int] | None, positive: bool
) -> Array:
    row = DTYPES[p.dtype]
    if row.is_float:
        if positive or not shape:
            return rng.uniform(0.125, 0.875, shape)
        return rng.standard_normal(shape)
    if row.kind == "bool":
        return rng.integers(0, 2, shape).astype(bool)
    low, high = span or _usual(p.dtype)
    low, high = max(low, row.lowest), min(high, row.highest)
    return rng.integers(low, max(low, high), shape, endpoint=True)


def _usual(dtype: str) -> tuple[int, int]:
    """Integers of which nothing is known: words of bits are full, numbers are small."""
    return {"u32": (0, 2**32 - 1), "u8": (0, 255), "i8": (-8, 7), "i16": (-8, 7)}.get(dtype, (0, 7))


def _nodes(c: Cascade) -> Iterator[Expr]:
    for e in c.einsums:
        yield from walk(e.expr)


def _under_roots(c: Cascade) -> Iterator[str]:
    """Parameters of which a root or a logarithm is taken."""
    for node in _nodes(c):
        match node:
            case Call(op="log" | "log2" | "sqrt" | "rsqrt", args=(Access(tensor=name),)):
                yield name
            case _:
                pass


def integer_spans(c: Cascade, extents: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """For integer parameters, the values with which the cascade works, read off its indices and operations."""
    integers = {p.name for p in c.params if DTYPES[p.dtype].is_integer}
    found: dict[str, tuple[int, int]] = {}

    def narrow(name: str, low: int, high: int) -> None:
        a, b = found.get(name, (low, high))
        found[name] = (max(a, low), min(b, high))

    for node in _nodes(c):
        match node:
            case Access(tensor=tensor, indices=indices):
                for size, index in zip(shape_of(c, tensor, extents), indices, strict=True):
                    names = {n.tensor for n in walk(index) if isinstance(n, Access)} & integers
                    if names and size:
                        high = _greatest(index, names, size, extents)
                        for name in names:
                            narrow(name, 0, high)
            case Call(op="floordiv" | "mod", args=(_, Access(tensor=name))) if name in integers:
                narrow(name, 1, 7)
            case Call(op="lshift" | "rshift", args=(_, Access(tensor=name))) if name in integers:
                narrow(name, 0, 7)
            case Call(op="lt" | "le" | "gt" | "ge" | "eq" | "ne" as op, args=args):
                for a, b in (args, args[::-1]):
                    if isinstance(a, Access) and a.tensor in integers and (reach := _reach(b, extents)):
                        narrow(a.tensor, *((0, reach - 1) if op in ("eq", "ne") else (1, reach)))
            case Call(op="exp2", args=(arg,)):
                # A power-of-two scale, stored with the bias of an 8-bit exponent.
                for name in {n.tensor for n in walk(arg) if isinstance(n, Access)} & integers:
                    narrow(name, 120, 134)
            case _:
                pass
    return {name: (low, high) for name, (low, high) in found.items() if low <= high}


def _reach(e: Expr, extents: Mapping[str, int]) -> int | None:
    """How far the coordinates of an expression of ranks go; None for anything else."""
    return extent_of(e, extents) if isinstance(e, Rank) or (isinstance(e, Call) and free_ranks(e)) else None


def _greatest(index: Expr, names: set[str], size: int, extents: Mapping[str, int]) -> int:
    """The greatest value that the named tensors may hold for the index to stay below ``size``."""
    box = {r: (0, max(0, extents[r] - 1)) for r in free_ranks(index)}
    stand_in = "\0value"  # no rank can be called that
    plain = transform(index, lambda e: Rank(stand_in) if isinstance(e, Access) and e.tensor in names else e)

    def fits(value: int) -> bool:
        span = interval(plain, {**box, stand_in: (0, value)}, extents)
        return span is not None and span[1] < size

    low, high = 0, size
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
