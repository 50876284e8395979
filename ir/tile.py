"""Tile programs: a kernel after mapping, before any target's syntax.

A kernel runs once for every point of its *grid* (tiles of the parallel ranks). Its body works on *tiles*, local
arrays whose axes are named by ranks, so broadcasting needs no bookkeeping. Loops stream a rank tile by tile and carry
state in tiles that were made before them. An operation is defined on the *active* coordinates only, those below the
rank's extent: a reduction ignores the rest, a store skips it. How that is done (shorter loops, masks) is the
printer's business, as is all below the size of a tile: registers, vectors, instructions.

    kernel attention(grid b, h, q:64)
      Qt[q, d] = load Q[b, h, q, d]
      m[q] = -inf
      l[q] = 0.0
      o[q, f] = 0.0
      for k:128
        Kt[k, d] = load K[b, h, k, d]
        t[q, k] = dot[d](Qt, Kt)
        s[q, k] = scale * t
        n[q] = maximum(m, reduce max[k](s))
        …
      store O[b, h, q, f] = o / l
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from .cascade import Access, Call, Expr, Param, Rank, walk
from .dtypes import DTYPES
from .errors import VerifyError
from .print import print_expr, print_param


@dataclass(frozen=True, slots=True)
class Tile:
    """A local array.

    ``axes`` name ranks; ``level`` says where it lives: "register", "local" (L1 or shared memory), "scratch".
    """

    name: str
    axes: tuple[str, ...]
    dtype: str
    level: str = "local"


@dataclass(frozen=True, slots=True)
class Load:
    """``tile = load T[indices]``: gather a tensor's elements at the tile's coordinates.

    Indices are expressions over ranks and tiles. Where ``guard`` is false, nothing is read and ``other`` is put.
    """

    tile: Tile
    source: Access
    guard: Expr | None = None
    other: float = 0.0


@dataclass(frozen=True, slots=True)
class Map:
    """``tile = expr``, element by element; tiles in the expression are named without indices."""

    tile: Tile
    expr: Expr


@dataclass(frozen=True, slots=True)
class Fold:
    """``tile = reduce op[over](expr)``, combined with what the tile holds if ``accumulate``."""

    tile: Tile
    op: str
    over: tuple[str, ...]
    expr: Expr
    accumulate: bool = False


@dataclass(frozen=True, slots=True)
class Dot:
    """``tile (+)= Σ_over left * right`` of two tiles, in the tile's dtype; operands rounded to ``operand`` if given.

    With ``annihilates``, a 0 on the left gives 0 even against an infinity or NaN on the right: a mask left it out.
    """

    tile: Tile
    left: str
    right: str
    over: tuple[str, ...]
    accumulate: bool = False
    operand: str | None = None
    annihilates: bool = False


@dataclass(frozen=True, slots=True)
class Store:
    """``store T[indices] = expr`` at the active coordinates of the given axes; ``through`` past the caches."""

    target: Access
    axes: tuple[str, ...]
    expr: Expr
    through: bool = False


@dataclass(frozen=True, slots=True)
class For:
    """``for rank:size in lower … upper``: tiles of a rank, first to last; bounds are element coordinates, None the
    whole rank.

    ``phase`` tells what the bounds guarantee: "all", "full" (no mask is needed inside) or "partial". ``reverse``
    streams from the end, as a backward scan needs.
    ``own`` are closer bounds where tiles have rows: in them a rank stands for one coordinate, and nothing comes of this
    coordinate with those of the loop that are outside; a printer may leave them out. Nor does anything come of
    coordinates whose elements of the two tiles of ``meets``, of the rows and of the loop, are not equal.
    """

    rank: str
    size: int
    body: tuple[Op, ...]
    lower: Expr | None = None
    upper: Expr | None = None
    phase: str = "all"
    reverse: bool = False
    own: tuple[Expr | None, Expr | None] = (None, None)
    meets: tuple[str, str] | None = None


Op = Load | Map | Fold | Dot | Store | For


@dataclass(frozen=True, slots=True)
class GridRank:
    """A parallel rank and the size of its tiles."""

    rank: str
    size: int


@dataclass(frozen=True, slots=True)
class HeldRank:
    """A rank that one tile holds entire: its coordinates are those of ``of``, whose extent is at most ``size``."""

    rank: str
    size: int
    of: str


@dataclass(frozen=True, slots=True)
class TileKernel:
    """One kernel. ``tensors`` are its arguments, inputs first; ``outputs`` names those that it writes.

    ``fixed`` has the ranks of the grid and of loops whose extents are the mapping's choice and constants of the kernel,
    such as the number of pieces of a split rank. ``held`` are ranks that are kept on chip entire, of which the compiled
    kernel knows the greatest extent only.
    ``scalars`` are 0-dimensional inputs, passed by value. ``ordered`` kernels take sums in one order, however many rows
    there are: strict numerics.
    """

    name: str
    tensors: tuple[Param, ...]
    outputs: tuple[str, ...]
    grid: tuple[GridRank, ...]
    body: tuple[Op, ...]
    fixed: Mapping[str, int] = field(default_factory=dict)
    comments: Mapping[str, str] = field(default_factory=dict, compare=False)
    held: tuple[HeldRank, ...] = ()
    ordered: bool = False

    @property
    def scalars(self) -> tuple[str, ...]:
        return tuple(p.name for p in self.tensors if not p.indices)

    def __str__(self) -> str:
        return print_kernel(self)


def lacking_ranks(k: TileKernel) -> frozenset[str]:
    """The ranks of the grid that some stored output lacks: where one is empty, its first tile runs all the same."""
    stores = [op.target for op in operations(k.body) if isinstance(op, Store)]
    return frozenset(g.rank for g in k.grid if any(g.rank not in {*map(_rank_of, t.indices)} for t in stores))


def _rank_of(index: Expr) -> str:
    return index.name if isinstance(index, Rank) else ""


def operations(body: tuple[Op, ...]) -> Iterator[Op]:
    """Every operation, loops before their bodies."""
    for op in body:
        yield op
        if isinstance(op, For):
            yield from operations(op.body)


def expressions(op: Op) -> Iterator[Expr]:
    """The expressions of one operation, those of a loop's body not among them."""
    match op:
        case Load(source=source, guard=guard):
            yield from source.indices
            if guard is not None:
                yield guard
        case Map(expr=expr) | Fold(expr=expr):
            yield expr
        case Store(target=target, expr=expr):
            yield from target.indices
            yield expr
        case For(lower=lower, upper=upper, own=own):
            yield from (e for e in (lower, upper, *own) if e is not None)
        case Dot():
            return


