"""Attention forward, backward and decode."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import castile
from castile.benchmarks._workload import CASCADES, Tensors, Workload, text_of


def attention(dtype: str, d: int, causal: bool, q: int = 2048, heads: int = 8, against_flex: bool = False) -> Workload:
    """Attention forward against ``scaled_dot_product_attention``, and FlexAttention if asked for."""
    import torch

    def sdpa(x: Tensors) -> Callable[[], object]:
        attend = torch.nn.functional.scaled_dot_product_attention
        return lambda: attend(x["Q"], x["K"], x["V"], is_causal=causal, scale=0.125)

    c = castile.parse(text_of("attention_causal" if causal else "attention", bf16=dtype))
    name = f"attention {dtype} D={d} {q}" + (" causal" if causal else "")
    peers = {"torch": sdpa} | ({"flex": flex("attention_causal" if causal else "attention")} if against_flex else {})
    extents = {"b": 1, "h": heads, "q": q, "k": q, "d": d, "f": d}
    flops = 4.0 * heads * q * q * d * (0.5 if causal else 1.0)
    return Workload(name, c, extents, peers, flops=flops, small={"h": 2, "q": 70, "k": 70})


def decode(heads: int, shared: int, keys: int, d: int) -> Workload:
    """One query against many keys, ``shared`` query heads to a KV head."""
    import torch

    def sdpa(x: Tensors) -> Callable[[], object]:
        attend = torch.nn.functional.scaled_dot_product_attention
        return lambda: attend(x["Q"], x["K"], x["V"], scale=0.125, enable_gqa=shared > 1)

    c = castile.parse(
        "def decode(Q: bf16[b, h, q, d], K: bf16[b, h // "
        + str(shared)
        + ", k, d], V: bf16[b, h // "
        + str(shared)
        + ", k, f], scale: f32) -> O:\n"
        f"    S[b, h, q, k] = scale * sum[d](Q[b, h, q, d] * K[b, h // {shared}, k, d])\n"
        "    P[b, h, q, k] = exp(S[b, h, q, k] - max[k](S[b, h, q, k]))\n"
        f"    O[b, h, q, f]: bf16 = sum[k](P[b, h, q, k] / sum[k](P[b, h, q, k]) * V[b, h // {shared}, k, f])\n"
    )
    extents = {"b": 1, "h": heads, "q": 1, "k": keys, "d": d, "f": d}
    small = {"k": 70}
    return Workload(f"decode bf16 {heads}:{heads // shared} {keys}", c, extents, {"torch": sdpa}, small=small)


WINDOW, CAP, DOCUMENTS = 256, 50.0, 8


def flex(example: str) -> Callable[[Tensors], Callable[[], object]]:
    """Compiled FlexAttention for an example, its mask in blocks made beforehand."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def causal(b: Any, h: Any, q: Any, k: Any) -> Any:
        return q >= k

    def windowed(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (q >= k) & (q - k < WINDOW)

    def behind_sink(b: Any, h: Any, q: Any, k: Any) -> Any:
        return q + 1 >= k

    @cache
    def blocks(q: int, k: int) -> Any:
        if example == "attention":
            return None
        rule = {"attention_window": windowed, "attention_sink": behind_sink}.get(example, causal)
        if example == "attention_document":
            ids = documents(q)

            def rule(b: Any, h: Any, q: Any, k: Any) -> Any:
                return (ids[q] == ids[k]) & (q >= k)

        return create_block_mask(rule, None, None, q, k, device="cpu")

    def plain(x: Tensors, mask: Any) -> Any:
        return flex_attention(x["Q"], x["K"], x["V"], block_mask=mask, scale=0.125)

    def capped(x: Tensors, mask: Any) -> Any:
        def score(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
            return CAP * torch.tanh(s / CAP)

        return flex_attention(x["Q"], x["K"], x["V"], score_mod=score, block_mask=mask, scale=0.125)

    def biased(x: Tensors, mask: Any) -> Any:
        slope = x["slope"]

        def score(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
            return s - slope[h] * (q - k)

        return flex_attention(x["Q"], x["K"], x["V"], score_mod=score, block_mask=mask, scale=0.125)

    def sunk(x: Tensors, mask: Any) -> Any:
        sink = x["sink"]

        def score(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
            return torch.where(k == 0, sink[h], s)

        return flex_attention(x["Q"], x["K"], x["V"], score_mod=score, block_mask=mask, scale=0.125)

    modes = {"attention_softcap": capped, "attention_alibi": biased, "attention_sink": sunk}
    made = torch.compile(modes.get(example, plain))

    def build(x: Tensors) -> Callable[[], object]:
        given = {name: value for name, value in x.items() if isinstance(value, torch.Tensor)}
        if example == "attention_sink":
            # On the CPU it gives no log-sum-exp to weigh a sink with: the sink is a first key whose value is 0.
            for name in ("K", "V"):
                given[name] = torch.nn.functional.pad(x[name], (0, 0, 1, 0)).contiguous()
        mask = blocks(given["Q"].shape[2], given["K"].shape[2])
        made(given, mask)
        return lambda: made(given, mask)

    return build


def documents(length: int) -> Any:
    """Which of `DOCUMENTS` documents each position of a packed sequence belongs to, i32; they are unequally long."""
    import torch

    ends = torch.tensor([length * (i + 1) ** 2 // DOCUMENTS**2 for i in range(DOCUMENTS - 1)])
    return torch.searchsorted(ends, torch.arange(length), right=True).to(torch.int32)


def masked(kind: str, q: int = 2048, heads: int = 8) -> Workload:
    """A mask or a score of its own, causal besides, against compiled FlexAttention."""
    name = f"attention_{kind}"
    c = castile.load(CASCADES / f"{name}.cascade")

    def prepare(x: dict[str, Any]) -> Tensors:
        if kind == "document":
            x["doc_q"] = x["doc_k"] = documents(x["doc_q"].shape[1])[None]
        if kind == "alibi":
            x["slope"] = 2.0 ** -torch.arange(1, len(x["slope"]) + 1)
        return x

    import torch

    extents = {"b": 1, "h": heads, "q": q, "k": q, "d": 64, "f": 64}
    scalars = {"window": WINDOW, "cap": CAP}
    return Workload(
        f"attention {kind} bf16 D=64 {q}",
        c,
        extents,
        {"flex": flex(name)},
        flops=2.0 * heads * q * q * 64,
        small={"h": 2, "q": 70, "k": 70},
        scalars=scalars,
        prepare=prepare,
    )


def window(dtype: str, q: int = 4096, width: int = 128, heads: int = 8) -> Workload:
    """A sliding window against castile's own dense kernel: what is masked must cost nothing."""
    c, dense = (castile.parse(text_of(name, bf16=dtype)) for name in ("attention_window", "attention"))
    return Workload(
        f"window {dtype} D=64 {width} of {q}",
        c,
        {"b": 1, "h": heads, "q": q, "k": q, "d": 64, "f": 64},
        {},
        flops=4.0 * heads * q * width * 64,
        small={"h": 2, "q": 150, "k": 150},
        scalars={"window": width},
        others={"dense": dense},
    )


def backward(dtype: str, d: int, causal: bool, q: int = 2048, heads: int = 8) -> Workload:
    """Gradients from the saved log-sum-exp, as `castile.grad` derives them, against torch's own backward."""
    import torch

    attend = torch.nn.functional.scaled_dot_product_attention
    c = castile.grad(
        castile.parse(text_of("attention_causal" if causal else "attention", bf16=dtype)), ("Q", "K", "V"), "lse"
    )

    def prepare(x: dict[str, Any]) -> Tensors:
        """What the forward pass saves."""
        x["O"] = attend(x["Q"], x["K"], x["V"], is_causal=causal, scale=0.125)
        hidden = torch.ones(x["Q"].shape[2], x["K"].shape[2], dtype=torch.bool).triu(1)
        for head in range(x["Q"].shape[1]):
            scores = 0.125 * x["Q"][:, head].float() @ x["K"][:, head].float().mT
            x["lse"][:, head] = (scores.masked_fill(hidden, -torch.inf) if causal else scores).logsumexp(-1)
        return x

    def sdpa(x: Tensors) -> Callable[[], object]:
        leaves = [x[name].detach().clone().requires_grad_() for name in "QKV"]
        output = attend(leaves[0], leaves[1], leaves[2], is_causal=causal, scale=0.125)
        return lambda: torch.autograd.grad(output, leaves, x["dO"], retain_graph=True)

    return Workload(
        f"backward {dtype} D={d} {q}" + (" causal" if causal else ""),
        c,
        {"b": 1, "h": heads, "q": q, "k": q, "d": d, "f": d},
        {"torch": sdpa},
        flops=10.0 * heads * q * q * d * (0.5 if causal else 1.0),
        small={"h": 2, "q": 70, "k": 70},
        prepare=prepare,
    )
