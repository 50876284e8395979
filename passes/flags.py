"""What masks leave out, written out: the oracle's flags as conditions that plain numbers can keep to.

The oracle carries a flag beside each value (`ir.scalar`): whether it is the 0 or the -inf of what a mask left out. In
normal form brackets say the same (`emptiness`), where the algebra follows them. Here flags become expressions, for
what it does not follow and for a cascade that runs as it is written:

    A[k] = where(k < n, X[k], -inf)                 A[k] = where(k < n, X[k], -inf)
    B[k] = exp(A[k] - M)                     ->     B[k] = exp(where(~(k < n), -inf, A[k] - M))
    C = sum[k](B[k] * V[k])                         C = sum[k](where(~(k < n), 0.0, B[k] * V[k]))

A flag that is more than a condition on coordinates gets a tensor of bools; a monoid's state gets components for its
flags.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from ..ir.cascade import (
    Access,
    Call,
    Cascade,
    Const,
    Einsum,
    Expr,
    Monoid,
    Output,
    Rank,
    Reduce,
    children,
    free_ranks,
    is_minus_infinity,
    substitute,
    tensors_read,
    walk,
)
from ..ir.errors import CastileError
from ..ir.types import TypeChecker, is_float, tensor_types
from ..ir.verify import scan_step, verify
from .extent import with_extents
from .flagged import flagged_monoid
from .fresh import fresh
from .masked import NEVER, Expressions, Flags, rounded

# Nodes of a condition that is written wherever it is asked for.
LIGHT = 24

# Nodes of a cascade with its flags written out, for each of those that it has without.
GROWTH = 16


def written_out(c: Cascade) -> Cascade:
    """The cascade with every flag written out, so that it means the same without flags; itself where there are none."""
    return _written(c, everything=True)


def followable(c: Cascade) -> Cascade:
    """The cascade with flags written out where the algebra does not follow brackets: scans, monoids, products and
    minima over a rank, sums of -inf, and functions of masked zeros."""
    return _written(c, everything=False)


def _written(c: Cascade, everything: bool) -> Cascade:
    if not any(n.op == "where" and any(map(is_minus_infinity, n.args)) for e in c.einsums for n in _calls(e)):
        return c
    try:
        found = _Writer(c, everything).run()
        if found == c:
            return c
        found = with_extents(c, found)
        verify(found)
    except CastileError:  # deeper or wider than the language allows
        return c
    return found


def _calls(e: Einsum) -> list[Call]:
    return [n for n in walk(e.expr) if isinstance(n, Call)]


def _guarded(e: Expr, guard: Expr | None = None) -> Iterator[tuple[Reduce, Expr | None]]:
    """The reductions inside an expression, each with the condition under which the `where`s around it let it be read.

    Where a reduction between them binds a rank anew, it is read if the condition holds anywhere along the rank.
    """
    match e:
        case Call(op="where", args=(p, a, b)):
            yield from _guarded(p, guard)
            for condition, branch in ((p, a), (Call("not", (p,)), b)):
                nested = condition if guard is None else Call("where", (guard, condition, Const(False)))
                yield from _guarded(branch, nested)
        case Reduce(ranks=ranks):
            own = guard and _anywhere(guard, ranks)
            yield e, own
            for kid in children(e):
                yield from _guarded(kid, own)
        case _:
            for kid in children(e):
                yield from _guarded(kid, guard)


def _anywhere(p: Expr, ranks: Sequence[str]) -> Expr:
    bound = tuple(r for r in ranks if r in free_ranks(p))
    return Reduce("any", bound, (p,)) if bound else p


@dataclass
class _Writer(Expressions):
    """Writes the flags of one cascade out."""

    c: Cascade
    everything: bool
    known: dict[int, tuple[Expr, Flags]] = field(default_factory=dict)
    sizes: dict[int, tuple[Expr, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.types = tensor_types(self.c)
        self.checker = TypeChecker(self.types, self.c.monoid_of)
        self.taken = set(self.types) | set(self.c.ranks) | {m.name for m in self.c.monoids}
        # The flags of tensors over their own ranks, once asked for, and the tensors of bools that hold them.
        self.of: dict[str, Flags] = {}
        self.holders: dict[str, list[Einsum]] = {}
        self.monoids: list[Monoid] = []
        self.opaque: set[str] = set()
        self.ranks = {o.name: o.ranks for e in self.c.einsums for o in e.outputs}
        # Reductions by a monoid that stand inside an expression, with the conditions on them; what each became.
        self.liftable: dict[int, Expr | None] = {}
        self.lifted: dict[int, Expr | None] = {}
        self.before: list[Einsum] = []

    def run(self) -> Cascade:
        written: list[Einsum] = []
        for e in self.c.einsums:
            state = self._state(e)
            found = [x for a in state.args for x in _guarded(a)] if state is not None else _guarded(e.expr)
            self.liftable = {id(n): p for n, p in found if n.op in self.c.monoid_of and e.name not in tensors_read(n)}
            if state is not None:
                made = [self._monoid(e, state)]
            elif scan_step(e) is not None:
                flags, scan = self._scan(e)
                made = [*flags, scan]
            else:
                value = self.value(e.expr)
                made = [e if value is e.expr else replace(e, expr=value)]
            written += [*self.before, *made]
            self.before = []
        sizes = [sum(self.size(e.expr) for e in x) for x in (self.c.einsums, written)]
        if sizes[1] > GROWTH * sizes[0] + 1000:
            return self.c
        einsums = _read([x for e in written for x in (e, *self.holders.get(e.name, ()))], set(self.c.einsum_of))
        used = {n.op for e in einsums for n in e.reductions}
        monoids = [m for m in (*self.c.monoids, *self.monoids) if m.name in used or m in self.c.monoids]
        return replace(self.c, einsums=tuple(einsums), monoids=tuple(monoids))

    # Tensors

    def stays(self, e: Access) -> bool:
        return e.tensor in self.opaque

    def access(self, e: Access) -> Flags:
        if e.tensor not in self.ranks:
            return NEVER
        if e.tensor not in self.of:
            self.of[e.tensor] = self._tensor(e.tensor)
        own = self.of[e.tensor]
        places = dict(zip(self.ranks[e.tensor], map(self.value, e.indices), strict=True)) if own else {}
        return Flags(*(None if p is None else substitute(p, places) for p in (own.zero, own.minus)))

    def _tensor(self, name: str) -> Flags:
        """The flags of a map's or a reduction's tensor."""
        e = self.c.einsum_of[name]
        self.of[name] = NEVER  # a scan or a monoid that was given up
        own = rounded(self.flags(e.expr), e.output.dtype) if is_float(self.types[name]) else NEVER
        zero = self._held(e, "zero", own.zero)
        return Flags(zero, self._held(e, "masked", own.minus))

    def _held(self, e: Einsum, kind: str, p: Expr | None) -> Expr | None:
        """A condition over a tensor's ranks, in a tensor of its own where it is more than one on coordinates."""
        if p is None or self._is_light(p):
            return p
        name = fresh(f"{e.name}_{kind}", self.taken)
        self.types[name] = "bool"
        self.holders.setdefault(e.name, []).append(Einsum((Output(name, e.output.ranks),), p))
        return Access(name, tuple(map(Rank, e.output.ranks)))

    def _is_light(self, p: Expr) -> bool:
        """Whether a condition can stand wherever it is asked for: it reduces nothing and reads flags alone."""
        if self.size(p) > LIGHT:
            return False
        nodes = list(walk(p))
        reads = [n for n in nodes if isinstance(n, Access)]
        known = all(n.tensor not in self.c.param_of and n.tensor not in self.c.einsum_of for n in reads)
        return known and not any(isinstance(n, Reduce) for n in nodes)

    # Scans

    def _scan(self, e: Einsum) -> tuple[list[Einsum], Einsum]:
        """A scan with the scans of its flags before it."""
        names = {kind: fresh(f"{e.name}_{kind}", self.taken) for kind in ("zero", "masked")}
        here = tuple(map(Rank, e.output.ranks))
        zero, minus = (Access(name, here) for name in names.values())
        self.types |= dict.fromkeys(names.values(), "bool")
        now, own = NEVER, self._scanned(e, NEVER)
        while (then := Flags(zero if own.zero else now.zero, minus if own.minus else now.minus)) != now:
            now, own = then, self._scanned(e, then)
        made = [
            Einsum((Output(name, e.output.ranks),), p or Const(False))
            for name, p, kept in zip(names.values(), (own.zero, own.minus), (now.zero, now.minus), strict=True)
            if kept is not None
        ]
        others = {e.name, *(x.name for x in made)}
        if any(set(tensors_read(x.expr)) & others - {y.name for y in made[: i + 1]} for i, x in enumerate(made)):
            # A flag that hangs on the scan's own values would be one scan with it.
            made, now = [], NEVER
            self._scanned(e, NEVER)
        if made:
            self.opaque.add(e.name)
        value = self.value(e.expr)
        return made, e if value is e.expr else replace(e, expr=value)

    def _scanned(self, e: Einsum, before: Flags) -> Flags:
        """The flags of a scan's step, given those of the entries that it reads."""
        self.of[e.name] = before
        self.known.clear()
        return rounded(self.flags(e.expr), e.output.dtype) if is_float(self.types[e.name]) else NEVER

    # Monoids

    def fold(self, e: Reduce) -> Expr | None:
        return self._lifted(e) if id(e) in self.liftable else None

    def _state(self, e: Einsum) -> Reduce | None:
        """The reduction by a monoid that an Einsum is, as far as its outputs can hold flags as well."""
        if not isinstance(e.expr, Reduce) or e.expr.op not in self.c.monoid_of:
            return None
        alone = e.output.dtype is None and set(e.ranks).isdisjoint(e.expr.ranks)
        return e.expr if alone or len(e.outputs) > 1 else None

    def _lifted(self, e: Reduce) -> Expr | None:
        """A reduction by a monoid inside an expression, as a tensor of its own if its elements may be masked."""
        if id(e) not in self.lifted:
            self.lifted[id(e)] = self._tensor_of(self._under(e, self.liftable[id(e)]))
        return self.lifted[id(e)]

    def _under(self, e: Reduce, p: Expr | None) -> Reduce:
        """A reduction whose elements are read under a condition alone."""
        if p is None:
            return e
        nought = [Const(False) if self.checker.infer(a) == "bool" else Const(0) for a in e.args]
        return replace(e, args=tuple(Call("where", (p, a, n)) for a, n in zip(e.args, nought, strict=True)))

    def _tensor_of(self, e: Reduce) -> Expr | None:
        free = free_ranks(e)
        ranks = tuple(r for r in self.c.ranks if r in free)
        found = self._flagged((Output(fresh(f"T_{e.op}", self.taken), ranks),), e)
        if found is None:
            return None
        self.types[found.name] = self.checker.state_types(e)[0]
        self.before.append(found)
        return Access(found.name, tuple(map(Rank, ranks)))

    def _monoid(self, e: Einsum, reduce: Reduce) -> Einsum:
        found = self._flagged(e.outputs, reduce)
        if found is not None:
            return replace(e, outputs=found.outputs, expr=found.expr)
        self.of |= dict.fromkeys((o.name for o in e.outputs), NEVER)
        args = tuple(self.value(a) for a in reduce.args)
        same = all(a is b for a, b in zip(args, reduce.args, strict=True))
        return e if same else replace(e, expr=replace(reduce, args=args))

    def _flagged(self, outputs: tuple[Output, ...], reduce: Reduce) -> Einsum | None:
        """A reduction by a monoid whose state holds flags as well; None where no element may be masked."""
        own = [self.flags(a) for a in reduce.args]
        shadowed = any(not set(o.ranks).isdisjoint(reduce.ranks) for o in outputs)
        if not any(own) or shadowed:
            return None
        args = tuple(self.value(a) for a in reduce.args)
        m, types = self.c.monoid_of[reduce.op], self.checker.state_types(reduce)
        monoid, components = flagged_monoid(m, types, own, fresh(f"{m.name}_flagged", self.taken))
        self.monoids.append(monoid)
        more, flags = [], []
        self.of |= dict.fromkeys((o.name for o in outputs), NEVER)
        for i, kind in components:
            o = outputs[i]
            name = fresh(f"{o.name}_{kind}", self.taken)
            self.types[name] = "bool"
            more.append(Output(name, o.ranks))
            flags.append((own[i].zero if kind == "zero" else own[i].minus) or Const(False))
            held = Access(name, tuple(map(Rank, o.ranks)))
            now = self.of[o.name]
            self.of[o.name] = replace(now, zero=held) if kind == "zero" else replace(now, minus=held)
            self.opaque.add(o.name)
            self.ranks[o.name] = o.ranks
        return Einsum((*outputs, *more), replace(reduce, op=monoid.name, args=(*args, *flags)))


def _read(einsums: Sequence[Einsum], kept: set[str]) -> list[Einsum]:
    """The Einsums that are kept, and those of flags that somebody asks for."""
    wanted, found = set(kept), []
    for e in reversed(einsums):
        if any(o.name in wanted for o in e.outputs):
            found.append(e)
            wanted |= set(tensors_read(e.expr))
    return found[::-1]
