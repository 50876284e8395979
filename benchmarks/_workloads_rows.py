"""Softmax, norms and losses: what reads rows once or twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import castile
from castile.benchmarks._workload import CASCADES, Tensors, Workload, compiled, text_of


def softmax(m: int, n: int) -> Workload:
    """Softmax over rows against ``torch.softmax(out=)`` and Inductor."""
    import torch

    def eager(x: Tensors) -> Callable[[], object]:
        out = torch.empty_like(x["X"])
        return lambda: torch.softmax(x["X"], -1, out=out)

    c = castile.parse(
        "def softmax(X: f32[m, n]) -> Y:\n    M[m] = max[n](X[m, n])\n    E[m, n] = exp(X[m, n] - M[m])\n"
        "    Y[m, n] = E[m, n] / sum[n](E[m, n])\n"
    )
    return Workload(f"softmax f32 {m}x{n}", c, {"m": m, "n": n}, {"torch": eager}, True, small={"m": 9, "n": 70})


def softmax_columns(m: int, n: int) -> Workload:
    """Softmax over the first axis against ``torch.softmax(out=)``."""
    import torch

    def eager(x: Tensors) -> Callable[[], object]:
        out = torch.empty_like(x["X"])
        return lambda: torch.softmax(x["X"], 0, out=out)

    c = castile.parse(
        "def softmax(X: f32[m, n]) -> Y:\n    M[n] = max[m](X[m, n])\n    E[m, n] = exp(X[m, n] - M[n])\n"
        "    Y[m, n] = E[m, n] / sum[m](E[m, n])\n"
    )
    return Workload(f"softmax axis 0 f32 {m}x{n}", c, {"m": m, "n": n}, {"torch": eager}, True, small={"m": 70, "n": 9})


def norm(name: str, m: int, n: int) -> Workload:
    """RMSNorm and LayerNorm against PyTorch's functions and Inductor."""
    import torch

    functional = torch.nn.functional
    if name == "rmsnorm":
        text = (
            "def rmsnorm(X: f32[m, n], G: f32[n]) -> Y:\n"
            "    R[m] = rsqrt(sum[n](X[m, n] ** 2) / extent(n) + 1e-5)\n    Y[m, n] = X[m, n] * R[m] * G[n]\n"
        )

        def act(x: Tensors) -> Any:
            return functional.rms_norm(x["X"], (n,), x["G"], 1e-5)
    else:
        text = (
            "def layernorm(X: f32[m, n], G: f32[n], B: f32[n]) -> Y:\n"
            "    mu[m] = sum[n](X[m, n]) / extent(n)\n    V[m] = sum[n]((X[m, n] - mu[m]) ** 2) / extent(n)\n"
            "    Y[m, n] = (X[m, n] - mu[m]) * rsqrt(V[m] + 1e-5) * G[n] + B[n]\n"
        )

        def act(x: Tensors) -> Any:
            return functional.layer_norm(x["X"], (x["X"].shape[1],), x["G"], x["B"], 1e-5)

    def eager(x: Tensors) -> Callable[[], object]:
        return lambda: act(x)

    def inductor(x: Tensors) -> Callable[[], object]:
        made = torch.compile(act)
        made(x)
        return lambda: made(x)

    return Workload(
        f"{name} f32 {m}x{n}",
        castile.parse(text),
        {"m": m, "n": n},
        {"inductor": inductor, "torch": eager},
        small={"m": 5},
    )


def kl_distillation(n: int, v: int) -> Workload:
    """The divergence of a student from its teacher, row by row, against Inductor."""
    from torch.nn.functional import kl_div, log_softmax

    def act(x: Tensors) -> Any:
        teacher, student = (log_softmax(x[name] / 2.0, -1) for name in "TS")
        return 4.0 * kl_div(student, teacher, reduction="none", log_target=True).sum(-1)

    return Workload(
        f"kl distillation f32 {n}x{v}",
        castile.load(CASCADES / "kl_distillation.cascade"),
        {"n": n, "v": v},
        {"inductor": compiled(act)},
        small={"n": 5, "v": 70},
        scalars={"temperature": 2.0},
    )


def softmax_entropy(n: int, k: int) -> Workload:
    """The entropy of every row's softmax, against Inductor."""
    import torch

    def act(x: Tensors) -> Any:
        logs = torch.log_softmax(x["X"], -1)
        return -(logs.exp() * logs).sum(-1)

    return Workload(
        f"softmax entropy f32 {n}x{k}",
        castile.load(CASCADES / "softmax_entropy.cascade"),
        {"n": n, "k": k},
        {"inductor": compiled(act)},
        small={"n": 5, "k": 70},
    )


def linear_cross_entropy(dtype: str, n: int, v: int, d: int) -> Workload:
    """A language model's last layer and its loss, against PyTorch's two calls, which hold all logits."""
    from torch.nn.functional import cross_entropy, linear

    def prepare(x: dict[str, Any]) -> Tensors:
        x["W"] = x["W"] * d**-0.5  # logits of unit variance
        x["target"] = x["target"] * 7919 % x["W"].shape[0]
        return x

    def act(x: Tensors) -> Any:
        return cross_entropy(linear(x["H"], x["W"]).float(), x["target"])

    def eager(x: Tensors) -> Callable[[], object]:
        return lambda: act(x)

    return Workload(
        f"linear+cross-entropy {dtype} {n}x{v}x{d}",
        castile.parse(text_of("linear_cross_entropy", bf16=dtype)),
        {"n": n, "v": v, "d": d},
        {"torch": eager},
        flops=2.0 * n * v * d,
        small={"n": 5, "v": 70, "d": 24},
        prepare=prepare,
        memory="X",
    )
