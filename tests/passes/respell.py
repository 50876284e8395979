"""The same cascade in other words: rewriting rules on the IR that keep its meaning, drawn at random.

    respell(c, rng)  ->  a cascade whose passes must derive to the same counts

Each rule is a function from a cascade and a generator to a cascade; where it does not apply it gives back what it got.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from castile.ir.cascade import (
    Access,
    Call,
    Cascade,
    Cast,
    Const,
    Einsum,
    Expr,
    Output,
    Rank,
    Reduce,
    free_ranks,
    ranks_named,
    substitute,
    tensors_read,
    transform,
    walk,
)
from castile.ir.key import rename
from castile.ir.types import tensor_types
from castile.ir.verify import scan_step

Rule = Callable[[Cascade, np.random.Generator], Cascade]
LOG2E = 1.4426950408889634


def respell(c: Cascade, rng: np.random.Generator, steps: int = 4, rules: Sequence[Rule] | None = None) -> Cascade:
    """The cascade after some of the rules; all that keep its parameters, if not told otherwise."""
    rules = rules or RULES
    for _ in range(steps):
        c = rules[int(rng.integers(len(rules)))](c, rng)
    return c


def _everywhere(c: Cascade, f: Callable[[Expr], Expr]) -> Cascade:
    return replace(c, einsums=tuple(replace(e, expr=transform(e.expr, f)) for e in c.einsums))


def _sometimes(
    c: Cascade, rng: np.random.Generator, op: str, make: Callable[..., Expr], *, floats: bool = True
) -> Cascade:
    """Calls of one operation, each changed or not; only where all of the Einsum's types are floats, if asked."""
    types = tensor_types(c)

    def one(e: Expr) -> Expr:
        if not isinstance(e, Call) or e.op != op or rng.random() < 0.4:
            return e
        reads = [n for n in walk(e) if isinstance(n, Access | Rank)]
        real = reads and all(isinstance(n, Access) and types[n.tensor] in FLOATS for n in reads)
        return make(*e.args) if real or not floats else e

    return _everywhere(c, one)


FLOATS = ("f16", "bf16", "f32", "f64", "f8e4m3", "f8e5m2")


def reciprocals(c: Cascade, rng: np.random.Generator) -> Cascade:
    """``a / b`` -> ``a * (1 / b)``"""
    return _sometimes(c, rng, "div", lambda a, b: Call("mul", (a, Call("div", (Const(1.0), b)))))


def powers_of_two(c: Cascade, rng: np.random.Generator) -> Cascade:
    """``exp(x)`` -> ``exp2(x * log2 e)``"""
    return _sometimes(c, rng, "exp", lambda x: Call("exp2", (Call("mul", (x, Const(LOG2E))),)))


def swapped(c: Cascade, rng: np.random.Generator) -> Cascade:
    """``a * b`` -> ``b * a``, ``a + b`` -> ``b + a``"""
    c = _sometimes(c, rng, "mul", lambda a, b: Call("mul", (b, a)))
    return _sometimes(c, rng, "add", lambda a, b: Call("add", (b, a)))


def negations(c: Cascade, rng: np.random.Generator) -> Cascade:
    """``a - b`` -> ``-(b - a)`` or ``a + -b``"""
    if rng.random() < 0.5:
        return _sometimes(c, rng, "sub", lambda a, b: Call("neg", (Call("sub", (b, a)),)))
    return _sometimes(c, rng, "sub", lambda a, b: Call("add", (a, Call("neg", (b,)))))


def squares(c: Cascade, rng: np.random.Generator) -> Cascade:
    """``x ** 2`` -> ``x * x``"""
    return _everywhere(
        c,
        lambda e: (
            Call("mul", (e.args[0],) * 2) if isinstance(e, Call) and e.op == "pow" and e.args[1] == Const(2) else e
        ),
    )


