"""Writing a derived cascade: an Einsum for each reduction and stream, before what reads it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from ..ir.cascade import Access, Einsum, Expr, Monoid, Output, Rank, Reduce
from ..ir.types import is_float
from .emptiness import is_unmasked
from .finish import Finisher
from .forms import Atom, Form, Monomial, Value, lift, neg, nesting, sub, values_inside
from .fresh import fresh
from .functions import exp
from .integers import is_integral, widened
from .lower import Lowering
from .normal import mul
from .step import StepWriter
from .stream import Component, Stream

# From this depth on, a value that has a tensor of the user's is read from it.
DEEP = 24


def reads(v: Value, tensors: Collection[str]) -> bool:
    """Whether a value reads one of the tensors."""
    return any(
        isinstance(x, Atom) and x.kind in ("access", "pred") and x.name.removeprefix("access:") in tensors
        for x in values_inside(v)
    )


class Writer(Finisher):
    """Writes the Einsums of one derivation."""

    def _lowering(self) -> Lowering:
        return Lowering(
            self._hook, self.guarded, self._exponents(), self._named, negated=self._negated, emptied=self.emptied
        )

    def _exponents(self) -> frozenset[str]:
        if self.kind != "exponent":
            return frozenset()
        return frozenset(c.name for c in self.component.values() if c.atom.name == "max")

    def _named(self, f: Form) -> Expr | None:
        """A value that a statement of the user's computes is read from that statement's tensor."""
        return self._read_map(self.maps.get(f.digest))

    def _negated(self, f: Form) -> Expr | None:
        return self._read_map(self.negatives.get(f.digest))

    def _read_map(self, name: str | None) -> Expr | None:
        if name is None or name in self.writing:
            return None
        output = self.c.einsum_of[name].output
        if name not in self.written:
            self.written.add(name)
            self.writing.add(name)
            expr = self._typed(self.mapped[name], self.reader.types[name])
            self.writing.discard(name)
            self.einsums.append(Einsum((output,), expr))
        return Access(name, tuple(Rank(r) for r in output.ranks))

    def _find_maps(self) -> None:
        """The user's map Einsums that are worth a tensor: those of more than one operation.

        Where a stream's values are in it, what it computes is mostly read once, and written where it is read, unless
        it nests deep.
        """
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
            done = self._finished(value)
            if is_integral(done) and is_float(self.reader.types[name]):
                continue  # coordinates are equal to it that must stay integers, as indices
            if done == value or nesting(done, self.depths) > DEEP:
                self.maps.setdefault(done.digest, name)
                self.mapped[name] = done
        for name in self.maps.values():
            opposite = neg(self.mapped[name]).digest
            if opposite not in self.maps:
                self.negatives.setdefault(opposite, name)

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
        name, ranks = self._user_name(lift(a)) or (
            fresh(self.wanted.get(a.digest, "T"), self.taken),
            self._ranks(a),
        )
        self.named[a.digest] = (name, ranks)
        if a.name == "sum" and all(
            isinstance(x, Form) and x.terms and all(m.exponent is not None for m in x.terms) for x in a.args
        ):
            self.guarded[name] = None
            if all(is_unmasked(x) for x in a.args if isinstance(x, Form)):
                self.emptied[name] = a.ranks
        self.einsums.append(Einsum((Output(name, ranks),), Reduce(a.name, a.ranks, body)))
        return a.digest

    def _body(self, x: Value) -> Value:
        """An argument of a reduction, over the streams' results, whose Einsums are written first."""
        finished = self._finished_value(x)
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
        name = fresh(f"stream{len(self.streams) + 1}", self.taken)
        writer = StepWriter(self.plan, components, self.kind, self._finished)
        # What reads the stream's end is not what its steps compute, though it reads the same.
        own = {c.name for c in components}
        after = {n for n, v in self.mapped.items() if n not in self.written and reads(v, own)}
        self.writing |= after
        monoid, einsum = writer.write(name, self._lowering())
        self.monoids.append(monoid)
        plain = all(
            c.atom.name in ("sum", "max", "min") and not (c.gauge is not None and c.gauge.power) for c in components
        )
        step = writer.step(self._lowering()) if plain else ()
        self.writing -= after
        self.einsums.append(einsum)  # after the statements of the user's that the step reads
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
                final = self._finished_value(v)
                if isinstance(final, Form) and final.constant is not None and self.reader.is_typed(original, dtype):
                    final = widened(final, dtype)
                args.append(
                    lowering.float(final, dtype)
                    if isinstance(final, Form) and dtype in ("f32", "f64")
                    else lowering.value(final)
                )
            self.einsums.append(replace(e, expr=replace(e.expr, args=tuple(args))))
            return
        final = self._finished_value(values[0])
        self.einsums.append(replace(e, expr=self._typed(final, self.reader.types[e.name])))

    def _typed(self, v: Value, dtype: str) -> Expr:
        lowering = self._lowering()
        if isinstance(v, Form) and dtype[0] in "fb" and dtype != "bool":
            return lowering.float(v, "f64" if dtype == "f64" else "f32")
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
        final = self._finished_value(value)
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
                final = inner if isinstance(inner, Form) else final
        if dtype == "f64" and isinstance(final, Form) and final.constant is not None:
            final = widened(final, dtype)
        expr = self._typed(final, dtype)
        if any(o.name == name for w in self.einsums for o in w.outputs):
            # A reduction below took the name, as it is the output itself.
            return
        self.einsums.append(Einsum((replace(e.output, dtype=e.output.dtype),), expr))

    def _used_monoids(self) -> tuple[Monoid, ...]:
        used = {n.op for e in self.einsums for n in e.reductions}
        return tuple(m for m in self.monoids if m.name in used)
