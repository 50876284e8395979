"""The example cascades with inputs, for tests of the passes."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

import castile
from castile.ir.cascade import Cascade, Rank
from castile.ir.dtypes import DTYPES
from castile.passes.derive import Derivation, derive

ROOT = Path(__file__).resolve().parents[2]
CASCADES = ROOT / "examples" / "cascades"
sys.path.insert(0, str(ROOT / "tests" / "examples"))

import example_attention  # noqa: E402, F401
import example_gemm  # noqa: E402, F401
import example_scan  # noqa: E402, F401
import example_softmax  # noqa: E402, F401
from example_case import CASES  # noqa: E402

NAMES = sorted(CASES)


@cache
def example(name: str) -> Cascade:
    return castile.load(CASCADES / f"{name}.cascade")


@cache
def derived(name: str, level: str = "full", gauge: str = "maximum") -> Derivation:
    return derive(example(name), level, gauge)


def streamed() -> list[str]:
    """The examples that derive a monoid."""
    return [n for n in NAMES if derived(n).streams]


def inputs(name: str) -> dict[str, Any]:
    return dict(CASES[name].draw())


def float_tensors(c: Cascade) -> list[str]:
    return [p.name for p in c.params if p.indices and DTYPES[p.dtype].is_float]


def cut(c: Cascade, given: dict[str, Any], rank: str, size: int) -> dict[str, Any]:
    """The inputs with the first ``size`` places of a rank alone."""
    result = dict(given)
    for p in c.params:
        for axis, index in enumerate(p.indices):
            if index == Rank(rank):
                result[p.name] = np.take(np.asarray(result[p.name]), range(size), axis)
    return result
