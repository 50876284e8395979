"""Cascade to tile programs: one kernel for every Einsum that reduces, scans or is asked for; maps are inlined.

The kernel's grid is the Einsum's output ranks, cut into tiles; reduced ranks are streamed tile by tile into
accumulators. A sum of products whose factors share only the streamed ranks becomes a `Dot`. A scan steps along its
rank inside the kernel and reads its earlier entries from its own output. A monoid takes in one element at a time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from math import inf, prod

from ..ir.cascade import (
    Access,
    Call,
    Cascade,
    Cast,
    Const,
    Einsum,
    Expr,
    Extent,
    Monoid,
    Output,
    Param,
    Rank,
    Reduce,
    children,
    free_ranks,
    literal_value,
    rebuild,
    tensors_read,
    walk,
)
from ..ir.dtypes import DTYPES
from ..ir.extents import LARGEST_EXTENT, bindings
from ..ir.interval import interval
from ..ir.ops import OPS, REDUCTIONS
from ..ir.spans import span
from ..ir.tile import (
    Dot,
    Fold,
    For,
    GridRank,
    HeldRank,
    Load,
    Map,
    Op,
    Store,
    Tile,
    TileKernel,
    operations,
    verify_kernel,
)
from ..ir.types import TypeChecker, compute_type, settle, tensor_types
from ..ir.verify import scan_step
from .apart import apart
from .count import needed
from .fuse import ON_CHIP, VECTOR, cheapest_first, epilogues, fusible, is_map, is_row_reduction, rows_enough, stored
from .inline import Inliner, renamed
from .join import Scatter, join
from .neutral import neutral_body
from .phases import ALL, Phase, bracket, phases, tile_end, without
from .split import Piece, split
from .step import Let, Step, Take

# Nodes up to which a map is computed again wherever it is read, and not stored.
INLINE_NODES = 160

# The integers up to which bf16 holds all.
SMALL = 256


@dataclass(frozen=True, slots=True)
class Tiling:
    """Tile sizes: of the last output rank, of the next one along which an operand is shared, and of streamed ranks.
    All others are taken one by one.

    ``ranks`` names the tile of a rank, wherever it is iterated, and goes before these three. With ``hold``, an inner
    reduction over ranks that fit on chip takes them as one tile, so that what it reads is loaded outside the loop;
    loops that need no mask end at a multiple of ``align``. With ``group``, what follows an Einsum over the same rows
    joins its kernel; with ``through``, outputs are stored past the caches;
    rows of at most ``resident`` elements are kept whole. With ``join``, sums that need the same inner reductions are
    one kernel, and with ``scatter`` those over another rank belong to it; with ``apart``, what is the same all over a
    tile of a contraction's summed ranks leaves its product.
    ``splits`` says in how many pieces a reduced rank runs.
    """

    inner: int = 64
    outer: int = 16
    stream: int = 64
    ranks: Mapping[str, int] = field(default_factory=dict)
    hold: bool = False
    align: int = 1
    group: bool = False
    through: bool = False
    resident: int = 0
    join: bool = False
    scatter: bool = False
    apart: bool = False
    splits: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TileProgram:
    """The kernels of a cascade in the order in which they run, and the tensors that they pass to each other."""

    cascade: Cascade
    kernels: tuple[TileKernel, ...]
    scratch: tuple[Param, ...]


def tile_program(
    c: Cascade,
    tiling: Tiling | None = None,
    *,
    steps: Mapping[str, Step] | None = None,
    extents: Mapping[str, int] | None = None,
    user: Collection[str] = (),
    always: Mapping[Access, frozenset[str]] | None = None,
) -> TileProgram:
    """Map a cascade (derived or as written) to tile kernels.

    ``steps`` holds the step of each stream by its first output's name; without one, a monoid takes in its elements one
    by one. With ``extents``, inner reductions are fused into the loops that read them, where nothing is repeated.
    ``user`` names the monoids that are the author's own, ``always`` the reads that are known to stay in their tensors
    where none of some ranks is empty. Raises `InputError` for a split that cannot be made.
    """
    tiling, steps, whole = tiling or Tiling(), dict(steps or {}), c
    bounded = frozenset((u.tensor, u.axis, u.index) for b in bindings(c) if b.param is None for u in b.within)
    scatters: Mapping[str, Scatter] = {}
    if tiling.join and extents is not None:
        joined = join(c, fusible(c, extents), extents, tiling.scatter, tiling.splits)
        c, scatters = joined.cascade, joined.scatters
        steps |= joined.steps
    c, pieces = split(c, tiling.splits, user)
    # Pieces take the step of what they are cut from; what merges them takes in whole states.
    steps |= {name: steps.pop(p.components[name]) for name, p in pieces.items() if p.components[name] in steps}
    if tiling.group:
        tied = {name: s.sums for name, s in scatters.items()}
        c = replace(c, einsums=cheapest_first(c, _for_steps(c, steps), tied))
    counts = {p.name: p.count for p in pieces.values()}
    types = tensor_types(c)
    live = needed(c) | _for_steps(c, steps)
    # Pieces repeat nothing of what runs along the rank that they cut.
    inlined = fusible(c, {**extents, **dict.fromkeys(counts, 1)}) if extents is not None else {}
    inlined = {name: x for name, x in inlined.items() if name not in pieces}
    extents = {**(extents or {}), **counts}
    inline = Inliner(c, inlined)
    kernels: list[TileKernel] = []
    scratch: list[Param] = []
    absorbed: set[str] = set()
    for e in c.einsums:
        if not any(o.name in live for o in e.outputs):
            continue
        fused = inlined.get(e.name)
        plain_map = is_map(e)
        e = replace(e, expr=inline(e.expr))
        if fused is not None:
            inlined[e.name] = (fused[0], e.expr)
            continue
        if e.name in absorbed:
            continue
        if plain_map and e.name not in c.outputs and (e.reductions or sum(1 for _ in walk(e.expr)) <= INLINE_NODES):
            inlined[e.name] = (e.output.ranks, _converted(e, types))
            continue
        step = steps.get(e.name)
        if step is not None:
            step = tuple(replace(s, element=inline(s.element)) if isinstance(s, Take) else s for s in step)
        after = [replace(m, expr=inline(m.expr)) for m in epilogues(c, e)] if not plain_map else []
        if tiling.group and not plain_map and e.name not in pieces and rows_enough(e, extents):
            after = _followers(c, e, inlined, inline, live, types)
            known = absorbed | {m.name for m in after} | {e.name} | set(inlined)
            rest = [x for x in c.einsums if x.name not in known and any(o.name in live for o in x.outputs)]
            outside = {t for x in rest for t in tensors_read(inline(x.expr))} | set(c.outputs)
            kept = {o.name for x in (e, *after) for o in x.outputs} & outside
        else:
            known = absorbed | {m.name for m in after}
            kept = {n for m in (e, *after) for n in stored(c, m, known)}
        absorbed |= {m.name for m in after}
        scatter = scatters.get(e.name)
        added = [replace(x, expr=inline(x.expr)) for x in c.einsums if scatter is not None and x.name in scatter.sums]
        absorbed |= {x.name for x in added}
        kept |= {x.name for x in added}
        piece = pieces.get(e.name)
        inside = frozenset(a for a, ranks in (always or {}).items() if ranks <= {*e.output.ranks, *free_ranks(a)})
        builder = _Builder(c, e, types, tiling, step, extents, inline.origin, piece, counts, bounded, inside)
        kernel = builder.build(after, kept, added)
        verify_kernel(kernel)
        kernels.append(kernel)
        for o in (o for x in (e, *after, *added) for o in x.outputs):
            if o.name in kept and o.name not in c.outputs:
                axes = tuple(Const(counts[r]) if r in counts else Rank(r) for r in o.ranks)
                scratch.append(Param(o.name, types[o.name], axes))
    return TileProgram(whole, tuple(kernels), tuple(scratch))


def _followers(
    c: Cascade,
    e: Einsum,
    inlined: dict[str, tuple[tuple[str, ...], Expr]],
    inline: Inliner,
    live: Collection[str],
    types: Mapping[str, str],
) -> list[Einsum]:
    """The Einsums after one that only need, of what comes with or after it, its results at their own rows, in order.

    Reductions must have the same rows, maps at least these; a map may also write down what the rows are made of, as the
    sum that a norm is of. What is inlined on the way is noted in ``inlined``.
    """
    place = next(i for i, x in enumerate(c.einsums) if x.name == e.name)
    known = {p.name for p in c.params} | {o.name for x in c.einsums[:place] for o in x.outputs}
    rows = {o.name: tuple(Rank(r) for r in o.ranks) for o in e.outputs}
    found: list[Einsum] = []
    for x in c.einsums[place + 1 :]:
        if not any(o.name in live for o in x.outputs) or len(x.outputs) > 1 or scan_step(x) is not None:
            continue
        expr = inline(x.expr)
        if x.name in inlined:
            inlined[x.name] = (x.output.ranks, expr)
            continue
        if is_map(x) and x.name not in c.outputs and (x.reductions or sum(1 for _ in walk(expr)) <= INLINE_NODES):
            inlined[x.name] = (x.output.ranks, _converted(replace(x, expr=expr), types))
            continue
        reads = [n for n in walk(expr) if isinstance(n, Access) and n.tensor not in known]
        if not all(n.indices == rows.get(n.tensor) for n in reads):
            continue
        if not reads and not _along(x, expr, e, inline):
            continue
        if is_map(x) and x.name in c.outputs:
            inner = any(isinstance(n, Reduce) for n in walk(expr)) and not set(x.output.ranks) <= set(e.ranks)
            if not inner and (set(x.output.ranks) <= set(e.ranks) or set(x.output.ranks) > set(e.ranks)):
                found.append(replace(x, expr=expr))
        elif is_row_reduction(x) and set(x.output.ranks) == set(e.ranks):
            found.append(replace(x, expr=expr))
            rows[x.name] = tuple(Rank(r) for r in x.output.ranks)
    return found


def _along(x: Einsum, expr: Expr, e: Einsum, inline: Inliner) -> bool:
    """Whether a map runs over the rows of a reduction and reads nothing but what that reads."""
    if not isinstance(e.expr, Reduce) or not is_map(x):
        return False
    same = set(x.output.ranks) == {*e.output.ranks, *e.expr.ranks}
    tensors = set(tensors_read(expr))
    return same and bool(tensors) and tensors <= set(tensors_read(inline(e.expr)))


def _for_steps(c: Cascade, steps: Mapping[str, Step]) -> set[str]:
    """The tensors that the steps of streams read, and those that these need."""
    parts = [
        x for step in steps.values() for s in step for x in ((s.value,) if isinstance(s, Let) else (s.old, s.element))
    ]
    found = {t for x in parts for t in tensors_read(x)}
    for e in reversed(c.einsums):
        if any(o.name in found for o in e.outputs):
            found |= set(tensors_read(e.expr))
    return found


def _converted(e: Einsum, types: Mapping[str, str]) -> Expr:
    """A map's value as its tensor would hold it."""
    return Cast(types[e.name], e.expr) if e.output.dtype is not None else e.expr


