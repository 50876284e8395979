"""Saved normalisers: sums of exponentials in terms of their logarithms, and what the outputs owe to them.

FlashAttention saves ``lse = log Σ exp(S)`` on the way forward and recomputes the probabilities from it::

    M[q]    = max[k](X[q, k])                             X[q, k] as it was
    P[q, k] = exp(X[q, k] - M[q])
    L[q]    = sum[k](P[q, k])                       ->    lse[q] is a parameter
    A[q, k] = P[q, k] / L[q]                              A[q, k] = exp(X[q, k] - lse[q])
    O[q, f] = sum[k](A[q, k] * V[k, f])                   O[q, f] = sum[k](A[q, k] * V[k, f])

All of it is read off normal forms: no shape of text and no name is looked for.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
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
    children,
    free_ranks,
    rebuild,
    tensors_read,
    transform,
    walk,
)
from ..ir.dtypes import DTYPES
from ..ir.types import tensor_types
from ..ir.verify import scan_step
from .lower import Lowering
from .normal import Atom, Form, Monomial, Value, add, conjunction, exp, lbr, lift, log, power, scale, sub
from .read import Reader
from .separate import Reductions, parts_of
from .transpose import Names

NOTHING = Form({})


@dataclass(frozen=True, slots=True)
class Normaliser:
    """``name[ranks] = log(Σ exp(score))``, each score summed over its ranks; ``meaning`` says it in forward tensors."""

    name: str
    ranks: tuple[str, ...]
    parts: tuple[tuple[tuple[str, ...], Expr], ...]
    meaning: Expr

    @property
    def access(self) -> Access:
        return Access(self.name, tuple(Rank(r) for r in self.ranks))


@dataclass(frozen=True, slots=True)
class Route:
    """How a tensor T depends on a saved logarithm: T = exp(factor * lse) · …, or, added, T = factor * lse + …."""

    tensor: str
    factor: int
    added: bool


def save_normalisers(c: Cascade, saved: Collection[str], names: Names) -> tuple[Cascade, tuple[Normaliser, ...]]:
    """The cascade with each normaliser written as exp of its saved logarithm, which is a parameter.

    A tensor of the cascade that is the logarithm, by algebra, serves under its own name, if it is an output or is
    named in ``saved``. Other logarithms are called lse, lse2, …, and saved if ``saved`` holds "lse".
    """
    found: list[Normaliser] = []
    written = c
    while (step := _next(c, written, saved, names, {n.name for n in found})) is not None:
        written, normaliser = step
        found.append(normaliser)
    return written, tuple(found)


def _next(
    c: Cascade, written: Cascade, saved: Collection[str], names: Names, known: Collection[str]
) -> tuple[Cascade, Normaliser] | None:
    reader = read(written, "none")
    for e in written.einsums:
        if e.name not in reader.forms:
            continue
        for node in walk(e.expr):
            total = isinstance(node, Call | Reduce) and node.op in ("add", "sum")
            if not total or (partition := _partition(reader, node)) is None:
                continue
            if not _normalises(reader, node):
                continue
            taken = set(names.taken)
            replaced, normaliser = _saved(c, written, reader, e, node, partition, saved, names)
            if normaliser.name not in c.einsum_of and "lse" not in saved:
                names.taken.intersection_update(taken)
                continue
            return replaced, normaliser
    return None


def _saved(
    c: Cascade,
    written: Cascade,
    reader: Reader,
    e: Einsum,
    node: Expr,
    found: _Partition,
    saved: Collection[str],
    names: Names,
) -> tuple[Cascade, Normaliser]:
    ranks = tuple(r for r in c.ranks if r in free_ranks(node))
    lse = names.fresh("lse")
    # Σ exp(score + offset) = exp(lse + offset)
    access = Access(lse, tuple(Rank(r) for r in ranks))
    low = _lowering(written, reader)
    minus = low.float(sub(NOTHING, found.offset)) if found.offset.terms else None
    instead = Call("exp", (Call("sub", (access, minus)) if minus is not None else access,))
    whole = next((t for t in c.einsums if t.expr == node and t.output.dtype is None), None)
    value: Expr = Access(whole.name, tuple(Rank(r) for r in whole.output.ranks)) if whole is not None else node
    meaning: Expr = Call("log", (value,))
    meaning = Call("add", (minus, meaning)) if minus is not None else meaning
    einsums = tuple(
        replace(t, expr=replaced(t.expr, node, instead)) if t.name == e.name else t for t in written.einsums
    )
    param = Param(lse, "f32", tuple(Rank(r) for r in ranks))
    after = replace(written, params=(*written.params, param), einsums=einsums)
    parts = tuple((over, _score(written, reader, low, score)) for over, score in found.parts)
    own = _own_name(c, after, access, saved)
    if own is not None:
        # The cascade computes it itself: that tensor is the parameter.
        names.taken.discard(lse)
        access = Access(own, tuple(Rank(r) for r in c.einsum_of[own].output.ranks))
        ranks = c.einsum_of[own].output.ranks

        def renamed(n: Expr) -> Expr:
            return access if isinstance(n, Access) and n.tensor == lse else n

        einsums = tuple(replace(t, expr=transform(t.expr, renamed)) for t in einsums if t.name != own)
        param = Param(own, tensor_types(c)[own], tuple(Rank(r) for r in ranks))
        after = replace(written, params=(*written.params, param), einsums=einsums)
        lse = own
    return _without_extremes(after), Normaliser(lse, ranks, parts, meaning)


def replaced(e: Expr, node: Expr, new: Expr) -> Expr:
    if e == node:
        return new
    kids = children(e)
    return rebuild(e, tuple(replaced(k, node, new) for k in kids)) if kids else e


def _own_name(c: Cascade, after: Cascade, access: Access, saved: Collection[str]) -> str | None:
    """A tensor of the cascade that is nothing but the saved logarithm."""
    reader = read(after, "none")
    for e in after.einsums:
        value = reader.forms.get(e.name)
        if isinstance(value, Form) and (e.name in saved or e.name in c.outputs):
            if value == reader.form(access) and set(e.output.ranks) == {
                i.name for i in access.indices if isinstance(i, Rank)
            }:
                return e.name
    return None


# Normalisers by their normal forms


@dataclass(frozen=True, slots=True)
class _Partition:
    """``exp(offset) · Σ exp(score)``: each score with the ranks that it is summed over."""

    parts: tuple[tuple[tuple[str, ...], Form], ...]
    offset: Form


def _partition(reader: Reader, node: Expr) -> _Partition | None:
    """The normaliser that a value is: a sum of exponentials alone, at least one of them summed over a rank."""
    value = reader.value(uncast(node))
    if not isinstance(value, Form):
        return None
    parts: list[tuple[tuple[str, ...], Form]] = []
    for m, q in value.terms.items():
        if q != 1 or m.brackets or len(m.factors) > 1:
            return None
        exponent = m.exponent or NOTHING
        if not m.factors:
            parts.append(((), exponent))
            continue
        atom, power = m.factors[0]
        body = atom.args[0] if atom.kind == "red" and atom.name == "sum" and power == 1 else None
        if not isinstance(body, Form) or body.single is None:
            return None
        inner, q = body.single
        if q != 1 or inner.factors or inner.exponent is None or not inner.exponent.free & set(atom.ranks):
            return None
        parts.append((atom.ranks, add(exponent, _masked(inner.exponent, inner.brackets))))
    every = {r for over, _ in parts for r in over}
    if not every:
        return None
    offset = next(_reduced(score, set(over)) for over, score in parts if over)
    parts = [(over, sub(score, offset)) for over, score in parts]
    if any(_reduced(score, every).terms for _, score in parts):
        return None
    return _Partition(tuple(parts), offset)


def _normalises(reader: Reader, node: Expr) -> bool:
    """Whether something is divided by the value, or its logarithm taken."""
    value = reader.form(uncast(node))
    under = {a for m in power(value, -1).terms for a, p in m.factors if p < 0}
    logs = set(_inside(log(value), lambda a: a.kind == "fn" and a.name == "log"))
    seen: set[bytes] = set()
    stack: list[Value] = [v for vs in reader.opaque.values() for v in vs] + list(reader.forms.values())
    while stack:
        v = stack.pop()
        if v.digest in seen:
            continue
        seen.add(v.digest)
        if isinstance(v, Atom):
            if v in logs:
                return True
            stack.extend(v.args)
        else:
            if any(p < 0 and a in under for m in v.terms for a, p in m.factors):
                return True
            stack.extend(p for m in v.terms for p in parts_of(m))
    return False


def _masked(exponent: Form, brackets: Iterable[Atom]) -> Form:
    """The logarithm of ``[p] exp(e)``."""
    every = tuple(brackets)
    return add(exponent, lift(lbr(conjunction(every)))) if every else exponent


def _reduced(score: Form, over: set[str]) -> Form:
    """The terms of an exponent that were reduced over the ranks and vary no more along them: a maximum taken off."""
    return Form({t: q for t, q in score.terms.items() if not t.free & over and t.reduced & over})


def _score(c: Cascade, reader: Reader, low: Lowering, score: Form) -> Expr:
    """A score as the tensor that holds it, where there is one."""
    wanted = exp(score)
    for name, value in reader.forms.items():
        if isinstance(value, Form) and exp(value) == wanted:
            return access_to(c, name)
    return low.float(score)


def access_to(c: Cascade, tensor: str) -> Access:
    """A tensor of the cascade, or a parameter of bare ranks, read at its own ranks."""
    return Access(tensor, tuple(c.indices_of(tensor)))


def _lowering(c: Cascade, reader: Reader, names: Collection[str] | None = None) -> Lowering:
    """Values as text, in the cascade's own names where statements compute parts of them."""
    named = {
        v.digest: n
        for n, v in reader.forms.items()
        if isinstance(v, Form) and v.constant is None and (names is None or n in names)
    }

    def find(f: Form) -> Expr | None:
        name = named.get(f.digest)
        return None if name is None else access_to(c, name)

    return Lowering(lambda a: find(lift(a)) if a.kind == "red" else None, named=find)


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
    view = replace(c, params=tuple(params), einsums=tuple(einsums))
    reader = Reader(view, Reductions(level, c.numerics, {r: i for i, r in enumerate(c.ranks)}))
    reader.read()
    return reader


