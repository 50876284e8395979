"""Gradients as cascades: reverse-mode differentiation, Einsum by Einsum.

An Einsum ``T[r] = Σ_k f(X[i(r, k)], …)`` sends ``dX[x] += Σ_{r, k: i(r, k) = x} dT[r] ∂f/∂X``: the ranks that X lacks are summed, an index
that is a bare rank renames it, an affine one is solved for a rank, any other stays as a condition under the sum. The
derivatives are those of the op table. A scan's adjoint is a scan in the other direction.

Before differentiating, the algebra is asked what the outputs depend on: a maximum that only keeps exponentials small is
no input of theirs and gets no gradient. With a saved log-sum-exp the probabilities are recomputed as ``exp(S - lse)``, and what
flows back through the normaliser is ``-Σ dO · O``: the sum over keys of P · dP, re-associated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from ..ir.cascade import (
    Access,
    Call,
    Cascade,
    Cast,
    Const,
    Einsum,
    Expr,
    Extent,
    Output,
    Param,
    Rank,
    Reduce,
    children,
    free_ranks,
    literal_value,
    ranks_named,
    rebuild,
    substitute,
    tensors_read,
    transform,
    walk,
)
from ..ir.dtypes import DTYPES
from ..ir.errors import UsageError, VerifyError
from ..ir.extents import bindings
from ..ir.ops import OPS
from ..ir.parse import parse_expr
from ..ir.types import TypeChecker, settle, tensor_types
from ..ir.verify import scan_step, verify
from .count import needed
from .derive import derive
from .lower import Lowering
from .normal import Atom, Form, Value, lift
from .read import Reader
from .separate import Reductions, parts_of

ZERO: Expr = Const(0.0)
ONE: Expr = Const(1.0)


def grad(c: Cascade, wrt: str | Sequence[str] | None = None, saved: str | Sequence[str] = ()) -> Cascade:
    """The cascade of gradients of a cascade.

    For every float output O it takes ``dO`` of O's shape, for every parameter in ``wrt`` (default: all float parameters) it
    returns ``dX`` of X's shape, in that order: the gradient of ``Σ dO · O``. Gradients are f32 (f64 where the parameter is); casts
    pass them on unchanged, ties of a maximum share them.

    ``saved`` names tensors of the forward cascade that become parameters instead of being computed again; ``"lse"`` stands for
    the log-sum-exp of every normaliser. An output that helps (O, for ``Σ dO · O``) becomes a parameter too.

    Raises `UsageError` for a name that does not fit, `VerifyError` where no gradient is defined.
    """
    names = [wrt] if isinstance(wrt, str) else wrt
    keep = [saved] if isinstance(saved, str) else list(saved)
    if names is None:
        names = [p.name for p in c.params if DTYPES[p.dtype].is_float]
    for name in names:
        if name not in c.param_of or not DTYPES[c.param_of[name].dtype].is_float:
            floats = ", ".join(p.name for p in c.params if DTYPES[p.dtype].is_float) or "none"
            raise UsageError(f"`{c.name}` has no float parameter `{name}`", hint=f"its float parameters are {floats}")
    for name in keep:
        if name != "lse" and name not in c.einsum_of:
            tensors = ", ".join(o.name for e in c.einsums for o in e.outputs)
            raise UsageError(f"`{c.name}` computes no tensor `{name}`", hint=f'save "lse" or one of {tensors}')
    raw = _Backward(c, tuple(names), tuple(keep)).run()
    verify(raw)
    clean = derive(raw, level="none").cascade
    return _prune(clean)


def _prune(c: Cascade) -> Cascade:
    """Drop parameters that nothing reads, unless a rank gets its extent from them alone."""
    live = needed(c)
    for p in c.params:
        if p.name in live:
            continue
        fewer = replace(c, params=tuple(q for q in c.params if q != p))
        try:
            verify(fewer)
        except VerifyError:
            continue
        before = {b.rank: b for b in bindings(c)}
        rebound = [b for b in bindings(fewer) if (was := before[b.rank].param) and was[0] == p.name and b.param is None]
        c = c if rebound else fewer
    return c


@dataclass(frozen=True, slots=True)
class Contribution:
    """A share of a tensor's adjoint: the sum of ``value`` over ``ranks``, at the place ``indices`` of the tensor."""

    indices: tuple[Expr, ...]
    ranks: tuple[str, ...]
    value: Expr


