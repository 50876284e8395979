"""Cascades at sizes, mapped and built in one library for a variant of the CPU."""

from __future__ import annotations

from collections.abc import Mapping

import castile
from castile.codegen import compiler
from castile.codegen.runtime import CpuProgram
from castile.ir.extents import resolve
from castile.ir.mapping import Mapping as Tuned
from castile.passes.mapped import Mapped, default_mapping, mapped

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
