"""The verifier, run after the parser and after every pass: what it lets through has a meaning.

Checked: names and ranks are distinct kinds of thing, each tensor is written once and before it is read (a scan may read
its own other entries), every rank is bound and has an extent, accesses have as many indices as their tensor, types fit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .cascade import (
    Access,
    Call,
    Cascade,
    Const,
    Einsum,
    Expr,
    Monoid,
    Rank,
    Reduce,
    children,
    free_ranks,
    literal_value,
    ranks_named,
    tensors_read,
    walk,
)
from .dtypes import DTYPES
from .errors import CastileError, Loc, VerifyError
from .extents import bindings, is_affine
from .ops import OPS, REDUCTIONS
from .types import TypeChecker, tensor_types

MAX_RANKS = 24


def verify(c: Cascade) -> None:
    """Raise `VerifyError` unless the cascade is well formed."""
    known: dict[str, int] = {}
    _monoids(c)
    for p in c.params:
        _fresh(p.name, known, p.loc)
        known[p.name] = len(p.indices)
        _param(c, p.name, p.dtype, p.indices, p.loc)
    ranks = set(c.ranks)
    for e in c.einsums:
        try:
            _einsum(c, e, known)
        except CastileError as error:
            error.einsum = error.einsum or e.name
            raise
    for clash in ranks & set(known):
        raise VerifyError(
            f"`{clash}` names both a tensor and a rank",
            rank=clash,
            hint="rename one of them",
            loc=_first_use(c, clash),
        )
    for name in c.outputs:
        if name not in c.einsum_of:
            what = "is a parameter" if name in known else "is never written"
            raise VerifyError(f"the result `{name}` {what}", hint="a result stands on the left of a statement")
    if not c.einsums:
        raise VerifyError("the cascade has no Einsum", hint="write a statement such as `Y[m] = sum[k](X[m, k])`")
    bindings(c)
    tensor_types(c)


def _fresh(name: str, known: Mapping[str, int], loc: Loc | None) -> None:
    if name in known:
        raise VerifyError(
            f"`{name}` is written twice",
            hint="each tensor is written once; give the second its own name",
            loc=loc,
        )


def _first_use(c: Cascade, name: str) -> Loc | None:
    for p in c.params:
        if any(name in ranks_named(i) for i in p.indices):
            return p.loc
    return next((e.loc for e in c.einsums if name in e.ranks or name in ranks_named(e.expr)), None)


def _param(c: Cascade, name: str, dtype: str, indices: tuple[Expr, ...], loc: Loc | None) -> None:
    if dtype not in DTYPES:
        raise VerifyError(f"`{dtype}` is no dtype", loc=loc)
    seen: set[str] = set()
    for index in indices:
        if not is_affine(index) or (isinstance(index, Const) and index.kind != "int"):
            raise VerifyError(
                f"an extent of `{name}` is no rank, integer or expression of ranks",
                hint="write `X: f32[m, 64]` or `W: u32[k // 8, n]`",
                loc=index.loc or loc,
            )
        if isinstance(index, Rank):
            if index.name in seen:
                raise VerifyError(
                    f"rank `{index.name}` stands twice in `{name}`",
                    rank=index.name,
                    hint="give the axes two names",
                    loc=index.loc,
                )
            seen.add(index.name)


def _monoids(c: Cascade) -> None:
    seen: set[str] = set()
    for m in c.monoids:
        if m.name in seen:
            raise VerifyError(f"the monoid `{m.name}` is defined twice", loc=m.loc)
        seen.add(m.name)
        _monoid(m)


def _monoid(m: Monoid) -> None:
    if m.width == 0 or len(m.params) != 2 * m.width or len(m.results) != m.width:
        raise VerifyError(
            f"the monoid `{m.name}` has {m.width} identities, {len(m.params)} parameters and {len(m.results)} results",
            hint="a state of n components has n identities, 2 n parameters and n results",
            loc=m.loc,
        )
    for value in m.identity:
        if literal_value(value) is None:
            raise VerifyError("a monoid's identity is made of literals", loc=value.loc or m.loc)
    names = set(m.params)
    for name, value in m.body:
        if name in names:
            raise VerifyError(f"`{name}` is assigned twice in the monoid `{m.name}`", loc=value.loc or m.loc)
        for node in walk(value):
            if isinstance(node, Access) and (node.indices or node.tensor not in names):
                raise VerifyError(f"`{node.tensor}` is no value of the monoid `{m.name}`", loc=node.loc)
            if not isinstance(node, Access | Call | Const) and children(node) == () or isinstance(node, Reduce):
                raise VerifyError("a monoid combines scalars: ranks and reductions do not occur in it", loc=node.loc)
        names.add(name)
    for result in m.results:
        if result not in names:
            raise VerifyError(f"the monoid `{m.name}` never assigns its result `{result}`", loc=m.loc)


def _einsum(c: Cascade, e: Einsum, known: dict[str, int]) -> None:
    for o in e.outputs:
        _fresh(o.name, known, o.loc or e.loc)
        if len(set(o.ranks)) != len(o.ranks):
            raise VerifyError(f"a rank stands twice on the left of `{o.name}`", loc=o.loc or e.loc)
        if o.dtype is not None and o.dtype not in DTYPES:
            raise VerifyError(f"`{o.dtype}` is no dtype", loc=o.loc or e.loc)
    own = {o.name: len(o.ranks) for o in e.outputs}
    if len(own) != len(e.outputs):
        raise VerifyError("a tensor stands twice on the left", loc=e.loc)
    _accesses(c, e, {**known, **own}, own)
    if len(e.outputs) > 1 or (isinstance(e.expr, Reduce) and e.expr.op in c.monoid_of):
        _state(c, e)
    else:
        _bound(e.expr, set(e.output.ranks), e)
    scan_step(e)
    known.update(own)


def _accesses(c: Cascade, e: Einsum, known: Mapping[str, int], own: Mapping[str, int]) -> None:
    for node in walk(e.expr):
        match node:
            case Access(tensor=tensor, indices=indices):
                if tensor not in known:
                    later = tensor in c.einsum_of
                    message = f"`{tensor}` is read before it is written" if later else f"no tensor is called `{tensor}`"
                    hint = "statements stand in order; a scan reads only its own earlier entries" if later else ""
                    raise VerifyError(message, hint=hint, loc=node.loc or e.loc)
                if len(indices) != known[tensor]:
                    raise VerifyError(
                        f"`{tensor}` has {known[tensor]} indices; {len(indices)} came",
                        expected=_spelled(c, tensor),
                        got=f"{len(indices)} indices",
                        loc=node.loc or e.loc,
                    )
            case Call(op=op, args=args):
                if op not in OPS or len(args) != OPS[op].arity:
                    raise VerifyError(f"`{op}` is no operation of {len(args)} arguments", loc=node.loc or e.loc)
            case Reduce(op=op, ranks=ranks, args=args):
                if op not in REDUCTIONS and op not in c.monoid_of:
                    raise VerifyError(f"no reduction is called `{op}`", loc=node.loc or e.loc)
                if not ranks or len(set(ranks)) != len(ranks) or not args or (op in REDUCTIONS and len(args) != 1):
                    raise VerifyError(f"`{op}` needs distinct ranks and one argument", loc=node.loc or e.loc)
            case _:
                pass


def _spelled(c: Cascade, tensor: str) -> str:
    from .print import print_expr

    return f"{tensor}[{', '.join(print_expr(i) for i in c.indices_of(tensor))}]"


def _bound(expr: Expr, bound: set[str], e: Einsum) -> None:
    """Every rank whose coordinate is used is an output's or reduced; scopes stay within what arrays can hold."""
    stack: list[tuple[Expr, frozenset[str], int]] = [(expr, frozenset(bound), len(bound))]
    while stack:
        node, scope, depth = stack.pop()
        if isinstance(node, Rank) and node.name not in scope:
            raise _loose(node.name, node.loc or e.loc, e)
        if isinstance(node, Reduce):
            scope, depth = scope | set(node.ranks), depth + len(node.ranks)
            if depth > MAX_RANKS:
                raise VerifyError(f"an iteration space of more than {MAX_RANKS} ranks", loc=node.loc or e.loc)
        stack.extend((k, scope, depth) for k in children(node))
    if len(bound) > MAX_RANKS:
        raise VerifyError(f"a tensor of more than {MAX_RANKS} ranks", loc=e.loc)