@dataclass(frozen=True, slots=True)
class Normaliser:
    """A sum of exponentials ``Σ exp(E)`` whose logarithm is saved as ``name``: lse = log Σ exp(score)."""

    name: str
    ranks: tuple[str, ...]
    over: tuple[str, ...]
    score: Access
    cut: tuple[tuple[str, int], ...]


@dataclass
class _Backward:
    c: Cascade
    wrt: tuple[str, ...]
    saved: tuple[str, ...]
    shares: dict[str, list[Contribution]] = field(default_factory=dict)
    einsums: list[Einsum] = field(default_factory=list)

    def run(self) -> Cascade:
        self.types = tensor_types(self.c)
        self.taken = set(self.types) | set(self.c.ranks) | {m.name for m in self.c.monoids}
        self.extremes = Extremes(self.c)
        self.normalisers: dict[str, Normaliser] = {}
        forward = self._forward()
        self.checker = TypeChecker(self.types, self.c.monoid_of)
        params = [self._declared(p) if p.name in self.wrt else p for p in self.c.params]
        self.declared = {p.name: p for p in params}
        params += [Param(n.name, "f32", tuple(Rank(r) for r in n.ranks)) for n in self.normalisers.values()]
        params += [self._as_param(name) for name in self.saved if name != "lse" and name not in self.aliases]
        self.einsums = [e for e in forward if e.name not in self.saved]
        live = self._differentiable(forward)
        for name in self.c.outputs:
            if not DTYPES[self.types[name]].is_float:
                continue
            adjoint = self._fresh(f"d{name}")
            ranks = self.c.einsum_of[name]
            own = next(o.ranks for o in ranks.outputs if o.name == name)
            params.append(Param(adjoint, self.types[name], tuple(Rank(r) for r in own)))
            self._share(
                name, Contribution(tuple(Rank(r) for r in own), (), Access(adjoint, tuple(Rank(r) for r in own)))
            )
        used_outputs: set[str] = set()
        for e in reversed(forward):
            if e.name in live:
                used_outputs |= self._einsum(e, live)
        params += [self._as_param(name) for name in self.c.outputs if name in used_outputs and name not in self.saved]
        self.einsums = [e for e in self.einsums if e.name not in used_outputs]
        results = []
        for name in self.wrt:
            results.append(self._result(name))
        return Cascade(
            f"{self.c.name}_grad",
            tuple(params),
            tuple(self.einsums),
            tuple(results),
            self.c.monoids,
            self.c.numerics,
            f"Gradients of {self.c.name} with respect to {', '.join(self.wrt)}.",
        )

    # Before differentiating

    def _forward(self) -> list[Einsum]:
        """The Einsums of the forward cascade, normalisers in terms of their saved logarithms."""
        self.aliases: dict[str, str] = {}
        forward = [e for e in self.c.einsums if e.name in needed(self.c)]
        wanted = [s for s in self.saved]
        if not wanted:
            return forward
        finder = NormaliserFinder(self.c)
        result: list[Einsum] = []
        for e in forward:
            if scan_step(e) is not None or len(e.outputs) > 1:
                result.append(e)
                continue
            extra: list[Einsum] = []

            def visit(node: Expr, extra: list[Einsum] = extra) -> Expr:
                if not isinstance(node, Reduce) or node.op != "sum":
                    return node
                found = finder.find(node)
                if found is None:
                    return node
                return self._saved_normaliser(finder, node, found, wanted, extra) or node

            expr = transform(e.expr, visit)
            result += extra
            result.append(replace(e, expr=expr))
        return result

    def _saved_normaliser(
        self, finder: NormaliserFinder, node: Reduce, found: Partition, wanted: list[str], extra: list[Einsum]
    ) -> Expr | None:
        """``exp(lse - offset)`` in place of a sum of exponentials, if its logarithm is saved."""
        alias = next((s for s in wanted if s != "lse" and finder.is_logarithm(s, found)), None)
        if alias is None and "lse" not in wanted:
            return None
        name = alias
        known = next((n for n in self.normalisers.values() if finder.scores.get(n.name) == found.score.digest), None)
        if known is not None:
            name = known.name
        elif name is None:
            name = self._fresh("lse")
        ranks = tuple(r for r in self.c.ranks if r in free_ranks(node))
        if known is None:
            score = finder.tensor_of(found.score)
            if score is None:
                score_ranks = tuple(r for r in self.c.ranks if r in found.score.free)
                score = Access(self._fresh("score"), tuple(Rank(r) for r in score_ranks))
                self.types[score.tensor] = "f32"
                extra.append(Einsum((Output(score.tensor, score_ranks),), finder.expression(found.score)))
            finder.scores[name] = found.score.digest
            if alias is not None:
                ranks = self.c.einsum_of[alias].output.ranks
                self.aliases[alias] = name
            self.normalisers[name] = Normaliser(name, ranks, node.ranks, score, finder.cut(found, node.ranks))
            self.types[name] = "f32"
            self.taken.add(name)
        access = Access(name, tuple(Rank(r) for r in self.normalisers[name].ranks))
        offset = finder.expression(found.offset) if found.offset.terms else None
        return Call("exp", (Call("sub", (access, offset)) if offset is not None else access,))

    def _as_param(self, name: str) -> Param:
        output = next(o for o in self.c.einsum_of[name].outputs if o.name == name)
        return Param(name, self.types[name], tuple(Rank(r) for r in output.ranks))

    def _differentiable(self, forward: list[Einsum]) -> set[str]:
        """The tensors through which a gradient passes on its way to a wanted parameter."""
        reach = set(self.wrt)
        for e in forward:
            reads = set(tensors_read(e.expr))
            for n in self.normalisers.values():
                if n.name in reads:
                    reads.add(n.score.tensor)
            if reads & reach and DTYPES[self.types[e.name]].is_float:
                reach |= {o.name for o in e.outputs}
                reach |= {n.name for n in self.normalisers.values() if n.score.tensor in reach}
        return reach | {n.name for n in self.normalisers.values() if n.score.tensor in reach}

    # Adjoint of one Einsum

    def _einsum(self, e: Einsum, live: set[str]) -> set[str]:
        """Send the adjoint of an Einsum's output to what it reads; returns outputs that turned into parameters."""
        if isinstance(e.expr, Reduce) and e.expr.op in self.c.monoid_of:
            raise VerifyError(
                f"`{e.name}` is reduced by the monoid `{e.expr.op}`, which has no derivative",
                hint="write the reductions that the monoid stands for; castile derives the monoid again",
                einsum=e.name,
                loc=e.loc,
            )
        name, ranks = e.name, e.output.ranks
        own = scan_step(e) is not None
        if name not in self.shares and not own:
            return set()
        adjoint = self._fresh(f"d{name}")
        access = Access(adjoint, tuple(Rank(r) for r in ranks))
        self.types[adjoint] = "f64" if self.types[name] == "f64" else "f32"
        self._walk(unshadow(e.expr, set(ranks), self.taken), access, ranks, live)
        self.einsums.append(Einsum((Output(adjoint, ranks),), self._total(name, ranks)))
        return self._normalisers_of(e, adjoint, live)

    def _normalisers_of(self, e: Einsum, adjoint: str, live: set[str]) -> set[str]:
        """What flows back through saved normalisers of which this tensor is a power: ``a dT T`` for each factor exp(a lse)."""
        used: set[str] = set()
        for n in self.normalisers.values():
            for tensor, factor in n.cut:
                if tensor != e.name or n.score.tensor not in live:
                    continue
                ranks = e.output.ranks
                value: Expr = Call(
                    "mul",
                    (Access(adjoint, tuple(Rank(r) for r in ranks)), Access(tensor, tuple(Rank(r) for r in ranks))),
                )
                if factor != 1:
                    value = Call("neg", (value,)) if factor == -1 else Call("mul", (Const(float(abs(factor))), value))
                    if factor < -1:
                        value = Call("neg", (value,))
                self._share(n.name, Contribution(tuple(Rank(r) for r in n.ranks), ranks, value))
                used |= {tensor} & set(self.c.outputs)
            if n.score.tensor == e.name or n.name not in self.shares:
                continue
        return used

    def _flush_normalisers(self, tensor: str) -> None:
        """Before a score's adjoint is summed up: the share that comes through its log-sum-exp, dlse · exp(score - lse)."""
        for n in self.normalisers.values():
            if n.score.tensor != tensor or n.name not in self.shares:
                continue
            adjoint = self._fresh(f"d{n.name}")
            self.einsums.append(Einsum((Output(adjoint, n.ranks),), self._total(n.name, n.ranks)))
            del self.shares[n.name]
            lse, d = (Access(x, tuple(Rank(r) for r in n.ranks)) for x in (n.name, adjoint))
            value = Call("mul", (d, Call("exp", (Call("sub", (n.score, lse)),))))
            ranks = tuple(dict.fromkeys([*n.ranks, *n.over, *(r for i in n.score.indices for r in ranks_named(i))]))
            self._share(tensor, Contribution(n.score.indices, ranks, value))

    def _walk(self, e: Expr, adjoint: Expr, ranks: tuple[str, ...], live: set[str]) -> None:
        """Carry the adjoint of an expression to the accesses in it; ``ranks`` are those in scope."""
        match e:
            case Access(tensor=tensor, indices=indices):
                cut = tensor in self.normalisers and self.normalisers[tensor].cut
                if tensor in live and not cut and not isinstance(adjoint, Const):
                    self._share(tensor, Contribution(indices, ranks, adjoint))
            case Cast(dtype=dtype, arg=arg):
                if DTYPES[dtype].is_float and DTYPES[self._dtype(arg)].is_float:
                    self._walk(arg, adjoint, ranks, live)
            case Call(op="where", args=(condition, a, b)):
                self._walk(a, Call("where", (condition, adjoint, ZERO)), ranks, live)
                self._walk(b, Call("where", (condition, ZERO, adjoint)), ranks, live)
            case Call(op=op, args=args):
                for i, a in enumerate(args):
                    if set(tensors_read(a)) & live:
                        factor = derivative(e, i)
                        if factor is not None and factor != ZERO:
                            self._walk(a, times(adjoint, factor), ranks, live)
            case Reduce():
                self._walk_reduction(e, adjoint, ranks, live)
            case _:
                return

    def _walk_reduction(self, e: Reduce, adjoint: Expr, ranks: tuple[str, ...], live: set[str]) -> None:
        if not set(tensors_read(e)) & live or e.op in ("argmax", "any", "all"):
            return
        inner = ranks + e.ranks
        match e.op:
            case "sum":
                self._walk(e.arg, adjoint, inner, live)
            case "max" | "min" if self.extremes.dead(e):
                return
            case "max" | "min":
                # Ties share the gradient, as torch.amax has it.
                fresh = {r: self._fresh(f"{r}_") for r in e.ranks}
                other = rename(e.arg, fresh)
                extreme = Reduce(e.op, tuple(fresh.values()), (other,))
                again = {r: self._fresh(f"{r}_") for r in e.ranks}
                equal = Call("eq", (rename(e.arg, again), extreme))
                count = Reduce("sum", tuple(again.values()), (Call("where", (equal, ONE, ZERO)),))
                share = Call("where", (Call("eq", (e.arg, extreme)), Call("div", (adjoint, count)), ZERO))
                self._walk(e.arg, share, inner, live)
            case "prod":
                fresh = {r: self._fresh(f"{r}_") for r in e.ranks}
                same: Expr | None = None
                for r, f in fresh.items():
                    one = Call("eq", (Rank(r), Rank(f)))
                    same = one if same is None else Call("and", (same, one))
                assert same is not None
                others = Reduce("prod", tuple(fresh.values()), (Call("where", (same, ONE, rename(e.arg, fresh))),))
                self._walk(e.arg, times(adjoint, others), inner, live)
            case _:
                raise VerifyError(
                    f"the monoid `{e.op}` has no derivative", hint="write the reductions that it stands for"
                )

    def _dtype(self, e: Expr) -> str:
        return settle(self.checker.infer(e))

    # Sums of contributions

    def _share(self, tensor: str, contribution: Contribution) -> None:
        self.shares.setdefault(tensor, []).append(contribution)

    def _total(self, tensor: str, ranks: tuple[str, ...]) -> Expr:
        """The adjoint of a tensor over its own ranks: the sum of all shares."""
        self._flush_normalisers(tensor)
        total: Expr | None = None
        for share in self.shares.get(tensor, []):
            value = self._transposed(share, ranks)
            total = value if total is None else Call("add", (total, value))
        return total if total is not None else ZERO

    def _declared(self, p: Param) -> Param:
        """A parameter with a bare rank for every axis, so that its gradient has names for them."""
        seen: set[str] = set()
        indices: list[Expr] = []
        for index in p.indices:
            name = index.name if isinstance(index, Rank) and index.name not in seen else self._fresh(f"{p.name}_axis")
            seen.add(name)
            indices.append(Rank(name))
        return replace(p, indices=tuple(indices))

    def _result(self, name: str) -> str:
        ranks = tuple(i.name for i in self.declared[name].indices if isinstance(i, Rank))
        total = self._total(name, ranks)
        if not self.shares.get(name):
            raise VerifyError(f"no output depends differentiably on `{name}`", hint="leave it out of wrt")
        result = self._fresh(f"d{name}")
        self.einsums.append(Einsum((Output(result, ranks, "f64" if self.types[name] == "f64" else None),), total))
        return result

    def _transposed(self, share: Contribution, target: tuple[str, ...]) -> Expr:
        """The share as an expression over the target's ranks: indices inverted, all other ranks summed."""
        clash = {r: self._fresh(f"{r}_") for r in share.ranks if r in target and not self._identical(share, target, r)}
        origin = {new: old for old, new in clash.items()}
        value = rename(share.value, clash)
        indices = [rename(i, clash) for i in share.indices]
        ranks = [clash.get(r, r) for r in share.ranks]
        tests: list[Expr] = []
        # Plain ranks first: what they fix may stand in the other indices.
        for axis in sorted(range(len(indices)), key=lambda a: not isinstance(indices[a], Rank)):
            index, own = indices[axis], target[axis]
            if index == Rank(own):
                if own in ranks:
                    ranks.remove(own)
                continue
            solved = self._solve(index, own, ranks, origin)
            if solved is None:
                tests.append(Call("eq", (index, Rank(own))))
                continue
            rank, expression, found = solved
            ranks.remove(rank)
            swap = {rank: expression}
            value = substitute(value, swap)
            indices = [substitute(i, swap) for i in indices]
            tests = [substitute(t, swap) for t in tests] + found
        for test in tests:
            value = Call("where", (test, value, ZERO))
        return Reduce("sum", tuple(ranks), (value,)) if ranks else value

    @staticmethod
    def _identical(share: Contribution, target: tuple[str, ...], rank: str) -> bool:
        """Whether the target's rank is read bare at its own axis and nowhere else among the indices."""
        places = [i for i, index in enumerate(share.indices) if rank in ranks_named(index)]
        return len(places) == 1 and share.indices[places[0]] == Rank(rank) and target[places[0]] == rank

    def _solve(
        self, index: Expr, own: str, ranks: list[str], origin: dict[str, str]
    ) -> tuple[str, Expr, list[Expr]] | None:
        """Solve ``index = own`` for a rank that it holds with a constant factor: (rank, its value, the tests that it is one)."""
        linear = affine(index)
        if linear is None:
            return None
        coefficients, constant = linear
        for rank, factor in sorted(coefficients.items(), key=lambda t: (abs(t[1]) != 1, t[0])):
            if rank not in ranks or factor <= 0:
                continue
            rest: Expr = Rank(own)
            for other, k in coefficients.items():
                if other != rank and k:
                    term: Expr = Rank(other) if abs(k) == 1 else Call("mul", (Const(abs(k)), Rank(other)))
                    rest = Call("sub" if k > 0 else "add", (rest, term))
            if constant:
                rest = Call("sub" if constant > 0 else "add", (rest, Const(abs(constant))))
            value = rest if factor == 1 else Call("floordiv", (rest, Const(factor)))
            if isinstance(value, Rank):
                return rank, value, []
            size = Extent(origin.get(rank, rank))
            tests: list[Expr] = [Call("and", (Call("ge", (value, Const(0))), Call("lt", (value, size))))]
            if factor != 1:
                tests.append(Call("eq", (Call("mod", (rest, Const(factor))), Const(0))))
            return rank, value, tests
        return None

    def _fresh(self, base: str) -> str:
        name, number = base, 1
        while name in self.taken or name.endswith("_"):
            number += 1
            name = f"{base}{number}"
        self.taken.add(name)
        return name


