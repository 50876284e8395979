"""The cascade IR: a program as a DAG of Einsums, in frozen values with structural equality.

Words follow TeAAL and EDGE (arXiv 2404.11591): a *rank* is a named axis, an *Einsum* maps over an iteration space and
reduces some of its ranks, a *cascade* is a sequence of Einsums. Expressions and indices share one set of nodes. Source
locations ride along for error messages and take no part in equality.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from .errors import Loc, Source


def _loc() -> Loc | None:
    return field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Const:
    """A literal, never negative, as in Python's grammar (`-1` is `neg` of 1); ``kind`` keeps 1, 1.0 and True apart."""

    value: int | float | bool
    loc: Loc | None = _loc()
    kind: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", type(self.value).__name__)


@dataclass(frozen=True, slots=True)
class Rank:
    """A rank used as a value: its coordinate, an i64."""

    name: str
    loc: Loc | None = _loc()


@dataclass(frozen=True, slots=True)
class Extent:
    """``extent(k)``: the size of a rank, an i64."""

    rank: str
    loc: Loc | None = _loc()


@dataclass(frozen=True, slots=True)
class Access:
    """``T[i, j]``: one element of a tensor; a scalar has no indices."""

    tensor: str
    indices: tuple[Expr, ...] = ()
    loc: Loc | None = _loc()


@dataclass(frozen=True, slots=True)
class Call:
    """A scalar operation of the op table (`ops.OPS`)."""

    op: str
    args: tuple[Expr, ...]
    loc: Loc | None = _loc()


@dataclass(frozen=True, slots=True)
class Cast:
    """``bf16(x)``: conversion to a type, a rounding point where the type is narrower than f32."""

    dtype: str
    arg: Expr
    loc: Loc | None = _loc()


@dataclass(frozen=True, slots=True)
class Reduce:
    """``op[k, j](args)``: a reduction over ranks that it binds. ``op`` is built in (one arg) or a monoid."""

    op: str
    ranks: tuple[str, ...]
    args: tuple[Expr, ...]
    loc: Loc | None = _loc()

    @property
    def arg(self) -> Expr:
        return self.args[0]


NUMERICS = ("standard", "strict", "fast")

# Levels of an expression, so that recursion over one is safe; the text and the verifier keep to it alike.
MAX_DEPTH = 100

Expr = Const | Rank | Extent | Access | Call | Cast | Reduce


@dataclass(frozen=True, slots=True)
class Param:
    """An input tensor. An index that is a bare rank binds the rank's extent; any other is checked against it."""

    name: str
    dtype: str
    indices: tuple[Expr, ...] = ()
    loc: Loc | None = _loc()


@dataclass(frozen=True, slots=True)
class Output:
    """What an Einsum writes: a tensor over distinct ranks; dtype None means the type inferred from the expression."""

    name: str
    ranks: tuple[str, ...] = ()
    dtype: str | None = None
    loc: Loc | None = _loc()


@dataclass(frozen=True, slots=True)
class Einsum:
    """``T[ranks]: dtype = expr``; with a monoid of several components, ``(A[r], B[r]) = op[k](…)``."""

    outputs: tuple[Output, ...]
    expr: Expr
    loc: Loc | None = _loc()

    @property
    def output(self) -> Output:
        return self.outputs[0]

    @property
    def name(self) -> str:
        return self.outputs[0].name

    @property
    def reductions(self) -> tuple[Reduce, ...]:
        """Every reduction of the expression, outermost first."""
        return tuple(e for e in walk(self.expr) if isinstance(e, Reduce))

    @property
    def ranks(self) -> tuple[str, ...]:
        """The ranks that the outputs iterate, in order of first appearance."""
        return tuple(dict.fromkeys(r for o in self.outputs for r in o.ranks))


@dataclass(frozen=True, slots=True)
class Monoid:
    """A user's reduction over a tuple state: identity, and how a state takes in an element (or another state).

    The first half of ``params`` names the accumulated state, the second half the new element; ``body`` assigns scalars
    in order, and ``results`` names the new state. The laws (associativity, identity) are the writer's promise, which
    `castile verify` tests.
    """

    name: str
    identity: tuple[Expr, ...]
    params: tuple[str, ...]
    results: tuple[str, ...]
    body: tuple[tuple[str, Expr], ...]
    loc: Loc | None = _loc()

    @property
    def width(self) -> int:
        return len(self.identity)


@dataclass(frozen=True)
class Cascade:
    """A program: parameters, Einsums in order of dependence, outputs by name.

    ``str(c)`` is the text form, which parses back to an equal cascade.
    """

    name: str
    params: tuple[Param, ...]
    einsums: tuple[Einsum, ...]
    outputs: tuple[str, ...]
    monoids: tuple[Monoid, ...] = ()
    numerics: str = "standard"
    doc: str = field(default="", compare=False, repr=False)
    # Where the text stands, for errors. What a pass makes of a cascade comes from no text, so `replace` drops it.
    source: Source | None = field(default=None, init=False, compare=False, repr=False)

    def __str__(self) -> str:
        from .print import print_cascade

        return print_cascade(self)

    @cached_property
    def key(self) -> str:
        """Content key, 64 hex digits: stable across processes, unchanged by renaming ranks, tensors or monoids."""
        from .key import content_key

        return content_key(self)

    @cached_property
    def einsum_of(self) -> Mapping[str, Einsum]:
        """Which Einsum writes a tensor."""
        return {o.name: e for e in self.einsums for o in e.outputs}

    @cached_property
    def param_of(self) -> Mapping[str, Param]:
        return {p.name: p for p in self.params}

    @cached_property
    def monoid_of(self) -> Mapping[str, Monoid]:
        return {m.name: m for m in self.monoids}

    @cached_property
    def ranks(self) -> tuple[str, ...]:
        """Every rank's name, in order of first appearance."""
        seen: dict[str, None] = {}
        for p in self.params:
            for index in p.indices:
                seen.update(dict.fromkeys(ranks_named(index)))
        for e in self.einsums:
            seen.update(dict.fromkeys(e.ranks))
            seen.update(dict.fromkeys(ranks_named(e.expr)))
        return tuple(seen)

    def indices_of(self, tensor: str) -> tuple[Expr, ...]:
        """The declared indices of a parameter, or the ranks of an Einsum's output."""
        return self._indices[tensor]

    @cached_property
    def _indices(self) -> Mapping[str, tuple[Expr, ...]]:
        written = {o.name: tuple(map(Rank, o.ranks)) for e in self.einsums for o in e.outputs}
        return {**written, **{p.name: p.indices for p in self.params}}


