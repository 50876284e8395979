"""Normal forms: the algebra in which the passes compute.

A `Form` is a sum of monomials with rational coefficients. A monomial is a product of atoms with integer powers, one
exponential of a form, and a set of Iverson brackets: ``c · a² b⁻¹ · exp(e) · [p][q]``. Products of sums stay
factored: a sum becomes one atom, so nothing explodes unless a rewrite asks for it. Constructors simplify as they
build, bottom up, so there is no search and equal values get equal digests. Integer arithmetic that may wrap, and
functions that no rule opens, are opaque atoms.

Brackets are selects: where ``p`` is false the monomial is 0 whatever its other factors are. ``lbr(p)`` is the
logarithm of a bracket, 0 or -inf; ``where(p, a, -inf)`` is ``a + lbr(p)``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from fractions import Fraction
from hashlib import blake2b
from typing import Any

LN2 = math.log(2.0)


ZERO_FRACTION: Fraction = Fraction(0)


ONE_FRACTION: Fraction = Fraction(1)


def _digest(*parts: Any) -> bytes:
    data = [part if isinstance(part, bytes) else str(part).encode() for part in parts]
    sizes = (len(d).to_bytes(4, "little") for d in data)
    return blake2b(b"".join(x for pair in zip(sizes, data, strict=True) for x in pair), digest_size=16).digest()


class Atom:
    """A value that the algebra does not look into, with what it must know: its free ranks, the ranks reduced inside.

    ``kind`` is one of: "access" (name: tensor, args: indices), "rank", "extent", "ln2", "inf", "fn" (name: operation),
    "cast" (name: dtype), "red" (name: reduction, ranks: what it binds, args: its bodies), "poly" (args: one sum),
    "aligned" (args: a sum of scaled values, whose common scale stays where it is, and the exponent of that scale if it
    may be -inf), "below" (args: an exponential, and the exponent that was taken off it), "lbr" (args: one predicate),
    and for integers and predicates "int" and "pred" (name: operation).
    ``filled`` is where something came into a tensor that masks may leave empty (`emptiness`).
    """

    __slots__ = ("args", "digest", "dtype", "filled", "free", "kind", "name", "nonnegative", "ranks", "reduced")
    free: frozenset[str]
    reduced: frozenset[str]
    digest: bytes

    def __init__(
        self,
        kind: str,
        name: str,
        args: tuple[Value, ...] = (),
        ranks: tuple[str, ...] = (),
        dtype: str = "f32",
        reduced: frozenset[str] = frozenset(),
        nonnegative: bool = False,
        filled: Atom | None = None,
    ) -> None:
        self.kind, self.name, self.args, self.ranks, self.dtype = kind, name, args, ranks, dtype
        self.nonnegative, self.filled = nonnegative, filled
        free = frozenset().union(*(a.free for a in args))
        self.free = free | {name} if kind == "rank" else free - set(ranks)
        self.reduced = frozenset(ranks).union(reduced, *(a.reduced for a in args))
        self.digest = _digest(kind, name, dtype, *ranks, *(a.digest for a in args))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Atom) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        from .lower import show

        return show(self)


class Monomial:
    """``Π atom^power · exp(exponent) · Π [bracket]``, without its coefficient."""

    __slots__ = ("brackets", "digest", "exponent", "factors", "free", "reduced")
    free: frozenset[str]
    reduced: frozenset[str]
    digest: bytes

    def __init__(
        self,
        factors: Mapping[Atom, int] | Iterable[tuple[Atom, int]] = (),
        exponent: Form | None = None,
        brackets: Iterable[Atom] = (),
    ) -> None:
        items = factors.items() if isinstance(factors, Mapping) else factors
        self.factors = tuple(sorted(((a, p) for a, p in items if p), key=lambda f: f[0].digest))
        self.exponent = exponent if exponent is not None and exponent.terms else None
        self.brackets = tuple(sorted(set(brackets), key=lambda b: b.digest))
        parts: list[Value] = [a for a, _ in self.factors]
        parts += [self.exponent] if self.exponent is not None else []
        parts += self.brackets
        self.free = frozenset().union(*(p.free for p in parts))
        self.reduced = frozenset().union(*(p.reduced for p in parts))
        self.digest = _digest(
            "monomial",
            *(x for a, p in self.factors for x in (a.digest, p)),
            "exp",
            self.exponent.digest if self.exponent is not None else b"",
            *(b.digest for b in self.brackets),
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Monomial) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    @property
    def is_one(self) -> bool:
        return not (self.factors or self.brackets or self.exponent is not None)

    @property
    def atom(self) -> Atom | None:
        """The one atom that the monomial is, or None."""
        plain = len(self.factors) == 1 and self.factors[0][1] == 1 and self.exponent is None and not self.brackets
        return self.factors[0][0] if plain else None


class Form:
    """A sum of monomials: ``{monomial: coefficient}``. The empty sum is 0."""

    __slots__ = ("digest", "free", "reduced", "terms")
    free: frozenset[str]
    reduced: frozenset[str]
    digest: bytes

    def __init__(self, terms: Mapping[Monomial, Fraction]) -> None:
        kept = [(m, q) for m, q in terms.items() if q]
        kept.sort(key=lambda t: t[0].digest)
        self.terms: dict[Monomial, Fraction] = dict(kept)
        self.free = frozenset().union(*(m.free for m in self.terms))
        self.reduced = frozenset().union(*(m.reduced for m in self.terms))
        self.digest = _digest("form", *(x for m, q in kept for x in (m.digest, q)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Form) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        from .lower import show

        return show(self)

    @property
    def single(self) -> tuple[Monomial, Fraction] | None:
        """The only term, or None for 0 and for sums."""
        return next(iter(self.terms.items())) if len(self.terms) == 1 else None

    @property
    def constant(self) -> Fraction | None:
        """The number that the form is, or None."""
        if not self.terms:
            return ZERO_FRACTION
        only = self.single
        return only[1] if only is not None and only[0].is_one else None

    @property
    def atom(self) -> Atom | None:
        """The one atom that the form is, or None."""
        only = self.single
        return only[0].atom if only is not None and only[1] == 1 else None


Value = Atom | Form


ONE = Monomial()


ZERO = Form({})


UNIT = Form({ONE: ONE_FRACTION})


def lift(a: Atom) -> Form:
    """An atom as a form."""
    return Form({Monomial([(a, 1)]): ONE_FRACTION})


def add(*forms: Form) -> Form:
    """The sum of forms; terms that cancel are gone."""
    terms: dict[Monomial, Fraction] = {}
    for f in forms:
        for m, q in f.terms.items():
            terms[m] = terms.get(m, ZERO_FRACTION) + q
    return Form(terms)


def scale(f: Form, by: Fraction) -> Form:
    """A form times a number."""
    return Form({m: q * by for m, q in f.terms.items()})


def neg(f: Form) -> Form:
    """Minus a form."""
    return scale(f, -ONE_FRACTION)


def sub(a: Form, b: Form) -> Form:
    """``a - b``."""
    return add(a, neg(b))


def parts_of(v: Value) -> Iterable[Value]:
    """What a value is made of, one level down: an atom's arguments; a form's atoms, brackets and exponents."""
    if isinstance(v, Atom):
        yield from v.args
        return
    for m in v.terms:
        yield from (a for a, _ in m.factors)
        yield from m.brackets
        if m.exponent is not None:
            yield m.exponent


def values_inside(
    *roots: Value, into: Callable[[Value], bool] = lambda v: True, parts: Callable[[Value], Iterable[Value]] = parts_of
) -> Iterator[Value]:
    """Every value inside the roots, themselves included, once each; ``into`` says whose ``parts`` are gone into."""
    seen: set[bytes] = set()
    stack: list[Value] = list(roots)
    while stack:
        v = stack.pop()
        if v.digest in seen:
            continue
        seen.add(v.digest)
        yield v
        if into(v):
            stack.extend(parts(v))


def nesting(v: Value, memo: dict[bytes, int]) -> int:
    """How deep a value nests, written out."""
    if v.digest not in memo:
        inside = max((nesting(x, memo) for x in parts_of(v)), default=0)
        memo[v.digest] = inside + (1 if isinstance(v, Atom) else 2)
    return memo[v.digest]
