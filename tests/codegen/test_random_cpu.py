"""Random cascades under random mappings: a kernel computes what the oracle does, within the bound."""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping as Dict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from castile.codegen.runtime import CpuProgram
from castile.ir.cascade import Cascade
from castile.ir.dtypes import numpy_dtype
from castile.ir.errors import CastileError
from castile.ir.evaluate import evaluate, evaluate_values
from castile.ir.extents import resolve
from castile.ir.mapping import FORMS, GAUGES, Mapping
from castile.passes.defaults import default_mapping
from castile.passes.inbounds import check_reads
from castile.passes.mapped import Mapped, mapped
from castile.passes.vacant import vacated

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "ir"))

from strategies import hides_nan, random_case

# Cascades that one run of the compiler takes together; how many are tried always, and with -m slow.
TOGETHER, SOME, MANY = 12, 36, 600


@dataclass(frozen=True)
class Drawn:
    """A random cascade, and what is ``left`` of it where ranks are empty, under a mapping."""

    seed: int
    cascade: Cascade
    left: Cascade
    inputs: Dict[str, Any]
    extents: Dict[str, int]
    program: Mapped


def draw(seed: int) -> Drawn | None:
    """A cascade with inputs and a mapping; None where its own reads lie out of bounds."""
    case = random_case(seed)
    return under_a_mapping(seed, case.cascade, case.inputs)


def under_a_mapping(seed: int, c: Cascade, values: Dict[str, Any]) -> Drawn | None:
    """A cascade with its inputs in the declared types and a random mapping; None where its reads lie out of bounds."""
    rng, inputs = random.Random(seed), {}
    for p in c.params:
        with np.errstate(all="ignore"):
            array = np.asarray(values[p.name]).astype(numpy_dtype(p.dtype))
        inputs[p.name] = array if p.indices else array[()]
    try:
        evaluate(c, inputs)
    except CastileError:
        return None
    extents = resolve(c, {}, {p.name: np.shape(inputs[p.name]) for p in c.params})
    check_reads(c, extents)
    left = vacated(c, {r for r, n in extents.items() if n == 0})
    sizes = {r: extents[r] for r in left.ranks}
    tiles = {r: rng.choice([1, 2, 3, 4, 5, 8, 16, 64]) for r in left.ranks if rng.random() < 0.7}
    knobs = dict(default_mapping(left, "cpu", sizes).knobs) if rng.random() < 0.5 else {}
    mapping = Mapping(rng.choice([*FORMS, "full"]), rng.choice(GAUGES), tiles, {}, knobs)
    return Drawn(seed, c, left, inputs, extents, mapped(left, mapping, sizes))


def disagreement(d: Drawn, run: CpuProgram) -> str:
    """Where the kernel is off by more than the bound though the oracle is finite; "" where nowhere."""
    try:
        got = run(**d.inputs)
    except CastileError as error:
        return str(error)
    results = got if isinstance(got, tuple) else (got,)
    wanted = evaluate_values(d.cascade, d.inputs, track=True)
    for (name, value), result in zip(wanted.items(), results, strict=True):
        want, found = value.array.astype(float), np.asarray(result).astype(float)
        slack = np.broadcast_to(value.slack(), want.shape)
        with np.errstate(all="ignore"):
            good = (np.abs(found - want) <= slack) | ~np.isfinite(want) | np.isinf(slack)
        if not good.all() and not hides_nan(d.cascade, d.inputs, name):
            return f"{name}: {found[~good].flat[0]} for {want[~good].flat[0]}"
    return ""


def failures(seeds: range) -> list[str]:
    drawn = [d for seed in seeds if (d := draw(seed)) is not None]
    programs = CpuProgram.build_all([d.program.program for d in drawn])
    texts = ((d, disagreement(d, run)) for d, run in zip(drawn, programs, strict=True))
    return [f"seed {d.seed} under {d.program.mapping}: {text}" for d, text in texts if text]


@pytest.mark.parametrize("first", range(0, SOME, TOGETHER))
def test_random_cascades(first: int) -> None:
    assert not failures(range(first, first + TOGETHER))


@pytest.mark.slow
@pytest.mark.parametrize("first", range(SOME, MANY, TOGETHER))
def test_many_random_cascades(first: int) -> None:
    assert not failures(range(first, first + TOGETHER))
