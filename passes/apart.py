"""What leaves a contraction tile by tile: factors and shifts of its operands that a tile of the summed ranks shares.

Over 128 values of k, of which ``scale[k // 128, n]`` and ``zero[k // 128, n]`` know no difference,

    Σ_k A[m, k] * (scale[n] * (U[k, n] - zero[n]))
      = scale[n] * (Σ_k A[m, k] * U[k, n]  -  zero[n] * Σ_k A[m, k])

so that the operand of the product is U itself: small integers, exact in any format and cheap to unpack.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..ir.cascade import Call, Cast, Expr


@dataclass(frozen=True, slots=True)
class Apart:
    """Σ ``outside`` · (Π ``inside`` ± ``shift`` · Π ``others``): ``outside`` and ``shift`` are the same in all a tile.

    ``others`` are the factors ``inside`` but for the one that was shifted, ``sign`` is "add" or "sub".
    """

    outside: tuple[Expr, ...]
    inside: tuple[Expr, ...]
    others: tuple[Expr, ...] = ()
    shift: Expr | None = None
    sign: str = "add"


def apart(factors: list[Expr], varies: Callable[[Expr], bool], small: Callable[[Expr], bool]) -> Apart | None:
    """A product with what does not vary over a tile taken out; None where there is no such thing.

    ``small`` tells integers that any float type holds: only a difference of such falls apart, so that nothing is lost.
    """
    outside = tuple(f for f in factors if not varies(f))
    inside = tuple(f for f in factors if varies(f))
    for i, f in enumerate(inside):
        if (found := _shifted(f, varies, small)) is not None:
            others = inside[:i] + inside[i + 1 :]
            return Apart(outside, (*inside[:i], found[0], *inside[i + 1 :]), others, *found[1:])
    return Apart(outside, inside) if outside and inside else None


def _shifted(e: Expr, varies: Callable[[Expr], bool], small: Callable[[Expr], bool]) -> tuple[Expr, Expr, str] | None:
    """``x - z`` as (x, z, "sub"), of integers of which z does not vary."""
    match e:
        case Cast(dtype="f32", arg=arg):
            return _shifted(arg, varies, small)
        case Call(op="add" | "sub" as op, args=(x, z)) if small(x) and small(z):
            if varies(x) and not varies(z):
                return x, z, op
            if op == "add" and varies(z) and not varies(x):
                return z, x, op
    return None
