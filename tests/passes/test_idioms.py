"""Mixtures of what people write keep their meaning in every form."""

from __future__ import annotations

import numpy as np
import pytest
from idioms import Writer, drawn
from test_random import both_ways

from castile.ir.evaluate import evaluate
from castile.ir.mapping import ALTERNATIVES
from castile.passes.derive import derive

# One in a thousand others finds ties, or exponentials of constants: their masks are conditions like others then.
CI, NIGHTLY, BLOCK = range(1000, 1250, 25), range(1250, 1700, 25), 25


def disagreement(seed: int) -> str:
    c = Writer(seed).cascade()
    if c is None:
        return ""
    given = drawn(c, seed)
    near = {n: x if x.dtype == bool else x * (1 + 1e-9) for n, x in given.items()}
    with np.errstate(all="ignore"):
        want, moved = evaluate(c, given), evaluate(c, near)
        if any(x.dtype == bool and (x != moved[n]).any() for n, x in want.items()):
            return ""  # a comparison of equals
        for level, gauge in ALTERNATIVES:
            d = derive(c, level, gauge)
            for found in both_ways(d, given):
                for name, x in want.items():
                    got, finite = np.asarray(found[name]), np.isfinite(x)
                    if not np.allclose(got[finite], x[finite], 1e-5, 1e-7):
                        return f"{level} {gauge} {name}: {got} for {x}"
    return ""


def check(first: int) -> None:
    found = [f"seed {s}: {text}" for s in range(first, first + BLOCK) if (text := disagreement(s))]
    assert not found, "\n".join(found[:3])


@pytest.mark.parametrize("first", CI)
def test_idioms(first: int) -> None:
    check(first)


@pytest.mark.nightly
@pytest.mark.parametrize("first", NIGHTLY)
def test_more_idioms(first: int) -> None:
    check(first)
