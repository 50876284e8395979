"""What castile can say about a cascade: values first, then JSON. `report` gives them their text.

`driver.explain` fills an `Explanation`. Its first part describes the cascade as written (ranks, tensors, Einsums,
passes); its second part, empty where nothing was derived, tells what the algebra made of it and why.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..ir.cascade import Cascade, Einsum, Reduce
from ..ir.extents import Binding, bindings
from ..ir.ops import REDUCTIONS
from ..ir.print import print_einsum, print_expr
from ..ir.types import tensor_types
from ..ir.verify import scan_step
from .count import needed, traversals
from .work import Poly, Work, axis_size, is_contraction, least_bytes, operations, sizes_of, tensor_bytes, total, work

if TYPE_CHECKING:
    from rich.text import Text


@dataclass(frozen=True, slots=True)
class RankReport:
    """A rank: where its extent comes from, and by which reductions and scans it is traversed."""

    name: str
    extent: str
    traversed: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TensorReport:
    """A tensor: ``axes`` are its sizes, ``role`` is "input", "intermediate", "result" or "unused"."""

    name: str
    role: str
    dtype: str
    axes: tuple[str, ...]
    bytes: Poly


@dataclass(frozen=True, slots=True)
class EinsumReport:
    """An Einsum: what it writes, what it does in words, its cost, and in which pass over each rank it stands."""

    name: str
    outputs: tuple[str, ...]
    text: str
    does: str
    passes: Mapping[str, int]
    work: Work


@dataclass(frozen=True, slots=True)
class Rewrite:
    """A step of the derivation: the Einsums before and after as text, and why it is legal."""

    name: str
    before: str
    after: str
    reason: str


@dataclass(frozen=True, slots=True)
class Barrier:
    """A reduction over ``rank`` that must wait for another: the expression that blocks it, and why."""

    integrand: str
    rank: str
    expression: str
    reason: str


@dataclass(frozen=True, slots=True)
class State:
    """The state of a streamed rank, a monoid: identity and combination by component, and what keeps it finite.

    ``correction`` says what an old state is multiplied by when the gauge moves, and how far a reference moves;
    ``gauge`` names what the state follows ("running maximum", "extended exponent", "moving reference", "none").
    """

    reduction: str
    rank: str
    components: tuple[str, ...]
    identity: tuple[str, ...]
    combine: tuple[str, ...]
    correction: str
    gauge: str


@dataclass(frozen=True, slots=True)
class Alternative:
    """Another form of the same cascade, offered to the tuner: its passes by rank, and when it may win."""

    name: str
    passes: Mapping[str, int]
    reason: str


@dataclass(frozen=True, slots=True)
class KernelReport:
    """A group of Einsums that runs as one kernel: parallel ranks, the streamed rank, and why it is one."""

    name: str
    einsums: tuple[str, ...]
    parallel: tuple[str, ...]
    streamed: str
    reason: str


@dataclass(frozen=True)
class Explanation:
    """What is known of a cascade. ``str`` gives a text for people, `to_json` the same for programs.

    ``passes`` maps each rank that is reduced or scanned to the passes over it (as written, after the algebra).
    ``extents`` is empty unless sizes were given; then every formula has a value too.
    """

    cascade: Cascade
    passes: Mapping[str, tuple[int, int]]
    ranks: tuple[RankReport, ...]
    tensors: tuple[TensorReport, ...]
    einsums: tuple[EinsumReport, ...]
    extents: Mapping[str, int] = field(default_factory=dict)
    rewrites: tuple[Rewrite, ...] = ()
    barriers: tuple[Barrier, ...] = ()
    states: tuple[State, ...] = ()
    alternatives: tuple[Alternative, ...] = ()
    kernels: tuple[KernelReport, ...] = ()

    @property
    def operations(self) -> dict[str, Poly]:
        """Operations of all Einsums by unit: "matrix", "vector" and "special"."""
        return operations(e.work for e in self.einsums)

    @property
    def bytes_alone(self) -> Poly:
        """Bytes moved when every Einsum runs on its own."""
        return total(p for e in self.einsums for p in (e.work.bytes_read, e.work.bytes_written))

    @property
    def bytes_least(self) -> Poly:
        """Bytes moved when inputs are read once, results written once, and nothing between touches memory."""
        return least_bytes(self.cascade)

    def value(self, formula: Poly) -> int | None:
        """The value of a formula at the given extents; None where none were given."""
        return formula.at(sizes_of(self.cascade, self.extents)) if self.extents else None

    def __str__(self) -> str:
        from .report import plain

        return plain(self)

    def __rich__(self) -> Text:
        from .report import styled

        return styled(self)

    def to_json(self) -> str:
        """One JSON document, as a string; `to_dict` gives the same as Python values."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False)

    def to_dict(self) -> dict[str, Any]:
        """What `to_json` writes: formulas as ``{"formula": "2*q*k*d", "value": …}``, passes as ``[before, after]``."""
        c = self.cascade
        return {
            "name": c.name,
            "key": c.key,
            "numerics": c.numerics,
            "text": str(c),
            "extents": dict(self.extents),
            "passes": {rank: list(pair) for rank, pair in self.passes.items()},
            "ranks": [self._plain(r) for r in self.ranks],
            "tensors": [self._plain(t) for t in self.tensors],
            "einsums": [self._einsum(e) for e in self.einsums],
            "total": {
                "operations": self._plain(self.operations),
                "bytes_alone": self._plain(self.bytes_alone),
                "bytes_least": self._plain(self.bytes_least),
            },
            "rewrites": [self._plain(r) for r in self.rewrites],
            "barriers": [self._plain(b) for b in self.barriers],
            "states": [self._plain(s) for s in self.states],
            "alternatives": [self._plain(a) for a in self.alternatives],
            "kernels": [self._plain(k) for k in self.kernels],
        }

    def _einsum(self, e: EinsumReport) -> dict[str, Any]:
        row: dict[str, Any] = self._plain(e)
        return {**{key: value for key, value in row.items() if key != "work"}, **row["work"]}

    def _plain(self, value: Any) -> Any:
        """Dataclasses as objects, tuples as arrays, formulas with their values."""
        match value:
            case Poly():
                return {"formula": value.formula(), "value": self.value(value)}
            case Mapping():
                return {key: self._plain(item) for key, item in value.items()}
            case tuple():
                return [self._plain(item) for item in value]
            case str() | int() | None:
                return value
            case _:
                return {name: self._plain(getattr(value, name)) for name in value.__dataclass_fields__}


