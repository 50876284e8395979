"""What a mask left out, in the body of a user's monoid: there it is told by its value, -inf, as kernels carry no flags.

    L = l * exp(m - M) + s * exp(n - M)
      →  L = where(m == -inf, 0, l * exp(m - M)) + where(n == -inf, 0, s * exp(n - M))

So a state into which nothing came yet takes in masked elements and stays empty, where ``exp(-inf - -inf)`` would be NaN
for good. Only results that were no numbers change: the rewrite goes beyond the oracle for a -inf that came as data.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..ir.cascade import Access, Call, Cast, Const, Expr, Monoid, Rank, children, literal_value, rebuild

MINUS_INF = Call("neg", (Const(float("inf")),))


def neutral_body(m: Monoid, ranks: Sequence[str]) -> tuple[tuple[str, Expr], ...]:
    """The body of a monoid with its left-out terms made 0; ``ranks`` are those of its loop, which begin at 0.

    Before the first element a component whose identity is 0 holds nothing, so its products are 0 whatever it meets.
    """
    first: Expr | None = None
    for r in ranks:
        first = _either(first, Call("eq", (Rank(r), Const(0))), "and")
    empty = {p for p, start in zip(m.params, m.identity, strict=False) if literal_value(start) == 0}
    zeros: dict[str, Expr] = dict.fromkeys(empty, first) if first is not None else {}
    body = []
    for name, value in m.body:
        value, zero = _guarded(value, zeros)
        body.append((name, _made(value, zero)))
        if zero is not None:
            zeros[name] = zero
    return tuple(body)


def _guarded(e: Expr, zeros: dict[str, Expr]) -> tuple[Expr, Expr | None]:
    """An expression with the left-out parts within it made 0, and when it is to be 0 as a whole; None for never."""
    if isinstance(e, Access):
        return e, zeros.get(e.tensor)
    parts = [_guarded(k, zeros) for k in children(e)]
    zero: Expr | None = None
    match e:
        case Cast() | Call(op="neg" | "div"):
            zero = parts[0][1]
        case Call(op="mul"):
            zero = _either(parts[0][1], parts[1][1], "or")
        case Call(op="exp" | "exp2", args=(a,)):
            zero = _left_out(a)
    whole = isinstance(e, Cast) or (isinstance(e, Call) and e.op in ("neg", "mul"))
    kids = tuple(x if whole else _made(x, z) for x, z in parts)
    return (rebuild(e, kids) if kids else e), zero


def _made(e: Expr, zero: Expr | None) -> Expr:
    """An expression that is 0 where it is left out. What has a name has been made so already."""
    return e if zero is None or isinstance(e, Access) else Call("where", (zero, Const(0), e))


def _left_out(e: Expr) -> Expr | None:
    """When an exponent is a -inf by its positive terms; None for never."""
    match e:
        case Access():
            return Call("eq", (e, MINUS_INF))
        case Call(op="sub", args=(a, _)):
            return _left_out(a)
        case Call(op="add", args=(a, b)):
            return _either(_left_out(a), _left_out(b), "or")
    return None


def _either(a: Expr | None, b: Expr | None, op: str) -> Expr | None:
    return a if b is None else b if a is None else Call(op, (a, b))
