"""A derivation in the user's own names: the rewrites that fired and the barriers that stand, as text."""

from __future__ import annotations

from dataclasses import dataclass

from ..ir.cascade import Access, Expr, Rank
from ..ir.print import print_expr
from .forms import Atom, Form, Value, lift
from .ledger import Barrier
from .lower import Lowering
from .waiting import WAITED, waited_for
from .write import Writer

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


class Teller(Writer):
    """Tells what was done."""

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
