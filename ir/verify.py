"""The verifier, run after the parser and after every pass: what it lets through has a meaning, and a text that says it.

Checked: names and ranks are distinct kinds of thing, each tensor is written once and before it is read (a scan may read
its own earlier entries), every rank is bound and has an extent, accesses have as many indices as their tensor, types
fit, and nothing is there that the text form cannot say.
"""

from __future__ import annotations

import keyword
import math
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .cascade import (
    MAX_DEPTH,
    NUMERICS,
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
    first_mention,
    literal_value,
    ranks_named,
    tensors_read,
    walk,
)
from .dtypes import DTYPES
from .errors import CastileError, Loc, VerifyError, did_you_mean
from .extents import bindings
from .interval import is_affine
from .ops import OPS, REDUCTIONS, RESERVED
from .print import print_expr
from .types import TypeChecker, is_float, tensor_types

# Axes of an iteration space; NumPy, which the oracle is written in, has 32 at least.
MAX_RANKS = 24


def verify(c: Cascade) -> None:
    """Raise `VerifyError` unless the cascade is well formed."""
    known: dict[str, int] = {}
    _header(c)
    for m in c.monoids:
        _monoid(m)
    for p in c.params:
        _param(c, p, known)
        known[p.name] = len(p.indices)
    for e in c.einsums:
        if not e.outputs:
            raise VerifyError("an Einsum writes nothing", hint="a tensor stands on the left", loc=e.loc)
        try:
            _einsum(c, e, known)
        except CastileError as error:
            error.einsum = error.einsum or e.name
            raise
    if not c.einsums:
        raise VerifyError("the cascade has no Einsum", hint="write a statement such as `Y[m] = sum[k](X[m, k])`")
    _distinct(c, known)
    for name in c.outputs:
        if name not in c.einsum_of:
            close = did_you_mean(name, c.einsum_of)
            what = "is a parameter" if name in known else "is never written"
            hint = close or "a result stands on the left of a statement"
            raise VerifyError(f"the result `{name}` {what}", hint=hint)
    bindings(c)
    tensor_types(c)


def _header(c: Cascade) -> None:
    if not c.outputs or len(set(c.outputs)) != len(c.outputs):
        raise VerifyError("the results are not distinct names", hint="write `-> O:` or `-> (O, L):`")
    if c.numerics not in NUMERICS:
        raise VerifyError(f"`{c.numerics}` is no numerics", hint="it is one of " + ", ".join(NUMERICS))
    if not c.name.isidentifier() or keyword.iskeyword(c.name):
        raise VerifyError(f"`{c.name}` cannot name a cascade", hint="a name is letters, digits and underscores")


def _distinct(c: Cascade, known: Mapping[str, int]) -> None:
    """No name is two kinds of thing."""
    for rank in c.ranks:
        if rank in known:
            hint, loc = "rename one of them; one name is one thing", first_mention(c, rank)
            raise VerifyError(f"`{rank}` names both a tensor and a rank", rank=rank, hint=hint, loc=loc)
        if not _speakable(rank):
            message = f"`{rank}` cannot name a rank"
            raise VerifyError(message, rank=rank, hint="choose another name", loc=first_mention(c, rank))
    monoids = [m.name for m in c.monoids]
    for m in c.monoids:
        if m.name in known or m.name in c.ranks or monoids.count(m.name) > 1:
            what = "a tensor" if m.name in known else "a rank" if m.name in c.ranks else "another monoid"
            hint = "rename one of them; one name is one thing"
            raise VerifyError(f"`{m.name}` names both a monoid and {what}", hint=hint, loc=m.loc)


def _named(name: str, what: str, loc: Loc | None) -> None:
    if not _speakable(name):
        raise VerifyError(f"`{name}` cannot name {what}", hint="choose another name", loc=loc)


def _speakable(name: str) -> bool:
    """Whether the text form can hold the name."""
    plain = name.isascii() or unicodedata.normalize("NFKC", name) == name
    return plain and name.isidentifier() and name not in RESERVED and not keyword.iskeyword(name)


def _fresh(name: str, c: Cascade, known: Mapping[str, int], loc: Loc | None) -> None:
    _named(name, "a tensor", loc)
    if name in known:
        what = "is a parameter and cannot be written" if name in c.param_of else "is written twice"
        raise VerifyError(f"`{name}` {what}", hint="each tensor is written once; give this one its own name", loc=loc)