def _loose(rank: str, loc: Loc | None, e: Einsum) -> VerifyError:
    left = ", ".join([*e.output.ranks, rank])
    return VerifyError(
        f"rank `{rank}` is neither on the left nor reduced",
        rank=rank,
        hint=f"reduce it, as in sum[{rank}](…), or write {e.name}[{left}] on the left; a scalar is a parameter",
        loc=loc,
    )


def _state(c: Cascade, e: Einsum) -> None:
    """A monoid's Einsum: each component may depend only on ranks that its output has."""
    if not isinstance(e.expr, Reduce) or e.expr.op not in c.monoid_of:
        raise VerifyError(
            "several names on the left need a monoid on the right",
            hint="define one under @monoid, then write (A[q], B[q]) = name[k](…)",
            loc=e.loc,
        )
    reduce, m = e.expr, c.monoid_of[e.expr.op]
    if len(e.outputs) != m.width or len(reduce.args) != m.width:
        raise VerifyError(
            f"the monoid `{m.name}` has {m.width} components, not {len(e.outputs)} names and {len(reduce.args)} values",
            loc=e.loc,
        )
    depends = component_dependence(m)
    for o, needed in zip(e.outputs, depends, strict=True):
        for i in sorted(needed):
            _bound(reduce.args[i], set(o.ranks) | set(reduce.ranks), e)


