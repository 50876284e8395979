"""Loads and stores: loop nests along a tensor's memory, checks of indices that are data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from math import gcd

from ..ir.cascade import Access, Call, Const, Expr, Rank, children, free_ranks, literal_value, rebuild, walk
from ..ir.interval import is_affine
from ..ir.tile import Load, Store
from .cpp_expr import Expressions, Value, converted, from_memory
from .cpp_scope import Axis, ctype
from .interface import checked_indices
from .vectors import ATOM, MUL, WIDEST, steps

# The types of `tile.h` that are structures around their bits.
NARROW = ("f16", "bf16", "f8e4m3", "f8e5m2")


class Memory(Expressions):
    """Prints loads and stores."""

    def _load(self, op: Load) -> None:
        if (part := self._evenly(op)) is not None:
            self._load_parts(op, *part)
            return
        axes = frozenset(op.tile.axes)
        param = self.params[op.source.tensor]
        order, unit = self._order(op.source, op.tile.axes)
        checks = checked_indices(op, param.indices)

        def body() -> None:
            name = self.names("tensor", param.name)
            text = f"{name}[{self._offset(op.source, axes, checks)}]"
            if not param.indices:
                text = f"*{name}" if param.name in self.k.outputs else name
            held = "bool" if param.dtype == "bool" and not param.indices else param.dtype
            loaded = Value(from_memory(param.dtype, text) if param.indices else text, ATOM, held)
            value = converted(loaded, op.tile.dtype)
            if op.guard is None and param.dtype == op.tile.dtype and param.indices and ctype(param.dtype) in NARROW:
                # Structures are not copied in vectors, their bits are.
                self.line(f"{self._element(op.tile.name)}.raw = {text}.raw;")
                return
            if op.guard is not None:
                other = self.literal(op.other, op.tile.dtype)
                value = f"{self.typed(op.guard, 'bool', axes, ATOM)} ? {value} : {other}"
            self.line(f"{self._element(op.tile.name)} = {value};")

        self._access(order, unit, op.source, body, bool(checks), True)

    def _evenly(self, op: Load) -> tuple[str, int] | None:
        """An axis along memory, and the part of its tile in which a tensor's index moves evenly where it does not in
        all of it: as that of W[n // 64, k, n % 64] does for 64 columns."""
        inner = self._along(op.source, op.tile.axes)
        size = self.aligned.get(inner, 1) if inner is not None else 1
        if inner is None or size != self.axes[inner].size:
            return None
        by = gcd(size, *divisors(op.source.indices, inner))
        within = replace(op.source, indices=tuple(in_part(i, inner, by) for i in op.source.indices))
        _, unit = self._order(op.source, op.tile.axes)
        good = unit is None and by % WIDEST == 0 and all(is_affine(i) for i in within.indices)
        return (inner, by) if good and by < size else None

    def _load_parts(self, op: Load, rank: str, size: int) -> None:
        """Load a tile part by part along an axis."""
        axis, place, aligned = self.axes[rank], self.places[op.tile.name], self.aligned[rank]
        at, base, count = (self.names("part" + x, rank, "{}" + x) for x in ("_at", "1", "_some"))
        some = self.names("part", op.tile.name, f"{place.name}_some")
        self.open(f"for (int64_t {at} = 0; {at} < {axis.count}; {at} += {size})")
        self.line(f"const int64_t {base} = {axis.base} + {at}, {count} = at_most({size}, {axis.count} - {at});")
        step = place.step(rank)
        self.line(f"{ctype(op.tile.dtype)}* const {some} = {place.name} + {at if step == '1' else f'{at} * {step}'};")
        self.axes[rank], self.aligned[rank] = Axis(size, base, count, axis.index), size
        self.places[op.tile.name] = replace(place, name=some)
        self._load(op)
        self.axes[rank], self.aligned[rank], self.places[op.tile.name] = axis, aligned, place
        self.close()

    def _store(self, op: Store) -> None:
        axes = frozenset(op.axes)
        param = self.params[op.target.tensor]
        order, unit = self._order(op.target, op.axes)
        checks = checked_indices(op, param.indices)
        moving = {r for r in op.axes if self.axes[r].size != 1}
        apart = all(is_affine(i) for i in op.target.indices)
        apart = apart and moving <= {r for i in op.target.indices if isinstance(i, Rank) for r in (i.name,)}

        inner = order[-1] if order and unit is not None and not checks and param.dtype in ("f32", "bf16") else None
        if inner is not None and self.axes[inner].in_vectors and self._side(op.target, inner) is not None:
            wide = self._vectors(op.expr, inner, axes)
            if wide is not None:
                text = self._stored(op, inner, wide.text if wide.wide else f"splat({wide.text})")
                self._nest(order[:-1], lambda: self._vector_loop(inner, [text]))
                return

        def body() -> None:
            name = self.names("tensor", param.name)
            at = f"{name}[{self._offset(op.target, axes, checks)}]" if param.indices else f"*{name}"
            self.line(f"{at} = {self.typed(op.expr, param.dtype, axes)};")

        self._access(order, unit, op.target, body, bool(checks), apart)

    def _stored(self, op: Store, inner: str, value: str) -> str:
        """The statement that puts a vector into a tensor."""
        param = self.params[op.target.tensor]
        side = self._side(op.target, inner)
        assert side is not None
        at = self._offset(op.target, frozenset(op.axes), frozenset())
        name, stride = self.names("tensor", param.name), self._stride(param.name, side)
        call = "stream" if op.through else "store"
        return f"{call}(&{name}[{at}], {stride}, {value}, {self._left(inner)});"

    def _loaded(self, op: Load, inner: str) -> str:
        """The text of a vector from a tensor."""
        param = self.params[op.source.tensor]
        side = self._side(op.source, inner)
        assert side is not None
        at = self._offset(op.source, frozenset((*op.tile.axes, inner)), frozenset())
        name, stride = self.names("tensor", param.name), self._stride(param.name, side)
        guard = self._guarded(op, inner)
        where = f", {guard}" if guard is not None else ""
        return f"load(&{name}[{at}], {stride}, {self._left(inner)}{where})"

    def _fetched(self, op: Load, inner: str, rank: str, at: Axis) -> str:
        """The statement that fetches a vector of a tensor's next tile: where ``at`` is the axis of ``rank``."""
        axis = self.axes[rank]
        self.axes[rank] = at
        offset = self._offset(op.source, frozenset((*op.tile.axes, inner)), frozenset())
        self.axes[rank] = axis
        return f"prefetch(&{self.names('tensor', op.source.tensor)}[{offset}]);"

    def _side(self, access: Access, inner: str) -> int | None:
        """The index of a tensor that moves by one with an axis, if no other moves: within a vector, at least."""
        indices = access.indices
        whole = inner in self.axes and self.aligned.get(inner) == self.axes[inner].size
        if whole and self.aligned[inner] % WIDEST == 0:
            indices = tuple(in_part(i, inner, WIDEST) for i in indices)
        moves = steps(indices, (inner,))
        return moves[inner][0] if moves is not None and moves[inner][1] == 1 else None

    def _access(
        self,
        order: Sequence[str],
        unit: int | None,
        access: Access,
        body: Callable[[], None],
        checks: bool,
        apart: bool,
    ) -> None:
        """The loops around a load or store; ``unit`` is the tensor's axis along which the innermost loop runs."""
        pragma = "#pragma omp simd" if apart else ""
        if checks:
            self.open("")
            self.line("bool outside = false;")
            pragma = pragma and pragma + " reduction(|:outside)"
        if unit is not None:
            stride = self._stride(access.tensor, unit)
            self.open(f"with_stride({stride}, [&](auto {stride})")
        self._nest(order, body, pragma)
        if unit is not None:
            self.close("});")
        if checks:
            number = 1 + list(self.params).index(access.tensor)
            self.line(f"if (outside) *fault = {number};")
            self.close()

    def _order(self, access: Access, axes: tuple[str, ...]) -> tuple[tuple[str, ...], int | None]:
        """The loops of a load or store, innermost last, and the tensor's axis that the innermost alone moves along."""
        for r in axes:
            # As it moves within a tile.
            if self.aligned.get(r, 1) > 1:
                access = replace(access, indices=tuple(in_part(i, r, self.aligned[r]) for i in access.indices))
        inner = self._along(access, axes)
        if inner is None:
            return axes, None
        along = [i for i, index in enumerate(access.indices) if inner in free_ranks(index)]
        order = (*(r for r in axes if r != inner), inner)
        whole = len(along) == 1 and is_affine(access.indices[along[0]])
        return order, along[0] if whole else None

    def _along(self, access: Access, axes: tuple[str, ...]) -> str | None:
        """The axis of a loop nest that moves along the tensor's last index; the nest's last one if none does."""
        moving = [r for r in axes if self.axes[r].size != 1]
        for index in reversed(access.indices):
            found = [r for r in moving if r in free_ranks(index)]
            if found and is_affine(index):
                return found[-1]
        return moving[-1] if moving else None

    def _offset(self, access: Access, axes: frozenset[str], checks: frozenset[int]) -> str:
        """The position of an element, in elements from the tensor's first."""
        terms = []
        for i, index in enumerate(access.indices):
            stride = self._stride(access.tensor, i)
            if literal_value(index) == 0:
                continue
            if i in checks:
                text = f"inside({self.typed(index, 'i64', axes)}, {self._size(access.tensor, i)}, outside)"
            else:
                text = self.typed(index, "i64", axes, MUL)
                if text == "int64_t(0)":
                    continue
            terms.append(f"{text} * {stride}")
        return " + ".join(terms) or "0"


def in_part(e: Expr, rank: str, size: int) -> Expr:
    """An index as it moves within so many coordinates from a multiple of them on: no quotient by a multiple changes.

    W[n // 64, k, n % 64]  →  W[0, k, n]
    """
    match e:
        case Call(op="floordiv" | "mod" as op, args=(Rank(name=name), Const(value=int() as by))):
            if name == rank and by > 0 and by % size == 0:
                return Const(0) if op == "floordiv" else Rank(rank)
    kids = children(e)
    return rebuild(e, tuple(in_part(x, rank, size) for x in kids)) if kids else e


def divisors(indices: Iterable[Expr], rank: str) -> set[int]:
    """The numbers by which a rank is divided in indices, or of which it is the remainder."""
    calls = (n for i in indices for n in walk(i) if isinstance(n, Call) and n.op in ("floordiv", "mod"))
    pairs = (n.args for n in calls if n.args[0] == Rank(rank))
    return {b.value for _, b in pairs if isinstance(b, Const) and isinstance(b.value, int) and b.value > 0}
