"""A derivation in the user's own names: the rewrites that fired and the barriers that stand, as text."""

from __future__ import annotations

from dataclasses import dataclass

from ..ir.cascade import Access, Expr, Rank
from ..ir.print import print_expr
from .centred import spread
from .forms import Atom, Form, Value, lift, neg
from .ledger import Barrier, Rewrite
from .lower import Lowering
from .waiting import WAITED, waited_for
from .write import Writer

# How long a shown value may be, and how deep it may nest before an ellipsis to be no longer.
SHOWN_LENGTH = 240
SHOWN_DEPTHS = (12, 6, 5, 4, 3)

# How many of the values that something waits for are named.
MAX_WAITED = 3


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
        whole = (
            set() if itself or isinstance(v, Atom) else {v.digest, neg(v).digest, *(v.atom and [v.atom.digest] or ())}
        )
        names, opposites = self._own_names()

        def read(name: str | None) -> Expr | None:
            return None if name is None else Access(name, tuple(Rank(r) for r in self.c.einsum_of[name].output.ranks))

        def named(f: Form) -> Expr | None:
            return None if f.digest in whole else read(names.get(f.digest))

        def negated(f: Form) -> Expr | None:
            return None if f.digest in whole else read(opposites.get(f.digest))

        def hook(a: Atom) -> Expr | None:
            return None if not a.args or a.digest in whole else read(names.get(a.digest))

        if isinstance(v, Atom) and v.kind != "pred" and v.kind != "lbr":
            v = lift(v)
        for room in SHOWN_DEPTHS:
            text = print_expr(Lowering(hook, named=named, room=room, negated=negated).value(v))
            if len(text) <= SHOWN_LENGTH:
                break
        return text

    def _own_names(self) -> tuple[dict[bytes, str], dict[bytes, str]]:
        """The user's tensors by what they hold, and by its negative."""
        if not self.told[0]:
            for name, f in self.reader.forms.items():
                if isinstance(f, Form) and f.constant is None:
                    self.told[0][f.digest] = name
                    self.told[1][neg(f).digest] = name
                    if f.atom is not None:
                        self.told[0][f.atom.digest] = name
        return self.told

    def _steps(self) -> tuple[Step, ...]:
        return tuple(self._step(r) for r in self.reductions.rewrites.values() if self._took_place(r))

    def _took_place(self, r: Rewrite) -> bool:
        """Whether a rewrite is part of the result: what is centred must be carried."""
        return r.after is not None or (r.before.atom is not None and r.before.atom.digest in self.component)

    def _step(self, r: Rewrite) -> Step:
        atom = r.before.atom
        after = r.after
        if after is None:
            assert atom is not None
            after = spread(atom)
        reason = self._told(r.reason, atom.args[0], atom.ranks) if atom is not None else r.reason
        return Step(r.name, self._show(r.before), self._show(after), reason)

    def _told(self, reason: str, v: Value, ranks: tuple[str, ...]) -> str:
        """A reason with the values that are waited for in the user's names."""
        waited = waited_for(v, frozenset(ranks))
        names = [f"`{self._show(x, itself=True)}`" for x in waited[:MAX_WAITED]]
        if len(waited) > MAX_WAITED:
            names.append(f"{len(waited) - MAX_WAITED} more")
        return reason.replace(WAITED, " and ".join(dict.fromkeys(names)) or f"a reduction over {', '.join(ranks)}")

    def _blocks(self) -> tuple[Block, ...]:
        return tuple(self._block(b) for b in self.reductions.barriers.values() if b.integrand.digest in self.bodies)

    def _block(self, b: Barrier) -> Block:
        """A barrier in the user's names: "`abs(X[n, k] - mu[n])` is not a finite sum of terms over `mu[n]`"."""
        reason = self._told(b.reason, b.blocking, b.ranks)
        return Block(b.ranks, self._show(b.blocking, itself=True), self._show(b.integrand), reason)