def tiles_of(k: TileKernel) -> dict[str, Tile]:
    """The kernel's tiles by name."""
    return {op.tile.name: op.tile for op in operations(k.body) if isinstance(op, Load | Map | Fold | Dot)}


def integer_products(k: TileKernel) -> dict[Fold, tuple[str, str]]:
    """The sums of products of two tiles of 8-bit integers, with their operands: a matrix unit makes them exactly."""
    bytes_of = {p.name for p in k.tensors if p.dtype == "i8"}
    ops = list(operations(k.body))
    made = [op.tile.name for op in ops if isinstance(op, Map | Fold | Dot)]
    narrow = {op.tile.name for op in ops if isinstance(op, Load) and op.source.tensor in bytes_of} - {*made}
    found = {}
    for op in ops:
        if isinstance(op, Fold) and op.op == "sum" and op.tile.dtype == "i32" and isinstance(op.expr, Call):
            names = [a.tensor for a in op.expr.args if isinstance(a, Access) and a.tensor in narrow]
            if op.expr.op == "mul" and len(names) == 2:
                found[op] = (names[0], names[1])
    return found


# Text


def print_kernel(k: TileKernel) -> str:
    """The readable form of a tile program."""
    grid = ", ".join(g.rank if g.size == 1 else f"{g.rank}:{g.size}" for g in k.grid)
    known = "".join(f", {r}={n}" for r, n in k.fixed.items())
    known += "".join(f", {h.rank}<={h.size}" for h in k.held)
    lines = [f"kernel {k.name}(grid {grid or 'one'}{known})"]
    lines += [f"  {'out' if p.name in k.outputs else 'in'} {print_param(p)}" for p in k.tensors]
    lines += _print_ops(k.body, "  ")
    return "\n".join(lines) + "\n"


def _print_ops(body: tuple[Op, ...], indent: str) -> list[str]:
    lines = []
    for op in body:
        match op:
            case For():
                lines.append(indent + _print_for(op))
                lines += _print_ops(op.body, indent + "  ")
            case Store(target=target, expr=expr):
                past = " through" if op.through else ""
                lines.append(f"{indent}store{past} {print_expr(target)} = {print_expr(expr)}")
            case _:
                lines.append(indent + _print_assignment(op))
    return lines


def _print_for(op: For) -> str:
    size = "" if op.size == 1 else f":{op.size}"
    lower = print_expr(op.lower) if op.lower is not None else "0"
    upper = print_expr(op.upper) if op.upper is not None else f"extent({op.rank})"
    bounds = "" if op.lower is None and op.upper is None else f" in {lower} … {upper}"
    marks = ("" if op.phase == "all" else f" ({op.phase})") + (" backwards" if op.reverse else "")
    ends = [f" {word} {print_expr(e)}" for word, e in zip(("from", "to"), op.own, strict=True) if e is not None]
    ends += [f" where {op.meets[0]} == {op.meets[1]}"] if op.meets is not None else []
    own = ", each row" + "".join(ends) if ends else ""
    return f"for {op.rank}{size}{bounds}{marks}{own}"


def _print_assignment(op: Load | Map | Fold | Dot) -> str:
    t = op.tile
    head = f"{t.name}{'[' + ', '.join(t.axes) + ']' if t.axes else ''}: {t.dtype}"
    match op:
        case Load(source=source, guard=guard, other=other):
            condition = "" if guard is None else f" if {print_expr(guard)} else {other}"
            return f"{head} = load {print_expr(source)}{condition}"
        case Map(expr=expr):
            return f"{head} = {print_expr(expr)}"
        case Fold(op=name, over=over, expr=expr, accumulate=accumulate):
            sign = f"{name}=" if accumulate else "="
            return f"{head} {sign} reduce {name}[{', '.join(over)}]({print_expr(expr)})"
        case Dot(left=left, right=right, over=over, accumulate=accumulate, operand=operand):
            rounded = (f" in {operand}" if operand else "") + (" annihilating" if op.annihilates else "")
            return f"{head} {'+=' if accumulate else '='} dot[{', '.join(over)}]({left}, {right}){rounded}"


