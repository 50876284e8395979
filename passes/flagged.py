"""A user's monoid with flags in its state: bools that say of a component whether masks left out what it is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..ir.cascade import (
    Access,
    Const,
    Expr,
    Monoid,
    literal_value,
    tensors_read,
)
from ..ir.types import TypeChecker, body_types, is_float
from .fresh import fresh
from .masked import ALWAYS, NEVER, Expressions, Flags


def flagged_monoid(
    m: Monoid, types: Sequence[str], elements: Sequence[Flags], name: str
) -> tuple[Monoid, list[tuple[int, str]]]:
    """A monoid that carries flags, and which components of its state they are of.

    As nothing went into an empty state, its 0 and -inf count as masked.
    """
    known = [is_float(t) for t in types]
    start = [
        Flags(_truth(v, 0), _truth(v, -float("inf"))) if k else NEVER for v, k in zip(m.identity, known, strict=True)
    ]
    kinds = {(i, k) for i, (a, b) in enumerate(zip(start, elements, strict=True)) for k in _kinds(a, b)}
    while True:
        body = _Body(m, types, kinds)
        found = body.run()
        more = {(i, k) for i, f in enumerate(found) for k in _kinds(f) if known[i]}
        if more <= kinds:
            break
        kinds |= more
    components = sorted(kinds)

    def of(f: Flags, kind: str) -> Expr:
        return (f.zero if kind == "zero" else f.minus) or Const(False)

    results: list[str] = []
    written = list(body.body)
    for i, k in components:
        flag = of(found[i], k)
        own = isinstance(flag, Access) and flag.tensor not in (*results, *body.names.values())
        results.append(flag.tensor if isinstance(flag, Access) and own else fresh(f"{m.results[i]}_{k}", body.taken))
        written += [] if own else [(results[-1], flag)]
    params = [*m.params[: m.width], *(body.names[m.params[i], k] for i, k in components)]
    params += [*m.params[m.width :], *(body.names[m.params[i + m.width], k] for i, k in components)]
    identity = (*m.identity, *(of(start[i], k) for i, k in components))
    return Monoid(
        name, identity, tuple(params), (*m.results, *results), _needed(written, {*m.results, *results})
    ), components


def _truth(v: Expr, number: float) -> Expr | None:
    return ALWAYS if literal_value(v) == number else None


def _kinds(*flags: Flags) -> list[str]:
    found = ("zero",) if any(f.zero for f in flags) else ()
    return [*found, *(("masked",) if any(f.minus for f in flags) else ())]


def _needed(body: Sequence[tuple[str, Expr]], wanted: set[str]) -> tuple[tuple[str, Expr], ...]:
    """The assignments that the wanted names are made of."""
    kept = []
    for name, value in reversed(body):
        if name in wanted:
            kept.append((name, value))
            wanted |= set(tensors_read(value))
    return tuple(reversed(kept))


class _Body(Expressions):
    """A monoid's body with flags, given the components of the state that may have some."""

    def __init__(self, m: Monoid, types: Sequence[str], kinds: set[tuple[int, str]]) -> None:
        super().__init__(TypeChecker(body_types(m, tuple(types)), {}), True)
        self.m = m
        self.taken = {*m.params, *m.results, *(name for name, _ in m.body)}
        self.of: dict[str, Flags] = {}
        self.names: dict[tuple[str, str], str] = {}
        self.body: list[tuple[str, Expr]] = []
        for i, kind in sorted(kinds):
            for param in (m.params[i], m.params[i + m.width]):
                self.names[param, kind] = name = fresh(f"{param}_{kind}", self.taken)
                now, held = self.of.get(param, NEVER), Access(name)
                self.of[param] = replace(now, zero=held) if kind == "zero" else replace(now, minus=held)

    def access(self, e: Access) -> Flags:
        return self.of.get(e.tensor, NEVER)

    def run(self) -> list[Flags]:
        """Write the body; the flags of the results."""
        for name, value in self.m.body:
            self.body.append((name, self.value(value)))
            own = self.flags(value) if is_float(self.checker.tensors[name]) else NEVER
            self.of[name] = Flags(self._named(name, "zero", own.zero), self._named(name, "masked", own.minus))
        return [self.of.get(r, NEVER) for r in self.m.results]

    def _named(self, name: str, kind: str, p: Expr | None) -> Expr | None:
        if p is None or isinstance(p, Access | Const):
            return p
        held = fresh(f"{name}_{kind}", self.taken)
        self.body.append((held, p))
        return Access(held)
