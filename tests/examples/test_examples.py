"""Every example cascade against its reference, in float64."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest

import castile

HERE = Path(__file__).resolve().parent
CASCADES = HERE.parents[1] / "examples" / "cascades"
sys.path.insert(0, str(HERE))

import example_attention  # noqa: E402, F401
import example_gemm  # noqa: E402, F401
import example_scan  # noqa: E402, F401
import example_softmax  # noqa: E402, F401
from example_case import CASES  # noqa: E402

NAMES = sorted(path.stem for path in CASCADES.glob("*.cascade"))


def path(name: str) -> Path:
    return CASCADES / f"{name}.cascade"


def test_every_example_has_a_reference() -> None:
    assert sorted(CASES) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_agrees_with_its_reference(name: str) -> None:
    """Casts round in the reference too, so the tolerance is that of float64 everywhere."""
    case = CASES[name]
    given = case.draw()
    cascade = castile.load(path(name))
    results = castile.evaluate(cascade, given)
    assert tuple(results) == cascade.outputs
    for (output, got), wanted in zip(results.items(), case.expected(given), strict=True):
        assert np.all(np.isfinite(wanted)), output
        np.testing.assert_allclose(np.asarray(got, np.float64), wanted, rtol=1e-9, atol=1e-12, strict=True, err_msg=output)


@pytest.mark.parametrize("name", NAMES)
def test_prints_and_parses_back(name: str) -> None:
    cascade = castile.load(path(name))
    assert cascade.name == name
    assert castile.parse(str(cascade)) == cascade
    assert str(castile.parse(str(cascade))) == str(cascade)
