"""Random cascades that mean something, and inputs that fit them, for Hypothesis.

    @given(cases())                                   # a cascade and its inputs
    @given(cases(Features(scans=False), einsums=3))   # without some part of the language

Every cascade verifies. Each has its ranks' extents fixed when it is drawn (0, 1 and odd ones among them), so that
indices can be kept in bounds, or be left to run out of them under a guard.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from castile.ir.cascade import (
    Access,
    Call,
    Cascade,
    Cast,
    Const,
    Einsum,
    Expr,
    Extent,
    Monoid,
    Output,
    Param,
    Rank,
    Reduce,
    negative,
    tensors_read,
)
from castile.ir.dtypes import DTYPES
from castile.ir.evaluate import evaluate_values
from castile.ir.parse import parse
from castile.ir.types import tensor_types
from castile.ir.verify import reduced_ranks, verify

Array = npt.NDArray[Any]
# A choice of an integer between two, both included.
Choose = Callable[[int, int], int]


@dataclass(frozen=True)
class Features:
    """Which parts of the language a random cascade may use."""

    masks: bool = True
    gathers: bool = True
    affine: bool = True
    scans: bool = True
    monoids: bool = True
    nested: bool = True
    casts: bool = True
    integers: bool = True
    bools: bool = True
    scalars: bool = True
    special: bool = True  # exp, log, tanh and other functions that round
    literal_extents: bool = True
    derived: bool = True  # parameters such as W: u32[k // 2], and ranks bounded by x[2 * p + r]
    empty: bool = True  # extents of 0
    shadowing: bool = True


ALL = Features()
# What tensor programs are made of: no scans, monoids, integers or functions.
PLAIN = Features(
    masks=False, gathers=False, affine=False, scans=False, monoids=False, nested=False, casts=False, integers=False,
    bools=False, special=False, literal_extents=False, derived=False, empty=False, shadowing=False,
)  # fmt: skip

FLOATS = ("f32", "f64", "bf16", "f16", "f8e4m3", "f8e5m2")
INTEGERS = ("i64", "i32", "i16", "i8", "u8", "u32")
RANKS = ("i", "j", "k", "m", "n")
MINUS_INFINITY = Call("neg", (Const(float("inf")),))

MONOIDS = {
    m.name: m
    for m in parse(
        """
@monoid(identity=(-inf, 0.0))
def lse(m, l, n, s) -> (M, L):
    M = maximum(m, n)
    L = l * exp(m - M) + s * exp(n - M)

@monoid(identity=(0, 0.0))
def tally(c, t, d, u) -> (C, T):
    C = c + d
    T = t + u

@monoid(identity=(1.0, 0.0))
def affine(a, b, p, q) -> (A, B):
    A = a * p
    B = b * p + q

@monoid(identity=(-inf, 0))
def best(v, at, w, here) -> (V, At):
    V = maximum(v, w)
    At = where(w > v, here, at)

@monoid(identity=0)
def alternate(a, b) -> c:
    c = b - a

@monoid(identity=False)
def parity(a, b) -> c:
    c = (a | b) & ~(a & b)

def nothing(x: f32) -> Y:
    Y = x
"""
    ).monoids
}


@dataclass(frozen=True)
class Tensor:
    """What a statement may read: a tensor's axes, each with the rank or index that spans it and its size."""

    name: str
    dtype: str
    axes: tuple[tuple[Expr, int], ...]


