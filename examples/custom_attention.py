"""A custom attention in ten lines of PyTorch: castile fuses it into one pass, with nothing to recognise it by."""

import torch

import castile


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
    """Softcapped scores (Gemma-2), a linear bias for distance (ALiBi), a sliding causal window (Mistral)."""
    i, j = torch.arange(q.shape[-2])[:, None], torch.arange(k.shape[-2])[None, :]
    s = 30 * torch.tanh(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 / 30) - slope[:, None, None] * (i - j)
    s = s.masked_fill((i < j) | (i - j >= 128), float("-inf"))
    return torch.softmax(s, -1) @ v


def main() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 4, 256, 32) for _ in range(3))
    slope = torch.tensor([0.5, 0.25, 0.125, 0.0625])
    compiled = torch.compile(attention, backend="castile")
    torch.testing.assert_close(compiled(q, k, v, slope), attention(q, k, v, slope), rtol=1e-4, atol=1e-5)
    print(castile.explain_model(attention, q, k, v, slope))


if __name__ == "__main__":
    main()
