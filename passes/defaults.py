"""The mapping of a cascade where nothing was tuned: which form, which knobs, which tiles, for what extents.

Each is judged by the kernels that it gives. `defaults_cpu` reads tile sizes for the CPU off them, `defaults_gpu` those
for GPUs.
"""

from __future__ import annotations

from collections.abc import Mapping as Dict
from dataclasses import replace
from math import prod

from ..ir.cascade import Access, Call, Cascade, Const, free_ranks, tensors_read, walk
from ..ir.device import device_of
from ..ir.dtypes import DTYPES
from ..ir.errors import InputError
from ..ir.extents import scratch_sizes, shape_of
from ..ir.mapping import KNOBS, Mapping
from ..ir.tile import Dot, TileKernel, operations
from ..ir.types import tensor_types
from .defaults_cpu import cpu_tiles, group_tiles, longest_row, repeats, shrunk, whole_depth
from .defaults_gpu import GPU_KNOBS, gpu_mapping, relieved
from .mapped import Mapped, derived, form_sizes, mapped
from .operands import worth
from .split import default_splits

# Outputs of so many bytes leave the last cache before anybody reads them.
CACHED_BYTES = 1 << 25

# Rows of so many elements stay in the second cache, so that passes over them cost little.
RESIDENT = max(KNOBS["resident"].values)

# What may be stored between kernels for little: so many times less than what they read.
SMALL = 16

# Programs that keep a CPU's cores busy, whatever their number.
TASKS = 8

# What merging pieces may add to the whole tensors between a GPU's kernels, as a part of what a cascade is given and
# gives.
MOST_STORED = 0.5

# Rows of a loop that was parallel: whole blocks of the micro-kernel, few beside those that a mask cuts off.
SCATTERED = 252

# What every mapping for the CPU begins with.
CPU = Mapping(knobs={"hold": 1, "align": 16, "group": 1, "join": 1})


def default_mapping(c: Cascade, target: str, extents: Dict[str, int]) -> Mapping:
    """The mapping of a target for these extents where nothing was tuned."""
    if target != "cpu":
        plain, device = mapped(c, Mapping(knobs=GPU_KNOBS), extents), device_of(target)
        known = {r: n for r, n in extents.items() if r in c.ranks}
        found = gpu_mapping(plain.kernels, known, device, lambda m: mapped(c, m, extents).kernels)
        pieces = _in_pieces(c, plain.kernels, found, extents, device.units)
        if pieces is not found and not _cheap(c, mapped(c, found, extents), mapped(c, pieces, extents)):
            return found
        # What merges the pieces has kernels of its own.
        return pieces if pieces is found else relieved(pieces, device, lambda m: mapped(c, m, extents).kernels)
    return _stored(c, _for_cpu(c, extents), extents)


