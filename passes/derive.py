"""Derive: a cascade read into normal forms, separated, stabilised, and written back as a cascade.

The result is a cascade like any other: streamed reductions are Einsums over monoids with tuple state. What fired,
what blocks and what streams is recorded for `castile explain`."""

from __future__ import annotations

import sys
import threading
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from ..ir.cascade import Access, Call, Cascade, Const, Einsum, Expr, Extent, Monoid, Output, Rank, Reduce
from ..ir.errors import CastileError
from ..ir.extents import Binding, bindings
from ..ir.ops import OPS
from ..ir.print import print_expr
from ..ir.verify import verify
from .count import count_passes
from .lower import Lowering
from .normal import (
    ONE_FRACTION,
    ZERO,
    Atom,
    Form,
    Monomial,
    Value,
    aligned,
    atom_nonnegative,
    exp,
    lift,
    log,
    mul,
    parts_of,
    rewrite,
    sub,
    values_inside,
)
from .places import ranking_behind
from .read import Reader
from .separate import WAITED, Barrier, Reductions, waited_for
from .stabilise import Component, Gauge, Plan, Stream
from .step import StepWriter

T = TypeVar("T")

LEVELS = ("none", "defer", "full")

# How deep a shown value nests before an ellipsis.
SHOWN_DEPTH = 12


@dataclass(frozen=True, slots=True)
class Step:
    """One rewrite that fired, as text: before, after, and why it is allowed."""

    name: str
    before: str
    after: str
    reason: str


@dataclass(frozen=True, slots=True)
class Block:
    """One barrier that stands, as text: the ranks that wait, the expression that blocks, and why."""

    ranks: tuple[str, ...]
    expression: str
    integrand: str
    reason: str


@dataclass(frozen=True, slots=True)
class Derivation:
    """A derived cascade, with what was done to it.

    ``form`` names it among the alternatives: "as written", "deferred", "running maximum" or "extended exponent".
    ``passes`` counts each rank of the original in the derived cascade.
    """

    form: str
    cascade: Cascade
    passes: dict[str, int]
    steps: tuple[Step, ...]
    barriers: tuple[Block, ...]
    streams: tuple[Stream, ...]


def derive(c: Cascade, level: str = "full", gauge: str = "maximum") -> Derivation:
    """Derive one form of a cascade.

    ``level`` is "none" (passes as written, masks made explicit), "defer" (factors leave sums) or "full"; ``gauge`` is
    "maximum" or "exponent". A form never has more passes over a rank than the original: where it would, the original
    is kept.
    """
    return _with_room(lambda: _Deriver(c, level, gauge).run(), len(c.einsums))


def alternatives(c: Cascade) -> tuple[Derivation, ...]:
    """The forms of one cascade that compute the same, fewest passes first; equal cascades appear once."""
    found: dict[Cascade, Derivation] = {}
    for level, gauge in (("full", "maximum"), ("full", "exponent"), ("defer", "maximum"), ("none", "maximum")):
        d = derive(c, level, gauge)
        found.setdefault(d.cascade, d)
    return tuple(found.values())


def form_name(level: str, gauge: str, streamed: bool) -> str:
    if level == "none":
        return "as written"
    if level == "defer":
        return "deferred"
    return "extended exponent" if gauge == "exponent" and streamed else "running maximum" if streamed else "separated"