def _narrow(o: Output) -> bool:
    return o.dtype is not None and DTYPES[o.dtype].is_float and o.dtype != "f64"


def _inside(v: Value, wanted: Callable[[Atom], bool]) -> Iterator[Atom]:
    """The atoms of a kind inside a value, outermost first; what is inside of them is not looked at."""
    seen: set[bytes] = set()
    stack: list[Value] = [v]
    while stack:
        x = stack.pop()
        if x.digest in seen:
            continue
        seen.add(x.digest)
        if isinstance(x, Form):
            stack.extend(p for m in x.terms for p in parts_of(m))
        elif wanted(x):
            yield x
        else:
            stack.extend(x.args)


# Extremes that only keep exponentials small


def _is_extreme(a: Atom) -> bool:
    return a.kind == "red" and a.name in ("max", "min")


def _without_extremes(c: Cascade) -> Cascade:
    """Statements out of whose values a maximum has cancelled, written without it: ``A = exp(X - lse)``."""
    reader = read(c, "none")
    holding: set[str] = set()
    einsums: list[Einsum] = []
    for e in c.einsums:
        reads = bool(holding & set(tensors_read(e.expr)))
        value = reader.forms.get(e.name)
        if reads and isinstance(value, Form) and not any(_inside(value, _is_extreme)):
            others = {n for n in reader.forms if n not in holding and n != e.name}
            before = {t.name for t in einsums}
            e = replace(e, expr=_lowering(c, reader, others & before).float(value))
        elif reads or any(n.op in ("max", "min") for n in e.reductions):
            holding |= {o.name for o in e.outputs}
        einsums.append(e)
    return replace(c, einsums=tuple(einsums))


