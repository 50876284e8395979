"""Short ways to evaluate a text, and to compare what comes out."""

from __future__ import annotations

from typing import Any

import numpy as np

from castile.ir.evaluate import evaluate
from castile.ir.parse import parse


def run(text: str, at: Any = None, **inputs: Any) -> Any:
    """The first result of a cascade given by its statements, with a signature for the inputs."""
    found = evaluate(parse(text), inputs, at)
    return next(iter(found.values()))


def one(expression: str, params: str, **inputs: Any) -> Any:
    """The value of a scalar expression."""
    return run(f"def f({params}) -> Y:\n    Y = {expression}", **inputs)[()]


def close(a: Any, b: Any) -> None:
    np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)
