"""What waits: the parts of an integrand that use something reduced over its ranks already, and why they block."""

from __future__ import annotations

from collections.abc import Iterable

from .forms import ONE_FRACTION, Atom, Form, Monomial, Value, lift, values_inside

# In a barrier's reason, the place of the values that it waits for.
WAITED = "{waited}"


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
    """`waits_value`, of an integrand."""
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


def waited_for(v: Atom | Form, over: frozenset[str]) -> list[Form]:
    """The largest values inside that were reduced over the ranks and do not vary over them: what the rest waits for."""
    found: dict[bytes, Form] = {}

    def parts(x: Value) -> Iterable[Value]:
        if isinstance(x, Atom):
            return [y for y in reversed(x.args) if y.reduced & over]
        left: list[Value] = []
        for m in x.terms:
            for part in _units(m, over):
                if part.free & over:
                    left.append(part)
                elif part.reduced & over:
                    found[part.digest] = part if isinstance(part, Form) else lift(part)
        return left

    root = v if isinstance(v, Form) else lift(v)
    for _ in values_inside(root, parts=parts):
        pass
    return list(found.values())


def _units(m: Monomial, over: frozenset[str]) -> Iterable[Value]:
    """A monomial as what varies over the ranks, one by one, and the product of all that does not."""
    if not m.free & over:
        yield Form({m: ONE_FRACTION})
        return
    fixed = [(a, p) for a, p in m.factors if not a.free & over and a.reduced & over]
    if fixed:
        sign = -1 if all(p < 0 for _, p in fixed) else 1
        yield Form({Monomial([(a, p * sign) for a, p in fixed]): ONE_FRACTION})
    yield from (x for x in pieces(m) if (x.free | x.reduced) & over and not any(x == a for a, _ in fixed))


def reason_of(part: Atom | Form) -> str:
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
