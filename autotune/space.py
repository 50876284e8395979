"""The space of mappings of a cascade on a target: what may be chosen, and the default, which is always among it.

Only choices that change the program are offered: a rank that is kept on chip whole has no tile to choose. Mappings
whose tiles cannot be held near the processor are left out before anything is compiled.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from ..ir.cascade import Cascade
from ..ir.device import Device
from ..ir.dtypes import DTYPES
from ..ir.errors import CastileError
from ..ir.footprint import heaviest_last
from ..ir.mapping import ALTERNATIVES, KNOBS, LARGEST_TILE
from ..ir.mapping import Mapping as Tuned
from ..ir.tile import Dot, For, GridRank, Load, TileKernel, operations, tiles_of
from ..passes.defaults import default_mapping
from ..passes.mapped import mapped
from .surrogate import Points, encode

# Mappings that a search chooses among: spaces beyond this are sampled.
MOST = 12_000

# How far tiles go: in elements, and for ranks that are taken one by one where nothing is said.
WIDEST, WIDEST_OUTER, WHOLE = 1024, 16, 8192

SPLITS = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True, slots=True)
class Choice:
    """One thing to choose. ``part`` and ``name`` say where in a mapping it stands; ``default`` is one of ``values``."""

    part: str
    name: str
    values: tuple[int, ...]
    default: int

    def __str__(self) -> str:
        return f"{self.part} {self.name}".strip()


@dataclass(frozen=True, slots=True)
class Held:
    """What one form holds on chip: for each tile its ranks and the bytes of an element."""

    tiles: tuple[tuple[tuple[str, ...], int], ...]
    sizes: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Space:
    """Mappings of a cascade: a form among ``forms``, and a value for each of ``choices``."""

    default: Tuned
    forms: tuple[tuple[str, str], ...]
    choices: tuple[Choice, ...]
    held: tuple[Held, ...]
    room: int

    @property
    def size(self) -> int:
        """The number of combinations, those that are left out included."""
        return len(self.forms) * math.prod(len(c.values) for c in self.choices)

    @property
    def usual(self) -> tuple[int, ...]:
        """The default's values."""
        return tuple(c.default for c in self.choices)

    def mapping(self, form: int, values: tuple[int, ...]) -> Tuned:
        """The mapping of a combination. A tile that is what the target takes anyway is said all the same."""
        d = self.default
        if form == 0 and values == self.usual:
            return d
        parts: dict[str, dict[str, int]] = {"tiles": dict(d.tiles), "splits": dict(d.splits), "knobs": dict(d.knobs)}
        for choice, value in zip(self.choices, values, strict=True):
            parts[choice.part][choice.name] = value
        parts["splits"] = {rank: pieces for rank, pieces in parts["splits"].items() if pieces > 1}
        level, gauge = self.forms[form]
        return Tuned(level, gauge, **parts)

    def bytes_held(self, form: int, values: tuple[int, ...]) -> int:
        """Bytes of the tiles that one program of a combination holds."""
        held = self.held[form]
        sizes = dict(held.sizes)
        sizes |= {c.name: v for c, v in zip(self.choices, values, strict=True) if c.part == "tiles" and c.name in sizes}
        return sum(size * math.prod(sizes.get(r, 1) for r in axes) for axes, size in held.tiles)

    def fits(self, form: int, values: tuple[int, ...]) -> bool:
        return self.bytes_held(form, values) <= max(self.room, self.bytes_held(form, self.usual))

    def combinations(self, seed: int = 0) -> list[tuple[int, tuple[int, ...]]]:
        """Combinations that fit, the default first: all where they are few, else its neighbours and random ones."""
        start = (0, self.usual)
        found = {start: None}
        if self.size <= MOST:
            every = itertools.product(range(len(self.forms)), itertools.product(*(c.values for c in self.choices)))
            found |= {one: None for one in every if self.fits(*one)}
            return list(found)
        found |= {one: None for one in self._neighbours(start) if self.fits(*one)}
        rng = np.random.default_rng(seed)
        for _ in range(4 * MOST):
            one = (
                int(rng.integers(len(self.forms))),
                tuple(c.values[int(rng.integers(len(c.values)))] for c in self.choices),
            )
            if self.fits(*one):
                found[one] = None
            if len(found) >= MOST:
                break
        return list(found)

    def _neighbours(self, at: tuple[int, tuple[int, ...]]) -> Iterator[tuple[int, tuple[int, ...]]]:
        """Combinations that differ in two choices at most."""
        form, values = at
        for other in range(len(self.forms)):
            yield other, values
        for i, j in itertools.combinations_with_replacement(range(len(self.choices)), 2):
            for a, b in itertools.product(self.choices[i].values, self.choices[j].values):
                changed = list(values)
                changed[i], changed[j] = a, b
                for other in {form, 0, len(self.forms) - 1}:
                    yield other, tuple(changed)

    def points(self, combinations: list[tuple[int, tuple[int, ...]]]) -> Points:
        """Combinations as the search sees them."""
        labels = [" ".join(self.forms[form]) for form, _ in combinations]
        return encode([labels, *([values[i] for _, values in combinations] for i in range(len(self.choices)))])


