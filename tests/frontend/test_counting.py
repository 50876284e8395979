"""Integers that a graph makes of nothing: they become coordinates, and masks made of them brackets."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from castile.frontend.backend import Compiled, Options, backend  # noqa: E402
from castile.ir.cascade import Call, literal_value, walk  # noqa: E402
from castile.passes.derive import derive  # noqa: E402


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


def compiled(f: Any, seen: list[Compiled]) -> Callable[..., Any]:
    return torch.compile(f, backend=backend(Options(when="always"), seen.append))


def packed(q: Any, k: Any, v: Any) -> Any:
    """Causal attention as transformers write it: within what positions that go on by one say is one sequence."""
    n = q.shape[-2]
    positions = (torch.arange(n) + 0).unsqueeze(0)
    before = torch.cat([positions[:, :1] - 1, positions], -1)
    sequence = (before[:, 1:] - before[:, :-1] != 1).cumsum(-1)
    batch = torch.arange(1)[:, None, None, None]
    row, column = torch.arange(n)[None, None, :, None], torch.arange(n)[None, None, None, :]
    mask = q.new_ones([], dtype=torch.bool) & (sequence[batch, row] == sequence[batch, column])
    mask = mask & (positions[batch, column] <= positions[batch, row])
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@pytest.mark.parametrize("lengths", [(24,), (24, 33)])
def test_a_mask_that_is_looked_up_becomes_a_bracket(lengths: tuple[int, ...]) -> None:
    seen: list[Compiled] = []
    run = compiled(lambda x: packed(x, x, x), seen)
    for n in lengths:
        x = torch.randn(1, 2, n, 16)
        if len(lengths) > 1:
            torch._dynamo.mark_dynamic(x, 2)
        torch.testing.assert_close(run(x), packed(x, x, x), rtol=1e-4, atol=1e-5)
    (graph,) = seen
    (call,) = [c for r, c in graph.calls if r.kind == "attention"]
    assert not any(p.dtype == "i64" for p in call.lowered.cascade.params if p.indices)
    assert len(graph.calls) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_a_mask_leaves_out_is_seen_in_every_type(dtype: Any) -> None:
    seen: list[Compiled] = []
    x = torch.randn(1, 2, 33, 16).to(dtype)
    near = 1e-5 if dtype == torch.float32 else 2e-2
    run = compiled(lambda x: packed(x, x, x), seen)
    torch.testing.assert_close(run(x), packed(x, x, x), rtol=near, atol=near)
    ((_, call),) = seen[0].calls
    cascade = call.lowered.cascade
    (stream,) = [e for e in derive(cascade).cascade.einsums if len(e.outputs) > 1]
    chosen = [n.args[2] for n in walk(stream.expr) if isinstance(n, Call) and n.op == "where"]
    assert chosen
    assert {literal_value(e) for e in chosen} == {-math.inf, 0.0}


def test_a_backward_graph_makes_its_masks_anew() -> None:
    seen: list[Compiled] = []
    x = torch.randn(1, 2, 33, 16, requires_grad=True)
    run = compiled(lambda x: packed(x, x, x), seen)
    mine, theirs = (torch.autograd.grad(f(x).square().sum(), x)[0] for f in (run, lambda x: packed(x, x, x)))
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    cascades = [call.lowered.cascade for graph in seen for _, call in graph.calls]
    assert [c.name for c in cascades] == ["attention", "attention_backward", "add"]
    assert all(re.search(r"where\(\w <= \w, 0.0, -inf\)", str(c)) for c in cascades[:2])


def test_what_counts_is_as_in_eager() -> None:
    def f(x: Any) -> Any:
        n = torch.arange(6)
        table = torch.arange(3, 23, 2)
        both = torch.cat([n, n + 6])
        gap = torch.cat([n, n + 7])
        steps = torch.ones(4, dtype=torch.int64).cumsum(0)
        picked = table[n.unsqueeze(1)], table[n + 4], table[n - 1]
        truths = (n < 6) & (n >= 0), (n < 5) | (n != n), ~(n == n), (n - n) * 5, n.flip(0)[1:]
        return x.sum(), both, gap, steps, *picked, *truths, (2 * n)[1:][:, None].expand(5, 3), 2**40 * (n + 3)

    seen: list[Compiled] = []
    x = torch.randn(4, 64)
    for mine, theirs in zip(compiled(f, seen)(x)[1:], f(x)[1:], strict=True):
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs)


def test_numbers_outside_a_table_are_eagers_error() -> None:
    def f(x: Any) -> Any:
        return x * torch.arange(4)[torch.arange(5)].sum()

    with pytest.raises(Exception, match=r"out of (bounds|range)"):
        compiled(f, [])(torch.randn(4))


def test_heads_that_are_repeated_are_not_copied() -> None:
    def f(q: Any, k: Any, v: Any) -> Any:
        k, v = (x[:, :, None].expand(1, 2, 3, 20, 16).reshape(1, 6, 20, 16) for x in (k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    seen: list[Compiled] = []
    q, k, v = torch.randn(1, 6, 20, 16), torch.randn(1, 2, 20, 16), torch.randn(1, 2, 20, 16)
    torch.testing.assert_close(compiled(f, seen)(q, k, v), f(q, k, v), rtol=1e-4, atol=1e-5)
    (graph,) = seen
    assert graph.module is not None
    assert not any("clone" in str(n.target) for n in graph.module.graph.nodes)


def test_a_residual_and_its_norm_are_one_kernel() -> None:
    def f(x: Any, y: Any, w: Any) -> Any:
        h = x + y
        return h, torch.nn.functional.layer_norm(h, (48,), w), torch.nn.functional.rms_norm(h, (48,), w)

    seen: list[Compiled] = []
    given = torch.randn(5, 48), torch.randn(5, 48), torch.randn(48)
    torch.testing.assert_close(compiled(f, seen)(*given), f(*given), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [24, 64])
def test_rotated_heads_and_a_transposed_bias(dtype: Any, width: int) -> None:
    def rotate(x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
        half = x.shape[-1] // 2
        turned = torch.cat((-x[..., half:], x[..., :half]), -1)
        return x * angle.cos().to(x.dtype) + turned * angle.sin().to(x.dtype)

    def bias(table: torch.Tensor) -> torch.Tensor:
        n = table.shape[0]
        seen = torch.arange(n)[:, None] >= torch.arange(n)[None]
        return torch.where(seen[..., None], table, -1e9).permute(2, 0, 1).contiguous()

    x, angle = torch.randn(2, 3, 21, width).to(dtype), torch.randn(21, width) * 100
    table = torch.randn(37, 37, 5).to(dtype)
    fast = torch.compile(lambda *a: (rotate(*a[:2]), bias(a[2])), backend=backend(Options(when="always")))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for mine, theirs in zip(fast(x, angle, table), (rotate(x, angle), bias(table)), strict=True):
        assert mine.stride() == theirs.stride()
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)
