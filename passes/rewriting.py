"""Substitution: a value rebuilt bottom up, simplified anew."""

from __future__ import annotations

from collections.abc import Callable

from .brackets import FALSE, TRUE, conjunction, disjunction, negate
from .casts import number_in_f64
from .forms import Atom, Form, Value, add, lift, parts_of, values_inside
from .functions import exp, function
from .normal import bracketed, const, div, mul, power


def rewrite(value: Value, f: Callable[[Atom], Form | Atom | None], memo: dict[bytes, Value]) -> Value:
    """Rebuild a value bottom up with simplification; ``f`` may replace an atom (None: keep and go inside)."""
    found = memo.get(value.digest)
    if found is not None:
        return found
    result: Value
    if isinstance(value, Form):
        result = _rewrite_form(value, f, memo)
    else:
        result = _rewrite_atom(value, f, memo)
    memo[value.digest] = result
    return result


def _rewrite_form(value: Form, f: Callable[[Atom], Form | Atom | None], memo: dict[bytes, Value]) -> Form:
    if all(rewrite(part, f, memo).digest == part.digest for part in parts_of(value)):
        return value
    parts = []
    for m, q in value.terms.items():
        factors = [power(_as_form(rewrite(a, f, memo)), p) for a, p in m.factors]
        if m.exponent is not None:
            factors.append(exp(in_type_of(m.exponent, _as_form(rewrite(m.exponent, f, memo)))))
        product = mul(const(q), *factors)
        for b in m.brackets:
            p = rewrite(b, f, memo)
            assert isinstance(p, Atom)
            product = bracketed(p, product)
        parts.append(product)
    return add(*parts)


def _as_form(v: Value) -> Form:
    return v if isinstance(v, Form) else lift(v)


def _rewrite_atom(a: Atom, f: Callable[[Atom], Form | Atom | None], memo: dict[bytes, Value]) -> Value:
    new = f(a)
    if new is not None:
        return new
    if not a.args:
        return a
    args = tuple(rewrite(x, f, memo) for x in a.args)
    if all(x.digest == y.digest for x, y in zip(args, a.args, strict=True)):
        return a
    if a.kind == "fn":
        args = tuple(in_type_of(x, _as_form(y)) for x, y in zip(a.args, args, strict=True))
    return remake(a, args)


def in_type_of(before: Value, now: Form) -> Form:
    """A value rewritten, in f64 still where all that said so is gone: ``where(m < 0, X[m], 0.5)`` at 1."""
    if now.digest == before.digest or (wide := number_in_f64(now)) is None:
        return now
    return wide if any(isinstance(x, Atom) and x.dtype == "f64" for x in values_inside(before)) else now


def remake(a: Atom, args: tuple[Value, ...]) -> Value:
    """The same atom over other arguments, simplified anew."""
    if a.kind == "poly":
        return args[0]
    if a.kind == "fn" and a.name != "div":
        return function(a.name, tuple(_as_form(x) for x in args))
    if a.kind == "fn":
        return div(_as_form(args[0]), _as_form(args[1]))
    if a.kind == "pred" and a.name in ("and", "or", "not"):
        parts = [x for x in args if isinstance(x, Atom)]
        return negate(parts[0]) if a.name == "not" else conjunction(parts) if a.name == "and" else disjunction(parts)
    if a.kind == "pred" and a.name in ("ge0", "eq0"):
        c = _as_form(args[0]).constant
        if c is not None:
            return TRUE if (c >= 0 if a.name == "ge0" else c == 0) else FALSE
    return Atom(a.kind, a.name, args, a.ranks, a.dtype, a.reduced, a.nonnegative)
