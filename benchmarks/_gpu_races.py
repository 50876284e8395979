"""What castile races on a GPU: cascades at given extents, and who else computes the same.

A peer is a function of the inputs that gives a call; one that is not installed, or cannot run here, says so by an
error and is left out. Inputs that must not be random are made by ``prepare``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import castile

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples" / "cascades"

Call = Callable[[], Any]
Inputs = Mapping[str, Any]
Peer = Callable[[Inputs], Call]

WINDOW, CAP, DOCUMENTS = 1024, 20.0, 8


@dataclass(frozen=True)
class Race:
    """A cascade at given extents beside its peers; ``tiny`` are the extents of a dry run."""

    name: str
    cascade: castile.Cascade
    extents: Mapping[str, int]
    peers: Mapping[str, Peer]
    flops: float = 0.0
    bytes: float = 0.0
    tiny: Mapping[str, int] = field(default_factory=dict)
    prepare: Callable[[dict[str, Any]], dict[str, Any]] = dict


def races() -> Iterator[Race]:
    """Every race: first one of each family, then the second of each, and so on."""
    for turn in zip_longest(*families()):
        yield from (r for r in turn if r is not None)


def families() -> list[list[Race]]:
    """Races of one kind each, those first that tell most."""
    shapes = [(d, n) for n in (4096, 16384, 1024) for d in (128, 64)]
    return [
        [gemm(n) for n in (4096, 8192, 2048, 1024)],
        [int4(m) for m in (16, 1, 128)],
        [softmax(columns) for columns in (8192, 65536, 1024, 1 << 20)],
        [norm("rmsnorm", columns) for columns in (4096, 16384, 1024)],
        [norm("layernorm", columns) for columns in (4096, 16384, 1024)],
        [decode(n) for n in (32768, 131072, 8192)],
        [attention(d, n, False) for d, n in shapes],
        [attention(d, n, True) for d, n in shapes],
        [backward(d, n, False) for d, n in shapes],
        [backward(d, n, True) for d, n in shapes],
        *([variant(name, n) for n in (4096, 16384)] for name in VARIANTS),
        [grouped_decode(n) for n in (32768, 131072, 8192)],
    ]


def _example(name: str) -> castile.Cascade:
    return castile.load(EXAMPLES / f"{name}.cascade")


# Attention

TINY = {"b": 1, "h": 1, "q": 20, "k": 20, "d": 16, "f": 16}


def _sdpa(backend: str, causal: bool, inputs: Inputs) -> Call:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    grouped = inputs["Q"].shape[1] != inputs["K"].shape[1]

    def call() -> Any:
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return torch.nn.functional.scaled_dot_product_attention(
                inputs["Q"],
                inputs["K"],
                inputs["V"],
                is_causal=causal,
                scale=float(inputs["scale"]),
                enable_gqa=grouped,
            )

    return call


def _flash(causal: bool, inputs: Inputs) -> Call:
    """The flash-attn package, whose tensors are [batch, token, head, feature]."""
    from flash_attn import flash_attn_func  # type: ignore[import-not-found, unused-ignore]

    q, k, v = (inputs[n].transpose(1, 2).contiguous() for n in "QKV")
    return lambda: flash_attn_func(q, k, v, softmax_scale=float(inputs["scale"]), causal=causal).transpose(1, 2)


def _flex(mask: str, inputs: Inputs) -> Call:
    """Compiled FlexAttention with the mask and score of a variant."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k = inputs["Q"].shape[2], inputs["K"].shape[2]
    # What the functions read, as tensors of their own: a compiler looks through these most surely.
    doc_q, doc_k, slope, sink = (inputs.get(n) for n in ("doc_q", "doc_k", "slope", "sink"))
    masks: dict[str, Callable[..., Any]] = {
        "causal": lambda b, h, i, j: i >= j,
        "window": lambda b, h, i, j: (i >= j) & (i - j < WINDOW),
        "document": lambda b, h, i, j: (doc_q[b, i] == doc_k[b, j]) & (i >= j),
    }
    scores: dict[str, Callable[..., Any]] = {
        "softcap": lambda s, b, h, i, j: CAP * torch.tanh(s / CAP),
        "alibi": lambda s, b, h, i, j: s - slope[h] * (i - j),
    }
    form = masks.get(mask, masks["causal"]) if mask else None
    batch = inputs["Q"].shape[0] if mask == "document" else None
    block = None if form is None else create_block_mask(form, batch, None, q, k, device=inputs["Q"].device)
    compiled: Any = torch.compile(flex_attention)
    options: dict[str, Any] = {"block_mask": block, "score_mod": scores.get(mask), "scale": float(inputs["scale"])}
    options["enable_gqa"] = inputs["Q"].shape[1] != inputs["K"].shape[1]
    if mask != "sink":
        return partial(compiled, inputs["Q"], inputs["K"], inputs["V"], **options)

    def call() -> Any:
        # A sink is one key more, without a value: what it takes is seen in the log-sum-exp.
        o, lse = compiled(inputs["Q"], inputs["K"], inputs["V"], return_lse=True, **options)
        return o * torch.sigmoid(lse - sink[None, :, None])[..., None].to(o.dtype)

    return call


