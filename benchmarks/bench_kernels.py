"""castile's CPU kernels beside PyTorch's, Inductor's and FlexAttention's: what `castile bench` runs."""

from __future__ import annotations

from collections.abc import Iterator

from castile.benchmarks._command import Options, main, wanted
from castile.benchmarks._workload import Tensors, Workload, case_of
from castile.benchmarks._workloads_attention import attention, backward, decode, masked, window
from castile.benchmarks._workloads_gemm import gemm, gemm_fp8, gemm_gelu, gemm_int4, gemm_int8, gemm_residual, norm_gemm
from castile.benchmarks._workloads_rows import (
    kl_distillation,
    linear_cross_entropy,
    norm,
    softmax,
    softmax_columns,
    softmax_entropy,
)
from castile.benchmarks.harness import Case


def workloads() -> Iterator[Workload]:
    """All of them, the cheap ones first."""
    yield softmax(4096, 4096)
    yield softmax(64, 1 << 20)
    yield softmax(2, 1 << 25)
    yield softmax_columns(4096, 4096)
    for dtype in ("f32", "bf16"):
        for d in (64, 128):
            for causal in (False, True):
                yield attention(dtype, d, causal, against_flex=dtype == "bf16" and d == 64)
    for length in (1900, 2047):
        yield attention("bf16", 64, False, length)
    yield decode(8, 1, 8192, 128)
    yield decode(32, 4, 8192, 128)
    yield decode(32, 8, 8192, 128)
    for kind in ("window", "softcap", "alibi", "document", "sink"):
        yield masked(kind)
    yield window("bf16")
    for dtype in ("f32", "bf16"):
        for causal in (False, True):
            yield backward(dtype, 64, causal)
    for dtype in ("f32", "bf16"):
        yield gemm(dtype, 1024, 1024, 1024)
        yield gemm(dtype, 511, 2050, 1000)
        yield gemm(dtype, 8, 4096, 4096)
    yield gemm_gelu(1024)
    for m in (1, 16, 64, 256):
        yield gemm_int4(m)
        yield gemm_int4(m, tiles=True)
    yield gemm_int8(1024)
    yield gemm_fp8(1024)
    for dtype in ("f32", "bf16"):
        yield gemm_residual(dtype, 1024)
        yield norm_gemm("rmsnorm", dtype, 1024)
        yield norm_gemm("layernorm", dtype, 1024)
    yield norm("rmsnorm", 4096, 4096)
    yield norm("layernorm", 4096, 4096)
    yield kl_distillation(1024, 32000)
    yield softmax_entropy(1024, 32000)
    yield linear_cross_entropy("f32", 1024, 32000, 512)
    yield linear_cross_entropy("bf16", 1024, 32000, 512)


def cases(options: Options) -> Iterator[Case[Tensors]]:
    """The cases, each built when its turn comes."""
    import torch

    torch.set_num_threads(options.threads)
    for w in workloads():
        if wanted(w.name, options.only):
            yield case_of(w, options)


if __name__ == "__main__":
    raise SystemExit(main("kernels", cases))
