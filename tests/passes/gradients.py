"""Gradients of random cascades, with inputs and adjoints."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from castile.ir.cascade import Cascade
from castile.ir.dtypes import DTYPES
from castile.ir.errors import CastileError
from castile.ir.evaluate import evaluate
from castile.ir.extents import resolve, shape_of
from castile.passes.grad import forward, grad

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "ir"))

from strategies import ALL, Features, random_case


def random_gradient(seed: int, features: Features = ALL, saved: str = "") -> tuple[Cascade, dict[str, Any]] | None:
    """The gradient of a random cascade by all that it has one by, with inputs; None where there is nothing such.

    ``saved`` is that of `grad`.
    """
    case = random_case(seed, features, einsums=4)
    c = case.cascade
    floats = [p.name for p in c.params if p.indices and DTYPES[p.dtype].is_float and DTYPES[p.dtype].bits >= 16]
    keep = (saved,) if saved else ()
    try:
        wrt = [n for n in floats if _depends(c, n)]
        g = grad(c, wrt, keep)
        known = {**case.inputs, **evaluate(forward(c, wrt, keep), case.inputs)}
        extents = resolve(c, {}, {n: np.shape(x) for n, x in case.inputs.items()})
        rng = np.random.default_rng(seed)
        adjoints = [p.name for p in g.params if p.name not in known]
        known |= {n: rng.integers(-8, 9, shape_of(g, n, extents)) / 8 for n in adjoints}
        given = {p.name: known[p.name] for p in g.params}
        evaluate(g, given)
    except CastileError:
        return None  # nothing to differentiate by, or a guarded read that the cascade itself has out of bounds
    return g, given


def _depends(c: Cascade, name: str) -> bool:
    try:
        grad(c, [name])
    except CastileError:
        return False
    return True
