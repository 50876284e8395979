"""Random cascades that mean something, and inputs that fit them, for Hypothesis.

    @given(cases())                                   # a cascade and its inputs
    @given(cases(Features(scans=False), einsums=3))   # without some part of the language

Every cascade verifies. Each has its ranks' extents fixed when it is drawn (0, 1 and odd ones among them), so that
indices can be kept in bounds, or be left to run out of them under a guard.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st
from random_expressions import Expressions
from vocabulary import ALL, MONOIDS, RANKS, Choose, Features, Tensor

from castile.ir.cascade import (
    Access,
    Call,
    Cascade,
    Const,
    Einsum,
    Expr,
    Extent,
    Output,
    Rank,
    Reduce,
    negative,
    tensors_read,
)
from castile.ir.dtypes import DTYPES
from castile.ir.evaluate import evaluate_values
from castile.ir.types import tensor_types
from castile.ir.verify import reduced_ranks, verify

Array = npt.NDArray[Any]


@dataclass
class Writer(Expressions):
    """The cascade that is being drawn."""

    einsums: list[Einsum] = field(default_factory=list)

    # Parameters

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
