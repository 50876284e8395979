"""Loads and stores of the Triton printer: addresses, masks, and indices that data make."""

from __future__ import annotations

from collections.abc import Sequence

from ..ir.cascade import Access, Param, Rank, literal_value
from ..ir.dtypes import DTYPES
from ..ir.tile import Load, Store
from .interface import checked_indices
from .triton_expr import AND, ATOM, OR, Value, narrow
from .triton_scope import Scope

# The greatest size along each axis of a tile that a descriptor tells.
LARGEST_BOX = 256


class Memory(Scope):
    """Prints loads and stores."""

    def _pointer(
        self, access: Access, axes: Sequence[str], checks: frozenset[int]
    ) -> tuple[str, list[tuple[int, str]]]:
        """The address of an access over some axes, and the names of the indices that data make."""
        texts: list[tuple[bool, str]] = []
        found = []
        for i, index in enumerate(access.indices):
            stride = self.stride(access.tensor, i)
            if literal_value(index) == 0:
                continue
            if i in checks:
                name = self.names("at", f"{access.tensor}_{i}_{len(self.lines)}", "{}_at")
                text = self.e.typed(index, "i64", axes)
                if self.interpret and axes and not self.e.spread(index):
                    # The interpreter broadcasts a lone truth value, as tests of this would give, as a number.
                    text += f" + tl.zeros(({', '.join('1' for _ in axes)},), tl.int64)"
                self.line(f"{name} = {text}")
                found.append((i, name))
                texts.append((True, f"{name} * {stride}"))
                continue
            v = self.e.value(index, axes, "i64")
            texts.append((bool(self.e.spread(index)), f"{v.at(7)} * {stride}"))
        ordered = [t for wide, t in texts if not wide] + [t for wide, t in texts if wide]
        pointer = " + ".join([self.names("tensor", access.tensor), *ordered])
        spread = frozenset().union(*(self.e.spread(i) for i in access.indices))
        if axes and not spread >= set(axes):
            shape = ", ".join(self._shape(axes)) + ("," if len(axes) == 1 else "")
            pointer = f"{pointer} + tl.zeros(({shape}), tl.int32)"
        return pointer, found

    def _checks(self, access: Access, found: Sequence[tuple[int, str]], mask: str, axes: Sequence[str]) -> str:
        """Lanes whose data-made indices lie outside report it and are masked."""
        if not found:
            return mask
        outside = " | ".join(f"({n} < 0) | ({n} >= {self.size(access.tensor, i)})" for i, n in found)
        name = self.names("outside", f"{access.tensor}_{len(self.lines)}", "outside_{}")
        live = self.names("live", f"{access.tensor}_{len(self.lines)}", "inside_{}")
        shape = ", ".join(self._shape(axes)) + ("," if len(axes) == 1 else "")
        mask = mask or f"tl.full(({shape}), True, tl.int1)"
        if axes:
            mask = f"tl.broadcast_to({mask}, ({shape}))"
        self.line(f"{live} = {mask}")
        self.line(f"{name} = {live} & ({outside})")
        number = 1 + list(self.params).index(access.tensor)
        target = f"fault + tl.zeros(({shape}), tl.int32)" if axes else "fault"
        self.line(f"tl.store({target}, {number}, mask={name})")
        self.line(f"{live} = {live} & ({name} == 0)")
        return live

    def _load(self, op: Load) -> None:
        param = self.params[op.source.tensor]
        axes = self._long(op.tile.axes)
        dtype = self.kept.get(op.tile.name, op.tile.dtype)
        if not param.indices and param.name not in self.k.outputs:
            self._set(op.tile, self._whole_text(Access(param.name), op.tile.dtype, axes))
            return
        block = self._block_of(op, param)
        if block is not None:
            self._described(op, param, block, dtype)
            return
        self._pointed(op, param, axes, dtype)

    def _block_of(self, op: Load, param: Param) -> tuple[int, ...] | None:
        """The sizes along a tensor's own axes of the tile that a load gets, if a descriptor can tell it."""
        if not self.mapping.knob("descriptors") or not (self.interpret or "tma" in self.features):
            return None
        row = DTYPES[param.dtype]
        plain = op.guard is None and param.name not in self.k.outputs and not checked_indices(op, param.indices)
        if not plain or not 2 <= len(param.indices) <= 5 or param.dtype not in ("f16", "bf16", "f32", "i8"):
            return None
        block = []
        for index, own in zip(op.source.indices, param.indices, strict=True):
            if not isinstance(index, Rank) or index.name not in self.e.vectors or index.name not in op.tile.axes:
                if self.e.spread(index) or not narrow(index):
                    return None
                block.append(1)
                continue
            if own not in (index, self._of(index)) or not self.axes[index.name].plain:
                return None
            block.append(self.axes[index.name].block)
        long = [n for n in block if n > 1]
        if len(long) != 2 or block[-1] * row.bits // 8 < 16 or max(block) > LARGEST_BOX:
            return None
        return tuple(block) if self.blocks.setdefault(param.name, tuple(block)) == tuple(block) else None

    def _of(self, index: Rank) -> Rank:
        """The rank whose coordinates a held rank has."""
        return Rank(next((h.of for h in self.k.held if h.rank == index.name), index.name))

    def _described(self, op: Load, param: Param, block: tuple[int, ...], dtype: str) -> None:
        """A tile from a descriptor, where the host could make one, else by pointers; in the order of its memory."""
        ranks = [i.name for i, n in zip(op.source.indices, block, strict=True) if n > 1 and isinstance(i, Rank)]
        places = []
        for index, n in zip(op.source.indices, block, strict=True):
            start = self.axes[index.name].start if n > 1 and isinstance(index, Rank) else None
            places.append(start or self.e.typed(index, "i32", ()))
        name, made = self.descriptor(param.name), self.names("tile", op.tile.name)
        text = f"tl.reshape({name}.load([{', '.join(places)}]), ({', '.join(self._shape(ranks))}))"
        self.line(f"if {name} is not None:")
        self.line(f"    {made} = {self.e.converted(Value(text, ATOM, param.dtype), dtype)}")
        self.line("else:")
        self.depth += 1
        self._pointed(op, param, tuple(ranks), dtype)
        self.depth -= 1
        self.e.tiles[op.tile.name] = (made, tuple(ranks), dtype)

    def _pointed(self, op: Load, param: Param, axes: tuple[str, ...], dtype: str) -> None:
        """A tile by pointers to its elements."""
        pointer, found = self._pointer(op.source, axes, checked_indices(op, param.indices))
        mask = self._mask(axes, axes)
        if op.guard is not None:
            guard = self.e.typed(op.guard, "bool", axes, AND if mask else OR)
            guard = f"tl.full((), {guard}, tl.int1)" if guard in ("True", "False") else guard
            mask = f"{mask} & {guard}" if mask else guard
        mask = self._checks(op.source, found, mask, axes)
        row = DTYPES[param.dtype]
        other = self.e.spell(op.other, "f32" if row.is_float else "i32") if row.bits > 8 or not row.is_float else "0"
        other = str(int(op.other)) if param.dtype == "bool" else other
        text = f"tl.load({pointer})"
        if mask:
            if len(pointer) + len(mask) > 90:
                address = self.names("address", op.tile.name, "{}_at")
                self.line(f"{address} = {pointer}")
                pointer = address
            if len(mask) > 60 and found == []:
                live = self.names("mask", op.tile.name, "{}_in")
                self.line(f"{live} = {mask}")
                mask = live
            text = f"tl.load({pointer}, mask={mask}, other={other})"
        if param.dtype == "bool":
            text = f"({text} != 0)"
        elif row.is_float and row.bits == 8:
            text = f"{self.e.need('from_' + param.dtype)}({text})"
            if op.other != 0.0:
                text = f"tl.where({mask}, {text}, {self.e.spell(op.other, 'f32')}).to(tl.float16)"
        value = Value(text, ATOM, param.dtype)
        text = text if dtype == param.dtype else self.e.converted(value, dtype)
        self._set(op.tile, text, clean=op.other == 0.0)

    def _store(self, op: Store) -> None:
        param = self.params[op.target.tensor]
        axes = self._long(op.axes)
        value = self._whole_text(op.expr, param.dtype, axes)
        row = DTYPES[param.dtype]
        if row.is_float and row.bits == 8:
            wide = self._whole_text(op.expr, "f32", axes)
            value = f"{self.e.need('to_' + param.dtype)}({wide})"
        elif param.dtype == "bool":
            value = f"({value}).to(tl.uint8)"
        pointer, found = self._pointer(op.target, axes, checked_indices(op, param.indices))
        mask = self._checks(op.target, found, self._mask(axes, axes), axes)
        if len(pointer) + len(value) + len(mask) > 90:
            result = self.names("result", f"{param.name}", "{}_new")
            self.line(f"{result} = {value}")
            value = result
        self.line(f"tl.store({pointer}, {value}{f', mask={mask}' if mask else ''})")
        if self.sequential:
            self.line("tl.debug_barrier()  # what this step stored, the next one reads")
