"""castile's CPU kernels beside PyTorch's, Inductor's and FlexAttention's: what `castile bench` runs.

A case is a cascade, the extents at which it runs, and how its peers say the same. Outputs of all are judged by the
cascade's own oracle, on a sample of their elements.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import castile
from castile.benchmarks._command import Options, main, wanted
from castile.benchmarks.harness import Candidate, Case, WrongOutput
from castile.ir.bound import judge
from castile.ir.extents import resolve, shape_of
from castile.ir.inputs import read_inputs
from castile.passes.work import operations, sizes_of, tensor_bytes, work

CASCADES = Path(__file__).resolve().parent.parent / "examples" / "cascades"

# Elements of each output that are compared with the oracle.
SAMPLE = 24

# Peers round where they like: they are only to compute the same thing; castile holds the bound itself.
PEER_SLACK, OWN_SLACK = 8.0, 1.0

Tensors = Mapping[str, Any]


@dataclass(frozen=True)
class Workload:
    """A cascade at given extents, and its peers: each builds, from the inputs, a call that returns the outputs.

    ``outs`` says whether the peers write into memory of their own (``out=``); then castile does too.
    """

    name: str
    cascade: castile.Cascade
    extents: Mapping[str, int]
    peers: Mapping[str, Callable[[Tensors], Callable[[], object]]]
    outs: bool = False
    flops: float | None = None
    small: Mapping[str, int] = field(default_factory=dict)


def text_of(name: str, **types: str) -> str:
    """The text of an example with dtypes replaced, as in ``bf16="f32"``."""
    text = (CASCADES / f"{name}.cascade").read_text(encoding="utf-8")
    for old, new in types.items():
        text = text.replace(f": {old}", f": {new}").replace(f"{old}(", f"{new}(")
    return text


def draw(c: castile.Cascade, extents: Mapping[str, int], rng: np.random.Generator) -> dict[str, Any]:
    """Inputs as torch tensors of the declared types; scalars are what makes scores of unit variance."""
    import torch

    found: dict[str, Any] = {}
    for p in c.params:
        shape = shape_of(c, p.name, extents)
        if not p.indices:
            found[p.name] = 0.125
            continue
        seed = int(rng.integers(1 << 62))
        generator = torch.Generator().manual_seed(seed)
        kind = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}.get(p.dtype)
        if kind is not None:
            found[p.name] = torch.randn(shape, generator=generator, dtype=torch.float32).to(kind)
        elif p.dtype == "u32":
            found[p.name] = torch.randint(-(2**31), 2**31, shape, generator=generator, dtype=torch.int32).view(
                torch.uint32
            )
        else:
            high = min(extents.values()) if p.dtype.startswith("i") else 15
            kinds = {"i64": torch.int64, "i32": torch.int32, "u8": torch.uint8, "i8": torch.int8}
            found[p.name] = torch.randint(0, high, shape, generator=generator, dtype=kinds[p.dtype])
    return found


def numbers(x: Any) -> Any:
    """A tensor as NumPy knows it, narrow floats widened."""
    import torch

    if not isinstance(x, torch.Tensor):
        return x
    return x.double().numpy() if x.is_floating_point() else x.numpy()


def verify(
    c: castile.Cascade, extents: Mapping[str, int], inputs: Tensors, outputs: object, slack: float = PEER_SLACK
) -> None:
    """Compare a sample of the outputs with the oracle; raises `AssertionError` where one is off by ``slack`` bounds."""
    given = outputs if isinstance(outputs, tuple | list) else (outputs,)
    rng = np.random.default_rng(0)
    arrays = {p.name: numbers(inputs[p.name]) for p in c.params}
    read_inputs(c, arrays)
    for name, output in zip(c.outputs, given, strict=True):
        ranks = [i.name for i in c.indices_of(name)]  # type: ignore[union-attr]
        at = {r: rng.integers(0, extents[r], SAMPLE) for r in ranks}
        got = numbers(output)[tuple(at[r] for r in ranks)]
        one = castile.parse(str(c).replace(_outputs_of(c), name, 1)) if len(c.outputs) > 1 else c
        for judgement in judge(one, arrays, {name: got}, at):
            if judgement.worst > slack:
                raise AssertionError(str(judgement))


def _outputs_of(c: castile.Cascade) -> str:
    return f"({', '.join(c.outputs)})"


def case_of(w: Workload, options: Options, mapping: castile.Mapping | None = None) -> Case[Tensors]:
    """The harness's case of a workload. The harness checks all candidates alike; castile is held to the bound first."""
    c = w.cascade
    extents = resolve(c, {**w.extents, **(w.small if options.quick else {})})
    kernel = castile.compile(c, "cpu", extents, mapping)

    held: list[bool] = []

    def ours(inputs: Tensors) -> Callable[[], object]:
        made = kernel(**inputs)
        if not held:
            try:
                verify(c, extents, inputs, made, OWN_SLACK)
            except AssertionError as error:
                raise WrongOutput(f"{w.name}: castile: {error}") from error
            held.append(True)
        return partial(kernel, **inputs, out=made) if w.outs else partial(kernel, **inputs)

    sizes = sizes_of(c, extents)
    done = {unit: p.at(sizes) for unit, p in operations(work(c)).items()}
    moved = tensor_bytes(c)
    touched = sum(moved[n].at(sizes) for n in [*c.param_of, *c.outputs])
    candidates = [Candidate(name, build, allocates=not w.outs) for name, build in w.peers.items()]
    candidates.append(Candidate("castile", ours, allocates=not w.outs))
    return Case(
        name=w.name,
        inputs=partial(draw, c, extents),
        candidates=tuple(candidates),
        baseline=next(iter(w.peers)),
        check=partial(verify, c, extents),
        flops=w.flops or float(sum(done.values())),
        bytes=float(touched),
        cache="out" if touched > 1 << 16 else "in",
    )


