"""The account of building reductions: rewrites that fired, barriers that stand, sums that need a gauge or a basis."""

from __future__ import annotations

from dataclasses import dataclass, field

from .forms import Atom, Form

# Expansions past this many terms keep the barrier: the state would cost more than the pass that it saves.
MAX_TERMS = 8


@dataclass(frozen=True, slots=True)
class Barrier:
    """An expression that keeps a reduction waiting: over which ranks, what blocks, and why it does."""

    ranks: tuple[str, ...]
    blocking: Form
    integrand: Form
    reason: str


@dataclass(frozen=True, slots=True)
class Rewrite:
    """A rewrite that fired: its name, the value before and after (None: multiplied out), and why it may."""

    name: str
    before: Form
    after: Form | None
    reason: str


@dataclass
class Ledger:
    """The account that reductions keep while they are built.

    ``level`` says how far separation goes: "none" as written, "defer" factors only, "full" exponents and sums too.
    ``numerics`` decides which casts may move; ``order`` is the order of the ranks in a reduction over several.
    ``room`` caps the terms that opening products of sums may add in all; ``opened`` counts them.
    """

    level: str = "full"
    numerics: str = "standard"
    order: dict[str, int] = field(default_factory=dict)
    room: int = 2 * MAX_TERMS
    opened: int = 0
    bare: set[bytes] = field(default_factory=set)
    infinite: dict[bytes, bool] = field(default_factory=dict)
    centred: dict[bytes, Atom] = field(default_factory=dict)
    powers: dict[bytes, tuple[Atom, int]] = field(default_factory=dict)
    barriers: dict[tuple[bytes, tuple[str, ...]], Barrier] = field(default_factory=dict)
    rewrites: dict[bytes, Rewrite] = field(default_factory=dict)

    def _block(self, ranks: tuple[str, ...], blocking: Form, integrand: Form, reason: str) -> None:
        self.barriers.setdefault((blocking.digest, ranks), Barrier(ranks, blocking, integrand, reason))

    def _ordered(self, ranks: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(sorted(ranks, key=lambda r: (self.order.get(r, len(self.order)), r)))
