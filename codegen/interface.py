"""What a kernel asks of its caller: the members of its argument struct, and the symbols of its library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..ir.cascade import Access, Expr, Extent, walk
from ..ir.errors import InputError
from ..ir.interval import is_affine
from ..ir.tile import For, Load, Store, TileKernel, expressions, operations
from .names import Names, safe


@dataclass(frozen=True, slots=True)
class Field:
    """One 8-byte member of a kernel's argument struct.

    ``kind`` is "pointer", "stride", "size" (of ``axis`` of tensor ``name``), "extent" (of rank ``name``) or "fault"
    (where a kernel writes i when data index its i-th tensor, counted from 1, outside an axis).
    """

    kind: str
    name: str = ""
    axis: int = 0


def arguments(k: TileKernel) -> tuple[Field, ...]:
    """The members of a kernel's argument struct, in order."""
    checked = checked_axes(k)
    fields: list[Field] = []
    for p in k.tensors:
        fields.append(Field("pointer", p.name))
        fields += [Field("stride", p.name, axis) for axis in range(len(p.indices))]
        fields += [Field("size", p.name, axis) for axis in range(len(p.indices)) if (p.name, axis) in checked]
    fields += [Field("extent", r) for r in runtime_ranks(k)]
    if checked:
        fields.append(Field("fault"))
    return tuple(fields)


def runtime_ranks(k: TileKernel) -> tuple[str, ...]:
    """The ranks whose extents are arguments: those of the grid, of loops and of `extent`, unless they are fixed."""
    ranks = dict.fromkeys([*(g.rank for g in k.grid), *(h.of for h in k.held)])
    for op in operations(k.body):
        if isinstance(op, For):
            ranks[op.rank] = None
        for e in expressions(op):
            ranks.update(dict.fromkeys(n.rank for n in walk(e) if isinstance(n, Extent)))
    return tuple(r for r in ranks if r not in k.fixed)


def bounded_ranks(k: TileKernel) -> frozenset[str]:
    """The ranks of loops that all end where an expression says: these need no extent."""
    found = {op.rank for op in operations(k.body) if isinstance(op, For)}
    found -= {op.rank for op in operations(k.body) if isinstance(op, For) and op.upper is None}
    found -= {n.rank for op in operations(k.body) for e in expressions(op) for n in walk(e) if isinstance(n, Extent)}
    return frozenset(found - {g.rank for g in k.grid} - {h.of for h in k.held})


def checked_axes(k: TileKernel) -> frozenset[tuple[str, int]]:
    """The axes of tensors that data index: these are checked as the kernel runs."""
    declared = {p.name: p.indices for p in k.tensors}
    found = set()
    for op in operations(k.body):
        if isinstance(op, Load | Store):
            access = op.source if isinstance(op, Load) else op.target
            found |= {(access.tensor, i) for i in checked_indices(op, declared[access.tensor])}
    return frozenset(found)


def checked_indices(op: Load | Store, declared: Sequence[Expr]) -> frozenset[int]:
    """The indices of a load or store that only data can tell to lie inside: they read data, or data guard them."""
    access, guard = (op.source, op.guard) if isinstance(op, Load) else (op.target, None)
    open_guard = guard is not None and any(isinstance(n, Access) for n in walk(guard))
    return frozenset(i for i, e in enumerate(access.indices) if not is_affine(e) or (open_guard and e != declared[i]))


def entry_names(kernels: Sequence[TileKernel]) -> tuple[str, ...]:
    """The C symbol of each kernel."""
    names = Names()
    return tuple(names("entry", str(i), f"castile_{safe(k.name)}") for i, k in enumerate(kernels))


def check_held(held: Mapping[str, int], extents: Mapping[str, int]) -> None:
    """Raise `InputError` where a rank that one tile is to hold has more coordinates than the tile."""
    for rank, size in held.items():
        if extents.get(rank, 0) > size:
            raise InputError(
                f"this kernel keeps rank `{rank}` on chip and was compiled for fewer elements of it",
                rank=rank,
                expected=f"at most {size}",
                got=str(extents[rank]),
                hint="compile it for these shapes",
            )
