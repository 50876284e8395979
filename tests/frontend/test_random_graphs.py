"""Random graphs and models through `torch.compile` give what eager gives, forward and backward."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

sys.path.insert(0, str(Path(__file__).resolve().parent))

from random_graphs import compared, disagreement
from random_tokens import Tokens

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


def check_tokens(seed: int) -> None:
    model = Tokens(seed)
    assert not compared(model, model, model.inputs, grad=seed % 2 == 1, dynamic=seed % 5 == 3)


@pytest.mark.parametrize("seed", range(4))
def test_random_tokens(seed: int) -> None:
    check_tokens(seed)


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(4, 200))
def test_more_random_tokens(seed: int) -> None:
    check_tokens(seed)
