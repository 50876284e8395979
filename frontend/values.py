"""Tensors on their way from ATen to a cascade: which ranks index each dimension, and one expression over those ranks.

A view changes indices and computes nothing. A dimension of size 1 has no rank; one that a view has merged has several,
outermost first. What is computed once and read often gets a name: it becomes an Einsum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from ..ir.cascade import (
    Access,
    Call,
    Cast,
    Const,
    Einsum,
    Expr,
    Extent,
    Output,
    Rank,
    Reduce,
    free_ranks,
    literal_value,
    negative,
    transform,
    walk,
)
from ..ir.errors import CastileError
from ..ir.ops import RESERVED
from ..ir.types import TypeChecker, settle
from ..passes.casts import WITH_INFINITY

# An int, or a torch.SymInt where shapes are dynamic.
Size = Any
Dims = tuple[tuple[str, ...], ...]

# Nodes of an expression past which it gets a name though it is read once, so that depth stays far from the limit.
LARGEST = 60
# Nodes of an expression that may be computed twice in place of getting a name.
SMALL = 4


class Unsupported(CastileError):
    """castile has no cascade for this: it runs as it would without castile."""

    stage = "lower"


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor: for each dimension the ranks that index it, outermost first, and an element as an expression."""

    dims: Dims
    expr: Expr
    dtype: str

    @property
    def ranks(self) -> tuple[str, ...]:
        return tuple(r for dim in self.dims for r in dim)


def same(a: Size, b: Size) -> bool:
    """Whether two sizes are equal for certain; asks no question that would guard a dynamic shape."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return certain(a == b)


def divides(d: Size, n: Size) -> bool:
    """Whether d is known to divide n."""
    if isinstance(d, int) and isinstance(n, int):
        return d > 0 and n % d == 0
    return certain(n % d == 0)


def certain(claim: Any) -> bool:
    """Whether a claim about sizes holds whatever the dynamic ones are."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(claim))


def number(value: int | float | bool) -> Expr:
    """The literal of any Python number."""
    if isinstance(value, float) and math.isnan(value):
        return Call("sub", (Const(math.inf), Const(math.inf)))
    return Const(value) if isinstance(value, bool) else negative(value)


def call(op: str, *args: Expr) -> Expr:
    return Call(op, args)


def substitute(e: Expr, new: Mapping[str, Expr], sizes: Mapping[str, Size]) -> Expr:
    """Other expressions in place of ranks, given the sizes of all. The extent of a rank that goes by another name or is
    cut in two is that of the others; one that is read in part, or in a larger whole, keeps its own."""

    def one(n: Expr) -> Expr:
        match n:
            case Rank(name=name):
                return new.get(name, n)
            case Extent(rank=name) if name in new:
                ranks = [x.name for x in walk(new[name]) if isinstance(x, Rank)]
                whole = same(product(sizes[r] for r in ranks), sizes[name])
                return _product([Extent(r) for r in ranks]) if whole else n
            case _:
                return n

    return transform(e, one) if new else e


def product(sizes: Iterable[Size]) -> Size:
    """The size of several dimensions together."""
    whole: Size = 1
    for n in sizes:
        whole = whole * n
    return whole


def _product(factors: Sequence[Expr]) -> Expr:
    found: Expr | None = None
    for f in factors:
        found = f if found is None else call("mul", found, f)
    return Const(1) if found is None else found