def split_sums(c: Cascade, rng: np.random.Generator) -> Cascade:
    """``sum[k](a + b)`` -> ``sum[k](a) + sum[k](b)``"""

    def one(e: Expr) -> Expr:
        if not isinstance(e, Reduce) or e.op != "sum" or not isinstance(e.arg, Call) or e.arg.op not in ("add", "sub"):
            return e
        if not all(free_ranks(a) & set(e.ranks) for a in e.arg.args):
            return e
        return Call(e.arg.op, tuple(replace(e, args=(a,)) for a in e.arg.args))

    return _everywhere(c, one)


def renamed(c: Cascade, rng: np.random.Generator) -> Cascade:
    """Tensors and ranks under new names."""
    tag = int(rng.integers(1000))
    outer = set(c.outputs) | {p.name for p in c.params}
    tensors = {o.name: f"t{i}x{tag}" for i, e in enumerate(c.einsums) for o in e.outputs if o.name not in outer}
    ranks = {r: f"r{i}y{tag}" for i, r in enumerate(c.ranks)}
    return rename(c, tensors, ranks)


def permuted(c: Cascade, rng: np.random.Generator) -> Cascade:
    """An intermediate's ranks in another order."""
    own = [e for e in c.einsums if e.name not in c.outputs and len(e.outputs) == 1 and len(e.output.ranks) > 1]
    own = [e for e in own if scan_step(e) is None]
    if not own:
        return c
    chosen = own[int(rng.integers(len(own)))]
    order = [int(i) for i in rng.permutation(len(chosen.output.ranks))]

    def one(e: Expr) -> Expr:
        if isinstance(e, Access) and e.tensor == chosen.name:
            return replace(e, indices=tuple(e.indices[i] for i in order))
        return e

    turned = replace(chosen, outputs=(replace(chosen.output, ranks=tuple(chosen.output.ranks[i] for i in order)),))
    einsums = tuple(turned if e is chosen else replace(e, expr=transform(e.expr, one)) for e in c.einsums)
    return replace(c, einsums=einsums)


def inlined(c: Cascade, rng: np.random.Generator) -> Cascade:
    """An intermediate without reductions, put in place of its reads."""
    own = [
        e
        for e in c.einsums
        if e.name not in c.outputs and len(e.outputs) == 1 and not e.reductions and e.output.dtype is None
    ]
    own = [e for e in own if scan_step(e) is None]
    if not own:
        return c
    chosen = own[int(rng.integers(len(own)))]

    def one(e: Expr) -> Expr:
        if isinstance(e, Access) and e.tensor == chosen.name:
            return substitute(chosen.expr, dict(zip(chosen.output.ranks, e.indices, strict=True)))
        return e

    left = tuple(replace(e, expr=transform(e.expr, one)) for e in c.einsums if e is not chosen)
    return replace(c, einsums=left)


def split(c: Cascade, rng: np.random.Generator) -> Cascade:
    """A part of a map becomes an intermediate of its own."""
    types = tensor_types(c)
    spots = [
        (e, part)
        for e in c.einsums
        if len(e.outputs) == 1 and scan_step(e) is None and not e.reductions
        for part in walk(e.expr)
        if isinstance(part, Call)
        and part.op in ("mul", "add", "sub", "exp", "div")
        and part is not e.expr
        and tensors_read(part)
        and all(types[t] in FLOATS for t in tensors_read(part))
        and not any(isinstance(n, Call) and n.op == "where" for n in walk(e.expr))
    ]
    if not spots:
        return c
    e, part = spots[int(rng.integers(len(spots)))]
    name = f"part{rng.integers(10**6)}"
    ranks = tuple(r for r in ranks_named(part) if r in free_ranks(part))
    rest = transform(e.expr, lambda x: Access(name, tuple(Rank(r) for r in ranks)) if x == part else x)
    at = c.einsums.index(e)
    own = (Einsum((Output(name, ranks),), part), replace(e, expr=rest))
    return replace(c, einsums=(*c.einsums[:at], *own, *c.einsums[at + 1 :]))


def log_of_sum(c: Cascade, rng: np.random.Generator) -> Cascade:
    """``exp(x) / l`` -> ``exp(x - log(l))``"""

    def make(a: Expr, b: Expr) -> Expr:
        if isinstance(a, Call) and a.op == "exp":
            return Call("exp", (Call("sub", (a.args[0], Call("log", (b,)))),))
        return Call("div", (a, b))

    return _sometimes(c, rng, "div", make)


