"""References of the scans: loops over time, one step after the other."""

from __future__ import annotations

import itertools

import numpy as np
from example_case import Array, bf16, example, uniform
from numpy import einsum
from scipy.special import expit

QKV = {"Q": "bf16[2, 3, 7, 4]", "K": "bf16[2, 3, 7, 4]", "V": "bf16[2, 3, 7, 5]"}


def recur(Q: Array, K: Array, V: Array, step, read=None) -> Array:
    """``H = step(t, H, k, v)`` and ``o = read(t, H before, H, q)``, by default q H, over the third rank."""
    H, O = np.zeros((*K.shape[:2], K.shape[3], V.shape[3])), np.zeros(V.shape)
    for t in range(K.shape[2]):
        before, H = H, step(t, H, K[:, :, t], V[:, :, t])
        O[:, :, t] = read(t, before, H, Q[:, :, t]) if read else einsum("bhd,bhdf->bhf", Q[:, :, t], H)
    return O


def outer(k: Array, v: Array) -> Array:
    return k[..., :, None] * v[..., None, :]


@example(X="f32[3, 11]")
def cumulative_sum(X):
    return np.cumsum(X, -1)


@example(**QKV)
def linear_attention_causal(Q, K, V):
    Q, K = (np.where(X > 0, X + 1, np.exp(X)) for X in (Q, K))
    S = np.tril(einsum("bhqd,bhkd->bhqk", Q, K))
    return bf16(S / S.sum(-1, keepdims=True) @ V)


@example(**QKV, decay=uniform(0.5, 1, 3))
def retnet(Q, K, V, decay):
    return bf16(recur(Q, K, V, lambda t, H, k, v: decay[:, None, None] * H + outer(k, v)))


@example(**QKV, decay=uniform(0.5, 1, 3))
def retnet_parallel(Q, K, V, decay):
    return bf16(recur(Q, K, V, lambda t, H, k, v: decay[:, None, None] * H + outer(k, v)))


@example(**QKV, G=uniform(-2, 0, 2, 3, 7, 4))
def gated_linear_attention(Q, K, V, G):
    return bf16(recur(Q, K, V, lambda t, H, k, v: np.exp(G[:, :, t, :, None]) * H + outer(k, v)))


@example(
    R="bf16[2, 3, 7, 4]", K="bf16[2, 3, 7, 4]", V="bf16[2, 3, 7, 5]", W=uniform(0, 1, 2, 3, 7, 4), bonus="f32[3, 4]"
)
def rwkv(R, K, V, W, bonus):
    def read(t, before, H, r):
        return einsum("bhd,bhdf->bhf", r, before + outer(bonus * K[:, :, t], V[:, :, t]))

    return bf16(recur(R, K, V, lambda t, H, k, v: W[:, :, t, :, None] * H + outer(k, v), read))


@example(
    X="bf16[2, 7, 3, 5]",
    dt=uniform(0, 1, 2, 7, 3),
    A=uniform(-2, 0, 3),
    B="bf16[2, 7, 4]",
    C="bf16[2, 7, 4]",
    D="f32[3]",
)
def ssd(X, dt, A, B, C, D):
    # The dual form: attention with a decay mask.
    total = np.cumsum(dt * A, 1)
    decay = np.exp(total[:, :, None] - total[:, None]) * np.tril(np.ones((7, 7)))[:, :, None]
    Y = einsum("bqn,bkn,bqkh,bkh,bkhp->bqhp", C, B, decay, dt, X)
    return bf16(Y + D[:, None] * X)


@example(
    X="bf16[2, 7, 5]",
    dt=uniform(0, 1, 2, 7, 5),
    A=uniform(-2, 0, 5, 3),
    B="bf16[2, 7, 3]",
    C="bf16[2, 7, 3]",
    D="f32[5]",
)
def mamba(X, dt, A, B, C, D):
    H, Y = np.zeros((2, 5, 3)), np.zeros((2, 7, 5))
    for t in range(7):
        H = np.exp(dt[:, t, :, None] * A) * H + (dt * X)[:, t, :, None] * B[:, t, None]
        Y[:, t] = einsum("bcn,bn->bc", H, C[:, t]) + D * X[:, t]
    return bf16(Y)


def delta(Q: Array, K: Array, V: Array, alpha: Array, beta: Array) -> Array:
    """The memory decays, then moves what it recalls for k towards v by beta."""

    def step(t, H, k, v):
        H = alpha[:, :, t, None, None] * H
        return H + outer(beta[:, :, t, None] * k, v - einsum("bhd,bhdf->bhf", k, H))

    return bf16(recur(Q, K, V, step))


@example(**QKV, beta=uniform(0, 1, 2, 3, 7))
def delta_rule(Q, K, V, beta):
    return delta(Q, K, V, np.ones((2, 3, 7)), beta)


@example(**QKV, alpha=uniform(0, 1, 2, 3, 7), beta=uniform(0, 1, 2, 3, 7))
def gated_delta_rule(Q, K, V, alpha, beta):
    return delta(Q, K, V, alpha, beta)


@example(start=uniform(0, 1, 3), T=uniform(0, 1, 3, 3), E=uniform(0, 1, 5, 3))
def hmm_forward(start, T, E):
    F = [start * E[0]]
    for t in range(1, 5):
        F.append(F[-1] @ T * E[t])
    return np.array(F)


@example(start="f32[3]", T="f32[3, 3]", E="f32[5, 3]")
def viterbi(start, T, E):
    # Every path, scored whole.
    F, best = np.full((5, 3), -np.inf), np.tile(np.arange(3), (5, 1))
    for t in range(5):
        for path in itertools.product(range(3), repeat=t + 1):
            score = (
                start[path[0]]
                + sum(E[i, s] for i, s in enumerate(path))
                + sum(T[a, b] for a, b in itertools.pairwise(path))
            )
            if score > F[t, path[-1]]:
                F[t, path[-1]] = score
                best[t, path[-1]] = path[-2] if t else path[-1]
    return F, best


@example(reward="f32[3, 7]", value="f32[3, 7]", done="bool[3, 7]", gamma=0.75, lam=0.5)
def gae(reward, value, done, gamma, lam):
    A, following, advantage = np.zeros((3, 7)), np.zeros(3), np.zeros(3)
    for t in reversed(range(7)):
        alive = ~done[:, t]
        error = reward[:, t] + gamma * following * alive - value[:, t]
        advantage = error + gamma * lam * alive * advantage
        A[:, t], following = advantage, value[:, t]
    return A


@example(X="bf16[2, 7, 5]", W="bf16[5, 4]", bias="f32[5]")
def conv1d_causal(X, W, bias):
    padded = np.pad(X, ((0, 0), (3, 0), (0, 0)))
    S = bias + sum(padded[:, r : r + 7] * W[:, r] for r in range(4))
    return bf16(S * expit(S))


@example(X="f32[3, 11]", window=4)
def moving_average(X, window):
    return np.stack([X[:, max(0, t - window + 1) : t + 1].mean(-1) for t in range(11)], -1)
