"""Compiled functions as programs use them: shared memory, threads, processes, modes; and what a graph says twice."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from castile.frontend.backend import Compiled, Options, backend  # noqa: E402

Tensor = torch.Tensor


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # no region falls back unseen
        yield


def norm(x: Tensor, y: Tensor) -> Tensor:
    z = x + y
    return z * torch.rsqrt(z.pow(2).mean(-1, keepdim=True) + 1e-6)


def compile_always(f: object) -> object:
    return torch.compile(f, backend=backend(Options(when="always")), fullgraph=True)


def test_arguments_that_share_memory() -> None:
    fast = compile_always(norm)
    x = torch.randn(8, 40)
    for a, b in ((x, x), (x[:4], x[2:6]), (x[0].expand(4, 40), x[:4]), (x[:, :20], x.flip(1)[:, 20:])):
        torch.testing.assert_close(fast(a, b), norm(a, b))


def test_results_that_are_equal_are_apart_and_views_stay_views() -> None:
    def f(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return torch.softmax(x, -1), torch.softmax(x, -1), x.t()

    x = torch.randn(6, 33)
    a, b, view = compile_always(f)(x)
    torch.testing.assert_close(a, torch.softmax(x, -1))
    a.zero_()
    torch.testing.assert_close(b, torch.softmax(x, -1))
    view[0, 0] = 7.0
    assert float(x[0, 0]) == 7.0


def test_a_result_may_be_changed_between_calls() -> None:
    fast = compile_always(norm)
    x, y = torch.randn(2, 4, 24)
    first = fast(x, y)
    kept = first.clone()
    second = fast(x, y)
    second.mul_(3)
    torch.testing.assert_close(first, kept)
    torch.testing.assert_close(fast(second, first), norm(second, first))


def test_what_is_said_twice_is_computed_once() -> None:
    seen: list[Compiled] = []

    def f(bias: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x @ bias.permute(2, 0, 1).contiguous(), y @ bias.permute(2, 0, 1).contiguous()

    given = torch.randn(16, 12, 4), torch.randn(4, 8, 16), torch.randn(4, 8, 16)
    mine = torch.compile(f, backend=backend(Options(), seen.append), fullgraph=True)(*given)
    for a, b in zip(mine, f(*given), strict=True):
        torch.testing.assert_close(a, b)
    copies = [n for n in seen[0].module.graph.nodes if "clone" in str(n.target)]
    assert len(copies) == 1


def test_random_numbers_are_eagers() -> None:
    def f(x: Tensor) -> Tensor:
        y = torch.nn.functional.dropout(torch.softmax(x, -1), 0.5)
        return norm(y + torch.rand_like(x), torch.nn.functional.dropout(x, 0.25))

    x = torch.randn(8, 64)
    torch.manual_seed(3)
    expected = [f(x), f(x), torch.rand(3)]
    torch.manual_seed(3)
    fast = compile_always(f)
    for a, b in zip([fast(x), fast(x), torch.rand(3)], expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_modes_of_autograd(mode: type) -> None:
    x, y = torch.randn(2, 5, 48)
    x.requires_grad_(True)
    fast = compile_always(norm)
    with mode():
        mine, theirs = fast(x, y), norm(x, y)
    assert (mine.requires_grad, mine.is_inference()) == (theirs.requires_grad, theirs.is_inference())
    torch.testing.assert_close(mine, theirs)
    if theirs.requires_grad:
        (g,), (h,) = torch.autograd.grad(mine.sum(), x), torch.autograd.grad(theirs.sum(), x)
        torch.testing.assert_close(g, h, rtol=1e-4, atol=1e-5)


def test_autocast_rounds_as_eager() -> None:
    def f(x: Tensor, w: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return torch.softmax(x @ w, -1)

    x, w = torch.randn(16, 32), torch.randn(32, 48)
    mine, theirs = compile_always(f)(x, w), f(x, w)
    assert mine.dtype == theirs.dtype
    torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=1e-3)


def test_threads_share_a_compiled_function() -> None:
    fast = compile_always(norm)
    x = torch.randn(16, 32, 96)
    fast(x[0], x[1])
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: fast(x[i % 16], x[(i + 1) % 16]), range(64)))
    for i, y in enumerate(found):
        torch.testing.assert_close(y, norm(x[i % 16], x[(i + 1) % 16]))


@pytest.mark.skipif(sys.platform == "win32" or not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_process_calls_what_its_parent_compiled() -> None:
    fast = compile_always(norm)
    x, y = torch.randn(2, 64, 1024)
    known = fast(x, y).numpy()  # threads are running now
    child = os.fork()
    if child == 0:
        good = False
        try:
            signal.alarm(60)  # a lost thread would be waited for
            good = np.array_equal(fast(x, y).numpy(), known)  # torch's own threads do not survive a fork
        finally:
            os._exit(0 if good else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def in_a_new_process(x: Tensor, y: Tensor) -> Tensor:
    return torch.compile(norm, backend="castile", options={"when": "always"})(x, y)


def test_a_spawned_process_compiles_for_itself() -> None:
    x, y = torch.randn(2, 8, 64)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        mine = torch.tensor(pool.apply(listed, (x.tolist(), y.tolist())))
    torch.testing.assert_close(mine, norm(x, y))


def listed(x: list[list[float]], y: list[list[float]]) -> list[list[float]]:
    found: list[list[float]] = in_a_new_process(torch.tensor(x), torch.tensor(y)).tolist()
    return found