def _param(c: Cascade, p: Param, known: Mapping[str, int]) -> None:
    if p.name in known:
        raise VerifyError(f"two parameters are called `{p.name}`", hint="rename one of them", loc=p.loc)
    _fresh(p.name, c, known, p.loc)
    if p.name == "out":
        raise VerifyError("a parameter cannot be called `out`", hint="kernels take `out=` for their results", loc=p.loc)
    if p.dtype not in DTYPES:
        raise VerifyError(f"`{p.dtype}` is no dtype", hint="the dtypes are " + " ".join(DTYPES), loc=p.loc)
    if len(p.indices) > MAX_RANKS:
        raise VerifyError(f"a tensor of more than {MAX_RANKS} ranks", hint="flatten some of them", loc=p.loc)
    checker = TypeChecker({}, {})
    seen: set[str] = set()
    for index in p.indices:
        loc = index.loc or p.loc
        hint = "write `X: f32[m, 64]`, or `W: u32[k // 8, n]` with the greatest index on the axis"
        if isinstance(index, Rank):
            if index.name in seen:
                message = f"rank `{index.name}` stands twice in `{p.name}`"
                raise VerifyError(message, rank=index.name, hint="give the axes two names", loc=loc)
            seen.add(index.name)
        elif not isinstance(index, Const):
            if tensors := tensors_read(index):
                hint = "rename one of them; one name is one thing"
                raise VerifyError(f"`{tensors[0]}` names both a tensor and a rank", hint=hint, loc=loc)
            _nodes(c, index, {}, p.loc)
            whole = is_affine(index) and any(isinstance(n, Rank) for n in walk(index))
            if not whole or not _is_integer(checker.infer(index)):
                message = f"an extent of `{p.name}` is no rank, integer or integer expression of ranks"
                raise VerifyError(message, hint=hint, loc=loc)
        elif index.kind != "int":
            raise VerifyError(f"an extent of `{p.name}` is no integer", hint=hint, loc=loc)


def _is_integer(dtype: str) -> bool:
    return not is_float(dtype) and dtype != "bool"


def _monoid(m: Monoid) -> None:
    _named(m.name, "a monoid", m.loc)
    if m.width == 0 or len(m.params) != 2 * m.width or len(set(m.params)) != 2 * m.width or len(m.results) != m.width:
        what = f"{m.width} identities, {len(set(m.params))} parameters and {len(m.results)} results"
        hint = "a state of n components has n identities, 2 n parameters and n results"
        raise VerifyError(f"the monoid `{m.name}` has {what}", hint=hint, loc=m.loc)
    for value in m.identity:
        if literal_value(value) is None:
            hint = "write numbers, True, False, inf or -inf"
            raise VerifyError("a monoid's identity is made of literals", hint=hint, loc=value.loc or m.loc)
        _literal(value, m.loc)
    names: dict[str, int] = {}
    for name in m.params:
        _named(name, "a monoid's parameter", m.loc)
        names[name] = 0
    for name, value in m.body:
        loc = value.loc or m.loc
        _named(name, "a value", loc)
        if name in names:
            hint = "give the second value its own name"
            raise VerifyError(f"`{name}` is assigned twice in the monoid `{m.name}`", hint=hint, loc=loc)
        for node in walk(value):
            at = node.loc or loc
            if isinstance(node, Access) and (node.indices or node.tensor not in names):
                hint = did_you_mean(node.tensor, names) or "its values are its parameters and what it assigned before"
                raise VerifyError(f"`{node.tensor}` is no value of the monoid `{m.name}`", hint=hint, loc=at)
            if isinstance(node, Rank | Extent | Reduce):
                name = node.name if isinstance(node, Rank) else node.rank if isinstance(node, Extent) else node.op
                hint = did_you_mean(name, names) or "it combines scalars: ranks and reductions do not occur in it"
                raise VerifyError(f"`{name}` is no value of the monoid `{m.name}`", hint=hint, loc=at)
        _nodes(None, value, names, m.loc)
        names[name] = 0
    for result in m.results:
        if result not in names:
            hint = did_you_mean(result, names) or f"write `{result} = …` in its body"
            raise VerifyError(f"the monoid `{m.name}` never assigns its result `{result}`", hint=hint, loc=m.loc)


def _einsum(c: Cascade, e: Einsum, known: dict[str, int]) -> None:
    own: dict[str, int] = {}
    for o in e.outputs:
        _output(c, e, o, {**known, **own} if own else known)
        own[o.name] = len(o.ranks)
    known.update(own)
    _nodes(c, e.expr, known, e.loc)
    if len(e.outputs) > 1 or (isinstance(e.expr, Reduce) and e.expr.op in c.monoid_of):
        _state(c, e)
    else:
        _bound(c, e.expr, e.output.ranks, e)
    scan_step(e)


