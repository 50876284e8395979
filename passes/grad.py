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
from dataclasses import dataclass, replace

from ..ir.cascade import (
    Access,
    Call,
    Cascade,
    Cast,
    Const,
    Einsum,
    Expr,
    Output,
    Param,
    Rank,
    Reduce,
    free_ranks,
    ranks_named,
    tensors_read,
    transform,
    walk,
)
from ..ir.dtypes import DTYPES
from ..ir.errors import UsageError, VerifyError
from ..ir.ops import OPS
from ..ir.parse import parse_expr
from ..ir.print import print_einsum
from ..ir.types import TypeChecker, settle, tensor_types
from ..ir.verify import scan_step, verify
from .adjoint import ONE, ZERO, added, collected, folded, is_negated, negated, quotient, times
from .count import needed
from .extent import changed_extent, sizes
from .normaliser import Extremes, Normaliser, Route, access_to, replaced, routes, save_normalisers
from .transpose import Names, Share, guarded, reads, transpose, unshadowed

Step = Einsum | Normaliser


def grad(c: Cascade, wrt: str | Sequence[str] | None = None, saved: str | Sequence[str] = ()) -> Cascade:
    """The cascade of gradients of a cascade.

    It takes ``dO``, of O's shape, for every float output O, and returns ``dX``, of X's shape, for every X of ``wrt`` in
    that order: the gradient of ``Σ dO · O``. By default ``wrt`` is every float parameter that the outputs depend on.
    Gradients are f32 (f64 where the parameter is); casts pass them on unchanged, ties of a maximum share them.

    ``saved`` names tensors of the forward cascade that become parameters instead of being computed again; "lse" stands
    for the logarithm of every normaliser ``Σ exp(S)``. They are called lse, lse2, … in the order of the text, or as the
    output that each one is; the doc says what they are. An output that helps (O, for ``Σ dO · O``) becomes a parameter
    too. `forward` is the cascade that computes all of them.

    Raises `UsageError` for a name that does not fit, `VerifyError` where no gradient is defined.
    """
    return _Backward(c, *_checked(c, wrt, saved)).run()


def forward(c: Cascade, wrt: str | Sequence[str] | None = None, saved: str | Sequence[str] = ()) -> Cascade:
    """The cascade that also returns what `grad` with the same arguments takes beside inputs, outputs and adjoints.

    For attention and ``saved="lse"`` it is ``-> (O, lse)`` with ``lse[b, h, q] = M[b, h, q] + log(L[b, h, q])``.
    """
    back = _Backward(c, *_checked(c, wrt, saved))
    taken = {p.name for p in back.run().params}
    logs = [n for n in back.normalisers if n.name in taken and n.name not in c.einsum_of]
    einsums = [Einsum((Output(n.name, n.ranks),), n.meaning) for n in logs]
    more = [name for e in (*c.einsums, *einsums) for o in e.outputs if (name := o.name) in taken]
    outputs = (*c.outputs, *(name for name in more if name not in c.outputs))
    result = replace(c, einsums=(*c.einsums, *einsums), outputs=outputs)
    verify(result)
    return result


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