class Extremes:
    """Which maxima and minima the outputs depend on, by algebra: the others keep exponentials small, no more.

    What only decides a condition or an index does not count, as no gradient passes through it.
    """

    def __init__(self, c: Cascade) -> None:
        self.reader = read(c, "full")
        self.used: set[int] = set()
        self.known: dict[Reduce, bool] = {}
        self.shapes: dict[bytes, int] = {}
        seen: set[bytes] = set()
        stack: list[Value] = [self.reader.forms[o] for o in c.outputs if o in self.reader.forms]
        stack += [v for values in self.reader.opaque.values() for v in values]
        while stack:
            v = stack.pop()
            if v.digest in seen:
                continue
            seen.add(v.digest)
            if isinstance(v, Atom) and _is_extreme(v):
                self.used.add(self._shape(v))
            if isinstance(v, Form):
                for m in v.terms:
                    stack.extend(a for a, _ in m.factors)
                    stack.extend([m.exponent] if m.exponent is not None else [])
            elif v.kind not in ("pred", "lbr", "int", "access") and v.name != "argmax":
                stack.extend(v.args)

    def dead(self, node: Reduce) -> bool:
        """Whether no output depends on this extreme."""
        if node not in self.known:
            # What stands in the step of a scan was read as it is written.
            found = [a for level in ("full", "none") for a in _inside(self._value(node, level), _is_extreme)]
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


# What the outputs owe to a saved logarithm


def routes(c: Cascade, name: str, kept: Collection[str], others: Sequence[Normaliser]) -> tuple[Route, ...] | None:
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
    scores = {t for n in others for _, score in n.parts for t in tensors_read(score)}
    if touched & (scores | set(c.outputs) - {name}):
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
    return any(_inside(v, lambda a: a.kind == "access" and a.name == tensor))


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
