"""Work: what a cascade costs as written, as formulas in the extents.

Each Einsum counts its operations by unit and the bytes that it reads and writes when it runs alone. Nothing here
depends on a mapping: a value is computed once for each coordinate of the ranks that it varies with, each tensor is read
once, and both branches of a `where` are counted. Arithmetic on coordinates alone (indices, masks such as ``q >= k``)
and conversions between types are free.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..ir.cascade import (
    Access,
    Call,
    Cascade,
    Cast,
    Const,
    Einsum,
    Expr,
    Monoid,
    Rank,
    Reduce,
    children,
    free_ranks,
    tensors_read,
    walk,
)
from ..ir.dtypes import DTYPES
from ..ir.extents import extent_of, is_affine
from ..ir.ops import OPS, REDUCTIONS
from ..ir.print import print_expr
from ..ir.types import tensor_types
from ..ir.verify import component_dependence

UNITS = ("matrix", "vector", "special")


@dataclass(frozen=True, slots=True)
class Poly:
    """A polynomial in extents, such as ``2·q·k·d + q·k``: terms of sizes multiplied, each with its coefficient.

    A size is a rank's name, or what a parameter's derived axis is called: ``ceil(k/8)``.
    """

    terms: tuple[tuple[tuple[str, ...], int], ...] = ()

    def __add__(self, other: Poly) -> Poly:
        found = dict(self.terms)
        for sizes, coefficient in other.terms:
            found[sizes] = found.get(sizes, 0) + coefficient
        kept = [(sizes, coefficient) for sizes, coefficient in found.items() if coefficient]
        return Poly(tuple(sorted(kept, key=lambda term: (-len(term[0]), term[0]))))

    def times(self, factor: int) -> Poly:
        return Poly(tuple((sizes, factor * coefficient) for sizes, coefficient in self.terms if factor))

    def at(self, sizes: Mapping[str, int]) -> int:
        """The value; ``sizes`` are those of `sizes_of`."""
        total = 0
        for names, value in self.terms:
            for name in names:
                value *= sizes[name]
            total += value
        return total

    def formula(self) -> str:
        """The formula as a program would write it: ``2*q*k*d + 4*ceil(k/8)``."""
        return " + ".join(_term(names, value) for names, value in self.terms) or "0"

    def __str__(self) -> str:
        text = self.formula().replace("*", "·")
        while "ceil(" in text:
            before, _, after = text.partition("ceil(")
            inside, _, after = after.partition(")")
            text = f"{before}⌈{inside}⌉{after}"
        return text


def _term(names: tuple[str, ...], value: int) -> str:
    factors = [] if value == 1 and names else [str(value)]
    return "*".join([*factors, *names])


def total(polys: Iterable[Poly]) -> Poly:
    """The sum."""
    result = Poly()
    for p in polys:
        result += p
    return result


@dataclass(frozen=True, slots=True)
class Work:
    """What one Einsum does: its iteration space, operations by unit, bytes read and written by tensor.

    A multiply-add of a contraction with two matrices counts as two operations of the unit "matrix"; "special" are
    exponentials and their like, "vector" all else.
    """

    space: tuple[str, ...]
    operations: Mapping[str, Poly]
    reads: Mapping[str, Poly]
    writes: Mapping[str, Poly]

    @property
    def bytes_read(self) -> Poly:
        return total(self.reads.values())

    @property
    def bytes_written(self) -> Poly:
        return total(self.writes.values())


def work(c: Cascade) -> tuple[Work, ...]:
    """The work of every Einsum, in order.

    Attention's ``S[q, k] = sum[d](Q[q, d] * K[k, d])`` over f32 has the space ``(q, k, d)`` and ``2·q·k·d`` matrix
    operations, reads ``4·q·d`` and ``4·k·d`` bytes and writes ``4·q·k``.
    """
    counter = _Counter(c)
    return tuple(counter.einsum(e) for e in c.einsums)


def operations(works: Iterable[Work]) -> dict[str, Poly]:
    """Operations by unit, summed."""
    every = tuple(works)
    return {unit: total(w.operations[unit] for w in every) for unit in UNITS}


def least_bytes(c: Cascade) -> Poly:
    """Bytes that any execution moves: what is read of each parameter, and each result, once."""
    counter = _Counter(c)
    reads = counter.reads(c.einsums)
    moved = [reads[p.name] for p in c.params if p.name in reads]
    return total([*moved, *(counter.tensor_bytes(name) for name in c.outputs)])


def tensor_bytes(c: Cascade) -> dict[str, Poly]:
    """The size of every tensor in bytes, parameters first."""
    counter = _Counter(c)
    return {name: counter.tensor_bytes(name) for name in counter.types}


def sizes_of(c: Cascade, extents: Mapping[str, int]) -> dict[str, int]:
    """The value of every size that a `Poly` of this cascade may hold."""
    found = dict(extents)
    for p in c.params:
        for index in p.indices:
            value = extent_of(index, extents)
            if not isinstance(index, Rank | Const) and value is not None:
                found[axis_size(index)] = value
    return found


def axis_size(index: Expr) -> str:
    """What the size of an axis is called: ``k``, ``8``, ``ceil(k/8)``, ``size(2 * p + r)``."""
    match index:
        case Rank() | Const():
            return print_expr(index)
        case Call(op="floordiv", args=(Rank(name=rank), Const(value=by))):
            return f"ceil({rank}/{by})"
        case _:
            return f"size({print_expr(index)})"


class _Counter:
    """Counts over one cascade; monomials list the results' ranks first, then those of the other tensors in order."""

    def __init__(self, c: Cascade) -> None:
        self.c = c
        results = [r for name in c.outputs for r in next(o.ranks for o in c.einsum_of[name].outputs if o.name == name)]
        written = [r for e in c.einsums for r in e.ranks]
        self.order = {rank: place for place, rank in enumerate(dict.fromkeys([*results, *written, *c.ranks]))}
        self.types = tensor_types(c)

    def product(self, ranks: Iterable[str], coefficient: int = 1) -> Poly:
        """The number of coordinates of a space, times a coefficient."""
        return Poly(((tuple(sorted(set(ranks), key=self.order.__getitem__)), coefficient),))

    def einsum(self, e: Einsum) -> Work:
        spent = {unit: Poly() for unit in UNITS}
        stack: list[Expr] = [e.expr]
        while stack:
            node = stack.pop()
            for unit, amount in self.node(node):
                spent[unit] += amount
            # Indices are addresses, not arithmetic.
            stack.extend(() if isinstance(node, Access) else children(node))
        reduced = [r for reduction in e.reductions for r in reduction.ranks]
        return Work(
            tuple(dict.fromkeys([*e.ranks, *reduced])),
            spent,
            self.reads((e,)),
            {o.name: self.tensor_bytes(o.name) for o in e.outputs},
        )

    def node(self, e: Expr) -> list[tuple[str, Poly]]:
        """The operations of one node, without those below it."""
        match e:
            case Call(op=name) if not is_affine(e):
                unit, amount = OPS[name].cost
                return [(unit, self.product(free_ranks(e), amount))]
            case Reduce(op=name, ranks=ranks):
                space = free_ranks(e) | set(ranks)
                if name in self.c.monoid_of:
                    return self.combination(e, self.c.monoid_of[name])
                if is_contraction(e):
                    # The outermost product of the argument joins its addition, so it leaves the vector unit.
                    return [("matrix", self.product(space, 2)), ("vector", self.product(free_ranks(e.arg), -1))]
                combine = REDUCTIONS[name].combine
                unit, amount = OPS[combine].cost if combine else ("vector", 1)
                return [(unit, self.product(space, amount))]
            case _:
                return []

    def combination(self, e: Reduce, m: Monoid) -> list[tuple[str, Poly]]:
        """A monoid's body, each value over the ranks that it varies with."""
        arguments = [free_ranks(a) | set(e.ranks) for a in e.args]
        state = [frozenset().union(*(arguments[i] for i in needed)) for needed in component_dependence(m)]
        spaces = dict(zip(m.params, state + state, strict=True))
        spent = []
        for name, value in m.body:
            spaces[name] = frozenset().union(*(spaces[t] for t in tensors_read(value)))
            for node in walk(value):
                if isinstance(node, Call) and not is_affine(node):
                    unit, amount = OPS[node.op].cost
                    varies = frozenset().union(*(spaces[t] for t in tensors_read(node)))
                    spent.append((unit, self.product(varies, amount)))
        return spent

    def reads(self, einsums: Iterable[Einsum]) -> dict[str, Poly]:
        """Bytes read by tensor; an Einsum's own earlier entries stay with it and are not read."""
        found: dict[str, set[Poly]] = {}
        for e in einsums:
            own = {o.name for o in e.outputs}
            for node in walk(e.expr):
                if isinstance(node, Access) and node.tensor not in own:
                    found.setdefault(node.tensor, set()).add(self.access(node))
        # Two ways to read a tensor may cover all of it; they cannot cover more.
        return {name: ways.pop() if len(ways) == 1 else self.tensor_bytes(name) for name, ways in found.items()}

    def access(self, e: Access) -> Poly:
        """Bytes that an access touches: each axis whole, or one entry by a literal; a gather, once a use."""
        width = DTYPES[self.types[e.tensor]].bits // 8
        if not all(is_affine(index) for index in e.indices):
            return self.product(free_ranks(e), width)
        axes = self.c.indices_of(e.tensor)
        return self._axes([a for a, i in zip(axes, e.indices, strict=True) if not isinstance(i, Const)], width)

    def tensor_bytes(self, name: str) -> Poly:
        return self._axes(self.c.indices_of(name), DTYPES[self.types[name]].bits // 8)

    def _axes(self, axes: Iterable[Expr], coefficient: int) -> Poly:
        ranks, derived = [], []
        for axis in axes:
            match axis:
                case Rank(name=rank):
                    ranks.append(rank)
                case Const(value=size):
                    coefficient *= int(size)
                case _:
                    derived.append(axis_size(axis))
        return Poly((((*sorted(ranks, key=self.order.__getitem__), *derived), coefficient),))


def is_contraction(e: Reduce) -> bool:
    """Whether a matrix unit could do it: a sum over products of two values, each with a rank that the other lacks."""
    if e.op != "sum" or not (isinstance(e.arg, Call) and e.arg.op == "mul"):
        return False
    spaces = [free_ranks(f) for f in factors(e.arg)]
    inner = [s for s in spaces if s & set(e.ranks)]
    return any(a - b and b - a for n, a in enumerate(inner) for b in inner[n + 1 :])


def factors(e: Expr) -> list[Expr]:
    """The factors of a product, left to right; casts of a product are looked through."""
    match e:
        case Call(op="mul", args=(a, b)):
            return factors(a) + factors(b)
        case Cast(arg=Call(op="mul") as arg):
            return factors(arg)
        case _:
            return [e]
