"""The `torch.compile` backend against eager: attention in its spellings, norms, losses, chains, shapes, gradients."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402

import castile  # noqa: E402
from castile.frontend.backend import Compiled, Options, backend  # noqa: E402

Tensor = torch.Tensor
SEEN: list[Compiled] = []


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    SEEN.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # no region falls back unseen
        yield


def compiled(f: Callable[..., Any], dynamic: bool | None = None, **options: Any) -> Callable[..., Any]:
    options.setdefault("when", "always")
    return torch.compile(f, backend=backend(Options(**options), SEEN.append), dynamic=dynamic, fullgraph=True)


def agree(f: Callable[..., Any], *args: Any, tolerance: float = 1e-5, **options: Any) -> None:
    """Same values, dtypes and strides as eager, in the first call and in the second, which the first has recorded."""
    run, theirs = compiled(f, **options), f(*args)
    calls = [run(*args) for _ in range(2)]
    pairs = zip(*calls, theirs, strict=True) if isinstance(theirs, tuple) else [(*calls, theirs)]
    for a, b in ((mine, theirs) for *both, theirs in pairs for mine in both):
        assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


def kernels(kind: str = "") -> int:
    """The regions that became kernels."""
    return sum(r.chosen and kind in ("", r.kind) for g in SEEN for r in g.partition.regions)


def qkv(heads: int = 4, shared: int = 4, queries: int = 19, keys: int = 23) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(2, heads, queries, 16),
        torch.randn(2, shared, keys, 16),
        torch.randn(2, shared, keys, 16),
    )


# Attention


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-1, -2) * 0.25, -1) @ v


def by_hand_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.transpose(-1, -2) / 4
    hidden = torch.ones(q.shape[-2], k.shape[-2]).tril() == 0
    return torch.softmax(s.masked_fill(hidden, float("-inf")), -1) @ v


def by_hand_softcap(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = torch.tanh(q @ k.transpose(-1, -2) / 20) * 20
    e = torch.exp(s - s.amax(-1, keepdim=True))
    return (e / e.sum(-1, keepdim=True)) @ v


@pytest.mark.parametrize("f", [by_hand, by_hand_causal, by_hand_softcap], ids=lambda f: f.__name__)
def test_attention_by_hand_is_one_kernel(f: Callable[..., Any]) -> None:
    agree(f, *qkv())
    assert kernels("attention") == kernels() == 1
    (graph,) = SEEN
    cascade = graph.calls[0][1].lowered.cascade
    keys = max(castile.explain(cascade).passes.items(), key=lambda item: item[1][0])
    assert keys[1] == (3, 1)


SDPA: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.3},
    "bool mask": {"attn_mask": "bool"},
    "float mask": {"attn_mask": "float"},
    "row masked": {"attn_mask": "row"},
    "shared heads": {"enable_gqa": True},
    "one key head": {"enable_gqa": True, "shared": 1},
}


@pytest.mark.parametrize("name", SDPA)
def test_scaled_dot_product_attention(name: str) -> None:
    given = dict(SDPA[name])
    q, k, v = qkv(shared=given.pop("shared", 2) if "heads" in name or "head" in name else 4)
    mask = given.pop("attn_mask", None)
    if mask == "bool":
        given["attn_mask"] = torch.rand(19, 23) > 0.3
    elif mask == "float":
        given["attn_mask"] = torch.randn(2, 1, 19, 23)
    elif mask == "row":
        given["attn_mask"] = torch.ones(19, 23, dtype=torch.bool)
        given["attn_mask"][3] = False

    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, **given)

    agree(f, q, k, v)
    assert kernels("attention") == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_attention_of_sixteen_bits(dtype: Any) -> None:
    agree(lambda q, k, v: F.scaled_dot_product_attention(q, k, v), *(x.to(dtype) for x in qkv()), tolerance=2e-2)


def test_dropout_stays_with_eager() -> None:
    q, k, v = qkv()

    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)

    run = compiled(f)
    torch.manual_seed(7)
    mine = run(q, k, v)
    torch.manual_seed(7)
    torch.testing.assert_close(mine, f(q, k, v))


def test_flex_attention_with_mods() -> None:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k, v = qkv(queries=32, keys=32)
    slope = torch.tensor([0.5, 0.25, 0.125, 0.0625])

    def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return 20 * torch.tanh(s / 20) - slope[h] * (i - j)

    def mask(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & (i - j < 9)

    block = create_block_mask(mask, None, None, 32, 32, device="cpu")

    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex_attention(q, k, v, score_mod=score, block_mask=block)

    torch.testing.assert_close(compiled(f)(q, k, v), f(q, k, v), rtol=1e-5, atol=1e-5)
    assert kernels("attention") == 1
    text = str(next(c for r, c in SEEN[0].calls if r.kind == "attention").lowered.cascade)
    assert "< 9" in text
    assert "i32(" not in text.split("where")[-1].split("9")[0]


def test_the_log_sum_exp_of_flex_attention_is_natural() -> None:
    from torch.nn.attention.flex_attention import flex_attention

    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return flex_attention(q, k, v, return_lse=True)

    q, k, v = (torch.randn(1, 2, 33, 16) for _ in range(3))
    out, lse = torch.compile(f, backend="castile")(q, k, v)
    scores = q @ k.mT / 4
    torch.testing.assert_close(lse, scores.logsumexp(-1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out, scores.softmax(-1) @ v, rtol=1e-4, atol=1e-5)


DOCUMENTS = torch.tensor([[0] * 7 + [1] * 20 + [2] * 13, [0] * 31 + [1] * 9])
PREFIX = torch.tensor([5, 17])
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])
TABLE = torch.randn(4, 40)
MODS: dict[str, tuple[Any, Any]] = {
    "alibi": (lambda s, b, h, i, j: s + SLOPES[h] * (j - i), None),
    "slopes by formula": (lambda s, b, h, i, j: s + torch.exp2(-2.0 * (h + 1)) * (j - i), None),
    "causal score": (lambda s, b, h, i, j: torch.where(i >= j, s, -float("inf")), None),
    "softcap": (lambda s, b, h, i, j: 20 * torch.tanh(s / 20), None),
    "distance table": (lambda s, b, h, i, j: s + TABLE[0, (i - j).clamp(0, 9)], None),
    "causal": (None, lambda b, h, i, j: i >= j),
    "window": (None, lambda b, h, i, j: (i >= j) & (i - j < 9)),
    "documents": (None, lambda b, h, i, j: (DOCUMENTS[b, i] == DOCUMENTS[b, j]) & (i >= j)),
    "prefix": (None, lambda b, h, i, j: (j < PREFIX[b]) | (i >= j)),
    "sink": (None, lambda b, h, i, j: (i >= j) & ((j < 4) | (i - j < 9))),
    "dilated": (None, lambda b, h, i, j: (i >= j) & ((i - j) % 3 == 0)),
    "blocks": (None, lambda b, h, i, j: i // 8 >= j // 8),
    "alibi of documents with a sink": (
        lambda s, b, h, i, j: 20 * torch.tanh(s / 20) + SLOPES[h] * (j - i),
        lambda b, h, i, j: ((DOCUMENTS[b, i] == DOCUMENTS[b, j]) | (j < 2)) & (i >= j),
    ),
}
QUICK_MODS = ("documents", "sink", "distance table", "dilated", "alibi of documents with a sink")


@pytest.mark.parametrize("name", [n if n in QUICK_MODS else pytest.param(n, marks=pytest.mark.slow) for n in MODS])
def test_a_mod_of_flex_attention_is_part_of_one_kernel(name: str) -> None:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    score, mask = MODS[name]
    q, k, v = qkv(shared=2, queries=40, keys=40)
    block = create_block_mask(mask, 2, None, 40, 40, device="cpu") if mask else None

    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex_attention(q, k, v, score_mod=score, block_mask=block, enable_gqa=True)

    torch.testing.assert_close(compiled(f)(q, k, v), f(q, k, v), rtol=1e-5, atol=1e-5)
    assert kernels("attention") == 1


# Everything else

X = (2, 17, 48)
CHAINS: dict[str, Callable[..., Any]] = {
    "softmax": lambda x, w, b: torch.softmax(x, -1),
    "log_softmax over rows": lambda x, w, b: torch.log_softmax(x, 1),
    "logsumexp": lambda x, w, b: torch.logsumexp(x, (1, 2)),
    "layer_norm": lambda x, w, b: F.layer_norm(x, (48,), w, b),
    "rms_norm by hand": lambda x, w, b: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * w,
    "rms_norm": lambda x, w, b: F.rms_norm(x, (48,), w),
    "gelu": lambda x, w, b: F.gelu(x * w + b) * x,
    "silu": lambda x, w, b: F.silu(x) * (x + b),
    "variance": lambda x, w, b: (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1),
    "views": lambda x, w, b: (x.view(34, 48) * w).view(2, 17, 4, 12).transpose(1, 2).contiguous() + 1,
    "rotated": lambda x, w, b: torch.cat([-x[..., 24:], x[..., :24]], -1) * torch.sin(x),
    "outer": lambda x, w, b: w[:, None] * b[None, :] + w[None, :],
    "coordinates": lambda x, w, b: torch.where(torch.arange(48) > 10, x, w * torch.arange(48)),
    "truth": lambda x, w, b: ((x > w) & (x < 1)).any(-1),
    "integer quotients": lambda x, w, b: x * (torch.arange(-24, 24) % 5 - torch.arange(-24, 24) // 7),
    "numbers": lambda x, w, b: torch.where(x > 0, x, 0.0).sum() / x.numel(),
    "transposed result": lambda x, w, b: torch.exp(x.transpose(1, 2)),
}


QUICK = ("softmax", "layer_norm", "gelu", "views", "rotated", "truth", "numbers", "outer")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CHAINS])
def test_chains(name: str) -> None:
    agree(CHAINS[name], torch.randn(X), torch.randn(48), torch.randn(48), tolerance=2e-5)
    assert kernels() == 1


def test_bfloat16_rounds_where_eager_does() -> None:
    x, w = torch.randn(X).bfloat16(), torch.randn(48).bfloat16()
    f = lambda x, w: F.silu(x * w) * x + 1  # noqa: E731
    assert torch.equal(compiled(f)(x, w), f(x, w))


def test_cross_entropy_and_its_gradient() -> None:
    x = torch.randn(2, 17, 48, requires_grad=True)
    t = torch.randint(0, 48, (2, 17))
    t[0, 3] = -100

    def f(x: Tensor) -> Tensor:
        return F.cross_entropy(x.view(-1, 48), t.view(-1))

    mine, theirs = compiled(f)(x), f(x)
    torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(torch.autograd.grad(mine, x)[0], torch.autograd.grad(theirs, x)[0])
    assert kernels() == 2


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_of_attention_are_cascades(causal: bool) -> None:
    xs = [x.requires_grad_() for x in qkv(queries=20, keys=20)]

    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    mine, theirs = compiled(f)(*xs), f(*xs)
    d = torch.randn_like(theirs)
    for a, b in zip(torch.autograd.grad(mine, xs, d), torch.autograd.grad(theirs, xs, d), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert kernels("attention") == 2
    # Batch, heads, queries, keys and two widths, each under one name.
    assert [len(call.lowered.cascade.ranks) for g in SEEN for _, call in g.calls] == [6, 6]


@pytest.mark.parametrize("shared", [1, 2])
@pytest.mark.parametrize("causal", [False, True])
def test_gradients_of_shared_heads_are_one_cascade(shared: int, causal: bool) -> None:
    xs = [x.requires_grad_() for x in qkv(shared=shared, queries=20, keys=20)]

    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)

    def repeated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(4 // shared, 1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    mine, theirs = compiled(f)(*xs), repeated(*xs)
    d = torch.randn_like(theirs)
    for a, b in zip(torch.autograd.grad(mine, xs, d), torch.autograd.grad(theirs, xs, d), strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert kernels("attention") == 2


def test_of_dropout_only_the_drawing_stays_with_eager() -> None:
    xs = [x.requires_grad_() for x in qkv(queries=20, keys=20)]

    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.dropout(F.gelu(q * k), 0.3) + v

    run = compiled(f)
    torch.manual_seed(7)
    mine = run(*xs)
    torch.manual_seed(7)
    theirs = f(*xs)
    torch.testing.assert_close(mine, theirs)
    d = torch.randn_like(theirs)
    for a, b in zip(torch.autograd.grad(mine, xs, d), torch.autograd.grad(theirs, xs, d), strict=True):
        torch.testing.assert_close(a, b)
    assert [str(n) for g in SEEN for n in g.partition.left] == ["native_dropout"]
    assert kernels() == 3


def test_one_compilation_for_all_shapes() -> None:
    def f(x: Tensor, w: Tensor) -> Tensor:
        return torch.softmax(x * w, -1).transpose(0, 1).reshape(x.shape[1], -1) + 1

    run = compiled(f, dynamic=True)
    for shape in ((2, 3, 5), (4, 7, 5), (3, 9, 6)):
        x, w = torch.randn(shape), torch.randn(shape[-1])
        torch.testing.assert_close(run(x, w), f(x, w))
    assert len(SEEN) == 1
    assert kernels() >= 1


def test_mutation_views_and_strides() -> None:
    def f(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x.add_(1).mul_(y)
        z = torch.sin(x) * y
        return z, z[:, 1:].t()

    x, y = torch.randn(9, 8).t(), torch.randn(8, 9)
    mine, theirs = x.clone(), x.clone()
    a, b = compiled(f)(mine, y), f(theirs, y)
    torch.testing.assert_close(mine, theirs)
    for p, q in zip(a, b, strict=True):
        assert p.stride() == q.stride()
        torch.testing.assert_close(p, q)
    a[0].zero_()
    assert not a[1].any(), "one is still a view of the other"


def test_graph_breaks_autocast_and_no_grad() -> None:
    def f(x: Tensor, w: Tensor) -> Tensor:
        y = torch.softmax(x @ w, -1)
        torch._dynamo.graph_break()
        return F.gelu(y) * 2 + x

    run = torch.compile(f, backend=backend(Options(when="always")))
    x, w = torch.randn(16, 16), torch.randn(16, 16)
    torch.testing.assert_close(run(x, w), f(x, w))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(run(x, w), f(x, w), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float64, torch.int32])
def test_other_types_are_as_eager(dtype: Any) -> None:
    x = (torch.randn(6, 5) * 9).to(dtype)
    agree(lambda x: x * x + x.sum(-1, keepdim=True), x)


def test_f64_beside_f32_is_as_eager() -> None:
    """A product of both is f64: neither the type of a result nor the last bits of a comparison may be f32's."""

    def f(x: Tensor) -> tuple[Tensor, Tensor]:
        bound = torch.maximum(torch.full((1,), 0.1, dtype=torch.float64) * x[:1], torch.zeros(1, dtype=torch.float64))
        return bound, (x > bound).sum() + x.abs().max()

    agree(f, torch.tensor([1.0, 0.1, 0.2, 0.3]))