class _Deriver:
    def __init__(self, c: Cascade, level: str, gauge: str) -> None:
        self.c = c
        self.level = level
        self.kind = gauge
        self.reductions = Reductions(level, c.numerics, {r: i for i, r in enumerate(c.ranks)})
        self.reader = Reader(c, self.reductions)
        self.plan = Plan(self.reductions, gauge, self.reader.opaque)
        self.taken: set[str] = {p.name for p in c.params} | set(c.ranks) | {m.name for m in c.monoids}
        self.einsums: list[Einsum] = []
        self.monoids: list[Monoid] = list(c.monoids)
        self.streams: list[Stream] = []
        self.named: dict[bytes, tuple[str, tuple[str, ...]]] = {}
        self.component: dict[bytes, Component] = {}
        self.done: set[bytes] = set()
        self.guarded: dict[str, Form | None] = {}
        self.inner: set[bytes] = set()
        self.written: set[str] = set()
        self.writing: set[str] = set()
        self.maps: dict[bytes, str] = {}
        self.group_of: dict[bytes, int] = {}
        self.groups: list[list[Atom]] = []
        self.bodies: set[bytes] = set()
        self.finished: dict[bytes, Value] = {}
        self.plain: dict[bytes, tuple[Form, tuple[Value, ...]]] = {}

    def run(self) -> Derivation:
        c = self.c
        before = count_passes(c)
        self.reader.read()
        roots = [self.reader.forms[o] for o in c.outputs if o in self.reader.forms]
        live = self._live(roots, [o for o in c.outputs if o not in self.reader.forms])
        self.bodies = {x.digest for a in live for x in a.args}
        for name, values in self.reader.opaque.items():
            self.inner |= {a.digest for v in values for a in _reading(v, name)}
        certain = self._certain()
        self.inner |= {a.digest for a in live if a.digest not in certain and self._needs_guard(a)}
        for atom in live:
            if atom.digest in self.inner:
                continue
            carried = atom.digest in self.reductions.centred or self.plan.gauge(atom) is not None
            if carried or ranking_behind(atom) is not None:
                if not self.plan.include(atom):
                    self._demote(atom)
                    self.plan.include(atom)
        self.groups = self.plan.groups()
        self.group_of = {a.digest: i for i, g in enumerate(self.groups) for a in g}
        self.taken |= {o.name for e in c.einsums for o in e.outputs}
        self._name_components()
        self.maps = self._user_maps()
        order = {name: i for i, name in enumerate(o.name for e in c.einsums for o in e.outputs)}
        for name in sorted(c.outputs, key=lambda n: order[n]):
            self._output(name)
        derived = replace(c, einsums=tuple(self.einsums), monoids=self._used_monoids())
        if not keeps_extents(c, derived, self.reader.instances):
            return Derivation("as written", c, before, (), (self._unknown_extent(),), ())
        verify(derived)
        after = count_passes(derived)
        passes = {r: after.get(r, 0) for r in before}
        if any(passes[r] > n for r, n in before.items()):
            return Derivation("as written", c, before, (), (), ())
        form = form_name(self.level, self.kind, bool(self.streams))
        return Derivation(form, derived, passes, self._steps(), self._blocks(), tuple(self.streams))

    def _unknown_extent(self) -> Block:
        loose = ", ".join(b.rank for b in bindings(self.c) if b.param is None)
        return Block((), loose, "", f"only indices say how large {loose} is, and a rewrite would drop some of them")

    # What is there

    def _certain(self) -> set[bytes]:
        """What the cascade computes under no condition: reductions that may stand on their own."""
        roots = list(self.reader.forms.values()) + [v for vs in self.reader.opaque.values() for v in vs]

        def certain(v: Value) -> Iterable[Value]:
            if isinstance(v, Atom):
                return () if v.kind == "pred" and v.name == "where" else v.args
            # What brackets ask is computed; what they guard may not be.
            return [x for m in v.terms for x in (m.brackets or parts_of(Form({m: ONE_FRACTION})))]

        return {v.digest for v in values_inside(*roots, parts=certain)}

    def _needs_guard(self, a: Atom) -> bool:
        """Whether a condition around a reduction may be what gives it a meaning: reads in bounds, a fiber not empty."""
        if a.name == "argmax":
            return True
        return any(self.reader.reads_elsewhere(x) for x in a.args)

    def _live(self, roots: list[Value], tensors: list[str]) -> list[Atom]:
        """Every reduction that the outputs need, after those that it needs; tensors that stay are gone into."""
        found: list[Atom] = []
        seen: set[bytes] = set()
        stack: list[tuple[Value, bool]] = [(v, False) for v in roots]
        stack += [(v, False) for name in tensors for v in self.reader.opaque.get(name, ())]
        while stack:
            v, left = stack.pop()
            if left:
                found += [v] if isinstance(v, Atom) and v.kind == "red" else []
                continue
            if v.digest in seen:
                continue
            seen.add(v.digest)
            stack.append((v, True))
            stack += [(x, False) for x in parts_of(v)]
            if isinstance(v, Atom) and v.kind in ("access", "pred"):
                stack += [(x, False) for x in self.reader.opaque.get(v.name.removeprefix("access:"), ())]
        return found

    def _demote(self, atom: Atom) -> None:
        """A reduction that was to be carried centred, but whose reference cannot be: it waits after all."""
        self.reductions.centred.pop(atom.digest, None)
        body = atom.args[0]
        assert isinstance(body, Form)
        key = (atom.digest, atom.ranks)
        reason = "its reference is reduced over other ranks than it, so no state holds both"
        self.reductions.barriers.setdefault(key, Barrier(atom.ranks, body, body, reason))

    # Names

    def _fresh(self, base: str) -> str:
        number = 1
        while f"{base}{number}" in self.taken:
            number += 1
        self.taken.add(f"{base}{number}")
        return f"{base}{number}"

    def _ranks(self, v: Value) -> tuple[str, ...]:
        """Free ranks in the order of the cascade; instances after their base."""
        order = {r: i for i, r in enumerate(self.c.ranks)}
        base = self.reader.instances

        def place(rank: str) -> tuple[int, str]:
            return order.get(base.get(rank, rank), len(order)), rank

        return tuple(sorted(v.free, key=place))

    def _name_components(self) -> None:
        """Components take the names of the user's tensors that equal them; others get fresh ones."""
        for group in self.groups:
            for atom in group:
                name = self._fresh({"max": "top", "min": "bottom", "argmax": "place"}.get(atom.name, "part"))
                gauge = self.plan.gauge(atom)
                self.component[atom.digest] = Component(atom, name, self._ranks(atom), atom.name, gauge)
        claimed: set[str] = set()
        fresh = {component.name: digest for digest, component in self.component.items()}
        for name, value in self.reader.forms.items():
            held = self._finished(value).atom if isinstance(value, Form) else None
            digest = fresh.get(held.name) if held is not None and held.kind == "access" else None
            output = self.c.einsum_of[name].output
            if digest is None or name in claimed:
                continue
            component = self.component[digest]
            if component.name in fresh and set(output.ranks) == set(component.ranks):
                claimed.add(name)
                self.component[digest] = replace(component, name=name, ranks=output.ranks)
        self.finished, self.plain = {}, {}
        for component in self.component.values():
            if component.atom.name == "sum" and component.gauge is not None and not component.gauge.power:
                self.guarded[component.name] = self._top(component.gauge)

    # Values

    def _finished(self, v: Form) -> Form:
        """A form over the tensors that hold the streams' results: mantissas times exponentials of their gauges."""
        result = rewrite(v, self._visit, self.finished)
        assert isinstance(result, Form)
        return result

    def _visit(self, a: Atom) -> Form | Atom | None:
        component = self.component.get(a.digest)
        if component is not None:
            return self._worth(component)
        if a.kind == "red":
            return self._in_place(a) if a.digest in self.inner else self._plain(a)[0]
        if a.kind != "poly" and (a.kind != "fn" or a.name != "log"):
            return None
        inner = aligned(self._finished_form(a.args[0]), self._is_scaled)
        return inner if a.kind == "poly" else log(inner)

    def _finished_form(self, v: Value) -> Form:
        assert isinstance(v, Form)
        return self._finished(v)

    def _is_scaled(self, exponent: Form) -> bool:
        """Whether an exponent is made of gauges."""
        gauges = {c.name for c in self.component.values() if c.atom.name in ("max", "min")}
        inside = values_inside(exponent)
        return any(isinstance(x, Atom) and x.kind == "access" and x.name in gauges for x in inside)

    def _in_place(self, a: Atom) -> Form:
        """A reduction that is written where it is read: its argument is finished too, and a bare one keeps its maximum.

        ``sum[k](exp(S[k]))`` -> ``exp(max[k](S[k])) * sum[k](exp(S[k] - max[k](S[k])))``
        """
        scale = ZERO
        args = a.args
        gauge = self.plan.gauge(a)
        if gauge is not None and isinstance(args[0], Form):
            self.inner |= {x.digest for x in values_inside(gauge.value) if isinstance(x, Atom) and x.kind == "red"}
            scale = self._finished(gauge.value)
            rest = exp(sub(gauge.exponent, gauge.value))
            bare = Form({Monomial(m.factors, None, m.brackets): q for m, q in args[0].terms.items()})
            args = (mul(bare, rest),)
        done = tuple(self._finished(x) if isinstance(x, Form) else rewrite(x, self._visit, self.finished) for x in args)
        own = Atom(a.kind, a.name, done, a.ranks, a.dtype, a.reduced)
        self.inner.add(own.digest)
        return mul(lift(own), exp(scale))

    def _plain(self, a: Atom) -> tuple[Form, tuple[Value, ...]]:
        """A reduction with a tensor of its own: what it is worth, and what it sums.

        A scale that does not vary leaves the sum: ``sum[d](W[d] * N[q, d] * exp(M[q]))`` is scaled as ``N`` is.
        """
        if a.digest not in self.plain:
            args = tuple(self._finished(x) if isinstance(x, Form) else x for x in a.args)
            worth, only = lift(a), args[0]
            if a.name == "sum" and isinstance(only, Form):
                only = aligned(only, self._is_scaled)
                scales = [self._leaving(m, frozenset(a.ranks)) for m in only.terms]
                if scales and scales[0].terms and all(s == scales[0] for s in scales):
                    args = (mul(only, exp(sub(ZERO, scales[0]))),)
                    worth = mul(worth, exp(scales[0]))
            self.plain[a.digest] = worth, args
        return self.plain[a.digest]

    def _leaving(self, m: Monomial, over: frozenset[str]) -> Form:
        """The scale of a term, as far as it does not vary over the ranks."""
        terms = m.exponent.terms if m.exponent is not None else {}
        return Form({t: q for t, q in terms.items() if not t.free & over and self._is_scaled(Form({t: q}))})

    def _tensor(self, component: Component) -> Form:
        indices = tuple(lift(Atom("rank", r, dtype="i64")) for r in component.ranks)
        positive = atom_nonnegative(component.atom)
        return lift(Atom("access", component.name, indices, dtype=component.atom.dtype, nonnegative=positive))

    def _worth(self, component: Component) -> Form:
        value = self._tensor(component)
        if component.gauge is None:
            return value
        return mul(value, exp(self._scale(component.gauge)))

    def _top(self, gauge: Gauge) -> Form:
        """What the scale is made of: a running maximum, or the greatest exponent."""
        if self.kind == "exponent":
            return self._tensor(self.component[gauge.extremes[0].digest])
        return self._finished(gauge.value)

    def _scale(self, gauge: Gauge) -> Form:
        if self.kind == "exponent" and not gauge.power:
            from .normal import LN2, const

            return mul(const(LN2), self._tensor(self.component[gauge.extremes[0].digest]))
        return self._finished(gauge.value)

    # Writing

    def _lowering(self) -> Lowering:
        return Lowering(self._hook, self.guarded, self._exponents(), self._named)

    def _exponents(self) -> frozenset[str]:
        if self.kind != "exponent":
            return frozenset()
        return frozenset(c.name for c in self.component.values() if c.atom.name == "max")

    def _named(self, f: Form) -> Expr | None:
        """A value that a statement of the user's computes is read from that statement's tensor."""
        name = self.maps.get(f.digest)
        if name is None or name in self.writing:
            return None
        output = self.c.einsum_of[name].output
        if name not in self.written:
            self.written.add(name)
            self.writing.add(name)
            expr = self._typed(f, self.reader.types[name])
            self.writing.discard(name)
            self.einsums.append(Einsum((output,), expr))
        return Access(name, tuple(Rank(r) for r in output.ranks))

    def _user_maps(self) -> dict[bytes, str]:
        """The user's map Einsums that are worth a tensor: more than one operation, and no value of a stream inside."""
        found: dict[bytes, str] = {}
        for name, value in self.reader.forms.items():
            if (
                not isinstance(value, Form)
                or (value.atom is not None and value.atom.kind != "fn")
                or value.constant is not None
                or name in self.c.outputs
            ):
                continue
            e = self.c.einsum_of[name]
            claimed = any(c.name == name for c in self.component.values())
            if claimed or e.output.dtype is not None or set(e.output.ranks) != set(value.free):
                continue
            if self._finished(value) == value:
                found.setdefault(value.digest, name)
        return found

    def _hook(self, a: Atom) -> Expr | None:
        if a.kind == "red" and a.digest not in self.inner:
            return self._access(a)
        return self._named(lift(a)) if a.kind == "fn" else None

    def _access(self, a: Atom) -> Expr:
        name, ranks = self.named[self._ensure(a)]
        return Access(name, tuple(Rank(r) for r in ranks))

    def _ensure(self, a: Atom) -> bytes:
        """The Einsum of a reduction is written before what reads it; returns the key of its name."""
        if a.digest in self.done:
            return a.digest
        if a.digest in self.group_of:
            self._write_group(self.groups[self.group_of[a.digest]])
            return a.digest
        self.done.add(a.digest)
        args = self._plain(a)[1]
        for x in a.args:
            self._body(x)
        lowering = self._lowering()
        body = tuple(lowering.body(a, x) for x in args)
        name, ranks = self._user_name(lift(a)) or (self._fresh("T"), self._ranks(a))
        self.named[a.digest] = (name, ranks)
        if a.name == "sum" and all(
            isinstance(x, Form) and x.terms and all(m.exponent is not None for m in x.terms) for x in a.args
        ):
            self.guarded[name] = None
        self.einsums.append(Einsum((Output(name, ranks),), Reduce(a.name, a.ranks, body)))
        return a.digest

    def _body(self, x: Value) -> Value:
        """An argument of a reduction, over the streams' results, whose Einsums are written first."""
        if isinstance(x, Atom):
            return x
        finished = self._finished(x)
        self._write_needed(x)
        return finished

    def _write_needed(self, v: Value) -> None:
        """Write the groups whose components a value uses, and the tensors that stay."""

        def passes(x: Value) -> bool:
            grouped = isinstance(x, Atom) and x.digest in self.group_of
            return not grouped and (not isinstance(x, Atom) or x.kind != "red" or x.digest in self.inner)

        for x in values_inside(v, into=passes):
            if isinstance(x, Atom) and x.digest in self.group_of:
                self._write_group(self.groups[self.group_of[x.digest]])
            else:
                self._write_tensor(x)

    def _write_tensor(self, x: Value) -> None:
        name = x.name.removeprefix("access:") if isinstance(x, Atom) and x.kind in ("access", "pred") else None
        if name is not None and name in self.reader.opaque:
            self._opaque(name)

    def _user_name(self, v: Form) -> tuple[str, tuple[str, ...]] | None:
        """The user's own name for a value, if a statement computes just it and no output claims the name otherwise."""
        for name, value in self.reader.forms.items():
            output = self.c.einsum_of[name].output
            if value.digest == v.digest and set(output.ranks) == set(v.free) and output.dtype is None:
                if name not in self.written and not any(o.name == name for e in self.einsums for o in e.outputs):
                    return name, output.ranks
        return None

    def _write_group(self, group: list[Atom]) -> None:
        if group[0].digest in self.done:
            return
        for a in group:
            self.done.add(a.digest)
        components = tuple(self.component[a.digest] for a in group)
        mine = {a.digest for a in group}
        for a in group:
            for x in a.args:
                self._write_outside(x, mine)
        for c in components:
            self.named[c.atom.digest] = (c.name, c.ranks)
        if len(components) == 1 and components[0].gauge is None:
            only = components[0]
            body = self._lowering().body(only.atom, self._body(only.atom.args[0]))
            self.einsums.append(
                Einsum((Output(only.name, only.ranks),), Reduce(only.atom.name, only.atom.ranks, (body,)))
            )
            return
        if group[0].digest in self.plan.settled:
            self._write_settled(components[0])
            return
        name = self._fresh("stream")
        writer = StepWriter(self.plan, components, self.kind, self._finished)
        monoid, einsum = writer.write(name, self._lowering())
        self.monoids.append(monoid)
        self.einsums.append(einsum)
        plain = all(
            c.atom.name in ("sum", "max", "min") and not (c.gauge is not None and c.gauge.power) for c in components
        )
        step = writer.step(self._lowering()) if plain else ()
        self.streams.append(Stream(components[0].atom.ranks, components, monoid, einsum, step))

    def _write_settled(self, c: Component) -> None:
        """A scaled sum under a gauge that another stream has finished."""
        assert c.gauge is not None
        body = c.atom.args[0]
        assert isinstance(body, Form)
        for extreme in c.gauge.extremes:
            self._ensure(extreme)
        scale = exp(sub(self._finished(c.gauge.exponent), self._scale(c.gauge)))
        bare = Form({Monomial(m.factors, None, m.brackets): q for m, q in body.terms.items()})
        lowering = self._lowering()
        value = lowering.body(c.atom, mul(self._finished(bare), scale))
        self.einsums.append(Einsum((Output(c.name, c.ranks),), Reduce("sum", c.atom.ranks, (value,))))

    def _write_outside(self, v: Value, mine: set[bytes]) -> None:
        """Before a stream: whatever its elements read that is not part of it."""

        def other(x: Value) -> bool:
            return isinstance(x, Atom) and x.kind == "red" and x.digest not in mine and x.digest not in self.inner

        for x in values_inside(v, into=lambda x: not other(x)):
            if isinstance(x, Atom) and other(x):
                self._ensure(x)
            else:
                self._write_tensor(x)

    def _opaque(self, name: str) -> None:
        """A scan or a monoid of the user's: written with its own expression, its arguments from their forms."""
        e = self.c.einsum_of[name]
        if e.name in self.written:
            return
        self.written.add(e.name)
        values = self.reader.opaque[name]
        for v in values:
            self._write_needed(v)
        lowering = self._lowering()
        if isinstance(e.expr, Reduce) and e.expr.op in self.c.monoid_of:
            args = []
            for v, original in zip(values, e.expr.args, strict=True):
                dtype = self.reader._dtype(original)
                final = self._finished(v) if isinstance(v, Form) else v
                args.append(
                    lowering.float(final)
                    if isinstance(final, Form) and dtype in ("f32", "f64")
                    else lowering.value(final)
                )
            self.einsums.append(replace(e, expr=replace(e.expr, args=tuple(args))))
            return
        final = self._finished(values[0]) if isinstance(values[0], Form) else values[0]
        self.einsums.append(replace(e, expr=self._typed(final, self.reader.types[e.name])))

    def _typed(self, v: Value, dtype: str) -> Expr:
        lowering = self._lowering()
        if isinstance(v, Form) and dtype[0] in "fb" and dtype != "bool":
            return lowering.float(v)
        return lowering.form(v, whole=True) if isinstance(v, Form) else lowering.atom(v)

    def _output(self, name: str) -> None:
        if any(o.name == name for e in self.einsums for o in e.outputs):
            return
        if name in self.reader.opaque:
            self._opaque(name)
            return
        value = self.reader.forms[name]
        self._write_needed(value)
        only = value.atom if isinstance(value, Form) else None
        if only is not None and only.kind == "red" and only.digest not in self.inner:
            self._ensure(only)
        if any(o.name == name for e in self.einsums for o in e.outputs):
            return
        e = self.c.einsum_of[name]
        self.written.add(name)
        final = self._finished(value) if isinstance(value, Form) else value
        dtype = self.reader.types[name]
        # The declared type rounds by itself: a cast to it outermost is not written twice.
        if isinstance(final, Form) and e.output.dtype is not None:
            atom = final.atom
            if (
                atom is not None
                and atom.kind in ("cast", "int")
                and atom.name in (e.output.dtype, f"cast:{e.output.dtype}")
            ):
                inner = atom.args[0]
                assert isinstance(inner, Form)
                final = inner
        expr = self._typed(final, dtype)
        if any(o.name == name for w in self.einsums for o in w.outputs):
            # A reduction below took the name, as it is the output itself.
            return
        self.einsums.append(Einsum((replace(e.output, dtype=e.output.dtype),), expr))

    def _used_monoids(self) -> tuple[Monoid, ...]:
        used = {n.op for e in self.einsums for n in e.reductions}
        return tuple(m for m in self.monoids if m.name in used)

    def _show(self, v: Value, *, itself: bool = False) -> str:
        """A value in the user's own names, as far as statements compute parts of it, or ``itself``."""
        names = {
            f.digest: n
            for n, f in self.reader.forms.items()
            if isinstance(f, Form) and f.constant is None and (itself or f != v)
        }

        def named(f: Form) -> Expr | None:
            name = names.get(f.digest)
            return None if name is None else Access(name, tuple(Rank(r) for r in self.c.einsum_of[name].output.ranks))

        def hook(a: Atom) -> Expr | None:
            return named(lift(a)) if a.args else None

        if isinstance(v, Atom) and v.kind != "pred" and v.kind != "lbr":
            v = lift(v)
        return print_expr(Lowering(hook, named=named, room=SHOWN_DEPTH).value(v))

    def _steps(self) -> tuple[Step, ...]:
        return tuple(
            Step(r.name, self._show(r.before), self._show(r.after), r.reason) for r in self.reductions.rewrites.values()
        )

    def _blocks(self) -> tuple[Block, ...]:
        return tuple(self._block(b) for b in self.reductions.barriers.values() if b.integrand.digest in self.bodies)

    def _block(self, b: Barrier) -> Block:
        """A barrier in the user's names: "`abs(X[n, k] - mu[n])` is not a finite sum of terms over `mu[n]`"."""
        waited = waited_for(b.blocking, frozenset(b.ranks))
        names = " and ".join(dict.fromkeys(f"`{self._show(v, itself=True)}`" for v in waited))
        reason = b.reason.replace(WAITED, names or f"a reduction over {', '.join(b.ranks)}")
        return Block(b.ranks, self._show(b.blocking, itself=True), self._show(b.integrand), reason)


