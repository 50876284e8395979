"""Cascade to tile programs: one kernel for every Einsum that reduces, scans or is asked for; maps are inlined.

The kernel's grid is the Einsum's output ranks, cut into tiles; reduced ranks are streamed tile by tile into
accumulators. A sum of products whose factors share only the streamed ranks becomes a `Dot`. A scan steps along its
rank inside the kernel and reads its earlier entries from its own output. A monoid takes in one element at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import inf

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
    Param,
    Rank,
    Reduce,
    children,
    free_ranks,
    rebuild,
    substitute,
    tensors_read,
    walk,
)
from ..ir.dtypes import DTYPES
from ..ir.ops import REDUCTIONS
from ..ir.tile import Dot, Fold, For, GridRank, Load, Map, Op, Store, Tile, TileKernel, verify_kernel
from ..ir.types import TypeChecker, compute_type, settle, tensor_types
from ..ir.verify import scan_step
from .count import needed

# Nodes up to which a map is computed again wherever it is read, and not stored.
INLINE_NODES = 160


@dataclass(frozen=True, slots=True)
class Tiling:
    """Tile sizes: of the last output rank, the one before it, and streamed ranks; all others are taken one by one."""

    inner: int = 64
    outer: int = 16
    stream: int = 64


@dataclass(frozen=True, slots=True)
class TileProgram:
    """The kernels of a cascade in the order in which they run, and the tensors that they pass to each other."""

    cascade: Cascade
    kernels: tuple[TileKernel, ...]
    scratch: tuple[Param, ...]


def tile_program(c: Cascade, tiling: Tiling | None = None) -> TileProgram:
    """Map a cascade (derived or as written) to tile kernels."""
    types = tensor_types(c)
    live = needed(c)
    inlined: dict[str, tuple[tuple[str, ...], Expr]] = {}
    kernels: list[TileKernel] = []
    scratch: list[Param] = []
    for e in c.einsums:
        if not any(o.name in live for o in e.outputs):
            continue
        e = replace(e, expr=_inline(e.expr, inlined))
        if _is_map(e) and e.name not in c.outputs and sum(1 for _ in walk(e.expr)) <= INLINE_NODES:
            inlined[e.name] = (e.output.ranks, _converted(e, types))
            continue
        kernel = _Builder(c, e, types, tiling or Tiling()).build()
        verify_kernel(kernel)
        kernels.append(kernel)
        for o in e.outputs:
            if o.name not in c.outputs:
                scratch.append(Param(o.name, types[o.name], tuple(Rank(r) for r in o.ranks)))
    return TileProgram(c, tuple(kernels), tuple(scratch))


def _is_map(e: Einsum) -> bool:
    return len(e.outputs) == 1 and not e.reductions and scan_step(e) is None


def _converted(e: Einsum, types: Mapping[str, str]) -> Expr:
    """A map's value as its tensor would hold it."""
    return Cast(types[e.name], e.expr) if e.output.dtype is not None else e.expr


def _inline(e: Expr, maps: Mapping[str, tuple[tuple[str, ...], Expr]]) -> Expr:
    """Replace reads of maps by what they compute. A map holds no reduction, so nothing is captured."""
    kids = children(e)
    if kids:
        e = rebuild(e, tuple(_inline(k, maps) for k in kids))
    if isinstance(e, Access) and e.tensor in maps:
        ranks, value = maps[e.tensor]
        return substitute(value, dict(zip(ranks, e.indices, strict=True)))
    return e


@dataclass
class _Frame:
    """The operations of one loop body under construction, and the tiles made in it."""

    ranks: set[str]
    ops: list[Op] = field(default_factory=list)
    made: dict[object, Expr] = field(default_factory=dict)


