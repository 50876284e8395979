"""A cascade cut along a rank: what each piece computes, which reductions its state holds, and what follows them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..ir.cascade import (
    Access,
    Call,
    Const,
    Einsum,
    Expr,
    Monoid,
    Output,
    Rank,
    Reduce,
    children,
    free_ranks,
    ranks_named,
    rebuild,
    tensors_read,
    walk,
)
from ..ir.errors import VerifyError
from ..ir.extents import bindings
from ..ir.interval import is_affine
from ..ir.print import print_expr
from ..ir.types import TypeChecker, is_float, tensor_types
from ..ir.verify import scan_step
from .count import needed
from .derive import Derivation
from .fresh import fresh

# The index in the state of an argmax over nothing.
NOWHERE = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class State:
    """One reduction over the split rank: how a piece computes it; merging reduces ``outputs`` again by ``op``."""

    outputs: tuple[Output, ...]
    expr: Expr
    op: str


class Sorter:
    """Sorts a derived cascade into what each piece computes, what pieces leave, and what follows when they are merged.

    A tensor is *early* if a piece can compute it, and *late* if it needs all pieces.
    """

    def __init__(self, derivation: Derivation, rank: str) -> None:
        self.derivation = derivation
        self.c = derivation.cascade
        self.rank = rank
        self.types = tensor_types(self.c)
        self.bindings = {b.rank: b for b in bindings(self.c)}
        self.taken = {*self.types, *self.c.ranks, *self.c.monoid_of}
        self.early: list[Einsum] = []
        self.late: list[Einsum] = []
        self.states: dict[str, State] = {}
        self.late_names: set[str] = set()
        self.monoids = list(self.c.monoids)
        self.user = {m.name for m in self.c.monoids} - {s.monoid.name for s in derivation.streams if s.monoid}
        self.piece = fresh("piece", self.taken)
        self.start = fresh(f"{rank}_start", self.taken)
        self.extent = fresh(f"{rank}_extent", self.taken)
        self.extents: dict[str, str] = {}
        self.align = 1
        self.split_axes = {
            p.name: tuple(a for a, i in enumerate(p.indices) if rank in ranks_named(i)) for p in self.c.params
        }

    # Sorting

    def sort(self) -> None:
        self._check_rank()
        live = needed(self.c)
        for e in self.c.einsums:
            if any(o.name in live for o in e.outputs):
                self._einsum(e)
        if not self.states:
            hint = "the ranks that are reduced here are " + (", ".join(self.derivation.passes) or "none")
            raise self.refusal(f"nothing is reduced over rank `{self.rank}`", hint)

    def _check_rank(self) -> None:
        binding = self.bindings.get(self.rank)
        if binding is None:
            hint = "the ranks that are reduced here are " + (", ".join(self.derivation.passes) or "none")
            raise self.refusal(f"nothing is reduced over rank `{self.rank}`", hint)
        if binding.param is None:
            use = binding.within[0]
            message = f"rank `{self.rank}` is no axis that could be cut: `{use.tensor}` is read at"
            raise self.refusal(
                f"{message} `{print_expr(use.index)}`", f"let a parameter have the axis `{self.rank}`, bare"
            )
        for name in self.c.outputs:
            if self.rank in next(o.ranks for o in self.c.einsum_of[name].outputs if o.name == name):
                hint = f"leave `{name}` out of the results; a piece can compute it once the others are merged"
                raise self.refusal(f"the result `{name}` runs along rank `{self.rank}` itself", hint, name)

    def _einsum(self, e: Einsum) -> None:
        scan = scan_step(e)
        if scan is not None and scan.rank == self.rank:
            hint = "a scan's state is no monoid that the algebra knows; write it as a monoid of its own"
            raise self.refusal(f"`{e.name}` is a scan along rank `{self.rank}`", hint, e.name)
        if isinstance(e.expr, Reduce) and self.rank in e.expr.ranks and self._is_state(e):
            if e.expr.op == "argmax":
                self._add_argmax(e.output, e.expr, e)
            else:
                self._add(e.outputs, e.expr, e)
            return
        expr = self._lifted(e.expr, e, False)
        late = any(t in self.late_names for t in tensors_read(expr))
        if late and self.rank in e.ranks:
            read = next(t for t in tensors_read(expr) if t in self.late_names)
            raise self._second_pass(e, read)
        e = replace(e, expr=expr)
        if late:
            self.late_names.update(o.name for o in e.outputs)
        else:
            self.early.append(e)
        if self.rank not in e.ranks:
            self.late.append(e)

    def _is_state(self, e: Einsum) -> bool:
        """Whether an Einsum is a reduction and no more, so that its tensors can be the state under their own names."""
        if self.rank in e.ranks:
            return False
        return len(e.outputs) > 1 or e.output.dtype is None

    def _lifted(self, x: Expr, e: Einsum, guarded: bool) -> Expr:
        """The expression with every reduction over the rank, and every place of it that is looked up, as a state."""
        if isinstance(x, Reduce) and self.rank in x.ranks:
            if self.rank in e.ranks:
                raise self._second_pass(e, print_expr(x))
            if guarded and any(_is_shifted(n) for n in walk(x)):
                hint = "let the condition stand inside the reduction"
                raise self.refusal(f"`{print_expr(x)}` is reduced only where a condition holds", hint, e.name)
            return self._state_of(x, e)
        if isinstance(x, Access) and self.split_axes.get(x.tensor) and self.rank not in e.ranks:
            if guarded and any(map(_is_shifted, children(x))):
                hint = "look up an index that is in bounds everywhere"
                raise self.refusal(f"`{print_expr(x)}` is looked up only where a condition holds", hint, e.name)
            return self._looked_up(x, e)
        if isinstance(x, Call) and x.op == "where":
            return rebuild(x, tuple(self._lifted(a, e, guarded or i > 0) for i, a in enumerate(x.args)))
        return rebuild(x, tuple(self._lifted(k, e, guarded) for k in children(x)))

    def _state_of(self, x: Reduce, e: Einsum) -> Expr:
        free = free_ranks(x)
        output = Output(fresh(f"{e.name}_state", self.taken), tuple(r for r in self.c.ranks if r in free))
        if x.op == "argmax":
            self._add_argmax(output, x, e)
        else:
            self._add((output,), x, e)
        return Access(output.name, tuple(map(Rank, output.ranks)))

    def _add_argmax(self, output: Output, x: Reduce, e: Einsum) -> None:
        """The greatest value and where it came first, as a pair; of equal values, and of NaNs, the first counts."""
        checker = TypeChecker(self.types, self.c.monoid_of)
        least: Expr = Call("neg", (Const(float("inf")),)) if is_float(checker.infer(x.arg)) else Const(0)
        monoid = _first_of(fresh("first", self.taken), least)
        self.monoids.append(monoid)
        outputs = (Output(fresh(f"{output.name}_best", self.taken), output.ranks), output)
        self._add(outputs, Reduce(monoid.name, x.ranks, (x.arg, Rank(self.rank))), e)

    def _looked_up(self, x: Access, e: Einsum) -> Expr:
        """One place of the split rank, found by data: the piece that holds it gives its value, the others nothing."""
        axes = self.split_axes[x.tensor]
        index = x.indices[axes[0]]
        bare = self.c.param_of[x.tensor].indices[axes[0]] == Rank(self.rank)
        if len(axes) > 1 or not bare or (is_affine(index) and not isinstance(index, Const)):
            names = ", ".join(f"`{r}`" for r in ranks_named(index)) or "another"
            message = f"`{print_expr(x)}` reads rank `{self.rank}` of `{x.tensor}` under rank {names}"
            raise self.refusal(message, "no piece holds all that it reads", e.name)
        inner = tuple(Rank(self.rank) if a == axes[0] else i for a, i in enumerate(x.indices))
        value = Access(x.tensor, inner)
        found = Call("eq", (Rank(self.rank), index))
        logical = self.types[x.tensor] == "bool"
        body = Call("and", (found, value)) if logical else Call("where", (found, value, Const(0)))
        return self._state_of(Reduce("any" if logical else "sum", (self.rank,), (body,)), e)

    def _add(self, outputs: tuple[Output, ...], x: Reduce, e: Einsum) -> None:
        for arg in x.args:
            for node in walk(arg):
                if isinstance(node, Access) and node.tensor in self.late_names:
                    raise self._second_pass(e, node.tensor)
                if isinstance(node, Reduce) and self.rank in node.ranks:
                    raise self._second_pass(e, print_expr(node))
                if isinstance(node, Access) and node.tensor in (o.name for o in e.outputs):
                    hint = "each step waits for the last one's reduction"
                    raise self.refusal(
                        f"`{e.name}` is a scan that reduces rank `{self.rank}` in each step", hint, e.name
                    )
        self.states[outputs[0].name] = State(outputs, x, x.op)
        self.early.append(Einsum(outputs, x, e.loc))
        self.late_names.update(o.name for o in outputs)

    # Refusing

    def _second_pass(self, e: Einsum, read: str) -> VerifyError:
        message = f"a second pass over rank `{self.rank}` remains: `{e.name}` needs `{read}`, which needs every piece"
        found = [b for b in self.derivation.barriers if self.rank in b.ranks]
        hint = f"`{found[0].expression}` blocks: {found[0].reason}" if found else "split the cascade between the passes"
        return self.refusal(message, hint, e.name)

    def refusal(self, message: str, hint: str, einsum: str = "") -> VerifyError:
        return VerifyError(message, rank=self.rank, einsum=einsum, hint=hint)

    # Names

    def stack_name(self, state: str) -> str:
        name = f"{state}_pieces"
        while name in self.taken:
            name += "_"
        return name


def _first_of(name: str, least: Expr) -> Monoid:
    """The monoid of (value, index) whose merge keeps the greater value, then the lesser index; NaN is the greatest."""
    av, ai, bv, bi = (Access(n) for n in ("av", "ai", "bv", "bi"))

    def both(a: Expr, b: Expr) -> Expr:
        return Call("and", (a, b))

    def either(a: Expr, b: Expr) -> Expr:
        return Call("or", (a, b))

    a_nan, b_nan = Call("ne", (av, av)), Call("ne", (bv, bv))
    greater = either(Call("gt", (bv, av)), both(b_nan, Call("not", (a_nan,))))
    same = either(Call("eq", (bv, av)), both(b_nan, a_nan))
    better = both(Call("ne", (bi, Const(NOWHERE))), either(greater, both(same, Call("lt", (bi, ai)))))
    body = (
        ("second", either(Call("eq", (ai, Const(NOWHERE))), better)),
        ("v", Call("where", (Access("second"), bv, av))),
        ("i", Call("where", (Access("second"), bi, ai))),
    )
    return Monoid(name, (least, Const(NOWHERE)), ("av", "ai", "bv", "bi"), ("v", "i"), body)


def _is_shifted(x: Expr) -> bool:
    """Whether an access may lie outside its tensor."""
    return isinstance(x, Access) and any(not isinstance(i, Rank) for i in x.indices)
