"""The space of mappings of a cascade on a target: what may be chosen, and the default, which is always among it.

Only choices that change the program are offered: a rank that is kept on chip whole has no tile to choose. Mappings
whose tiles cannot be held near the processor are left out before anything is compiled.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from ..ir.cascade import Cascade
from ..ir.device import Device
from ..ir.dtypes import DTYPES
from ..ir.errors import CastileError
from ..ir.mapping import KNOBS, LARGEST_TILE
from ..ir.mapping import Mapping as Tuned
from ..ir.tile import For, GridRank, TileKernel, operations, tiles_of
from ..passes.mapped import default_mapping, mapped
from .surrogate import Points, encode

# Mappings that a search chooses among: spaces beyond this are sampled.
MOST = 12_000

# How far tiles go: in elements, and for ranks that are taken one by one where nothing is said.
WIDEST, WIDEST_OUTER, WHOLE = 1024, 16, 8192

SPLITS = (1, 2, 4, 8, 16, 32)

_FORMS = (("full", "maximum"), ("full", "exponent"), ("defer", "maximum"), ("none", "maximum"))

# A choice left to the target.
UNSET = 0


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

    def mapping(self, form: int, values: tuple[int, ...]) -> Tuned:
        """The mapping of a combination. A tile that is what the target takes anyway is said all the same."""
        parts: dict[str, dict[str, int]] = {"tiles": {}, "splits": {}, "knobs": {}}
        for choice, value in zip(self.choices, values, strict=True):
            if not (choice.part == "splits" and value == 1):
                parts[choice.part][choice.name] = value
        level, gauge = self.forms[form]
        return Tuned(level, gauge, **parts)

    def bytes_held(self, form: int, values: tuple[int, ...]) -> int:
        """Bytes of the tiles that one program of a combination holds."""
        held = self.held[form]
        sizes = dict(held.sizes)
        sizes |= {c.name: v for c, v in zip(self.choices, values, strict=True) if c.part == "tiles" and c.name in sizes}
        return sum(size * math.prod(sizes.get(r, 1) for r in axes) for axes, size in held.tiles)

    def fits(self, form: int, values: tuple[int, ...]) -> bool:
        usual = self.bytes_held(form, tuple(c.default for c in self.choices))
        return self.bytes_held(form, values) <= max(self.room, usual)

    def combinations(self, seed: int = 0) -> list[tuple[int, tuple[int, ...]]]:
        """Combinations that fit, the default first: all where they are few, else its neighbours and random ones."""
        start = (0, tuple(c.default for c in self.choices))
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
    default = default_mapping(c, target, extents)
    forms, programs = _forms(c, default, extents)
    choices = [*_tiles(c, default, forms, programs, extents), *_splits(c, default, forms, programs, extents)]
    kind = "gpu" if device.is_gpu else "cpu"
    knobs = [k for k in KNOBS.values() if k.target in (kind, "all")]
    choices += [Choice("knobs", k.name, k.values, default.knob(k.name)) for k in knobs]
    return Space(default, tuple(forms), tuple(choices), tuple(_held(ks, extents) for ks in programs), _room(device))


Kernels = tuple[TileKernel, ...]


def _kernels(c: Cascade, mapping: Tuned, extents: Mapping[str, int]) -> Kernels | None:
    try:
        return mapped(c, mapping, extents).kernels
    except CastileError:
        return None


def _forms(c: Cascade, default: Tuned, extents: Mapping[str, int]) -> tuple[list[tuple[str, str]], list[Kernels]]:
    """The forms that differ, the default's first."""
    forms: list[tuple[str, str]] = []
    programs: list[Kernels] = []
    for form, gauge in ((default.form, default.gauge), *_FORMS):
        kernels = _kernels(c, Tuned(form, gauge, default.tiles), extents)
        if kernels is not None and kernels not in programs:
            forms.append((form, gauge))
            programs.append(kernels)
    return forms, programs


def _sizes(kernels: Kernels) -> dict[str, int]:
    """The tile of each rank that a program cuts; the largest, where kernels differ."""
    found: dict[str, int] = {}
    for k in kernels:
        loops: list[For | GridRank] = [*k.grid, *(op for op in operations(k.body) if isinstance(op, For))]
        for loop in loops:
            found[loop.rank] = max(found.get(loop.rank, 0), loop.size)
    return found


def _tiles(
    c: Cascade, default: Tuned, forms: list[tuple[str, str]], programs: list[Kernels], extents: Mapping[str, int]
) -> Iterator[Choice]:
    usual: dict[str, int] = {}
    for kernels in reversed(programs):
        usual |= _sizes(kernels)
    for rank in c.ranks:
        if rank not in usual or extents.get(rank, 1) <= 1:
            continue
        size, extent = usual[rank], extents[rank]
        widest = min(WIDEST if size > 1 else WIDEST_OUTER, 1 << (extent - 1).bit_length())
        values = {1 << i for i in range(widest.bit_length()) if (1 << i) * 16 >= size or size > extent} | {size}
        if extent <= min(WHOLE, LARGEST_TILE):
            values.add(extent)
        other = next((v for v in sorted(values) if v != size), size)
        if _matters(c, default, forms, programs, extents, {"tiles": {rank: other}}):
            yield Choice("tiles", rank, tuple(sorted(values)), size)


def _splits(
    c: Cascade, default: Tuned, forms: list[tuple[str, str]], programs: list[Kernels], extents: Mapping[str, int]
) -> Iterator[Choice]:
    for rank in c.ranks:
        if extents.get(rank, 1) >= 64 and _matters(c, default, forms, programs, extents, {"splits": {rank: 2}}):
            values = tuple(s for s in SPLITS if s * 32 <= extents[rank])
            yield Choice("splits", rank, values, default.splits.get(rank, 1))


def _matters(
    c: Cascade,
    default: Tuned,
    forms: list[tuple[str, str]],
    programs: list[Kernels],
    extents: Mapping[str, int],
    change: dict[str, dict[str, int]],
) -> bool:
    """Whether a choice changes the program of any form."""
    for (form, gauge), kernels in zip(forms, programs, strict=True):
        tiles = {**default.tiles, **change.get("tiles", {})}
        if _kernels(c, Tuned(form, gauge, tiles, change.get("splits", {})), extents) != kernels:
            return True
    return False


def _held(kernels: Kernels, extents: Mapping[str, int]) -> Held:
    """What the largest kernel of a program holds."""
    best: list[tuple[tuple[str, ...], int]] = []
    sizes: dict[str, int] = {}
    most = -1
    for k in kernels:
        here = {**extents, **_sizes((k,)), **k.whole, **{h.rank: h.size for h in k.held}}
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
