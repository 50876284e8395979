"""What the options of the backend do: tuning, and who runs the rest."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from torch.utils.checkpoint import checkpoint  # noqa: E402

import castile  # noqa: E402
from castile.codegen import targets  # noqa: E402
from castile.frontend import region, tuning  # noqa: E402
from castile.frontend.backend import Compiled, Options, backend  # noqa: E402
from castile.frontend.region import RegionCall  # noqa: E402
from castile.ir.errors import UsageError  # noqa: E402


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CASTILE_RECORDS", str(tmp_path / "records.sqlite"))
    region._kernel.cache_clear()  # kernels of other tests say the same at other shapes
    torch._dynamo.reset()
    torch.manual_seed(0)


def graphs(f, *inputs, **options):  # type: ignore[no-untyped-def]
    """The graphs of a function of tensors, called once and compared with eager."""
    seen: list[Compiled] = []
    torch._dynamo.reset()
    run = torch.compile(f, backend=backend(Options(when="always", **options), seen.append))
    for _ in range(2):
        torch.testing.assert_close(run(*inputs), f(*inputs), rtol=1e-4, atol=1e-5)
    return seen


def origins(seen: list[Compiled]) -> list[str]:
    return [v.origin for graph in seen for _, call in graph.calls for v in call.kernel.variants]


def test_quick_tunes_records_and_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "BUDGET_S", {"quick": 6.0})
    monkeypatch.setattr(tuning, "LEAST_S", 2.0)

    def f(x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(x, -1) * 2

    x = torch.randn(50, 100)
    assert origins(graphs(f, x)) == ["default"]
    assert origins(graphs(f, x, tune="quick")) == ["tuned"]
    assert origins(graphs(f, x)) == ["tuned"], "what is on record serves from then on"
    assert origins(graphs(f, x, tune="off")) == ["default"]
    monkeypatch.setattr("castile.driver.tune", lambda *_: pytest.fail("it is on record already"))
    assert origins(graphs(f, x, tune="quick")) == ["tuned"]


def test_what_cannot_be_tuned_keeps_its_default_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise castile.CastileError("no candidate runs")

    monkeypatch.setattr("castile.driver.tune", fails)
    with pytest.warns(RuntimeWarning, match="no candidate runs") as seen:
        assert origins(graphs(lambda x: torch.softmax(x, -1) @ x.T, torch.randn(9, 9), tune="full")) == ["default"]
    assert len([w for w in seen if issubclass(w.category, RuntimeWarning)]) == 1


def block(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    y = torch.nn.functional.layer_norm(torch.linalg.solve(w, x), (x.shape[-1],))
    return torch.nn.functional.gelu(y @ w) + torch.cumprod(x, 0)


def test_inductor_compiles_the_rest() -> None:
    x, w = torch.randn(16, 16), torch.randn(16, 16) + 4 * torch.eye(16)
    seen = graphs(block, x, w, fallback="inductor")
    children = list(seen[0].module.children())  # type: ignore[union-attr]
    assert any(type(c).__name__ == "Rest" for c in children)
    inside = [n.target for c in children if isinstance(c, torch.fx.GraphModule) for n in c.graph.nodes]
    assert sum(isinstance(t, RegionCall) for t in inside) == len(seen[0].calls) > 0


def test_inductor_keeps_random_numbers_and_gradients() -> None:
    def f(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(torch.softmax(x @ w, -1), 0.5).cumsum(0)

    found = []
    for how in (None, "castile"):
        x, w = torch.randn(8, 8, generator=torch.Generator().manual_seed(1), requires_grad=True), torch.eye(8)
        torch.manual_seed(7)
        options = {"fallback": "inductor", "when": "always"}
        y = (f if how is None else torch.compile(f, backend=how, options=options))(x, w)
        y.square().sum().backward()
        found.append((y.detach(), x.grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_inductor_beside_dropout_under_a_checkpoint() -> None:
    """The backward graph draws the forward one's numbers again, from a state that lies two items deep."""

    def f(x: torch.Tensor) -> torch.Tensor:
        drop = torch.nn.functional.dropout
        return x + drop(drop(torch.softmax(x @ x.mT, -1), 0.5) @ x, 0.5)

    def g(x: torch.Tensor) -> torch.Tensor:
        return checkpoint(f, x, use_reentrant=False).square().mean() * 9  # type: ignore[no-any-return]

    found = []
    for how in (g, torch.compile(g, backend="castile", options={"fallback": "inductor", "when": "always"})):
        x = torch.randn(64, 16, generator=torch.Generator().manual_seed(1), requires_grad=True)
        torch.manual_seed(7)
        y = how(x)
        y.backward()
        found.append((y.detach(), x.grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_a_piece_that_inductor_refuses_runs_in_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: object, **__: object) -> None:
        raise RuntimeError("no such luck")

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx_inner", refuses)
    with pytest.warns(RuntimeWarning, match="no such luck"):
        graphs(block, torch.randn(8, 8), torch.eye(8), fallback="inductor")


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_modes_that_tune_nothing(mode: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        y = torch.compile(torch.nn.Softmax(-1), backend="castile", mode=mode)(torch.ones(3, 4))
    torch.testing.assert_close(y, torch.full((3, 4), 0.25))


def test_max_autotune_tunes() -> None:
    assert Options.of("max-autotune", None).tune == "full"
    assert Options.of(None, {"tune": "quick"}).tune == "quick"


def test_a_target_that_is_not_here_is_an_error() -> None:
    present = targets.present()
    for target in ("hip:gfx942", "cuda:80"):
        if target != present:
            with pytest.raises(UsageError, match=f"`{target}` do not run here"):
                Options.of(None, {"target": target})
    assert Options.of(None, {"target": "cpu"}) == Options.of(None, None)
