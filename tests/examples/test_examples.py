"""Every example cascade against its reference, in float64."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest

import castile
from castile.passes.count import count_passes

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


def claims(cascade: castile.Cascade) -> list[tuple[str, int, int]]:
    """The rank, passes as written and passes to be derived that the docstring claims."""
    found = re.findall(r"over (\w+): (\d+) -> (\d+)", " ".join(cascade.doc.split()))
    return [(rank, int(n), int(k)) for rank, n, k in found]


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
        assert np.shape(got) == wanted.shape, output
        np.testing.assert_allclose(np.asarray(got, np.float64), wanted, rtol=1e-9, atol=1e-12, err_msg=output)


@pytest.mark.parametrize("name", NAMES)
def test_prints_and_parses_back(name: str) -> None:
    cascade = castile.load(path(name))
    assert cascade.name == name
    assert castile.parse(str(cascade)) == cascade
    assert str(castile.parse(str(cascade))) == str(cascade)


@pytest.mark.parametrize("name", NAMES)
def test_is_written_with_the_passes_it_claims(name: str) -> None:
    cascade = castile.load(path(name))
    counted = dict(count_passes(cascade))
    for rank, before, after in claims(cascade):
        assert counted[rank] == before >= after, rank


def test_the_readme_repeats_the_docstrings() -> None:
    """Each file has one row, and the row claims the passes that the file claims."""
    table = (CASCADES / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[(\w+)\]\(\1\.cascade\) \| [^|]+ \| ([^|]+) \|$", table, re.M)
    assert sorted(name for name, _ in rows) == NAMES
    for name, passes in rows:
        cascade = castile.load(path(name))
        none = "> 1" if "more than one pass" in " ".join(cascade.doc.split()) else "–"
        assert passes == (", ".join(f"{rank}: {n} → {k}" for rank, n, k in claims(cascade)) or none), name
