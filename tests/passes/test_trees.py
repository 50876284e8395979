"""Derived cascades under random merge trees, in float64 and float32, against the oracle on the original."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import pytest
from corpus import cut, derived, example, float_tensors, inputs, streamed
from trees import tree_evaluate

from castile.ir.cascade import Cascade
from castile.ir.errors import CastileError
from castile.ir.evaluate import evaluate, evaluate_values
from castile.ir.mapping import GAUGES
from castile.ir.types import tensor_types

NAMES = streamed()


def rng_of(*parts: object) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(repr(parts).encode()))


def scaled(by: float) -> Any:
    return lambda c, given, rng: {n: v * by if n in float_tensors(c) else v for n, v in given.items()}


def offset(by: float) -> Any:
    return lambda c, given, rng: {n: v + by if n in float_tensors(c) else v for n, v in given.items()}


def planted(value: float) -> Any:
    """One element of each float tensor in turn becomes a special value."""

    def plant(c: Cascade, given: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        name = str(rng.choice(float_tensors(c)))
        array = np.array(given[name], float)
        array.flat[int(rng.integers(array.size))] = value
        return {**given, name: array}

    return plant


def sized(n: int) -> Any:
    """A streamed rank becomes that short."""

    def shrink(c: Cascade, given: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        rank = derived(c.name).streams[0].ranks[0]
        return cut(c, given, rank, n)

    return shrink


CONDITIONS = {
    "ordinary": lambda c, given, rng: given,
    "times 30": scaled(30.0),
    "times 1e4": scaled(1e4),
    "plus 1e3": offset(1e3),
    "plus 1e4": offset(1e4),
    "inf": planted(np.inf),
    "-inf": planted(-np.inf),
    "nan": planted(np.nan),
    "size 1": sized(1),
    "size 0": sized(0),
}


def worst(c: Cascade, given: dict[str, Any], got: dict[str, Any], tighten: float) -> float:
    """The greatest error as a multiple of its bound, where the original is finite."""
    found = 0.0
    for name, value in evaluate_values(c, given, track=True).items():
        if value.array.dtype.kind != "f" and not all(np.isfinite(np.asarray(v, float)).all() for v in given.values()):
            continue  # the place of a maximum among NaNs is nobody's promise
        want = value.array.astype(float)
        bound = np.broadcast_to(value.slack(), want.shape) * tighten + 1e-300
        with np.errstate(all="ignore"):
            error = np.abs(np.asarray(got[name], float) - want)
            ratio = np.where((error == 0) | ~np.isfinite(want) | np.isinf(bound), 0.0, error / bound)
        found = max(found, float(np.max(np.where(np.isnan(ratio), np.inf, ratio), initial=0.0)))
    return found


def rounds(c: Cascade) -> bool:
    types = tensor_types(c)
    return any(types[e.name] not in ("f32", "f64") for e in c.einsums) or "bf16(" in str(c)


@pytest.mark.parametrize("gauge", GAUGES)
@pytest.mark.parametrize("name", NAMES)
def test_any_tree_agrees_with_the_oracle(name: str, gauge: str) -> None:
    c = example(name)
    d = derived(name, "full", gauge)
    floats = float_tensors(c)
    bad = []
    for condition, change in CONDITIONS.items():
        rng = rng_of(name, gauge, condition)
        given = {n: np.float32(v) if n in floats else v for n, v in change(c, inputs(name), rng).items()}
        try:
            evaluate_values(c, given)
        except CastileError:
            continue  # the cascade has no value there: argmax of nothing, an index without its place
        for precision, tighten in (("f64", 1.0 if rounds(c) else 2.0**-20), ("f32", 1.0)):
            # Over an empty rank the text says 0 / extent(k), as the original's does: the flag of an empty sum decides.
            empty = condition == "size 0"
            got = evaluate(d.cascade, given) if empty else tree_evaluate(d.cascade, given, rng, precision)
            ratio = worst(c, given, got, tighten)
            if not ratio <= 1.0:
                bad.append(f"{condition} in {precision}: {ratio:.3g} of the bound")
    assert not bad, "\n".join(bad)
