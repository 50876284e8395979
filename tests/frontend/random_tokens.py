"""Random models of tokens, by seed: attention, norms, feed-forward layers and what moves tokens, in any order."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Layer = Callable[[Tensor], Tensor]

ACTIVATIONS: tuple[Layer, ...] = (
    torch.tanh, F.gelu, F.silu, torch.relu, F.softplus, F.elu, torch.square, torch.sigmoid, F.hardswish,
)  # fmt: skip

# What rearranges the tokens of a [batch, tokens, width] tensor, or lets each know of others.
MOVES: tuple[Layer, ...] = (
    lambda x: x[:, 1:] if x.shape[1] > 1 else x,
    lambda x: x.flip(1),
    lambda x: torch.roll(x, 1, 1),
    lambda x: x - x.mean(1, keepdim=True),
    lambda x: x * 0.5 + x[:, :1],
    lambda x: torch.cat([x[:, 1:], x[:, :1]], 1) * 0.5 + x,
    lambda x: F.pad(x, (0, 0, 1, 0))[:, :-1] + x,
    lambda x: x * torch.sigmoid(x.amax(1, keepdim=True)),
    lambda x: x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None],
    lambda x: x.reshape(-1, x.shape[2])[torch.arange(x.shape[0] * x.shape[1]).flip(0)].view(x.shape),
)

# What is read off in the end.
ENDS: tuple[Layer, ...] = (
    lambda x: x,
    lambda x: x[:, 0],
    lambda x: F.layer_norm((x[:, 1:] if x.shape[1] > 1 else x).mean(1), [x.shape[2]]),
    lambda x: x.log_softmax(-1),
    lambda x: x.amax(1) + x[:, -1],
    lambda x: F.cross_entropy(x.flatten(0, 1), torch.arange(x.shape[0] * x.shape[1]) % 7),
)


class Tokens:
    """A model and its inputs: ``f(x, *weights)``, x of [batch, tokens, width]."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        torch.manual_seed(seed)
        self.width, self.heads = self.draw.choice([8, 16, 24]), self.draw.choice([2, 4])
        batch, tokens = self.draw.choice([1, 2, 3, 5]), self.draw.choice([1, 2, 5, 7, 16, 17, 33])
        self.inputs = [torch.randn(batch, tokens, self.width)]
        self.weights: tuple[Tensor, ...] = ()
        kinds = (self.activation, self.norm, self.attention, self.feed_forward, self.move, self.head_by_head)
        some = self.draw.choices(kinds, [2, 4, 4, 2, 6, 2], k=self.draw.randint(1, 6))
        self.layers = [kind() for kind in some] + [self.draw.choice(ENDS)]

    def __call__(self, x: Tensor, *weights: Tensor) -> tuple[Tensor]:
        self.weights = weights
        for layer in self.layers:
            x = layer(x)
        return (x,)

    def weight(self, *shape: int) -> Callable[[], Tensor]:
        at = len(self.inputs) - 1
        self.inputs.append(torch.randn(shape) * 0.3)
        return lambda: self.weights[at]

    def linear(self, wide: int = 1, deep: int = 1) -> Layer:
        w, b = self.weight(wide * self.width, deep * self.width), self.weight(wide * self.width)
        return lambda x: F.linear(x, w(), b())

    def activation(self) -> Layer:
        return self.draw.choice(ACTIVATIONS)

    def move(self) -> Layer:
        if self.draw.random() < 0.2:
            first = self.weight(1, 1, self.width)
            return lambda x: torch.cat([first().expand(x.shape[0], -1, -1), x], 1)
        return self.draw.choice(MOVES)

    def norm(self) -> Layer:
        w, b = self.weight(self.width), self.weight(self.width)
        return self.draw.choice(
            (
                lambda x: F.layer_norm(x, [self.width], w(), b()),
                lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * w() + b(),
                lambda x: F.normalize(x, dim=-1) * w() * b(),
            )
        )

    def feed_forward(self) -> Layer:
        gate, up, down = self.linear(2), self.linear(2), self.linear(1, 2)
        if self.draw.random() < 0.5:
            return lambda x: x + down(F.silu(gate(x)) * up(x))
        return lambda x: torch.where(gate(x) > up(x), x[..., :1], down(F.gelu(up(x))))[..., : self.width]

    def head_by_head(self) -> Layer:
        inner: Layer = self.draw.choice(
            (
                lambda y: F.softmax(y, -1),
                lambda y: y - y.mean(2, keepdim=True),
                lambda y: y.transpose(1, 2).contiguous().transpose(1, 2) * y.amax(-1, keepdim=True),
            )
        )
        return lambda x: inner(x.view(*x.shape[:2], self.heads, -1)).reshape(x.shape)

    def attention(self) -> Layer:
        project = [self.linear() for _ in range(4)]
        causal, kind, read = self.draw.random() < 0.5, self.draw.randrange(3), self.draw.choice([1, 2, None, None])

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            masked = causal and q.shape[2] == k.shape[2]
            if kind == 0:
                return F.scaled_dot_product_attention(q, k, v, is_causal=masked)
            if kind == 1:
                q, k = F.elu(q) + 1, F.elu(k) + 1
                return q @ (k.transpose(-1, -2) @ v) / (q @ k.sum(-2, keepdim=True).transpose(-1, -2) + 1e-3)
            s = q @ k.transpose(-1, -2) + torch.arange(k.shape[2]) * 0.1
            if masked:
                s = s.masked_fill(torch.ones(s.shape[-2:], dtype=torch.bool).triu(1), float("-inf"))
            return s.softmax(-1) @ v

        def layer(x: Tensor) -> Tensor:
            keys = x if read is None else x[:, ::read] if read == 2 else x[:, :1]
            q, k, v = (
                p(y).view(*y.shape[:2], self.heads, -1).transpose(1, 2)
                for p, y in zip(project, (x, keys, keys), strict=False)
            )
            return x + project[3](attend(q, k, v).transpose(1, 2).reshape(x.shape))

        return layer