def keeps_extents(c: Cascade, derived: Cascade, instances: Mapping[str, str]) -> bool:
    """Whether ranks that only indices bound get their extents from the same indices as before."""
    before = {b.rank: b for b in bindings(c)}
    try:
        after = bindings(derived)
    except CastileError:
        return False
    found = {b.rank: _places(c, b, instances) for b in before.values()}
    return all(
        b.param is not None or _places(derived, b, instances) == found.get(instances.get(b.rank, b.rank)) for b in after
    )


def _places(c: Cascade, b: Binding, instances: Mapping[str, str]) -> set[tuple[str, tuple[int, ...]]]:
    """The indices that bound a rank and the axes that they read, by values at two probes, whatever the spelling."""
    found = set()
    for u in b.within:
        axis = c.indices_of(u.tensor)[u.axis]
        size = instances.get(axis.name, axis.name) if isinstance(axis, Rank) else print_expr(axis)
        found.add((size, tuple(_probe(u.index, salt, instances) for salt in (3, 7))))
    return found


def _probe(e: Expr, salt: int, instances: Mapping[str, str]) -> int:
    match e:
        case Const(value=value):
            return int(value)
        case Rank(name=name) | Extent(rank=name):
            return zlib.crc32(f"{instances.get(name, name)}{salt}".encode()) % 10007
        case Call(op=op, args=args):
            return int(OPS[op].numpy(*(_probe(a, salt, instances) for a in args)))
        case _:
            return -1


def _reading(v: Value, tensor: str) -> list[Atom]:
    """The reductions inside a value that read the tensor."""

    def reads(x: Value) -> bool:
        return isinstance(x, Atom) and x.kind in ("access", "pred") and x.name.removeprefix("access:") == tensor

    inside = (x for x in values_inside(v) if isinstance(x, Atom) and x.kind == "red")
    return [x for x in inside if any(map(reads, values_inside(x)))]


def _with_room(f: Callable[[], T], size: int) -> T:
    """Run a recursion as deep as the cascade is long: on a thread with a larger stack, where it may be needed."""
    if size < 24:
        return f()
    result: list[T] = []
    failure: list[BaseException] = []

    def run() -> None:
        limit = sys.getrecursionlimit()
        sys.setrecursionlimit(max(limit, 20_000 + 200 * size))
        try:
            result.append(f())
        except BaseException as error:
            failure.append(error)
        finally:
            sys.setrecursionlimit(limit)

    old = threading.stack_size(min(1 << 30, (64 << 20) + size * (1 << 20)))
    try:
        thread = threading.Thread(target=run)
        thread.start()
    finally:
        threading.stack_size(old)
    thread.join()
    if failure:
        raise failure[0]
    return result[0]
