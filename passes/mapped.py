"""From a cascade and a mapping to tile programs: derive the form that the mapping names, then cut it into tiles."""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Mapping as Dict
from dataclasses import dataclass, replace
from functools import lru_cache

from ..ir.cascade import Cascade, Const, Expr, Rank
from ..ir.errors import InputError, did_you_mean
from ..ir.extents import given_ranks, resolve, shape_of
from ..ir.mapping import Mapping
from ..ir.tile import TileKernel
from .derive import Derivation, derive
from .fuse import nominal_extents
from .inbounds import always_read
from .tile import TileProgram, tile_program
from .tiling import Tiling


@dataclass(frozen=True, slots=True)
class Mapped:
    """A cascade under a mapping: the derived form, and its kernels for the extents by which they were judged."""

    mapping: Mapping
    extents: Dict[str, int]
    derivation: Derivation
    program: TileProgram
    sizes: Dict[str, int]

    @property
    def kernels(self) -> tuple[TileKernel, ...]:
        return self.program.kernels


def derived(c: Cascade, form: str, gauge: str) -> Derivation:
    """`derive`, remembered: a tuner and the variants of a kernel ask for the same form again and again."""
    found = _derived(c, form, gauge)
    # Cascades are equal whatever their docstrings say.
    return found if found.cascade.doc == c.doc else replace(found, cascade=replace(found.cascade, doc=c.doc))


@lru_cache(maxsize=256)
def _derived(c: Cascade, form: str, gauge: str) -> Derivation:
    return derive(c, form, gauge)


def mapped(c: Cascade, mapping: Mapping, extents: Dict[str, int]) -> Mapped:
    """The tile programs of a cascade; ``extents`` decide what is fused, yet the kernels run for others too.

    Raises `InputError` as `check_mapping` does.
    """
    derivation = derived(c, mapping.form, mapping.gauge)
    form = derivation.cascade
    check_mapping(c, mapping)
    sizes = form_sizes(c, form, extents)
    steps = {s.einsum.name: s.step for s in derivation.streams if s.einsum is not None and s.step}
    tiling = Tiling(
        ranks=mapping.tiles,
        hold=bool(mapping.knob("hold")),
        align=mapping.knob("align"),
        group=bool(mapping.knob("group")),
        through=bool(mapping.knob("through")),
        resident=mapping.knob("resident"),
        join=bool(mapping.knob("join")),
        scatter=bool(mapping.knob("scatter")),
        apart=bool(mapping.knob("apart")),
        narrow=bool(mapping.knob("narrow")),
        meet=bool(mapping.knob("meet")),
        stored=bool(mapping.knob("stored")),
        splits=mapping.splits,
    )
    user = {m.name for m in form.monoids} - {s.monoid.name for s in derivation.streams if s.monoid is not None}
    always = always_read(c)
    program = tile_program(form, tiling, steps=steps, extents=sizes, user=user, always=always)
    return Mapped(mapping, extents, derivation, program, sizes)


def form_sizes(c: Cascade, form: Cascade, extents: Dict[str, int]) -> dict[str, int]:
    """The extents of a form's ranks, given those of the cascade that it was derived from."""
    shapes = {p.name: shape_of(c, p.name, extents) for p in c.params}
    return resolve(form, {r: n for r, n in extents.items() if r in form.ranks}, shapes)


def check_mapping(c: Cascade, mapping: Mapping) -> None:
    """Raise `InputError` for a mapping that names a rank which the cascade does not have, or breaks its numerics."""
    for rank in (*mapping.tiles, *mapping.splits):
        if rank not in c.ranks:
            hint = did_you_mean(rank, c.ranks) or f"its ranks are {', '.join(c.ranks)}"
            raise InputError(f"the mapping names a rank `{rank}`, which `{c.name}` does not have", hint=hint)
    for rank, pieces in mapping.splits.items():
        if pieces > 1 and c.numerics == "strict":
            raise InputError(
                f"the mapping splits rank `{rank}`, and strict numerics keep the order of reductions",
                rank=rank,
                expected="1",
                got=str(pieces),
                hint="leave the split out, or compile with numerics='standard'",
            )


# Extents that stand for others

# Extents of a rank that is not kept on chip share a variant from one of these to the next.
STEPS = (0, 1, 16, 64, 256, 1024, 4096, 16384, 65536, 1 << 20)

# A rank on chip shares a variant with those that fill the same blocks.
BLOCK = 16


def small_ranks(c: Cascade) -> frozenset[str]:
    """The ranks of the derived form that are to stay on chip, such as a head dimension."""
    form = derived(c, "full", "maximum").cascade
    return frozenset(r for r, n in nominal_extents(form).items() if n <= 64)


def bucket(c: Cascade, extents: Dict[str, int], small: Collection[str] | None = None) -> dict[str, int]:
    """The extents that stand for these and all others that share a variant with them; ``small`` are `small_ranks`.

    A rank on chip goes up to the next multiple of 16, any other to the next of a few steps; what follows from these
    follows. Where rounding up contradicts what the cascade says of its extents, makes another rank smaller or fills one
    that is empty, they stand for themselves.
    """
    small = small_ranks(c) if small is None else small
    free = given_ranks(c)
    # Under strict numerics one row is computed as several are: a sum keeps its order in any batch.
    least = BLOCK if c.numerics == "strict" else 1
    rounded = {r: _rounded(max(extents[r], least) if extents[r] else 0, r in small) for r in free}
    try:
        made = resolve(c, rounded, {p.name: shape_of(c, p.name, resolve(c, rounded)) for p in c.params})
    except InputError:
        return dict(extents)
    return made if all(made[r] >= n if n else made[r] == 0 for r, n in extents.items()) else dict(extents)


def _rounded(n: int, small: bool) -> int:
    if small and n > 1:
        return -(-n // BLOCK) * BLOCK
    return next((s for s in STEPS if n <= s), n)


def nominal(c: Cascade, small: Collection[str] | None = None) -> dict[str, int]:
    """Extents for a kernel of which no shapes are known: ranks on chip 64, batch-like ranks 1, all others 2048.

    A batch-like rank indexes every tensor and is reduced nowhere, while others remain in the outputs. Each is raised
    to the least power of two that keeps every index in bounds.
    """
    small = small_ranks(c) if small is None else small
    batch = _batch_like(c)
    free = given_ranks(c)
    known = {r: 64 if r in small else 1 if r in batch else 2048 for r in free}
    for _ in range(12):
        try:
            extents = resolve(c, known)
        except InputError:
            break
        if all(extents.values()):
            return extents
        known = {r: 2 * n for r, n in known.items()}
    return resolve(c, dict.fromkeys(free, 64))


def _batch_like(c: Cascade) -> set[str]:
    reduced = {r for e in c.einsums for n in e.reductions for r in n.ranks}
    tensors: list[tuple[Expr, ...]] = [p.indices for p in c.params if p.indices]
    tensors += [tuple(map(Rank, o.ranks)) for e in c.einsums for o in e.outputs]
    if not tensors:
        return set()
    common = set.intersection(*({i.name for i in t if isinstance(i, Rank)} for t in tensors)) - reduced
    outputs = [{i.name for i in c.indices_of(name) if isinstance(i, Rank)} for name in c.outputs]
    # A softmax over rows has its rows in every tensor; they are the work, not the batch.
    literal = any(isinstance(i, Const) for t in tensors for i in t)
    return common if not literal and all(len(o - common) >= 1 and len(o) > 2 for o in outputs) else set()
