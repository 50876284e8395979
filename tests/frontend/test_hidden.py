"""Masks of the least finite number: left out where every row sees something, kept as eager's where one does not."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

import castile  # noqa: E402

Tensor = torch.Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, visible: Any, scale: float = 0.125) -> Tensor:
    s = (q @ k.transpose(-1, -2)) * scale
    row, column = torch.arange(s.shape[-2])[:, None], torch.arange(s.shape[-1])[None]
    mask = torch.where(visible(row, column), 0.0, torch.finfo(s.dtype).min).to(s.dtype)
    return torch.softmax(s + mask, -1, dtype=torch.float32).to(v.dtype) @ v


MASKS: dict[str, tuple[Any, bool]] = {
    "causal": (lambda r, c: c <= r, True),
    "window": (lambda r, c: (c <= r) & (c > r - 8), True),
    "band": (lambda r, c: (c - r).abs() < 4, True),
    "first row sees nothing": (lambda r, c: c < r, False),
    "far rows see nothing": (lambda r, c: (c < 9) & (c > r - 8), False),
    "nothing": (lambda r, c: c < 0, False),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((n, torch.float32) for n in MASKS), ("window", torch.bfloat16), ("first row sees nothing", torch.bfloat16)],
    ids=str,
)
def test_a_mask_of_the_least_number(name: str, dtype: Any) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    visible, left_out = MASKS[name]
    given = [torch.randn(1, 2, 29, 16).to(dtype) for _ in range(3)]

    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, visible)

    told = castile.explain_model(f, *given)
    assert len(told.kernels) == 1
    assert ("-inf" in str(told.kernels[0])) == left_out
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(f, backend="castile")(*given), f(*given), rtol=tolerance, atol=tolerance)


def low(condition: Tensor) -> Tensor:
    return torch.where(condition, torch.finfo(torch.float32).min, 0.0)


def causal() -> Tensor:
    return low(~torch.ones(29, 29, dtype=torch.bool).tril())


COLUMNS = torch.arange(29)
# Sums of masks over scores and a tensor that is given, and whether what they hide may be left out.
SUMS: dict[str, tuple[Any, bool]] = {
    "left padding": (lambda s, given: s + low(torch.arange(29) < 3) + causal(), False),
    "left padding last": (lambda s, given: s + causal() + low(torch.arange(29) < 3), False),
    "left padding apart": (lambda s, given: s + (causal() + low(torch.arange(29) < 3)), False),
    "right padding": (lambda s, given: s + low(torch.arange(29) > 23) + causal(), True),
    "right padding apart": (lambda s, given: s + (low(torch.arange(29) > 23) + causal()), True),
    "three": (lambda s, given: s + low(torch.arange(29) > 27) + causal() + low(torch.arange(29) < 3), False),
    "taken away": (lambda s, given: s - -low(torch.arange(29) < 3) + causal(), False),
    "a product": (lambda s, given: s + (given > 0).float() * torch.finfo(torch.float32).min + causal(), False),
    "a logarithm": (lambda s, given: s + (given <= 0).float().log() + causal(), False),
    "chosen": (lambda s, given: s.masked_fill(given > 0, torch.finfo(torch.float32).min) + causal(), False),
    "given": (lambda s, given: s + low(given > 0) + causal(), False),
    "made of what is given": (lambda s, given: s + given * 1e38 + causal(), False),
    "of its own size": (lambda s, given: 5 * torch.tanh(s / 5 + given) + causal(), True),
}


@pytest.mark.parametrize("name", SUMS)
def test_masks_that_are_added_up(name: str) -> None:
    torch.manual_seed(0)
    masked, left_out = SUMS[name]
    q, k, v = (torch.randn(1, 2, 29, 16) for _ in range(3))
    given = torch.where(COLUMNS < 3, 3.0, 0.0) - torch.where((COLUMNS < 3) & (name.startswith("made")), 6.0, 0.0)

    def f(q: Tensor, k: Tensor, v: Tensor, given: Tensor) -> Tensor:
        return masked(q @ k.mT / 4, given).softmax(-1) @ v  # type: ignore[no-any-return]

    torch._dynamo.reset()
    told = castile.explain_model(f, q, k, v, given)
    assert any("-inf" in str(kernel) for kernel in told.kernels) == left_out
    torch._dynamo.reset()
    mine = torch.compile(f, backend="castile")(q, k, v, given)
    eager = f(q, k, v, given)
    # A row of nothing but -inf is no number in eager, and 0 here.
    torch.testing.assert_close(mine, eager.where(~eager.isnan(), mine), rtol=1e-5, atol=1e-5)
