"""Cascades that are tuned by name, without a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from ..ir.cascade import Cascade
from ..ir.errors import UsageError, did_you_mean
from ..ir.parse import parse

_ATTENTION = """
def attention(Q: bf16[b, h, q, d], K: bf16[b, h, k, d], V: bf16[b, h, k, f], scale: f32) -> O:
    S[b, h, q, k] = scale * sum[d](Q[b, h, q, d] * K[b, h, k, d])
    M[b, h, q] = max[k](S[b, h, q, k])
    P[b, h, q, k] = exp(S[b, h, q, k] - M[b, h, q])
    L[b, h, q] = sum[k](P[b, h, q, k])
    A[b, h, q, k] = P[b, h, q, k] / L[b, h, q]
    O[b, h, q, f]: bf16 = sum[k](A[b, h, q, k] * V[b, h, k, f])
"""

_SOFTMAX = """
def softmax(X: f32[n, k]) -> Y:
    M[n] = max[k](X[n, k])
    P[n, k] = exp(X[n, k] - M[n])
    L[n] = sum[k](P[n, k])
    Y[n, k] = P[n, k] / L[n]
"""

_GEMM = """
def gemm(A: bf16[m, k], B: bf16[k, n]) -> C:
    C[m, n]: bf16 = sum[k](A[m, k] * B[k, n])
"""

_GEMM_INT4 = """
def gemm_int4(A: bf16[m, k], W: u32[k // 8, n], scale: bf16[k // {group}, n], zero: u8[k // {group}, n]) -> C:
    U[k, n] = W[k // 8, n] >> (4 * (k % 8)) & 15
    B[k, n] = scale[k // {group}, n] * (U[k, n] - zero[k // {group}, n])
    C[m, n]: bf16 = sum[k](A[m, k] * B[k, n])
"""

GROUPS = (16, 32, 64, 128, 256, 512)


@dataclass(frozen=True, slots=True)
class Preset:
    """A cascade, and its ranks that are as large as another one where nothing else is said."""

    text: str
    like: Mapping[str, str] = field(default_factory=dict)


PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "attention": Preset(_ATTENTION, MappingProxyType({"k": "q", "q": "k", "f": "d"})),
        "softmax": Preset(_SOFTMAX),
        "gemm": Preset(_GEMM),
    }
)


def preset(name: str, weights: str = "", group: int = 128) -> tuple[Cascade, Mapping[str, str]]:
    """A cascade by its name, and the ranks that follow others; ``weights`` may be "int4", for gemm.

    Raises `UsageError` for what does not exist.
    """
    if name not in PRESETS:
        hint = did_you_mean(name, PRESETS) or f"the names are {', '.join(PRESETS)}; or name a .cascade file"
        raise UsageError(f"no cascade is called `{name}`", hint=hint)
    chosen = PRESETS[name]
    if not weights:
        return parse(chosen.text.strip()), chosen.like
    if weights != "int4" or name != "gemm":
        raise UsageError(f"there is no `{name}` with weights `{weights}`", expected="gemm --w int4", got=weights)
    if group not in GROUPS:
        raise UsageError("no group of that size", expected=", ".join(map(str, GROUPS)), got=str(group))
    return parse(_GEMM_INT4.format(group=group).strip()), chosen.like
