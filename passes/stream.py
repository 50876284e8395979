"""Streams as values: what is carried together over the same ranks, and under which gauges."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..ir.cascade import Einsum, Monoid
from .forms import Atom, Form

if TYPE_CHECKING:
    from .step import Step


@dataclass(frozen=True, slots=True)
class Gauge:
    """The scale of an exponential: ``value`` is the form that bounds the exponent, made of the extremes in it.

    With ``power`` p the scale is the p-th power of an extreme s, as in BLAS's nrm2: ``value`` is p log s.
    """

    exponent: Form
    brackets: tuple[Atom, ...]
    value: Form
    extremes: tuple[Atom, ...]
    power: int = 0

    @property
    def key(self) -> bytes:
        own = self.value.digest if self.power else b""
        return self.exponent.digest + b"".join(b.digest for b in self.brackets) + own


@dataclass(frozen=True, slots=True)
class Component:
    """One part of a stream's state: the reduction that it ends as, its tensor, and how it moves."""

    atom: Atom
    name: str
    ranks: tuple[str, ...]
    kind: str
    gauge: Gauge | None = None


@dataclass(frozen=True, slots=True)
class Stream:
    """Reductions over the same ranks that are carried together; written as one Einsum over a monoid.

    ``step`` says how the state takes in a whole tile; empty where it takes in one element after another.
    """

    ranks: tuple[str, ...]
    components: tuple[Component, ...]
    monoid: Monoid | None
    einsum: Einsum | None
    step: Step = ()