def space_of(c: Cascade, extents: Mapping[str, int], target: str, device: Device) -> Space:
    """The mappings of a cascade at some extents on a target."""
    here = _here(c, default_mapping(c, target, extents), extents)
    choices = [*_tiles(here), *_splits(here), *_knobs(here, "gpu" if device.is_gpu else "cpu", device)]
    held = tuple(_held(kernels, extents) for kernels in here.programs)
    return Space(here.default, here.forms, tuple(choices), held, _room(device))


Kernels = tuple[TileKernel, ...]


@dataclass(frozen=True, slots=True)
class _Here:
    """What choices are tried against: in each form the program of the default, and that with `resident` unset, since
    rows that this knob keeps whole have no tile."""

    cascade: Cascade
    default: Tuned
    extents: Mapping[str, int]
    forms: tuple[tuple[str, str], ...]
    programs: tuple[Kernels, ...]
    plain: tuple[Kernels | None, ...]

    def varied(self, part: str, name: str, value: int, base: Tuned) -> tuple[Kernels | None, ...]:
        """The program of each form with one choice made otherwise."""
        parts = {"tiles": dict(base.tiles), "splits": dict(base.splits), "knobs": dict(base.knobs)}
        parts[part][name] = value
        return tuple(_kernels(self.cascade, Tuned(f, g, **parts), self.extents) for f, g in self.forms)

    def matters(self, part: str, name: str, value: int) -> bool:
        """Whether a choice changes any program, into one that can be made."""
        plain = self.varied(part, name, value, _plain(self.default))
        pairs = zip((*self.varied(part, name, value, self.default), *plain), (*self.programs, *self.plain), strict=True)
        return any(new is not None and new != old for new, old in pairs)


def _kernels(c: Cascade, mapping: Tuned, extents: Mapping[str, int]) -> Kernels | None:
    try:
        return mapped(c, mapping, extents).kernels
    except CastileError:
        return None


def _plain(mapping: Tuned) -> Tuned:
    return replace(mapping, knobs={name: value for name, value in mapping.knobs.items() if name != "resident"})


def _here(c: Cascade, default: Tuned, extents: Mapping[str, int]) -> _Here:
    """The forms that differ, the default's first, and their programs."""
    forms: list[tuple[str, str]] = []
    found: list[tuple[Kernels, Kernels | None]] = []
    for form, gauge in ((default.form, default.gauge), *ALTERNATIVES):
        tuned = replace(default, form=form, gauge=gauge)
        kernels = _kernels(c, tuned, extents)
        both = None if kernels is None else (kernels, _kernels(c, _plain(tuned), extents))
        if both is not None and both not in found:
            forms.append((form, gauge))
            found.append(both)
    return _Here(c, default, extents, tuple(forms), tuple(k for k, _ in found), tuple(k for _, k in found))


def _sizes(kernels: Kernels) -> dict[str, int]:
    """The tile of each rank that a program cuts; the largest, where kernels differ."""
    found: dict[str, int] = {}
    for k in kernels:
        loops: list[For | GridRank] = [*k.grid, *(op for op in operations(k.body) if isinstance(op, For))]
        for loop in loops:
            found[loop.rank] = max(found.get(loop.rank, 0), loop.size)
    return found


