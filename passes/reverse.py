"""Carrying adjoints backwards through expressions: from the adjoint of an Einsum to shares of what it reads.

A[q, k] = P[q, k] / L[q]      ->  share of P: dA[q, k] / L[q]            share of L: -(dA[q, k] * A[q, k] / L[q])
M[q] = max[k](X[q, k])        ->  share of X, where X[q, k] == M[q]: dM[q] / M_ties[q]
Y[n, k] = X[n, k] * sum[j](Z[n, j])  ->  dY_sum[n] = sum[k](dY[n, k] * X[n, k]), then the share of Z
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from ..ir.cascade import (
    Access,
    Call,
    Cast,
    Const,
    Einsum,
    Expr,
    Monoid,
    Output,
    Rank,
    Reduce,
    free_ranks,
    tensors_read,
    transform,
    walk,
)
from ..ir.dtypes import DTYPES
from ..ir.errors import VerifyError
from ..ir.ops import OPS
from ..ir.parse import parse_expr
from ..ir.types import TypeChecker, settle
from ..ir.verify import scan_step
from .adjoint import ONE, ZERO, added, collected, folded, is_negated, negated, quotient, times
from .fold import unfolded
from .influence import Extremes
from .transpose import Names, Share, clashes, guarded, reads, transpose, unshadowed


@dataclass(frozen=True, slots=True)
class Place:
    """Where an expression stands: in which Einsum, over which ranks, and under which conditions.

    ``guards`` are those of the forward cascade, outermost first; ``slopes`` say where the adjoint is not 0.
    """

    einsum: Einsum
    ranks: tuple[str, ...]
    guards: tuple[Expr, ...] = ()
    slopes: tuple[Expr, ...] = ()

    def under(self, condition: Expr) -> Place:
        return replace(self, guards=(*self.guards, condition))


@dataclass
class Reverse:
    """The adjoints of one cascade as far as they are found.

    ``live`` holds the tensors on the way from a wanted parameter to an output, ``closed`` those of them whose adjoint
    comes another way. ``extra`` is what an Einsum's adjoint needs of the forward cascade, ``backward`` the adjoints.
    """

    names: Names
    types: dict[str, str]
    monoids: dict[str, Monoid]
    extremes: Extremes
    live: set[str] = field(default_factory=set)
    closed: set[str] = field(default_factory=set)
    shares: dict[str, list[Share]] = field(default_factory=dict)
    adjoint: dict[str, Access] = field(default_factory=dict)
    extra: dict[str, list[Einsum]] = field(default_factory=dict)
    backward: list[Einsum] = field(default_factory=list)
    known: dict[tuple[str, Expr, tuple[Expr, ...]], Access] = field(default_factory=dict)
    # Reductions inside the step of a scan, which wait until its adjoint is there.
    waiting: list[tuple[Reduce, Expr, Place]] = field(default_factory=list)
    after_scan: bool = False
    unwritten: set[str] = field(default_factory=set)
    # Whether a value gets a tensor before it is sent to another instance of its own ranks.
    stepwise: bool = False

    def __post_init__(self) -> None:
        self.checker = TypeChecker(self.types, self.monoids)

    # What a gradient passes through

    def flows(self, e: Expr) -> bool:
        """Whether a gradient passes from an expression to a live tensor."""
        return bool(self.passed(e))

    def passed(self, e: Expr) -> set[str]:
        """The live tensors to which a gradient passes from an expression."""
        match e:
            case Access(tensor=tensor):
                return {tensor} & self.live
            case Cast(dtype=dtype, arg=arg):
                return self.passed(arg) if DTYPES[dtype].is_float else set()
            case Call(op=op, args=args):
                slopes = OPS[op].derivative or ()
                kept = [a for a, slope in zip(args, slopes, strict=False) if slope != "0.0"]
                if op == "where":
                    kept = list(args[1:])
                return set().union(*(self.passed(a) for a in kept))
            case Reduce(op="argmax" | "any" | "all"):
                return set()
            case Reduce(op="max" | "min") if self.extremes.dead(e):
                return set()
            case Reduce(args=args):
                return set().union(*(self.passed(a) for a in args))
            case _:
                return set()

    # Adjoints of tensors

    def share(self, tensor: str, share: Share) -> None:
        self.shares.setdefault(tensor, []).append(share)

    def total(self, tensor: str, axes: tuple[str, ...]) -> Expr | None:
        """The adjoint of a tensor over its own ranks: the sum of all shares."""
        shares = self.shares.get(tensor)
        return self.summed(shares, axes) if shares else None

    def summed(self, shares: Sequence[Share], axes: tuple[str, ...]) -> Expr:
        terms = []
        for s in collected(shares):
            if self.stepwise and clashes(s, axes):
                s = self._tensor_of(s)
            minus = is_negated(s.value)
            e = transpose(replace(s, value=negated(s.value)) if minus else s, axes, self.names)
            terms.append(negated(e) if minus else e)
        return added(terms)

    def _tensor_of(self, s: Share) -> Share:
        """The share of a value that is a tensor, which has all of the ranks; but not inside the step of a scan."""
        if any(isinstance(a, Access) and a.tensor in self.unwritten for a in walk(s.value)):
            return s
        e = guarded(s.guards, s.value)
        access = self.written(self.names.fresh("share"), s.ranks, e, self._float(e))
        return replace(s, guards=(), value=access)

    def written(self, name: str, ranks: tuple[str, ...], total: Expr, dtype: str) -> Access:
        """An adjoint as a tensor; one that is another's value just as it stands is that one."""
        access = Access(name, tuple(Rank(r) for r in ranks))
        if isinstance(total, Access) and total.indices == access.indices:
            self.names.taken.discard(name)
            return total
        self.types[name] = dtype
        declared = None if settle(TypeChecker(self.types, self.monoids).infer(total)) == dtype else dtype
        self.backward.append(Einsum((Output(name, ranks, declared),), total))
        return access

    def einsum(self, e: Einsum) -> None:
        """Send the adjoint of an Einsum's output to what it reads."""
        if isinstance(e.expr, Reduce) and e.expr.op in self.monoids:
            self._walk_fold(e, e.name)
            return
        ranks = e.output.ranks
        dtype = self._float_type(e.name)
        name = self.names.fresh(f"d{e.name}")
        scan = scan_step(e) is not None
        adjoint = Access(name, tuple(Rank(r) for r in ranks))
        if not scan:
            total = self.total(e.name, ranks)
            if total is None:
                return
            adjoint = self.written(name, ranks, total, dtype)
        self.adjoint[e.name] = adjoint
        self.types.setdefault(name, dtype)
        if scan:
            self.unwritten.add(name)
        self.walk(e.expr, adjoint, Place(e, ranks))
        if scan:
            total = self.total(e.name, ranks)
            assert total is not None
            self.unwritten.discard(name)
            self.written(name, ranks, total, dtype)
            self.after_scan, waiting, self.waiting = True, self.waiting, []
            for step in waiting:
                self._walk_apart(*step)
            self.after_scan = False

    def _walk_fold(self, e: Einsum, at: str) -> None:
        """A monoid: one element between the state before it and the state after it."""
        assert isinstance(e.expr, Reduce)
        fold = unfolded(e, self.monoids[e.expr.op], self.names, self.checker)
        self.types.update(fold.types)
        steps = [t for t in fold.einsums if t not in fold.states]
        for t in steps:
            if self.flows(t.expr):
                self.live.add(t.name)
        for o, result in zip(e.outputs, fold.results, strict=True):
            total = self.total(o.name, o.ranks)
            if total is None or not isinstance(result, Access):
                continue
            adjoint = self.written(self.names.fresh(f"d{o.name}"), o.ranks, total, self._float_type(o.name))
            self.adjoint[o.name] = adjoint
            self.share(result.tensor, Share(result.indices, o.ranks + fold.ranks, (), adjoint))
        for t in reversed(steps):
            if t.name in self.live:
                self.einsum(t)
        extra = self.extra.setdefault(at, [])
        for t in fold.einsums:
            extra += [t, *self.extra.pop(t.name, [])]

    def _float_type(self, tensor: str) -> str:
        return "f64" if self.types[tensor] == "f64" else "f32"

    def walk(self, e: Expr, adjoint: Expr, place: Place) -> None:
        """Carry the adjoint of an expression to the accesses in it."""
        if not self.flows(e):
            return
        match e:
            case Access(tensor=tensor, indices=indices):
                if tensor not in self.closed:
                    self.share(tensor, Share(indices, place.ranks, place.guards + place.slopes, adjoint))
            case Cast(arg=arg):
                self.walk(arg, adjoint, place)
            case Call(op="where", args=(condition, a, b)):
                condition = self._light(condition, place)
                self.walk(a, adjoint, place.under(condition))
                self.walk(b, adjoint, place.under(Call("not", (condition,))))
            case Call(args=args):
                for i, a in enumerate(args):
                    if self.flows(a):
                        slopes, through = self._through(e, i, adjoint, place)
                        self.walk(a, through, replace(place, slopes=place.slopes + slopes))
            case Reduce() if place.slopes or any(r not in free_ranks(e) for r in place.ranks):
                self._walk_apart(e, adjoint, place)
            case Reduce():
                self._walk_reduction(e, adjoint, place)

    def _walk_reduction(self, e: Reduce, adjoint: Expr, place: Place) -> None:
        match e.op:
            case "sum":
                self.walk(e.arg, adjoint, replace(place, ranks=place.ranks + e.ranks))
            case "max" | "min":
                self._walk_extreme(e, adjoint, place)
            case "prod":
                self._walk_product(e, adjoint, place)
            case _ if not place.guards and scan_step(place.einsum) is None:
                access = self._named(e, f"{place.einsum.name}_{e.op}", place)
                self.share(access.tensor, Share(access.indices, place.ranks, (), adjoint))
                self._walk_fold(Einsum((Output(access.tensor, place.ranks),), e), place.einsum.name)
            case _:
                raise VerifyError(
                    f"the monoid `{e.op}` has no derivative under a condition or in a scan",
                    hint=f"write it as a statement of its own: A[…] = {e.op}[…](…)",
                    einsum=place.einsum.name,
                    loc=e.loc,
                )

    def _walk_apart(self, e: Reduce, adjoint: Expr, place: Place) -> None:
        """A reduction that some of the ranks in scope leave as it is: its adjoint is summed over them first."""
        if scan_step(place.einsum) is not None and not self.after_scan:
            if reads(e, place.einsum.name):
                # It is part of the step, so it stays there.
                inside = unshadowed(e, set(place.ranks), self.names)
                assert isinstance(inside, Reduce)
                self._walk_reduction(inside, adjoint, place)
            else:
                self.waiting.append((e, adjoint, place))
            return
        ranks = tuple(r for r in place.ranks if r in free_ranks(e))
        share = Share(tuple(Rank(r) for r in ranks), place.ranks, place.guards + place.slopes, adjoint)
        name = self.names.fresh(f"d{place.einsum.name}_{e.op}")
        total = self.written(name, ranks, self.summed([share], ranks), self._float(e))
        guards = tuple(g for g in place.guards if free_ranks(g) <= set(ranks))
        self.walk(e, total, replace(place, ranks=ranks, guards=guards, slopes=()))

    def _float(self, e: Expr) -> str:
        return "f64" if self.checker.infer(e) == "f64" else "f32"

    def _through(self, e: Call, i: int, adjoint: Expr, place: Place) -> tuple[tuple[Expr, ...], Expr]:
        """The adjoint of one argument of an operation, from the op table, and where it is not 0."""
        if e.op == "div":
            down = self._light(e.args[1], place)
            above = adjoint if i == 0 else times(adjoint, self._light(e, place))
            return (), quotient(above, down) if i == 0 else negated(quotient(above, down))
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

        conditions, slope = _selected(transform(transform(slope, filled), folded))
        return conditions, times(adjoint, slope)

    def _walk_extreme(self, e: Reduce, adjoint: Expr, place: Place) -> None:
        """Ties of a maximum share the gradient, as torch.amax has it: where(x == max, d / ties, 0)."""
        extreme = self._light(e, place)
        equal = Call("eq", (e.arg, extreme))
        count = Reduce("sum", e.ranks, (Call("where", (equal, ONE, ZERO)),))
        ties = self._named(count, f"{place.einsum.name}_ties", place)
        inner = replace(place, ranks=place.ranks + e.ranks)
        same = Call("eq", (self._light(e.arg, inner), extreme))
        self.walk(e.arg, quotient(adjoint, ties), replace(inner, slopes=(*inner.slopes, same)))

    def _walk_product(self, e: Reduce, adjoint: Expr, place: Place) -> None:
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
        self.walk(e.arg, times(adjoint, slope), inner)

    # Values that adjoints need

    def _light(self, e: Expr, place: Place) -> Expr:
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

    def _named(self, e: Reduce, name: str, place: Place) -> Access:
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