def children(e: Expr) -> tuple[Expr, ...]:
    """The sub-expressions one level down; an access's indices count."""
    match e:
        case Call(args=args) | Reduce(args=args):
            return args
        case Access(indices=indices):
            return indices
        case Cast(arg=arg):
            return (arg,)
        case _:
            return ()


def walk(e: Expr) -> Iterator[Expr]:
    """Every node, parents before children, left to right; iterative, so depth is no danger."""
    stack = [e]
    while stack:
        node = stack.pop()
        yield node
        stack.extend(reversed(children(node)))


def rebuild(e: Expr, new: tuple[Expr, ...]) -> Expr:
    """The same node over other children."""
    match e:
        case Call():
            return replace(e, args=new)
        case Reduce():
            return replace(e, args=new)
        case Access():
            return replace(e, indices=new)
        case Cast():
            return replace(e, arg=new[0])
        case _:
            return e


def transform(e: Expr, f: Callable[[Expr], Expr]) -> Expr:
    """Rebuild bottom up, giving each rebuilt node to ``f``."""
    kids = children(e)
    if kids:
        new = tuple(transform(k, f) for k in kids)
        if any(a is not b for a, b in zip(new, kids, strict=True)):
            e = rebuild(e, new)
    return f(e)


def ranks_named(e: Expr) -> tuple[str, ...]:
    """Every rank that the expression mentions, bound or free, in order of appearance."""
    seen: dict[str, None] = {}
    for node in walk(e):
        match node:
            case Rank(name=name) | Extent(rank=name):
                seen[name] = None
            case Reduce(ranks=ranks):
                seen.update(dict.fromkeys(ranks))
    return tuple(seen)


def first_mention(c: Cascade, rank: str) -> Loc | None:
    """Where the text first names a rank; None for a cascade that did not come from a text."""
    for p in c.params:
        for index in p.indices:
            if rank in ranks_named(index):
                return index.loc or p.loc
    for e in c.einsums:
        for o in e.outputs:
            if rank in o.ranks:
                return o.loc or e.loc
        for node in walk(e.expr):
            match node:
                case Rank(name=name) | Extent(rank=name) if name == rank:
                    return node.loc or e.loc
                case Reduce(ranks=ranks) if rank in ranks:
                    return node.loc or e.loc
                case _:
                    pass
    return None


def free_ranks(e: Expr) -> frozenset[str]:
    """The ranks whose coordinate the value depends on; those bound by a reduction inside do not count."""
    match e:
        case Rank(name=name):
            return frozenset((name,))
        case Reduce(ranks=ranks, args=args):
            return frozenset().union(*map(free_ranks, args)) - frozenset(ranks)
        case _:
            return frozenset().union(*map(free_ranks, children(e)))


def tensors_read(e: Expr) -> tuple[str, ...]:
    """The tensors that the expression accesses, in order of first appearance."""
    return tuple(dict.fromkeys(n.tensor for n in walk(e) if isinstance(n, Access)))


def live_einsums(einsums: Sequence[Einsum], outputs: Iterable[str]) -> tuple[Einsum, ...]:
    """The Einsums that some outputs depend on, in order."""
    wanted, found = set(outputs), []
    for e in reversed(einsums):
        if wanted & {o.name for o in e.outputs}:
            wanted |= set(tensors_read(e.expr))
            found.append(e)
    return tuple(reversed(found))


def substitute(e: Expr, ranks: Mapping[str, Expr]) -> Expr:
    """Replace free ranks by expressions; a reduction's own ranks shadow. The caller avoids capture."""
    match e:
        case Rank(name=name):
            return ranks.get(name, e)
        case Reduce(ranks=bound):
            inner = {k: v for k, v in ranks.items() if k not in bound}
            return rebuild(e, tuple(substitute(a, inner) for a in e.args)) if inner else e
        case _:
            kids = children(e)
            return rebuild(e, tuple(substitute(k, ranks) for k in kids)) if kids else e


def negative(value: int | float) -> Expr:
    """The literal of a number of either sign."""
    return Call("neg", (Const(-value),)) if value < 0 else Const(value)


def is_minus_infinity(e: Expr) -> bool:
    """Whether the expression is the literal ``-inf``, which marks what a mask leaves out."""
    return isinstance(e, Call) and e.op == "neg" and e.args[0] == Const(float("inf"))


def literal_value(e: Expr) -> int | float | bool | None:
    """The number that a literal, perhaps negated, stands for; None for anything else."""
    if isinstance(e, Const):
        return e.value
    if isinstance(e, Call) and e.op == "neg" and isinstance(e.args[0], Const):
        return -e.args[0].value
    return None