@dataclass(frozen=True, slots=True)
class _Place:
    """Where an expression stands: in which Einsum, over which ranks, under which conditions."""

    einsum: Einsum
    ranks: tuple[str, ...]
    guards: tuple[Expr, ...] = ()

    def under(self, condition: Expr) -> _Place:
        return replace(self, guards=(*self.guards, condition))


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
        self.checker = TypeChecker(self.types, c.monoid_of)
        self.extremes = Extremes(self.plain)
        self.steps = self._steps()
        self.live: set[str] = set()
        self.reached: set[str] = set()
        self._find_live(wrt)
        self.wrt = wrt if wrt is not None else tuple(p.name for p in c.params if p.name in self.reached)
        self.forward = {e.name: e for e in self.plain.einsums}
        self.extra: dict[str, list[Einsum]] = {}
        self.backward: list[Einsum] = []
        self.shares: dict[str, list[Share]] = {}
        self.adjoint: dict[str, Access] = {}
        # Reductions inside the step of a scan, which wait until its adjoint is there.
        self.waiting: list[tuple[Reduce, Expr, _Place]] = []
        self.after_scan = False
        self.known: dict[tuple[str, Expr, tuple[Expr, ...]], Access] = {}

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
        self.routes = {n.name: self._routes(n) for n in self.normalisers if n.name in self.live}
        for step in reversed(self.steps):
            if self.live & set(_written(step)):
                self._logarithm(step) if isinstance(step, Normaliser) else self._einsum(step)
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

    def _find_live(self, wrt: tuple[str, ...] | None) -> None:
        """The tensors on the way from a wanted parameter to an output."""
        floats = (p.name for p in self.c.params if DTYPES[p.dtype].is_float)
        self.live = set(floats if wrt is None else wrt)
        for step in self.steps:
            if any(map(self._flows, _sources(step))):
                self.live |= {t for t in _written(step) if DTYPES[self.types[t]].is_float}
        self.reached = {o for o in self.c.outputs if o in self.live}
        for step in reversed(self.steps):
            if self.reached & set(_written(step)):
                self.reached = self.reached.union(*map(self._passed, _sources(step)))
        self.live &= self.reached

    def _flows(self, e: Expr) -> bool:
        """Whether a gradient passes from an expression to a live tensor."""
        return bool(self._passed(e))

    def _passed(self, e: Expr) -> set[str]:
        """The live tensors to which a gradient passes from an expression."""
        match e:
            case Access(tensor=tensor):
                return {tensor} & self.live
            case Cast(dtype=dtype, arg=arg):
                return self._passed(arg) if DTYPES[dtype].is_float else set()
            case Call(op=op, args=args):
                slopes = OPS[op].derivative or ()
                kept = [a for a, slope in zip(args, slopes, strict=False) if slope != "0.0"]
                if op == "where":
                    kept = list(args[1:])
                return set().union(*(self._passed(a) for a in kept))
            case Reduce(op="argmax" | "any" | "all"):
                return set()
            case Reduce(op="max" | "min") if self.extremes.dead(e):
                return set()
            case Reduce(args=args):
                return set().union(*(self._passed(a) for a in args))
            case _:
                return set()

    # Adjoints of tensors

    def _adjoint_param(self, output: str) -> Param:
        ranks = next(o.ranks for o in self.c.einsum_of[output].outputs if o.name == output)
        name = self.names.fresh(f"d{output}")
        self.types[name] = self.types[output]
        indices = tuple(Rank(r) for r in ranks)
        if output in self.live:
            self._share(output, Share(indices, ranks, (), Access(name, indices)))
        return Param(name, self.types[output], indices)

    def _share(self, tensor: str, share: Share) -> None:
        self.shares.setdefault(tensor, []).append(share)

    def _total(self, tensor: str, axes: tuple[str, ...]) -> Expr | None:
        """The adjoint of a tensor over its own ranks: the sum of all shares."""
        shares = self.shares.get(tensor)
        return self._summed(shares, axes) if shares else None

    def _summed(self, shares: Sequence[Share], axes: tuple[str, ...]) -> Expr:
        terms = []
        for s in collected(shares):
            minus = is_negated(s.value)
            e = transpose(replace(s, value=negated(s.value)) if minus else s, axes, self.names)
            terms.append(negated(e) if minus else e)
        return added(terms)

    def _written(self, name: str, ranks: tuple[str, ...], total: Expr, dtype: str) -> Access:
        """An adjoint as a tensor; one that is another's value just as it stands is that one."""
        access = Access(name, tuple(Rank(r) for r in ranks))
        if isinstance(total, Access) and total.indices == access.indices:
            self.names.taken.discard(name)
            return total
        self.types[name] = dtype
        declared = None if settle(TypeChecker(self.types, {}).infer(total)) == dtype else dtype
        self.backward.append(Einsum((Output(name, ranks, declared),), total))
        return access

    def _einsum(self, e: Einsum) -> None:
        """Send the adjoint of an Einsum's output to what it reads."""
        if len(e.outputs) > 1 or (isinstance(e.expr, Reduce) and e.expr.op in self.c.monoid_of):
            raise VerifyError(
                f"`{e.name}` is reduced by the monoid `{e.expr.op if isinstance(e.expr, Reduce) else ''}`, "
                "which has no derivative",
                hint="write the reductions that the monoid stands for; castile derives the monoid again",
                einsum=e.name,
                loc=e.loc,
            )
        ranks = e.output.ranks
        dtype = "f64" if self.types[e.name] == "f64" else "f32"
        name = self.names.fresh(f"d{e.name}")
        scan = scan_step(e) is not None
        adjoint = Access(name, tuple(Rank(r) for r in ranks))
        if not scan:
            total = self._total(e.name, ranks)
            if total is None:
                return
            adjoint = self._written(name, ranks, total, dtype)
        self.adjoint[e.name] = adjoint
        self.types.setdefault(name, dtype)
        self._walk(e.expr, adjoint, _Place(e, ranks))
        if scan:
            total = self._total(e.name, ranks)
            assert total is not None
            self._written(name, ranks, total, dtype)
            self.after_scan, waiting, self.waiting = True, self.waiting, []
            for step in waiting:
                self._walk_apart(*step)
            self.after_scan = False

    def _walk(self, e: Expr, adjoint: Expr, place: _Place) -> None:
        """Carry the adjoint of an expression to the accesses in it."""
        if not self._flows(e):
            return
        match e:
            case Access(tensor=tensor, indices=indices):
                if not self.routes.get(tensor):
                    self._share(tensor, Share(indices, place.ranks, place.guards, adjoint))
            case Cast(arg=arg):
                self._walk(arg, adjoint, place)
            case Call(op="where", args=(condition, a, b)):
                condition = self._light(condition, place)
                self._walk(a, adjoint, place.under(condition))
                self._walk(b, adjoint, place.under(Call("not", (condition,))))
            case Call(args=args):
                for i, a in enumerate(args):
                    if self._flows(a):
                        self._walk(a, self._through(e, i, adjoint, place), place)
            case Reduce() if any(r not in free_ranks(e) for r in place.ranks):
                self._walk_apart(e, adjoint, place)
            case Reduce():
                self._walk_reduction(e, adjoint, place)

    def _walk_reduction(self, e: Reduce, adjoint: Expr, place: _Place) -> None:
        match e.op:
            case "sum":
                self._walk(e.arg, adjoint, replace(place, ranks=place.ranks + e.ranks))
            case "max" | "min":
                self._walk_extreme(e, adjoint, place)
            case "prod":
                self._walk_product(e, adjoint, place)
            case _:
                raise VerifyError(
                    f"the monoid `{e.op}` has no derivative",
                    hint="write the reductions that it stands for",
                    einsum=place.einsum.name,
                    loc=e.loc,
                )

    def _walk_apart(self, e: Reduce, adjoint: Expr, place: _Place) -> None:
        """A reduction that some of the ranks in scope leave as it is: its adjoint is summed over them first."""
        if scan_step(place.einsum) is not None and not self.after_scan:
            if reads(e, place.einsum.name):
                # It is part of the step, so it stays there.
                e = unshadowed(e, set(place.ranks), self.names)
                self._walk_reduction(e, adjoint, place)
            else:
                self.waiting.append((e, adjoint, place))
            return
        ranks = tuple(r for r in place.ranks if r in free_ranks(e))
        share = Share(tuple(Rank(r) for r in ranks), place.ranks, place.guards, adjoint)
        name = self.names.fresh(f"d{place.einsum.name}_{e.op}")
        total = self._written(name, ranks, self._summed([share], ranks), self._float(e))
        guards = tuple(g for g in place.guards if free_ranks(g) <= set(ranks))
        self._walk(e, total, replace(place, ranks=ranks, guards=guards))

    def _float(self, e: Expr) -> str:
        return "f64" if self.checker.infer(e) == "f64" else "f32"

    def _through(self, e: Call, i: int, adjoint: Expr, place: _Place) -> Expr:
        """The adjoint of one argument of an operation, from the op table."""
        if e.op == "div":
            down = self._light(e.args[1], place)
            above = adjoint if i == 0 else times(adjoint, self._light(e, place))
            return quotient(above, down) if i == 0 else negated(quotient(above, down))
        row = OPS[e.op]
        text = row.derivative[i] if row.derivative else None
        if text is None:
            raise VerifyError(
                f"`{row.symbol or e.op}` has no derivative with respect to argument {i + 1}",
                hint="leave the parameter out of wrt, or write the operation differently",
                einsum=place.einsum.name,
                loc=e.loc,
            )
        values = {"a": e.args[0], "b": e.args[-1], "y": e}
        slope = parse_expr(text, values)
        used = {name: self._light(values[name], place) for name in tensors_read(slope)}

        def filled(n: Expr) -> Expr:
            return used.get(n.tensor, n) if isinstance(n, Access) else n

        return times(adjoint, transform(transform(slope, filled), folded))

    def _walk_extreme(self, e: Reduce, adjoint: Expr, place: _Place) -> None:
        """Ties of a maximum share the gradient, as torch.amax has it: where(x == max, d / ties, 0)."""
        extreme = self._light(e, place)
        equal = Call("eq", (e.arg, extreme))
        count = Reduce("sum", e.ranks, (Call("where", (equal, ONE, ZERO)),))
        ties = self._named(count, f"{place.einsum.name}_ties", place)
        inner = replace(place, ranks=place.ranks + e.ranks)
        same = Call("eq", (self._light(e.arg, inner), extreme))
        self._walk(e.arg, quotient(adjoint, ties), inner.under(same))

    def _walk_product(self, e: Reduce, adjoint: Expr, place: _Place) -> None:
        """Of a factor, the product of all others: the whole one divided by it, or where that is 0, of what is not 0."""
        zero = Call("eq", (e.arg, ZERO))
        zeros = Reduce("sum", e.ranks, (Call("where", (zero, ONE, ZERO)),))
        rest = Reduce("prod", e.ranks, (Call("where", (zero, ONE, e.arg)),))
        count = self._named(zeros, f"{place.einsum.name}_zeros", place)
        others = self._named(rest, f"{place.einsum.name}_rest", place)
        inner = replace(place, ranks=place.ranks + e.ranks)
        value = self._light(e.arg, inner)
        one = Call("where", (Call("eq", (count, ONE)), others, ZERO))
        none = Call("where", (Call("eq", (count, ZERO)), Call("div", (others, value)), ZERO))
        slope = Call("where", (Call("eq", (value, ZERO)), one, none))
        self._walk(e.arg, times(adjoint, slope), inner)

    # Values that adjoints need

    def _light(self, e: Expr, place: _Place) -> Expr:
        """An expression of the forward cascade with a tensor for each reduction in it, and for all of an Einsum."""
        t = place.einsum.output
        if (
            e is place.einsum.expr
            and set(t.ranks) <= set(place.ranks)
            and (t.dtype is None or DTYPES[t.dtype].bits >= 32)
        ):
            return Access(t.name, tuple(Rank(r) for r in t.ranks))
        match e:
            case Reduce():
                return self._named(e, f"{place.einsum.name}_{e.op}", place)
            case Call(op="where", args=(condition, a, b)):
                condition = self._light(condition, place)
                a, b = self._light(a, place.under(condition)), self._light(b, place.under(Call("not", (condition,))))
                return replace(e, args=(condition, a, b))
            case Call(args=args):
                return replace(e, args=tuple(self._light(x, place) for x in args))
            case Cast(arg=arg):
                return replace(e, arg=self._light(arg, place))
            case _:
                return e

    def _named(self, e: Reduce, name: str, place: _Place) -> Access:
        """A reduction as a tensor over the ranks in scope that it depends on, 0 where it is not needed."""
        key = (place.einsum.name, e, place.guards)
        if key not in self.known:
            dtype = settle(self.checker.infer(e))
            value = guarded(place.guards, e, _nothing(dtype))
            ranks = tuple(r for r in place.ranks if r in free_ranks(value))
            name = self.names.fresh(name)
            self.types[name] = dtype
            self.extra.setdefault(place.einsum.name, []).append(Einsum((Output(name, ranks),), value))
            self.known[key] = Access(name, tuple(Rank(r) for r in ranks))
        return self.known[key]

    # Saved logarithms

    def _routes(self, n: Normaliser) -> tuple[Route, ...]:
        """How the outputs depend on it, where that is known without going the way that the text goes."""
        kept = {*self.c.outputs, *self.saved} - {n.name}
        return routes(self.plain, n.name, kept, [m for m in self.normalisers if m is not n]) or ()

    def _logarithm(self, n: Normaliser) -> None:
        """Send the adjoint of a saved logarithm to its scores: dscore = dlse exp(score - lse)."""
        for route in self.routes[n.name]:
            self._follow(route, n)
        total = self._total(n.name, n.ranks)
        if total is None:
            return
        minus = is_negated(total)
        name = self.names.fresh("D" if minus else f"d{n.name}")
        dlse = self._written(name, n.ranks, negated(total) if minus else total, "f32")
        at = Einsum((Output(n.name, n.ranks),), ONE)
        for over, score in n.parts:
            value = Call("exp", (Call("sub", (score, n.access)),))
            same = next((e.name for e in self.plain.einsums if e.expr == value), None)
            share = times(access_to(self.plain, same) if same is not None else value, dlse)
            self._walk(score, negated(share) if minus else share, _Place(at, n.ranks + over))

    def _follow(self, route: Route, n: Normaliser) -> None:
        """The share of the logarithm's adjoint that comes through a tensor T: a dT T, summed over what lse lacks."""
        adjoint = self.adjoint.get(route.tensor)
        if adjoint is None:
            return
        value: Expr = adjoint if route.added else times(adjoint, access_to(self.plain, route.tensor))
        if abs(route.factor) != 1:
            value = times(Const(float(abs(route.factor))), value)
        ranks = self.c.einsum_of[route.tensor].output.ranks
        self._share(n.name, Share(n.access.indices, ranks, (), negated(value) if route.factor < 0 else value))

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
        total = self._total(p.name, ranks)
        name = self.names.fresh(f"d{p.name}")
        dtype = "f64" if p.dtype == "f64" else "f32"
        inferred = settle(TypeChecker(self.types, {}).infer(total if total is not None else ZERO))
        output = Output(name, ranks, None if inferred == dtype else dtype)
        self.backward.append(Einsum((output,), total if total is not None else ZERO))
        return name

    def _assembled(self, declared: list[Param], given: list[Param], results: tuple[str, ...]) -> Cascade:
        """Forward statements that are still needed, adjoints, results, and the parameters that all of them read.

        A rank that had its extent from the forward text alone gets it from a tensor of the forward cascade, which
        becomes a parameter.
        """
        kept = set(self.saved)
        for n, found in self.routes.items():
            kept |= {r.tensor for r in found if not r.added and r.tensor in self.adjoint and n in self.live}
        while True:
            result = self._cascade(kept, declared, given, results)
            rank = changed_extent(self.c, result, self.names)
            if rank is None:
                verify(result)
                return result
            holder = next((e.name for e in self.c.einsums if rank in e.output.ranks and e.name not in kept), None)
            if holder is None:
                raise VerifyError(
                    f"the gradient of `{self.c.name}` needs rank `{rank}` where nothing gives it its extent",
                    rank=rank,
                    hint=f"let a parameter have the axis `{self.names.copies.get(rank, rank)}`",
                )
            kept.add(holder)

    def _cascade(self, kept: set[str], declared: list[Param], given: list[Param], results: tuple[str, ...]) -> Cascade:
        einsums: list[Einsum] = []
        for name, e in self.forward.items():
            early: list[Einsum] = []
            late: list[Einsum] = []
            for t in self.extra.get(name, []):
                whole = scan_step(e) is None and any(n == t.expr for n in walk(e.expr))
                (early if whole and name not in kept else late).append(t)
            for t in early:
                e = replace(e, expr=replaced(e.expr, t.expr, Access(t.name, tuple(Rank(r) for r in t.output.ranks))))
            einsums += [*early, *([] if name in kept else [e]), *late]
        for n in self.normalisers:
            einsums += self.extra.get(n.name, [])
        einsums += self.backward
        live = set(results)
        for e in reversed(einsums):
            if e.name in live:
                live |= {*tensors_read(e.expr), e.name}
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


def _nothing(dtype: str) -> Expr:
    row = DTYPES[dtype]
    return ZERO if row.is_float else Const(False) if row.kind == "bool" else Const(0)


def _sources(step: Step) -> list[Expr]:
    return [score for _, score in step.parts] if isinstance(step, Normaliser) else [step.expr]


def _written(step: Step) -> list[str]:
    return [step.name] if isinstance(step, Normaliser) else [o.name for o in step.outputs]
