"""Types of expressions: which dtype each node has, and in which type its arithmetic is done.

Floats narrower than f32 compute in f32, integers narrower than 32 bits in i32. A literal takes the type of what it
meets: ``W & 15`` stays u32, ``x * 2`` stays f32. Ranks and extents are i64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .cascade import (
    Access,
    Call,
    Cascade,
    Cast,
    Const,
    Einsum,
    Expr,
    Extent,
    Monoid,
    Rank,
    Reduce,
    literal_value,
    tensors_read,
)
from .dtypes import DTYPES
from .errors import VerifyError
from .ops import OPS, REDUCTIONS

# The types of literals before they meet anything, and of a scan's own entries before its type is known.
WEAK_INT, WEAK_FLOAT, UNKNOWN = "integer literal", "float literal", "unknown"


def settle(dtype: str) -> str:
    """The dtype of a value that met nothing: i64 for an integer literal, f32 for a float literal."""
    return {WEAK_INT: "i64", WEAK_FLOAT: "f32", UNKNOWN: "f32"}.get(dtype, dtype)


def is_float(dtype: str) -> bool:
    return dtype == WEAK_FLOAT or (dtype in DTYPES and DTYPES[dtype].is_float)


def compute_type(dtype: str) -> str:
    """The type in which arithmetic on a value is done."""
    if dtype in (WEAK_INT, WEAK_FLOAT, UNKNOWN):
        return dtype
    return "i32" if dtype == "bool" else DTYPES[dtype].compute


def join(a: str, b: str) -> str:
    """The type of arithmetic between two: f64 over f32 over integers; u32 with a signed type gives i64."""
    if {a, b} <= {"bool", UNKNOWN}:
        return b if a == UNKNOWN else a
    a, b = compute_type(a), compute_type(b)
    if a == b or b == UNKNOWN:
        return a
    if a == UNKNOWN:
        return b
    kinds = {a, b}
    if is_float(a) or is_float(b):
        if "f64" in kinds:
            return "f64"
        return WEAK_FLOAT if kinds <= {WEAK_INT, WEAK_FLOAT} else "f32"
    if WEAK_INT in kinds:
        return (kinds - {WEAK_INT}).pop()
    return "i64"


Env = Mapping[str, str]


class TypeChecker:
    """Infers the type of every expression of a cascade; raises `VerifyError` at the node that does not fit."""

    def __init__(self, tensors: Env, monoids: Mapping[str, Monoid]) -> None:
        self.tensors = tensors
        self.monoids = monoids
        # By identity, as hashing a tree costs as much as typing it; the node is kept, so its identity stays its own.
        self._known: dict[int, tuple[Expr, str]] = {}

    def infer(self, e: Expr) -> str:
        """The dtype of a node; literals keep their weak types."""
        found = self._known.get(id(e))
        if found is None:
            found = self._known[id(e)] = (e, self._infer(e))
        return found[1]

    def forget(self) -> None:
        """Infer afresh: the type of a tensor has changed."""
        self._known.clear()

    def _infer(self, e: Expr) -> str:
        match e:
            case Const(kind=kind):
                return {"int": WEAK_INT, "float": WEAK_FLOAT, "bool": "bool"}[kind]
            case Rank() | Extent():
                return "i64"
            case Access(tensor=tensor, indices=indices):
                for index in indices:
                    self._index(index, tensor)
                return self.tensors[tensor]
            case Cast(dtype=dtype, arg=arg):
                self.infer(arg)
                return dtype
            case Reduce():
                return self._reduce(e)
            case Call():
                return self._call(e)

    def _index(self, index: Expr, tensor: str) -> None:
        dtype = self.infer(index)
        if is_float(dtype) or dtype == "bool":
            raise VerifyError(
                f"an index of `{tensor}` is {settle(dtype)}, not an integer",
                hint="indices are integers: ranks, their sums and multiples, `//`, `%`, or an integer tensor's element",
                loc=index.loc,
            )

    def _call(self, e: Call) -> str:
        op = OPS[e.op]
        types = [self.infer(a) for a in e.args]
        match op.rule:
            case "select":
                if types[0] not in ("bool", UNKNOWN):
                    raise VerifyError(
                        f"the condition of `where` is {settle(types[0])}, not bool",
                        hint="write a comparison, such as `x != 0`",
                        loc=e.args[0].loc,
                    )
                return join(types[1], types[2])
            case "compare":
                return "bool"
            case "logic":
                if any(is_float(t) for t in types):
                    raise VerifyError(
                        f"`{op.symbol}` takes bools or integers, not floats",
                        hint="comparisons joined by `&` or `|` need parentheses: (a < b) & (c < d)",
                        loc=e.loc,
                    )
                return join(types[0], types[-1])
            case "integer":
                if any(is_float(t) for t in types):
                    raise VerifyError(
                        f"`{op.symbol}` takes integers, not floats",
                        hint="a power of two times x is x * 2 ** 3; to shift its bits, cast: i32(x)",
                        loc=e.loc,
                    )
                return join(compute_type(types[0]), compute_type(types[1]))
            case "power":
                return self._power(e, types[0])
            case "divide" | "real":
                joined = join(types[0], types[-1]) if op.arity == 2 else compute_type(types[0])
                return "f64" if joined == "f64" else "f32"
            case "same":
                return compute_type(types[0])
            case _:
                joined = types[0] if op.arity == 1 else join(types[0], types[1])
                return compute_type(joined)

    def _power(self, e: Call, base: str) -> str:
        exponent = literal_value(e.args[1])
        if not isinstance(exponent, int) or isinstance(exponent, bool) or abs(exponent) > 64:
            raise VerifyError(
                "the exponent of `**` must be an integer literal between -64 and 64",
                hint="write sqrt(x) for x ** 0.5 and exp(y * log(x)) for x ** y",
                loc=e.args[1].loc or e.loc,
            )
        base = compute_type(base)
        if exponent < 0 and not is_float(base):
            raise VerifyError("an integer has no negative power", hint="write f32(x) ** -1", loc=e.loc)
        return base

    def _reduce(self, e: Reduce) -> str:
        if e.op in self.monoids:
            types = self.state_types(e)
            if len(types) != 1:
                raise VerifyError(
                    f"`{e.op}` gives {len(types)} values and cannot stand inside an expression",
                    hint="write a statement of its own: (A[…], B[…]) = " + e.op + "[…](…)",
                    loc=e.loc,
                )
            return types[0]
        dtype = self.infer(e.arg)
        match REDUCTIONS[e.op].rule:
            case "argmax":
                if len(e.ranks) != 1:
                    raise VerifyError(
                        "argmax goes over one rank: its result is that rank's coordinate",
                        hint="make one rank of the two, as in X[k // 8, k % 8]",
                        loc=e.loc,
                    )
                return "i64"
            case "logic":
                if dtype not in ("bool", UNKNOWN):
                    raise VerifyError(
                        f"`{e.op}` reduces bools, not {settle(dtype)}",
                        hint="write a comparison inside it",
                        loc=e.arg.loc,
                    )
                return "bool"
            case _:
                computed = compute_type(dtype)
                return computed if computed == UNKNOWN else settle(computed)

    def state_types(self, e: Reduce) -> tuple[str, ...]:
        """The types of a monoid's state, for one use of it."""
        monoid = self.monoids[e.op]
        if len(e.args) != monoid.width:
            raise VerifyError(
                f"`{e.op}` takes {monoid.width} values; {len(e.args)} came",
                hint="one for each component of its state",
                loc=e.loc,
            )
        pairs = zip(e.args, monoid.identity, strict=True)
        state = tuple(settle(join(self.infer(a), self.infer(i))) for a, i in pairs)
        while True:
            scalars = body_types(monoid, state)
            # Types only grow, towards f64, so this ends.
            new = tuple(settle(join(s, scalars[r])) for s, r in zip(state, monoid.results, strict=True))
            if new == state:
                return state
            state = new


