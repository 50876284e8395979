"""Random graphs through `torch.compile` give what eager gives, forward and backward."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

sys.path.insert(0, str(Path(__file__).resolve().parent))

from random_graphs import disagreement

CI, NIGHTLY, BLOCK = 6, 1000, 3


def check(first: int) -> None:
    found = [f"seed {s}: {text}" for s in range(first, first + BLOCK) if (text := disagreement(s))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("first", range(0, CI, BLOCK))
def test_random_graphs(first: int) -> None:
    check(first)


@pytest.mark.nightly
@pytest.mark.parametrize("first", range(CI, NIGHTLY, BLOCK))
def test_more_random_graphs(first: int) -> None:
    check(first)
