"""Cascade to tile programs: one kernel for every Einsum that reduces, scans or is asked for; maps are inlined.

The kernel's grid is the Einsum's output ranks, cut into tiles; reduced ranks are streamed tile by tile into
accumulators. A sum of products whose factors share only the streamed ranks becomes a `Dot`. A scan steps along its
rank inside the kernel and reads its earlier entries from its own output. A monoid takes in one element at a time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ..ir.cascade import (
    Access,
    Cascade,
    Cast,
    Const,
    Einsum,
    Expr,
    Output,
    Param,
    Rank,
    Reduce,
    children,
    free_ranks,
    tensors_read,
    walk,
)
from ..ir.extents import bindings
from ..ir.tile import Fold, For, GridRank, Load, Map, Op, Store, TileKernel, operations, verify_kernel
from ..ir.types import tensor_types
from ..ir.verify import scan_step
from .count import needed
from .few_rows import with_few_rows
from .fuse import (
    ON_CHIP,
    VECTOR,
    cheapest_first,
    converted,
    epilogues,
    fusible,
    is_map,
    is_row_reduction,
    rows_enough,
    stored,
)
from .inline import Inliner
from .join import Scatter, join
from .operands import with_operands
from .split import split
from .step import Let, Step, Take
from .tile_products import mask_of
from .tile_scope import Frame
from .tile_stream import Streams
from .tiling import Tiling

# Nodes up to which a map is computed again wherever it is read, and not stored.
INLINE_NODES = 160


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
    c, pieces = split(c, tiling.splits, user, extents)
    # Pieces take the step of what they are cut from; what merges them takes in whole states.
    steps |= {name: steps.pop(p.components[name]) for name, p in pieces.items() if p.components[name] in steps}
    wanted = set(c.outputs)
    if tiling.stored and extents is not None:
        c, made = with_operands(c, tensor_types(c), extents, tiling.ranks)
        wanted |= made
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
        if plain_map and e.name not in wanted and (e.reductions or sum(1 for _ in walk(e.expr)) <= INLINE_NODES):
            inlined[e.name] = (e.output.ranks, converted(e, types))
            continue
        step = steps.get(e.name)
        if step is not None:
            step = tuple(replace(s, element=inline(s.element)) if isinstance(s, Take) else s for s in step)
        after = [replace(m, expr=inline(m.expr)) for m in epilogues(c, e)] if not plain_map else []
        if tiling.group and not plain_map and e.name not in pieces and rows_enough(e, extents):
            after = _followers(c, e, inlined, inline, live, types, wanted)
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
    return TileProgram(whole, tuple(with_few_rows(kernels)), tuple(scratch))


def _followers(
    c: Cascade,
    e: Einsum,
    inlined: dict[str, tuple[tuple[str, ...], Expr]],
    inline: Inliner,
    live: Collection[str],
    types: Mapping[str, str],
    wanted: Collection[str],
) -> list[Einsum]:
    """The Einsums after one that only need, of what comes with or after it, its results at their own rows, in order.

    Reductions must have the same rows, maps at least these; a map may also write down what the rows are made of, as the
    sum that a norm is of. What is inlined on the way is noted in ``inlined``; maps that are ``wanted`` stay tensors.
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
        if is_map(x) and x.name not in wanted and (x.reductions or sum(1 for _ in walk(expr)) <= INLINE_NODES):
            inlined[x.name] = (x.output.ranks, converted(replace(x, expr=expr), types))
            continue
        reads = [(n, bound) for n, bound in _reads(expr) if n.tensor not in known]
        if not all(n.indices == rows.get(n.tensor) and bound.isdisjoint(free_ranks(n)) for n, bound in reads):
            continue
        if not reads and not _along(x, expr, e, inline):
            continue
        if is_map(x) and x.name in wanted:
            inner = any(isinstance(n, Reduce) for n in walk(expr)) and not set(x.output.ranks) <= set(e.ranks)
            if not inner and (set(x.output.ranks) <= set(e.ranks) or set(x.output.ranks) > set(e.ranks)):
                found.append(replace(x, expr=expr))
        elif is_row_reduction(x) and set(x.output.ranks) == set(e.ranks):
            found.append(replace(x, expr=expr))
            rows[x.name] = tuple(Rank(r) for r in x.output.ranks)
    return found


def _reads(e: Expr, bound: frozenset[str] = frozenset()) -> Iterator[tuple[Access, frozenset[str]]]:
    """The accesses in an expression, each with the ranks that the reductions around it bind: a row's rank, bound anew,
    is another one."""
    if isinstance(e, Access):
        yield e, bound
    inner = bound.union(e.ranks) if isinstance(e, Reduce) else bound
    for kid in children(e):
        yield from _reads(kid, inner)


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


class _Builder(Streams):
    """Writes the kernel of one Einsum."""

    def build(self, after: list[Einsum], kept: set[str], added: Sequence[Einsum] = ()) -> TileKernel:
        """The kernel of the Einsum and of the maps after it; of its own tensors those in ``kept`` are stored.

        What is ``added`` to it sums over one of its rows, and has a row for each coordinate of its stream.
        """
        e = self.e
        self.added = added
        scan = scan_step(e)
        ranks = e.ranks
        for r, size in zip(self._tiled(ranks), (self.tiling.inner, self.tiling.outer), strict=False):
            self.sizes[r] = size
        for r in ranks:
            self.sizes[r] = 1 if r in self.counts else self.tiling.ranks.get(r, self.sizes.get(r, 1))
        room, choices, chosen = ON_CHIP * ON_CHIP, VECTOR, self._chosen()
        for r in reversed(self._whole(ranks)):
            given, extent = self.tiling.ranks.get(r, 0), max(1, self.extents[r])
            size = given if self.tiling.hold and given >= extent else min(ON_CHIP, -(-extent // VECTOR) * VECTOR)
            # Where conditions alone know a rank, each of its coordinates looks at everything that is summed.
            if size <= (choices if r in chosen else room):
                self.sizes[r], room = size, room // size
                choices //= size if r in chosen else 1
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
            self.frames.append(Frame({r}))
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
            ordered=self.c.numerics == "strict",
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

    def _chosen(self) -> frozenset[str]:
        """The ranks that only say which terms of a sum belong to them, as those of a scatter do."""
        known = [free_ranks(mask_of(n.arg)[1]) for n in self.e.reductions if n.op == "sum"]
        return frozenset(self.e.output.ranks).difference(*known) if known and self.step is None else frozenset()

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
