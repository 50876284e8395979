"""Gradients as cascades: reverse-mode differentiation, Einsum by Einsum.

``T[r] = Σ_k f(X[i(r, k)], …)`` sends ``dX[x] += Σ_{r, k: i(r, k) = x} dT[r] ∂f/∂X``, with the derivatives of the op
table; `transpose` turns the accesses around. The adjoint of a scan is a scan in the other direction::

    S[q, k] = scale * sum[d](Q[q, d] * K[k, d])   ->  dQ[q, d] = sum[k](dS[q, k] * scale * K[k, d])
                                                      dK[k, d] = sum[q](dS[q, k] * scale * Q[q, d])
    H[t] = X[t] + where(t > 0, H[t - 1], 0.0)     ->  dH2[t] = dH[t] + where(t + 1 < extent(t), dH2[t + 1], 0.0)

Before differentiating, the algebra is asked what the outputs depend on: a maximum that only keeps exponentials small
gets no gradient. With a saved log-sum-exp the probabilities are ``exp(S - lse)``, and what flows back through the
normaliser is the row sum of dO∘O (`normaliser`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..ir.cascade import (
    Access,
    Call,
    Cascade,
    Const,
    Einsum,
    Expr,
    Output,
    Param,
    Rank,
    Reduce,
    ranks_named,
    tensors_read,
)
from ..ir.dtypes import DTYPES
from ..ir.errors import UsageError, VerifyError
from ..ir.print import print_einsum
from ..ir.types import TypeChecker, settle, tensor_types
from ..ir.verify import scan_step, verify
from .adjoint import ONE, ZERO, added, is_negated, negated, times
from .count import needed
from .extent import changed_extent, sizes
from .influence import Extremes, Route, access_to, routes
from .normaliser import Normaliser, replaced, save_normalisers
from .reverse import Place, Reverse
from .transpose import Names, Share

Step = Einsum | Normaliser


def grad(c: Cascade, wrt: str | Sequence[str] | None = None, saved: str | Sequence[str] = ()) -> Cascade:
    """The cascade of gradients of a cascade.

    It takes ``dO``, of O's shape, for every float output O, and returns ``dX``, of X's shape, for every X of ``wrt`` in
    that order: the gradient of ``Σ dO · O``. By default ``wrt`` is every float parameter that the outputs depend on.
    Gradients are f32 (f64 where the parameter is); casts pass them on unchanged, ties of a maximum share them.

    ``saved`` names tensors of the forward cascade that become parameters instead of being computed again; "lse" stands
    for the logarithm of every normaliser ``Σ exp(S)``. They are called lse, lse2, … in the order of the text, or as the
    output that each one is; the doc says what they are. An output that helps (O, for ``Σ dO · O``) becomes a parameter
    too. `forward` is the cascade that computes all of them. What is saved is data: of a tensor of masked scores, -inf
    where a whole row is masked comes back as NaN, so save the logarithm instead.

    Raises `UsageError` for a name that does not fit, `VerifyError` where no gradient is defined.
    """
    return _backward(c, wrt, saved)[1]


def forward(c: Cascade, wrt: str | Sequence[str] | None = None, saved: str | Sequence[str] = ()) -> Cascade:
    """The cascade that also returns what `grad` with the same arguments takes beside inputs, outputs and adjoints.

    For attention and ``saved="lse"`` it is ``-> (O, lse)`` with ``lse[b, h, q] = M[b, h, q] + log(L[b, h, q])``.
    """
    back, gradient = _backward(c, wrt, saved)
    taken = {p.name for p in gradient.params}
    logs = [n for n in back.normalisers if n.name in taken and n.name not in c.einsum_of]
    einsums = [Einsum((Output(n.name, n.ranks),), n.meaning) for n in logs]
    more = [name for e in (*c.einsums, *einsums) for o in e.outputs if (name := o.name) in taken]
    outputs = (*c.outputs, *(name for name in more if name not in c.outputs))
    result = replace(c, einsums=(*c.einsums, *einsums), outputs=outputs)
    verify(result)
    return result


class _Unbound(VerifyError):
    """A rank of the gradient would have another extent than in the forward cascade, or none."""


def _backward(c: Cascade, wrt: str | Sequence[str] | None, saved: str | Sequence[str]) -> tuple[_Backward, Cascade]:
    names, keep = _checked(c, wrt, saved)
    back = _Backward(c, names, keep)
    try:
        return back, back.run()
    except _Unbound:
        # Another instance of a rank, which nothing bounds: what it indexes is given a tensor, which has the rank.
        back = _Backward(c, names, keep)
        back.reverse.stepwise = True
        return back, back.run()


def _checked(
    c: Cascade, wrt: str | Sequence[str] | None, saved: str | Sequence[str]
) -> tuple[tuple[str, ...] | None, tuple[str, ...]]:
    floats = [p.name for p in c.params if DTYPES[p.dtype].is_float]
    names = None if wrt is None else (wrt,) if isinstance(wrt, str) else tuple(wrt)
    keep = (saved,) if isinstance(saved, str) else tuple(saved)
    for name in names or ():
        if name not in floats:
            hint = f"its float parameters are {', '.join(floats) or 'none'}"
            raise UsageError(f"`{c.name}` has no float parameter `{name}`", hint=hint)
    if names is not None and (not names or len(set(names)) != len(names)):
        raise UsageError("wrt does not name distinct parameters", hint=f"choose from {', '.join(floats)}")
    for name in keep:
        if name != "lse" and name not in c.einsum_of:
            tensors = ", ".join(o.name for e in c.einsums for o in e.outputs)
            raise UsageError(f"`{c.name}` computes no tensor `{name}`", hint=f'save "lse" or one of {tensors}')
    return names, keep


class _Backward:
    """One differentiation: the forward cascade, and for each tensor the shares of its adjoint found so far."""

    def __init__(self, c: Cascade, wrt: tuple[str, ...] | None, saved: tuple[str, ...]) -> None:
        self.c = c
        self.saved = frozenset(saved) & c.einsum_of.keys()
        self.types = tensor_types(c)
        self.names = Names(set(self.types) | set(c.ranks) | {m.name for m in c.monoids})
        self.names.sizes, self.bound = sizes(c)
        live = needed(c)
        start = replace(c, einsums=tuple(e for e in c.einsums if any(o.name in live for o in e.outputs)))
        self.plain, self.normalisers = save_normalisers(start, saved, self.names) if saved else (start, ())
        self.types.update({n.name: "f32" for n in self.normalisers if n.name not in self.types})
        self.reverse = Reverse(self.names, self.types, dict(c.monoid_of), Extremes(self.plain))
        self.steps = self._steps()
        self.reached = self._find_live(wrt)
        self.wrt = wrt if wrt is not None else tuple(p.name for p in c.params if p.name in self.reached)

    def run(self) -> Cascade:
        for name in self.wrt:
            if name not in self.reached:
                raise VerifyError(
                    f"no output of `{self.c.name}` depends differentiably on `{name}`", hint="leave it out of wrt"
                )
        if not self.wrt:
            raise VerifyError(
                f"no output of `{self.c.name}` depends differentiably on a parameter",
                hint="integers, comparisons, argmax, round and floor have no derivative",
            )
        given = [self._adjoint_param(o) for o in self.c.outputs if DTYPES[self.types[o]].is_float]
        declared = [self._declared(p) if p.name in self.wrt else p for p in self.c.params]
        live = self.reverse.live
        self.routes = {n.name: self._routes(n) for n in self.normalisers if n.name in live}
        self.reverse.closed = {name for name, found in self.routes.items() if found}
        for step in reversed(self.steps):
            if live & set(_written(step)):
                self._logarithm(step) if isinstance(step, Normaliser) else self.reverse.einsum(step)
        results = tuple(self._result(next(p for p in declared if p.name == name)) for name in self.wrt)
        return self._assembled(declared, given, results)

    # What a gradient passes through

    def _steps(self) -> list[Step]:
        """The Einsums in order, each logarithm right after what its scores read."""
        steps: list[Step] = list(self.plain.einsums)
        for n in self.normalisers:
            read = {t for _, score in n.parts for t in tensors_read(score)}
            steps.insert(max((i + 1 for i, s in enumerate(steps) if s.name in read), default=0), n)
        return steps

    def _find_live(self, wrt: tuple[str, ...] | None) -> set[str]:
        """Tell `Reverse` the tensors on the way from a wanted parameter to an output; returns them."""
        live = self.reverse.live
        live |= {p.name for p in self.c.params if (DTYPES[p.dtype].is_float if wrt is None else p.name in wrt)}
        for step in self.steps:
            if any(map(self.reverse.flows, _sources(step))):
                live |= {t for t in _written(step) if DTYPES[self.types[t]].is_float}
        reached = {o for o in self.c.outputs if o in live}
        for step in reversed(self.steps):
            if reached & set(_written(step)):
                reached = reached.union(*map(self.reverse.passed, _sources(step)))
        live &= reached
        return reached

    def _adjoint_param(self, output: str) -> Param:
        ranks = next(o.ranks for o in self.c.einsum_of[output].outputs if o.name == output)
        name = self.names.fresh(f"d{output}")
        self.types[name] = self.types[output]
        indices = tuple(Rank(r) for r in ranks)
        if output in self.reverse.live:
            self.reverse.share(output, Share(indices, ranks, (), Access(name, indices)))
        return Param(name, self.types[output], indices)

    # Saved logarithms

    def _routes(self, n: Normaliser) -> tuple[Route, ...]:
        """How the outputs depend on it, where that is known without going the way that the text goes."""
        kept = {*self.c.outputs, *self.saved} - {n.name}
        others = [score for m in self.normalisers if m is not n for _, score in m.parts]
        return routes(self.plain, n.name, kept, others) or ()

    def _logarithm(self, n: Normaliser) -> None:
        """Send the adjoint of a saved logarithm to its scores: dscore = dlse exp(score - lse)."""
        for route in self.routes[n.name]:
            self._follow(route, n)
        total = self.reverse.total(n.name, n.ranks)
        if total is None:
            return
        minus = is_negated(total)
        name = self.names.fresh("D" if minus else f"d{n.name}")
        dlse = self.reverse.written(name, n.ranks, negated(total) if minus else total, "f32")
        at = Einsum((Output(n.name, n.ranks),), ONE)
        for over, score in n.parts:
            value = Call("exp", (Call("sub", (score, n.access)),))
            same = next((e.name for e in self.plain.einsums if e.expr == value), None)
            share = times(access_to(self.plain, same) if same is not None else value, dlse)
            self.reverse.walk(score, negated(share) if minus else share, Place(at, n.ranks + over))

    def _follow(self, route: Route, n: Normaliser) -> None:
        """The share of the logarithm's adjoint that comes through a tensor T: a dT T, summed over what lse lacks."""
        adjoint = self.reverse.adjoint.get(route.tensor)
        if adjoint is None:
            return
        value: Expr = adjoint if route.added else times(adjoint, access_to(self.plain, route.tensor))
        if abs(route.factor) != 1:
            value = times(Const(float(abs(route.factor))), value)
        ranks = self.c.einsum_of[route.tensor].output.ranks
        self.reverse.share(n.name, Share(n.access.indices, ranks, (), negated(value) if route.factor < 0 else value))

    # The cascade of gradients

    def _declared(self, p: Param) -> Param:
        """A parameter with a rank for every axis, so that its gradient has names for them."""
        indices: list[Expr] = []
        for axis, index in enumerate(p.indices):
            if isinstance(index, Rank):
                indices.append(index)
                continue
            name = next((r for r, at in self.bound.items() if at == (p.name, axis)), None)
            if name is None:
                name = self.names.fresh(f"{p.name}_axis")
                self.names.sizes[name] = index
            indices.append(Rank(name))
        return replace(p, indices=tuple(indices))

    def _result(self, p: Param) -> str:
        ranks = tuple(i.name for i in p.indices if isinstance(i, Rank))
        total = self.reverse.total(p.name, ranks) or ZERO
        name = self.names.fresh(f"d{p.name}")
        dtype = "f64" if p.dtype == "f64" else "f32"
        inferred = settle(TypeChecker(self.types, self.c.monoid_of).infer(total))
        output = Output(name, ranks, None if inferred == dtype else dtype)
        self.reverse.backward.append(Einsum((output,), total))
        return name

    def _assembled(self, declared: list[Param], given: list[Param], results: tuple[str, ...]) -> Cascade:
        """Forward statements that are still needed, adjoints, results, and the parameters that all of them read.

        A rank that had its extent from the forward text alone gets it from a tensor of the forward cascade, which
        becomes a parameter.
        """
        kept = set(self.saved)
        for found in self.routes.values():
            kept |= {r.tensor for r in found if not r.added and r.tensor in self.reverse.adjoint}
        while True:
            # A monoid gives all of its values or none.
            kept |= {o.name for e in self.c.einsums for o in e.outputs if kept & {t.name for t in e.outputs}}
            result = self._cascade(kept, declared, given, results)
            rank = changed_extent(self.c, result, self.names)
            if rank is None:
                verify(result)
                return result
            tensors = (o for e in self.c.einsums for o in e.outputs if rank in o.ranks)
            holder = next((o.name for o in tensors if o.name not in kept), None)
            if holder is None:
                raise _Unbound(
                    f"the gradient of `{self.c.name}` needs rank `{rank}` where nothing gives it its extent",
                    rank=rank,
                    hint=f"let a parameter have the axis `{self.names.copies.get(rank, rank)}`",
                )
            kept.add(holder)

    def _cascade(self, kept: set[str], declared: list[Param], given: list[Param], results: tuple[str, ...]) -> Cascade:
        einsums: list[Einsum] = []
        for e in self.plain.einsums:
            name = e.name
            early: list[Einsum] = []
            late: list[Einsum] = []
            for t in self.reverse.extra.get(name, []):
                whole = scan_step(e) is None and any(n == t.expr for n in e.reductions)
                (early if whole and name not in kept else late).append(t)
            for t in early:
                e = replace(e, expr=replaced(e.expr, t.expr, Access(t.name, tuple(Rank(r) for r in t.output.ranks))))
            einsums += [*early, *([] if name in kept else [e]), *late]
        for n in self.normalisers:
            einsums += self.reverse.extra.get(n.name, [])
        einsums += self.reverse.backward
        live = set(results)
        for e in reversed(einsums):
            if live & {o.name for o in e.outputs}:
                live |= {*tensors_read(e.expr), *(o.name for o in e.outputs)}
        einsums = [e for e in einsums if e.name in live]
        saved = [self._as_param(name) for name in self.c.einsum_of if name in kept]
        logs = [Param(n.name, self.types[n.name], n.access.indices) for n in self.normalisers]
        params = [*declared, *saved, *logs, *given]
        ranks = {r for e in einsums for r in (*e.ranks, *ranks_named(e.expr))}
        bound = {i.name for p in params if p.name in live for i in p.indices if isinstance(i, Rank)}
        for p in params:
            new = {i.name for i in p.indices if isinstance(i, Rank)} - bound
            if p.name not in live and (new & ranks or (p in saved and p.name not in self.saved)):
                live.add(p.name)
                bound |= new
        return Cascade(
            f"{self.c.name}_grad",
            tuple(p for p in params if p.name in live),
            tuple(einsums),
            results,
            tuple(m for m in self.c.monoids if any(n.op == m.name for e in einsums for n in e.reductions)),
            numerics=self.c.numerics,
            doc=self._doc(live),
        )

    def _as_param(self, name: str) -> Param:
        output = next(o for o in self.c.einsum_of[name].outputs if o.name == name)
        return Param(name, self.types[name], tuple(Rank(r) for r in output.ranks))

    def _doc(self, live: set[str]) -> str:
        """What it is, and what each saved logarithm is."""
        doc = f"Gradients of {self.c.name} with respect to {', '.join(self.wrt)}."
        for n in self.normalisers:
            if n.name in live:
                parts: list[Expr] = [Call("exp", (score,)) for _, score in n.parts]
                sums = [Reduce("sum", over, (e,)) if over else e for (over, _), e in zip(n.parts, parts, strict=True)]
                meaning = Einsum((Output(n.name, n.ranks),), Call("log", (added(sums),)))
                doc += f" {print_einsum(meaning)}."
        return doc


def _sources(step: Step) -> list[Expr]:
    return [score for _, score in step.parts] if isinstance(step, Normaliser) else [step.expr]


def _written(step: Step) -> list[str]:
    return [step.name] if isinstance(step, Normaliser) else [o.name for o in step.outputs]
