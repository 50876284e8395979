"""References of the softmax family, of statistics and norms, and of what resists."""

from __future__ import annotations

import numpy as np
from example_case import Array, bf16, example, gradient, integers, rounded, uniform
from scipy import special, stats

X = {"X": "f32[3, 7]"}
XY = {"X": "f32[3, 7]", "Y": "f32[3, 7]"}


def soft(X: Array) -> Array:
    return special.softmax(X, -1)


@example(**X)
def logsumexp(X):
    return special.logsumexp(X, -1)


@example(**X)
def logsumexp_monoid(X):
    return special.logsumexp(X, -1)


@example(X="f32[3, 11]")
def logcumsumexp(X):
    return np.stack([special.logsumexp(X[:, : t + 1], -1) for t in range(11)], -1)


@example(**X)
def softmax(X):
    return soft(X)


@example(X=uniform(-300, 300, 3, 7))
def softmax_two_pass(X):
    return soft(X)


@example(**X)
def log_softmax(X):
    return special.log_softmax(X, -1)


@example(Y=lambda rng, _: soft(rng.normal(size=(3, 7))), dY="f32[3, 7]")
def softmax_backward(Y, dY):
    return gradient(lambda x: np.sum(dY * np.exp(x) / np.exp(x).sum(-1, keepdims=True)), np.log(Y))


@example(X="f32[5, 7]", target=integers(0, 7, 5), smoothing=0.125, zeta=0.01)
def cross_entropy(X, target, smoothing, zeta):
    wanted = (1 - smoothing) * np.eye(7)[target] + smoothing / 7
    return -np.sum(wanted * special.log_softmax(X, -1), -1) + zeta * special.logsumexp(X, -1) ** 2


@example(H="bf16[5, 4]", W="bf16[11, 4]", target=integers(0, 11, 5))
def linear_cross_entropy(H, W, target):
    return -np.mean(special.log_softmax(H @ W.T, -1)[np.arange(5), target])


@example(**X)
def softmax_entropy(X):
    return stats.entropy(soft(X), axis=-1)


@example(T="f32[5, 7]", S="f32[5, 7]", temperature=2.0)
def kl_distillation(T, S, temperature):
    return temperature**2 * stats.entropy(soft(T / temperature), soft(S / temperature), axis=-1)


@example(S="f32[3, 7]", X="f32[3, 7]")
def weighted_variance(S, X):
    mean = np.sum(soft(S) * X, -1)
    return mean, np.sum(soft(S) * X**2, -1) - mean**2


@example(X=integers(0, 4, 5, 7))
def argmax(X):
    return np.argmax(X, -1), np.max(X, -1)


@example(X="f32[5, 7]")
def argmax_softmax(X):
    return np.argmax(X, -1), soft(X).max(-1)


@example(X="f32[5, 7]")
def moe_router(X):
    order = np.argsort(-X, -1)[:, :2]
    weights = soft(np.take_along_axis(X, order, -1))
    return order[:, 0], order[:, 1], weights[:, 0], weights[:, 1]


@example(X="f32[5, 7]", U=uniform(0.01, 0.99, 5, 7), temperature=0.75)
def gumbel_sample(X, U, temperature):
    token = np.argmax(X / temperature + stats.gumbel_r.ppf(U), -1)
    return token, special.log_softmax(X / temperature, -1)[np.arange(5), token]


@example(X="bf16[5, 4]", Y="bf16[5, 4]", temperature=0.75)
def infonce(X, Y, temperature):
    S = X @ Y.T / temperature
    return -np.mean(np.diag(special.log_softmax(S, 0) + special.log_softmax(S, 1))) / 2


@example(
    H="f32[5, 4]",
    W="f32[4, 3]",
    left="f32[3]",
    right="f32[3]",
    source=integers(0, 5, 11),
    target=lambda rng, _: rng.choice([0, 1, 3, 4], 11),
)
def gat(H, W, left, right, source, target):
    Z, Y = H @ W, np.zeros((5, 3))
    for n in range(5):
        incoming = source[target == n]
        score = Z[incoming] @ left + Z[n] @ right
        Y[n] = soft(np.where(score > 0, score, 0.2 * score)) @ Z[incoming] if len(incoming) else 0
    return Y


@example(X="f32[5, 7]", p=0.75)
def top_p(X, p):
    Y = np.zeros_like(X)
    for n, row in enumerate(soft(X)):
        order = np.argsort(-row)
        kept = order[np.cumsum(row[order]) - row[order] < p]
        Y[n, kept] = row[kept] / row[kept].sum()
    return Y


@example(X="f32[5, 7]")
def sparsemax(X):
    # The threshold by bisection: the projection sums to 1.
    low, high = X.min(-1, keepdims=True) - 1, X.max(-1, keepdims=True)
    for _ in range(100):
        middle = (low + high) / 2
        above = np.maximum(X - middle, 0).sum(-1, keepdims=True) > 1
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    return np.maximum(X - low, 0)


@example(X=lambda rng, _: rng.integers(0, 5, (5, 8)).astype(float))
def median(X):
    return np.sort(X, -1)[:, 3]


@example(X="f32[3, 7]", V="f32[7, 4]")
def softmax_sigma_values(X, V):
    return soft(X / X.std(-1, keepdims=True)) @ V


@example(X="f32[3, 7]", V="f32[7, 4]")
def softmax_softmax_values(X, V):
    return soft(soft(X)) @ V