def _tiles(here: _Here) -> Iterator[Choice]:
    usual: dict[str, int] = {}
    for kernels in (*reversed(here.plain), *reversed(here.programs)):
        usual |= _sizes(kernels or ())
    for rank in here.cascade.ranks:
        if rank not in usual or here.extents.get(rank, 1) <= 1:
            continue
        size, extent = here.default.tiles.get(rank, usual[rank]), here.extents[rank]
        widest = min(WIDEST if size > 1 else WIDEST_OUTER, 1 << (extent - 1).bit_length())
        values = {1 << i for i in range(widest.bit_length()) if (1 << i) * 16 >= size or size > extent} | {size}
        if extent <= min(WHOLE, LARGEST_TILE):
            values.add(extent)
        other = next((v for v in sorted(values) if v != size), size)
        if here.matters("tiles", rank, other):
            yield Choice("tiles", rank, tuple(sorted(values)), size)


def _splits(here: _Here) -> Iterator[Choice]:
    for rank in here.cascade.ranks:
        if here.extents.get(rank, 1) >= 64 and here.matters(
            "splits", rank, 2 if here.default.splits.get(rank, 1) != 2 else 4
        ):
            usual = here.default.splits.get(rank, 1)
            values = {s for s in SPLITS if s * 32 <= here.extents[rank]} | {usual}
            yield Choice("splits", rank, tuple(sorted(values)), usual)


def _knobs(here: _Here, kind: str, device: Device) -> Iterator[Choice]:
    """Knobs with the values that make programs of their own. What only a GPU's printer reads is seen in no program."""
    for knob in KNOBS.values():
        usual = here.default.knob(knob.name)
        if knob.target == "gpu" == kind and _applies(knob.name, here.programs, device):
            yield Choice("knobs", knob.name, knob.values, usual)
        if knob.target not in (kind, "all") or knob.target == "gpu":
            continue
        seen: list[tuple[Kernels | None, ...]] = [here.programs]
        values = [usual]
        for value in knob.values:
            if value != usual and (programs := here.varied("knobs", knob.name, value, here.default)) not in seen:
                seen.append(programs)
                values.append(value)
        if len(values) > 1:
            yield Choice("knobs", knob.name, tuple(sorted(values)), usual)


def _applies(knob: str, programs: tuple[Kernels, ...], device: Device) -> bool:
    """Whether a GPU's printer has anything to do for a knob in these programs."""
    kernels = [k for program in programs for k in program]
    every = [op for k in kernels for op in operations(k.body)]
    dots = [op for op in every if isinstance(op, Dot)]
    match knob:
        case "swizzle":
            return any(op.accumulate for op in dots)
        case "heavy":
            return any(map(heaviest_last, kernels))
        case "descriptors":
            return "tma" in device.features
        case "specialize":
            return bool(dots and device.features & {"wgmma", "tcgen05"})
        case "ahead":
            return any(isinstance(op, For) and any(isinstance(x, Load) for x in op.body) for op in every)
        case "tf32x3":
            return device.target.startswith("cuda") and any(op.operand is None for op in dots)
    return True


def _held(kernels: Kernels, extents: Mapping[str, int]) -> Held:
    """What the largest kernel of a program holds."""
    best: list[tuple[tuple[str, ...], int]] = []
    sizes: dict[str, int] = {}
    most = -1
    for k in kernels:
        here = {**extents, **_sizes((k,)), **k.fixed, **{h.rank: h.size for h in k.held}}
        tiles = [(t.axes, max(1, DTYPES[t.dtype].bits // 8)) for t in tiles_of(k).values()]
        total = sum(size * math.prod(here.get(r, 1) for r in axes) for axes, size in tiles)
        if total > most:
            most, best, sizes = total, tiles, here
    return Held(tuple(best), sizes)


def _room(device: Device) -> int:
    """Bytes that one program may hold: shared memory and registers, or the second cache twice over."""
    if device.is_gpu:
        return device.shared_bytes + 4 * device.registers_per_unit
    return 2 * device.memory[1].bytes