# The workloads


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


def attention(dtype: str, d: int, causal: bool, q: int = 2048, heads: int = 8) -> Workload:
    """Attention forward against ``scaled_dot_product_attention``."""
    import torch

    def sdpa(x: Tensors) -> Callable[[], object]:
        attend = torch.nn.functional.scaled_dot_product_attention
        return lambda: attend(x["Q"], x["K"], x["V"], is_causal=causal, scale=0.125)

    c = castile.parse(text_of("attention_causal" if causal else "attention", bf16=dtype))
    name = f"attention {dtype} D={d} {q}" + (" causal" if causal else "")
    extents = {"b": 1, "h": heads, "q": q, "k": q, "d": d, "f": d}
    flops = 4.0 * heads * q * q * d * (0.5 if causal else 1.0)
    return Workload(name, c, extents, {"torch": sdpa}, flops=flops, small={"h": 2, "q": 70, "k": 70})


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


def workloads() -> Iterator[Workload]:
    """All of them, the cheap ones first."""
    yield softmax(4096, 4096)
    yield softmax(64, 1 << 20)
    yield softmax(2, 1 << 25)
    for dtype in ("f32", "bf16"):
        for d in (64, 128):
            for causal in (False, True):
                yield attention(dtype, d, causal)
    yield attention("bf16", 64, False, 1900)
    yield decode(8, 1, 8192, 128)
    yield decode(32, 4, 8192, 128)
    for dtype in ("f32", "bf16"):
        yield gemm(dtype, 1024, 1024, 1024)
        yield gemm(dtype, 511, 2050, 1000)
        yield gemm(dtype, 8, 4096, 4096)
    yield gemm_gelu(1024)
    yield norm("rmsnorm", 4096, 4096)
    yield norm("layernorm", 4096, 4096)


def cases(options: Options) -> Iterator[Case[Tensors]]:
    """The cases, each built when its turn comes."""
    import torch

    torch.set_num_threads(options.threads)
    for w in workloads():
        if wanted(w.name, options.only):
            yield case_of(w, options)


if __name__ == "__main__":
    raise SystemExit(main("kernels", cases))