# What is decided, and what is said


def test_small_things_stay_with_eager() -> None:
    run = compiled(lambda x: torch.sin(x) + 1, when="faster")
    run(torch.randn(4))
    assert kernels() == 0
    assert "operations" in SEEN[0].partition.regions[0].reason


def test_a_matrix_product_stays_with_torch() -> None:
    run = compiled(lambda x, w: F.gelu(x @ w))
    run(torch.randn(8, 16), torch.randn(16, 16))
    assert kernels() == 1
    assert any("stays with torch" in why for why in SEEN[0].partition.left.values())


def test_a_kernel_that_does_not_build_falls_back_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    from castile.frontend import region

    def refuse(self: Any) -> None:
        raise castile.CastileError("there is no C++ compiler", hint="install one")

    monkeypatch.setattr(region.RegionCall, "build", refuse)
    x = torch.randn(5, 6)
    with pytest.warns(RuntimeWarning, match="install one") as caught:
        mine = compiled(lambda x: torch.softmax(x, -1))(x)
    assert len(caught) == 1
    torch.testing.assert_close(mine, torch.softmax(x, -1))


def test_check_finds_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    from castile.frontend import region

    monkeypatch.setenv("CASTILE_CHECK", "1")
    x = torch.randn(5, 6)
    compiled(lambda x: torch.softmax(x, -1) * 2)(x)
    real = region.RegionCall._compute
    monkeypatch.setattr(region.RegionCall, "_compute", lambda self, args: tuple(y + 1 for y in real(self, args)))
    with pytest.raises(castile.CastileError, match="differs from eager"):
        compiled(lambda x: torch.softmax(x, -1) * 3)(x)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tun": "off"}, "did you mean `tune`"),
        ({"tune": "slow"}, "off, cached, quick, full"),
        ({"fallback": "tvm"}, "eager, inductor"),
        ({"numerics": "loose"}, "standard, strict, fast"),
    ],
)
def test_options_are_checked(options: dict[str, Any], words: str) -> None:
    with pytest.raises(Exception, match=words):
        torch.compile(lambda x: x + 1, backend="castile", options=options)(torch.randn(3))


def test_the_backend_is_found_by_name() -> None:
    x = torch.randn(64, 128)
    torch.testing.assert_close(
        torch.compile(lambda x: torch.softmax(x, -1), backend="castile")(x), torch.softmax(x, -1)
    )


def test_layers_share_a_kernel_and_explain_model_says_so() -> None:
    def f(x: Tensor, w: Tensor) -> Tensor:
        for _ in range(3):
            x = x + F.layer_norm(x, (16,)) @ w
        return x

    r = castile.explain_model(f, torch.randn(5, 16), torch.randn(16, 16), options={"when": "always"})
    assert r.graphs == 1
    assert len(r.regions) == 4
    assert 2 <= len(r.kernels) <= 3
    told = r.to_dict()
    assert told["kernels"] == len(r.kernels)
    assert all(x["reason"] for x in told["regions"])
    text = str(r)
    assert "mm.default × 3" in text
    assert "passes over" in text
