"""The gradient of every example, mapped and compiled, agrees with the oracle."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from test_examples_cpu import NAMES, drawn

import castile
from castile.codegen.runtime import CpuProgram
from castile.ir.bound import judge
from castile.ir.dtypes import numpy_dtype
from castile.ir.evaluate import evaluate
from castile.ir.extents import resolve
from castile.passes.grad import forward, grad
from castile.passes.mapped import Mapped, default_mapping, mapped

# Its only output is a place, which has no derivative.
SMOOTH = [n for n in NAMES if n not in ("argmax", "argmax_softmax", "gemm_argmax")]

# Examples that one run of the compiler takes together, and those whose saved log-sum-exp is taken too.
TOGETHER = 6
SAVED = [n for n in SMOOTH if n.startswith("attention") and n != "attention_dq"]
SOME = SMOOTH[7::24]


@cache
def gradient(name: str, saved: tuple[str, ...]) -> tuple[castile.Cascade, dict[str, Any]] | None:
    """The gradient of an example with inputs in the declared types; None where it has none or nothing to save."""
    c, values = drawn(name)
    try:
        g, f = grad(c, saved=saved), forward(c, saved=saved)
    except castile.CastileError:
        return None
    values = {**values, **evaluate(f, values)}
    rng = np.random.default_rng(len(name))
    for p in g.params:
        if p.name not in values:
            output = next(o for o in c.outputs if p.name in (f"d{o}", f"d{o}2"))
            values[p.name] = rng.standard_normal(values[output].shape)
    given = {}
    for p in g.params:
        array = np.asarray(values[p.name]).astype(numpy_dtype(p.dtype))
        given[p.name] = array if p.indices else array[()]
    return g, given


def program(g: castile.Cascade, given: dict[str, Any]) -> Mapped:
    extents = resolve(g, {}, {n: np.shape(x) for n, x in given.items()})
    return mapped(g, default_mapping(g, "cpu", extents), extents)


def test_some_gradients() -> None:
    check(SOME, ())


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, len(SMOOTH), TOGETHER))
def test_gradients(first: int) -> None:
    check(SMOOTH[first : first + TOGETHER], ())


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, len(SAVED), TOGETHER))
def test_gradients_with_what_was_saved(first: int) -> None:
    check(SAVED[first : first + TOGETHER], ("lse",))


def check(names: list[str], saved: tuple[str, ...]) -> None:
    cases = {n: found for n in names if (found := gradient(n, saved)) is not None}
    programs = CpuProgram.build_all([program(g, given).program for g, given in cases.values()])
    faults = []
    for (name, (g, given)), run in zip(cases.items(), programs, strict=True):
        got = run(**given)
        results = dict(zip(g.outputs, got if isinstance(got, tuple) else (got,), strict=True))
        faults += [f"{name}: {j}" for j in judge(g, given, results) if not j.ok]
    assert not faults