# Expressions


def times(a: Expr, b: Expr) -> Expr:
    if b == ONE:
        return a
    if isinstance(b, Call) and b.op == "neg" and b.args[0] == ONE:
        return Call("neg", (a,))
    return Call("mul", (a, b))


def derivative(e: Call, i: int) -> Expr | None:
    """∂e/∂(argument i), from the op table; None where there is none."""
    op = OPS[e.op]
    if op.derivative is None or op.derivative[i] is None:
        return None
    text = op.derivative[i]
    assert text is not None
    names = {"a": e.args[0], "b": e.args[1] if len(e.args) > 1 else ZERO, "c": e.args[-1], "y": e}
    template = parse_expr(text, names)
    return transform(
        transform(template, lambda n: names[n.tensor] if isinstance(n, Access) and n.tensor in names else n), _folded
    )


def _folded(e: Expr) -> Expr:
    """Integer arithmetic on literals, as the exponent of a power's derivative needs it."""
    if isinstance(e, Call) and e.op in ("sub", "mul") and len(e.args) == 2:
        a, b = (literal_value(x) for x in e.args)
        if type(a) is int and type(b) is int:
            n = a - b if e.op == "sub" else a * b
            return Const(n) if n >= 0 else Call("neg", (Const(-n),))
    return e


