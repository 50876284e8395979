"""Graphs of fixed sizes: recorded by their first call, run by the later ones, and what is not as it was recorded."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from castile.frontend import fixed, record  # noqa: E402
from castile.frontend.arena import Arena, Stay, placed  # noqa: E402
from castile.frontend.backend import Compiled, Options, backend  # noqa: E402
from castile.frontend.fixed import Fixed  # noqa: E402
from castile.frontend.races import Races  # noqa: E402

Tensor = torch.Tensor


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


def block(x: Tensor, w: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Kernels and products in turn, with a result in the middle and views between."""
    h = torch.softmax(x @ w.t(), -1)
    g = torch.nn.functional.gelu(h.view(-1, 2, 12) * 2).reshape(h.shape) @ v
    return torch.tanh(g * 3) + x, h


def inputs(rows: int = 10) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(rows, 16), torch.randn(24, 16), torch.randn(24, 16)


def compiled(f: Callable[..., Any], seen: list[Compiled] | None = None) -> Callable[..., Any]:
    return torch.compile(f, backend=backend(Options(when="always"), None if seen is None else seen.append))


def same(mine: Any, theirs: Any) -> None:
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What later calls do: a word for each that is recorded, and for each that goes the general way."""
    said: list[str] = []
    before, init = Fixed._record, Fixed.__init__

    def recording(self: Fixed, args: Any) -> Any:
        said.append("record")
        return before(self, args)

    def made(self: Fixed, gm: Any, calls: Any, products: Any, general: Any, plan: Any) -> None:
        def generally(*args: Any) -> Any:
            said.append("general")
            return general(*args)

        init(self, gm, calls, products, generally, plan)

    monkeypatch.setattr(Fixed, "_record", recording)
    monkeypatch.setattr(Fixed, "__init__", made)
    return said


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 6), st.integers(0, 5000)), max_size=30))
def test_what_is_wanted_at_once_lies_apart(given: list[tuple[int, int, int]]) -> None:
    stays = [Stay(first, first + length, size) for first, length, size in given]
    offsets, total = placed(stays)
    for i, a in enumerate(stays):
        assert offsets[i] % 64 == 0
        assert offsets[i] + a.bytes <= total
        for j, b in enumerate(stays[:i]):
            if a.first <= b.last and b.first <= a.last:
                assert offsets[i] + a.bytes <= offsets[j] or offsets[j] + b.bytes <= offsets[i]


def test_later_calls_run_what_the_first_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    said = counted(monkeypatch)
    run = compiled(block)
    cases = [inputs() for _ in range(3)]
    results = [run(*case) for case in cases]
    for case, found in zip(cases, results, strict=True):  # after all: nothing that was returned is written again
        same(found, block(*case))
    assert said == ["record"]


def test_results_are_new_memory_at_each_call() -> None:
    run, given = compiled(block), inputs()
    results = [run(*given) for _ in range(3)]
    memories = {y.untyped_storage().data_ptr() for found in results for y in found}
    assert len(memories) == 6
    arena = fixed.ARENA.memory
    assert arena is not None
    assert arena.untyped_storage().data_ptr() not in memories


def test_inputs_that_lie_in_another_way_go_the_general_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def f(x: Tensor) -> tuple[Tensor, ...]:
        return (torch.softmax(x, -1) @ x.t(),)

    said = counted(monkeypatch)
    seen: list[Compiled] = []
    x = torch.randn(10, 16)
    compiled(f, seen)(x)
    run: Any = seen[0].run
    askew = torch.frombuffer(bytearray(b"\0" + x.numpy().tobytes()), dtype=torch.float32, count=160, offset=1)
    for other in (x.t().contiguous().t(), askew.view(x.shape), x):
        same(run(other), f(other))
    assert said == ["record", "general", "general"]


def test_a_larger_graph_moves_the_memory_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fixed, "ARENA", Arena())
    said = counted(monkeypatch)
    small, large = compiled(block), compiled(lambda *a: block(*a))
    one, two = inputs(), inputs(200)
    for run, x in ((small, one), (large, two), (small, one), (large, two), (small, one)):
        same(run(*x), block(*x))
    assert said == ["record", "record", "record"]


def test_each_thread_has_memory_of_its_own() -> None:
    run, cases = compiled(block), [inputs() for _ in range(4)]
    expected = [block(*case) for case in cases]
    run(*cases[0])
    wrong: list[int] = []

    def repeat(i: int) -> None:
        for _ in range(50):
            found = run(*cases[i])
            if not all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, expected[i], strict=True)):
                wrong.append(i)

    threads = [threading.Thread(target=repeat, args=(i,)) for i in range(len(cases))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_a_call_from_within_a_call_leaves_its_memory_alone() -> None:
    inner, given = compiled(block), inputs()
    inner(*given)

    @torch.library.custom_op("castile_test::inner", mutates_args=())
    def op(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        return inner(x, w, v)[0].clone()

    @op.register_fake
    def _(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        return torch.empty_like(x)

    def outer(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        h = torch.exp(torch.sin(x) * 2)
        return torch.cos(op(x, w, v) * 2) + h

    theirs = torch.cos(block(*given)[0] * 2) + torch.exp(torch.sin(given[0]) * 2)
    run = compiled(outer)
    for _ in range(3):
        same(run(*given), theirs)


@pytest.mark.parametrize("first", [torch.inference_mode, torch.no_grad])
def test_what_one_mode_recorded_runs_in_the_other(first: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fixed, "ARENA", Arena())
    run, given = compiled(block), inputs()
    with first():
        same(run(*given), block(*given))
    for mode in (torch.no_grad, torch.inference_mode):
        for _ in range(2):
            with mode():
                same(run(*given), block(*given))
    same(run(*given), block(*given))


def test_weights_may_change_their_memory() -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.LayerNorm(16), torch.nn.Linear(16, 16))
    run, x = compiled(layer), torch.randn(5, 16)
    with torch.no_grad():
        for _ in range(3):
            same(run(x), layer(x))
            for p in layer.parameters():
                p.data = torch.randn_like(p)


def test_inputs_that_a_graph_changes_are_changed_at_each_call() -> None:
    def f(x: Tensor, y: Tensor) -> Tensor:
        y.mul_(2).add_(torch.softmax(x, -1))
        return (y @ x.t()).tanh() * 2

    run, x = compiled(f), torch.randn(6, 8)
    mine, theirs = torch.ones(6, 8), torch.ones(6, 8)
    for _ in range(3):
        same(run(x, mine), f(x, theirs))
        same(mine, theirs)


def test_a_result_that_shares_the_arena_unforeseen_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    said = counted(monkeypatch)

    @torch.library.custom_op("castile_test::liar", mutates_args=())
    def liar(x: Tensor) -> Tensor:
        return x.clone()

    @liar.register_fake
    def _(x: Tensor) -> Tensor:
        return torch.empty_like(x)

    monkeypatch.setattr(record.Recorder, "_called", lying(record.Recorder._called, "liar"))
    run = compiled(lambda x: (liar(torch.softmax(x, -1)), torch.sin(x) * 2))
    x = torch.randn(4, 8)
    for _ in range(3):
        same(run(x), (torch.softmax(x, -1), torch.sin(x) * 2))
    assert said == ["record", "general", "general"]


def lying(called: Callable[..., Any], name: str) -> Callable[..., Any]:
    """An operation of that name gives its operand back, though it says that its result is new."""

    def instead(self: Any, target: Any, args: Any, kwargs: Any) -> Any:
        if name in str(target):
            return self.values[args[0]]
        return called(self, target, args, kwargs)

    return instead


@pytest.mark.parametrize("castile_wins", [True, False])
def test_products_run_where_the_race_was_won(castile_wins: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    races: list[bool] = []

    def decided(mine: Callable[[], None], theirs: Callable[[], None]) -> bool:
        mine()
        theirs()
        races.append(castile_wins)
        return castile_wins

    monkeypatch.setattr(record, "faster", decided)
    monkeypatch.setattr(record, "RACES", Races())
    layers = [torch.nn.Linear(256, 256, bias=i == 1) for i in range(3)]
    model = torch.nn.Sequential(layers[0], torch.nn.GELU(), layers[1], torch.nn.GELU(), layers[2])
    run, x = compiled(model), torch.randn(3, 64, 256)
    with torch.no_grad():
        for _ in range(3):
            same(run(x), model(x))
            x = torch.randn(3, 64, 256)
    assert races == [castile_wins] * 2  # of three layers two are alike


class Across(torch.nn.Module):
    """A layer whose weight lies as it is multiplied, inputs by outputs, as GPT-2's do."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(inner, outer) * inner**-0.5)
        self.bias = torch.nn.Parameter(torch.randn(outer))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


