"""Products, plain, with weights of four bits, and with what comes before and after them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import castile
from castile.benchmarks._workload import CASCADES, Tensors, Workload, compiled, text_of


def gemm(dtype: str, m: int, n: int, k: int) -> Workload:
    """A plain product against ``torch.mm(out=)``."""
    import torch

    def mm(x: Tensors) -> Callable[[], object]:
        out = torch.empty((len(x["A"]), x["B"].shape[1]), dtype=x["A"].dtype)
        return lambda: torch.mm(x["A"], x["B"], out=out)

    result = f": {dtype}" if dtype != "f32" else ""
    c = castile.parse(
        f"def gemm(A: {dtype}[m, k], B: {dtype}[k, n]) -> C:\n    C[m, n]{result} = sum[k](A[m, k] * B[k, n])\n"
    )
    name = f"gemm {dtype} {m}x{n}x{k}"
    extents = {"m": m, "n": n, "k": k}
    return Workload(name, c, extents, {"torch": mm}, True, 2.0 * m * n * k, {"m": 17, "n": 40, "k": 33})


def gemm_gelu(size: int) -> Workload:
    """Product, bias and GELU against PyTorch's sequence of them."""
    import torch

    def sequence(x: Tensors) -> Callable[[], object]:
        return lambda: torch.nn.functional.gelu(torch.addmm(x["bias"], x["A"], x["B"]))

    c = castile.parse(
        "def gemm_bias_gelu(A: f32[m, k], B: f32[k, n], bias: f32[n]) -> Y:\n"
        "    H[m, n] = sum[k](A[m, k] * B[k, n]) + bias[n]\n"
        "    Y[m, n] = 0.5 * H[m, n] * (1.0 + erf(H[m, n] * 0.7071067811865476))\n"
    )
    extents = {"m": size, "n": size, "k": size}
    return Workload(
        f"gemm+bias+gelu f32 {size}", c, extents, {"torch": sequence}, flops=2.0 * size**3, small={"m": 9, "n": 40}
    )


def gemm_int4(m: int, size: int = 4096, group: int = 128, tiles: bool = False) -> Workload:
    """Weights of four bits, in rows of words or ``tiles`` of 64 columns, against torch's own such kernel and its bf16
    product in both layouts."""
    import torch

    def rows(x: Any) -> Any:
        return x.movedim(0, -2).flatten(-2) if tiles else x

    def prepare(x: dict[str, Any]) -> Tensors:
        # Scales of few digits: torch takes scale * (8 - zero) as one bf16, which is to hold it.
        x["scale"] = (torch.round(x["scale"].float().clamp(-2, 2) * 2) / 128 + 1 / 16).to(torch.bfloat16)
        if tiles:
            x["bias"] = torch.zeros_like(x["bias"])
        return x

    def weights(x: Tensors) -> Any:
        words = rows(x["W"].view(torch.int32))
        return torch.stack([words >> (4 * i) & 15 for i in range(8)], 1).flatten(0, 1)  # [k, n]

    def int4(x: Tensors) -> Callable[[], object]:
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(weights(x).T.contiguous(), 1)
        scale, zero = rows(x["scale"]), rows(x["zero"])
        pairs = torch.stack([scale, scale * (8.0 - zero)], -1).to(torch.bfloat16).contiguous()
        return lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(x["A"], packed, group, pairs)

    def plain(x: Tensors) -> Any:
        scale, zero = (rows(x[name]).float().repeat_interleave(group, 0) for name in ("scale", "zero"))
        return (scale * (weights(x) - zero)).to(torch.bfloat16)

    def bf16(x: Tensors) -> Callable[[], object]:
        b = plain(x)
        return lambda: torch.mm(x["A"], b)

    def bf16_nk(x: Tensors) -> Callable[[], object]:
        b = plain(x).T.contiguous()
        return lambda: torch.mm(x["A"], b.T)

    return Workload(
        f"int4 gemm {'in tiles ' if tiles else ''}{m}x{size}x{size}",
        castile.load(CASCADES / f"gemm_int4{'_tiles' if tiles else ''}.cascade"),
        {"m": m, "n": size, "k": size},
        {"torch int4": int4, "torch bf16 [k, n]": bf16, "torch bf16 [n, k]": bf16_nk},
        flops=2.0 * m * size * size,
        small={"m": min(m, 17), "n": 64, "k": 256},
        prepare=prepare,
    )


