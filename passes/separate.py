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
from dataclasses import dataclass
from fractions import Fraction

from .brackets import conjuncts
from .casts import cast, movable
from .centred import basis_size, expand_factors, is_centred, split_core
from .emptiness import filled, unless_nothing
from .exponents import common_exponent, expand, is_share
from .forms import ONE_FRACTION, ZERO, Atom, Form, Monomial, add, lift, scale
from .ledger import MAX_TERMS, Rewrite
from .normal import atom_nonnegative, factored, mul, power, times
from .orders import Orders
from .waiting import WAITED, pieces, reason_of, waits, waits_value


@dataclass
class Reductions(Orders):
    """Builds reductions, simplified, and keeps what happened."""

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
            total.append(mul(Form({outer: ONE_FRACTION}), value, unless_nothing(outer, inside, value)))
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
            if not a.free & over and not self._is_infinite(a):
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
                stays = any(map(self._holds_exponential, (a for a, _ in inner)))
                out_e, in_e = (ZERO, m.exponent) if stays else (m.exponent, ZERO)
            elif self.level == "full":
                out_e = Form({t: q for t, q in in_e.terms.items() if t.reduced & over and not t.free & over})
                in_e = Form({t: q for t, q in in_e.terms.items() if t not in out_e.terms})
        gauges = [a for t in out_e.terms for a, _ in t.factors if a.kind == "red"]
        passed = _conditions([*gauges, *(a for a, _ in outer if self.is_bare(a))]) if in_e.terms else ()
        kept = [b for b in out_b if b in passed]
        out_b, in_b = [b for b in out_b if b not in kept], [*in_b, *kept]
        if out_b and is_share(Monomial(inner, in_e, m.brackets)) and not is_share(Monomial(inner, in_e, in_b)):
            # Only under them is the exponential a term of the sum that it is divided by.
            out_b, in_b = [], list(m.brackets)
        # What leaves had kept the exponential small: a maximum, or the very sum that it is divided by.
        bared = bool(in_e.terms) and (bool(out_e.terms) or any(self._holds_bare(a) for a, _ in outer))
        return Monomial(outer, out_e, out_b), Monomial(inner, in_e, in_b), bared

    def _is_infinite(self, a: Atom) -> bool:
        """Whether a factor may be an infinity that the text writes: that of a mask, also under what is added to it."""
        if a.kind != "poly":
            return a.kind in ("lbr", "inf")
        if a.digest not in self.infinite:
            inner = a.args[0]
            assert isinstance(inner, Form)
            self.infinite[a.digest] = any(self._is_infinite(b) for m in inner.terms for b, _ in m.factors)
        return self.infinite[a.digest]

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
            infinite = any(self._is_infinite(a) for m, _ in terms for a, _ in m.factors)
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
                reason = f"{basis} sums by the binomial theorem; as they cancel, each is carried about {WAITED} so far"
                self.rewrites.setdefault(atom.digest, Rewrite("centre", lift(atom), None, reason))
                return
            self._block(atom.ranks, body, body, f"its separation has {basis} terms; at most {MAX_TERMS} are carried")
            return
        if self.level != "full":
            return
        for part in (p for m in body.terms for p in pieces(m)):
            if waits_value(part, over):
                self._block(atom.ranks, part if isinstance(part, Form) else lift(part), body, reason_of(part))

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


def _conditions(reduced: Iterable[Atom]) -> set[Atom]:
    """The conditions of maxima and sums that leave a sum: under the same ones it shares their gauge."""
    passed = [p.args[0] for p in map(filled, reduced) if p is not None]
    return {c for p in passed for c in conjuncts(p)}


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


def _divides(total: Atom, extreme: Atom, n: int) -> bool:
    """Whether an element of the sum over the n-th power of its own contribution to the extreme needs no division."""
    body, element = total.args[0], extreme.args[0]
    assert isinstance(body, Form)
    assert isinstance(element, Form)
    over = frozenset(total.ranks)
    quotient = mul(body, power(element, -n))
    return all(p > 0 or not a.free & over for m in quotient.terms for a, p in m.factors)


def _why(groups: dict[Monomial, tuple[Form, bool]]) -> str:
    bare = any(b for _, b in groups.values())
    count = len(groups)
    what = (
        "a factor that does not vary leaves the sum"
        if count == 1
        else f"{count} factors that do not vary leave the sum"
    )
    return what + ("; the exponential is carried scaled" if bare else "")
