"""Cascades at sizes, mapped and built in one library for a variant of the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

import castile
from castile.codegen import compiler
from castile.codegen.runtime import CpuProgram
from castile.ir.dtypes import numpy_dtype
from castile.ir.extents import resolve, shape_of
from castile.ir.mapping import Mapping as Tuned
from castile.passes.defaults import default_mapping
from castile.passes.mapped import Mapped, mapped

# The text of a cascade, extents, and a mapping, or None for the default one.
Case = tuple[str, dict[str, int], Tuned | None]


def program_of(case: Case) -> Mapped:
    text, sizes, mapping = case
    c = castile.parse(text)
    extents = resolve(c, sizes)
    return mapped(c, mapping or default_mapping(c, "cpu", extents), extents)


def built(cases: Mapping[str, Case], variant: str) -> dict[str, CpuProgram]:
    """All cases, compiled with ``-march=variant``, or for this machine if that is "native"."""
    before, names = compiler.VARIANTS, sorted(cases)
    try:
        if variant != "native":
            compiler.VARIANTS = ((f"-march={variant}", "-fopenmp"), (f"-march={variant}", "-fopenmp-simd", "-pthread"))
        return dict(zip(names, CpuProgram.build_all([program_of(cases[n]).program for n in names]), strict=True))
    finally:
        compiler.VARIANTS = before


def drawn(c: castile.Cascade, sizes: Mapping[str, int], ranges: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    """Random inputs: integers of every size there is, or from a range by name, its end excluded."""
    rng = np.random.default_rng(3)
    given: dict[str, Any] = {}
    for p in c.params:
        shape, dtype = shape_of(c, p.name, resolve(c, sizes)), numpy_dtype(p.dtype)
        if np.issubdtype(dtype, np.integer):
            low, high = ranges.get(p.name, (int(np.iinfo(dtype).min), int(np.iinfo(dtype).max) + 1))
            given[p.name] = rng.integers(low, high, shape, dtype=dtype)
        else:
            given[p.name] = np.asarray(rng.standard_normal(shape)).astype(dtype)
    return given
