"""References of products, quantised products and convolutions."""

from __future__ import annotations

import numpy as np
from example_attention import rotate
from example_case import Array, bf16, example, integers, uniform
from numpy import einsum
from numpy.lib.stride_tricks import sliding_window_view
from scipy.special import erf, expit, softmax

LINEAR = {"A": "bf16[3, 7]", "W": "bf16[5, 7]", "bias": "bf16[5]"}
HALVES = {"C": "f32[7, 32]", "S": "f32[7, 32]"}


@example(A="bf16[3, 7]", B="bf16[7, 5]")
def gemm(A, B):
    return bf16(A @ B)


@example(A="bf16[3, 7]", B="bf16[5, 7]")
def gemm_nt(A, B):
    return bf16(A @ B.T)


@example(A="bf16[7, 3]", B="bf16[7, 5]")
def gemm_tn(A, B):
    return A.T @ B


@example(A="bf16[2, 3, 7]", B="bf16[2, 7, 5]")
def gemm_batched(A, B):
    return bf16(A @ B)


@example(X="bf16[5, 7]", W="bf16[3, 7, 4]", expert=integers(0, 3, 5), weight="f32[5]")
def gemm_grouped(X, W, expert, weight):
    return bf16(np.stack([w * (x @ W[e]) for x, e, w in zip(X, expert, weight, strict=True)]))


@example(A="bf16[3, 7]", B="bf16[7, 5]", X="bf16[5, 2]")
def gemm_chain(A, B, X):
    return bf16(A @ (B @ X))


@example(**LINEAR)
def gemm_bias_gelu(A, W, bias):
    Z = A @ W.T + bias
    return bf16(Z * (1 + erf(Z / np.sqrt(2))) / 2)


@example(**LINEAR)
def gemm_bias_gelu_tanh(A, W, bias):
    Z = A @ W.T + bias
    return bf16(Z * (1 + np.tanh(np.sqrt(2 / np.pi) * (Z + 0.044715 * Z**3))) / 2)


@example(**LINEAR, R="bf16[3, 5]")
def gemm_residual(A, W, bias, R):
    return bf16(R + A @ W.T + bias)


def swiglu(X: Array, W: Array, V: Array) -> Array:
    gate = X @ W.T
    return bf16(gate * expit(gate) * (X @ V.T))


@example(X="bf16[3, 7]", W="bf16[5, 7]", V="bf16[5, 7]")
def gemm_swiglu(X, W, V):
    return swiglu(X, W, V)


@example(X="bf16[3, 7]", gamma="f32[7]", W="bf16[5, 7]", V="bf16[5, 7]", D="bf16[7, 5]", eps=0.01)
def mlp_swiglu(X, gamma, W, V, D, eps):
    N = gamma * X / np.sqrt(np.mean(X**2, -1, keepdims=True) + eps)
    return bf16(X + swiglu(N, W, V) @ D.T)


@example(X="bf16[3, 7]", W="bf16[5, 7]", bias="f32[5]")
def gemm_softmax(X, W, bias):
    return softmax(X @ W.T + bias, -1)


@example(A="bf16[3, 7]", B="bf16[7, 5]")
def gemm_row_max(A, B):
    return A @ B, np.abs(A @ B).max(-1)


@example(H="bf16[5, 4]", W="bf16[11, 4]")
def gemm_argmax(H, W):
    return np.argmax(H @ W.T, -1)


@example(X="bf16[3, 7]", W="bf16[5, 7]", A="bf16[2, 7]", B="bf16[5, 2]", alpha=0.5)
def gemm_lora(X, W, A, B, alpha):
    return bf16(X @ (W + alpha * B @ A).T)


@example(X="bf16[7, 5]", W="bf16[3, 64, 5]", **HALVES)
def gemm_rope(X, W, C, S):
    return bf16(rotate(einsum("tk,hdk->thd", X, W), C[:, None], S[:, None]))


