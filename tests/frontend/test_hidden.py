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
