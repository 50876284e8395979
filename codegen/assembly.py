"""A printed program with all that building and calling it takes: what a later process can use as it is.

It is data: text and names. Its JSON form lies in the build cache, so that a known kernel needs no deriving, no mapping
and no printing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from ..ir.cascade import Cascade, Const, Param, Rank, literal_value
from ..ir.errors import VerifyError
from ..ir.parse import parse
from ..ir.tile import TileKernel
from .interface import Field, arguments, bounded_ranks, entry_names


class Program(Protocol):
    """A cascade as kernels that run in order; ``scratch`` are the tensors that they pass to each other."""

    @property
    def cascade(self) -> Cascade: ...

    @property
    def kernels(self) -> tuple[TileKernel, ...]: ...

    @property
    def scratch(self) -> tuple[Param, ...]: ...


@dataclass(frozen=True, slots=True)
class Entry:
    """How one kernel is called: its symbol, the words of its argument struct, and which tensors these speak of.

    ``held`` limits extents; ranks in ``bounded`` need none.
    """

    symbol: str
    fields: tuple[Field, ...]
    tensors: tuple[str, ...]
    held: Mapping[str, int]
    bounded: frozenset[str]


@dataclass(frozen=True, slots=True)
class Assembly:
    """Kernels that run in order, their source, and the tensors that they write and pass to each other."""

    cascade: Cascade
    entries: tuple[Entry, ...]
    outputs: tuple[Param, ...]
    scratch: tuple[Param, ...]
    source: str

    def to_dict(self, written: Cascade) -> dict[str, Any]:
        """The JSON form, without the cascade's text where that which it was derived from is called alike."""
        alike = (written.params, written.ranks) == (self.cascade.params, self.cascade.ranks)
        return {
            "cascade": None if alike else str(self.cascade),
            "entries": [
                {
                    "symbol": e.symbol,
                    "fields": [[f.kind, f.name, f.axis] for f in e.fields],
                    "tensors": list(e.tensors),
                    "held": dict(e.held),
                    "bounded": sorted(e.bounded),
                }
                for e in self.entries
            ],
            "outputs": [[p.name, p.dtype, _axes(p)] for p in self.outputs],
            "scratch": [[p.name, p.dtype, _axes(p)] for p in self.scratch],
            "source": self.source,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], written: Cascade) -> Assembly:
        """From the JSON form, as this version of castile made it for the same cascade as written."""
        cascade = written if data["cascade"] is None else parse(data["cascade"])
        entries = tuple(
            Entry(
                e["symbol"],
                tuple(Field(*f) for f in e["fields"]),
                tuple(e["tensors"]),
                e["held"],
                frozenset(e["bounded"]),
            )
            for e in data["entries"]
        )
        outputs, scratch = (tuple(_param(*p) for p in data[name]) for name in ("outputs", "scratch"))
        return cls(cascade, entries, outputs, scratch, data["source"])


def _axes(p: Param) -> list[str | int]:
    """The axes of a tensor that kernels write: ranks, which index it bare, and axes of known size."""
    return [i.name if isinstance(i, Rank) else int(literal_value(i) or 0) for i in p.indices]


def _param(name: str, dtype: str, axes: list[str | int]) -> Param:
    return Param(name, dtype, tuple(Rank(a) if isinstance(a, str) else Const(a) for a in axes))


def assemble(program: Program, source: str) -> Assembly:
    """The assembly of printed kernels. Raises `VerifyError` where one needs a tensor that the program does not have."""
    cascade, kernels, scratch = program.cascade, tuple(program.kernels), tuple(program.scratch)
    written = {p.name: p for k in kernels for p in k.tensors if p.name in k.outputs}
    for name in cascade.outputs:
        if name not in written:
            raise VerifyError(f"no kernel writes `{name}`")
    outputs = tuple(written[name] for name in cascade.outputs)
    known = {p.name for p in (*cascade.params, *outputs, *scratch)}
    for k in kernels:
        for p in k.tensors:
            if p.name not in known:
                raise VerifyError(f"kernel `{k.name}` needs `{p.name}`, which the program does not have")
    entries = tuple(_entry(k, symbol) for k, symbol in zip(kernels, entry_names(kernels), strict=True))
    return Assembly(cascade, entries, outputs, scratch, source)


def _entry(k: TileKernel, symbol: str) -> Entry:
    held: dict[str, int] = {}
    for h in k.held:
        held[h.of] = min(h.size, held.get(h.of, h.size))
    return Entry(symbol, arguments(k), tuple(p.name for p in k.tensors), held, bounded_ranks(k))
