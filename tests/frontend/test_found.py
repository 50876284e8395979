"""Compiled models that were wrong once, against eager."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402

Tensor = torch.Tensor


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # no region falls back unseen
        yield


def compiled(f: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(f, backend="castile", options={"when": "always"}, **options)


def norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, [16])


# What divides by how many there are, and is then read in part or beside others.
COUNTED: dict[str, Callable[[Tensor], Any]] = {
    "sliced": lambda x: norm(x)[..., 2:5] * 2,
    "selected": lambda x: norm(x)[..., 0],
    "beside": lambda x: torch.cat([norm(x), x], -1),
    "padded": lambda x: F.pad(norm(x), [1, 2]),
    "flipped": lambda x: norm(x).flip(-1),
    "split": lambda x: (x - x.mean(-1, keepdim=True)).split(4, -1)[1] * 2,
    "of rows": lambda x: (x - x.mean(0))[1:] * 2,
    "rotated": lambda x: torch.cat([-norm(x)[..., 8:], norm(x)[..., :8]], -1),
    "chosen": lambda x: torch.where(torch.cat([norm(x), x], -1) < 0.25, torch.cat([norm(x), x], -1), 0.0),
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", COUNTED)
def test_counts_are_of_the_whole(name: str, dynamic: bool) -> None:
    x = torch.randn(8, 16)
    torch.testing.assert_close(compiled(COUNTED[name], dynamic=dynamic)(x), COUNTED[name](x), rtol=1e-5, atol=1e-5)


def test_a_norm_of_padded_rows() -> None:
    def f(x: Tensor) -> Tensor:
        return norm(F.pad(x, [2, 0], value=1.0)) + torch.sign(x[..., :1]).var(0, unbiased=False)

    x = torch.randn(3, 5, 14)
    torch.testing.assert_close(compiled(f)(x), f(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("extreme", [torch.amax, torch.amin])
def test_gradients_of_extremes(extreme: Callable[..., Tensor]) -> None:
    """The gradient looks for the elements that are equal to the extreme: there is one."""

    def f(x: Tensor) -> Tensor:
        return extreme(F.layer_norm(x, [5]) * -1.5, 0)

    for seed in range(4):
        torch.manual_seed(seed)
        x = torch.randn(16, 3, 5, requires_grad=True)
        mine, theirs = (torch.autograd.grad(g(x).square().sum(), x)[0] for g in (compiled(f), f))
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_an_element_is_equal_to_the_extreme() -> None:
    def f(x: Tensor) -> Tensor:
        y = F.layer_norm(x, [16]) * -1.5
        return (y == y.amax(0)).sum(0)

    x = torch.randn(64, 16)
    assert compiled(f)(x).tolist() == [1] * 16


@pytest.mark.parametrize("shape", [(17, 5), (33, 3), (40, 16), (64, 1)])
@pytest.mark.parametrize("causal", [False, True])
def test_gradients_of_attention_to_few_keys(shape: tuple[int, int], causal: bool) -> None:
    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    given = [torch.randn(2, 4, n, 8, requires_grad=True) for n in (shape[0], shape[1], shape[1])]
    mine, theirs = (torch.autograd.grad(g(*given).square().sum(), given) for g in (compiled(f), f))
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_gradients_of_a_learned_bias() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=m)

    given = [torch.randn(s, requires_grad=True) for s in ((1, 4, 17, 8), (1, 4, 6, 8), (1, 4, 6, 8), (17, 6))]
    mine, theirs = (torch.autograd.grad(g(*given).square().sum(), given) for g in (compiled(f), f))
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_a_mask_of_numbers_hides(dtype: torch.dtype) -> None:
    """A mask that adds the least number leaves the average of all values."""

    def f(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=m)

    hidden = torch.rand(33, 47) > 0.5
    hidden[3] = True
    mask = torch.where(hidden, torch.finfo(dtype).min, 0.0).to(dtype)
    given = [torch.randn(2, 3, n, 16).to(dtype) for n in (33, 47, 47)]
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(compiled(f)(*given, mask), f(*given, mask), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("finite", [lambda x: (x - x) == 0, lambda x: (x * 0) == 0, lambda x: x / x == 1])
def test_what_is_finite_is_told_apart(finite: Callable[[Tensor], Tensor]) -> None:
    def f(x: Tensor) -> Tensor:
        return torch.where(finite(x), x, 0.5).sum(-1)

    x = torch.randn(8, 16)
    x[0, 1], x[2, 3] = float("nan"), float("inf")
    torch.testing.assert_close(compiled(f)(x), f(x))


def test_a_deviation_of_one_element_is_no_number() -> None:
    def f(x: Tensor) -> Tensor:
        return ((x + x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-6)).exp() * 2

    x = torch.randn(8, 1)
    assert compiled(f)(x).isnan().all()
    torch.testing.assert_close(compiled(f)(x.reshape(1, 8)), f(x.reshape(1, 8)))


def test_a_loss_that_ignores_everything() -> None:
    x, ignored = torch.randn(12, 30), torch.full((12,), -100)
    assert compiled(F.cross_entropy)(x, ignored).isnan()


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_norm_of_the_mean_of_all_tokens_but_the_first(dynamic: bool) -> None:
    """The tokens lie in rows of a product: rounded up alone, batches would leave none of them."""

    def f(x: Tensor, w: Tensor, scale: Tensor) -> Tensor:
        h = (x.reshape(-1, 24) @ w).reshape(x.shape[0], x.shape[1], 16)
        return norm((h * scale + x[..., :16])[:, 1:, :].mean(1))

    inputs = torch.randn(2, 17, 24), torch.randn(24, 16), torch.randn(16)
    torch.testing.assert_close(compiled(f, dynamic=dynamic)(*inputs), f(*inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dynamic", [False, True])
def test_counted_positions_lie_as_they_did(dynamic: bool) -> None:
    def f(table: Tensor) -> tuple[Tensor, Tensor]:
        positions = torch.arange(13).unsqueeze(0).expand(2, 13).contiguous()
        return table[positions.view(26)] * 2, positions

    table = torch.randn(20, 3)
    got, want = compiled(f, dynamic=dynamic)(table), f(table)
    torch.testing.assert_close(got, want)
    assert [x.stride() for x in got] == [x.stride() for x in want]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("inplace", [False, True])
def test_gradients_of_linear_attention(inplace: bool, batch: int, dynamic: bool) -> None:
    """What eager does to gradients of `elu` lies otherwise than the trace says, and is viewed."""

    def f(x: Tensor, w: Tensor) -> Tensor:
        q, k, v = (y.view(batch, 16, 2, 8).transpose(1, 2) for y in (x @ w, x @ w * 0.5, x))
        q, k = (F.elu(y + 0, inplace=inplace) + 1 for y in (q, k))
        return q @ (k.transpose(-1, -2) @ v) / (q @ k.sum(-2, keepdim=True).transpose(-1, -2) + 1e-3)

    inputs = [torch.randn(batch, 16, 16, requires_grad=True), torch.randn(16, 16, requires_grad=True)]
    weights = torch.linspace(-1, 1, batch * 256).view(batch, 2, 16, 8)
    got, want = (torch.autograd.grad((g(*inputs) * weights).sum(), inputs) for g in (compiled(f, dynamic=dynamic), f))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@torch.library.custom_op("castile_found::turned", mutates_args=())
def turned(x: Tensor) -> Tensor:
    """Says that it lies in order, and does not."""
    return x.transpose(-1, -2).contiguous().transpose(-1, -2) + 1


@turned.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def test_what_lies_otherwise_than_traced_is_viewed() -> None:
    def f(x: Tensor) -> Tensor:
        return turned(x * 2).view(-1, 4).cumprod(-1) + 1

    def g(x: Tensor) -> Tensor:
        return (x * 2 + 1).view(-1, 4).cumprod(-1) + 1

    x = torch.randn(3, 8, 16)
    run = compiled(f)
    for _ in range(2):
        torch.testing.assert_close(run(x), g(x))


ACTIVATIONS: tuple[Callable[[Tensor], Tensor], ...] = (
    F.elu, F.selu, F.celu, F.leaky_relu, F.hardtanh, F.relu6, F.hardsigmoid, F.hardswish, F.softplus, F.mish,
    lambda x: F.softplus(x, 2.0, 3.0), lambda x: F.elu(x, 1.5), lambda x: F.leaky_relu(x, 0.2),
)  # fmt: skip


def test_gradients_of_activations() -> None:
    """At their corners, too; one graph, of which a row of the input is each one's. Where eager computes in vectors:
    what is no number it treats otherwise in a row's last elements."""

    def f(x: Tensor) -> Tensor:
        return torch.stack([a(y) * 2 + y for a, y in zip(ACTIVATIONS, x.unbind(), strict=True)])

    corners = torch.tensor([-3.0, 3.0, 0.0, 1.0, -1.0, 6.0, 100.0, -100.0])
    row = torch.cat([torch.tensor([float("nan")]), torch.linspace(-30, 30, 87), corners])
    x = row.expand(len(ACTIVATIONS), 96).contiguous().requires_grad_()
    weights = torch.linspace(-1, 1, x.numel()).view(x.shape)
    got, want = (torch.autograd.grad((g(x) * weights).sum(), x) for g in (compiled(f), f))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6, equal_nan=True)