@example(**X)
def mean_absolute_deviation(X):
    return np.mean(np.abs(X - X.mean(-1, keepdims=True)), -1)


@example(**X)
def variance(X):
    return X.var(-1)


@example(**X)
def variance_monoid(X):
    return X.mean(-1), X.var(-1)


@example(**X)
def kurtosis(X):
    return stats.kurtosis(X, -1, fisher=False)


def normalised(X: Array, eps: float, axis: int | tuple[int, ...] = -1) -> Array:
    return (X - X.mean(axis, keepdims=True)) / np.sqrt(X.var(axis, keepdims=True) + eps)


def rms_normalised(X: Array, eps: float) -> Array:
    return X / np.sqrt(np.mean(X**2, -1, keepdims=True) + eps)


@example(X="f32[3, 7]", gamma="f32[7]", beta="f32[7]", eps=0.01)
def layernorm(X, gamma, beta, eps):
    return gamma * normalised(X, eps) + beta


@example(X="bf16[3, 7]", gamma="f32[7]", beta="f32[7]", W="bf16[7, 5]", eps=0.01)
def layernorm_gemm(X, gamma, beta, W, eps):
    return bf16((gamma * normalised(X, eps) + beta) @ W)


@example(X="f32[3, 7]", gamma="f32[7]", dY="f32[3, 7]", eps=0.01)
def layernorm_backward(X, gamma, dY, eps):
    def loss(X, gamma, beta):
        C = X - X.mean(-1, keepdims=True)
        return np.sum(dY * (gamma * C / np.sqrt(np.mean(C**2, -1, keepdims=True) + eps) + beta))

    zero = np.zeros(7)
    return (
        gradient(lambda x: loss(x, gamma, zero), X),
        gradient(lambda g: loss(X, g, zero), gamma),
        gradient(lambda b: loss(X, gamma, b), zero),
    )


@example(X="bf16[3, 7]", gamma="bf16[7]", eps=0.01)
def rmsnorm(X, gamma, eps):
    return bf16(gamma * rms_normalised(X, eps))


@example(X="bf16[3, 7]", D="bf16[3, 7]", gamma="bf16[7]", eps=0.01)
def rmsnorm_residual(X, D, gamma, eps):
    H = bf16(X + D)
    return H, bf16(gamma * rms_normalised(H, eps))


@example(X="bf16[3, 7]", gamma="f32[7]", W="bf16[7, 5]", eps=0.01)
def rmsnorm_gemm(X, gamma, W, eps):
    return bf16((gamma * rms_normalised(X, eps)) @ W)


@example(X="f32[2, 3, 5, 7]", gamma="f32[3, 5]", beta="f32[3, 5]", eps=0.01)
def groupnorm(X, gamma, beta, eps):
    return gamma[..., None] * normalised(X, eps, (2, 3)) + beta[..., None]


@example(X="f32[3, 5, 7]", gamma="f32[5]", beta="f32[5]", eps=0.01)
def batchnorm(X, gamma, beta, eps):
    return gamma[:, None] * normalised(X, eps, (0, 2)) + beta[:, None], X.mean((0, 2)), X.var((0, 2))


@example(**XY)
def pearson(X, Y):
    return [stats.pearsonr(x, y).statistic for x, y in zip(X, Y, strict=True)]


@example(**XY)
def cosine(X, Y):
    return np.sum(X * Y, -1) / np.linalg.norm(X, axis=-1) / np.linalg.norm(Y, axis=-1)


@example(Q="bf16[2, 3, 5, 4]", K="bf16[2, 3, 7, 4]", gq="f32[4]", gk="f32[4]", eps=0.01)
def qk_norm(Q, K, gq, gk, eps):
    return (gq * rms_normalised(Q, eps)) @ (gk * rms_normalised(K, eps)).swapaxes(-1, -2)


@example(**X)
def nrm2(X):
    return np.linalg.norm(X, axis=-1)


@example(X="f32[5, 4]", C="f32[7, 4]")
def kmeans_assign(X, C):
    D = np.linalg.norm(X[:, None] - C, axis=-1) ** 2
    return D.argmin(-1), D.min(-1)


@example(X="f32[5, 4]", Y="f32[7, 4]", V="f32[7, 3]", gamma=0.5)
def kernel_regression(X, Y, V, gamma):
    W = np.exp(-gamma * np.linalg.norm(X[:, None] - Y, axis=-1) ** 2)
    return W @ V / W.sum(-1, keepdims=True)


@example(C="f32[5, 7]", a=uniform(0.1, 1, 5), b=uniform(0.1, 1, 7), G="f32[7]", eps=0.5)
def sinkhorn(C, a, b, G, eps):
    kernel = np.exp(-C / eps)
    u = a / (kernel @ np.exp(G / eps))
    return eps * np.log(u), eps * np.log(b / (kernel.T @ u))


@example(X="bf16[3, 7]")
def quantize_int8(X):
    S = np.abs(X).max(-1) / 127
    return np.rint(X / S[:, None]), S


@example(X="bf16[3, 7]", W="f8e4m3[5, 7]", sw=uniform(0.5, 2, 5))
def gemm_amax_quant(X, W, sw):
    S = np.abs(X).max(-1, keepdims=True) / 448
    return bf16(S * sw * (rounded(X / S, "f8e4m3") @ W.T))
