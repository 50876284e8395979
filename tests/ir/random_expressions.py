"""Random expressions over the tensors that there are: every index in bounds, or guarded where it runs out of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vocabulary import FLOATS, INTEGERS, MINUS_INFINITY, MONOIDS, Choose, Features, Tensor, kind_of

from castile.ir.cascade import (
    Access,
    Call,
    Cast,
    Const,
    Expr,
    Extent,
    Monoid,
    Param,
    Rank,
    Reduce,
    negative,
)


@dataclass
class Expressions:
    """Draws expressions, and the parameters that they read."""

    choose: Choose
    features: Features
    extents: dict[str, int]
    params: list[Param] = field(default_factory=list)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    tables: dict[str, int] = field(default_factory=dict)
    derived_rank: str = ""
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

    @property
    def bound_ranks(self) -> list[str]:
        return [r for r in self.extents if r != self.derived_rank]

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
