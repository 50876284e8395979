"""Contractions: sums of products whose factors fall apart into two operands, as tiles."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from math import prod

from ..ir.cascade import Access, Call, Const, Expr, Reduce
from ..ir.dtypes import DTYPES
from ..ir.spans import span
from ..ir.tile import Dot, Fold, Map, Tile
from ..ir.types import settle
from .apart import Apart, apart
from .tile_loops import Loops


@dataclass(frozen=True, slots=True)
class Pair:
    """The operands of a contraction by their tiles, the type to which it rounds them, and whether a 0 of the left one
    is to hide what it meets on the right."""

    left: str
    right: str
    operand: str | None
    annihilates: bool = False


@dataclass(frozen=True, slots=True)
class Fallen:
    """The factors of a contraction's operands, and whether a mask goes to both of them or to the left one alone."""

    left: list[Expr]
    right: list[Expr]
    both: bool


# The integers up to which bf16 holds all, and the floats.
SMALL = 256
EIGHT = ("f8e4m3", "f8e5m2")


class Products(Loops):
    """Finds the operands of contractions."""

    def _factors(
        self, e: Reduce, guard: Expr | None, outer: Iterable[str] | None = None, mask: Expr | None = None
    ) -> Pair | None:
        """The two operands of a contraction, as tiles; None where the product does not fall apart into two."""
        if guard is not None or (outer is None and not DTYPES[self._reduced_type(e)].is_float):
            return None
        return self._pair(e, outer, mask)

    def _pair(
        self, e: Reduce, outer: Iterable[str] | None = None, mask: Expr | None = None, whole: bool = False
    ) -> Pair | None:
        """The two operands of a product that no guard limits; of integers, ``whole``, as bytes."""
        found = self._fallen_apart(e, outer, mask)
        if found is None:
            return None
        if whole:
            if any(self._byte(multiplied(part)) is None for part in (found.left, found.right)):
                return None
            whole_left, whole_right = self._bytes("left", found.left), self._bytes("right", found.right)
            return Pair(whole_left, whole_right, None) if whole_left is not None and whole_right is not None else None
        operand = self._operand((found.left, found.right))
        left = self._operand_of("left", found.left, operand, mask)
        right = self._operand_of("right", found.right, operand, mask if found.both else None)
        return Pair(left, right, operand, mask is not None and not found.both)

    def _fallen_apart(self, e: Reduce, outer: Iterable[str] | None = None, mask: Expr | None = None) -> Fallen | None:
        """The factors of a sum of products as two operands that share only what is summed and what all results share;
        None where they are no two. ``outer`` are the ranks of the results, if the sum does not say them."""
        over = frozenset(e.ranks)
        scope = frozenset().union(*(f.ranks for f in self.frames)) - over
        wide = frozenset(r for r in scope if self.sizes.get(r, 1) > 1)
        factors = self._quotients(e.arg, wide)
        sides = [self._varies(f) & wide for f in factors]
        exclusive = [s for s in sides if s]
        if len(factors) < 2 or not exclusive:
            return None
        first = exclusive[0]
        both = False
        if mask is not None:
            # The mask goes to the left operand, which must vary with all that it varies with; one that leaves a term
            # out of all sums goes to both, so that nothing meets an infinity.
            wanted = self._varies(mask) & wide
            first = next((s for s in exclusive if wanted <= s), frozenset())
            if not first:
                return None
            both = not wanted
        left = [f for f, s in zip(factors, sides, strict=True) if s <= first]
        right = [f for f, s in zip(factors, sides, strict=True) if not s <= first]
        mine = frozenset().union(*(self._varies(f) & wide for f in left))
        theirs = frozenset().union(*(self._varies(f) & wide for f in right)) if right else frozenset()
        if not right or not mine - theirs or not theirs - mine:
            return None
        if not all(over <= frozenset().union(*map(self._varies, part)) for part in (left, right)):
            return None
        result = (frozenset(outer) if outer is not None else self._outer(e, None)) & wide
        return Fallen(left, right, both) if mine | theirs == result else None

    def _operand_of(self, base: str, part: list[Expr], operand: str | None, mask: Expr | None) -> str:
        """The tile of one operand: a tensor's own where it is nothing but that, and is rounded as it lies."""
        e, narrow = multiplied(part), self._narrow(part)
        if operand is not None and narrow is not None:
            value = self._access(narrow, None, self.types[narrow.tensor])
            if mask is None:
                assert isinstance(value, Access)
                return value.tensor
        else:
            value = self.value(e, None)
        if mask is not None:
            value = Call("where", (self.value(mask, None), value, Const(0.0)))
        plain = isinstance(value, Access) and not value.indices and value.tensor in self.own
        made = not isinstance(e, Access) or e.tensor not in self.c.param_of
        if not (plain and not (operand is not None and made)) or self._kept(value) not in ("f32", "f64", operand):
            wide = "f64" if settle(self.checker.infer(value)) == "f64" else "f32"
            value = self._operand_tile(base, value, operand or wide)
        assert isinstance(value, Access)
        return value.tensor

    def _quotients(self, e: Expr, wide: frozenset[str]) -> list[Expr]:
        """The factors of a product, of which one may be a quotient: a divisor stays with a factor that varies with all
        that it varies with, with one that is computed where there is a choice."""
        match e:
            case Call(op="mul", args=(a, b)):
                return self._quotients(a, wide) + self._quotients(b, wide)
            case Call(op="div", args=(a, b)):
                factors, wanted = self._quotients(a, wide), self._varies(b) & wide
                places = [i for i, f in enumerate(factors) if wanted <= self._varies(f) & wide]
                if len(factors) > 1 and places:
                    i = max(places, key=lambda i: not isinstance(factors[i], Access))
                    factors[i] = Call("div", (factors[i], b))
                    return factors
        return [e]

    def _bytes(self, base: str, part: Sequence[Expr]) -> str | None:
        """The tile of an operand that is whole numbers of 8 bits; None where it is none."""
        kind = self._byte(multiplied(part), base == "left")
        if kind is None:
            return None
        e = part[0]
        value: Expr | None = None
        if (
            len(part) == 1
            and isinstance(e, Access)
            and e.indices
            and not {e.tensor} & (self.local.keys() | self.results)
        ):
            value = self._access(e, None, kind) if self.types[e.tensor] == kind else None
        if value is None:
            value = self._operand_tile(base, self.value(multiplied(part), None), kind)
        assert isinstance(value, Access)
        return value.tensor

    def _byte(self, e: Expr, signed: bool = False) -> str | None:
        """The type of 8 bits that holds an integer, a signed one if it may be: machines like one of each kind."""
        found = span(e, self.checker)
        for kind in ("i8", "u8") if signed else ("u8", "i8"):
            if found is not None and DTYPES[kind].lowest <= found[0] and found[1] <= DTYPES[kind].highest:
                return kind
        return None

    def _kept(self, e: Expr) -> str:
        """The type in which a tile is kept."""
        assert isinstance(e, Access)
        return self.types[e.tensor]

    def _operand_tile(self, base: str, value: Expr, dtype: str) -> Expr:
        """A tile with an operand of a contraction; several may read it."""
        frame = self.frames[self._frame_of(self._depends(value), value)]
        key = ("operand", value, dtype)
        if key not in frame.made:
            frame.made[key] = self._map(base, value, dtype)
        return frame.made[key]

    def _is_small(self, e: Expr) -> bool:
        """Whether a value is an integer that every float type with the range of f32 holds."""
        found = span(e, self.checker)
        return found is not None and max(-found[0], found[1]) <= SMALL

    def _narrow(self, part: list[Expr]) -> Access | None:
        """A tensor of 16-bit floats that is one operand of a contraction by itself."""
        e = part[0]
        if len(part) != 1 or not isinstance(e, Access) or e.tensor in self.local or e.tensor in self.results:
            return None
        short = ("bf16", "f16", *(EIGHT if self.tiling.narrow else ()))
        return e if self.types[e.tensor] in short and e.indices else None

    def _operand(self, parts: Iterable[list[Expr]]) -> str | None:
        """The type to which a contraction rounds its operands: that of both, or bf16 where one is, if that is allowed.

        A format with the range of f32 may stand for the other operand (design, section 2: numerics).
        """
        narrow = [self._narrow(p) for p in parts]
        types = {self.types[n.tensor] if n is not None else None for n in narrow}
        if types & {*EIGHT}:
            # bf16 holds all of these.
            return "bf16" if types <= {"bf16", *EIGHT} else None
        if len(types) == 1:
            return types.pop()
        if "bf16" not in types or "f16" in types or self.c.numerics == "strict":
            return None
        return "bf16"

    def _sum_of_bytes(self, e: Reduce, over: tuple[str, ...], total: Tile | None = None) -> Expr | None:
        """The sum of a tile's products of whole numbers of 8 bits, which is exact in i32; None where it is none.

        Where it can be, it is added to ``total``, and that is given.
        ``Σ A[k] * (U[k] - 1) = Σ A[k] * U[k] - Σ A[k]``: what does not vary over the tile is taken out.
        """
        if not self.tiling.narrow or e.op != "sum" or self._reduced_type(e) not in ("i32", "i64"):
            return None
        ranks = frozenset(over)
        factors = factors_of(e.arg)
        found = apart(factors, lambda f: bool(self._varies(f) & ranks), lambda _: True) or Apart((), tuple(factors))
        spans = [span(multiplied(x), self.checker) for x in (found.inside, found.others) if x]
        most = prod(self.sizes[r] for r in over) * max(1, *(max(-s[0], s[1]) for s in spans if s is not None))
        if None in spans or most >= 1 << 31:
            return None
        pair = self._pair(replace(e, args=(multiplied(found.inside),)), whole=True)
        if pair is None:
            return None
        ops = self.frames[-1].ops
        if total is not None and total.dtype == "i32" and found == Apart((), tuple(factors)):
            ops.append(Dot(total, pair.left, pair.right, over, True))
            return Access(total.name)
        depends = self._depends(Access(pair.left)) | self._depends(Access(pair.right))
        part = self._tile("part", depends - ranks, "i32")
        value: Expr = Access(part.name)
        if found.shift is not None:
            held = self._bytes("left", found.others)
            rest = Access(held) if held is not None else self.value(multiplied(found.others), None)
            ones = self._tile("ones", self._depends(rest) - ranks, "i32")
            ops.append(Fold(ones, "sum", over, rest))
            value = Call(found.sign, (value, Call("mul", (self.value(found.shift, None), Access(ones.name)))))
        for f in found.outside:
            value = Call("mul", (self.value(f, None), value))
        ops.append(Dot(part, pair.left, pair.right, over))
        return value

    def _sum_apart(self, e: Reduce, total: Tile, over: tuple[str, ...]) -> bool:
        """Add a tile's sum of products with what does not vary over the tile taken out; False where nothing can be."""
        ranks = frozenset(over)
        if not self.aligned & ranks or total.dtype != "f32" or self.c.numerics == "strict":
            return False
        found = apart(factors_of(e.arg), lambda f: bool(self._varies(f) & ranks), self._is_small)
        if found is None:
            return False
        pair = self._factors(replace(e, args=(multiplied(found.inside),)), None)
        if pair is None:
            return False
        depends = self._depends(Access(pair.left)) | self._depends(Access(pair.right))
        part = self._tile("part", depends - ranks, "f32")
        ops = self.frames[-1].ops
        value: Expr = Access(part.name)
        if found.shift is not None:
            narrow = self._narrow(list(found.others))
            if narrow is not None and pair.operand is not None:
                rest = self._access(narrow, None, pair.operand)
            else:
                rest = self.value(multiplied(found.others), None)
            ones = self._tile("ones", self._depends(rest) - ranks, "f32")
            ops.append(Fold(ones, "sum", over, rest))
            shift = self.value(found.shift, None)
            value = Call(found.sign, (value, Call("mul", (shift, Access(ones.name)))))
        for f in found.outside:
            value = Call("mul", (self.value(f, None), value))
        # The sums are taken up right where they are made, so all else comes before.
        ops.append(Dot(part, pair.left, pair.right, over, False, pair.operand))
        ops.append(Map(total, Call("add", (Access(total.name), value))))
        return True

    def _reduced_type(self, e: Reduce) -> str:
        return settle(self.checker.infer(e)) if e.op not in ("any", "all") else "bool"


def factors_of(e: Expr) -> list[Expr]:
    """The factors of a product, left to right."""
    if isinstance(e, Call) and e.op == "mul":
        return factors_of(e.args[0]) + factors_of(e.args[1])
    return [e]


def multiplied(factors: Sequence[Expr]) -> Expr:
    """The product of factors, left to right."""
    return reduce(lambda a, b: Call("mul", (a, b)), factors)


def mask_of(e: Expr) -> tuple[Expr | None, Expr]:
    """``where(p, value, 0.0)`` as (p, value), ``where(p, 0.0, value)`` as (not p, value), nested conditions joined;
    (None, e) for anything else."""
    match e:
        case Call(op="where", args=(p, value, Const(value=0.0))):
            keep = p
        case Call(op="where", args=(p, Const(value=0.0), value)):
            keep = Call("not", (p,))
        case _:
            return None, e
    inner, value = mask_of(value)
    return (keep if inner is None else Call("and", (keep, inner))), value