def _output(c: Cascade, e: Einsum, o: Output, known: Mapping[str, int]) -> None:
    loc = o.loc or e.loc
    _fresh(o.name, c, known, loc)
    if len(set(o.ranks)) != len(o.ranks):
        hint = "a diagonal is written with where(i == j, …, 0)"
        raise VerifyError(f"a rank stands twice on the left of `{o.name}`", hint=hint, loc=loc)
    if len(o.ranks) > MAX_RANKS:
        raise VerifyError(f"a tensor of more than {MAX_RANKS} ranks", hint="flatten some of them", loc=loc)
    if o.dtype is not None and (o.dtype not in DTYPES or len(e.outputs) > 1):
        message = f"`{o.dtype}` is no dtype" if o.dtype not in DTYPES else f"`{o.name}` is one of several, with a dtype"
        raise VerifyError(message, hint="a single tensor may declare one of " + " ".join(DTYPES), loc=loc)


def _nodes(c: Cascade | None, root: Expr, known: Mapping[str, int], where: Loc | None) -> None:
    """Each node says something that the text can say: known names and operations, literals of the grammar, no abyss."""
    stack = [(root, 1)]
    while stack:
        node, depth = stack.pop()
        loc = node.loc or where
        if depth > MAX_DEPTH:
            message = f"an expression nests deeper than {MAX_DEPTH} levels"
            raise VerifyError(message, hint="name a part of it as an Einsum of its own", loc=loc)
        match node:
            case Access(tensor=tensor, indices=indices):
                if tensor not in known:
                    raise _unknown(c, tensor, known, loc)
                if len(indices) != known[tensor]:
                    raise _miscounted(c, tensor, known[tensor], len(indices), loc)
            case Call(op=op, args=args):
                if op not in OPS or len(args) != OPS[op].arity:
                    hint = "the operations are " + " ".join(OPS)
                    raise VerifyError(f"`{op}` is no operation of {len(args)} arguments", hint=hint, loc=loc)
            case Reduce(op=op, ranks=ranks, args=args):
                if op not in REDUCTIONS and (c is None or op not in c.monoid_of):
                    hint = "the reductions are " + " ".join([*REDUCTIONS, *(c.monoid_of if c else ())])
                    raise VerifyError(f"no reduction is called `{op}`", hint=hint, loc=loc)
                if not ranks or len(set(ranks)) != len(ranks) or not args or (op in REDUCTIONS and len(args) != 1):
                    raise VerifyError(
                        f"`{op}` needs distinct ranks and one argument", hint=f"write {op}[k](x)", loc=loc
                    )
            case Cast(dtype=dtype) if dtype not in DTYPES:
                raise VerifyError(f"`{dtype}` is no dtype", hint="the dtypes are " + " ".join(DTYPES), loc=loc)
            case Const():
                _literal(node, where)
            case _:
                pass
        stack.extend([(k, depth + 1) for k in children(node)])


def _literal(e: Expr, where: Loc | None) -> None:
    value = literal_value(e)
    number = e.args[0] if isinstance(e, Call) else e
    fits = type(value) in (bool, float) or (type(value) is int and abs(value) < 1 << 63)
    plain = fits and isinstance(number, Const) and math.copysign(1, number.value) > 0 and not math.isnan(number.value)
    if not plain:
        hint = "literals are finite or inf, integers below 2^63; a negative one is neg of another"
        raise VerifyError(f"{value!r} is no literal of the language", hint=hint, loc=e.loc or where)


def _unknown(c: Cascade | None, tensor: str, known: Mapping[str, int], loc: Loc | None) -> VerifyError:
    if c is not None and tensor in c.einsum_of:
        hint = "move the statement that writes it before this one; only a scan reads its own earlier entries"
        return VerifyError(f"`{tensor}` is read before it is written", hint=hint, loc=loc)
    hint = did_you_mean(tensor, known) or "a tensor is a parameter or stands on the left of a statement before"
    return VerifyError(f"no tensor is called `{tensor}`", hint=hint, loc=loc)


def _miscounted(c: Cascade | None, tensor: str, ranks: int, came: int, loc: Loc | None) -> VerifyError:
    if not ranks:
        hint = f"write {tensor}, without brackets"
        return VerifyError(f"`{tensor}` is a scalar and has no indices", hint=hint, loc=loc)
    has, indices = "1 rank" if ranks == 1 else f"{ranks} ranks", "1 index" if came == 1 else f"{came} indices"
    hint = f"write {_spelled(c, tensor) if c is not None else tensor}, with an index for each rank"
    return VerifyError(f"`{tensor}` has {has}; {indices} came", hint=hint, loc=loc)


def _spelled(c: Cascade, tensor: str) -> str:
    indices = c.indices_of(tensor)
    return tensor + (f"[{', '.join(print_expr(i) for i in indices)}]" if indices else "")