def attention(d: int, n: int, causal: bool) -> Race:
    """bf16 attention of 16k tokens and 2048 features in all, as the FlashAttention papers time it."""
    heads, batch = 2048 // d, max(1, 16384 // n)
    extents = {"b": batch, "h": heads, "q": n, "k": n, "d": d, "f": d}
    peers: dict[str, Peer] = {
        "torch math": partial(_sdpa, "MATH", causal),
        "flash": partial(_sdpa, "FLASH_ATTENTION", causal),
        "cudnn": partial(_sdpa, "CUDNN_ATTENTION", causal),
        "efficient": partial(_sdpa, "EFFICIENT_ATTENTION", causal),
        "flash-attn": partial(_flash, causal),
        "flex": partial(_flex, "causal" if causal else ""),
    }
    if n > 4096:
        del peers["torch math"]
    flops = 4.0 * batch * heads * n * n * d * (0.5 if causal else 1.0)
    name = "attention_causal" if causal else "attention"
    return Race(f"{name} d={d} n={n}", _example(name), extents, peers, flops=flops, tiny=TINY)


def _sdpa_backward(backend: str, causal: bool, inputs: Inputs) -> Call:
    """The gradients of a forward pass that has run already."""
    import torch

    q, k, v = (inputs[n].detach().requires_grad_() for n in "QKV")
    o = _sdpa(backend, causal, {**inputs, "Q": q, "K": k, "V": v})()
    return lambda: torch.autograd.grad(o, (q, k, v), inputs["dO"], retain_graph=True)


def _flex_backward(mask: str, inputs: Inputs) -> Call:
    import torch
    import torch._functorch.config as compiled

    # Else the compiled backward pass overwrites what the forward pass left, and refuses to run a second time.
    if hasattr(compiled, "donated_buffer"):
        compiled.donated_buffer = False
    q, k, v = (inputs[n].detach().requires_grad_() for n in "QKV")
    o = _flex(mask, {**inputs, "Q": q, "K": k, "V": v})()
    return lambda: torch.autograd.grad(o, (q, k, v), inputs["dO"], retain_graph=True)


def _forward(causal: bool, inputs: dict[str, Any]) -> dict[str, Any]:
    """A backward pass reads what the forward pass left: the output and its log-sum-exp, in f32 and a head at a time."""
    import torch

    o, lse = torch.empty_like(inputs["O"]), torch.empty_like(inputs["LSE"])
    for b in range(o.shape[0]):
        for h in range(o.shape[1]):
            q, k, v = (inputs[n][b, h].float() for n in "QKV")
            s = float(inputs["scale"]) * (q @ k.T)
            if causal:
                s.masked_fill_(torch.ones_like(s, dtype=torch.bool).triu_(1), float("-inf"))
            lse[b, h] = torch.logsumexp(s, -1)
            o[b, h] = (torch.exp(s - lse[b, h][:, None]) @ v).to(o.dtype)
    return {**inputs, "O": o, "LSE": lse}


