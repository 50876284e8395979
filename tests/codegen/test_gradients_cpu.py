"""The gradient of every example, mapped and compiled, agrees with the oracle."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_examples_cpu import NAMES, drawn

import castile
from castile.codegen.runtime import CpuProgram
from castile.ir.bound import judge
from castile.ir.dtypes import numpy_dtype
from castile.ir.evaluate import evaluate
from castile.ir.extents import resolve, shape_of
from castile.passes.defaults import default_mapping
from castile.passes.grad import forward, grad
from castile.passes.mapped import Mapped, mapped

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "passes"))

from interpreted import interpreted

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


def program(g: castile.Cascade, given: dict[str, Any], **knobs: int) -> Mapped:
    extents = resolve(g, {}, {n: np.shape(x) for n, x in given.items()})
    plain = default_mapping(g, "cpu", extents)
    return mapped(g, replace(plain, knobs={**plain.knobs, **knobs}), extents)


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


@pytest.mark.slow
@pytest.mark.parametrize("saved", [(), ("lse",)], ids=["", "saved"])
def test_gradients_that_are_scattered(saved: tuple[str, ...]) -> None:
    """Small examples have too few rows to scatter anything by themselves."""
    found = {n: x for n in SMOOTH if (x := gradient(n, saved)) is not None}
    names = [n for n, x in found.items() if program(*x).kernels != program(*x, scatter=1).kernels]
    assert names
    for first in range(0, len(names), TOGETHER):
        check(names[first : first + TOGETHER], saved, scatter=1)


@pytest.mark.parametrize("extents", [{"q": 0, "k": 0}, {"q": 1, "k": 1}, {"b": 1, "h": 8, "q": 263, "k": 263}], ids=str)
def test_scattered_gradients_at_odd_extents(extents: dict[str, int]) -> None:
    g, _ = gradient("attention_causal", ("lse",)) or pytest.fail("attention has a gradient")
    sizes = resolve(g, {**dict.fromkeys(g.ranks, 5), **extents})
    rng = np.random.default_rng(1)
    given = {}
    for p in g.params:
        array = np.asarray(rng.standard_normal(shape_of(g, p.name, sizes))).astype(numpy_dtype(p.dtype))
        given[p.name] = array if p.indices else array[()]
    run = CpuProgram.build(program(g, given, scatter=1).program)
    assert [p.name for p in run.scratch] == ["D", "dQ_sum"]
    results = dict(zip(g.outputs, run(**given), strict=True))
    assert all(j.ok for j in judge(g, given, results))


UNSCALED = """def attention(Q: f32[h, q, d], K: f32[h, k, d], V: f32[h, k, f]) -> O:
    S[h, q, k] = sum[d](Q[h, q, d] * K[h, k, d])
    M[h, q] = max[k](S[h, q, k])
    P[h, q, k] = exp(S[h, q, k] - M[h, q])
    L[h, q] = sum[k](P[h, q, k])
    O[h, q, f] = sum[k](P[h, q, k] / L[h, q] * V[h, k, f])
"""


@pytest.mark.parametrize("lie", ["along", "across", "apart"])
def test_scattered_gradients_wherever_they_go(lie: str) -> None:
    """Gradients of queries that are added to where they lie, if their rows do along memory."""
    g = grad(castile.parse(UNSCALED), saved=("lse",))
    sizes = resolve(g, {"h": 8, "q": 200, "k": 270, "d": 20, "f": 20})
    rng = np.random.default_rng(3)
    given = {p.name: rng.standard_normal(shape_of(g, p.name, sizes)).astype(np.float32) for p in g.params}
    run = CpuProgram.build(program(g, given, scatter=1).program)
    assert "_there ? dQ" in run.source
    room = {n: np.full((*shape_of(g, n, sizes), 2), 7, np.float32) for n in g.outputs}
    out = {n: x[..., 0] if lie == "apart" else np.empty(x.shape[:-1], np.float32) for n, x in room.items()}
    if lie == "across":
        out = {n: np.empty((x.shape[0], x.shape[2], x.shape[1]), np.float32).transpose(0, 2, 1) for n, x in out.items()}
    run(**given, out=tuple(out.values()))
    assert all(j.ok for j in judge(g, given, out))
    assert all(np.all(x[..., 1] == 7) for x in room.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", SMOOTH)
def test_gradients_mapped_for_more_rows(name: str) -> None:
    """Examples are small, and with eight rows and more other Einsums share a kernel: so they are mapped for 16."""
    g, given = gradient(name, ()) or pytest.fail("it has a gradient")
    extents = resolve(g, {}, {n: np.shape(x) for n, x in given.items()})
    large = {r: max(16, n) for r, n in extents.items()}
    kernels = mapped(g, default_mapping(g, "cpu", large), large).program
    with np.errstate(all="ignore"):
        results = interpreted(kernels, given, program(g, given).sizes)
    assert all(j.ok for j in judge(g, given, results))


def check(names: list[str], saved: tuple[str, ...], **knobs: int) -> None:
    cases = {n: found for n in names if (found := gradient(n, saved)) is not None}
    programs = CpuProgram.build_all([program(g, given, **knobs).program for g, given in cases.values()])
    faults = []
    for (name, (g, given)), run in zip(cases.items(), programs, strict=True):
        got = run(**given)
        results = dict(zip(g.outputs, got if isinstance(got, tuple) else (got,), strict=True))
        faults += [f"{name}: {j}" for j in judge(g, given, results) if not j.ok]
    assert not faults