# Verifier


def verify_kernel(k: TileKernel) -> None:
    """Raise `VerifyError` unless every operation makes sense: tiles are made before they are read, with one shape each,
    axes are ranks in scope, accesses have as many indices as their tensor, only outputs are stored."""
    known = {p.name: p for p in k.tensors}
    if any(name not in known for name in k.outputs):
        raise VerifyError(f"kernel `{k.name}` writes a tensor that is no argument of it")
    scope = {g.rank for g in k.grid} | {h.rank for h in k.held}
    if len({g.rank for g in k.grid}) != len(k.grid) or any(g.size < 1 for g in k.grid):
        raise VerifyError(f"the grid of `{k.name}` repeats a rank or has a tile of no size")
    _verify_ops(k, k.body, scope, {}, known)


def _verify_ops(
    k: TileKernel, body: tuple[Op, ...], scope: set[str], made: dict[str, Tile], known: Mapping[str, Param]
) -> None:
    for op in body:
        where = f"in kernel `{k.name}`: "
        match op:
            case For():
                if op.rank in scope or op.size < 1:
                    raise VerifyError(f"{where}the loop over `{op.rank}` shadows a rank or has tiles of no size")
                for bound in expressions(op):
                    _verify_expr(where, bound, set(), scope, made, known)
                inside = dict(made)
                _verify_ops(k, op.body, scope | {op.rank}, inside, known)
                if not set(op.meets or ()) <= set(inside):
                    raise VerifyError(f"{where}rows meet by tiles that the loop over `{op.rank}` does not have")
            case Store(target=target, axes=axes, expr=expr):
                if target.tensor not in k.outputs or len(target.indices) != len(known[target.tensor].indices):
                    raise VerifyError(f"{where}`{print_expr(target)}` is no element of an output")
                for e in (expr, *target.indices):
                    _verify_expr(where, e, set(axes), scope, made, known)
            case _:
                tile = op.tile
                if len(set(tile.axes)) != len(tile.axes) or not set(tile.axes) <= scope or tile.dtype not in DTYPES:
                    raise VerifyError(f"{where}tile `{tile.name}` has an axis out of scope, or twice, or no dtype")
                if tile.name in known or made.get(tile.name, tile) != tile:
                    raise VerifyError(f"{where}tile `{tile.name}` is a tensor's name or has two shapes")
                _verify_value(where, op, scope, made, known)
                made[tile.name] = tile


def _verify_value(
    where: str, op: Load | Map | Fold | Dot, scope: set[str], made: Mapping[str, Tile], known: Mapping[str, Param]
) -> None:
    axes = set(op.tile.axes)
    match op:
        case Load(source=source, guard=guard):
            if source.tensor not in known or len(source.indices) != len(known[source.tensor].indices):
                raise VerifyError(f"{where}`{print_expr(source)}` is no element of an argument")
            for e in (*source.indices, *([guard] if guard is not None else [])):
                _verify_expr(where, e, axes, scope, made, known)
        case Map(expr=expr):
            _verify_expr(where, expr, axes, scope, made, known)
        case Fold(over=over, expr=expr):
            if set(over) & axes or not over:
                raise VerifyError(f"{where}`{op.tile.name}` reduces a rank that it keeps, or none")
            _verify_expr(where, expr, axes | set(over), scope, made, known)
        case Dot(left=left, right=right, over=over):
            for name in (left, right):
                if name not in made:
                    raise VerifyError(f"{where}`{name}` is read before it is made")
            both = set(made[left].axes) | set(made[right].axes)
            if not set(over) <= set(made[left].axes) & set(made[right].axes) or both - set(over) != axes:
                raise VerifyError(f"{where}the axes of `{left}` and `{right}` do not make `{op.tile.name}`")
    if isinstance(op, Fold | Dot) and op.accumulate and op.tile.name not in made:
        raise VerifyError(f"{where}`{op.tile.name}` accumulates onto nothing")


def _verify_expr(
    where: str, e: Expr, axes: set[str], scope: set[str], made: Mapping[str, Tile], known: Mapping[str, Param]
) -> None:
    for node in walk(e):
        if isinstance(node, Rank) and node.name not in scope:
            raise VerifyError(f"{where}rank `{node.name}` is not in scope")
        if not isinstance(node, Access):
            continue
        if node.tensor in made:
            if node.indices or not set(made[node.tensor].axes) <= axes:
                raise VerifyError(f"{where}tile `{node.tensor}` does not broadcast over {sorted(axes)}")
        elif node.tensor not in known or known[node.tensor].indices:
            raise VerifyError(f"{where}`{node.tensor}` is read before it is made; tensors are read by `load`")
