"""The surrogates of the search: slopes, what each kernel generalises, and agreement with a kernel written out."""

from __future__ import annotations

import numpy as np
import pytest

from castile.autotune.surrogate import GaussianProcess, Points, encode

RNG = np.random.default_rng(3)
COLUMNS = [
    RNG.choice([16, 32, 48, 64], 30).tolist(),
    RNG.choice([0, 1], 30).tolist(),
    RNG.choice(["a", "b", "c"], 30).tolist(),
    RNG.choice([1, 2, 4, 8], 30).tolist(),
]
POINTS = encode(COLUMNS)
Y = np.log(np.array(COLUMNS[0])) + np.array(COLUMNS[1]) + 0.1 * RNG.standard_normal(30)


def process(factored: bool, points: Points = POINTS) -> GaussianProcess:
    return GaussianProcess(points.places, factored)


@pytest.mark.parametrize("factored", [False, True])
def test_slopes_of_the_loss(factored: bool) -> None:
    g = process(factored)
    theta = g._theta + 0.1 * RNG.standard_normal(len(g._theta))
    _, slopes = g._loss(theta, POINTS.codes, Y)
    steps = 1e-4 * np.eye(len(theta))
    numeric = [(g._loss(theta + s, POINTS.codes, Y)[0] - g._loss(theta - s, POINTS.codes, Y)[0]) / 2e-4 for s in steps]
    np.testing.assert_allclose(slopes, numeric, rtol=1e-5, atol=1e-5)


def test_a_joint_kernel_is_of_the_summed_distance() -> None:
    g = process(factored=False)
    weights = iter(np.exp(-2 * g._theta[:-2]))
    squared = np.zeros((30, 30))
    for place, codes in zip(POINTS.places, POINTS.codes.T, strict=True):
        for order in place[codes].T:
            squared += next(weights) * (order[:, None] - order[None]) ** 2
        squared += next(weights) * (codes[:, None] != codes[None])
    r = np.sqrt(5 * squared)
    shape = g._shape(g._theta, POINTS.codes, POINTS.codes)[0]
    np.testing.assert_allclose(shape, (1 + r + r * r / 3) * np.exp(-r), atol=1e-12)


@pytest.mark.parametrize("factored", [False, True])
def test_what_was_measured_is_predicted_and_doubted_least(factored: bool) -> None:
    g = process(factored)
    g.fit(POINTS.codes, Y)
    known, doubt = g.predict(POINTS.codes, Y, POINTS.codes)
    assert np.corrcoef(known, Y)[0, 1] > 0.95
    far = np.array([[c.max() - p for c, p in zip(POINTS.codes.T, POINTS.codes[0], strict=True)]])
    assert g.predict(POINTS.codes[:1], Y[:1], far)[1] > g.predict(POINTS.codes[:1], Y[:1], POINTS.codes[:1])[1]
    assert doubt.min() > 0


def test_a_factored_kernel_learns_one_parameter_from_all_configurations() -> None:
    """Of a sum of what parameters do by themselves, few configurations say what all the others are."""
    grid = np.array(np.meshgrid(*[range(5)] * 4)).reshape(4, -1)
    points = encode(grid.tolist())
    truth = np.sum(RNG.standard_normal((4, 5))[np.arange(4)[:, None], grid], axis=0)
    drawn = RNG.choice(len(truth), 60, replace=False)
    errors = []
    for factored in (False, True):
        g = process(factored, points)
        for _ in range(3):
            g.fit(points.codes[drawn], truth[drawn])
        mean, _ = g.predict(points.codes[drawn], truth[drawn], points.codes)
        errors.append(float(np.sqrt(np.mean((mean - truth) ** 2))))
    assert errors[1] < 0.5 * errors[0], errors