def backward(d: int, n: int, causal: bool) -> Race:
    """Gradients of attention from the saved output and log-sum-exp: five products against the forward pass's two."""
    heads, batch = 2048 // d, max(1, 16384 // n)
    extents = {"b": batch, "h": heads, "q": n, "k": n, "d": d, "f": d}
    peers: dict[str, Peer] = {
        "flash": partial(_sdpa_backward, "FLASH_ATTENTION", causal),
        "cudnn": partial(_sdpa_backward, "CUDNN_ATTENTION", causal),
        "efficient": partial(_sdpa_backward, "EFFICIENT_ATTENTION", causal),
        "flex": partial(_flex_backward, "causal" if causal else ""),
    }
    if n <= 4096:
        peers["torch math"] = partial(_sdpa_backward, "MATH", causal)
    flops = 10.0 * batch * heads * n * n * d * (0.5 if causal else 1.0)
    c = _example("attention_backward")
    if causal:
        c = castile.parse(str(c).replace("exp(S[b, h, q, k] -", "exp(where(q >= k, S[b, h, q, k], -inf) -"))
    name = f"backward causal d={d} n={n}" if causal else f"backward d={d} n={n}"
    return Race(name, c, extents, peers, flops=flops, tiny=TINY, prepare=partial(_forward, causal))


def _with_window(inputs: dict[str, Any]) -> dict[str, Any]:
    return {**inputs, "window": WINDOW}


def _with_cap(inputs: dict[str, Any]) -> dict[str, Any]:
    return {**inputs, "cap": CAP}


