"""How a region is called: once, whatever its arguments look like from call to call."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import castile  # noqa: E402
from castile.frontend.backend import Compiled, Options, backend  # noqa: E402
from castile.frontend.region import RegionError, _agrees  # noqa: E402


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


def test_attention_is_not_run_a_second_time_by_eager() -> None:
    """Its operation is tagged as random, for its dropout."""
    seen: list[Compiled] = []
    q = torch.randn(1, 2, 33, 16)
    run = torch.compile(torch.nn.functional.scaled_dot_product_attention, backend=backend(Options(), seen.append))
    torch.testing.assert_close(run(q, q, q), torch.nn.functional.scaled_dot_product_attention(q, q, q))
    (graph,) = seen
    assert graph.module is not None
    assert not [n for n in graph.module.graph.nodes if "scaled_dot_product" in str(n.target)]


@pytest.mark.parametrize("dynamic", [None, True])
def test_later_calls_see_other_layouts_and_values(dynamic: bool | None) -> None:
    def f(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.softmax(x * y, -1).transpose(0, 1)

    run = torch.compile(f, backend=backend(Options(when="always")), dynamic=dynamic)
    wide = torch.randn(12, 40)
    pairs = [
        (torch.randn(6, 10), torch.randn(6, 10)),
        (torch.randn(6, 10), torch.randn(6, 10)),
        (torch.randn(10, 6).t(), torch.randn(6, 10)),
        (wide[::2, 5:15], wide[1::2, 20:30]),
        (torch.randn(7, 11), torch.randn(7, 11)),
        (torch.randn(6, 10), torch.randn(6, 10)),
    ]
    for _ in range(2):
        for x, y in pairs:
            mine, theirs = run(x, y), f(x, y)
            torch.testing.assert_close(mine, theirs)
            assert mine.stride() == theirs.stride()


def test_a_tensor_at_an_odd_address() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(x, -1)

    run = torch.compile(f, backend=backend(Options(when="always")))
    raw = torch.zeros(4 * 20 + 4, dtype=torch.uint8)
    askew = torch.frombuffer(memoryview(raw.numpy())[1:81], dtype=torch.float32).view(4, 5)
    askew.copy_(torch.randn(4, 5))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # no region falls back
        for x in (torch.randn(4, 5), torch.randn(4, 5), askew, askew, torch.randn(4, 5)):
            torch.testing.assert_close(run(x), f(x))


def test_a_strided_array_at_an_odd_address() -> None:
    """What is copied lies in another way than what was given."""
    kernel = castile.compile(castile.parse("def f(X: f32[m, n]) -> Y:\n    Y[m, n] = exp(X[m, n])\n"))
    raw = np.zeros(4 * 20 + 4, np.uint8)
    askew = raw[1:81].view(np.float32).reshape(4, 5).T
    askew[...] = np.arange(20).reshape(5, 4) / 20
    np.testing.assert_allclose(kernel(X=askew), np.exp(askew), rtol=1e-6)
    np.testing.assert_allclose(kernel(X=torch.from_numpy(askew)).numpy(), np.exp(askew), rtol=1e-6)


@pytest.mark.parametrize("dynamic", [None, True])
def test_the_loops_of_a_map_go_through_memory(dynamic: bool | None) -> None:
    def rotary(q: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        half = q.shape[-1] // 2
        turned = q * cos + torch.cat((-q[..., half:], q[..., :half]), -1) * sin
        return turned, (q + 1).flatten(1, 2)

    seen: list[Compiled] = []
    run = torch.compile(rotary, backend=backend(Options(when="always"), seen.append), dynamic=dynamic)
    for tokens in (40, 24):
        q = torch.randn(2, tokens, 3, 16).transpose(1, 2)  # heads before tokens, tokens outermost in memory
        cos, sin = torch.randn(2, tokens, 16)
        for mine, theirs in zip(run(q, cos, sin), rotary(q, cos, sin), strict=True):
            torch.testing.assert_close(mine, theirs)
            assert mine.stride() == theirs.stride()
    orders = [call.lowered.orders for _, call in seen[0].calls]
    assert orders == [((0, 2, 1, 3),), ((0, 1, 2, 3),)]


def test_check_tells_infinities_from_numbers() -> None:
    inf, nan = float("inf"), float("nan")
    eager = torch.tensor([1.0, inf, nan, -inf])
    assert _agrees(torch.tensor([1.0, inf, 0.0, -inf]), eager)
    for wrong in ([1.0, 5.0, 0.0, -inf], [1.0, inf, 0.0, inf], [1.5, inf, nan, -inf], [nan, inf, nan, -inf]):
        assert not _agrees(torch.tensor(wrong), eager)
    assert not _agrees(torch.zeros(3), torch.full((3,), inf))
    assert _agrees(torch.zeros(0), torch.zeros(0))


def test_check_lets_last_bits_cancel(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left of equal numbers is rounding, here and in eager."""
    monkeypatch.setenv("CASTILE_CHECK", "1")

    def f(x: torch.Tensor) -> torch.Tensor:
        return (x * 1.1 - (x * 1.1).mean(-1, keepdim=True)) * 3

    x = torch.rand(16, 1).expand(16, 999).contiguous()
    assert f(x).any(), "eager's are not all zero"
    torch.compile(f, backend=backend(Options(when="always")))(x)


def test_check_still_tells_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CASTILE_CHECK", "1")
    seen: list[Compiled] = []
    run = torch.compile(lambda x: torch.softmax(x, -1), backend=backend(Options(when="always"), seen.append))
    run(torch.randn(4, 30))
    ((_, call),) = seen[0].calls
    call._compute = lambda args: (torch.softmax(args[0], -1) * 1.01,)  # type: ignore[method-assign]
    with pytest.raises(RegionError, match="differs from eager"):
        run(torch.randn(4, 30))


@pytest.mark.parametrize("dynamic", [None, True])
def test_what_eager_refuses_too_is_no_fault_of_a_kernel(dynamic: bool | None) -> None:
    seen: list[Compiled] = []

    def f(x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(x * 2, target)

    run = torch.compile(f, backend=backend(Options(when="always"), seen.append), dynamic=dynamic)
    x, target = torch.randn(10, 40), torch.arange(10)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # no region falls back
        for _ in range(2):
            with pytest.raises(IndexError):
                run(x, target + 31)
            torch.testing.assert_close(run(x, target), f(x, target))
    assert not any(call.failed for _, call in seen[0].calls)


def test_a_mean_of_nothing_is_no_number() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        y = x[x[:, 0] > 0]
        return y.mean(0) * 2 + (y - 1).square().sum(0)

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        run = torch.compile(f, backend=backend(Options(when="always")), fullgraph=True)
        for x in (torch.randn(64, 40), -torch.rand(64, 40), torch.randn(64, 40)):
            torch.testing.assert_close(run(x), f(x), equal_nan=True)
