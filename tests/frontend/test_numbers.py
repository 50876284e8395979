"""Numbers beside tensors: the type in which ATen takes them, to the last bit."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")

Tensor = torch.Tensor

# Close to numbers that 16 bits do not hold, from both sides.
NEAR = torch.tensor([0.1, 0.3, 1 / 3, 1.7, -0.1, 256.0, 258.0, 0.0, math.inf, math.nan])


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # no region falls back unseen
        yield


def same(f: Callable[..., tuple[Tensor, ...]], *given: Tensor) -> None:
    got = torch.compile(f, backend="castile", options={"when": "always"})(*given)
    for i, (mine, theirs) in enumerate(zip(got, f(*given), strict=True)):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True, msg=lambda m, i=i: f"result {i}: {m}")


def compared(x: Any, s: Any) -> tuple[Tensor, ...]:
    return x > s, x >= s, x < s, x <= s, x == s, x != s


def moved(x: Tensor, s: Any) -> tuple[Tensor, ...]:
    return x + s, x - s, s - x, x * s, torch.where(x > 0, x, s), x.clamp(min=s), x.clamp(max=s)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_literals(dtype: Any) -> None:
    def f(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        more = torch.add(x, y, alpha=0.1), torch.full_like(x, 0.1) + x, x + 257, x > 257
        return (*compared(x, 0.1), *moved(x, 0.1), *more)

    same(f, torch.cat([NEAR.repeat(30), torch.randn(724)]).to(dtype), torch.randn(1024).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("number", [torch.tensor(0.1), torch.tensor(257), torch.tensor(0.1).half()], ids=str)
def test_tensors_of_no_dimension(dtype: Any, number: Tensor) -> None:
    def f(x: Tensor, s: Tensor) -> tuple[Tensor, ...]:
        return (*compared(x, s), s < x, *moved(x, s), s * x, torch.addcmul(x, x, s), torch.minimum(x, s))

    same(f, torch.cat([NEAR.repeat(30), torch.randn(724)]).to(dtype), number)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_integers_beside_floats(dtype: Any) -> None:
    def f(x: Tensor, i: Tensor) -> tuple[Tensor, ...]:
        counted = torch.arange(1024)
        return (x * i, i * x, x + i, i - x, i / x, x > i, x == i, x * counted, x + counted, x > counted)

    same(f, torch.cat([torch.arange(512), torch.randn(512)]).to(dtype), torch.arange(1, 1025))


def test_integers_meet_floats_in_f32() -> None:
    def f(i: Tensor) -> tuple[Tensor, ...]:
        given = (16777217.0, 16777217, float((1 << 40) + 1), 0.1, torch.tensor(16777217.0), torch.zeros(5) + 16777217)
        return (*(y for s in given for y in (i == s, i > s)), i + 0.5, i * 1.0)

    same(f, torch.tensor([16777216, 16777217, 16777218, 1 << 40, (1 << 40) + 1]))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32])
def test_integers_beyond_a_type(dtype: Any) -> None:
    def f(x: Tensor) -> tuple[Tensor, ...]:
        given = (300, -1, -200, 2.5, 1 << 40, torch.tensor(300))
        return (*(y for s in given for y in (x == s, x < s)), x + 300, x * 3, x - 5)

    same(f, torch.tensor([0, 100, 44, 127, 56]).to(dtype))


def test_truth_values_are_counted() -> None:
    def f(x: Tensor) -> tuple[Tensor, ...]:
        return (*compared(x, 2), *compared(x, 0.5), *compared(x, True), x + 1, x * x, x + x, x * 2.5)

    same(f, torch.tensor([True, False, True]))


def test_literals_whose_product_is_beyond_f32() -> None:
    def f(x: Tensor) -> tuple[Tensor, ...]:
        return (x * 1e20) ** 2, x / 1e-30 / 1e-30, (x * 1e-25) ** 2, ((x * 1e20) ** 2).sum()

    x = torch.tensor([0.0, 1e-3, 1e-2, 1e10, 2.0, -1.0])
    mine, theirs = torch.compile(f, backend="castile", options={"when": "always"})(x), f(x)
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=0)