@dataclass
class Writer:
    """The cascade that is being drawn."""

    choose: Choose
    features: Features
    extents: dict[str, int]
    params: list[Param] = field(default_factory=list)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    tables: dict[str, int] = field(default_factory=dict)
    derived_rank: str = ""
    einsums: list[Einsum] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    monoids: dict[str, Monoid] = field(default_factory=dict)

    def pick(self, options: Sequence[Any]) -> Any:
        return options[self.choose(0, len(options) - 1)]

    def chance(self, percent: int) -> bool:
        return self.choose(0, 99) < percent

    def some(self, options: Sequence[Any], least: int, most: int) -> tuple[Any, ...]:
        """Some of the options, in any order."""
        left, found = list(options), []
        for _ in range(self.choose(least, min(most, len(left)))):
            found.append(left.pop(self.choose(0, len(left) - 1)))
        return tuple(found)

    # Parameters

    def dtype(self, kind: str) -> str:
        if kind == "bool":
            return "bool"
        if kind == "int":
            return str(self.pick(INTEGERS))
        return str(self.pick(FLOATS if self.features.casts else ("f32", "f64")))

    def param(self, kind: str, indices: tuple[Expr, ...], shape: tuple[int, ...], table: int = 0) -> Tensor:
        """A new parameter; the entries of a table lie between 0 and ``table - 1``."""
        name = f"{'XBT'[('float', 'bool', 'int').index(kind)]}{len(self.params)}"
        dtype = "i32" if table else self.dtype(kind)
        self.params.append(Param(name, dtype, indices))
        self.shapes[name] = shape
        if table:
            self.tables[name] = table
        tensor = Tensor(name, dtype, tuple(zip(indices, shape, strict=True)))
        self.tensors.append(tensor)
        return tensor

    def kinds(self) -> list[str]:
        return ["float", "float"] + ["int"] * self.features.integers + ["bool"] * self.features.bools

    def some_ranks(self, most: int = 3) -> tuple[str, ...]:
        return self.some(list(self.extents), 0, most)

    def parameters(self) -> None:
        for _ in range(self.choose(1, 3)):
            ranks = self.some_ranks()
            if ranks or self.features.scalars:
                self.param(self.pick(self.kinds()), tuple(map(Rank, ranks)), tuple(self.extents[r] for r in ranks))
        if self.features.literal_extents and self.chance(30):
            size = self.choose(1, 4)
            self.param(self.pick(self.kinds()), (Const(size),), (size,))
        if self.features.derived and self.chance(40):
            self.derived()
        # Every rank has its extent from some parameter.
        bound = {i.name for p in self.params for i in p.indices if isinstance(i, Rank)}
        for r in self.extents:
            if r not in bound and r != self.derived_rank:
                self.param("float", (Rank(r),), (self.extents[r],))

    @property
    def bound_ranks(self) -> list[str]:
        return [r for r in self.extents if r != self.derived_rank]

    def derived(self) -> None:
        """``W: f32[k // 2]``, or a rank p that only ``x[2 * p + r]`` bounds."""
        r = self.pick(self.bound_ranks)
        if self.chance(50) or not self.extents[r]:
            by = self.pick((2, 3))
            index = Call("floordiv", (Rank(r), Const(by)))
            self.param("float", (index,), (-(-self.extents[r] // by),))
            return
        stride, count = self.pick((1, 2, 3)), self.choose(1, 4)
        width = stride * (count - 1) + self.extents[r] + self.choose(0, stride - 1)
        self.extents["p"], self.derived_rank = count, "p"
        x = self.param("float", (Const(width),), (width,))
        w = self.param("float", (Rank(r),), (self.extents[r],))
        p: Expr = Rank("p") if stride == 1 else Call("mul", (Const(stride), Rank("p")))
        index = Call("add", (p, Rank(r)))
        product = Call("mul", (Access(x.name, (index,)), Access(w.name, (Rank(r),))))
        self.write(("p",), Reduce("sum", (r,), (product,)), "float")

    # Statements

    def write(self, ranks: tuple[str, ...], expr: Expr, kind: str, dtype: str | None = None) -> None:
        name = f"V{len(self.einsums)}"
        self.add(Einsum((Output(name, ranks, dtype),), expr))

    def add(self, e: Einsum) -> None:
        self.einsums.append(e)
        types = tensor_types(self.cascade(e.outputs[:1]))
        for o in e.outputs:
            axes = tuple((Rank(r), self.extents[r]) for r in o.ranks)
            self.tensors.append(Tensor(o.name, types[o.name], axes))

    def cascade(self, outputs: tuple[Output, ...], numerics: str = "standard") -> Cascade:
        names = tuple(o.name for o in outputs)
        return Cascade("random", tuple(self.params), tuple(self.einsums), names, tuple(self.monoids.values()), numerics)

    def statement(self) -> None:
        kinds = ["map"] * 5 + ["scan"] * self.features.scans + ["state"] * self.features.monoids
        match self.pick(kinds):
            case "scan" if any(self.extents.values()):
                self.scan()
            case "state":
                self.state()
            case _:
                kind = self.pick(self.kinds())
                ranks = self.some_ranks()
                expr = self.expr(kind, ranks, 3)
                declared = self.dtype(kind) if self.chance(25) and (self.features.casts or kind != "float") else None
                self.write(ranks, expr, kind, declared)

    def scan(self) -> None:
        """``V[t, …] = where(t >= d, a * V[t - d, …], start) + b``, or from the end backwards."""
        ranks = self.some_ranks() or (self.pick(self.bound_ranks),)
        t = self.pick(ranks)
        name, step = f"V{len(self.einsums)}", self.pick((1, 1, 2))
        kind = self.pick(("float", "float", "int") if self.features.integers else ("float",))
        if self.chance(50):
            earlier: Expr = Call("sub", (Rank(t), Const(step)))
            inside: Expr = Call("ge", (Rank(t), Const(step)))
        else:
            earlier = Call("add", (Rank(t), Const(step)))
            inside = Call("lt", (earlier, Extent(t)))
        own = Access(name, tuple(earlier if r == t else Rank(r) for r in ranks))
        factor, start, term = (self.expr(kind, ranks, 1) for _ in range(3))
        if t in reduced_ranks((factor, start, term)):
            factor, start, term = (self.integer(-2, 2) if kind == "int" else Const(0.5) for _ in range(3))
        if kind == "float":
            factor = Call("maximum", (Call("minimum", (factor, Const(1.0))), negative(-1.0)))
        carried = Call(self.pick(("mul", "add", "maximum")), (factor, own))
        taken = Call("where", (inside, carried, start))
        declared = self.dtype(kind) if self.chance(20) and self.features.casts else None
        self.write(ranks, Call("add", (taken, term)), kind, declared)

    def state(self) -> None:
        m = MONOIDS[self.pick(("lse", "tally", "affine", "best"))]
        over = self.pick(self.bound_ranks)
        outer = tuple(r for r in self.some_ranks(2) if r != over)
        own = [outer] * m.width
        if m.name == "tally" and outer:
            own[0] = outer[:-1]
        if m.name == "lse" and outer:
            own[0] = outer[1:]  # the maximum does not depend on the weights
        values = []
        for component, ranks in zip(m.identity, own, strict=True):
            whole = isinstance(component, Const) and component.kind == "int"
            scope = (*ranks, over)
            values.append(
                Rank(over) if m.name == "best" and whole else self.expr("int" if whole else "float", scope, 1)
            )
        self.monoids[m.name] = m
        first = len(self.einsums)
        outputs = tuple(Output(f"V{first}{'abc'[i]}", ranks) for i, ranks in enumerate(own))
        self.add(Einsum(outputs, Reduce(m.name, (over,), tuple(values))))

    # Expressions

    def expr(self, kind: str, scope: tuple[str, ...], depth: int) -> Expr:
        """An expression whose values are of a kind: "float", "int" or "bool"."""
        if depth <= 0 or self.chance(15):
            return self.atom(kind, scope)
        e = getattr(self, f"{kind}_expr")(scope, depth - 1)
        assert isinstance(e, Expr)
        return e

    def atom(self, kind: str, scope: tuple[str, ...]) -> Expr:
        fitting = [t for t in self.tensors if kind_of(t.dtype) == kind]
        if fitting and self.chance(75):
            return self.access(self.pick(fitting), scope)
        match kind:
            case "int" if scope and self.chance(40):
                return Rank(self.pick(scope))
            case "int" if self.chance(30):
                return Extent(self.pick(self.bound_ranks))
            case "int":
                return self.integer(-3, 9)
            case "float":
                return negative(self.choose(-16, 16) / 8)
            case _ if self.features.bools and self.chance(30):
                return Const(self.chance(50))
            case _:
                return self.predicate(scope)

    def integer(self, low: int, high: int) -> Expr:
        return negative(self.choose(low, high))

    def access(self, t: Tensor, scope: tuple[str, ...]) -> Expr:
        """An element of a tensor; ranks that are not in scope are reduced, shifted indices guarded."""
        loose: list[str] = []
        guards: list[Expr] = []
        indices = []
        for index, size in t.axes:
            indices.append(self.index(index, size, scope, loose, guards))
        e: Expr = Access(t.name, tuple(indices))
        kind = kind_of(t.dtype)
        if guards:
            condition = guards[0]
            for g in guards[1:]:
                condition = Call("and", (condition, g))
            other = Const(False) if kind == "bool" else Const(0) if kind == "int" else self.masked_out()
            e = Call("where", (condition, e, other))
        ranks = tuple(dict.fromkeys(loose))
        if ranks:
            ops = {"float": ("sum", "max", "min"), "int": ("sum", "max", "min"), "bool": ("any", "all")}[kind]
            e = Reduce(self.pick(ops), ranks, (e,))
        return e

    def masked_out(self) -> Expr:
        return Const(0.0) if not self.features.masks or self.chance(60) else MINUS_INFINITY

    def index(self, axis: Expr, size: int, scope: tuple[str, ...], loose: list[str], guards: list[Expr]) -> Expr:
        usable = [r for r in (*scope, *loose) if self.extents[r] == size]
        own = axis.name if isinstance(axis, Rank) else None
        styles = ["plain"] * 6 + ["affine"] * 3 * self.features.affine + ["gather"] * self.features.gathers
        match self.pick(styles) if size else "plain":
            case "affine":
                return self.affine_index(size, scope, guards)
            case "gather" if (table := self.table(size)) is not None:
                ranks = [r.name for r, _ in table.axes if isinstance(r, Rank)]
                if all(r in scope for r in ranks):
                    return Access(table.name, tuple(map(Rank, ranks)))
            case _:
                pass
        if own in usable or (own is not None and own not in usable and self.chance(70)):
            assert own is not None
            if own not in scope:
                loose.append(own)
            return Rank(own)
        if usable:
            return Rank(self.pick(usable))
        if not isinstance(axis, Rank | Const):
            rank = next(r for r in self.extents if Rank(r) in (axis, *getattr(axis, "args", ())))
            if rank not in scope:
                loose.append(rank)
            return axis
        if own is not None:
            loose.append(own)
            return Rank(own)
        return self.affine_index(size, scope, guards)

    def affine_index(self, size: int, scope: tuple[str, ...], guards: list[Expr]) -> Expr:
        """A quasi-affine index: in bounds by its form, or guarded."""
        live = [r for r in scope if self.extents[r]]
        if not live:
            return Const(self.choose(0, size - 1))
        r = self.pick(live)
        style = self.choose(0, 4)
        if style == 0:
            return Call("mod", (Rank(r), Const(size)))
        if style == 1:
            by = -(-self.extents[r] // size)
            return Call("floordiv", (Rank(r), Const(max(by, 1))))
        if style == 2 and self.extents[r] == size:
            return Call("sub", (Call("sub", (Extent(r), Const(1))), Rank(r)))
        e: Expr = Rank(r)
        if style == 3:
            e = Call("mul", (Const(2), e))
        if len(live) > 1 and self.chance(50):
            e = Call("add", (e, Rank(self.pick(live))))
        shift = self.choose(-2, 2)
        if shift:
            e = Call("add" if shift > 0 else "sub", (e, Const(abs(shift))))
        guards += [Call("ge", (e, Const(0))), Call("lt", (e, Const(size)))]
        return e

    def table(self, size: int) -> Tensor | None:
        """An integer parameter whose entries are indices of an axis."""
        found = [t for t in self.tensors if self.tables.get(t.name) == size]
        if found and self.chance(70):
            return found[0]
        if len(self.params) > 6:
            return None
        ranks = tuple(r for r in self.some_ranks(2) if r != self.derived_rank)
        return self.param("int", tuple(map(Rank, ranks)), tuple(self.extents[r] for r in ranks), size)

    def predicate(self, scope: tuple[str, ...]) -> Expr:
        """An affine predicate over coordinates, or True where there are none."""
        if not scope:
            return Call("lt", (Extent(self.pick(self.bound_ranks)), self.integer(0, 5)))
        left: Expr = Rank(self.pick(scope))
        if self.chance(30):
            left = Call("mod", (left, Const(self.choose(1, 3))))
        right: Expr = Rank(self.pick(scope)) if self.chance(50) else self.integer(-1, 5)
        if self.chance(30):
            right = Call("add", (right, self.integer(0, 3)))
        return Call(self.pick(("lt", "le", "gt", "ge", "eq", "ne")), (left, right))

    def float_expr(self, scope: tuple[str, ...], depth: int) -> Expr:
        f = self.features
        styles = ["arith"] * 5 + ["reduce"] * 3 * f.nested + ["mask"] * 2 * f.masks + ["extreme", "unary", "where"]
        styles += ["special"] * 3 * f.special + ["cast", "narrow"] * f.casts + ["mixed"] * f.integers
        styles += ["monoid"] * f.monoids + ["divide", "power"]
        match self.pick(styles):
            case "arith":
                op = self.pick(("add", "sub", "mul", "mul"))
                return Call(op, (self.expr("float", scope, depth), self.expr("float", scope, depth)))
            case "mixed":
                op = self.pick(("add", "sub", "mul"))
                pair = (self.expr("float", scope, depth), self.expr("int", scope, depth))
                return Call(op, pair if self.chance(50) else pair[::-1])
            case "reduce":
                return self.reduction("float", scope, depth)
            case "mask":
                e = Call("where", (self.mask(scope), self.expr("float", scope, depth), MINUS_INFINITY))
                return Call("exp", (e,)) if f.special and self.chance(50) else e
            case "extreme":
                op = self.pick(("minimum", "maximum"))
                return Call(op, (self.expr("float", scope, depth), self.expr("float", scope, depth)))
            case "unary":
                return Call(self.pick(("neg", "abs")), (self.expr("float", scope, depth),))
            case "where":
                condition = self.expr("bool", scope, depth) if f.bools else self.predicate(scope)
                return Call("where", (condition, self.expr("float", scope, depth), self.expr("float", scope, depth)))
            case "special":
                op = self.pick("exp exp2 expm1 log log2 log1p sqrt rsqrt tanh sigmoid erf sin cos floor round".split())
                return Call(op, (self.expr("float", scope, depth),))
            case "cast":
                return Cast(self.pick(FLOATS), self.expr(self.pick(self.kinds()), scope, depth))
            case "narrow":
                return Cast(self.pick(("bf16", "f16")), self.expr("float", scope, depth))
            case "divide":
                return Call("div", (self.expr("float", scope, depth), self.expr("float", scope, depth)))
            case "power":
                return Call("pow", (self.expr("float", scope, depth), self.integer(-2, 3)))
            case _:
                over = self.pick(self.bound_ranks)
                m = MONOIDS["alternate"]
                self.monoids[m.name] = m
                return Reduce(m.name, (over,), (self.expr("float", (*scope, over), depth),))

    def mask(self, scope: tuple[str, ...]) -> Expr:
        e = self.predicate(scope)
        if self.chance(40):
            e = Call(self.pick(("and", "or")), (e, self.predicate(scope)))
        return Call("not", (e,)) if self.chance(20) else e

    def reduction(self, kind: str, scope: tuple[str, ...], depth: int) -> Expr:
        allowed = [r for r in self.extents if self.features.shadowing or r not in scope] or list(self.extents)
        ranks = self.some(allowed, 1, 2)
        inner = tuple(dict.fromkeys((*scope, *ranks)))
        if kind == "bool":
            return Reduce(self.pick(("any", "all")), ranks, (self.expr("bool", inner, depth),))
        if kind == "int" and self.chance(20):
            return Reduce("argmax", ranks[:1], (self.expr("float", tuple(dict.fromkeys((*scope, ranks[0]))), depth),))
        op = self.pick(("sum", "sum", "sum", "max", "max", "min", "prod"))
        if op == "sum" and kind == "float" and self.chance(60):
            product = Call("mul", (self.expr("float", inner, depth), self.expr("float", inner, depth)))
            return Reduce("sum", ranks, (product,))
        return Reduce(op, ranks, (self.expr(kind, inner, depth),))

    def int_expr(self, scope: tuple[str, ...], depth: int) -> Expr:
        f = self.features
        styles = ["arith"] * 3 + ["reduce"] * 2 * f.nested + ["divide", "bits", "shift", "unary", "where", "extreme"]
        styles += ["cast"] * f.casts + ["power"]
        match self.pick(styles):
            case "arith":
                op = self.pick(("add", "sub", "mul"))
                return Call(op, (self.expr("int", scope, depth), self.expr("int", scope, depth)))
            case "reduce":
                return self.reduction("int", scope, depth)
            case "divide":
                by = (
                    self.expr("int", scope, depth) if self.chance(20) else self.pick((Const(2), Const(3), negative(-2)))
                )
                return Call(self.pick(("floordiv", "mod")), (self.expr("int", scope, depth), by))
            case "bits":
                op = self.pick(("and", "or"))
                return Call(op, (self.expr("int", scope, depth), self.expr("int", scope, depth)))
            case "shift":
                by = Const(self.choose(0, 40))
                return Call(self.pick(("lshift", "rshift")), (self.expr("int", scope, depth), by))
            case "unary":
                op = self.pick(("neg", "abs", "not", "floor", "round"))
                return Call(op, (self.expr("int", scope, depth),))
            case "where":
                condition = self.expr("bool", scope, depth) if f.bools else self.predicate(scope)
                return Call("where", (condition, self.expr("int", scope, depth), self.expr("int", scope, depth)))
            case "extreme":
                op = self.pick(("minimum", "maximum"))
                return Call(op, (self.expr("int", scope, depth), self.expr("int", scope, depth)))
            case "power":
                return Call("pow", (self.expr("int", scope, depth), Const(self.choose(0, 5))))
            case _:
                return Cast(self.pick(INTEGERS), self.expr(self.pick(self.kinds()), scope, depth))

    def bool_expr(self, scope: tuple[str, ...], depth: int) -> Expr:
        styles = ["compare"] * 3 + ["logic"] * 2 + ["predicate", "not"] + ["reduce"] * self.features.nested
        styles += ["cast"] * self.features.casts
        match self.pick(styles):
            case "compare":
                kind = self.pick(("float", "int") if self.features.integers else ("float",))
                op = self.pick(("lt", "le", "gt", "ge", "eq", "ne"))
                return Call(op, (self.expr(kind, scope, depth), self.expr(kind, scope, depth)))
            case "logic":
                op = self.pick(("and", "or"))
                return Call(op, (self.expr("bool", scope, depth), self.expr("bool", scope, depth)))
            case "predicate":
                return self.predicate(scope)
            case "not":
                return Call("not", (self.expr("bool", scope, depth),))
            case "reduce":
                return self.reduction("bool", scope, depth)
            case _:
                return Cast("bool", self.expr(self.pick(("float", "int")), scope, depth))


def kind_of(dtype: str) -> str:
    return "float" if DTYPES[dtype].is_float else "bool" if dtype == "bool" else "int"


@dataclass(frozen=True)
class Case:
    """A cascade, inputs that fit it, and the extents that its ranks have with them."""

    cascade: Cascade
    inputs: dict[str, Array]
    extents: dict[str, int]

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """What Hypothesis shows of a counterexample."""
        printer.text(f"Case(\n{self.cascade}{self.inputs}\n)")


class Kinds(NamedTuple):
    """Which values the inputs of a case may hold."""

    nonfinite: bool = False  # infinities and NaN among them
    exact: bool = True  # multiples of 1/8, so that sums and products are exact; else any f32


EXACT = Kinds()


def build(choose: Choose, features: Features, einsums: int, kinds: Kinds) -> Case:
    """A cascade with inputs, out of choices."""
    writer = Writer(choose, features, {})
    for r in writer.some(RANKS, 1, 3):
        writer.extents[r] = writer.pick((1, 2, 3, 3, 5, 7) + (0,) * features.empty)
    writer.parameters()
    for _ in range(choose(1, einsums)):
        writer.statement()
    written = [o for e in writer.einsums for o in e.outputs]
    others = writer.some(written, 0, 2)
    outputs = tuple(o for o in written if o in others or o is written[-1])
    c = writer.cascade(outputs, writer.pick(("standard", "standard", "strict", "fast")))
    verify(c)
    rng = np.random.default_rng(choose(0, 1 << 30))
    inputs = {
        p.name: np.asarray(values(rng, p.dtype, writer.shapes[p.name], writer.tables.get(p.name), kinds))
        for p in c.params
    }
    return Case(c, inputs, {r: writer.extents[r] for r in c.ranks})


@st.composite
def cases(draw: Any, features: Features = ALL, einsums: int = 4, **kinds: bool) -> Case:
    """A random cascade with inputs, which Hypothesis can shrink; ``kinds`` are those of `Kinds`."""

    def choose(low: int, high: int) -> int:
        # `integers` would prefer small ones; these are all alike.
        span = range(low, high + 1)
        return int(draw(st.sampled_from(span) if len(span) < 1000 else st.integers(low, high)))

    return build(choose, features, einsums, Kinds(**kinds))


def random_case(seed: int, features: Features = ALL, einsums: int = 5, **kinds: bool) -> Case:
    """The same out of a seed, for volume: larger and more varied than what Hypothesis draws."""
    return build(random.Random(seed).randint, features, einsums, Kinds(**kinds))


def cascades(features: Features = ALL, einsums: int = 4) -> st.SearchStrategy[Cascade]:
    """A random cascade alone."""
    return cases(features, einsums).map(lambda case: case.cascade)


def values(
    rng: np.random.Generator, dtype: str, shape: tuple[int, ...], table: int | None = None, kinds: Kinds = EXACT
) -> Array:
    """Random values of a type: floats of moderate size, small integers, the indices of a table."""
    if table:
        return rng.integers(0, table, shape)
    if dtype == "bool":
        return rng.integers(0, 2, shape).astype(bool)
    row = DTYPES[dtype]
    if not row.is_float:
        x = rng.integers(-4 if row.kind == "int" else 0, 8, shape)
        return np.where(rng.random(shape) < 0.1, rng.choice([row.lowest, row.highest], shape), x)
    x = rng.integers(-16, 17, shape) / 8
    if not kinds.exact:
        x = np.where(rng.random(shape) < 0.8, rng.standard_normal(shape).astype(np.float32), x)
    if kinds.nonfinite:
        odd = rng.choice([np.inf, -np.inf, np.nan, 0.0, 1e30, -1e-30], shape)
        x = np.where(rng.random(shape) < 0.15, odd, x)
    return x


def hides_nan(c: Cascade, inputs: dict[str, Any], output: str) -> bool:
    """Whether an integer or a bool of the original is made of a NaN: no equality is promised of what was not finite."""
    read: list[str] = [output]
    for name in read:
        read += [t for t in tensors_read(c.einsum_of[name].expr) if t in c.einsum_of and t not in read]
    values = evaluate_values(replace(c, outputs=tuple(read)), inputs)
    lost = any(v.array.dtype.kind == "f" and np.isnan(v.array).any() for v in values.values())
    return lost and values[output].array.dtype.kind != "f"