def _bound(c: Cascade, expr: Expr, ranks: Iterable[str], e: Einsum) -> None:
    """Every rank whose coordinate is used is an output's or reduced; scopes stay within what arrays can hold."""
    outer = frozenset(ranks)
    stack: list[tuple[Expr, frozenset[str], int, bool]] = [(expr, outer, len(outer), False)]
    while stack:
        node, scope, depth, index = stack.pop()
        if isinstance(node, Rank):
            if node.name not in scope:
                raise _loose(c, node.name, node.loc or e.loc, e, index)
            continue
        if isinstance(node, Reduce):
            scope, depth = scope | set(node.ranks), depth + len(node.ranks)
            if depth > MAX_RANKS:
                hint = "name an inner reduction as an Einsum of its own"
                raise VerifyError(
                    f"an iteration space of more than {MAX_RANKS} ranks", hint=hint, loc=node.loc or e.loc
                )
        index = index or isinstance(node, Access)
        stack.extend([(k, scope, depth, index) for k in children(node)])


def _loose(c: Cascade, rank: str, loc: Loc | None, e: Einsum, index: bool) -> VerifyError:
    elsewhere = {r for i in c.einsums if i is not e for r in (*i.ranks, *ranks_named(i.expr))}
    known = elsewhere.union(*(ranks_named(i) for p in c.params for i in p.indices))
    left = ", ".join([*e.output.ranks, rank])
    hint = f"reduce it, as in sum[{rank}](…), or write {e.name}[{left}] on the left; a scalar is a parameter"
    if rank in known and not index:
        hint = f"its size is extent({rank}); for its coordinate reduce it, or write {e.name}[{left}] on the left"
    if rank not in known and (close := did_you_mean(rank, [*c.param_of, *c.einsum_of]) or did_you_mean(rank, known)):
        # Most likely a slip of the pen, so the rule that made a rank of it is told.
        hint = f"{close} A name that is no tensor's is a rank's"
    return VerifyError(f"rank `{rank}` is neither on the left nor reduced", rank=rank, hint=hint, loc=loc)


def _state(c: Cascade, e: Einsum) -> None:
    """A monoid's Einsum: each component may depend only on ranks that its output has."""
    if not isinstance(e.expr, Reduce) or e.expr.op not in c.monoid_of:
        hint = "define one under @monoid, then write (A[q], B[q]) = name[k](…)"
        raise VerifyError("several names on the left need a monoid on the right", hint=hint, loc=e.loc)
    reduce, m = e.expr, c.monoid_of[e.expr.op]
    if len(e.outputs) != m.width or len(reduce.args) != m.width:
        what = f"{len(e.outputs)} on the left and {len(reduce.args)} on the right"
        hint = "each component of the state has a name on the left and a value on the right"
        message = f"the state of `{m.name}` has {m.width} components; there are {what}"
        raise VerifyError(message, hint=hint, loc=e.loc)
    for o, needed in zip(e.outputs, component_dependence(m), strict=True):
        for i in sorted(needed):
            _bound(c, reduce.args[i], (*o.ranks, *reduce.ranks), e)


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
    loc = reads[0].loc or e.loc
    if len(e.outputs) > 1:
        hint = "a scan is one tensor: H[t] = where(t > 0, H[t - 1], 0) + x[t]"
        raise VerifyError("a monoid's Einsum cannot read itself", hint=hint, loc=loc)
    ranks = e.output.ranks
    steps = [
        {s for axis, index in enumerate(read.indices) if (s := _step(index, ranks[axis], axis)) is not None}
        for read in reads
    ]
    found = set.intersection(*steps)
    if not found:
        earlier = f"a scan reads {e.name}[{ranks[0]} - 1] (or + 1, backwards)" if ranks else "a scan has a rank"
        each = "at an earlier entry of one of its ranks"
        raise VerifyError(
            f"`{e.name}` reads itself, but not {'always the same way' if all(steps) else each}",
            hint=f"{earlier}, the same in every access to itself",
            loc=loc,
        )
    scan = min(found, key=lambda s: s.axis)
    inner = {r for n in walk(e.expr) if isinstance(n, Reduce) for r in n.ranks}
    if scan.rank in inner:
        hint = "give the reduction a rank of its own"
        message = f"rank `{scan.rank}` is both scanned and reduced in `{e.name}`"
        raise VerifyError(message, rank=scan.rank, hint=hint, loc=e.loc)
    return scan


def _step(index: Expr, rank: str, axis: int) -> Scan | None:
    match index:
        case Call(op="sub", args=(Rank(name=name), Const(value=int() as by, kind="int"))) if name == rank and by > 0:
            return Scan(rank, axis, 1)
        case (
            Call(op="add", args=(Rank(name=name), Const(value=int() as by, kind="int")))
            | Call(op="add", args=(Const(value=int() as by, kind="int"), Rank(name=name)))
        ) if name == rank and by > 0:
            return Scan(rank, axis, -1)
        case _:
            return None


def reduced_ranks(exprs: Iterable[Expr]) -> frozenset[str]:
    """Every rank that a reduction binds anywhere in the expressions."""
    return frozenset(r for e in exprs for n in walk(e) if isinstance(n, Reduce) for r in n.ranks)