class _Builder:
    """Writes the kernel of one Einsum."""

    def __init__(self, c: Cascade, e: Einsum, types: Mapping[str, str], tiling: Tiling) -> None:
        self.c = c
        self.e = e
        self.types = dict(types)
        self.tiling = tiling
        self.frames: list[_Frame] = [_Frame(set())]
        self.sizes: dict[str, int] = {}
        self.own: dict[str, frozenset[str]] = {}
        self.level: dict[str, int] = {}
        self.count = 0

    def build(self) -> TileKernel:
        e = self.e
        scan = scan_step(e)
        ranks = e.ranks
        self.checker = TypeChecker(self.types, self.c.monoid_of)
        for r, size in zip(reversed(ranks), (self.tiling.inner, self.tiling.outer), strict=False):
            self.sizes[r] = size
        for r in ranks:
            self.sizes.setdefault(r, 1)
        looped: tuple[str, ...] = ()
        if scan is not None:
            self.sizes[scan.rank] = 1
            looped = (scan.rank, *self._mixed(scan.rank))
        grid = tuple(GridRank(r, self.sizes[r]) for r in ranks if r not in looped)
        self.frames[0].ranks |= {g.rank for g in grid}
        for r in looped:
            self.frames.append(_Frame({r}))
        if len(e.outputs) > 1:
            self._state()
        else:
            value = self.value(e.expr, None)
            self._store(e, 0, value)
        while len(self.frames) > 1:
            frame = self.frames.pop()
            rank = next(iter(frame.ranks))
            reverse = scan is not None and rank == scan.rank and scan.direction < 0
            self.frames[-1].ops.append(For(rank, self.sizes[rank], tuple(frame.ops), reverse=reverse))
        body = tuple(self.frames[0].ops)
        used = self._used(body)
        params = [p for p in self.c.params if p.name in used]
        outputs = {o.name: o for x in self.c.einsums for o in x.outputs}
        written = {o.name for o in e.outputs}
        params += [
            Param(n, self.types[n], tuple(Rank(r) for r in o.ranks)) for n, o in outputs.items() if n in used | written
        ]
        name = "_".join([self.c.name, *(o.name for o in e.outputs[:1])])
        return TileKernel(name, tuple(params), tuple(o.name for o in e.outputs), grid, body)

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
                case For(body=inner):
                    used |= self._used(inner)
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
        ordered = tuple(r for f in self.frames for r in self._in_order(f.ranks) if r in wanted and self.sizes[r] > 1)
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
        for node in walk(e):
            if isinstance(node, Rank):
                found.add(node.name)
            elif isinstance(node, Access) and node.tensor in self.own:
                found |= self.own[node.tensor]
        return frozenset(found)

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
            case Call(args=args):
                return replace(e, args=tuple(self.value(a, guard) for a in args))

    def _access(self, e: Access, guard: Expr | None) -> Expr:
        if not e.indices and e.tensor in self.c.param_of:
            return e
        indices = tuple(self.value(i, guard) for i in e.indices)
        source = Access(e.tensor, indices)
        plain = all(isinstance(i, Rank) for i in indices)
        held = None if plain else guard
        depends = self._depends(source) | (self._depends(held) if held is not None else frozenset())
        level = self._frame_of(depends, source, *([held] if held is not None else []))
        key = (source, held)
        if e.tensor == self.e.name:
            # A scan reads what an earlier step stored: never kept from one step to the next.
            level = len(self.frames) - 1
        frame = self.frames[level]
        if key in frame.made and e.tensor != self.e.name:
            return frame.made[key]
        dtype = self.types[e.tensor]
        tile = self._tile(e.tensor, depends, dtype if dtype == "bool" else compute_type(dtype), level)
        frame.ops.append(Load(tile, source, held))
        frame.made[key] = Access(tile.name)
        return frame.made[key]

    def _map(self, base: str, e: Expr, dtype: str | None = None, depends: frozenset[str] | None = None) -> Expr:
        """A tile that holds an expression over tiles."""
        depends = self._depends(e) if depends is None else depends
        level = self._frame_of(depends, e)
        tile = self._tile(base, depends, dtype or settle(self.checker.infer(e)), level)
        self.frames[level].ops.append(Map(tile, e))
        return Access(tile.name)

    # Reductions

    def _open(self, ranks: tuple[str, ...], size: int) -> None:
        for r in ranks:
            self.sizes[r] = size
            self.frames.append(_Frame({r}))

    def _close(self, ranks: tuple[str, ...]) -> None:
        for r in reversed(ranks):
            frame = self.frames.pop()
            self.frames[-1].ops.append(For(r, self.sizes[r], tuple(frame.ops)))
            del self.sizes[r]

    def _reduce(self, e: Reduce, guard: Expr | None) -> Expr:
        clash = tuple(r for r in e.ranks if any(r in f.ranks for f in self.frames))
        if clash:
            raise AssertionError("the builder renames shadowing ranks before it starts")
        if e.op in self.c.monoid_of:
            return self._fold_monoid(e, guard)[0]
        if e.op == "argmax":
            return self._argmax(e, guard)
        dtype = self._reduced_type(e)
        depends = self._outer(e, guard)
        start = self._identity(e, dtype)
        depth = len(self.frames)
        total = self._tile(e.op, depends, dtype)
        self.frames[-1].ops.append(Map(total, start))
        self._open(e.ranks, self.tiling.stream)
        if e.op == "sum" and (pair := self._factors(e, guard)) is not None:
            left, right = pair
            over = tuple(r for r in e.ranks if self.sizes[r] > 1)
            self.frames[-1].ops.append(Dot(total, left, right, over, accumulate=True))
        else:
            value = self.value(e.arg, guard)
            if e.op not in ("any", "all") and settle(self.checker.infer(value)) == "bool":
                value = Cast("i32", value)
            over = tuple(r for r in e.ranks if self.sizes[r] > 1)
            if guard is not None:
                value = Call("where", (guard, value, start))
            self.frames[-1].ops.append(Fold(total, e.op, over, value, accumulate=True))
        self._close(e.ranks)
        assert len(self.frames) == depth
        return Access(total.name)

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

    def _factors(self, e: Reduce, guard: Expr | None) -> tuple[str, str] | None:
        """The two operands of a contraction, as tiles; None where the product does not fall apart into two."""
        if guard is not None or not DTYPES[self._reduced_type(e)].is_float:
            return None
        factors = _product(e.arg)
        over = frozenset(e.ranks)
        scope = frozenset().union(*(f.ranks for f in self.frames)) - over
        wide = frozenset(r for r in scope if self.sizes.get(r, 1) > 1)
        sides = [free_ranks(f) & wide for f in factors]
        if len(factors) < 2 or any(isinstance(n, Reduce) for f in factors for n in walk(f)):
            return None
        exclusive = [s for s in sides if s]
        if not exclusive:
            return None
        first = exclusive[0]
        left = [f for f, s in zip(factors, sides, strict=True) if s <= first]
        right = [f for f, s in zip(factors, sides, strict=True) if not s <= first]
        mine = frozenset().union(*(free_ranks(f) & wide for f in left))
        theirs = frozenset().union(*(free_ranks(f) & wide for f in right)) if right else frozenset()
        if not right or not mine - theirs or not theirs - mine:
            return None
        if not all(over <= frozenset().union(*map(free_ranks, part)) for part in (left, right)):
            return None
        names = []
        for base, part in (("left", left), ("right", right)):
            e_part = part[0]
            for f in part[1:]:
                e_part = Call("mul", (e_part, f))
            value = self.value(e_part, guard)
            access = value if isinstance(value, Access) and not value.indices else self._map(base, value, "f32")
            assert isinstance(access, Access)
            if access.tensor not in self.own or self.types[access.tensor] not in ("f32", "f64"):
                access = self._map(base, value, "f32")
                assert isinstance(access, Access)
            names.append(access.tensor)
        axes = frozenset().union(*(self.own[n] for n in names)) - over
        return (names[0], names[1]) if axes & wide == self._outer(e, guard) & wide else None

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

    def _state(self) -> None:
        """Several outputs of one monoid; each is stored over its own ranks by the programs that hold their first
        tiles."""
        assert isinstance(self.e.expr, Reduce)
        state = self._fold_monoid(self.e.expr, None)
        for i, value in enumerate(state):
            self._store(self.e, i, value)

    def _fold_monoid(self, e: Reduce, guard: Expr | None) -> list[Expr]:
        m: Monoid = self.c.monoid_of[e.op]
        types = self.checker.state_types(e)
        depends = self._outer(e, guard)
        for o in self.e.outputs if len(self.e.outputs) > 1 else ():
            depends |= set(o.ranks)
        state = [self._tile(r, depends, t) for r, t in zip(m.results, types, strict=True)]
        for tile, start in zip(state, m.identity, strict=True):
            self.frames[-1].ops.append(Map(tile, start))
        for r in e.ranks:
            self._open((r,), 1)
        element = [self.value(a, guard) for a in e.args]
        names: dict[str, Expr] = {}
        for p, x in zip(m.params, [*(Access(t.name) for t in state), *element], strict=True):
            names[p] = x
        ops = self.frames[-1].ops
        inside = depends | set(e.ranks)
        results: dict[str, Expr] = dict(names)
        for name, expr in m.body:
            value = _named(expr, results)
            tile = self._tile(name, inside, settle(self.checker.infer(value)))
            ops.append(Map(tile, value))
            results[name] = Access(tile.name)
        for tile, r in zip(state, m.results, strict=True):
            ops.append(Map(tile, results[r]))
        for r in reversed(e.ranks):
            self._close((r,))
        return [Access(t.name) for t in state]

    def _store(self, e: Einsum, component: int, value: Expr) -> None:
        o = e.outputs[component]
        axes = tuple(r for r in e.ranks if r in o.ranks and self.sizes[r] > 1)
        if len(e.outputs) > 1 and set(o.ranks) != set(e.ranks):
            # What varies over fewer ranks than its neighbours is the same along the others: fold it away.
            lacking = tuple(r for r in e.ranks if r not in o.ranks and self.sizes[r] > 1)
            if lacking:
                tile = self._tile("only", set(o.ranks), self.types[o.name])
                self.frames[-1].ops.append(Fold(tile, "max", lacking, value))
                value = Access(tile.name)
        self.frames[-1].ops.append(Store(Access(o.name, tuple(Rank(r) for r in o.ranks)), axes, value))


def _both(guard: Expr | None, test: Expr) -> Expr:
    return test if guard is None else Call("and", (guard, test))


def _product(e: Expr) -> list[Expr]:
    """The factors of a product, left to right."""
    if isinstance(e, Call) and e.op == "mul":
        return _product(e.args[0]) + _product(e.args[1])
    return [e]


def _named(e: Expr, values: Mapping[str, Expr]) -> Expr:
    """A monoid's expression with its names replaced."""
    if isinstance(e, Access) and e.tensor in values:
        return values[e.tensor]
    kids = children(e)
    return rebuild(e, tuple(_named(k, values) for k in kids)) if kids else e
