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

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

from ..ir.cascade import (
    Access,
    Call,
    Cascade,
    Einsum,
    Expr,
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
from ..ir.types import tensor_types
from .brackets import conjunction, lbr
from .forms import Atom, Form, add, lift, sub, values_inside
from .functions import exp, log
from .influence import NOTHING, access_to, inside, is_extreme, read, uncast
from .lower import Lowering
from .normal import power
from .read import Reader
from .transpose import Names


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


def save_normalisers(c: Cascade, saved: Collection[str], names: Names) -> tuple[Cascade, tuple[Normaliser, ...]]:
    """The cascade with each normaliser written as exp of its saved logarithm, which is a parameter.

    A tensor of the cascade that is the logarithm, by algebra, serves under its own name, if it is an output or is
    named in ``saved``. Other logarithms are called lse, lse2, …, and saved if ``saved`` holds "lse".
    """
    found: list[Normaliser] = []
    written = c
    while (step := _next(c, written, saved, names)) is not None:
        written, normaliser = step
        found.append(normaliser)
    return written, tuple(found)


def _next(c: Cascade, written: Cascade, saved: Collection[str], names: Names) -> tuple[Cascade, Normaliser] | None:
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
    logs = set(inside(log(value), lambda a: a.kind == "fn" and a.name == "log"))
    for v in values_inside(*(v for vs in reader.opaque.values() for v in vs), *reader.forms.values()):
        if v in logs if isinstance(v, Atom) else any(p < 0 and a in under for m in v.terms for a, p in m.factors):
            return True
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


def _without_extremes(c: Cascade) -> Cascade:
    """Statements out of whose values a maximum has cancelled, written without it: ``A = exp(X - lse)``."""
    reader = read(c, "none")
    holding: set[str] = set()
    einsums: list[Einsum] = []
    for e in c.einsums:
        reads = bool(holding & set(tensors_read(e.expr)))
        value = reader.forms.get(e.name)
        if reads and isinstance(value, Form) and not any(inside(value, is_extreme)):
            others = {n for n in reader.forms if n not in holding and n != e.name}
            before = {t.name for t in einsums}
            e = replace(e, expr=_lowering(c, reader, others & before).float(value))
        elif reads or any(n.op in ("max", "min") for n in e.reductions):
            holding |= {o.name for o in e.outputs}
        einsums.append(e)
    return replace(c, einsums=tuple(einsums))