@pytest.mark.parametrize("layer", [torch.nn.Linear, Across])
@pytest.mark.parametrize("rows", [1, 9, 130])
def test_products_race_in_bf16_however_weights_lie(
    layer: Callable[[int, int], torch.nn.Module], rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    races: list[int] = []

    def decided(mine: Callable[[], None], theirs: Callable[[], None]) -> bool:
        mine()
        theirs()
        races.append(1)
        return True

    monkeypatch.setattr(record, "faster", decided)
    monkeypatch.setattr(record, "RACES", Races())
    model = torch.nn.Sequential(layer(2048, 1024), torch.nn.GELU(), layer(1024, 2048), torch.nn.GELU()).bfloat16()
    run = compiled(model)
    with torch.no_grad():
        for _ in range(3):
            x = torch.randn(rows, 2048).bfloat16()
            torch.testing.assert_close(run(x), model(x), rtol=2**-6, atol=2**-6)
    assert len(races) == 2


@pytest.mark.parametrize("options", [{"tune": "off"}, {"numerics": "strict"}])
def test_nothing_is_raced_where_bits_matter(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "faster", lambda *_: pytest.fail("raced"))
    monkeypatch.setattr(record, "RACES", Races())
    model, x = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.GELU()), torch.randn(64, 256)
    with torch.no_grad():
        run = torch.compile(model, backend=backend(Options(when="always", **options)))
        for _ in range(2):
            same(run(x), model(x))