def component_dependence(m: Monoid) -> tuple[frozenset[int], ...]:
    """For each component of the state, the components that its new value depends on, transitively."""
    sources: dict[str, frozenset[int]] = {p: frozenset((i % m.width,)) for i, p in enumerate(m.params)}
    for name, value in m.body:
        sources[name] = frozenset().union(*(sources[t] for t in tensors_read(value)))
    direct = [sources[r] | {i} for i, r in enumerate(m.results)]
    for _ in range(m.width):
        direct = [frozenset().union(*(direct[j] for j in d)) for d in direct]
    return tuple(direct)


@dataclass(frozen=True, slots=True)
class Scan:
    """An Einsum that reads its own entries: along which axis, and in which direction (+1: later from earlier)."""

    rank: str
    axis: int
    direction: int


def scan_step(e: Einsum) -> Scan | None:
    """The scan that an Einsum is, or None. Raises `VerifyError` where it reads an entry that is not before it."""
    own = {o.name for o in e.outputs}
    reads = [n for n in walk(e.expr) if isinstance(n, Access) and n.tensor in own]
    if not reads:
        return None
    if len(e.outputs) > 1:
        raise VerifyError("a monoid's Einsum cannot read itself", loc=reads[0].loc or e.loc)
    ranks = e.output.ranks
    found: set[Scan] = set()
    for read in reads:
        steps = {s for axis, index in enumerate(read.indices) if (s := _step(index, ranks[axis], axis)) is not None}
        found = steps if read is reads[0] else found & steps
    if len(found) != 1:
        raise VerifyError(
            f"`{e.name}` reads itself, but not at an earlier entry of one of its ranks",
            hint=f"a scan reads {e.name}[{ranks[0]} - 1] (or + 1, backwards) in every access to itself"
            if ranks
            else "",
            loc=reads[0].loc or e.loc,
        )
    scan = found.pop()
    inner = {r for n in walk(e.expr) if isinstance(n, Reduce) for r in n.ranks}
    if scan.rank in inner:
        raise VerifyError(f"rank `{scan.rank}` is both scanned and reduced in `{e.name}`", rank=scan.rank, loc=e.loc)
    return scan


def _step(index: Expr, rank: str, axis: int) -> Scan | None:
    if isinstance(index, Call) and index.op in ("add", "sub"):
        match index.args:
            case (Rank(name=name), Const(value=int() as by, kind="int")) if name == rank and by >= 1:
                return Scan(rank, axis, 1 if index.op == "sub" else -1)
            case (Const(value=int() as by, kind="int"), Rank(name=name)) if (
                name == rank and by >= 1 and index.op == "add"
            ):
                return Scan(rank, axis, -1)
    return None


def reduced_ranks(exprs: Iterable[Expr]) -> frozenset[str]:
    """Every rank that a reduction binds anywhere in the expressions."""
    return frozenset(r for e in exprs for n in walk(e) if isinstance(n, Reduce) for r in n.ranks)


__all__ = ["Scan", "component_dependence", "free_ranks", "reduced_ranks", "scan_step", "verify", "TypeChecker"]