def _with_documents(inputs: dict[str, Any]) -> dict[str, Any]:
    """Documents of equal length, one after the other."""
    import torch

    n = inputs["doc_q"].shape[1]
    ids = (torch.arange(n, device=inputs["doc_q"].device) * DOCUMENTS // max(1, n)).to(torch.int32)
    ids = ids.expand(inputs["doc_q"].shape).contiguous()
    return {**inputs, "doc_q": ids, "doc_k": ids.clone()}


# Masks and scores that FlexAttention is made for: what prepares the inputs, and the share of a square that is computed.
VARIANTS: Mapping[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "window": _with_window,
    "softcap": _with_cap,
    "alibi": dict,
    "document": _with_documents,
    "sink": dict,
}


def variant(name: str, n: int) -> Race:
    d = 128
    heads, batch = 2048 // d, max(1, 16384 // n)
    extents = {"b": batch, "h": heads, "q": n, "k": n, "d": d, "f": d}
    share = {"window": min(0.5, WINDOW / n), "document": 0.5 / DOCUMENTS}.get(name, 0.5)
    return Race(
        f"{name} d={d} n={n}",
        _example(f"attention_{name}"),
        extents,
        {"flex": partial(_flex, name)},
        flops=4.0 * batch * heads * n * n * d * share,
        tiny=TINY,
        prepare=VARIANTS[name],
    )


def decode(n: int) -> Race:
    """One query of each of 32 heads against a long cache: what counts is bytes."""
    extents = {"b": 1, "h": 32, "q": 1, "k": n, "d": 128, "f": 128}
    peers = {name: build for name, build in attention(128, 1024, False).peers.items() if name != "torch math"}
    moved = 2.0 * 2 * 32 * n * 128
    return Race(f"decode n={n}", _example("attention"), extents, peers, bytes=moved, tiny=TINY)


def grouped_decode(n: int) -> Race:
    """One query of each of 32 heads, four of which share a head of keys and values, for 8 sequences."""
    text = str(_example("attention")).replace("K[b, h,", "K[b, h // 4,").replace("V[b, h,", "V[b, h // 4,")
    text = text.replace("bf16[b, h, k", "bf16[b, h // 4, k").replace("def attention(", "def attention_grouped(")
    extents = {"b": 8, "h": 32, "q": 1, "k": n, "d": 128, "f": 128}
    peers = {name: build for name, build in attention(128, 1024, False).peers.items() if name != "torch math"}
    moved = 8 * 2.0 * 2 * 8 * n * 128
    tiny = {**TINY, "h": 4, "q": 1}
    return Race(f"decode gqa n={n}", castile.parse(text), extents, peers, bytes=moved, tiny=tiny)


# Rows


def softmax(columns: int) -> Race:
    rows = max(1, (1 << 27) // columns)

    def torch_softmax(inputs: Inputs) -> Call:
        import torch

        return partial(torch.softmax, inputs["X"], -1)

    def inductor(inputs: Inputs) -> Call:
        import torch

        compiled: Any = torch.compile(lambda x: torch.softmax(x, -1))
        return partial(compiled, inputs["X"])

    peers: dict[str, Peer] = {"torch softmax": torch_softmax, "inductor": inductor}
    size = {"n": rows, "k": columns}
    moved = 8.0 * rows * columns
    return Race(f"softmax k={columns}", _example("softmax"), size, peers, bytes=moved, tiny={"n": 3, "k": 50})


def norm(name: str, columns: int) -> Race:
    """rmsnorm of bf16 or layernorm of f32, of 2^26 elements."""
    rows = max(1, (1 << 26) // columns)

    def function(inputs: Inputs) -> Callable[..., Any]:
        import torch

        shape, eps = inputs["X"].shape[-1:], float(inputs["eps"])
        if name == "rmsnorm":
            return lambda x, gamma: torch.nn.functional.rms_norm(x, shape, gamma, eps)
        return lambda x, gamma, beta: torch.nn.functional.layer_norm(x, shape, gamma, beta, eps)

    def tensors(inputs: Inputs) -> list[Any]:
        return [inputs[n] for n in ("X", "gamma", "beta") if n in inputs]

    def torch_norm(inputs: Inputs) -> Call:
        return partial(function(inputs), *tensors(inputs))

    def inductor(inputs: Inputs) -> Call:
        import torch

        compiled: Any = torch.compile(function(inputs))
        return partial(compiled, *tensors(inputs))

    peers: dict[str, Peer] = {f"torch {name}": torch_norm, "inductor": inductor}
    moved = (4.0 if name == "rmsnorm" else 8.0) * rows * columns
    tiny = {"n": 3, "k": 50}
    return Race(f"{name} k={columns}", _example(name), {"n": rows, "k": columns}, peers, bytes=moved, tiny=tiny)


# Products


def gemm(n: int) -> Race:
    def cublas(inputs: Inputs) -> Call:
        import torch

        return partial(torch.matmul, inputs["A"], inputs["B"])

    def inductor(inputs: Inputs) -> Call:
        import torch

        compiled: Any = torch.compile(lambda a, b: a @ b, mode="max-autotune-no-cudagraphs")
        return partial(compiled, inputs["A"], inputs["B"])

    extents = {"m": n, "n": n, "k": n}
    peers: dict[str, Peer] = {"torch cublas": cublas, "inductor": inductor}
    tiny = {"m": 20, "n": 20, "k": 20}
    return Race(f"gemm n={n}", _example("gemm"), extents, peers, flops=2.0 * n**3, tiny=tiny)


def unpacked(inputs: Inputs) -> tuple[Any, Any, Any]:
    """Codes of `gemm_int4` as bytes, with the scale and the zero of each: [k, n]."""
    import torch

    words = inputs["W"].view(torch.int32)
    shifts = 4 * torch.arange(8, device=words.device, dtype=torch.int32)
    codes = (words[:, None] >> shifts[None, :, None]) & 15
    k = inputs["A"].shape[1]
    spread = [inputs[name].repeat_interleave(128, 0)[:k] for name in ("scale", "zero")]
    return codes.reshape(-1, words.shape[1])[:k].to(torch.uint8), spread[0], spread[1]


def int4(m: int) -> Race:
    """4-bit weights in groups of 128, 8192 by 8192, beside a product of 16-bit ones and gemlite's own."""
    n = 8192
    c = _example("gemm_int4")

    def half(inputs: Inputs) -> Call:
        import torch

        codes, scale, zero = unpacked(inputs)
        w = (scale.float() * (codes.float() - zero.float())).to(inputs["A"].dtype).T.contiguous()
        return partial(torch.nn.functional.linear, inputs["A"], w)

    def gemlite(inputs: Inputs) -> Call:
        from gemlite.core import DType, GemLiteLinear  # type: ignore[import-not-found, unused-ignore]

        layer = GemLiteLinear(
            4, group_size=128, in_features=n, out_features=n, input_dtype=DType.FP16, output_dtype=DType.FP16
        )
        codes, scale, zero = unpacked(inputs)
        # Codes lie output by output, and a scale and a zero for each group of them.
        groups = [x[::128].T.reshape(-1, 1).half() for x in (scale, zero)]
        layer.pack(codes.T.contiguous(), *groups, None)
        return partial(layer, inputs["A"].half())

    extents = {"m": m, "n": n, "k": n}
    return Race(
        f"int4 m={m}",
        c,
        extents,
        {"torch half": half, "gemlite": gemlite},
        bytes=0.5 * n * n,
        tiny={"m": 3, "n": 16, "k": 128},
    )
