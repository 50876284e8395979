"""Cascade to normal forms: every map Einsum is inlined, every reduction becomes an atom.

Accesses substitute ranks; where a substitution would be captured by a reduction inside, the inner rank is renamed: it
is another instance of the rank. Scans and monoids with tuple state stay tensors; what they read is read like all
else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ..ir.cascade import Access, Call, Cascade, Cast, Const, Einsum, Expr, Extent, Rank, Reduce
from ..ir.dtypes import DTYPES, rounds
from ..ir.extents import bindings
from ..ir.ops import OPS
from ..ir.types import WEAK_FLOAT, WEAK_INT, TypeChecker, compute_type, is_float, join, settle, tensor_types
from ..ir.verify import scan_step
from .brackets import FALSE, TRUE, bracket, compare, conjunction, disjunction, negate, pred
from .casts import cast
from .forms import ZERO, Atom, Form, Value, add, lift, neg, sub, values_inside
from .functions import function
from .integers import as_float, as_truncated, folded, int_nonnegative, is_exact, is_integral, is_small, is_wide, widened
from .normal import const, div, mul, nonnegative, select
from .normal import power as raise_to
from .rewriting import in_type_of, remake, rewrite
from .separate import Reductions


@dataclass
class Reader:
    """Reads the Einsums of one cascade, in order, into forms over their output ranks."""

    c: Cascade
    reductions: Reductions
    forms: dict[str, Value] = field(default_factory=dict)
    opaque: dict[str, tuple[Value, ...]] = field(default_factory=dict)
    instances: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.types = tensor_types(self.c)
        self.checker = TypeChecker(self.types, self.c.monoid_of)
        self.known: dict[str, frozenset[str]] = {}
        self.sized = {b.rank for b in bindings(self.c) if b.param is not None}

    def read(self) -> None:
        for e in self.c.einsums:
            if len(e.outputs) > 1 or scan_step(e) is not None or self._is_monoid(e):
                self._tensor(e)
            else:
                value = self.value(e.expr)
                self.forms[e.name] = self._rounded(e, value)

    def _is_monoid(self, e: Einsum) -> bool:
        return isinstance(e.expr, Reduce) and e.expr.op in self.c.monoid_of

    def _tensor(self, e: Einsum) -> None:
        """A scan or a monoid: an opaque tensor, which knows what was reduced on the way to it."""
        args = e.expr.args if self._is_monoid(e) and isinstance(e.expr, Reduce) else (e.expr,)
        values = []
        for o in e.outputs:
            self.known[o.name] = frozenset()
        level = self.reductions.level
        if not self._is_monoid(e):
            # What is reduced inside a step of a scan reads the scan itself: it stays as it is written.
            self.reductions.level = "none"
        scan = scan_step(e)
        for a in args:
            value = self.value(a)
            values.append(value if scan is None else self._apart(value, scan.rank))
        self.reductions.level = level
        reduced = frozenset().union(*(v.reduced for v in values))
        if isinstance(e.expr, Reduce) and self._is_monoid(e):
            reduced |= set(e.expr.ranks)
        for o in e.outputs:
            self.known[o.name] = reduced
            self.opaque[o.name] = tuple(values)

    def _apart(self, value: Value, rank: str) -> Value:
        """Reductions over a rank that a scan steps along are over another instance of it."""
        memo: dict[bytes, Value] = {}

        def visit(a: Atom) -> Form | Atom | None:
            if a.kind not in ("red", "pred") or rank not in a.ranks:
                return None
            fresh = {rank: self._instance(rank, frozenset(a.ranks).union(*(x.free for x in a.args)))}
            args = tuple(rewrite(rewrite(x, _renamer(fresh), {}), visit, memo) for x in a.args)
            return Atom(a.kind, a.name, args, tuple(fresh.get(r, r) for r in a.ranks), a.dtype, a.reduced)

        return rewrite(value, visit, memo)

    def reads_elsewhere(self, v: Value) -> bool:
        """Whether a value reads a tensor at anything but a rank's own places, so that a guard may keep it in bounds."""
        for x in values_inside(v):
            if isinstance(x, Atom) and (x.kind == "access" or (x.kind == "pred" and x.name.startswith("access:"))):
                declared = self.c.indices_of(x.name.removeprefix("access:"))
                if not all(self._in_place(i, own) for i, own in zip(x.args, declared, strict=True)):
                    return True
        return False

    def _in_place(self, index: Value, own: Expr) -> bool:
        """An index is a rank that has the axis's extent; or one that only indices bound, so that none leads outside."""
        at = index.atom if isinstance(index, Form) else None
        if at is None or at.kind != "rank" or not isinstance(own, Rank):
            return False
        rank = self.instances.get(at.name, at.name)
        return rank == own.name or rank not in self.sized

    def _rounded(self, e: Einsum, value: Value) -> Value:
        """The conversion that a declared type makes."""
        dtype = e.output.dtype
        if dtype is None or isinstance(value, Atom):
            return value
        inferred = self._dtype(e.expr)
        return value if dtype == inferred else self.convert(value, inferred, dtype)

    def _dtype(self, e: Expr) -> str:
        return settle(self.checker.infer(e))

    def is_typed(self, e: Expr, dtype: str) -> bool:
        """Whether an expression is of a type that its number, written alone, would not have."""
        return self.checker.infer(e) == dtype != "f32"

    def form(self, e: Expr) -> Form:
        """The numeric value of an expression; a bool counts as 0 or 1."""
        v = self.value(e)
        return bracket(v) if isinstance(v, Atom) else v

    def predicate(self, e: Expr) -> Atom:
        v = self.value(e)
        assert isinstance(v, Atom), "the verifier lets only bools be conditions"
        return v

    def value(self, e: Expr) -> Value:
        """A form, or for a bool a predicate atom."""
        match e:
            case Const(value=bool() as truth):
                return pred("true") if truth else pred("false")
            case Const(value=number):
                return const(number)
            case Rank(name=name):
                return lift(Atom("rank", name, dtype="i64"))
            case Extent(rank=rank):
                return lift(Atom("extent", rank, dtype="i64", nonnegative=True))
            case Cast(dtype=dtype, arg=arg):
                inner = self.value(arg)
                return self.convert(inner, self._dtype(arg), dtype)
            case Access():
                return self._access(e)
            case Reduce():
                return self._reduce(e)
            case Call():
                return self._call(e)

    def convert(self, v: Value, source: str, target: str) -> Value:
        """A cast: to a wider float nothing, to a narrower one a rounding, to and from integers an opaque operation.

        Between f32 and f64 it stays as well, since it says in which of the two the arithmetic around it is done.
        """
        if isinstance(v, Atom):
            if target == "bool":
                return v
            if DTYPES[target].is_integer:
                return lift(Atom("int", f"cast:{target}", (v,), dtype=target, nonnegative=True))
            v = bracket(v)
            source = "i32"
        if target == "bool":
            return negate(compare("eq", v, const(0), integer=not DTYPES[source].is_float))
        if DTYPES[target].is_float:
            v = as_float(v, source, target)
            if target == "f64" and v.constant is None and is_integral(v):
                v = lift(Atom("int", "cast:f64", (v,), dtype=target, nonnegative=nonnegative(v)))
            other = DTYPES[source].is_float and (source == "f64") != (target == "f64") and v.constant is None
            return cast(target, v) if rounds(target) or other else v
        if source == target and not DTYPES[source].is_float:
            return v
        if DTYPES[source].is_float:
            v = as_truncated(v, source, target)
        return lift(Atom("int", f"cast:{target}", (v,), dtype=target))

    def _access(self, e: Access) -> Value:
        indices = tuple(self.form(i) for i in e.indices)
        dtype = self.types[e.tensor]
        if e.tensor in self.forms:
            own = self.c.einsum_of[e.tensor].output.ranks
            before = self.forms[e.tensor]
            found = self._substitute(before, dict(zip(own, indices, strict=True)))
            return in_type_of(before, found) if isinstance(found, Form) else found
        reduced = self._carried(e, indices)
        if dtype == "bool":
            return pred(f"access:{e.tensor}", *indices, reduced=reduced)
        nonneg = DTYPES[dtype].kind == "uint"
        atom = Atom("access", e.tensor, indices, dtype=dtype, reduced=reduced, nonnegative=nonneg)
        if any(map(_is_masked, self.opaque.get(e.tensor, ()))):
            # What masks leave empty there is told by its value: elsewhere 0 / 0 is no number.
            some = negate(compare("eq", lift(atom), ZERO, integer=False))
            atom = Atom("access", e.tensor, indices, (), dtype, reduced, nonneg, filled=some)
        return lift(atom)

    def _carried(self, e: Access, indices: tuple[Form, ...]) -> frozenset[str]:
        """What was reduced on the way to an opaque tensor; a scan read at a fixed place has ended."""
        if e.tensor not in self.c.einsum_of:
            return frozenset()
        reduced = self.known.get(e.tensor, frozenset())
        source = self.c.einsum_of[e.tensor]
        scan = scan_step(source)
        if scan is not None and scan.rank not in indices[scan.axis].free:
            reduced |= {scan.rank}
        return reduced

    def _substitute(self, value: Value, ranks: Mapping[str, Form]) -> Value:
        """Replace ranks by index forms; a reduction that would capture a rank gets another instance of it."""
        changed = {r: f for r, f in ranks.items() if f.atom is None or f.atom.kind != "rank" or f.atom.name != r}
        changed = {r: f for r, f in changed.items() if r in value.free}
        if not changed:
            return value
        coming = frozenset().union(*(f.free for f in changed.values()))
        memo: dict[bytes, Value] = {}
        # Coordinates are i64, and so is arithmetic on them; an index that is read may be narrower.
        wide = {r: f if is_wide(f) else widened(f, "i64") for r, f in changed.items()}
        inside: dict[bytes, Value] = {}

        def within(a: Atom) -> Form | Atom | None:
            return wide[a.name] if a.kind == "rank" and a.name in wide else visit(a)

        def visit(a: Atom) -> Form | Atom | None:
            if not a.free & set(changed):
                return a
            if a.kind == "rank":
                return changed[a.name]
            if a.kind == "int" and a.dtype == "i64" and wide != changed:
                return remake(a, tuple(rewrite(x, within, inside) for x in a.args))
            if a.kind not in ("red", "pred") or not a.ranks:
                return None
            body = a.args[0]
            ranks_now = a.ranks
            captured = [r for r in ranks_now if r in coming]
            if captured:
                fresh = {r: self._instance(r, body.free | coming | set(ranks_now)) for r in captured}
                body, ranks_now = rewrite(body, _renamer(fresh), {}), tuple(fresh.get(r, r) for r in ranks_now)
            if changed.keys() & set(ranks_now):
                # Inside, the reduction's own ranks shadow those that are replaced.
                inner = self._substitute(body, {r: f for r, f in changed.items() if r not in ranks_now})
            else:
                inner = rewrite(body, visit, memo)
            if a.kind == "pred":
                return Atom(a.kind, a.name, (inner,), ranks_now, a.dtype)
            assert isinstance(inner, Form)
            if not is_float(a.dtype) and a.name != "argmax":
                return lift(Atom("red", a.name, (inner,), ranks_now, a.dtype))
            if self.reductions.is_bare(a):
                self.reductions.keep_bare(inner)
            return self.reductions.reduce(a.name, ranks_now, inner, a.dtype)

        return rewrite(value, visit, memo)

    def _instance(self, rank: str, taken: frozenset[str] | set[str]) -> str:
        base = self.instances.get(rank, rank)
        number = 2
        while f"{base}_{number}" in taken or f"{base}_{number}" in self.c.ranks or f"{base}_{number}" in self.types:
            number += 1
        name = f"{base}_{number}"
        self.instances[name] = base
        return name

    def _reduce(self, e: Reduce) -> Value:
        ranks = tuple(e.ranks)
        if e.op in ("any", "all"):
            return pred(f"red:{e.op}", self.predicate(e.arg), ranks=ranks)
        if e.op in self.c.monoid_of:
            forms = [(self.form(a), self._dtype(a)) for a in e.args]
            args = tuple(widened(f, d) if d == "f64" and f.constant is not None else f for f, d in forms)
            return lift(Atom("red", e.op, args, ranks, self._dtype(e)))
        body = self.form(e.arg)
        dtype = self._dtype(e)
        if dtype == "f64" and _is_untyped(body):
            body = widened(body, "f64")
        if not is_float(dtype) and e.op != "argmax":
            # Integers wrap, so nothing leaves their sums.
            return lift(Atom("red", e.op, (body,), ranks, dtype))
        return self.reductions.reduce(e.op, ranks, body, dtype)

    def _typed(self, e: Call, within: str, first: int = 0) -> list[Value]:
        """The operands from the first on, in the type in which the text computes with them.

        A number has no type in a form, so where only a number's type said that it is a wider one, what it meets is
        converted: ``x * f64(2.0)`` -> ``f64(x) * 2``.
        """
        args = e.args[first:]
        values = [self.value(a) for a in args]
        kinds = [compute_type(self.checker.infer(a)) for a in args]
        alone = [isinstance(v, Form) and _is_literal(v) for v in values]
        weak = [WEAK_FLOAT if is_float(k) else WEAK_INT for k in kinds]
        joined = WEAK_INT
        for number, kind, other in zip(alone, kinds, weak, strict=True):
            joined = join(joined, other if number else kind)
        told = settle(joined) == within
        if told and within != "f64":
            return values
        # Products are put in another order, so f32 is converted where it meets f64, not when that is its turn.
        kept = {"f64", "i64", "i32", "u32"} if told else {"f64"}
        return [
            v if number or kind in kept or isinstance(v, Atom) else widened(v, within)
            for v, number, kind in zip(values, alone, kinds, strict=True)
        ]

    def _call(self, e: Call) -> Value:
        if e.op == "where":
            condition = self.predicate(e.args[0])
            within = settle(self.checker.infer(e))
            a, b = self._typed(e, within, 1)
            if isinstance(a, Atom) and isinstance(b, Atom):
                if any(self.reads_elsewhere(v) for v in (a, b)):
                    # The branch may be read out of bounds where the condition fails: it stays a select.
                    return pred("where", condition, a, b)
                return disjunction([conjunction([condition, a]), conjunction([negate(condition), b])])
            chosen = select(condition, _number(a), _number(b))
            if condition in (TRUE, FALSE) and within != "f32":
                # The branch that goes may be what made the other's type.
                kind = compute_type(self.checker.infer(e.args[1 if condition == TRUE else 2]))
                return chosen if kind == within else widened(chosen, within)
            return chosen
        dtype = self.checker.infer(e)
        if OPS[e.op].rule == "compare":
            args = self._typed(e, settle(join(*(self.checker.infer(a) for a in e.args))))
        elif OPS[e.op].rule in ("arith", "integer", "logic", "divide") and dtype != "bool":
            args = self._typed(e, settle(dtype))
        else:
            args = [self.value(a) for a in e.args]
        if e.op in ("lt", "le", "gt", "ge", "eq", "ne"):
            integer = not any(is_float(self.checker.infer(a)) for a in e.args)
            return compare(
                e.op, _number(args[0]), _number(args[1]), integer and all(is_small(_number(a)) for a in args)
            )
        if dtype == "bool":
            parts = [a for a in args if isinstance(a, Atom)]
            return negate(parts[0]) if e.op == "not" else conjunction(parts) if e.op == "and" else disjunction(parts)
        if not is_float(dtype):
            return self._integer(e.op, self._counted(e, args, settle(dtype)), settle(dtype))
        forms = tuple(_number(a) for a in args)
        sources = [settle(self.checker.infer(a)) for a in e.args]
        rounds = OPS[e.op].rule == "real" or (e.op == "div" and any(f.constant is None for f in forms))
        if dtype == "f64" and rounds and all(map(_is_untyped, forms)):
            forms = (widened(forms[0], "f64"), *forms[1:])
        if e.op == "pow":
            return self._float(e.op, (as_float(forms[0], sources[0], dtype), forms[1]))
        return self._float(e.op, tuple(as_float(f, s, dtype) for f, s in zip(forms, sources, strict=True)))

    def _counted(self, e: Call, args: Sequence[Value], dtype: str) -> tuple[Form, ...]:
        """The operands of integer arithmetic; bools as i32 where 0 and 1 without a type would make it another's."""
        kinds = [self.checker.infer(a) for a in e.args]
        untyped = WEAK_INT
        for v, kind in zip(args, kinds, strict=True):
            untyped = join(untyped, WEAK_INT if isinstance(v, Atom) else kind)
        if settle(untyped) == dtype:
            return tuple(map(_number, args))
        return tuple(_number(self.convert(v, "bool", "i32")) if isinstance(v, Atom) else v for v in args)

    def _integer(self, op: str, args: tuple[Form, ...], dtype: str) -> Form:
        """Integer arithmetic: sums and multiples of ranks, extents and constants are exact; all else may wrap."""
        numbers = [a.constant for a in args]
        whole = [int(v) for v in numbers if v is not None and v.denominator == 1]
        if len(whole) == len(args) and (found := folded(op, whole, dtype)) is not None:
            return const(found)
        exact = dtype == "i64" and all(is_exact(a) for a in args)
        match op:
            case "add" if exact:
                return add(*args)
            case "sub" if exact:
                return sub(*args)
            case "neg" if exact:
                return neg(args[0])
            case "mul" if exact and any(v is not None for v in numbers):
                return mul(*args)
            case _:
                return lift(Atom("int", op, args, dtype=dtype, nonnegative=int_nonnegative(op, args)))

    def _float(self, op: str, args: tuple[Form, ...]) -> Form:
        match op:
            case "add":
                return add(*args)
            case "sub":
                return sub(*args)
            case "neg":
                return neg(args[0])
            case "mul":
                return mul(*args)
            case "div":
                return div(*args)
            case "pow":
                exponent = args[1].constant
                assert exponent is not None
                return raise_to(args[0], int(exponent))
            case _:
                return function(op, args)