def rename(e: Expr, names: dict[str, str]) -> Expr:
    """Rename ranks, bound or free; an extent stays under the old name, whose size the new one has."""
    if not names:
        return e

    def one(n: Expr) -> Expr:
        match n:
            case Rank(name=name):
                return replace(n, name=names.get(name, name))
            case Reduce(ranks=ranks):
                return replace(n, ranks=tuple(names.get(r, r) for r in ranks))
            case _:
                return n

    return transform(e, one)


def unshadow(e: Expr, scope: set[str], taken: set[str]) -> Expr:
    """Give a reduction's rank another name where it shadows one in scope."""
    if isinstance(e, Reduce):
        names: dict[str, str] = {}
        for r in e.ranks:
            if r in scope:
                number = 2
                while f"{r}_{number}" in taken:
                    number += 1
                names[r] = f"{r}_{number}"
                taken.add(names[r])
        e = replace(e, ranks=tuple(names.get(r, r) for r in e.ranks), args=tuple(rename(a, names) for a in e.args))
        scope = scope | set(e.ranks)
    kids = children(e)
    return rebuild(e, tuple(unshadow(k, scope, taken) for k in kids)) if kids else e


def affine(e: Expr) -> tuple[dict[str, int], int] | None:
    """An index as (coefficient of each rank, constant); None where it is not affine with constant coefficients."""
    match e:
        case Const(value=int() as value, kind="int"):
            return {}, value
        case Rank(name=name):
            return {name: 1}, 0
        case Call(op="neg", args=(a,)):
            inner = affine(a)
            return None if inner is None else ({r: -k for r, k in inner[0].items()}, -inner[1])
        case Call(op="add" | "sub" as op, args=(a, b)):
            left, right = affine(a), affine(b)
            if left is None or right is None:
                return None
            sign = 1 if op == "add" else -1
            total = dict(left[0])
            for r, k in right[0].items():
                total[r] = total.get(r, 0) + sign * k
            return total, left[1] + sign * right[1]
        case Call(op="mul", args=(a, b)):
            left, right = affine(a), affine(b)
            if left is None or right is None or (left[0] and right[0]):
                return None
            (terms, constant), factor = (right, left[1]) if not left[0] else (left, right[1])
            return {r: k * factor for r, k in terms.items()}, constant * factor
        case _:
            return None


