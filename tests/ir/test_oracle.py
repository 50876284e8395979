"""The oracle against the naive interpreter, which shares no code with it, on random cascades."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from naive import Meaningless, Naive
from strategies import Case, cases, random_case

from castile.ir.bound import error_bound
from castile.ir.errors import EvaluationError
from castile.ir.evaluate import evaluate
from castile.ir.extents import resolve


def check(case: Case) -> bool:
    """Both oracles agree, value by value, or both find the cascade meaningless on these inputs (then False)."""
    c, inputs = case.cascade, case.inputs
    assert resolve(c, {}, {name: x.shape for name, x in inputs.items()}) == case.extents
    try:
        wanted = Naive(c, inputs, case.extents).tensors
    except Meaningless:
        with pytest.raises(EvaluationError):
            evaluate(c, inputs)
        return False
    bounds = None
    for name, got in evaluate(c, inputs).items():
        want = np.array([wanted[name][at][0] for at in np.ndindex(got.shape)]).reshape(got.shape)
        if got.dtype.kind != "f":
            assert want.size == 0 or want.dtype == got.dtype
            np.testing.assert_array_equal(got, want)
            continue
        with np.errstate(all="ignore"):
            far = np.abs(got - want) > 1e-9 * np.maximum(np.abs(want), 1)
            far |= ~((got == want) | (np.isnan(got) & np.isnan(want)) | np.isfinite(got - want))
            if far.any():
                # Sums in another order may fall to the other side of a rounding or a comparison.
                bounds = bounds or error_bound(c, inputs)
                far &= ~((np.abs(got - want) <= bounds[name]) | np.isinf(bounds[name]))
        assert not far.any(), f"{name}: {got[far]} is not {want[far]}"
    return True


@settings(max_examples=150)
@given(cases())
def test_agrees_with_the_naive_interpreter(case: Case) -> None:
    check(case)


@settings(max_examples=50)
@given(cases(nonfinite=True))
def test_agrees_with_it_on_infinities_and_nan(case: Case) -> None:
    check(case)


def test_agrees_with_it_on_larger_cascades() -> None:
    meant = [check(random_case(seed, nonfinite=seed % 3 == 0)) for seed in range(500)]
    assert np.mean(meant) > 0.9


@pytest.mark.nightly
def test_agrees_with_it_on_many_cascades() -> None:
    for seed in range(500, 50_000):
        check(random_case(seed, nonfinite=seed % 3 == 0))


def sampled(case: Case, rng: np.random.Generator) -> None:
    """The samples of every output are the elements of the whole."""
    c, extents = case.cascade, case.extents
    try:
        whole = evaluate(c, case.inputs)
    except EvaluationError:
        return
    ranks = {r for name in c.outputs for o in c.einsum_of[name].outputs if o.name == name for r in o.ranks}
    if any(extents[r] == 0 for r in ranks):
        return
    at = {r: rng.integers(0, extents[r], 4) for r in ranks}
    for name, got in evaluate(c, case.inputs, at).items():
        own = next(o.ranks for o in c.einsum_of[name].outputs if o.name == name)
        want = whole[name][tuple(at[r] for r in own)] if own else np.full(4 if ranks else 1, whole[name])
        assert got.dtype == want.dtype
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9)


@settings(max_examples=80)
@given(cases(nonfinite=True))
def test_a_sample_is_part_of_the_whole(case: Case) -> None:
    sampled(case, np.random.default_rng(0))


def test_samples_of_larger_cascades_are_part_of_the_whole() -> None:
    rng = np.random.default_rng(1)
    for seed in range(1000, 1200):
        sampled(random_case(seed), rng)