@example(X="bf16[2, 7, 3, 64]", **HALVES)
def rope(X, C, S):
    return bf16(rotate(X, C[:, None], S[:, None]))


@example(X="bf16[2, 7, 3, 64]", theta=10000.0)
def rope_interleaved(X, theta):
    angle = np.arange(7)[:, None] * theta ** (-np.arange(32) / 32)
    turned = (X[..., ::2] + 1j * X[..., 1::2]) * np.exp(1j * angle)[:, None]
    return bf16(np.stack([turned.real, turned.imag], -1).reshape(X.shape))


@example(A="i8[3, 7]", B="i8[5, 7]", sa=uniform(0, 0.1, 3), sb=uniform(0, 0.1, 5), bias="f32[5]")
def gemm_int8(A, B, sa, sb, bias):
    return bf16((A * sa[:, None]) @ (B * sb[:, None]).T + bias)


def unpack(W: Array, bits: int, size: int) -> Array:
    """The fields of 32-bit words along the first rank, the lowest bits first."""
    shifts = bits * np.arange(32 // bits)
    return (W[:, None] >> shifts[:, None] & (1 << bits) - 1).reshape(-1, W.shape[1])[:size]


def blocks(scale: Array, block: int, size: int) -> Array:
    """A scale per block as a scale per element, along the first rank."""
    return np.repeat(scale, block, axis=0)[:size]


@example(A="bf16[3, 203]", W="u32[26, 5]", scale="bf16[2, 5]", zero=integers(0, 16, 2, 5))
def gemm_int4(A, W, scale, zero):
    B = blocks(scale, 128, 203) * (unpack(W, 4, 203) - blocks(zero, 128, 203))
    return bf16(A @ B)


@example(A="bf16[3, 203]", W="u32[2, 26, 64]", scale="bf16[2, 2, 64]", zero=integers(0, 16, 2, 2, 64), bias="f32[70]")
def gemm_int4_tiles(A, W, scale, zero, bias):
    W, scale, zero = (np.concatenate([*x], axis=1)[:, :70] for x in (W, scale, zero))
    return bf16(A @ (blocks(scale, 128, 203) * (unpack(W, 4, 203) - blocks(zero, 128, 203))) + bias)


@example(A="bf16[3, 75]", W="u32[10, 5]", level="f32[16]", absmax=uniform(0.5, 2, 2, 5))
def gemm_nf4(A, W, level, absmax):
    return bf16(A @ (level[unpack(W, 4, 75)] * blocks(absmax, 64, 75)))


@example(A="bf16[3, 75]", W="u32[10, 5]", scale=integers(120, 134, 3, 5))
def gemm_mxfp4(A, W, scale):
    positive = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    level = np.concatenate([positive, -positive])
    return bf16(A @ (level[unpack(W, 4, 75)] * 2.0 ** (blocks(scale, 32, 75) - 127)))


@example(A="f8e4m3[3, 75]", B="f8e4m3[5, 75]", sa=integers(120, 134, 3, 3), sb=integers(120, 134, 5, 3))
def gemm_mxfp8(A, B, sa, sb):
    A, B = (X * 2.0 ** (blocks(s.T, 32, 75).T - 127) for X, s in ((A, sa), (B, sb)))
    return bf16(A @ B.T)


@example(A="f8e4m3[3, 7]", B="f8e4m3[5, 7]", sa=uniform(0.5, 2, 3), sb=uniform(0.5, 2, 5))
def gemm_fp8(A, B, sa, sb):
    return bf16((A * sa[:, None]) @ (B * sb[:, None]).T)


@example(A="f8e4m3[3, 203]", B="f8e4m3[131, 203]", sa=uniform(0.5, 2, 3, 2), sb=uniform(0.5, 2, 2, 2))
def gemm_fp8_block(A, B, sa, sb):
    A = A * blocks(sa.T, 128, 203).T
    B = B * blocks(blocks(sb, 128, 131).T, 128, 203).T
    return bf16(A @ B.T)


@example(A="i8[3, 37]", W="u32[3, 5]", sa=uniform(0, 0.1, 3), sw=0.75)
def gemm_ternary(A, W, sa, sw):
    return A @ (unpack(W, 2, 37) - 1) * sa[:, None] * sw


@example(A="bf16[3, 37]", W="u32[2, 5]", scale="f32[5]")
def gemm_binary(A, W, scale):
    return bf16(A @ np.where(unpack(W, 1, 37) == 1, scale, -scale))


@example(E="f32[11, 3]", index=integers(0, 11, 2, 5), weight="f32[2, 5]")
def embedding_bag(E, index, weight):
    return einsum("bl,bld->bd", weight, E[index])


@example(A="bf16[3, 7, 2]", B="bf16[5, 7, 2]", G="bf16[3, 5, 2]")
def triangle_multiply(A, B, G):
    return bf16(expit(G) * einsum("ikc,jkc->ijc", A, B))


@example(X="f32[3, 5, 7]", B="f32[5, 2]", C="f32[7, 2]")
def mttkrp(X, B, C):
    khatri_rao = einsum("jr,kr->jkr", B, C).reshape(35, 2)
    return X.reshape(3, 35) @ khatri_rao


def windows(X: Array, *size: int) -> Array:
    """Every window over the last ranks: [..., positions, size]."""
    axes = tuple(range(X.ndim - len(size), X.ndim))
    return sliding_window_view(X, size, axes)


@example(X="f32[2, 3, 12]", W="f32[5, 3, 3]", bias="f32[5]")
def conv1d(X, W, bias):
    return einsum("ncpr,ocr->nop", windows(X, 3)[:, :, ::2], W) + bias[:, None]


@example(X="f32[2, 3, 13]", W="f32[5, 3, 3]")
def conv1d_dilated(X, W):
    return einsum("ncpr,ocr->nop", windows(X, 9)[..., ::4], W)


@example(X="f32[2, 3, 9, 8]", W="f32[5, 3, 3, 2]", bias="f32[5]")
def conv2d(X, W, bias):
    Z = einsum("ncpqrs,ocrs->nopq", windows(X, 3, 2)[:, :, ::2, ::2], W)
    return np.maximum(Z + bias[:, None, None], 0)


@example(X="f32[2, 3, 5, 7]", W="f32[4, 3, 3, 3]")
def conv2d_same(X, W):
    padded = np.pad(X, ((0, 0), (0, 0), (1, 1), (1, 1)))
    return einsum("nchwrs,ocrs->nohw", windows(padded, 3, 3), W)


@example(X="f32[2, 3, 5, 7]", W="f32[3, 3, 2]")
def conv2d_depthwise(X, W):
    return einsum("ncpqrs,crs->ncpq", windows(X, 3, 2), W)


@example(X="f32[2, 3, 2, 5, 7]", W="f32[3, 4, 2, 3, 3]")
def conv2d_grouped(X, W):
    return einsum("ngcpqrs,gocrs->ngopq", windows(X, 3, 3), W)


@example(X="f32[2, 3, 5, 7]", W="f32[3, 4, 2, 2]")
def conv2d_transposed(X, W):
    return np.stack([np.stack([einsum("ncpq,co->nopq", X, W[..., r, s]) for s in (0, 1)], -1) for r in (0, 1)], 3)


@example(X="f32[2, 3, 9, 8]", window=lambda rng, _: np.array([[False, True], [True, True], [False, True]]))
def max_pool(X, window):
    return np.where(window, windows(X, 3, 2)[:, :, ::2, ::2], -np.inf).max((-2, -1))


@example(X="f32[2, 3, 5, 8]")
def average_pool(X):
    return windows(X, 2, 2)[:, :, ::2, ::2].mean((-2, -1))