def redundant_maximum(c: Cascade, rng: np.random.Generator) -> Cascade:
    """``exp(x)`` -> ``exp(x - m) * exp(m)`` with m another maximum: here that of the intermediate that is maximised."""
    maxima = [e for e in c.einsums if len(e.outputs) == 1 and isinstance(e.expr, Reduce) and e.expr.op == "max"]
    if not maxima:
        return c
    chosen = maxima[int(rng.integers(len(maxima)))]
    name = f"top{rng.integers(10**6)}"
    again = replace(chosen, outputs=(replace(chosen.output, name=name),))
    use = Call(
        "sub",
        (Call("add", (chosen.expr, Access(name, tuple(map(Rank, chosen.output.ranks))))),) * 1
        + (Access(name, tuple(map(Rank, chosen.output.ranks))),),
    )
    at = c.einsums.index(chosen)
    masked = any(isinstance(n, Call) and n.op == "where" for n in walk(chosen.expr)) or any(
        isinstance(n, Call) and n.op == "where" for e in c.einsums for n in walk(e.expr)
    )
    if masked or tensor_types(c)[chosen.name] not in FLOATS:
        return c
    return replace(c, einsums=(*c.einsums[:at], again, replace(chosen, expr=use), *c.einsums[at + 1 :]))


def folded_scale(c: Cascade, rng: np.random.Generator) -> Cascade:
    """``a * sum[k](b)`` -> ``sum[k](a * b)``, where a does not vary with k."""
    types = tensor_types(c)

    def one(e: Expr) -> Expr:
        if not isinstance(e, Call) or e.op != "mul" or rng.random() < 0.3:
            return e
        for a, b in (e.args, e.args[::-1]):
            real = all(types[t] in FLOATS for t in (*tensors_read(a), *tensors_read(b))) and tensors_read(a)
            if isinstance(b, Reduce) and b.op == "sum" and real and not set(ranks_named(a)) & set(b.ranks):
                return replace(b, args=(Call("mul", (a, b.arg)),))
        return e

    return _everywhere(c, one)


def permuted_param(c: Cascade, rng: np.random.Generator) -> Cascade:
    """A parameter's axes in another order; its array has to be transposed likewise."""
    own = [p for p in c.params if len(p.indices) > 1 and all(isinstance(i, Rank) for i in p.indices)]
    if not own:
        return c
    chosen = own[int(rng.integers(len(own)))]
    order = [int(i) for i in rng.permutation(len(chosen.indices))]

    def one(e: Expr) -> Expr:
        if isinstance(e, Access) and e.tensor == chosen.name:
            return replace(e, indices=tuple(e.indices[i] for i in order))
        return e

    turned = replace(chosen, indices=tuple(chosen.indices[i] for i in order))
    return replace(_everywhere(c, one), params=tuple(turned if p is chosen else p for p in c.params))


def cast_operand(c: Cascade, dtype: str) -> Cascade:
    """``sum[k](a * b)`` -> ``sum[k](dtype(a) * b)``: the first operand of each contraction is rounded."""

    def one(e: Expr) -> Expr:
        product = isinstance(e, Reduce) and e.op == "sum" and isinstance(e.arg, Call) and e.arg.op == "mul"
        if not product or not isinstance(e, Reduce) or not isinstance(e.arg, Call):
            return e
        a, b = e.arg.args
        return replace(e, args=(Call("mul", (Cast(dtype, a), b)),)) if tensors_read(a) else e

    return _everywhere(c, one)


# Rules that leave the parameters as they are, so that the same inputs serve.
RULES: tuple[Rule, ...] = (
    reciprocals, powers_of_two, swapped, negations, squares, split_sums, renamed, permuted, inlined, split, log_of_sum,
    redundant_maximum, folded_scale,
)  # fmt: skip
EVERY_RULE: tuple[Rule, ...] = (*RULES, permuted_param)
