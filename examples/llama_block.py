"""One block of Llama through torch.compile(backend="castile"): checked against eager, and what became of it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import castile


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Block(nn.Module):
    """RMSNorm, rotary grouped-query attention, RMSNorm, SwiGLU."""

    def __init__(self, width: int = 128, heads: int = 4, shared: int = 2) -> None:
        super().__init__()
        self.heads, self.shared, self.head = heads, shared, width // heads
        self.norm1, self.norm2 = (nn.Parameter(torch.ones(width)) for _ in range(2))
        self.q = nn.Linear(width, width, bias=False)
        self.kv = nn.Linear(width, 2 * shared * self.head, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up, self.gate = (nn.Linear(width, 2 * width, bias=False) for _ in range(2))
        self.down = nn.Linear(2 * width, width, bias=False)

    def angles(self, n: int) -> tuple[Tensor, Tensor]:
        """The cosines and sines by which each of n tokens is rotated, [n, head / 2] both."""
        half = self.head // 2
        angle = torch.arange(n)[:, None] * 10000.0 ** (-torch.arange(half) / half)
        return angle.cos(), angle.sin()

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None = None) -> Tensor:
        b, n, _ = x.shape
        cos, sin = self.angles(n) if rotation is None else rotation
        y = F.rms_norm(x, (x.shape[-1],), self.norm1)
        q = self.q(y).view(b, n, self.heads, self.head).transpose(1, 2)
        k, v = self.kv(y).view(b, n, 2 * self.shared, self.head).transpose(1, 2).chunk(2, 1)
        o = F.scaled_dot_product_attention(
            rotated(q, cos, sin), rotated(k, cos, sin), v, is_causal=True, enable_gqa=True
        )
        x = x + self.out(o.transpose(1, 2).reshape(b, n, -1))
        y = F.rms_norm(x, (x.shape[-1],), self.norm2)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Llama(nn.Module):
    """A small Llama: tokens [b, n] to logits [b, n, vocabulary]."""

    def __init__(self, vocabulary: int = 2048, width: int = 512, layers: int = 4, heads: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, heads, heads // 2) for _ in range(layers))
        self.norm = nn.Parameter(torch.ones(width))
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x, rotation = self.embed(tokens), self.blocks[0].angles(tokens.shape[-1])
        for block in self.blocks:
            x = block(x, rotation)
        return self.head(F.rms_norm(x, (x.shape[-1],), self.norm))


def main() -> None:
    torch.manual_seed(0)
    block, x = Block().eval(), torch.randn(2, 64, 128)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(block, backend="castile")(x), block(x), rtol=1e-4, atol=1e-5)
        print(castile.explain_model(block, x))


if __name__ == "__main__":
    main()