@dataclass
class Workspace:
    """A cascade while it grows: the sizes of ranks, the parameters, the Einsums so far.

    ``may_hide`` says of a parameter whether it may be a mask of numbers as low as -1e38, for all that is known."""

    sizes: dict[str, Size] = field(default_factory=dict)
    params: dict[str, tuple[str, tuple[Size, ...]]] = field(default_factory=dict)
    scalars: dict[str, str] = field(default_factory=dict)
    einsums: list[Einsum] = field(default_factory=list)
    types: dict[str, str] = field(default_factory=dict)
    may_hide: Callable[[str], bool] = lambda _: True

    # Names

    def rank(self, size: Size) -> str:
        name = f"r{len(self.sizes)}"
        self.sizes[name] = size
        return name

    def _numbered(self, base: str, first: int) -> str:
        """The first unused name of a base and a number from ``first`` on: `write` numbers names as well."""
        return next(name for i in count(first) if (name := f"{base}{i}") not in self.types)

    def _unused(self, base: str) -> str:
        if base in RESERVED:
            base += "_"
        if base not in self.types:
            return base
        return self._numbered(base, 2)

    # Where values come from

    def tensor(self, dtype: str, sizes: Sequence[Size]) -> tuple[str, Value]:
        """A new parameter, and what it holds."""
        name = self._numbered("x", len(self.params))
        self.params[name] = (dtype, tuple(sizes))
        self.types[name] = dtype
        dims = tuple(() if same(n, 1) else (self.rank(n),) for n in sizes)
        indices = tuple(Rank(d[0]) if d else Const(0) for d in dims)
        return name, Value(dims, Access(name, indices or (Const(0),)), dtype)

    def scalar(self, dtype: str) -> tuple[str, Value]:
        name = self._numbered("n", len(self.scalars))
        self.scalars[name] = dtype
        self.types[name] = dtype
        return name, Value((), Access(name), dtype)

    def infer(self, e: Expr) -> str:
        """The dtype of an expression. Raises `VerifyError` where it has none."""
        return settle(TypeChecker(self.types, {}).infer(e))

    def cast(self, v: Value, dtype: str) -> Value:
        """The value in a dtype, converted only if it is of another."""
        found = self.infer(v.expr)
        # Coordinates are far below what an i32 holds, and a predicate over them is to stay affine.
        kept = found == dtype or (found == "i64" and dtype == "i32" and is_coordinate(v.expr))
        # Nor is an infinity rounded: where a mask chooses it, it is to be seen that it does.
        kept = kept or (dtype in WITH_INFINITY and abs(literal_value(v.expr) or 0.0) == math.inf)
        if not kept and "f64" in (found, dtype) and dtype != "bool" and not isinstance(v.expr, Const):
            # Rewrites take a conversion between f32 and f64 for none, and would compute in the wrong one of them.
            raise Unsupported(f"a conversion from {found} to {dtype}")
        return Value(v.dims, v.expr if kept else Cast(dtype, v.expr), dtype)

    # Names for what is computed

    def write(self, v: Value, base: str, ranks: Sequence[str]) -> Value:
        """An Einsum of its own that computes the value over the given ranks."""
        expr, declared = v.expr, None
        if isinstance(expr, Cast) and expr.dtype == v.dtype:
            expr = expr.arg
        if self.infer(expr) != v.dtype:
            declared = v.dtype
        name = self._unused(base)
        self.einsums.append(Einsum((Output(name, tuple(ranks), declared),), expr))
        self.types[name] = v.dtype
        return Value(v.dims, Access(name, tuple(map(Rank, ranks))), v.dtype)

    def named(self, v: Value, base: str) -> Value:
        """The value with its expression behind a name, unless it is small or varies with what is no dimension."""
        if is_small(v.expr) or not free_ranks(v.expr) <= set(v.ranks):
            return v
        free = free_ranks(v.expr)
        return self.write(v, base, [r for r in v.ranks if r in free])

    def short(self, v: Value, base: str) -> Value:
        """The value, with a name if its expression has grown long."""
        long = sum(1 for _ in walk(v.expr)) > LARGEST
        return self.named(v, base) if long else v

    def reduce(self, op: str, v: Value, axes: Sequence[int], keep: bool, base: str, dtype: str | None = None) -> Value:
        """A reduction over dimensions, as an Einsum."""
        over = tuple(r for a in axes for r in v.dims[a])
        dims = tuple(() if a in axes else d for a, d in enumerate(v.dims))
        left = Value(dims, v.expr, v.dtype)
        if over:
            left = Value(dims, Reduce(op, over, (v.expr,)), dtype or v.dtype)
            free = free_ranks(left.expr)
            if not free <= set(left.ranks):
                raise Unsupported("a reduction over what is no dimension")
            left = self.write(left, base, [r for r in left.ranks if r in free])
        if not keep:
            left = Value(tuple(d for a, d in enumerate(dims) if a not in axes), left.expr, left.dtype)
        return left

    def count(self, v: Value, axes: Sequence[int]) -> Expr:
        """The number of elements of some dimensions, as an expression."""
        return _product([Extent(r) for a in axes for r in v.dims[a]])

    # Ranks

    def renamed(self, v: Value, new: Mapping[str, Expr], dims: Dims) -> Value:
        return Value(dims, substitute(v.expr, new, self.sizes), v.dtype)

    def distinct(self, v: Value, taken: Sequence[str]) -> Value:
        """The value over ranks of which none is taken."""
        new = {r: self.rank(self.sizes[r]) for r in v.ranks if r in taken}
        if not new:
            return v
        dims = tuple(tuple(new.get(r, r) for r in d) for d in v.dims)
        return self.renamed(v, {old: Rank(r) for old, r in new.items()}, dims)

    def radix(self, high: Expr, low: str) -> Expr:
        """The index of two ranks that were one."""
        n = self.sizes[low]
        factor: Expr = Const(int(n)) if isinstance(n, int) else Extent(low)
        return call("add", call("mul", high, factor), Rank(low))

    def refine(self, a: Sequence[str], b: Sequence[str]) -> tuple[tuple[str, ...], dict[str, Expr], dict[str, Expr]]:
        """Two ways to index one dimension made one: the ranks, and what each way's old ranks are in terms of them."""
        left, right = list(a), list(b)
        found: list[str] = []
        new_left: dict[str, Expr] = {}
        new_right: dict[str, Expr] = {}

        def split(ranks: list[str], new: dict[str, Expr], low: Size) -> None:
            old = ranks.pop()
            size = self.sizes[old]
            inner = self.rank(low)
            outer = self.rank(size // low)
            new[old] = self.radix(Rank(outer), inner)
            ranks += [outer, inner]

        while left and right:
            m, n = self.sizes[left[-1]], self.sizes[right[-1]]
            if same(m, n):
                keep, drop = left.pop(), right.pop()
                found.append(keep)
                if keep != drop:
                    new_right[drop] = Rank(keep)
            elif divides(n, m):
                split(left, new_left, n)
            elif divides(m, n):
                split(right, new_right, m)
            else:
                raise Unsupported(f"a dimension is cut in two ways, by {m} and by {n}")
        if left or right:
            raise Unsupported("two dimensions of different sizes")
        return tuple(reversed(found)), _closed(new_left, self.sizes), _closed(new_right, self.sizes)

    def broadcast(self, values: Sequence[Value]) -> tuple[Dims, list[Expr]]:
        """The dimensions of several tensors after broadcasting, and an element of each over those."""
        rank = max((len(v.dims) for v in values), default=0)
        padded = [Value(((),) * (rank - len(v.dims)) + v.dims, v.expr, v.dtype) for v in values]
        dims: Dims = ((),) * rank
        done: list[Value] = []
        # The ranks of the largest are kept, so that what is reduced and read again keeps its name.
        order = sorted(range(len(padded)), key=lambda i: -len(padded[i].ranks))
        for v in (padded[i] for i in order):
            old: dict[str, Expr] = {}
            new: dict[str, Expr] = {}
            merged: list[tuple[str, ...]] = []
            for mine, theirs in zip(dims, v.dims, strict=True):
                if not mine or not theirs or mine == theirs:
                    merged.append(mine or theirs)
                    continue
                ranks, left, right = self.refine(mine, theirs)
                old |= left
                new |= right
                merged.append(ranks)
            mine_ranks = {r for d, m in zip(dims, merged, strict=True) if d for r in m}
            # A rank of theirs that stands elsewhere in ours is another coordinate.
            for i, d in enumerate(merged):
                if dims[i]:
                    continue
                fresh = {r: self.rank(self.sizes[r]) for r in d if r in mine_ranks}
                new |= {r: Rank(f) for r, f in fresh.items()}
                merged[i] = tuple(fresh.get(r, r) for r in d)
            dims = tuple(merged)
            if old:
                done = [Value(dims, substitute(x.expr, old, self.sizes), x.dtype) for x in done]
            done.append(Value(dims, substitute(v.expr, new, self.sizes), v.dtype))
        by_place = dict(zip(order, done, strict=True))
        return dims, [by_place[i].expr for i in range(len(padded))]

    def reshape(self, v: Value, sizes: Sequence[Size]) -> Value:
        """The same elements in other dimensions."""
        left = list(v.ranks)
        new: dict[str, Expr] = {}
        dims: list[tuple[str, ...]] = []
        for size in reversed(sizes):
            group: list[str] = []
            need = size
            while not same(need, 1):
                if not left:
                    raise Unsupported("a view of more elements than there are")
                n = self.sizes[left[-1]]
                if same(n, need):
                    group.append(left.pop())
                    break
                if divides(n, need):
                    group.append(left.pop())
                    need = need // n
                elif divides(need, n):
                    old, inner = left.pop(), self.rank(need)
                    outer = self.rank(n // need)
                    new[old] = self.radix(Rank(outer), inner)
                    left.append(outer)
                    group.append(inner)
                    break
                else:
                    raise Unsupported(f"a view that cuts a dimension of {n} by {need}")
            dims.append(tuple(reversed(group)))
        if left:
            raise Unsupported("a view of fewer elements than there are")
        return self.renamed(v, _closed(new, self.sizes), tuple(reversed(dims)))

    def single(self, v: Value, axis: int) -> str:
        """The one rank of a dimension. Raises `Unsupported` if it has more or none."""
        if len(v.dims[axis]) != 1:
            raise Unsupported("a dimension that was merged or has size 1")
        return v.dims[axis][0]

    def indexed(self, v: Value, axis: int, size: Size, index: Any) -> Value:
        """A dimension read at an index that is an affine function of a new one of the given size."""
        old = self.single(v, axis)
        dims = list(v.dims)
        if same(size, 1):
            dims[axis] = ()
            return self.renamed(v, {old: index(Const(0))}, tuple(dims))
        rank = self.rank(size)
        dims[axis] = (rank,)
        return self.renamed(v, {old: index(Rank(rank))}, tuple(dims))


def _closed(new: Mapping[str, Expr], sizes: Mapping[str, Size]) -> dict[str, Expr]:
    """Substitutions that mention each other, worked out."""
    done = dict(new)
    for _ in range(len(done)):
        done = {r: substitute(e, done, sizes) if free_ranks(e) & done.keys() else e for r, e in done.items()}
    return done


def is_small(e: Expr) -> bool:
    """Whether an expression is as cheap as reading its value back: an element, a literal, some ranks."""
    if isinstance(e, Access | Const | Rank | Extent):
        return True
    nodes = list(walk(e))
    reads = sum(isinstance(n, Access) for n in nodes)
    return not any(isinstance(n, Reduce) for n in nodes) and (reads == 0 or (len(nodes) <= SMALL and reads == 1))


def is_coordinate(e: Expr) -> bool:
    """Whether an expression is made of coordinates and literals by sums, bounds and divisions by a literal."""
    match e:
        case Rank() | Extent():
            return True
        case Const(value=value):
            return isinstance(value, int) and abs(value) < 1 << 20
        case Call(op="add" | "sub" | "minimum" | "maximum", args=(a, b)):
            return is_coordinate(a) and is_coordinate(b)
        case Call(op="neg", args=(a,)) | Call(op="floordiv" | "mod", args=(a, Const())):
            return is_coordinate(a)
        case _:
            return False


def shift(by: int) -> Any:
    """The index map r ↦ r + by."""
    if by == 0:
        return lambda r: r
    if by < 0:
        return lambda r: call("sub", r, Const(-by))
    return lambda r: Const(r.value + by) if isinstance(r, Const) else call("add", r, Const(by))