# What the algebra knows


class Extremes:
    """Which maxima and minima the outputs depend on, by algebra: the others keep exponentials small and nothing else."""

    def __init__(self, c: Cascade) -> None:
        self.reader = Reader(c, Reductions("full", c.numerics))
        self.reader.read()
        self.used: set[bytes] = set()
        stack: list[Value] = [self.reader.forms[o] for o in c.outputs if o in self.reader.forms]
        stack += [v for values in self.reader.opaque.values() for v in values]
        while stack:
            v = stack.pop()
            if v.digest in self.used:
                continue
            self.used.add(v.digest)
            if isinstance(v, Atom):
                stack.extend(v.args)
            else:
                for m in v.terms:
                    stack.extend(parts_of(m))

    def dead(self, node: Reduce) -> bool:
        """Whether no output depends on this extreme."""
        found = _extremes(self.reader.form(node))
        return bool(found) and not any(a.digest in self.used for a in found)


def _extremes(v: Form) -> list[Atom]:
    found: list[Atom] = []
    stack: list[Value] = [v]
    while stack:
        x = stack.pop()
        if isinstance(x, Atom):
            if x.kind == "red" and x.name in ("max", "min"):
                found.append(x)
                continue
            stack.extend(x.args)
        else:
            for m in x.terms:
                stack.extend(parts_of(m))
    return found


