"""Outputs on a device against the float64 oracle: extents at which an example is checked, its inputs, and a sample of
its outputs; and against those of another kernel.

Only what the sample depends on goes to the host.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

import castile
from castile.ir.bound import judge
from castile.ir.cascade import Access, Einsum, Extent, Rank, Reduce, live_einsums, ranks_named, walk
from castile.ir.dtypes import DTYPES, numpy_dtype
from castile.ir.errors import CastileError
from castile.ir.extents import bindings, resolve, shape_of
from castile.ir.samples import integer_spans
from castile.ir.verify import scan_step
from castile.passes.mapped import nominal
from castile.passes.work import sizes_of, tensor_bytes, work

Extents = Mapping[str, int]

# What an example may take: bytes of all its tensors, those between Einsums among them, and points of its Einsums.
MOST_BYTES, MOST_POINTS = 1 << 30, 10**9

# Nominal extents up to this one stay as they are, and no other gets below the least.
ON_CHIP, LEAST = 64, 16

# Outputs that are compared at most and at least, points that the oracle visits for them (a few seconds' worth), and
# elements of inputs that go to the host. A monoid is folded step by step, each of which takes as long as many points.
MOST_SAMPLES, LEAST_SAMPLES = 200, 8
ORACLE_POINTS, ORACLE_ELEMENTS = 1 << 24, 1 << 26
FOLD_POINTS = 1 << 14

# How far one kernel's outputs may be from another's, as a part of their length, and elements compared at once.
ALIKE, PART = 0.03, 1 << 26


# Inputs


def tensors(c: castile.Cascade, extents: Mapping[str, int], seed: int, device: str) -> dict[str, Any]:
    """Fresh random inputs: floats of unit variance, integers that the cascade can take, scalars of one eighth or 2."""
    import torch

    generator = torch.Generator(device).manual_seed(seed)
    spans = integer_spans(c, extents)
    found: dict[str, Any] = {}
    for p in c.params:
        row, shape = DTYPES[p.dtype], shape_of(c, p.name, extents)
        kind = getattr(torch, str(numpy_dtype(p.dtype)))
        if not p.indices:
            found[p.name] = 0.125 if row.is_float else min([2, *(n for n in extents.values() if n)])
        elif row.is_float:
            wide = torch.float64 if p.dtype == "f64" else torch.float32
            found[p.name] = torch.randn(shape, generator=generator, device=device, dtype=wide).to(kind)
        elif p.dtype == "u32" and p.name not in spans:
            words = torch.randint(-(1 << 31), 1 << 31, shape, generator=generator, device=device)
            found[p.name] = words.to(torch.int32).view(kind)
        else:
            low, high = (0, 1) if row.kind == "bool" else spans.get(p.name, (0, 7))
            found[p.name] = torch.randint(low, high + 1, shape, generator=generator, device=device).to(kind)
    return found


# Extents


def sizes(c: castile.Cascade, most: int) -> dict[str, int]:
    """Nominal extents cut to ``most``, or as they are where that contradicts the cascade; then the widest are halved
    until the example is small enough, or none is above the least. Odd ones stay odd, and even ones even. A batch has 2
    or 3 members."""
    usual = nominal(c)
    scanned = {s.rank for e in c.einsums if (s := scan_step(e)) is not None}
    given = [b.rank for b in bindings(c) if b.param is not None]
    wide = [r for r in given if usual[r] > ON_CHIP or r in scanned]
    cut = {r: most if r in wide else _narrow(usual[r], most) for r in given}
    extents = _roomy(c, given, _resolved(c, cut) or usual, min(LEAST, most // 2))
    while too_large(c, extents):
        halves = [
            {r: extents[r] for r in given} | {rank: _half(extents[rank])}
            for rank in sorted(wide, key=lambda r: -extents[r])
            if _half(extents[rank]) >= LEAST
        ]
        smaller = [found for known in halves if (found := _resolved(c, known)) and all(found.values())]
        if not smaller:
            break
        extents = smaller[0]
    return extents


def _narrow(n: int, most: int) -> int:
    """The extent of a rank that is on chip or batch-like."""
    if n == 1:
        return 2 + most % 2
    return n if most > ON_CHIP else min(n, most)


def _roomy(c: castile.Cascade, given: list[str], extents: dict[str, int], least: int) -> dict[str, int]:
    """The extents with short windows: the least extent where that gives one that follows from others room to move."""
    narrow = [r for r, n in extents.items() if n <= 1 and r not in given]
    for rank in given:
        least_alike = min(extents[rank], least | extents[rank] & 1)
        found = _resolved(c, {r: extents[r] for r in given} | {rank: least_alike})
        if found and any(found[r] > max(1, extents[r]) for r in narrow):
            extents = found
    return extents


def too_large(c: castile.Cascade, extents: Extents) -> bool:
    """Whether the tensors take too many bytes or the Einsums have too many points."""
    known = sizes_of(c, extents)
    points = sum(math.prod(extents[r] for r in w.space) for w in work(c))
    return points > MOST_POINTS or sum(p.at(known) for p in tensor_bytes(c).values()) > MOST_BYTES


def _half(n: int) -> int:
    return n // 2 | n & 1


def _resolved(c: castile.Cascade, known: Extents) -> dict[str, int] | None:
    """All extents, or None where these contradict the cascade."""
    try:
        return resolve(c, known)
    except CastileError:
        return None


# Comparing


def poison(x: Any) -> None:
    """Fill a tensor with what no result is."""
    if x.is_floating_point():
        x.fill_(float("nan"))
    elif x.numel():
        x.fill_(True if str(x.dtype) == "torch.bool" else 77)


def compare(c: castile.Cascade, extents: Extents, inputs: Mapping[str, Any], outs: tuple[Any, ...], seed: int) -> float:
    """The greatest error at a sample of the outputs, as a multiple of the bound; `AssertionError` above 1."""
    if any(extents[r] == 0 for name in c.outputs for r in output_ranks(c, name)):
        return 0.0
    at = sample(c, extents, seed)
    got = {}
    for name, x in zip(c.outputs, outs, strict=True):
        ranks = output_ranks(c, name)
        got[name] = numbers(_picked(x, [at[r] for r in ranks]) if ranks else x)
    arrays, local = narrowed(c, inputs, at)
    worst = 0.0
    for judgement in judge(c, arrays, got, local or None):
        worst = max(worst, judgement.worst)
        if not judgement.ok:
            raise AssertionError(str(judgement))
    return worst


def output_ranks(c: castile.Cascade, name: str) -> tuple[str, ...]:
    return next(o.ranks for e in c.einsums for o in e.outputs if o.name == name)


def independent(c: castile.Cascade) -> frozenset[str]:
    """Ranks of the outputs along which nothing but the same coordinate of each tensor is read, such as the rows of a
    product: coordinates that are not sampled may be left out of every tensor."""
    outputs = {r for name in c.outputs for r in output_ranks(c, name)}
    bare = {i.name for p in c.params for i in p.indices if isinstance(i, Rank)}
    tied = {r for p in c.params for i in p.indices if not isinstance(i, Rank) for r in ranks_named(i)}
    return frozenset((outputs & bare) - tied - {r for e in c.einsums for r in _tied(c, e)})


def _tied(c: castile.Cascade, e: Einsum) -> Iterator[str]:
    """Ranks that an Einsum reduces, computes with, or reads a tensor along in another way than by the bare rank."""
    seen: Counter[str] = Counter()
    for node in walk(e.expr):
        match node:
            case Reduce(ranks=ranks):
                yield from ranks
            case Extent(rank=rank):
                yield rank
            case Rank(name=name):
                seen[name] += 1
            case Access(tensor=tensor, indices=indices):
                for axis, index in zip(c.indices_of(tensor), indices, strict=True):
                    if index == axis and isinstance(index, Rank):
                        seen[index.name] -= 1
                    else:
                        yield from ranks_named(axis)
    yield from (r for r, uses in seen.items() if uses)


def sample(c: castile.Cascade, extents: Extents, seed: int) -> dict[str, Any]:
    """Coordinates of outputs by rank, the first and the last along each rank among them."""
    rng = np.random.default_rng(seed)
    free = independent(c)
    few = _pool(c, extents, free)
    kept = {r: few if r in free else extents[r] for r in extents}
    count = _samples(c, {r: min(n, kept[r]) for r, n in extents.items()})
    found = {}
    for r in sorted({r for name in c.outputs for r in output_ranks(c, name)}):
        n = extents[r]
        pool = np.arange(n) if kept[r] >= n else np.array([n - 1, 0, *rng.integers(0, n, few)])[: kept[r]]
        found[r] = rng.choice(pool, count)
        found[r][:2] = [n - 1, pool.min()]
    return found


def _pool(c: castile.Cascade, extents: Extents, free: frozenset[str]) -> int:
    """How many coordinates of each independent rank are sampled: what the oracle then holds and scans is bounded."""
    few = MOST_SAMPLES
    while few > 1:
        kept = {r: min(n, few) if r in free else n for r, n in extents.items()}
        elements = sum(math.prod(shape_of(c, p.name, kept)) for p in c.params)
        if elements <= ORACLE_ELEMENTS and _scanned(c, kept) <= ORACLE_POINTS:
            break
        few //= 2
    return few


def _scanned(c: castile.Cascade, extents: Extents) -> int:
    """Points of the scans, each of which the oracle computes whole."""
    spaces = zip(c.einsums, work(c), strict=True)
    return sum(math.prod(extents[r] for r in w.space) for e, w in spaces if scan_step(e) is not None)


def _samples(c: castile.Cascade, extents: Extents) -> int:
    """How many outputs are compared: fewer where each of them takes the oracle long."""
    points = 0
    for name in c.outputs:
        fixed = set(output_ranks(c, name))
        for e in live_einsums(c.einsums, [name]):
            reduced = [r for n in e.reductions for r in n.ranks]
            own = [] if scan_step(e) is not None else [r for r in e.ranks if r not in fixed]
            each = FOLD_POINTS if any(n.op in c.monoid_of for n in e.reductions) else 1
            points += each * math.prod(extents[r] for r in dict.fromkeys([*own, *reduced]))
    return max(LEAST_SAMPLES, min(MOST_SAMPLES, ORACLE_POINTS // max(1, points)))


def checked_again(kernel: Any, extents: Mapping[str, int], inputs: Mapping[str, Any], outs: Any, seed: int) -> float:
    """What `compare` finds when a kernel has written once more into outputs that were spoilt."""
    every = outs if isinstance(outs, tuple) else (outs,)
    for x in every:
        poison(x)
    kernel(**inputs, out=outs)
    return compare(kernel.cascade, extents, inputs, every, seed)


def alike(ours: tuple[Any, ...], theirs: Any) -> None:
    """Raise `AssertionError` for outputs that differ by more than the rounding of 16-bit numbers explains."""
    import torch

    others = theirs if isinstance(theirs, tuple | list) else (theirs,)
    if len(others) != len(ours):
        raise AssertionError(f"it gives {len(others)} outputs in place of {len(ours)}")
    for x, y in zip(ours, others, strict=True):
        if tuple(x.shape) != tuple(y.shape):
            raise AssertionError(f"its output is {list(y.shape)} in place of {list(x.shape)}")
        # A part after the other, as copies in f32 of all may not fit.
        step = max(1, PART * x.shape[0] // max(1, x.numel())) if x.ndim else 1
        sums = torch.zeros(2, dtype=torch.float64, device=x.device)
        for a, b in zip(x.split(step), y.split(step), strict=True) if x.ndim else [(x, y)]:
            a, b = a.float(), b.float()
            gap = torch.where((a == b) | ((a != a) & (b != b)), 0.0, a - b)
            sums += torch.stack([(t.double() ** 2).sum() for t in (gap, a.nan_to_num(0.0, 0.0, 0.0))])
        apart, size = sums.tolist()
        if not apart <= ALIKE**2 * size:
            raise AssertionError(f"it computes something else: {(apart / size) ** 0.5 if size else apart:.3g} apart")


# To the host


def narrowed(
    c: castile.Cascade, inputs: Mapping[str, Any], at: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The inputs on the host, of independent ranks the sampled coordinates alone; and the sample in these."""
    free = independent(c) & at.keys()
    kept = {r: np.unique(at[r], return_inverse=True) for r in free}
    arrays = {}
    for p in c.params:
        x = inputs[p.name]
        for axis, index in enumerate(p.indices):
            if isinstance(index, Rank) and index.name in free:
                x = _picked(x, [slice(None)] * axis + [kept[index.name][0]])
        arrays[p.name] = numbers(x)
    return arrays, {r: kept[r][1] if r in free else places for r, places in at.items()}


def _picked(x: Any, where: list[Any]) -> Any:
    """Elements of a tensor by indices, as bits: not every type can be indexed on every device."""
    import torch

    bits = x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
    places = [i if isinstance(i, slice) else torch.as_tensor(i, device=x.device) for i in where]
    return bits[tuple(places)].view(x.dtype)


def numbers(x: Any) -> Any:
    """A tensor as NumPy computes with it."""
    if not hasattr(x, "detach"):
        return x
    return x.detach().double().cpu().numpy() if x.is_floating_point() else x.detach().cpu().numpy()
