"""Random cascades under random mappings and knobs, and gradients of examples, as Triton under its interpreter."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from judged import within_bound

pytest.importorskip("triton")
pytest.importorskip("torch")

from test_gradients_cpu import SMOOTH, gradient
from test_random_cpu import Drawn, disagreement, draw
from test_random_gradients_cpu import draw_gradient, unless_infinite

import castile
from castile.codegen.triton_interpret import InterpretProgram
from castile.ir.errors import InputError
from castile.ir.extents import resolve
from castile.ir.mapping import KNOBS
from castile.passes.mapped import mapped

SOME, MANY = 8, 400
GRADIENTS, MANY_GRADIENTS = 24, 720


def failure(d: Drawn | None) -> str:
    """Where Triton is off under a drawn mapping and random knobs; "" where nowhere."""
    if d is None:
        return ""
    rng = random.Random(d.seed)
    knobs = {k.name: rng.choice(k.values) for k in KNOBS.values() if k.target == "gpu" and rng.random() < 0.4}
    knobs |= {k: rng.choice(KNOBS[k].values) for k in ("hold", "align", "group") if rng.random() < 0.5}
    tiles = {r: min(8, d.program.mapping.tiles.get(r, 4)) for r in d.left.ranks}
    mapping = replace(d.program.mapping, tiles=tiles, knobs=knobs)
    program = mapped(d.left, mapping, {r: d.extents[r] for r in d.left.ranks})
    try:
        run = InterpretProgram.build(program.program, mapping)
    except InputError:  # an operation over more elements than Triton takes
        return ""
    text = disagreement(d, run)
    return f"seed {d.seed} under {mapping}: {text}" if text else ""


@pytest.mark.parametrize("seed", range(SOME))
def test_random_cascades(seed: int) -> None:
    assert not failure(draw(seed))


@pytest.mark.slow
@pytest.mark.parametrize("first", range(SOME, MANY, 8))
def test_many_random_cascades(first: int) -> None:
    assert not [text for seed in range(first, first + 8) if (text := failure(draw(seed)))]


@pytest.mark.parametrize("first", range(0, GRADIENTS, 24))
def test_gradients_of_random_cascades(first: int) -> None:
    assert not gradient_failures(range(first, first + 24))


@pytest.mark.slow
@pytest.mark.parametrize("first", range(GRADIENTS, MANY_GRADIENTS, 24))
def test_gradients_of_many_random_cascades(first: int) -> None:
    assert not gradient_failures(range(first, first + 24))


def gradient_failures(seeds: range) -> list[str]:
    drawn = [d for seed in seeds if (d := draw_gradient(seed)) is not None]
    return [text for d in drawn if (text := unless_infinite(d, failure(d)))]


@pytest.mark.slow
@pytest.mark.parametrize("name", SMOOTH)
def test_gradients_of_the_examples(name: str) -> None:
    g, given = gradient(name, ()) or pytest.fail("it has a gradient")
    got = castile.compile(g, "interpret", resolve(g, {}, {n: np.shape(x) for n, x in given.items()}))(**given)
    within_bound(g, given, got)