def _selected(slope: Expr) -> tuple[tuple[Expr, ...], Expr]:
    """A slope that is 0 elsewhere as where it is not, and what it is there: so no infinity meets that 0.

    where(a > b, 1.0, where(a == b, 0.5, 0.0))  ->  (a > b) | (a == b), where(a > b, 1.0, 0.5)
    """
    cases: list[tuple[Expr, Expr]] = []
    while isinstance(slope, Call) and slope.op == "where":
        cases.append((slope.args[0], slope.args[1]))
        slope = slope.args[2]
    if not cases or slope != ZERO:
        for condition, value in reversed(cases):
            slope = Call("where", (condition, value, slope))
        return (), slope
    somewhere, value = cases[-1]
    for condition, other in reversed(cases[:-1]):
        somewhere, value = _either(condition, somewhere), Call("where", (condition, other, value))
    return (somewhere,), value


def _either(a: Expr, b: Expr) -> Expr:
    """``a | b``, where the two are of the same values one comparison."""
    wider = {"gt": "ge", "lt": "le"}
    if isinstance(a, Call) and isinstance(b, Call) and a.op in wider and b.op == "eq" and set(a.args) == set(b.args):
        return replace(a, op=wider[a.op])
    return Call("or", (a, b))


def _nothing(dtype: str) -> Expr:
    row = DTYPES[dtype]
    return ZERO if row.is_float else Const(False) if row.kind == "bool" else Const(0)