def _is_masked(v: Value) -> bool:
    """Whether something in a value may be masked: a bracket over an exponential, or -inf where a condition fails."""
    return any(
        isinstance(x, Atom) and x.kind == "lbr" or isinstance(x, Form) and any(m.brackets for m in x.terms)
        for x in values_inside(v)
    )


def _number(v: Value) -> Form:
    return bracket(v) if isinstance(v, Atom) else v


def _is_literal(v: Form) -> bool:
    """Whether a form is a number, infinity included."""
    only = v.single
    infinite = only is not None and [a.kind for a, _ in only[0].factors] == ["inf"]
    bare = only is not None and only[0].exponent is None and not only[0].brackets
    return v.constant is not None or (infinite and bare)


def _renamer(names: Mapping[str, str]):  # type: ignore[no-untyped-def]
    def visit(a: Atom) -> Form | Atom | None:
        if a.kind == "rank" and a.name in names:
            return lift(Atom("rank", names[a.name], dtype="i64"))
        if a.kind in ("red", "pred") and set(a.ranks) & set(names):
            # The name is bound again inside: that is an instance of its own.
            return a
        return None

    return visit


def _is_untyped(f: Form) -> bool:
    """Whether nothing in a form tells f64 from f32: numbers, conditions, and what is made of them."""
    atoms = (x for x in values_inside(f, parts=_without_conditions) if isinstance(x, Atom))
    return not any(a.kind == "access" or a.dtype == "f64" for a in atoms)


def _without_conditions(v: Value) -> Iterable[Value]:
    if isinstance(v, Atom):
        return () if v.kind in ("lbr", "pred") else v.args
    exponents = (m.exponent for m in v.terms if m.exponent is not None)
    return (*(a for m in v.terms for a, _ in m.factors), *exponents)