def rank_reports(c: Cascade) -> tuple[RankReport, ...]:
    """Every rank, in order of first appearance."""
    origin = {b.rank: _origin(b) for b in bindings(c)}
    traversed: dict[str, list[str]] = {r: [] for r in c.ranks}
    for e in c.einsums:
        for reduction in e.reductions:
            for r in reduction.ranks:
                traversed[r].append(f"{reduction.op} in {e.name}")
        if (scan := scan_step(e)) is not None:
            traversed[scan.rank].append(f"scan of {e.name}")
    return tuple(RankReport(r, origin[r], tuple(traversed[r])) for r in c.ranks)


def _origin(b: Binding) -> str:
    if b.param is not None:
        return f"axis {b.param[1]} of {b.param[0]}"
    use = b.within[0]
    return f"the largest that keeps `{print_expr(use.index)}` inside axis {use.axis} of {use.tensor}"


def tensor_reports(c: Cascade) -> tuple[TensorReport, ...]:
    """Every tensor, parameters first."""
    live, sizes = needed(c), tensor_bytes(c)

    def role(name: str) -> str:
        if name in c.outputs:
            return "result"
        if name not in live:
            return "unused"
        return "input" if name in c.param_of else "intermediate"

    return tuple(
        TensorReport(name, role(name), dtype, tuple(axis_size(i) for i in c.indices_of(name)), sizes[name])
        for name, dtype in tensor_types(c).items()
    )


def einsum_reports(c: Cascade) -> tuple[EinsumReport, ...]:
    """Every Einsum, in order."""
    by_rank = traversals(c)
    reports = []
    for e, done in zip(c.einsums, work(c), strict=True):
        passes = {r: names[e.name] for r, names in by_rank.items() if e.name in names}
        reports.append(EinsumReport(e.name, tuple(o.name for o in e.outputs), print_einsum(e), does(e), passes, done))
    return tuple(reports)


def does(e: Einsum) -> str:
    """What an Einsum does, in words: ``contraction over d``, ``max over k, scan along t``, ``map``."""
    words = [f"{_reduction(r)} over {', '.join(r.ranks)}" for r in e.reductions]
    if (scan := scan_step(e)) is not None:
        words.append(f"scan {'along' if scan.direction > 0 else 'back along'} {scan.rank}")
    return ", ".join(words) or "map"


def _reduction(r: Reduce) -> str:
    if r.op not in REDUCTIONS:
        return f"monoid {r.op}"
    return "contraction" if is_contraction(r) else r.op


def written_axis(axis: str) -> str:
    """The name of a size as people write it: ``⌈k/8⌉`` for ``ceil(k/8)``."""
    return str(Poly((((axis,), 1),))) if not axis.isdigit() else axis
