"""The account of a derivation: rewrites, barriers, states, alternatives and kernels as `explain` reports them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..ir.cascade import Cascade, Einsum, tensors_read
from ..ir.print import print_expr
from .count import needed
from .derive import Derivation
from .explain import Alternative, Barrier, KernelReport, Rewrite, State
from .fuse import epilogues, fusible, is_map, nominal_extents, stored

# When a form may win, by its name.
_WHEN = {
    "running maximum": "fewest passes; each step rescales what came before when the maximum moves",
    "extended exponent": "as many passes; what is carried stays near 1, and is rescaled by whole powers only",
    "moving reference": "fewest passes; sums are taken about a value that moves as more is seen",
    "separated": "fewest passes; nothing has to be rescaled",
    "deferred": "factors leave the sums, exponents stay: fewer operations a step, more passes",
    "as written": "every pass as in the text: best where a whole fiber fits in cache",
}


def rewrites(d: Derivation) -> tuple[Rewrite, ...]:
    return tuple(Rewrite(s.name, s.before, s.after, s.reason) for s in d.steps)


def barriers(d: Derivation) -> tuple[Barrier, ...]:
    """The barriers that stand, each with the integrand in which it was met."""
    return tuple(Barrier(b.integrand, ", ".join(b.ranks), b.expression, b.reason) for b in d.barriers)


def states(d: Derivation) -> tuple[State, ...]:
    """What each stream carries."""
    found = []
    for s in d.streams:
        if s.monoid is None or s.einsum is None:
            continue
        body = dict(s.monoid.body)
        moves = [f"{n} = {print_expr(e)}" for n, e in s.monoid.body if n not in s.monoid.results]
        scaled = any(c.gauge is not None for c in s.components)
        found.append(
            State(
                reduction=s.monoid.name,
                rank=", ".join(s.ranks),
                components=tuple(o.name + (f"[{', '.join(o.ranks)}]" if o.ranks else "") for o in s.einsum.outputs),
                identity=tuple(print_expr(i) for i in s.monoid.identity),
                combine=tuple(f"{r} = {print_expr(body[r])}" for r in s.monoid.results if r in body),
                correction="; ".join(moves),
                gauge=d.form if scaled or d.form == "moving reference" else "none",
            )
        )
    return tuple(found)


def alternatives(forms: Sequence[Derivation]) -> tuple[Alternative, ...]:
    """The other forms of the same cascade that a tuner may choose."""
    return tuple(Alternative(d.form, d.passes, _WHEN.get(d.form, "")) for d in forms)


def kernels(c: Cascade, extents: Mapping[str, int]) -> tuple[KernelReport, ...]:
    """How the Einsums of a derived cascade group into kernels at these extents, or at nominal ones."""
    live = needed(c)
    inside = fusible(c, dict(extents) or nominal_extents(c))
    found: list[KernelReport] = []
    absorbed: set[str] = set()
    for e in c.einsums:
        if not any(o.name in live for o in e.outputs) or e.name in inside or e.name in absorbed:
            continue
        if is_map(e) and e.name not in c.outputs:
            continue
        after = epilogues(c, e) if not is_map(e) else []
        absorbed |= {m.name for m in after}
        found.append(_kernel(c, e, after, inside, stored(c, e, absorbed)))
    return tuple(found)


def _kernel(c: Cascade, e: Einsum, after: list[Einsum], inside: Mapping[str, object], kept: set[str]) -> KernelReport:
    """One kernel: the Einsum that anchors it, what is computed in its loops, and what follows in it."""
    before = _producers(c, e)
    fused = [x for x in before if x.name in inside]
    names = [x.name for x in before if x.name in inside or is_map(x)] + [o.name for o in e.outputs]
    names += [m.name for m in after]
    streamed = tuple(dict.fromkeys(r for n in e.reductions for r in n.ranks))
    reasons = []
    if fused:
        listed = ", ".join(f"`{x.name}`" for x in fused)
        reasons.append(f"{listed} is computed tile by tile inside the loop that reads it, and never stored")
    if after:
        reasons.append(f"{', '.join(f'`{m.name}`' for m in after)} is finished from the values still on chip")
    if kept - set(c.outputs):
        reasons.append(
            f"{', '.join(f'`{n}`' for n in sorted(kept - set(c.outputs)))} goes to memory for another kernel"
        )
    parallel = tuple(r for r in e.ranks)
    return KernelReport(e.name, tuple(names), parallel, ", ".join(streamed), "; ".join(reasons))


def _producers(c: Cascade, e: Einsum) -> list[Einsum]:
    """The maps and fused reductions that an Einsum reads, directly or through each other, in order."""
    wanted = set(tensors_read(e.expr))
    found: list[Einsum] = []
    for x in reversed(c.einsums[: c.einsums.index(e)]):
        if x.name in wanted and len(x.outputs) == 1 and x.name not in c.outputs:
            found.append(x)
            if is_map(x):
                wanted |= set(tensors_read(x.expr))
    return found[::-1]
