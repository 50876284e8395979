"""What the outputs owe to a value, by algebra: to a maximum perhaps nothing, to a normaliser's logarithm a power.

O[q, f] = sum[k](exp(S[q, k] - M[q]) * V[k, f]) / sum[k](exp(S[q, k] - M[q]))    nothing to M
O[q, f] = sum[k](exp(S[q, k] - lse[q]) * V[k, f])                                the power -1 of exp(lse[q])
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction

from ..ir.cascade import (
    Access,
    Call,
    Cascade,
    Cast,
    Einsum,
    Expr,
    Output,
    Param,
    Rank,
    Reduce,
    tensors_read,
    transform,
    walk,
)
from ..ir.dtypes import DTYPES
from ..ir.errors import VerifyError
from ..ir.extents import bindings
from ..ir.types import tensor_types
from ..ir.verify import scan_step
from .forms import Atom, Form, Monomial, Value, parts_of, scale, sub, values_inside
from .read import Reader
from .separate import Reductions

NOTHING = Form({})


@dataclass(frozen=True, slots=True)
class Route:
    """How a tensor T depends on a saved logarithm: T = exp(factor * lse) · …, or, added, T = factor * lse + …."""

    tensor: str
    factor: int
    added: bool


def access_to(c: Cascade, tensor: str) -> Access:
    """A tensor of the cascade, or a parameter of bare ranks, read at its own ranks."""
    return Access(tensor, tuple(c.indices_of(tensor)))


# Reading


def uncast(e: Expr) -> Expr:
    """An expression without conversions between floats: gradients pass them unchanged."""

    def one(n: Expr) -> Expr:
        return n.arg if isinstance(n, Cast) and DTYPES[n.dtype].is_float and n.dtype != "f64" else n

    return transform(e, one)


def read(c: Cascade, level: str) -> Reader:
    """The cascade's normal forms, without roundings; a tensor into which no exponential and no extreme goes is opaque.

    So what the cascade computes before them keeps its name.
    """
    types = tensor_types(replace(c, outputs=tuple(o for o in c.outputs if o in c.einsum_of)))
    inside: set[str] = set()
    params, einsums = list(c.params), []
    for e in c.einsums:
        apart = any(
            (isinstance(n, Call) and n.op in ("exp", "exp2")) or (isinstance(n, Reduce) and n.op in ("max", "min"))
            for n in walk(e.expr)
        )
        if apart or inside & set(tensors_read(e.expr)) or len(e.outputs) > 1:
            inside |= {o.name for o in e.outputs}
            outputs = tuple(replace(o, dtype=None) if _narrow(o) else o for o in e.outputs)
            einsums.append(replace(e, outputs=outputs, expr=uncast(e.expr)))
        else:
            params.append(Param(e.name, types[e.name], tuple(Rank(r) for r in e.output.ranks)))
    view = _bound(replace(c, params=tuple(params), einsums=tuple(einsums)))
    reader = Reader(view, Reductions(level, c.numerics, {r: i for i, r in enumerate(c.ranks)}))
    reader.read()
    return reader


def _bound(c: Cascade) -> Cascade:
    """The cascade with one more parameter, for ranks whose extents statements that are gone gave them."""
    missing: list[str] = []
    while True:
        ranks = Param("<ranks>", "i64", tuple(Rank(r) for r in missing))
        result = replace(c, params=(*c.params, ranks)) if missing else c
        try:
            bindings(result)
        except VerifyError as error:
            if error.rank is None or error.rank in missing:
                raise
            missing.append(error.rank)
        else:
            return result


def _narrow(o: Output) -> bool:
    return o.dtype is not None and DTYPES[o.dtype].is_float and o.dtype != "f64"


def inside(v: Value, wanted: Callable[[Atom], bool]) -> Iterator[Atom]:
    """The atoms of a kind inside a value, outermost first; what is inside of them is not looked at."""

    def is_wanted(x: Value) -> bool:
        return isinstance(x, Atom) and wanted(x)

    found = values_inside(v, into=lambda x: not is_wanted(x))
    return (x for x in found if isinstance(x, Atom) and is_wanted(x))


# Extremes that only keep exponentials small


def is_extreme(a: Atom) -> bool:
    return a.kind == "red" and a.name in ("max", "min")


class Extremes:
    """Which maxima and minima the outputs depend on, by algebra: the others keep exponentials small, no more.

    What only decides a condition or an index does not count, as no gradient passes through it.
    """

    def __init__(self, c: Cascade) -> None:
        self.reader = read(c, "full")
        self.used: set[int] = set()
        self.known: dict[Reduce, bool] = {}
        self.shapes: dict[bytes, int] = {}
        roots: list[Value] = [self.reader.forms[o] for o in c.outputs if o in self.reader.forms]
        roots += [v for values in self.reader.opaque.values() for v in values]
        for v in values_inside(*roots, parts=_differentiable):
            if isinstance(v, Atom) and is_extreme(v):
                self.used.add(self._shape(v))

    def dead(self, node: Reduce) -> bool:
        """Whether no output depends on this extreme."""
        if node not in self.known:
            # What stands in the step of a scan was read as it is written.
            found = [a for level in ("full", "none") for a in inside(self._value(node, level), is_extreme)]
            self.known[node] = bool(found) and not any(self._shape(a) in self.used for a in found)
        return self.known[node]

    def _value(self, node: Reduce, level: str) -> Value:
        reductions = self.reader.reductions
        before, reductions.level = reductions.level, level
        value = self.reader.value(uncast(node))
        reductions.level = before
        return value

    def _shape(self, v: Value) -> int:
        """A hash of the value that does not tell ranks apart: another instance of one is the same."""
        if v.digest not in self.shapes:
            if isinstance(v, Atom):
                name = "" if v.kind == "rank" else v.name
                self.shapes[v.digest] = hash((v.kind, name, *map(self._shape, v.args)))
            else:
                self.shapes[v.digest] = hash(frozenset((self._term(m), q) for m, q in v.terms.items()))
        return self.shapes[v.digest]

    def _term(self, m: Monomial) -> int:
        factors = frozenset((self._shape(a), p) for a, p in m.factors)
        exponent = None if m.exponent is None else self._shape(m.exponent)
        return hash((factors, exponent, frozenset(map(self._shape, m.brackets))))


def _differentiable(v: Value) -> Iterable[Value]:
    """What a gradient passes to: no condition, no index."""
    if isinstance(v, Form):
        return [x for x in parts_of(v) if not (isinstance(x, Atom) and x.kind == "pred")]
    return () if v.kind in ("pred", "lbr", "int", "access") or v.name == "argmax" else v.args


# What the outputs owe to a saved logarithm


def routes(c: Cascade, name: str, kept: Collection[str], scores: Iterable[Expr]) -> tuple[Route, ...] | None:
    """The tensors of ``kept`` through which alone a saved logarithm acts, if each is a power of its exponential or is
    it, times a number, plus more; else None.

    For ``O = exp(-lse) Σ exp(S) V`` the derivative with respect to lse is ``-O``: that of a softmax needs no sum over
    its keys, as the sum was made when O was.
    """
    reader: Reader | None = None
    found: list[Route] = []
    touched = {name}
    beyond: set[str] = set()
    for e in c.einsums:
        reads = set(tensors_read(e.expr))
        if beyond & reads:
            beyond |= {o.name for o in e.outputs}
        if not touched & reads:
            continue
        if len(e.outputs) > 1 or scan_step(e) is not None:
            return None
        if e.name not in kept:
            touched.add(e.name)
            continue
        reader = reader or read(c, "none")
        route = None if e.name in beyond else _route(reader, c, e, name)
        if route is None:
            return None
        found.append(route)
        beyond.add(e.name)
    scored = {t for score in scores for t in tensors_read(score)}
    if touched & (scored | set(c.outputs) - {name}):
        return None
    return tuple(found)


def _route(reader: Reader, c: Cascade, e: Einsum, name: str) -> Route | None:
    value = reader.forms.get(e.name)
    lse = reader.form(access_to(c, name))
    if not isinstance(value, Form) or not lse.free <= set(e.output.ranks):
        return None
    factor = value.terms.get(next(iter(lse.terms)))
    if factor is not None and factor.denominator == 1 and not _holds(sub(value, scale(lse, factor)), name):
        return Route(e.name, int(factor), added=True)
    power = _power(value, lse, name)
    return None if not power else Route(e.name, power, added=False)


def _holds(v: Value, tensor: str) -> bool:
    return any(inside(v, lambda a: a.kind == "access" and a.name == tensor))


def _power(v: Value, lse: Form, name: str) -> int | None:
    """The a of ``v = exp(a lse) · …`` with nothing more of lse in it; None where it is no such product."""
    if not _holds(v, name):
        return 0
    if isinstance(v, Form):
        powers = {_monomial_power(m, lse, name) for m in v.terms}
        return powers.pop() if len(powers) == 1 else None
    if v.kind == "poly" or (v.kind == "red" and v.name == "sum" and not lse.free & set(v.ranks)):
        return _power(v.args[0], lse, name)
    return None


def _monomial_power(m: Monomial, lse: Form, name: str) -> int | None:
    exponent = m.exponent or NOTHING
    factor = exponent.terms.get(next(iter(lse.terms)), Fraction(0))
    rest: list[Value] = [sub(exponent, scale(lse, factor)), *m.brackets]
    powers = [(_power(a, lse, name), p) for a, p in m.factors]
    if factor.denominator != 1 or any(_holds(r, name) for r in rest) or any(a is None for a, _ in powers):
        return None
    return int(factor) + sum(a * p for a, p in powers if a is not None)
