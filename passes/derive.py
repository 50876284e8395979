"""Derive: a cascade read into normal forms, separated, stabilised, and written back as a cascade.

The result is a cascade like any other: streamed reductions are Einsums over monoids with tuple state. What fired,
what blocks and what streams is recorded for `castile explain`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ..ir.cascade import MAX_DEPTH, Cascade, Output
from ..ir.extents import bindings
from ..ir.mapping import ALTERNATIVES, FORMS
from ..ir.types import tensor_types
from ..ir.verify import verify
from .count import count_passes
from .extent import keeps_extents
from .flags import followable, written_out
from .forms import ONE_FRACTION, Atom, Form, Value, parts_of, values_inside
from .ledger import Barrier
from .lower_atoms import levels
from .places import ranking_behind
from .room import fits, with_room
from .stream import Stream
from .told import Block, Step, Teller
from .wide import in_f64
from .write import reads


@dataclass(frozen=True, slots=True)
class Derivation:
    """A derived cascade, with what was done to it.

    ``form`` names it among the alternatives: "as written", "deferred", "running maximum", "extended exponent", and
    where nothing is scaled "moving reference" or "separated".
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
    "maximum" or "exponent". A form never has more passes over a rank than the original: where it would, the next lower
    level is taken, in the end the original as it is.
    """
    return with_room(lambda: _derived(c, level, gauge), len(c.einsums))


def _derived(c: Cascade, level: str, gauge: str) -> Derivation:
    original, c = c, _followable(c)
    refused: tuple[Block, ...] | None = None
    for lower in reversed(FORMS[: FORMS.index(level) + 1]):
        found = _Deriver(c, lower, gauge).run()
        if isinstance(found, Derivation):
            return found if refused is None else replace(found, barriers=(*refused, *found.barriers))
        refused = found if refused is None else refused
    plain = _as_written(original)
    return Derivation("as written", plain, _passes(original, plain), (), refused or (), ())


def _followable(c: Cascade) -> Cascade:
    """The cascade with masks in the open where the algebra would lose them."""
    found = followable(c)
    return found if _passes(c, found) == count_passes(c) else c


def _as_written(c: Cascade) -> Cascade:
    """The cascade as it is, but for masks, which are nothing but numbers in a kernel."""
    found = written_out(c)
    plain = keeps_extents(c, found, {}) and fits(found) and _passes(c, found) == count_passes(c)
    return found if plain else c


def _passes(c: Cascade, made: Cascade) -> dict[str, int]:
    """The passes of a cascade over each rank of the one that it was made from."""
    after = count_passes(made)
    return {r: after.get(r, 0) for r in count_passes(c)}


def alternatives(c: Cascade) -> tuple[Derivation, ...]:
    """The forms of one cascade that compute the same, fewest passes first; equal cascades appear once."""
    found: dict[Cascade, Derivation] = {}
    for level, gauge in ALTERNATIVES:
        d = derive(c, level, gauge)
        found.setdefault(d.cascade, d)
    return tuple(found.values())


def form_name(level: str, gauge: str, streams: Sequence[Stream], centred: bool) -> str:
    if level == "none":
        return "as written"
    if level == "defer":
        return "deferred"
    if any(c.gauge is not None for s in streams for c in s.components):
        return "extended exponent" if gauge == "exponent" else "running maximum"
    return "moving reference" if centred else "separated"


def divides_integers(v: Value) -> bool:
    """Whether integers are divided by what may be 0."""
    return any(
        isinstance(x, Atom)
        and x.name in ("floordiv", "mod")
        and isinstance(by := x.args[1], Form)
        and not (by.constant or 0)
        for x in values_inside(v)
    )


class _Deriver(Teller):
    """One derivation."""

    def run(self) -> Derivation | tuple[Block, ...]:
        """The derivation, or why the level has none."""
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
            # What earlier places leave out is looked at only where places are rewritten (`Orders`).
            if carried or (self.level == "full" and ranking_behind(atom) is not None):
                if not self.plan.include(atom):
                    self._demote(atom)
                    self.plan.include(atom)
        self.groups = self.plan.groups()
        self.group_of = {a.digest: i for i, g in enumerate(self.groups) for a in g}
        self.taken |= {o.name for e in c.einsums for o in e.outputs}
        self._name_components()
        self._find_maps()
        order = {name: i for i, name in enumerate(o.name for e in c.einsums for o in e.outputs)}
        for name in sorted(c.outputs, key=lambda n: order[n]):
            self._output(name)
        written = replace(c, einsums=tuple(self.einsums), monoids=self._used_monoids())
        derived = self._with_types(in_f64(written, {s.einsum.name for s in self.streams if s.einsum is not None}))
        if not keeps_extents(c, derived, self.reader.instances):
            return (self._unknown_extent(),)
        if not fits(derived):
            return (Block((), "", "", f"written out, an expression would nest deeper than {MAX_DEPTH} levels"),)
        verify(derived)
        passes = _passes(c, derived)
        if any(passes[r] > n for r, n in before.items()):
            return ()
        form = form_name(
            self.level, self.kind, self.streams, bool(self.reductions.centred.keys() & self.component.keys())
        )
        return Derivation(form, derived, passes, self._steps(), self._blocks(), tuple(self.streams))

    def _with_types(self, derived: Cascade) -> Cascade:
        """The outputs with the types that they have in the original, declared where their expressions give others."""
        types = tensor_types(derived)
        alone = {e.name for e in derived.einsums if len(e.outputs) == 1}
        wrong = {o for o in derived.outputs if o in alone and types[o] != self.reader.types[o]}
        if not wrong:
            return derived

        def declared(o: Output) -> Output:
            return replace(o, dtype=self.reader.types[o.name]) if o.name in wrong else o

        einsums = (replace(e, outputs=tuple(map(declared, e.outputs))) for e in derived.einsums)
        return replace(derived, einsums=tuple(einsums))

    def _unknown_extent(self) -> Block:
        loose = ", ".join(b.rank for b in bindings(self.c) if b.param is None)
        return Block((), loose, "", f"only indices say how large {loose} is, and a rewrite would drop some of them")

    def _certain(self) -> set[bytes]:
        """What the cascade computes under no condition: reductions that may stand on their own."""
        roots = list(self.reader.forms.values()) + [v for vs in self.reader.opaque.values() for v in vs]

        def certain(v: Value) -> Iterable[Value]:
            if isinstance(v, Atom):
                return () if v.kind == "pred" and v.name == "where" else v.args
            # What the first brackets ask is computed; what they guard may not be.
            return [
                x for m in v.terms for x in (levels(m.brackets)[0] if m.brackets else parts_of(Form({m: ONE_FRACTION})))
            ]

        return {v.digest for v in values_inside(*roots, parts=certain)}

    def _needs_guard(self, a: Atom) -> bool:
        """Whether a condition around a reduction may be what gives it a meaning: reads in bounds, a fiber not empty,
        a divisor that is not 0."""
        if a.name == "argmax" and (self.level != "full" or ranking_behind(a) is None):
            # That of nothing is an error; merged with earlier places, it is no place.
            return True
        return any(self.reader.reads_elsewhere(x) or divides_integers(x) for x in a.args)

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
        self.reductions.rewrites.pop(atom.digest, None)
        body = atom.args[0]
        assert isinstance(body, Form)
        key = (atom.digest, atom.ranks)
        reason = "its reference is reduced over other ranks than it, so no state holds both"
        self.reductions.barriers.setdefault(key, Barrier(atom.ranks, body, body, reason))


def _reading(v: Value, tensor: str) -> list[Atom]:
    """The reductions inside a value that read the tensor."""
    inside = (x for x in values_inside(v) if isinstance(x, Atom) and x.kind == "red")
    return [x for x in inside if reads(x, {tensor})]