def body_types(monoid: Monoid, state: tuple[str, ...]) -> dict[str, str]:
    """The dtype of every value of a monoid's body, for a state of the given dtypes."""
    scalars = dict(zip(monoid.params, state + state, strict=True))
    checker = TypeChecker(scalars, {})
    for name, value in monoid.body:
        scalars[name] = settle(checker.infer(value))
    return scalars


def tensor_types(c: Cascade) -> dict[str, str]:
    """The dtype of every tensor of the cascade: declared, or inferred from its expression."""
    types = {p.name: p.dtype for p in c.params}
    checker = TypeChecker(types, c.monoid_of)
    for e in c.einsums:
        types.update(_output_types(e, types, checker))
    return types


def _output_types(e: Einsum, types: dict[str, str], checker: TypeChecker) -> dict[str, str]:
    """The dtypes of an Einsum's outputs. A scan's is the least that holds the expression over its own entries."""
    if isinstance(e.expr, Reduce) and e.expr.op in checker.monoids:
        inferred = checker.state_types(e.expr)
        if len(inferred) != len(e.outputs):
            what = f"`{e.expr.op}` gives {len(inferred)} values; {len(e.outputs)} names stand on the left"
            raise VerifyError(what, hint="name each component of the state, as in (M[q], L[q]) = …", loc=e.loc)
        return {o.name: o.dtype or t for o, t in zip(e.outputs, inferred, strict=True)}
    if len(e.outputs) != 1:
        raise VerifyError("only a monoid of the cascade gives several values", hint="write two statements", loc=e.loc)
    name, declared = e.name, e.output.dtype
    types[name] = declared or UNKNOWN
    found = settle(checker.infer(e.expr))
    if declared is None and name in tensors_read(e.expr):
        while True:
            types[name] = found
            checker.forget()
            again = settle(checker.infer(e.expr))
            if found in (again, settle(join(found, again))):
                break
            found = settle(join(found, again))
    return {name: declared or found}


def fits(number: float | int, dtype: str) -> bool:
    """Whether a type holds a number: an integer type in its range, a float type any integer below 2^24."""
    row = DTYPES[dtype]
    return row.lowest <= number <= row.highest if row.is_integer else row.is_float and abs(number) < 1 << 24


def computed_in(e: Call, dtype: str, types: Sequence[str]) -> str:
    """The type in which an operation is computed: its own, but for comparisons and what would lose an operand."""
    rule = OPS[e.op].rule
    if rule == "compare":
        joined = settle(join(types[0], types[1]))
        # An integer of 32 bits or more is no f32, so a mixed comparison is made in f64.
        mixed = is_float(types[0]) != is_float(types[1])
        if mixed and any(not is_float(t) and t in DTYPES and DTYPES[t].bits >= 32 for t in types):
            return "f64"
        dtype = joined
    if rule == "divide" and not any(is_float(t) for t in types):
        return "f64"
    if rule in ("compare", "arith", "integer", "logic") and DTYPES[dtype].is_integer and dtype != "i64":
        literals = [literal_value(a) for a, t in zip(e.args, types, strict=True) if t == WEAK_INT]
        if any(n is not None and not fits(n, dtype) for n in literals):
            return "i64"
    return dtype
