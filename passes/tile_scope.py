"""What all that writes tile kernels shares: loop bodies under construction, the tiles made in them, and where a value
belongs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ..ir.cascade import (
    Access,
    Call,
    Cascade,
    Const,
    Einsum,
    Expr,
    Rank,
    children,
    free_ranks,
    rebuild,
    tensors_read,
    walk,
)
from ..ir.tile import HeldRank, Map, Op, Tile
from ..ir.types import TypeChecker, settle
from .split import Piece
from .step import Step
from .tiling import Tiling


@dataclass
class Frame:
    """The operations of one loop body under construction, and the tiles made in it.

    ``known`` says that the loop's bounds make sure of conditions, which its body leaves out.
    """

    ranks: set[str]
    known: bool = False
    ops: list[Op] = field(default_factory=list)
    made: dict[object, Expr] = field(default_factory=dict)


class Scope:
    """What every part of a kernel under construction shares."""

    def __init__(
        self,
        c: Cascade,
        e: Einsum,
        types: Mapping[str, str],
        tiling: Tiling,
        step: Step | None,
        extents: Mapping[str, int],
        origin: Mapping[str, str],
        piece: Piece | None,
        counts: Mapping[str, int],
        bounded: frozenset[tuple[str, int, Expr]],
        inside: frozenset[Access],
    ) -> None:
        self.c = c
        self.step = step
        self.extents = extents
        self.e = e
        self.piece = piece
        self.counts = counts
        self.bounded = bounded
        self.inside = inside
        self.types = dict(types)
        self.checker = TypeChecker(self.types, c.monoid_of)
        self.tiling = tiling
        self.frames: list[Frame] = [Frame(set())]
        self.sizes: dict[str, int] = {}
        self.own: dict[str, frozenset[str]] = {}
        self.level: dict[str, int] = {}
        self.local: Mapping[str, Expr] = {}
        self.origin = dict(origin)
        self.held: dict[str, HeldRank] = {}
        self.bound: list[str] = []
        self.looped: set[str] = set()
        # Streamed ranks whose tiles begin at multiples of their size.
        self.aligned: set[str] = set()
        self.results: dict[str, Expr] = {}
        self.added: Sequence[Einsum] = ()
        self.count = 0

    def _tile(self, base: str, axes: Iterable[str], dtype: str, level: int | None = None) -> Tile:
        """A new tile, made in the loop body of that level, by default the innermost."""
        self.count += 1
        name = f"{base}_{self.count}"
        while name in self.c.param_of or name in self.c.einsum_of:
            self.count += 1
            name = f"{base}_{self.count}"
        wanted = set(axes)
        scopes = [f.ranks for f in self.frames]
        if self.added:
            # Rows that are looped over stand where the output has them.
            scopes[:2] = [set().union(*scopes[:2])]
        ordered = tuple(r for s in scopes for r in self._in_order(s) if r in wanted and self.sizes[r] > 1)
        tile = Tile(name, ordered, dtype)
        self.types[name] = dtype
        self.own[name] = frozenset(wanted)
        self.level[name] = len(self.frames) - 1 if level is None else level
        return tile

    def _in_order(self, ranks: set[str]) -> list[str]:
        order = [*self.e.ranks, *self.c.ranks]
        return sorted(ranks, key=lambda r: (order.index(r) if r in order else len(order), r))

    def _depends(self, e: Expr) -> frozenset[str]:
        """The ranks in scope with which an expression over tiles varies."""
        found: set[str] = set()
        for node in walk(self._varying(e)):
            if isinstance(node, Rank):
                found.add(node.name)
            elif isinstance(node, Access) and node.tensor in self.own:
                found |= self.own[node.tensor]
        return frozenset(found)

    def _varying(self, e: Expr) -> Expr:
        """An expression without what is the same for a whole tile of the grid, as ``h // 4`` is for 4 heads of one."""
        match e:
            case Call(op="floordiv", args=(Rank(name=r), Const(value=int() as n))):
                tiled = (r in self.frames[0].ranks and r not in self.held) or r in self.aligned
                return Const(0) if tiled and self.sizes[r] > 1 and n % self.sizes[r] == 0 else e
        kids = children(e)
        return rebuild(e, tuple(map(self._varying, kids))) if kids else e

    def _varies(self, e: Expr) -> frozenset[str]:
        """The ranks with which an expression of the cascade varies; names of the state's tiles stand for theirs."""
        held = (
            self._depends(self.local[n.tensor]) for n in walk(e) if isinstance(n, Access) and n.tensor in self.local
        )
        return free_ranks(self._varying(e)).union(*held)

    def _frame_of(self, depends: Iterable[str], *exprs: Expr) -> int:
        """The outermost loop body in which the ranks are in scope and the tiles that expressions read are made."""
        wanted = set(depends)
        scope: set[str] = set()
        level = max((self.level.get(t, 0) for e in exprs for t in tensors_read(e)), default=0)
        for i, frame in enumerate(self.frames):
            scope |= frame.ranks
            if wanted <= scope and i >= level:
                return i
        return len(self.frames) - 1

    def _map(self, base: str, e: Expr, dtype: str | None = None) -> Expr:
        """A tile that holds an expression over tiles."""
        depends = self._depends(e)
        level = self._frame_of(depends, e)
        tile = self._tile(base, depends, dtype or settle(self.checker.infer(e)), level)
        self.frames[level].ops.append(Map(tile, e))
        return Access(tile.name)
