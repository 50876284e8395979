"""Gradients of random cascades under random mappings: kernels compute what the oracle does, within the bound."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_random_cpu import Drawn, disagreement, under_a_mapping

from castile.codegen.cpp import print_cpp
from castile.codegen.runtime import CpuProgram
from castile.ir.errors import VerifyError
from castile.ir.evaluate import evaluate_values

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "passes"))

from gradients import random_gradient
from interpreted import interpreted

# Seeds, of which a third give a gradient: those that the tile interpreter takes and those that are compiled, always
# and with -m slow.
TOGETHER = 24
INTERPRETED, MANY_INTERPRETED = 96, 4800
COMPILED, MANY_COMPILED = 24, 2400


def draw_gradient(seed: int) -> Drawn | None:
    """The gradient of a random cascade, every fourth with its normalisers saved, under a mapping."""
    found = random_gradient(seed, saved="lse" if seed % 4 == 3 else "")
    return None if found is None else under_a_mapping(seed, *found)


def unless_infinite(d: Drawn, text: str) -> str:
    """A disagreement; "" for an infinity or a NaN where the oracle meets one that no mask made.

    A factor leaves a sum (docs/algebra.md, section 13): a NaN stays one where the sum is empty. Derivatives at poles
    give such factors much more often than cascades do.
    """
    if not re.search(r"\w+: (nan|-?inf) for ", text):
        return text
    c = d.cascade
    everything = replace(c, outputs=tuple(o.name for e in c.einsums for o in e.outputs))
    values = evaluate_values(everything, d.inputs).values()
    return "" if any((~np.isfinite(v.array.astype(float)) & ~v.flag()).any() for v in values) else text


def drawn_of(seeds: range) -> list[Drawn]:
    return [d for seed in seeds if (d := draw_gradient(seed)) is not None]


def failures(drawn: list[Drawn], programs: list[Any]) -> list[str]:
    texts = ((d, unless_infinite(d, disagreement(d, run))) for d, run in zip(drawn, programs, strict=True))
    return [f"seed {d.seed} under {d.program.mapping}: {text}" for d, text in texts if text]


def interpreter(d: Drawn) -> Any:
    """The tile program of a cascade, to be called as a compiled one is."""

    def run(**inputs: Any) -> tuple[np.ndarray, ...]:
        return tuple(interpreted(d.program.program, inputs, d.program.sizes).values())

    return run


def interpret(first: int) -> None:
    drawn = drawn_of(range(first, first + TOGETHER))
    assert drawn
    assert not failures(drawn, [interpreter(d) for d in drawn])


def compile_and_run(first: int) -> None:
    drawn = [d for d in drawn_of(range(first, first + TOGETHER)) if fits(d)]
    assert drawn
    assert not failures(drawn, CpuProgram.build_all([d.program.program for d in drawn]))


def fits(d: Drawn) -> bool:
    """Whether a thread holds the tiles: those of five ranks that are 64 each it does not."""
    try:
        print_cpp(d.program.kernels, d.cascade.name)
    except VerifyError:
        return False
    return True


@pytest.mark.parametrize("first", range(0, INTERPRETED, TOGETHER))
def test_tile_programs(first: int) -> None:
    interpret(first)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(INTERPRETED, MANY_INTERPRETED, TOGETHER))
def test_many_tile_programs(first: int) -> None:
    interpret(first)


@pytest.mark.parametrize("first", range(0, COMPILED, TOGETHER))
def test_kernels(first: int) -> None:
    compile_and_run(first)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(COMPILED, MANY_COMPILED, TOGETHER))
def test_many_kernels(first: int) -> None:
    compile_and_run(first)