@dataclass
class _Frame:
    """The operations of one loop body under construction, and the tiles made in it.

    ``known`` says that the loop's bounds make sure of conditions, which its body leaves out.
    """

    ranks: set[str]
    known: bool = False
    ops: list[Op] = field(default_factory=list)
    made: dict[object, Expr] = field(default_factory=dict)


class _Builder:
    """Writes the kernel of one Einsum."""

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
        self.tiling = tiling
        self.frames: list[_Frame] = [_Frame(set())]
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

    def build(self, after: list[Einsum], kept: set[str], added: Sequence[Einsum] = ()) -> TileKernel:
        """The kernel of the Einsum and of the maps after it; of its own tensors those in ``kept`` are stored.

        What is ``added`` to it sums over one of its rows, and has a row for each coordinate of its stream.
        """
        e = self.e
        self.added = added
        scan = scan_step(e)
        ranks = e.ranks
        self.checker = TypeChecker(self.types, self.c.monoid_of)
        for r, size in zip(self._tiled(ranks), (self.tiling.inner, self.tiling.outer), strict=False):
            self.sizes[r] = size
        for r in ranks:
            self.sizes[r] = 1 if r in self.counts else self.tiling.ranks.get(r, self.sizes.get(r, 1))
        room = ON_CHIP * ON_CHIP
        for r in reversed(self._whole(ranks)):
            given, extent = self.tiling.ranks.get(r, 0), max(1, self.extents[r])
            size = given if self.tiling.hold and given >= extent else min(ON_CHIP, -(-extent // VECTOR) * VECTOR)
            if size <= room:
                self.sizes[r], room = size, room // size
        for r in ranks:
            if any(r not in o.ranks for o in (*e.outputs, *(m.output for m in after))):
                # Its only tile runs where the rank is empty too, and then has no coordinate.
                self.sizes[r] = max(2, self.sizes[r])
        looped: tuple[str, ...] = ()
        if scan is not None:
            self.sizes[scan.rank] = 1
            looped = (scan.rank, *self._mixed(scan.rank))
        if added:
            looped = self._prepare(added)
        grid = tuple(GridRank(r, self.sizes[r]) for r in ranks if r not in looped and r not in self.held)
        self.frames[0].ranks |= {g.rank for g in grid} | set(self.held)
        for x in added:
            self._clear(x)
        for r in looped:
            self.frames.append(_Frame({r}))
        values = self._state() if len(e.outputs) > 1 else [self.value(e.expr, None)]
        for o, value in zip(e.outputs, values, strict=True):
            if o.name in kept:
                self._store(o, value)
            self.results[o.name] = Cast(o.dtype, value) if o.dtype is not None else value
        for m in after:
            self._follow(m, kept)
        while len(self.frames) > 1:
            frame = self.frames.pop()
            rank = next(iter(frame.ranks))
            reverse = scan is not None and rank == scan.rank and scan.direction < 0
            self.frames[-1].ops.append(For(rank, self.sizes[rank], tuple(frame.ops), reverse=reverse))
        body = tuple(self.frames[0].ops)
        used = self._used(body)
        params = [p for p in self.c.params if p.name in used]
        outputs = {o.name: o for x in self.c.einsums for o in x.outputs}
        written = {o.name for x in (e, *after, *added) for o in x.outputs if o.name in kept}
        params += [
            Param(n, self.types[n], tuple(Rank(r) for r in o.ranks)) for n, o in outputs.items() if n in used | written
        ]
        return TileKernel(
            f"{self.c.name}_{e.name}",
            tuple(params),
            tuple(p.name for p in params if p.name in written),
            grid,
            body,
            fixed={r: n for r, n in self.counts.items() if r in self._iterated(grid, body)},
            held=tuple(self.held.values()),
        )

    def _iterated(self, grid: Iterable[GridRank], body: tuple[Op, ...]) -> set[str]:
        return {g.rank for g in grid} | {op.rank for op in operations(body) if isinstance(op, For)}

    def _follow(self, m: Einsum, kept: set[str]) -> None:
        """An Einsum after the kernel's own: a reduction by rows, or a map over these and perhaps further ranks."""
        extra = tuple(r for r in m.output.ranks if r not in self.e.ranks and r not in self.held)
        for r in extra:
            self._open((r,), self.tiling.stream if r == extra[-1] else self.tiling.ranks.get(r, 1))
        value = self.value(m.expr, None)
        further = tuple(r for r in m.output.ranks if r not in self.e.ranks)
        if m.name in kept:
            self._store(m.output, value, further)
        self._close(extra)
        if not further:
            self.results[m.name] = Cast(m.output.dtype, value) if m.output.dtype is not None else value

    # Sums that the stream adds up in memory

    def _prepare(self, added: Sequence[Einsum]) -> tuple[str, ...]:
        """The rank over which these sum, which becomes a loop; what they have not in common is held entire."""
        over = self._over(added[0])
        # A tile of one element would leave nothing to sum.
        self.sizes[over] = max(2, self.sizes[over])
        for r in self.e.ranks:
            if any(r not in o.ranks for o in self.e.outputs):
                self.held[r] = HeldRank(r, self.sizes[r], r)
        return (over,)

    def _over(self, x: Einsum) -> str:
        assert isinstance(x.expr, Reduce)
        return x.expr.ranks[0]

    def _clear(self, x: Einsum) -> None:
        """Put 0 wherever something is to be added."""
        assert isinstance(self.e.expr, Reduce)
        self._open(self.e.expr.ranks, self.tiling.stream)
        self._put(x, Const(0.0))
        self._close(self.e.expr.ranks)

    def _put(self, x: Einsum, value: Expr) -> None:
        axes = tuple(r for r in x.output.ranks if self.sizes[r] > 1)
        self.frames[-1].ops.append(Store(Access(x.name, tuple(map(Rank, x.output.ranks))), axes, value))

    def _add(self, x: Einsum, phase: Phase) -> None:
        """Add the share of the tiles at hand to a sum in memory."""
        assert isinstance(self.e.expr, Reduce)
        assert isinstance(x.expr, Reduce)
        ops = self.frames[-1].ops
        element = without(x.expr.arg, phase.known, self.e.expr.ranks)
        axes = tuple(r for r in x.output.ranks if self.sizes[r] > 1)
        before = replace(self._tile(x.name, x.ranks, self.types[x.name]), axes=axes)
        total = replace(self._tile("total", x.ranks, self.types[x.name]), axes=axes)
        mask, inside = _masked(element)
        over = x.expr.ranks
        pair = self._factors(replace(x.expr, args=(inside,)), None, x.ranks, mask)
        value = self.value(element, None) if pair is None else None
        ops.append(Load(before, Access(x.name, tuple(map(Rank, x.output.ranks)))))
        ops.append(Map(total, Access(before.name)))
        if pair is not None:
            ops.append(Dot(total, pair.left, pair.right, over, True, pair.operand, mask is not None))
        else:
            assert value is not None
            ops.append(Fold(total, "sum", over, value, accumulate=True))
        self._put(x, Access(total.name))

    # What goes where

    def _tiled(self, ranks: tuple[str, ...]) -> tuple[str, ...]:
        """The two ranks that are tiled: the last, and the one along which the largest operand is shared, in doubt the
        last of those: a mask that varies with nothing but its row says little about how keys are to be reused."""
        values = [self.e.expr, *(s.element for s in self.step or () if isinstance(s, Take))]
        reads = [free_ranks(n) for e in values for n in walk(e) if isinstance(n, Access) and n.indices]
        ranks = tuple(r for r in ranks if r not in self.counts)
        shared = {r: max((len(n) for n in reads if r not in n), default=-1) for r in reversed(ranks[:-1])}
        return (*ranks[-1:], *([max(shared, key=lambda r: shared[r])] if shared else ()))

    def _whole(self, ranks: tuple[str, ...]) -> list[str]:
        """Small ranks along which an inner reduction does not vary: one tile, so that it is computed once."""
        inner = [n for n in self.e.reductions if n is not self.e.expr]
        if self.step is not None:
            inner += [n for s in self.step if isinstance(s, Take) for n in walk(s.element) if isinstance(n, Reduce)]
        lacking = {r for n in inner for r in ranks if r not in free_ranks(n) and r not in self.counts}
        return [r for r in ranks if r in lacking and self.extents.get(r, ON_CHIP + 1) <= ON_CHIP]

    def _mixed(self, scanned: str) -> tuple[str, ...]:
        """Output ranks along which a step reads other entries than its own: they stay in one program."""
        mixed: dict[str, None] = {}
        ranks = self.e.output.ranks
        for node in walk(self.e.expr):
            if isinstance(node, Access) and node.tensor == self.e.name:
                for r, index in zip(ranks, node.indices, strict=True):
                    if r != scanned and index != Rank(r):
                        mixed[r] = None
        return tuple(mixed)

    def _used(self, body: Iterable[Op]) -> set[str]:
        used: set[str] = set()
        for op in body:
            match op:
                case For(body=inner, lower=lower, upper=upper):
                    used |= self._used(inner)
                    used |= {t for e in (lower, upper) if e is not None for t in tensors_read(e)}
                case Load(source=source, guard=guard):
                    used |= set(tensors_read(source)) | (set(tensors_read(guard)) if guard is not None else set())
                case Map(expr=expr) | Fold(expr=expr) | Store(expr=expr):
                    used |= set(tensors_read(expr))
                case _:
                    pass
        return used

    # Where things go

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

    # Values

    def value(self, e: Expr, guard: Expr | None) -> Expr:
        """An expression over tiles for one of the cascade; loads and inner reductions are written where they belong."""
        match e:
            case Const() | Rank() | Extent():
                return e
            case Access():
                return self._access(e, guard)
            case Cast(arg=arg):
                return replace(e, arg=self.value(arg, guard))
            case Reduce():
                return self._reduce(e, guard)
            case Call(op="where", args=(condition, a, b)):
                test = self.value(condition, guard)
                yes = self.value(a, _both(guard, test))
                no = self.value(b, _both(guard, Call("not", (test,))))
                return replace(e, args=(test, yes, no))
            case Call(op=op, args=args):
                made = replace(e, args=tuple(self.value(a, guard) for a in args))
                return self._shared(made) if OPS[op].cost[0] == "special" else made

    def _shared(self, e: Expr) -> Expr:
        """A costly value over tiles, computed once for all that read it."""
        depends = self._depends(e)
        frame = self.frames[self._frame_of(depends, e)]
        if e not in frame.made:
            frame.made[e] = self._map("f", e)
        return frame.made[e]

    def _access(self, e: Access, guard: Expr | None, dtype: str | None = None) -> Expr:
        """A tile with a tensor's elements, in the type that it computes in unless another is given."""
        if not e.indices and e.tensor in self.local:
            return self.local[e.tensor]
        if e.tensor in self.results:
            return self.results[e.tensor]
        if not e.indices and e.tensor in self.c.param_of:
            return e
        indices = tuple(self.value(i, guard) for i in e.indices)
        source = Access(e.tensor, indices)
        # What the tensor's own ranks index, or what is limited by its form, lies inside it whatever guards the read.
        plain = self._inside(e)
        held = None if plain else guard
        depends = self._depends(source) | (self._depends(held) if held is not None else frozenset())
        level = self._frame_of(depends | free_ranks(source), source, *([held] if held is not None else []))
        if dtype is None:
            dtype = self.types[e.tensor]
            dtype = dtype if dtype == "bool" else compute_type(dtype)
        key = (source, held, dtype)
        if not plain:
            # What the bounds of a loop say of a read holds inside it alone.
            level = max([level, *(i for i, f in enumerate(self.frames) if f.known)])
        if e.tensor == self.e.name:
            # A scan reads what an earlier step stored: never kept from one step to the next.
            level = len(self.frames) - 1
        frame = self.frames[level]
        if key in frame.made and e.tensor != self.e.name:
            return frame.made[key]
        tile = self._tile(e.tensor, depends, dtype, level)
        frame.ops.append(Load(tile, source, held))
        frame.made[key] = Access(tile.name)
        return frame.made[key]

    def _inside(self, e: Access) -> bool:
        """Whether every index stays inside its axis whatever a condition says, so that none is needed around the read.

        It is the axis's own, or one that its rank's extent keeps in bounds, or limited by its form; or the cascade
        reads there under no condition.
        """
        if e in self.inside:
            return True
        axes = enumerate(zip(e.indices, self.c.indices_of(e.tensor), strict=True)) if e.indices else ()
        return all(i == j or (e.tensor, axis, i) in self.bounded or _within(i, j) for axis, (i, j) in axes)

    def _reads_inside(self, e: Expr) -> bool:
        """Whether all that an expression reads lies inside its tensor whatever guards it."""
        return all(self._inside(n) for n in walk(e) if isinstance(n, Access))

    def _map(self, base: str, e: Expr, dtype: str | None = None, depends: frozenset[str] | None = None) -> Expr:
        """A tile that holds an expression over tiles."""
        depends = self._depends(e) if depends is None else depends
        level = self._frame_of(depends, e)
        tile = self._tile(base, depends, dtype or settle(self.checker.infer(e)), level)
        self.frames[level].ops.append(Map(tile, e))
        return Access(tile.name)

    # Reductions

    def _open(self, ranks: tuple[str, ...], size: int, known: bool = False) -> None:
        for r in ranks:
            # A tile of one element would leave nothing to reduce.
            wanted = self.tiling.ranks.get(self.origin.get(r, r), size)
            self.sizes[r] = max(2, wanted) if size > 1 else 1
            self.looped.add(r)
            self.frames.append(_Frame({r}, known))

    def _close(self, ranks: tuple[str, ...], phase: Phase = ALL) -> None:
        for r in reversed(ranks):
            frame = self.frames.pop()
            lower = phase.lower
            upper = Extent(self.origin[r]) if r in self.origin and phase.upper is None else phase.upper
            if self.piece is not None and r == self.piece.rank:
                lower, upper = self.piece.bounds(self._length(self.piece, self.sizes[r]), lower, upper)
            self.frames[-1].ops.append(For(r, self.sizes[r], tuple(frame.ops), lower, upper, phase.name))
            del self.sizes[r]
            self.aligned.discard(r)

    def _phases(self, ranks: tuple[str, ...], conditions: frozenset[Expr]) -> list[Phase]:
        """The loops over reduced ranks; brackets bound them where only one rank is reduced."""
        if len(ranks) != 1 or not conditions:
            return [ALL]
        scope = {r for f in self.frames for r in f.ranks}

        def end(r: str, last: bool) -> Expr:
            extent = Extent(self.origin.get(r, r))
            if r not in scope or r in self.held:
                return Call("sub", (extent, Const(1))) if last else Const(0)
            return tile_end(r, self.sizes[r], last, extent)

        reads = [n for c in conditions for n in walk(c) if isinstance(n, Access)]
        single = {r for r in scope if r not in self.held and self.sizes[r] == 1}
        wide = {n.tensor for n in reads if not free_ranks(n) <= single}
        data = {n.tensor for n in reads if n.tensor not in wide and DTYPES[self.types[n.tensor]].is_integer}
        found = phases(conditions, ranks[0], data, end, min(self.tiling.align, self._stream_size(ranks[0])))
        return [
            replace(
                p,
                lower=None if p.lower is None else self.value(p.lower, None),
                upper=None if p.upper is None else self.value(p.upper, None),
            )
            for p in found
        ]

    def _stream_size(self, r: str) -> int:
        return self.tiling.ranks.get(self.origin.get(r, r), self.tiling.stream)

    def _hold(self, e: Reduce) -> Reduce | None:
        """The reduction over ranks that are held on chip entire; None where it has to be a loop."""
        sizes = [self.extents.get(self.origin.get(r, r), 0) for r in e.ranks]
        inside = self.tiling.hold and len(self.frames) > 1 and all(1 < n <= ON_CHIP for n in sizes)
        resident = len(self.frames) == 1 and len(sizes) == 1 and 1 < sizes[0] <= self.tiling.resident and _is_row(e)
        if self._scanned() or self._pieces(e) or not (resident or (inside and prod(sizes) <= 4 * ON_CHIP)):
            return None
        names: dict[str, str] = {}
        for r, n in zip(e.ranks, sizes, strict=True):
            taken = self.looped | {x for f in self.frames for x in f.ranks} - set(self.held)
            name, i = r, 0
            while name in taken or name in self.bound:
                i += 1
                name = f"{r}_{i}"
            if name not in self.held:
                of = self.origin.get(r, r)
                self.held[name] = HeldRank(name, -(-n // VECTOR) * VECTOR, of)
                self.sizes[name] = self.held[name].size
                self.origin[name] = of
                self.frames[0].ranks.add(name)
            names[r] = name
        return replace(e, ranks=tuple(names.values()), args=tuple(renamed(a, names) for a in e.args))

    def _length(self, piece: Piece, size: int) -> Expr:
        """A tile with the length of a piece, made before the loops."""
        frame = self.frames[0]
        key = ("length", size)
        if key not in frame.made:
            length = self._tile("length", (), "i64", 0)
            frame.ops.append(Map(length, piece.length(size)))
            frame.made[key] = Access(length.name)
        return frame.made[key]

    def _pieces(self, e: Reduce) -> bool:
        """Whether a reduction is one in pieces, or merges some."""
        cut = self.piece is not None and self.piece.rank in e.ranks and len(self.frames) == 1
        return cut or any(r in self.counts for r in e.ranks)

    def _scanned(self) -> bool:
        return scan_step(self.e) is not None

    def _reduce(self, e: Reduce, guard: Expr | None) -> Expr:
        if guard is not None and self._reads_inside(e):
            guard = None
        key = (e, guard)
        for frame in self.frames:
            if key in frame.made:
                return frame.made[key]
        frame = self.frames[-1]
        plain = e.op in REDUCTIONS and e.op != "argmax"
        held = self._hold(e) if plain else None
        e = held or self._unshadowed(e)
        self.bound += e.ranks
        frame.made[key] = self._reduced(e, guard, held is not None)
        del self.bound[len(self.bound) - len(e.ranks) :]
        return frame.made[key]

    def _reduced(self, e: Reduce, guard: Expr | None, held: bool = False) -> Expr:
        if e.op in self.c.monoid_of:
            return self._fold_monoid(e, guard)[0]
        if e.op == "argmax":
            return self._argmax(e, guard)
        dtype = self._reduced_type(e)
        depends = self._outer(e, guard) - set(e.ranks)
        start = self._identity(e, dtype)
        depth = len(self.frames)
        total = self._tile(e.op, depends, dtype)
        if held:
            self._reduce_tile(e, guard, total, start, accumulate=False)
            return Access(total.name)
        self.frames[-1].ops.append(Map(total, start))
        for phase in self._phases(e.ranks, bracket(e.op, e.arg)):
            self._open(e.ranks, 1 if self.counts.keys() & set(e.ranks) else self.tiling.stream, bool(phase.known))
            if self.tiling.apart and phase.lower is None:
                self.aligned |= set(e.ranks)
            inner = replace(e, args=(without(e.arg, phase.known, e.ranks),))
            self._reduce_tile(inner, guard, total, start, accumulate=True)
            self._close(e.ranks, phase)
        assert len(self.frames) == depth
        return Access(total.name)

    def _reduce_tile(self, e: Reduce, guard: Expr | None, total: Tile, start: Expr, accumulate: bool) -> None:
        """Reduce the tile of the ranks at hand into another one."""
        over = tuple(r for r in e.ranks if self.sizes[r] > 1)
        if not over:
            joined = Call(REDUCTIONS[e.op].combine, (Access(total.name), self.value(e.arg, guard)))
            self.frames[-1].ops.append(Map(total, joined))
            return
        if e.op == "sum" and guard is None and accumulate and self._sum_apart(e, total, over):
            return
        mask, inside = _masked(e.arg) if e.op == "sum" and self._reads_inside(e.arg) else (None, e.arg)
        if e.op == "sum" and (pair := self._factors(replace(e, args=(inside,)), guard, mask=mask)) is not None:
            masked = mask is not None
            self.frames[-1].ops.append(Dot(total, pair.left, pair.right, over, accumulate, pair.operand, masked))
            return
        value = self.value(e.arg, guard)
        if e.op not in ("any", "all") and settle(self.checker.infer(value)) == "bool":
            value = Cast("i32", value)
        if guard is not None:
            value = Call("where", (guard, value, start))
        self.frames[-1].ops.append(Fold(total, e.op, over, value, accumulate=accumulate))

    def _sum_apart(self, e: Reduce, total: Tile, over: tuple[str, ...]) -> bool:
        """Add a tile's sum of products with what does not vary over the tile taken out; False where nothing can be."""
        ranks = frozenset(over)
        if not self.aligned & ranks or total.dtype != "f32" or self.c.numerics == "strict":
            return False
        found = apart(_product(e.arg), lambda f: bool(self._varies(f) & ranks), self._is_small)
        if found is None:
            return False
        pair = self._factors(replace(e, args=(_multiplied(found.inside),)), None)
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
                rest = self.value(_multiplied(found.others), None)
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

    def _unshadowed(self, e: Reduce) -> Reduce:
        """A reduction whose ranks are not in scope already: another name loops over the same extent."""
        names: dict[str, str] = {}
        for r in e.ranks:
            if any(r in f.ranks for f in self.frames):
                self.count += 1
                names[r] = f"{r}_{self.count}"
                self.origin[names[r]] = self.origin.get(r, r)
        return replace(e, ranks=tuple(names.get(r, r) for r in e.ranks), args=tuple(renamed(a, names) for a in e.args))

    def _outer(self, e: Reduce, guard: Expr | None) -> frozenset[str]:
        """The ranks in scope with which a reduction varies."""
        scope = frozenset().union(*(f.ranks for f in self.frames))
        found = free_ranks(e) & scope
        return found | (self._depends(guard) if guard is not None else frozenset())

    def _reduced_type(self, e: Reduce) -> str:
        return settle(self.checker.infer(e)) if e.op not in ("any", "all") else "bool"

    def _identity(self, e: Reduce, dtype: str) -> Expr:
        row = DTYPES[dtype]
        if e.op in ("max", "min") and row.is_integer:
            value = row.lowest if e.op == "max" else row.highest
            return Call("neg", (Const(-value),)) if value < 0 else Const(value)
        identity = REDUCTIONS[e.op].identity
        if isinstance(identity, bool):
            return Const(identity)
        assert identity is not None
        if identity == -inf:
            return Call("neg", (Const(inf),))
        return Const(float(identity)) if row.is_float else Const(int(identity))

    def _varies(self, e: Expr) -> frozenset[str]:
        """The ranks with which an expression of the cascade varies; names of the state's tiles stand for theirs."""
        held = (
            self._depends(self.local[n.tensor]) for n in walk(e) if isinstance(n, Access) and n.tensor in self.local
        )
        return free_ranks(self._varying(e)).union(*held)

    def _factors(
        self, e: Reduce, guard: Expr | None, outer: Iterable[str] | None = None, mask: Expr | None = None
    ) -> _Pair | None:
        """The two operands of a contraction, as tiles; None where the product does not fall apart into two."""
        if guard is not None or (outer is None and not DTYPES[self._reduced_type(e)].is_float):
            return None
        factors = _product(e.arg)
        over = frozenset(e.ranks)
        scope = frozenset().union(*(f.ranks for f in self.frames)) - over
        wide = frozenset(r for r in scope if self.sizes.get(r, 1) > 1)
        sides = [self._varies(f) & wide for f in factors]
        if len(factors) < 2:
            return None
        exclusive = [s for s in sides if s]
        if not exclusive:
            return None
        first = exclusive[0]
        if mask is not None:
            # The mask goes to the left operand, which must vary with all that it varies with.
            wanted = self._varies(mask) & wide
            first = next((s for s in exclusive if wanted <= s), frozenset())
            if not first:
                return None
        left = [f for f, s in zip(factors, sides, strict=True) if s <= first]
        right = [f for f, s in zip(factors, sides, strict=True) if not s <= first]
        mine = frozenset().union(*(self._varies(f) & wide for f in left))
        theirs = frozenset().union(*(self._varies(f) & wide for f in right)) if right else frozenset()
        if not right or not mine - theirs or not theirs - mine:
            return None
        if not all(over <= frozenset().union(*map(self._varies, part)) for part in (left, right)):
            return None
        result = (frozenset(outer) if outer is not None else self._outer(e, guard)) & wide
        if mine | theirs != result:
            return None
        operand = self._operand((left, right), result)
        names = []
        for base, part in (("left", left), ("right", right)):
            narrow = self._narrow(part)
            if operand is not None and narrow is not None and not (mask is not None and base == "left"):
                access = self._access(narrow, guard, self.types[narrow.tensor])
                assert isinstance(access, Access)
                names.append(access.tensor)
                continue
            e_part = _multiplied(part)
            value = self.value(e_part, guard)
            if mask is not None and base == "left":
                value = Call("where", (self.value(mask, guard), value, Const(0.0)))
            plain = isinstance(value, Access) and not value.indices and value.tensor in self.own
            made = not isinstance(e_part, Access) or e_part.tensor not in self.c.param_of
            if not (plain and not (operand is not None and made)) or self._kept(value) not in ("f32", "f64", operand):
                value = self._operand_tile(base, value, operand or "f32")
            assert isinstance(value, Access)
            names.append(value.tensor)
        return _Pair(names[0], names[1], operand)

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
        return e if self.types[e.tensor] in ("bf16", "f16") and e.indices else None

    def _operand(self, parts: Iterable[list[Expr]], result: frozenset[str]) -> str | None:
        """The type to which a contraction rounds its operands: that of both, or bf16 where one is, if that is allowed.

        A format with the range of f32 may stand for the other operand (design, section 2: numerics).
        """
        narrow = [self._narrow(p) for p in parts]
        types = {self.types[n.tensor] if n is not None else None for n in narrow}
        if len(types) == 1:
            return types.pop()
        if "bf16" not in types or "f16" in types or self.c.numerics == "strict":
            return None
        return "bf16"

    def _argmax(self, e: Reduce, guard: Expr | None) -> Expr:
        """The place of the first greatest: value and place go together, tile by tile; a NaN wins and stays."""
        dtype = settle(compute_type(settle(self.checker.infer(e.arg))))
        depends = self._outer(e, guard)
        low = self._identity(Reduce("max", e.ranks, e.args), dtype)
        best, place = self._tile("best", depends, dtype), self._tile("place", depends, "i64")
        self.frames[-1].ops += [Map(best, low), Map(place, Const(0))]
        self._open(e.ranks, self.tiling.stream)
        value = self.value(e.arg, guard)
        if guard is not None:
            value = Call("where", (guard, value, low))
        here, at = self._tile("top", depends, dtype), self._tile("at", depends, "i64")
        ops = self.frames[-1].ops
        over = tuple(r for r in e.ranks if self.sizes[r] > 1)
        ops += [Fold(here, "max", over, value), Fold(at, "argmax", over, value)]
        b, h = Access(best.name), Access(here.name)
        better: Expr = Call("or", (Call("gt", (h, b)), Call("and", (Call("ne", (h, h)), Call("eq", (b, b))))))
        ops.append(Map(place, Call("where", (better, Access(at.name), Access(place.name)))))
        ops.append(Map(best, Call("where", (better, h, b))))
        self._close(e.ranks)
        return Access(place.name)

    # Monoids

    def _state(self) -> list[Expr]:
        """The components of a monoid's Einsum."""
        assert isinstance(self.e.expr, Reduce)
        return self._stream(self.e.expr) if self.step is not None else self._fold_monoid(self.e.expr, None)

    def _stream(self, e: Reduce) -> list[Expr]:
        """A stream by its step: tile by tile, extremes first, then sums under the new gauges and references."""
        assert self.step is not None
        m = self.c.monoid_of[e.op]
        types = self.checker.state_types(e)
        components = self.piece.components if self.piece is not None else {}
        ranks_of = {components.get(o.name, o.name): set(o.ranks) for o in self.e.outputs}
        state: dict[str, Tile] = {}
        for (name, ranks), dtype, start in zip(ranks_of.items(), types, m.identity, strict=True):
            state[name] = self._tile(name, ranks, dtype)
            self.frames[-1].ops.append(Map(state[name], start))
        takes = [s for s in self.step if isinstance(s, Take)]
        shared = frozenset.intersection(*(bracket(s.op, s.element) for s in takes))
        for phase in self._phases(e.ranks, shared):
            self._open(e.ranks, self.tiling.stream, bool(phase.known))
            self._advance(e, phase, state, ranks_of)
            for x in self.added:
                self._add(x, phase)
            self._close(e.ranks, phase)
        return [Access(tile.name) for tile in state.values()]

    def _advance(self, e: Reduce, phase: Phase, state: Mapping[str, Tile], ranks_of: Mapping[str, set[str]]) -> None:
        """One step of a stream: the state takes in a tile of elements."""
        assert self.step is not None
        names: dict[str, Expr] = {"a_" + n: Access(t.name) for n, t in state.items()}
        for s in self.step:
            if isinstance(s, Let):
                value = _named(s.value, names)
                tile = self._tile(s.name, self._depends(value), settle(self.checker.infer(value)))
                self.frames[-1].ops.append(Map(tile, value))
                names[s.name] = Access(tile.name)
                continue
            alone = not any("a_" + s.component in _reads(x) for x in self.step if x is not s)
            into = state[s.component] if alone else None
            s = replace(s, element=without(s.element, phase.known, e.ranks))
            names[s.component] = self._take(e, s, ranks_of[s.component], state[s.component].dtype, names, into)
        for n, tile in state.items():
            if names[n] != Access(tile.name):
                self.frames[-1].ops.append(Map(tile, names[n]))

    def _take(
        self, e: Reduce, s: Take, ranks: set[str], dtype: str, names: Mapping[str, Expr], into: Tile | None
    ) -> Expr:
        """A component's new value from its old one and a tile of elements; in place where nobody needs the old one."""
        new = into or self._tile(s.component, ranks, dtype)
        ops = self.frames[-1].ops
        old = _named(s.old, names)
        self.local = names
        mask, inside = _masked(s.element)
        over = tuple(r for r in e.ranks if self.sizes[r] > 1)
        pair = self._factors(Reduce(s.op, e.ranks, (inside,)), None, ranks, mask) if s.op == "sum" else None
        value = self.value(s.element, None) if pair is None else None
        if old != Access(new.name):
            ops.append(Map(new, old))
        if pair is not None:
            ops.append(Dot(new, pair.left, pair.right, over, True, pair.operand, mask is not None))
        else:
            assert value is not None
            ops.append(Fold(new, s.op, over, value, accumulate=True))
        self.local = {}
        return Access(new.name)

    def _fold_monoid(self, e: Reduce, guard: Expr | None) -> list[Expr]:
        m: Monoid = self.c.monoid_of[e.op]
        types = self.checker.state_types(e)
        ranks = self._monoid_ranks(m, e, guard)
        state = [self._tile(r, ranks[r], t) for r, t in zip(m.results, types, strict=True)]
        for tile, start in zip(state, m.identity, strict=True):
            self.frames[-1].ops.append(Map(tile, start))
        for r in e.ranks:
            self._open((r,), 1)
        element = [self.value(a, guard) for a in e.args]
        names: dict[str, Expr] = {}
        for p, x in zip(m.params, [*(Access(t.name) for t in state), *element], strict=True):
            names[p] = x
        ops = self.frames[-1].ops
        results: dict[str, Expr] = dict(names)
        for name, expr in neutral_body(m, e.ranks):
            value = _named(expr, results)
            tile = self._tile(name, ranks[name] | set(e.ranks), settle(self.checker.infer(value)))
            ops.append(Map(tile, value))
            results[name] = Access(tile.name)
        for tile, r in zip(state, m.results, strict=True):
            ops.append(Map(tile, results[r]))
        for r in reversed(e.ranks):
            self._close((r,))
        return [Access(t.name) for t in state]

    def _monoid_ranks(self, m: Monoid, e: Reduce, guard: Expr | None) -> dict[str, frozenset[str]]:
        """The ranks with which each name of a monoid varies; a component need not vary with all that others do."""
        width = len(m.results)
        held = self._depends(guard) if guard is not None else frozenset()
        scope = frozenset().union(*(f.ranks for f in self.frames))
        found = {p: frozenset((free_ranks(a) & scope) | held) for p, a in zip(m.params[width:], e.args, strict=True)}
        found |= dict.fromkeys(m.params[:width], frozenset())
        while True:
            for name, expr in m.body:
                found[name] = frozenset().union(*(found[n.tensor] for n in walk(expr) if isinstance(n, Access)))
            after = {p: found[p] | found.get(r, frozenset()) for p, r in zip(m.params, m.results, strict=False)}
            if all(found[p] == ranks for p, ranks in after.items()):
                return found
            found |= after

    def _store(self, o: Output, value: Expr, extra: tuple[str, ...] = ()) -> None:
        """Store a value over its output's ranks. What is the same along other ranks of the kernel is folded first."""
        axes = tuple(r for r in (*self.e.ranks, *extra) if r in o.ranks and self.sizes[r] > 1)
        lacking = tuple(r for r in self.e.ranks if r not in o.ranks and self.sizes[r] > 1 and r in self._depends(value))
        if lacking:
            tile = self._tile("only", set(o.ranks), self.types[o.name])
            self.frames[-1].ops.append(Fold(tile, "max", lacking, value))
            value = Access(tile.name)
        target = Access(o.name, tuple(Rank(r) for r in o.ranks))
        self.frames[-1].ops.append(Store(target, axes, value, self.tiling.through and o.name in self.c.outputs))


@dataclass(frozen=True, slots=True)
class _Pair:
    """The operands of a contraction by their tiles, and the type to which it rounds them."""

    left: str
    right: str
    operand: str | None


def _is_row(e: Reduce) -> bool:
    """Whether what is reduced lies along memory in some tensor, and across it in none."""
    rank = e.ranks[0]
    places = [n.indices for n in walk(e) if isinstance(n, Access) and rank in free_ranks(n)]
    across = any(rank in free_ranks(i) for p in places for i in p[:-1])
    return not across and any(p[-1] == Rank(rank) for p in places)


def _reads(s: Let | Take) -> set[str]:
    """What a part of a step reads; a component's own old value, to which it adds, among it."""
    exprs = (s.value,) if isinstance(s, Let) else (s.old, s.element)
    return {t for e in exprs for t in tensors_read(e)}


def _both(guard: Expr | None, test: Expr) -> Expr:
    return test if guard is None else Call("and", (guard, test))


def _product(e: Expr) -> list[Expr]:
    """The factors of a product, left to right."""
    if isinstance(e, Call) and e.op == "mul":
        return _product(e.args[0]) + _product(e.args[1])
    return [e]


def _multiplied(factors: Sequence[Expr]) -> Expr:
    """The product of factors, left to right."""
    return reduce(lambda a, b: Call("mul", (a, b)), factors)


def _within(index: Expr, declared: Expr) -> bool:
    """Whether an index is limited by its form to the axis's literal size."""
    span = interval(index, dict.fromkeys(free_ranks(index), (0, LARGEST_EXTENT - 1)))
    size = literal_value(declared)
    return span is not None and isinstance(size, int) and span[0] >= 0 and span[1] < size


def _masked(e: Expr) -> tuple[Expr | None, Expr]:
    """``where(p, value, 0.0)`` as (p, value), nested conditions joined; (None, e) for anything else."""
    if isinstance(e, Call) and e.op == "where" and e.args[2] == Const(0.0):
        inner, value = _masked(e.args[1])
        return (e.args[0] if inner is None else Call("and", (e.args[0], inner))), value
    return None, e


def _named(e: Expr, values: Mapping[str, Expr]) -> Expr:
    """A monoid's expression with its names replaced."""
    if isinstance(e, Access) and e.tensor in values:
        return values[e.tensor]
    kids = children(e)
    return rebuild(e, tuple(_named(k, values) for k in kids)) if kids else e