def gemm_int8(size: int) -> Workload:
    """Bytes with their scales and a bias against torch's integer product and what comes after it."""
    import torch

    def sequence(x: Tensors) -> Callable[[], object]:
        b, rows = x["B"].T.contiguous(), x["sa"][:, None]
        return lambda: (torch._int_mm(x["A"], b) * rows * x["sb"] + x["bias"]).to(torch.bfloat16)

    return _short("gemm_int8", f"int8 gemm {size}", size, {"torch int8": sequence})


def gemm_fp8(size: int) -> Workload:
    """8-bit floats with their scales against torch's bf16 product of the same weights, widened beforehand."""
    import torch

    def widened(x: Tensors) -> Callable[[], object]:
        b, rows = x["B"].to(torch.bfloat16).T, x["sa"][:, None]
        return lambda: (torch.mm(x["A"].to(torch.bfloat16), b) * rows * x["sb"]).to(torch.bfloat16)

    return _short("gemm_fp8", f"fp8 gemm {size}", size, {"torch, bf16 weights": widened})


def _short(
    example: str, name: str, size: int, peers: Mapping[str, Callable[[Tensors], Callable[[], object]]]
) -> Workload:
    c = castile.load(CASCADES / f"{example}.cascade")
    extents = {"m": size, "n": size, "k": size}
    return Workload(name, c, extents, peers, flops=2.0 * size**3, small={"m": 17, "n": 40, "k": 48}, slack=64.0)


def gemm_residual(dtype: str, size: int) -> Workload:
    """A linear layer that adds to the residual stream, against PyTorch's two calls."""
    import torch

    def sequence(x: Tensors) -> Callable[[], object]:
        return lambda: x["R"] + torch.nn.functional.linear(x["A"], x["W"], x["bias"])

    return _fused("gemm_residual", f"gemm+residual {dtype} {size}", dtype, size, sequence)


def norm_gemm(norm: str, dtype: str, size: int) -> Workload:
    """A norm and the linear layer after it, against PyTorch's two calls and Inductor."""
    import torch

    def act(x: Tensors) -> Any:
        shape = x["gamma"].shape
        if norm == "rmsnorm":
            return torch.nn.functional.rms_norm(x["X"], shape, x["gamma"], 1e-5) @ x["W"]
        return torch.nn.functional.layer_norm(x["X"], shape, x["gamma"], x["beta"], 1e-5) @ x["W"]

    def alike(x: Tensors) -> Tensors:
        return {**x, **{name: x[name].to(x["X"].dtype) for name in ("gamma", "beta") if name in x}}

    def sequence(x: Tensors) -> Callable[[], object]:
        given = alike(x)
        return lambda: act(given)

    inductor = compiled(act)
    made = _fused(f"{norm}_gemm", f"{norm}+gemm {dtype} {size}", dtype, size, sequence)
    return replace(made, peers={**made.peers, "inductor": lambda x: inductor(alike(x))})


def _fused(
    example: str, name: str, dtype: str, size: int, sequence: Callable[[Tensors], Callable[[], object]]
) -> Workload:
    c = castile.parse(text_of(example, bf16=dtype))
    extents = {"m": size, "n": size, "k": size}
    small = {"m": 17, "n": 40, "k": 48}
    return Workload(name, c, extents, {"torch": sequence}, flops=2.0 * size**3, small=small, scalars={"eps": 1e-5})
