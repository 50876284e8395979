"""Reductions in normal form: what leaves a reduction, what stays, and what blocks.

Let ``⊕_k f(x_k; r)`` be a reduction over k whose integrand uses r, a value already reduced over k: a barrier. If f is
a finite sum of terms u_j(x_k) · v_j(r), and · distributes over ⊕, then ``⊕_k f = Σ_j v_j(r) · ⊕_k u_j(x_k)``: no
reduction waits for r any more (design, section 3). Three things may leave a sum:

- a factor that does not vary with k (J = 1: attention's normaliser, the norm of RMSNorm + GEMM);
- a term of an exponent that is reduced over k, which leaves the exponential *bare*: it is computed scaled, by a
  gauge;
- nothing, where a difference ``a(x_k) - r`` stands in the integrand: it separates by the binomial theorem, but the
  separated sums cancel, so the reduction stays *centred* and is carried in a running basis (J >= 2: variance,
  LayerNorm + GEMM, dQ).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from math import inf

from .normal import (
    ONE_FRACTION,
    UNIT,
    ZERO,
    Atom,
    Form,
    Monomial,
    Value,
    add,
    atom_nonnegative,
    bracket,
    compare,
    const,
    exp,
    factored,
    function,
    lift,
    masked,
    mul,
    negate,
    nonnegative,
    power,
    rewrite,
    scale,
    select,
    times,
    values_inside,
)
from .places import Ranking, ranking_of, split_masks

# Expansions past this many terms keep the barrier: the state would cost more than the pass that it saves.
MAX_TERMS = 8

# In a barrier's reason, the place of the values that it waits for.
WAITED = "{waited}"

# Functions through which a maximum passes: strictly increasing everywhere that they are defined.
_INCREASING = frozenset({"exp", "log", "sqrt", "tanh", "sigmoid", "erf", "expm1", "log1p"})


@dataclass(frozen=True, slots=True)
class Barrier:
    """An expression that keeps a reduction waiting: over which ranks, what blocks, and why it does."""

    ranks: tuple[str, ...]
    blocking: Form
    integrand: Form
    reason: str


@dataclass(frozen=True, slots=True)
class Rewrite:
    """A rewrite that fired: its name, the value before and after."""

    name: str
    before: Form
    after: Form
    reason: str


@dataclass
class Reductions:
    """Builds reductions and keeps what happened: bare exponents, centred sums, barriers, rewrites.

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
    centred: dict[bytes, Atom] = field(default_factory=dict)
    powers: dict[bytes, tuple[Atom, int]] = field(default_factory=dict)
    barriers: dict[tuple[bytes, tuple[str, ...]], Barrier] = field(default_factory=dict)
    rewrites: dict[bytes, Rewrite] = field(default_factory=dict)

    def reduce(self, op: str, ranks: tuple[str, ...], body: Form, dtype: str = "f32") -> Form:
        """A reduction of one body, simplified."""
        ranks = self._ordered(ranks)
        match op:
            case "sum":
                return self.sum(ranks, body)
            case "max" | "min":
                return self.extreme(op, ranks, body, dtype)
            case "argmax":
                return self.argmax(ranks, body)
            case _:
                return self.opaque(op, ranks, body, dtype)

    def opaque(self, op: str, ranks: tuple[str, ...], body: Form, dtype: str = "f32") -> Form:
        if waits(body, frozenset(ranks)):
            self._block(ranks, body, body, f"no factor leaves a reduction by {op}")
        return lift(Atom("red", op, (body,), ranks, dtype))

    # Sums

    def sum(self, ranks: tuple[str, ...], body: Form) -> Form:
        over = frozenset(ranks)
        if not body.terms:
            return ZERO
        if self.level == "none":
            return self._plain(ranks, body)
        inner = self._nested(ranks, body)
        if inner is not None:
            return inner
        first = _beside_exponents(ranks, body)
        if first:
            return self.sum(tuple(r for r in ranks if r not in first), self.sum(first, body))
        flat = self._flattened(ranks, body)
        if flat is not None:
            return flat
        groups: dict[Monomial, tuple[Form, bool]] = {}
        for m, q in self._distribute(body, over).terms.items():
            outer, rest, bared = self._split(m, over)
            kept, was = groups.get(outer, (ZERO, False))
            groups[outer] = (add(kept, Form({rest: q})), was or bared)
        total = []
        for outer, (inside, bared) in groups.items():
            value = self._remaining(ranks, inside, bared)
            self._note_power(outer, value)
            total.append(mul(Form({outer: ONE_FRACTION}), value))
        result = add(*total)
        if waits(body, over):
            before = lift(Atom("red", "sum", (body,), ranks))
            if result != before:
                self.rewrites.setdefault(before.digest, Rewrite("separate", before, result, _why(groups)))
        return result

    def _plain(self, ranks: tuple[str, ...], body: Form) -> Form:
        return lift(Atom("red", "sum", (body,), ranks))

    def _nested(self, ranks: tuple[str, ...], body: Form) -> Form | None:
        """A factor reduced over some of the ranks that varies over the others makes two nested sums."""
        done = _reduced_first(ranks, body)
        if not done:
            return None
        inner = tuple(r for r in ranks if r in done)
        outer = tuple(r for r in ranks if r not in done)
        return self.sum(outer, self.sum(inner, body))

    def _flattened(self, ranks: tuple[str, ...], body: Form) -> Form | None:
        """A sum of bare sums is one sum over all their ranks, so that one gauge bounds it.

        ``sum[j](w[j] * sum[i](exp(S[j, i])))`` -> ``sum[j, i](w[j] * exp(S[j, i]))``
        """
        over = frozenset(ranks)
        total: list[Form] = []
        kept = dict(body.terms)
        for m, q in body.terms.items():
            inner = [a for a, p in m.factors if p == 1 and a.free & over and self.is_bare(a)]
            if len(inner) != 1 or set(inner[0].ranks) & (over | m.free):
                continue
            atom = inner[0]
            rest = Form({Monomial([f for f in m.factors if f[0] != atom], m.exponent, m.brackets): q})
            held = atom.args[0]
            assert isinstance(held, Form)
            opened = add(*(mul(rest, Form({t: c})) for t, c in held.terms.items()))
            every = self._ordered(ranks + atom.ranks)
            if _reduced_first(every, opened):
                continue
            del kept[m]
            total.append(self.sum(every, opened))
        return add(self.sum(ranks, Form(kept)), *total) if total else None

    def _ordered(self, ranks: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(sorted(ranks, key=lambda r: (self.order.get(r, len(self.order)), r)))

    def _distribute(self, body: Form, over: frozenset[str]) -> Form:
        """Open products of sums where a term can leave the reduction; what remains inside stays factored."""
        terms: list[Form] = []
        for m, q in body.terms.items():
            terms.append(scale(self._open(m, over), q))
        return add(*terms)

    def _open(self, m: Monomial, over: frozenset[str]) -> Form:
        if m.exponent is not None and waits(m.exponent, over):
            m = Monomial(m.factors, expand(m.exponent, over), m.brackets)
        for a, p in m.factors:
            if a.kind != "poly" or not (a.free & over) or not waits_value(a, over):
                continue
            inner = a.args[0]
            assert isinstance(inner, Form)
            inner = expand_factors(inner, over)
            rest = Monomial([(b, n) for b, n in m.factors if b != a], m.exponent, m.brackets)
            core, mixed = split_core(inner, over)
            if p == 1 and mixed.terms:
                if not self._afford(len(mixed.terms) + bool(core.terms) - 1):
                    continue
                opened = [(times(t, rest), q) for t, q in mixed.terms.items()]
                pieces = [self._distribute(Form({t: q}), over) for t, q in opened if t is not None]
                if core.terms:
                    pieces.append(self._distribute(mul(Form({rest: ONE_FRACTION}), core), over))
                return add(*pieces)
            if p > 1 and mixed.terms:
                if len(inner.terms) ** p > 4 * MAX_TERMS or not self._afford(len(inner.terms) ** p - 1):
                    continue
                product = Form({rest: ONE_FRACTION})
                pieces = [product]
                for _ in range(p):
                    pieces = [mul(x, Form({t: q})) for x in pieces for t, q in inner.terms.items()]
                return add(*(self._distribute(x, over) for x in pieces))
        return Form({m: ONE_FRACTION})

    def _afford(self, more: int) -> bool:
        """Whether a sum may still be opened: in a deep chain of sums each opened one doubles those after it."""
        self.opened += more
        return self.opened <= self.room

    def _split(self, m: Monomial, over: frozenset[str]) -> tuple[Monomial, Monomial, bool]:
        """What leaves the sum, what stays, and whether an exponential was left bare."""
        outer, inner = [], []
        for a, p in m.factors:
            # A sum of nothing is 0, which no multiple of an infinity is.
            if not a.free & over and a.kind not in ("lbr", "inf"):
                outer.append((a, p))
                continue
            moved = self._cast(a, p, over)
            if moved is None:
                inner.append((a, p))
            else:
                out, stay = moved
                product = times(Monomial(outer), out)
                assert product is not None
                outer = list(product.factors)
                if out.exponent is not None:
                    rest = times(Monomial((), m.exponent, m.brackets), Monomial((), out.exponent, out.brackets))
                    m = Monomial(m.factors, rest.exponent if rest else None, m.brackets)
                product = times(Monomial(inner), stay)
                if product is not None:
                    inner = list(product.factors)
                    if stay.exponent is not None:
                        m = Monomial(m.factors, add(m.exponent or ZERO, stay.exponent), [*m.brackets, *stay.brackets])
        out_b = [b for b in m.brackets if not b.free & over]
        in_b = [b for b in m.brackets if b.free & over]
        out_e, in_e = ZERO, m.exponent or ZERO
        if m.exponent is not None:
            if not m.exponent.free & over:
                # It stays beside the sums of exponentials that keep it small, or that it keeps small.
                stays = not m.exponent.reduced & over and any(map(self._holds_exponential, (a for a, _ in inner)))
                out_e, in_e = (ZERO, m.exponent) if stays else (m.exponent, ZERO)
            elif self.level == "full":
                out_e = Form({t: q for t, q in in_e.terms.items() if t.reduced & over and not t.free & over})
                in_e = Form({t: q for t, q in in_e.terms.items() if t not in out_e.terms})
        # What leaves had kept the exponential small: a maximum, or the very sum that it is divided by.
        bared = bool(in_e.terms) and (bool(out_e.terms) or any(self._holds_bare(a) for a, _ in outer))
        return Monomial(outer, out_e, out_b), Monomial(inner, in_e, in_b), bared

    def _cast(self, a: Atom, p: int, over: frozenset[str]) -> tuple[Monomial, Monomial] | None:
        """A movable cast lets factors pass that do not vary over the ranks: (what leaves, what stays)."""
        if a.kind != "cast" or p != 1 or not waits_value(a, over) or not movable(a.name, self.numerics):
            return None
        inner = a.args[0]
        assert isinstance(inner, Form)
        m, q = inner.single or factored(inner)
        outer, rest, bare = self._split(m, over)
        # An exponential that a maximum no longer keeps small leaves the cast, to be scaled with the others.
        kept = rest.exponent if outer.exponent is not None or bare else None
        plain = Monomial(rest.factors, None if kept is not None else rest.exponent, ())
        stay: Monomial = Monomial((), kept, rest.brackets)
        if not plain.is_one or abs(q) != 1:
            value = cast(a.name, Form({plain: q}))
            only = value.single
            if only is None or only[1] != 1:
                return None
            product = times(stay, only[0])
            if product is None:
                return None
            stay = product
        elif q != 1:
            return None
        return outer, stay

    def _remaining(self, ranks: tuple[str, ...], inside: Form, bared: bool) -> Form:
        """The reductions that are left: one for each exponent, and for each integrand that must stay centred."""
        over = frozenset(ranks)
        kinds: dict[bytes, list[tuple[Monomial, Fraction]]] = {}
        for m, q in inside.terms.items():
            waiting = any(waits_value(part, over) for part in pieces(m))
            key = m.digest if waiting else (m.exponent.digest if m.exponent is not None else b"")
            kinds.setdefault(key, []).append((m, q))
        total: list[Form] = []
        for terms in kinds.values():
            body = Form(dict(terms))
            content = ONE_FRACTION
            if len(terms) == 1:
                content, body = terms[0][1], Form({terms[0][0]: ONE_FRACTION})
            infinite = any(a.kind in ("lbr", "inf") for m, _ in terms for a, _ in m.factors)
            missing = [r for r in ranks if r not in body.free and not infinite]
            kept = tuple(r for r in ranks if r not in missing)
            value = body
            if kept:
                atom = Atom("red", "sum", (body,), kept)
                value = lift(atom)
                self._classify(atom, bared)
            sizes = [lift(Atom("extent", r, dtype="i64", nonnegative=True)) for r in missing]
            total.append(scale(mul(value, *sizes), content))
        return add(*total)

    def _note_power(self, outer: Monomial, value: Form) -> None:
        """A sum that was divided by powers of an extreme of its own fiber, which kept its terms small."""
        atom = value.single[0].factors[0][0] if value.single is not None and value.single[0].factors else None
        if atom is None or self.level != "full" or atom.kind != "red" or self.is_bare(atom):
            return
        for a, p in outer.factors:
            extreme = a.kind == "red" and a.name == "max" and a.ranks == atom.ranks and atom_nonnegative(a)
            if extreme and p < 0 and _divides(atom, a, -p):
                self.powers.setdefault(atom.digest, (a, -p))

    def _classify(self, atom: Atom, bared: bool) -> None:
        body = atom.args[0]
        assert isinstance(body, Form)
        over = frozenset(atom.ranks)
        exponent = common_exponent(body)
        if bared and exponent is not None:
            self.bare.add(exponent.digest)
        if not waits(body, over):
            return
        if self.level == "full" and is_centred(body, over):
            basis = basis_size(body, over)
            if basis <= MAX_TERMS:
                self.centred.setdefault(atom.digest, atom)
                return
            self._block(atom.ranks, body, body, f"its separation has {basis} terms; at most {MAX_TERMS} are carried")
            return
        if self.level != "full":
            return
        for part in (p for m in body.terms for p in pieces(m)):
            if waits_value(part, over):
                self._block(atom.ranks, part if isinstance(part, Form) else lift(part), body, reason_of(part, over))

    def is_bare(self, atom: Atom) -> bool:
        """Whether separation left an exponential of this sum without what kept it small."""
        if atom.kind != "red" or atom.name != "sum":
            return False
        body = atom.args[0]
        exponent = common_exponent(body) if isinstance(body, Form) else None
        if exponent is None or exponent.digest not in self.bare:
            return False
        assert isinstance(body, Form)
        return not all(is_share(m) for m in body.terms)

    def _holds_bare(self, a: Atom) -> bool:
        if a.kind != "poly":
            return self.is_bare(a)
        inner = a.args[0]
        assert isinstance(inner, Form)
        return any(self._holds_bare(b) for m in inner.terms for b, _ in m.factors)

    def _holds_exponential(self, a: Atom) -> bool:
        inner = a.args[0] if a.kind == "poly" else None
        sums = isinstance(inner, Form) and any(m.exponent is not None for m in inner.terms)
        return sums or self._holds_bare(a)

    def keep_bare(self, body: Form) -> None:
        """The integrand of a bare sum under other names is bare too."""
        exponent = common_exponent(body)
        if exponent is not None:
            self.bare.add(exponent.digest)

    def _block(self, ranks: tuple[str, ...], blocking: Form, integrand: Form, reason: str) -> None:
        self.barriers.setdefault((blocking.digest, ranks), Barrier(ranks, blocking, integrand, reason))

    # Extremes

    def extreme(self, op: str, ranks: tuple[str, ...], body: Form, dtype: str = "f32") -> Form:
        """max or min: addends that do not vary leave it, as do non-negative factors and increasing functions."""
        over = frozenset(ranks)
        if self.level != "full" or not body.terms:
            return lift(Atom("red", op, (body,), ranks, dtype))
        inner = body.atom
        same = inner is not None and inner.kind == "red" and inner.name == op
        if inner is not None and same and not set(inner.ranks) & (over | inner.free):
            held = inner.args[0]
            assert isinstance(held, Form)
            return self.extreme(op, self._ordered(ranks + inner.ranks), held, dtype)
        if not body.free & over:
            # Over an empty rank the maximum is -inf, which no factor brings back: the reduction stays.
            return lift(Atom("red", op, (body,), ranks, dtype))
        left = self._extreme_left(ranks, body) if op == "max" else None
        if left is not None:
            return left
        outer = Form({m: q for m, q in body.terms.items() if not m.free & over and m.reduced & over})
        inside = Form({m: q for m, q in body.terms.items() if m not in outer.terms})
        return add(outer, self._extreme_of(op, ranks, inside, dtype))

    def _extreme_of(self, op: str, ranks: tuple[str, ...], body: Form, dtype: str) -> Form:
        over = frozenset(ranks)
        m, q = body.single or factored(body)
        flipped = {"max": "min", "min": "max"}[op]
        # exp, and whatever increases, lets the extreme through.
        if m.exponent is not None and m.exponent.free & over and q > 0:
            varying = [(a, p) for a, p in m.factors if a.free & over]
            hidden = [b for b in m.brackets if b.free & over]
            if not varying and not (hidden and op == "min"):
                rest = Form(
                    {
                        Monomial(
                            [(a, p) for a, p in m.factors if not a.free & over],
                            None,
                            [b for b in m.brackets if b not in hidden],
                        ): q
                    }
                )
                if nonnegative(rest):
                    exponent = masked(m.exponent, hidden)
                    return mul(rest, exp(self.extreme(op, ranks, exponent, dtype)))
        atom = body.atom
        if atom is not None and atom.kind == "fn" and atom.name in _INCREASING and len(atom.args) == 1:
            inner = atom.args[0]
            assert isinstance(inner, Form)
            return function(atom.name, (self.extreme(op, ranks, inner, dtype),))
        free = [(a, p) for a, p in m.factors if not a.free & over and (atom_nonnegative(a) or p % 2 == 0)]
        free_exponent = m.exponent if m.exponent is not None and not m.exponent.free & over else None
        outside = Monomial(free, free_exponent)
        masks = [a for t in body.terms for a, _ in t.factors if a.kind == "lbr"]
        if outside.is_one and q > 0 and abs(q) == 1:
            return self._last_extreme(op, ranks, body, dtype)
        kept = Monomial(
            [f for f in m.factors if f not in free], m.exponent if free_exponent is None else None, m.brackets
        )
        if masks and not all(kept_mask(kept, a) for a in masks):
            return self._last_extreme(op, ranks, body, dtype)
        inner = mul(Form({kept: ONE_FRACTION}))
        direction = op if q > 0 else flipped
        if masks and q < 0:
            return self._last_extreme(op, ranks, body, dtype)
        return mul(
            const(abs(q) if q > 0 else q), Form({outside: ONE_FRACTION}), self.extreme(direction, ranks, inner, dtype)
        )

    def _last_extreme(self, op: str, ranks: tuple[str, ...], body: Form, dtype: str) -> Form:
        over = frozenset(ranks)
        if waits(body, over):
            for part in (p for m in body.terms for p in pieces(m)):
                if waits_value(part, over):
                    self._block(ranks, part if isinstance(part, Form) else lift(part), body, reason_of(part, over))
        return lift(Atom("red", op, (body,), ranks, dtype))

    def _place(self, ranks: tuple[str, ...], body: Form) -> Form | None:
        """The place of a maximum that leaves out earlier places: ordered by what those were ordered by."""
        found = self._ranked(ranks, body)
        if found is None:
            return None
        ranking, plain = found
        value, place = (lift(a) for a in ranking.pair(len(ranking.places)))
        if plain:
            # Where all that is left is -inf, what was left out ties with it, and the first place is 0.
            nothing = compare("eq", value, const(-inf), integer=False)
        else:
            nothing = negate(self._enough(ranking))
        return select(nothing, ZERO, place)

    def _extreme_left(self, ranks: tuple[str, ...], body: Form) -> Form | None:
        """The maximum of what earlier places leave."""
        found = self._ranked(ranks, body)
        if found is None:
            return None
        ranking, plain = found
        value = lift(ranking.pair(len(ranking.places))[0])
        if plain:
            return value
        first = Atom("red", "max", (ranking.values,), ranks)
        whole = self.extreme("max", ranks, split_masks(body, ranks[0])[0])
        reached: list[Atom] = []

        def visit(a: Atom) -> Form | Atom | None:
            if a == first:
                reached.append(a)
                return value
            return a if a.kind == "red" else None

        result = rewrite(whole, visit, {})
        assert isinstance(result, Form)
        return masked(result, [self._enough(ranking)]) if reached else None

    def _ranked(self, ranks: tuple[str, ...], body: Form) -> tuple[Ranking, bool] | None:
        """The ranking that a masked maximum continues, and whether it compares the very values."""
        if self.level != "full" or len(ranks) != 1:
            return None
        values, conditions = split_masks(body, ranks[0])
        if not conditions:
            return None
        already = any(a.kind == "lbr" for m in values.terms for a, _ in m.factors)
        orders = [(values, True)]
        if not already:
            orders.append((self._ordering(values, frozenset(ranks)), False))
        for kept, plain in orders:
            ranking = ranking_of(kept, conditions, ranks[0])
            if ranking is not None and ranking.places:
                return ranking, plain
        return None

    def _enough(self, ranking: Ranking) -> Atom:
        """Whether the fiber has a place beyond those that are left out."""
        size = lift(Atom("extent", ranking.rank, dtype="i64", nonnegative=True))
        return compare("gt", size, const(len(ranking.places)), integer=True)

    def argmax(self, ranks: tuple[str, ...], body: Form) -> Form:
        """The place of a maximum: terms that do not vary and increasing functions change nothing."""
        over = frozenset(ranks)
        left = self._place(ranks, body)
        if left is not None:
            return left
        body = self._ordering(body, over)
        if waits(body, over):
            for part in (p for m in body.terms for p in pieces(m)):
                if waits_value(part, over):
                    self._block(ranks, part if isinstance(part, Form) else lift(part), body, reason_of(part, over))
        return lift(Atom("red", "argmax", (body,), ranks, "i64"))

    def _ordering(self, body: Form, over: frozenset[str]) -> Form:
        """A simpler value that the same place maximises."""
        changed = self.level == "full"
        while changed and body.terms:
            changed = False
            body = Form({m: q for m, q in body.terms.items() if m.free & over})
            if not body.terms:
                break
            m, q = body.single or factored(body)
            varying = [(a, p) for a, p in m.factors if a.free & over]
            fixed = [(a, p) for a, p in m.factors if not a.free & over]
            if m.exponent is not None and not varying and q > 0 and all(atom_nonnegative(a) for a, _ in fixed):
                body, changed = masked(m.exponent, m.brackets), True
                continue
            good = [(a, p) for a, p in fixed if atom_nonnegative(a) or p % 2 == 0]
            if good or abs(q) != 1:
                kept = Monomial([f for f in m.factors if f not in good], m.exponent, m.brackets)
                body, changed = mul(Form({kept: ONE_FRACTION if q > 0 else -ONE_FRACTION})), True
                continue
            atom = body.atom
            if atom is not None and atom.kind == "fn" and atom.name in _INCREASING and len(atom.args) == 1:
                inner = atom.args[0]
                assert isinstance(inner, Form)
                body, changed = inner, True
        return body


def _reduced_first(ranks: tuple[str, ...], body: Form) -> frozenset[str]:
    """The ranks over which a factor is reduced already that still varies over the others: they are summed first."""
    over = frozenset(ranks)
    for m in body.terms:
        for part in pieces(m):
            done = part.reduced & over
            if done and part.free & over and not part.free & done and waits_value(part, done):
                return done
    return frozenset()


def _beside_exponents(ranks: tuple[str, ...], body: Form) -> tuple[str, ...]:
    """The ranks over which no exponential varies, beside others over which one does: they are summed first.

    ``sum[f, k](exp(S[k]) * U[f] * V[k, f])`` -> ``sum[k](exp(S[k]) * sum[f](U[f] * V[k, f]))``, which shares its ranks,
    and so its gauge, with the other sums of the same exponential.
    """
    varying = frozenset().union(*(m.exponent.free for m in body.terms if m.exponent is not None))
    first = tuple(r for r in ranks if r not in varying)
    return first if len(first) < len(ranks) else ()


def kept_mask(m: Monomial, mask: Atom) -> bool:
    """Whether a mask stays an addend of a sum inside the monomial, so that a factor taken out did not scale it."""
    return any(a.kind == "poly" for a, _ in m.factors) or any(a == mask for a, _ in m.factors)


def _divides(total: Atom, extreme: Atom, n: int) -> bool:
    """Whether an element of the sum over the n-th power of its own contribution to the extreme needs no division."""
    body, element = total.args[0], extreme.args[0]
    assert isinstance(body, Form)
    assert isinstance(element, Form)
    over = frozenset(total.ranks)
    quotient = mul(body, power(element, -n))
    return all(p > 0 or not a.free & over for m in quotient.terms for a, p in m.factors)


# What waits


def pieces(m: Monomial) -> Iterable[Atom | Form]:
    """The atoms, brackets and exponent terms of a monomial."""
    yield from (a for a, _ in m.factors)
    yield from m.brackets
    if m.exponent is not None:
        yield from (Form({t: q}) for t, q in m.exponent.terms.items())


def waits_value(v: Atom | Form, over: frozenset[str]) -> bool:
    """Whether the value uses, somewhere inside, something already reduced over the ranks."""
    return bool(v.reduced & over) and _waits(v, over, {})


def waits(body: Form, over: frozenset[str]) -> bool:
    return waits_value(body, over)


def _waits(v: Atom | Form, over: frozenset[str], memo: dict[bytes, bool]) -> bool:
    if not v.reduced & over:
        return False
    if not v.free & over:
        return True
    found = memo.get(v.digest)
    if found is None:
        inner: Iterable[Atom | Form] = v.args if isinstance(v, Atom) else (p for m in v.terms for p in pieces(m))
        # A reduction over the very rank inside a value that varies over it can only be another instance of it.
        found = any(_waits(x, over, memo) for x in inner)
        memo[v.digest] = found
    return found


def expand(f: Form, over: frozenset[str]) -> Form:
    """Open the products of sums in an exponent whose terms can leave."""
    total: list[Form] = []
    for m, q in f.terms.items():
        opened = None
        for a, p in m.factors:
            if a.kind == "poly" and 0 < p <= 2 and a.free & over and waits_value(a, over):
                inner = a.args[0]
                assert isinstance(inner, Form)
                rest = Form({Monomial([(b, n) for b, n in m.factors if b != a], m.exponent, m.brackets): q})
                pieces = [rest]
                for _ in range(p):
                    pieces = [mul(x, Form({t: c})) for x in pieces for t, c in inner.terms.items()]
                opened = expand(add(*pieces), over)
                break
        total.append(opened if opened is not None else Form({m: q}))
    return add(*total)


def expand_factors(f: Form, over: frozenset[str]) -> Form:
    """Open nested products of sums within a sum, where a reduced value multiplies a sum that varies."""
    total: list[Form] = []
    for m, q in f.terms.items():
        nested = next(
            (a for a, p in m.factors if a.kind == "poly" and p == 1 and a.free & over and waits_value(a, over)), None
        )
        others = [(a, p) for a, p in m.factors if a != nested]
        if nested is None or not all(a.free & over or True for a, _ in others) or others or m.exponent is not None:
            total.append(Form({m: q}))
            continue
        inner = nested.args[0]
        assert isinstance(inner, Form)
        total.append(scale(expand_factors(inner, over), q))
    return add(*total)


def split_core(f: Form, over: frozenset[str]) -> tuple[Form, Form]:
    """A sum as (core, mixed): the core is ``a(x) - r``, terms that vary alone and terms that are reduced alone.

    Where no reduced term stands alone there is nothing to cancel, and every term is mixed.
    """
    core: dict[Monomial, Fraction] = {}
    mixed: dict[Monomial, Fraction] = {}
    alone = False
    for m, q in f.terms.items():
        waiting = any(waits_value(p, over) for p in pieces(m))
        if waiting and m.free & over:
            mixed[m] = q
        else:
            core[m] = q
            alone = alone or waiting
    if not alone or all(any(waits_value(p, over) for p in pieces(m)) for m in core):
        return ZERO, f
    return Form(core), Form(mixed)


def centred_factors(m: Monomial, over: frozenset[str]) -> list[tuple[Atom, int]]:
    """The factors ``(a(x) - r)^p`` of a monomial."""
    return [(a, p) for a, p in m.factors if a.kind == "poly" and a.free & over and waits_value(a, over)]


def is_centred(body: Form, over: frozenset[str]) -> bool:
    """Whether everything that waits in the integrand stands in powers of ``a(x) - r``."""
    only = body.single
    if only is None:
        return False
    m = only[0]
    inside = centred_factors(m, over)
    for a, p in inside:
        form = a.args[0]
        assert isinstance(form, Form)
        core, mixed = split_core(form, over)
        if p < 1 or mixed.terms or not core.terms:
            return False
    named = {a for a, _ in inside}
    return bool(inside) and not any(waits_value(p, over) for p in pieces(m) if p not in named)


def common_exponent(body: Form) -> Form | None:
    """The exponent that all terms of an integrand share, or None."""
    found = {m.exponent.digest if m.exponent is not None else b"" for m in body.terms}
    return next(iter(body.terms)).exponent if len(found) == 1 else None


def is_share(m: Monomial) -> bool:
    """Whether an exponential is divided by a sum that it is a term of: ``exp(S[q, k]) / sum[k](exp(S[q, k]))``."""
    left = [m.exponent or ZERO]
    for a, p in m.factors:
        if p < 0 and (own := list(_exponents_in(a, m))):
            left = [add(x, scale(e, Fraction(p))) for x in left for e in own]
    return any(not x.terms for x in left[:MAX_TERMS]) and m.exponent is not None


def _exponents_in(a: Atom, m: Monomial) -> Iterable[Form]:
    """The exponents of the terms of a sum that are there wherever the brackets of a monomial hold."""
    body = a.args[0] if a.kind == "poly" or (a.kind == "red" and a.name == "sum") else None
    if not isinstance(body, Form):
        return
    for t in body.terms:
        if set(t.brackets) <= set(m.brackets):
            if t.exponent is not None:
                yield t.exponent
            elif a.kind == "poly" and len(t.factors) == 1 and t.factors[0][1] == 1:
                yield from _exponents_in(t.factors[0][0], m)


def basis_size(body: Form, over: frozenset[str]) -> int:
    """J: how many sums carry the separated integrand."""
    only = body.single
    assert only is not None
    size = 1
    for _, p in centred_factors(only[0], over):
        size *= p + 1
    return size


def reason_of(part: Atom | Form, over: frozenset[str]) -> str:
    """Why a part of an integrand keeps the reduction waiting."""
    if isinstance(part, Form):
        return f"in an exponent it multiplies {WAITED}, which no factor of the exponential can hold"
    match part.kind:
        case "fn":
            return f"it is not a finite sum of terms over {WAITED}"
        case "cast":
            return f"rounding to {part.name} does not commute with {WAITED}"
        case "pred":
            return f"the condition needs {WAITED}"
        case "poly":
            return f"a power or quotient of it is not a finite sum of terms over {WAITED}"
        case "access":
            return f"its index needs {WAITED}"
        case _:
            return f"it varies and needs {WAITED}"


def waited_for(v: Atom | Form, over: frozenset[str]) -> list[Atom | Form]:
    """The values inside that were reduced over the ranks and do not vary over them: what the rest waits for."""

    def parts(x: Value) -> Iterable[Value]:
        inside = reversed(x.args) if isinstance(x, Atom) else (p for m in x.terms for p in pieces(m))
        return [y for y in inside if y.reduced & over]

    found = values_inside(v, into=lambda x: bool(x.free & over), parts=parts)
    return [x for x in found if x.reduced & over and not x.free & over]


def _why(groups: dict[Monomial, tuple[Form, bool]]) -> str:
    bare = any(b for _, b in groups.values())
    count = len(groups)
    what = (
        "a factor that does not vary leaves the sum"
        if count == 1
        else f"{count} factors that do not vary leave the sum"
    )
    return what + ("; the exponential is carried scaled" if bare else "")


# Casts


def movable(dtype: str, numerics: str) -> bool:
    """Whether a cast commutes with constant factors: to formats with the exponent range of f32, unless strict."""
    return numerics != "strict" and dtype in ("bf16", "f32", "f64")


def cast(dtype: str, f: Form) -> Form:
    """A rounding to a float type: values of that type, and 0 and 1, are left as they are."""
    only = f.single
    if not f.terms or f == UNIT:
        return f
    if only is not None and only[1] == 1 and only[0].exponent is None:
        m = only[0]
        if not m.factors and m.brackets:
            return f
        if len(m.factors) == 1 and m.factors[0][1] == 1 and m.factors[0][0].dtype == dtype:
            return f
    if only is not None and only[0].brackets:
        m, q = only
        bare = cast(dtype, Form({Monomial(m.factors, m.exponent): q}))
        product = bare
        for b in m.brackets:
            product = mul(bracket(b), product)
        return product
    return lift(Atom("cast", dtype, (f,), dtype=dtype, nonnegative=nonnegative(f)))