@dataclass(frozen=True, slots=True)
class Partition:
    """A sum ``Σ_k exp(score - offset)``: the score varies over k, the offset does not."""

    score: Form
    offset: Form
    atom: Atom


class NormaliserFinder:
    """Recognises sums of exponentials by their normal forms, read as they are written."""

    def __init__(self, c: Cascade) -> None:
        self.c = c
        self.reader = Reader(c, Reductions("none", c.numerics))
        self.reader.read()
        self.full = Reader(c, Reductions("full", c.numerics))
        self.full.read()
        self.scores: dict[str, bytes] = {}

    def find(self, node: Reduce) -> Partition | None:
        """The normaliser that a sum is, or None."""
        value = self.reader.form(node)
        atom = value.atom
        if atom is None or atom.kind != "red" or atom.name != "sum":
            return None
        body = atom.args[0]
        if not isinstance(body, Form) or body.single is None:
            return None
        m, q = body.single
        if q != 1 or m.factors or m.exponent is None or m.brackets or not m.exponent.free & set(atom.ranks):
            return None
        over = set(atom.ranks)
        offset = Form({t: -k for t, k in m.exponent.terms.items() if not t.free & over and t.reduced & over})
        score = Form({t: k for t, k in m.exponent.terms.items() if t.free & over or not t.reduced & over})
        return Partition(score, offset, atom)

    def is_logarithm(self, tensor: str, found: Partition) -> bool:
        """Whether a tensor of the cascade is, by algebra, the log-sum-exp of this normaliser's scores."""
        value = self.full.forms.get(tensor)
        if not isinstance(value, Form) or value.atom is None or value.atom.name != "log":
            return False
        inner = value.atom.args[0]
        if not isinstance(inner, Form) or inner.atom is None or inner.atom.name != "sum":
            return False
        body = inner.atom.args[0]
        same = isinstance(body, Form) and body.single is not None and body.single[0].exponent == self._full_score(found)
        return bool(same and isinstance(body, Form) and body.single is not None and not body.single[0].factors)

    def _full_score(self, found: Partition) -> Form | None:
        name = self.tensor_of(found.score)
        if name is None:
            return found.score
        value = self.full.forms.get(name.tensor)
        return value if isinstance(value, Form) else None

    def tensor_of(self, score: Form) -> Access | None:
        """A tensor of the cascade that holds the score, as an access over its own ranks."""
        atom = score.atom
        if (
            atom is not None
            and atom.kind == "access"
            and all(isinstance(i, Form) and i.atom is not None for i in atom.args)
        ):
            return Access(
                atom.name, tuple(Rank(i.atom.name) for i in atom.args if isinstance(i, Form) and i.atom is not None)
            )
        for name, value in self.reader.forms.items():
            if value.digest == score.digest:
                return Access(name, tuple(Rank(r) for r in self.c.einsum_of[name].output.ranks))
        return None

    def expression(self, f: Form) -> Expr:
        """A form in the cascade's own names where statements compute parts of it."""
        names = {v.digest: n for n, v in self.reader.forms.items() if isinstance(v, Form) and v.constant is None}

        def named(x: Form) -> Expr | None:
            name = names.get(x.digest)
            return None if name is None else Access(name, tuple(Rank(r) for r in self.c.einsum_of[name].output.ranks))

        return Lowering(lambda a: named(lift(a)) if a.kind == "red" else None, named=named).float(f)

    def cut(self, found: Partition, over: tuple[str, ...]) -> tuple[tuple[str, int], ...]:
        """Outputs through which alone the normaliser acts, each as (tensor, a) with T = exp(a lse) · (what does not depend on it).

        Empty where another tensor without the ranks stands between, or the dependence is no power: then the gradient goes
        the way that the text goes.
        """
        users = self._users(found)
        if users is None:
            return ()
        result = []
        for name in users:
            value = self.full.forms.get(name)
            if not isinstance(value, Form):
                return ()
            atom = value.atom
            if atom is not None and atom.kind == "cast" and isinstance(atom.args[0], Form):
                value = atom.args[0]
            power = self._power(value, found, over)
            if power is None or name not in self.c.outputs:
                return ()
            result.append((name, power))
        return tuple(result)

    def _users(self, found: Partition) -> list[str] | None:
        """The first tensors without the reduced ranks that depend on the normaliser; None if one of them is not an output."""
        over = set(found.atom.ranks)
        tainted: set[str] = set()
        ends: list[str] = []
        for e in self.c.einsums:
            value = self.reader.forms.get(e.name)
            holds = isinstance(value, Form) and _contains(value, found.atom)
            reads = set(tensors_read(e.expr)) & tainted
            direct = any(
                isinstance(n, Reduce) and self.reader.form(n) == lift(found.atom)
                for n in walk(e.expr)
                if isinstance(n, Reduce) and n.op == "sum" and not isinstance(e.expr, Reduce)
            )
            if value is not None and isinstance(value, Form) and value == lift(found.atom):
                tainted.add(e.name)
                continue
            if not (reads or direct):
                continue
            if not holds:
                return None
            if over & set(e.output.ranks) and not e.reductions:
                tainted.add(e.name)
            else:
                ends.append(e.name)
        read_later = {t for e in self.c.einsums for t in tensors_read(e.expr)}
        if not ends or any(n in read_later or n not in self.c.outputs for n in ends):
            return None
        return ends

    def _power(self, value: Form, found: Partition, over: tuple[str, ...]) -> int | None:
        if value.single is None:
            return None
        m, _ = value.single
        score = self._full_score(found)
        for a, p in m.factors:
            body = a.args[0] if a.kind == "red" and a.name == "sum" and a.ranks == over else None
            if isinstance(body, Form) and body.single is not None:
                t, q = body.single
                if q == 1 and not t.factors and not t.brackets and t.exponent == score:
                    others = [b for b, _ in m.factors if b != a]
                    return None if any(_contains(lift(b), a) for b in others) else p
        return None


def _contains(v: Value, atom: Atom) -> bool:
    seen: set[bytes] = set()
    stack: list[Value] = [v]
    while stack:
        x = stack.pop()
        if x.digest in seen:
            continue
        seen.add(x.digest)
        if isinstance(x, Atom):
            if x.digest == atom.digest:
                return True
            stack.extend(x.args)
        else:
            for m in x.terms:
                stack.extend(parts_of(m))
    return False