def _for_cpu(c: Cascade, extents: Dict[str, int]) -> Mapping:
    """The default for the CPU, in which every tile makes the rows that it multiplies."""
    begin = replace(CPU, knobs={**CPU.knobs, "meet": 1}) if _compares(c) else CPU
    begin = _narrowed(c, begin, extents)
    plain = mapped(c, begin, extents)
    types = tensor_types(c)
    written = sum(prod(shape_of(c, o, extents)) * DTYPES[types[o]].bits // 8 for o in c.outputs)
    knobs = {**begin.knobs, "through": int(written >= CACHED_BYTES)}
    known = {r: n for r, n in extents.items() if r in c.ranks}
    tiles = cpu_tiles(plain.kernels, known)
    if (groups := _contracted(c, plain.kernels, replace(begin, knobs=knobs), extents)) is not None:
        return groups
    rows = longest_row(plain.kernels, plain.sizes)
    if 1 < rows <= RESIDENT:
        return Mapping("none", tiles=tiles, knobs={**knobs, "resident": RESIDENT})
    if repeats(plain.kernels, tiles, known) > 1 and (apart := _as_written(c, known)) is not None:
        return _kept(c, shrunk(replace(apart, knobs=knobs), lambda m: mapped(c, m, extents).kernels), extents)
    found = _apart(c, plain.kernels, replace(begin, tiles=tiles, knobs=knobs), extents)
    found = shrunk(found, lambda m: mapped(c, m, extents).kernels)
    found = _scattered(c, plain.kernels, found, extents)
    found = _in_pieces(c, plain.kernels, found, extents, TASKS)
    return _kept(c, found, extents) if whole_depth(plain.kernels, found.tiles, plain.sizes) else found


def _stored(c: Cascade, mapping: Mapping, extents: Dict[str, int]) -> Mapping:
    """The mapping with rows of products stored that are dear to make again. Strict numerics make them in one way."""
    if c.numerics == "strict":
        return mapping
    form = derived(c, mapping.form, mapping.gauge).cascade
    sizes = form_sizes(c, form, extents)
    if not worth(form, tensor_types(form), sizes, mapping.tiles):
        return mapping
    found = replace(mapping, knobs={**mapping.knobs, "stored": 1, "resident": 0})
    kernels = mapped(c, found, extents).kernels
    tiles = {**mapping.tiles, **cpu_tiles(kernels, sizes)}
    return replace(found, tiles=tiles, knobs={**found.knobs, "resident": RESIDENT})


def _kept(c: Cascade, mapping: Mapping, extents: Dict[str, int]) -> Mapping:
    """The mapping with contractions whose depth is one tile not as loops of one turn: rows leave them finished."""
    made = mapped(c, mapping, extents)
    depth = whole_depth(made.kernels, mapping.tiles, made.sizes)
    if not depth or depth > RESIDENT:
        return mapping
    resident = min(n for n in KNOBS["resident"].values if n >= depth)
    return replace(mapping, knobs={**mapping.knobs, "resident": resident})


def _compares(c: Cascade) -> bool:
    """Whether something hangs on two elements of tensors being equal."""
    nodes = (n for e in c.einsums for n in walk(e.expr))
    return any(isinstance(n, Call) and n.op == "eq" and all(isinstance(a, Access) for a in n.args) for n in nodes)


def _narrowed(c: Cascade, mapping: Mapping, extents: Dict[str, int]) -> Mapping:
    """The mapping with products of short numbers made in types that just hold them, if there are such."""
    types = tensor_types(c)
    if all(DTYPES[types[t]].bits > 8 for e in c.einsums for t in tensors_read(e.expr)):
        return mapping
    found = replace(mapping, knobs={**mapping.knobs, "narrow": 1})
    return found if mapped(c, found, extents).kernels != mapped(c, mapping, extents).kernels else mapping


def _as_written(c: Cascade, extents: Dict[str, int]) -> Mapping | None:
    """The mapping without merged passes, where that repeats nothing and what it stores between kernels is little."""
    plain = mapped(c, replace(CPU, form="none"), extents)
    tiles = cpu_tiles(plain.kernels, extents)
    stored = {p.name: p for k in plain.kernels for p in k.tensors if p.name in k.outputs and p.name not in c.outputs}
    sizes = [prod(plain.sizes.get(r, 1) for i in p.indices for r in free_ranks(i)) for p in stored.values()]
    given = sum(prod(shape_of(c, p.name, extents)) for p in c.params)
    if SMALL * sum(sizes) > given or repeats(plain.kernels, tiles, extents) > 1:
        return None
    return replace(CPU, form="none", tiles=tiles)


def _scattered(c: Cascade, kernels: tuple[TileKernel, ...], mapping: Mapping, extents: Dict[str, int]) -> Mapping:
    """The mapping with sums over a parallel rank made where the rank's tiles are at hand, if there are such sums and
    the ranks that stay parallel keep all cores busy. Under strict numerics the batch must not decide that;
    only a kernel of several sums scatters others."""
    if c.numerics == "strict" or all(len(k.outputs) < 2 for k in kernels):
        return mapping
    before = mapped(c, mapping, extents)
    found = replace(mapping, knobs={**mapping.knobs, "scatter": 1})
    tiles = dict(found.tiles)
    old = {k.name: k for k in before.kernels}
    changed = [(k, old[k.name]) for k in mapped(c, found, extents).kernels if old.get(k.name, k) != k]
    for k, was in changed:
        if prod(-(-before.sizes[g.rank] // g.size) for g in k.grid if g.rank in before.sizes) < TASKS:
            return mapping
        looped = {g.rank for g in was.grid} - {g.rank for g in k.grid} - {h.rank for h in k.held}
        tiles |= {r: min(tiles[r], SCATTERED) for r in looped if r in tiles}
    return replace(found, tiles=tiles) if changed else mapping


def _apart(c: Cascade, kernels: tuple[TileKernel, ...], mapping: Mapping, extents: Dict[str, int]) -> Mapping:
    """The mapping with factors that groups of a summed rank share taken out of contractions, if there are such."""
    groups = group_tiles(kernels, {r: n for r, n in extents.items() if r in c.ranks})
    if not groups or c.numerics == "strict":
        return mapping
    found = replace(mapping, tiles={**mapping.tiles, **groups}, knobs={**mapping.knobs, "apart": 1})
    plain = replace(found, knobs={**found.knobs, "apart": 0})
    return found if mapped(c, found, extents).kernels != mapped(c, plain, extents).kernels else mapping


def _contracted(
    c: Cascade, kernels: tuple[TileKernel, ...], mapping: Mapping, extents: Dict[str, int]
) -> Mapping | None:
    """The mapping of what becomes a contraction only as factors leave it that groups of a summed rank share."""
    if any(isinstance(op, Dot) for k in kernels for op in operations(k.body)):
        return None
    found = _apart(c, kernels, mapping, extents)
    if found == mapping:
        return None
    found = _narrowed(c, found, extents)
    made = mapped(c, found, extents).kernels
    good = any(isinstance(op, Dot) for k in made for op in operations(k.body))
    return shrunk(found, lambda m: mapped(c, m, extents).kernels) if good else None


def _cheap(c: Cascade, whole: Mapped, cut: Mapped) -> bool:
    """Whether no large tensor is stored for pieces to be merged first, as a product that waits for the sum which scales
    it and whose kernel would else have scaled it: large beside what the cascade is given and gives."""
    types = tensor_types(c)
    shapes = {name: shape_of(c, name, whole.extents) for name in (*c.param_of, *c.outputs)}
    moved = sum(prod(shape) * DTYPES[types[name]].bits for name, shape in shapes.items())
    return _stored_bits(cut) - _stored_bits(whole) <= moved * MOST_STORED


def _stored_bits(m: Mapped) -> int:
    """Bits of the tensors that kernels pass to each other, but for pieces."""
    kept = [p for p in m.program.scratch if not any(isinstance(i, Const) for i in p.indices)]
    shapes = ((p, scratch_sizes(p.indices, m.sizes)) for p in kept)
    return sum(prod(n or 1 for n in shape) * DTYPES[p.dtype].bits for p, shape in shapes)


def _in_pieces(
    c: Cascade, kernels: tuple[TileKernel, ...], mapping: Mapping, extents: Dict[str, int], units: int
) -> Mapping:
    """The mapping with long loops in pieces where there are few programs, if they can be cut."""
    splits = default_splits(kernels, mapping.tiles, extents, units) if c.numerics != "strict" else {}
    splits = {r: n for r, n in splits.items() if r in c.ranks}
    if not splits:
        return mapping
    try:
        mapped(c, replace(mapping, splits=splits), extents)
    except InputError:
        return mapping
    return replace(mapping, splits=splits)
