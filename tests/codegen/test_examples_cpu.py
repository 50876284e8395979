"""Every example, derived, mapped and compiled, agrees with the oracle."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from judged import within_bound

import castile
from castile.codegen.runtime import CpuProgram
from castile.ir.dtypes import numpy_dtype
from castile.ir.extents import resolve
from castile.passes.defaults import default_mapping
from castile.passes.derive import derive
from castile.passes.mapped import mapped
from castile.passes.tile import TileProgram, tile_program
from castile.passes.tiling import Tiling

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

import example_attention  # noqa: E402, F401
import example_gemm  # noqa: E402, F401
import example_scan  # noqa: E402, F401
import example_softmax  # noqa: E402, F401
from example_case import CASES  # noqa: E402

CASCADES = EXAMPLES.parents[1] / "examples" / "cascades"
NAMES = sorted(CASES)

# Examples that one run of the compiler takes together, and the share of them that is always tried.
TOGETHER = 8
SOME = NAMES[::6]

# Tiles that divide nothing, and those that are the default.
TILINGS = {"odd": Tiling(3, 2, 4), "default": Tiling()}


def fitting(c: castile.Cascade, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs in the declared types."""
    found = {}
    for p in c.params:
        given = inputs[p.name]
        array = np.asarray(given.detach().double().numpy() if hasattr(given, "detach") else given)
        found[p.name] = array.astype(numpy_dtype(p.dtype)) if p.indices else array[()]
    return found


@cache
def drawn(name: str) -> tuple[castile.Cascade, dict[str, Any]]:
    c = castile.load(CASCADES / f"{name}.cascade")
    return c, fitting(c, CASES[name].draw())


def program(name: str, tiling: str, gauge: str) -> TileProgram:
    c, inputs = drawn(name)
    derivation = derive(c, gauge=gauge)
    steps = {s.einsum.name: s.step for s in derivation.streams if s.einsum is not None and s.step}
    extents = resolve(derivation.cascade, {}, {n: np.shape(x) for n, x in inputs.items()})
    return tile_program(derivation.cascade, TILINGS[tiling], steps=steps, extents=extents)


@cache
def compiled(names: tuple[str, ...], tiling: str, gauge: str) -> dict[str, CpuProgram]:
    return dict(zip(names, CpuProgram.build_all([program(n, tiling, gauge) for n in names]), strict=True))


@cache
def untuned(names: tuple[str, ...]) -> dict[str, CpuProgram]:
    """Examples as they are mapped where nothing was tuned."""
    found = []
    for name in names:
        c, inputs = drawn(name)
        extents = resolve(c, {}, {n: np.shape(x) for n, x in inputs.items()})
        found.append(mapped(c, default_mapping(c, "cpu", extents), extents).program)
    return dict(zip(names, CpuProgram.build_all(found), strict=True))


def beside(name: str, group: list[str]) -> tuple[str, ...]:
    """The examples that are compiled together with one."""
    return tuple(group[group.index(name) // TOGETHER * TOGETHER :][:TOGETHER])


def check(name: str, run: CpuProgram) -> None:
    c, inputs = drawn(name)
    within_bound(c, inputs, run(**inputs))


@pytest.mark.parametrize("name", SOME)
def test_some_examples(name: str) -> None:
    check(name, compiled(beside(name, SOME), "odd", "maximum")[name])


@pytest.mark.parametrize("name", NAMES)
def test_every_example_as_it_is_mapped_untuned(name: str) -> None:
    check(name, untuned(beside(name, NAMES))[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("tiling", "gauge"), [("odd", "maximum"), ("default", "maximum"), ("odd", "exponent")])
def test_every_example(name: str, tiling: str, gauge: str) -> None:
    check(name, compiled(beside(name, NAMES), tiling, gauge)[name])
