"""References of the attention examples."""

from __future__ import annotations

import numpy as np
from example_case import Array, bf16, example, gradient, integers, random, uniform
from numpy import einsum, inf
from scipy.special import expit, logsumexp, softmax

# b, h, q, k, d, f, unless a case says otherwise.
QKV = {"Q": "bf16[2, 3, 5, 4]", "K": "bf16[2, 3, 7, 4]", "V": "bf16[2, 3, 7, 3]"}
SELF = {"Q": "bf16[2, 3, 7, 4]", "K": "bf16[2, 3, 7, 4]", "V": "bf16[2, 3, 7, 3]"}
GQA = {"Q": "bf16[2, 8, 5, 4]", "K": "bf16[2, 2, 7, 4]", "V": "bf16[2, 2, 7, 3]"}
DECODE = {"Q": "bf16[3, 8, 4]", "K": "bf16[3, 2, 7, 4]", "V": "bf16[3, 2, 7, 5]"}
SCALE = 0.625


def scores(Q: Array, K: Array) -> Array:
    return einsum("...qd,...kd->...qk", Q, K)


def attend(S: Array, V: Array, keep: Array | bool = True) -> Array:
    """softmax(S) V over the last rank of S; a row that keeps nothing gives 0."""
    P = softmax(np.where(keep, S, -inf), -1)
    return np.where(np.any(np.broadcast_to(keep, S.shape), -1)[..., None], P, 0) @ V


def distance(S: Array) -> Array:
    """How far the key lies before the query."""
    return np.arange(S.shape[-2])[:, None] - np.arange(S.shape[-1])


def causal(S: Array) -> Array:
    return distance(S) >= 0


def four(K: Array) -> Array:
    """One head of keys for each of four heads of queries."""
    return np.repeat(K, 4, axis=1)


@example(**QKV, scale=SCALE)
def attention(Q, K, V, scale):
    return bf16(attend(scale * scores(Q, K), V))


@example(**SELF, scale=SCALE)
def attention_causal(Q, K, V, scale):
    S = scale * scores(Q, K)
    return bf16(attend(S, V, causal(S)))


@example(**SELF, scale=SCALE, window=3)
def attention_window(Q, K, V, scale, window):
    S = scale * scores(Q, K)
    return bf16(attend(S, V, causal(S) & (distance(S) < window)))


@example(**SELF, prefix=integers(0, 6, 2), scale=SCALE)
def attention_prefix(Q, K, V, prefix, scale):
    S = scale * scores(Q, K)
    return bf16(attend(S, V, causal(S) | (np.arange(7) < prefix[:, None, None, None])))


@example(
    **SELF,
    doc_q=lambda rng, _: [[0, 0, 1, 1, 1, 2, 5]] * 2,
    doc_k=lambda rng, _: [[0, 1, 1, 1, 2, 2, 2]] * 2,
    scale=SCALE,
)
def attention_document(Q, K, V, doc_q, doc_k, scale):
    S = scale * scores(Q, K)
    same = np.array(doc_q)[:, None, :, None] == np.array(doc_k)[:, None, None, :]
    return bf16(attend(S, V, causal(S) & same))


@example(**SELF, slope="f32[3]", scale=SCALE)
def attention_alibi(Q, K, V, slope, scale):
    S = scale * scores(Q, K)
    return bf16(attend(S - slope[:, None, None] * distance(S), V, causal(S)))


@example(**SELF, scale=SCALE, cap=1.5)
def attention_softcap(Q, K, V, scale, cap):
    S = scale * scores(Q, K)
    return bf16(attend(cap * np.tanh(S / cap), V, causal(S)))


@example(**SELF, sink="f32[3]", scale=SCALE)
def attention_sink(Q, K, V, sink, scale):
    S = scale * scores(Q, K)
    S = np.where(causal(S), S, -inf)
    with_sink = np.concatenate([S, np.broadcast_to(sink[:, None, None], (2, 3, 7, 1))], -1)
    return bf16(softmax(with_sink, -1)[..., :-1] @ V)


@example(**SELF, scale=SCALE, sinks=2, window=2)
def attention_streaming(Q, K, V, scale, sinks, window):
    S = scale * scores(Q, K)
    return bf16(attend(S, V, causal(S) & ((np.arange(7) < sinks) | (distance(S) < window))))


@example(**SELF, scale=SCALE, window=5, dilation=2)
def attention_dilated(Q, K, V, scale, window, dilation):
    S = scale * scores(Q, K)
    return bf16(attend(S, V, causal(S) & (distance(S) < window) & (distance(S) % dilation == 0)))


@example(Q="bf16[1, 2, 5, 7, 4]", K="bf16[1, 2, 5, 7, 4]", V="bf16[1, 2, 5, 7, 3]", scale=SCALE, radius=1)
def attention_natten(Q, K, V, scale, radius):
    O = np.zeros((1, 2, 5, 7, 3))
    for y, x in np.ndindex(5, 7):
        top, left = np.clip(y - radius, 0, 4 - 2 * radius), np.clip(x - radius, 0, 6 - 2 * radius)
        near = np.s_[:, :, top : top + 2 * radius + 1, left : left + 2 * radius + 1]
        P = softmax(scale * einsum("bhd,bhijd->bhij", Q[:, :, y, x], K[near]), (-2, -1))
        O[:, :, y, x] = einsum("bhij,bhijf->bhf", P, V[near])
    return bf16(O)


@example(Q="bf16[1, 2, 19, 4]", K="bf16[1, 2, 21, 4]", V="bf16[1, 2, 21, 3]", bias="f32[2, 33]", scale=SCALE)
def attention_relative_bias(Q, K, V, bias, scale):
    S = scale * scores(Q, K)
    return bf16(attend(S + bias[:, np.clip(-distance(S), -16, 16) + 16], V))


@example(
    Q="bf16[2, 3, 2, 5, 4]",
    K="bf16[2, 3, 2, 7, 4]",
    V="bf16[2, 3, 2, 7, 3]",
    bias="f32[2, 2, 5, 7]",
    gate="bf16[2, 3, 2, 5, 3]",
    keep=lambda rng, _: random(rng, "bool[2, 3, 7]") & (np.arange(3) != 1)[:, None],
    scale=SCALE,
)
def attention_pair_bias(Q, K, V, bias, gate, keep, scale):
    S = scale * scores(Q, K) + bias[:, None]
    return bf16(expit(gate) * attend(S, V, keep[:, :, None, None]))


@example(**QKV, keep="bool[2, 3, 5, 7]", scale=SCALE, p=0.25)
def attention_dropout(Q, K, V, keep, scale, p):
    return bf16(softmax(scale * scores(Q, K), -1) * keep / (1 - p) @ V)


def rotate(X: Array, C: Array, S: Array) -> Array:
    """RoPE in halves: complex multiplication of the pairs (d, d + 32)."""
    turned = (X[..., :32] + 1j * X[..., 32:]) * (C + 1j * S)
    return np.concatenate([turned.real, turned.imag], -1)


@example(
    Q="bf16[1, 2, 7, 64]", K="bf16[1, 2, 7, 64]", V="bf16[1, 2, 7, 3]", C="f32[7, 32]", S="f32[7, 32]", scale=0.125
)
def attention_rope(Q, K, V, C, S, scale):
    X = scale * scores(rotate(Q, C, S), rotate(K, C, S))
    return bf16(attend(X, V, causal(X)))


@example(
    Q1="bf16[2, 3, 5, 4]",
    K1="bf16[2, 3, 7, 4]",
    Q2="bf16[2, 3, 5, 4]",
    K2="bf16[2, 3, 7, 4]",
    V="bf16[2, 3, 7, 6]",
    lam="f32[3]",
    scale=SCALE,
)
def attention_differential(Q1, K1, Q2, K2, V, lam, scale):
    return bf16(attend(scale * scores(Q1, K1), V) - lam[:, None, None] * attend(scale * scores(Q2, K2), V))


@example(**GQA, scale=SCALE)
def attention_gqa(Q, K, V, scale):
    S = scale * scores(Q, four(K))
    return bf16(attend(S, four(V), causal(S)))


@example(
    Q="bf16[2, 3, 7, 4]",
    QR="bf16[2, 3, 7, 2]",
    C="bf16[2, 7, 5]",
    KR="bf16[2, 7, 2]",
    WK="bf16[3, 5, 4]",
    WV="bf16[3, 5, 3]",
    scale=SCALE,
)
def attention_mla(Q, QR, C, KR, WK, WV, scale):
    # Absorbed: the projections act on the query and on the result, never on the latent.
    S = scale * (einsum("bhqd,hcd,bkc->bhqk", Q, WK, C) + einsum("bhqr,bkr->bhqk", QR, KR))
    return bf16(einsum("bhqc,hcf->bhqf", attend(S, C[:, None], causal(S)), WV))


@example(**QKV, gq="f32[4]", gk="f32[4]", scale=SCALE, eps=0.01)
def attention_qk_norm(Q, K, V, gq, gk, scale, eps):
    NQ = gq * Q / np.sqrt(np.mean(Q**2, -1, keepdims=True) + eps)
    NK = gk * K / np.sqrt(np.mean(K**2, -1, keepdims=True) + eps)
    return bf16(attend(scale * scores(NQ, NK), V))


def decode(Q: Array, K: Array, V: Array, length: Array) -> Array:
    """One query a head against the first ``length[b]`` keys."""
    keep = np.arange(K.shape[2]) < length[:, None, None, None]
    return bf16(attend(scores(Q[:, :, None], four(K)), four(V), keep)[:, :, 0])


@example(**DECODE, length=lambda rng, _: np.array([0, 5, 7]), scale=SCALE)
def attention_decode(Q, K, V, length, scale):
    return decode(scale * Q, K, V, length)


@example(
    Q="bf16[3, 8, 4]",
    K="bf16[9, 5, 2, 4]",
    V="bf16[9, 5, 2, 3]",
    table=integers(0, 9, 3, 2),
    length=lambda rng, _: np.array([1, 7, 10]),
    scale=SCALE,
)
def attention_decode_paged(Q, K, V, table, length, scale):
    # [b, p, s, h, d] -> [b, h, p s, d]: the sequences as if they were contiguous.
    K, V = (T[table].reshape(3, 10, 2, -1).swapaxes(1, 2) for T in (K, V))
    return decode(scale * Q, K, V, length)


@example(
    Q="bf16[3, 8, 4]",
    K="i8[3, 2, 7, 4]",
    V="i8[3, 2, 7, 5]",
    sk=uniform(0.005, 0.02, 3, 2, 7),
    sv=uniform(0.005, 0.02, 3, 2, 7),
    length=lambda rng, _: np.array([1, 5, 7]),
    scale=SCALE,
)
def attention_decode_int8(Q, K, V, sk, sv, length, scale):
    return decode(scale * Q, K * sk[..., None], V * sv[..., None], length)


@example(**GQA, start=lambda rng, _: np.array([0, 2]), scale=SCALE)
def attention_prefill_chunk(Q, K, V, start, scale):
    S = scale * scores(Q, four(K))
    return bf16(attend(S, four(V), distance(S) + start[:, None, None, None] >= 0))


@example(Q="bf16[2, 3, 5, 4]", K="bf16[2, 11, 4]", V="bf16[2, 11, 3]", pick=integers(0, 11, 2, 5, 3), scale=SCALE)
def attention_gathered(Q, K, V, pick, scale):
    batch = np.arange(2)[:, None, None]
    P = softmax(scale * einsum("bhqd,bqjd->bhqj", Q, K[batch, pick]), -1)
    return bf16(einsum("bhqj,bqjf->bhqf", P, V[batch, pick]))


@example(**QKV, scale=SCALE)
def attention_lse(Q, K, V, scale):
    S = scale * scores(Q, K)
    return bf16(attend(S, V)), logsumexp(S, -1)


@example(O="f32[3, 2, 2, 5, 4]", LSE="f32[3, 2, 2, 5]")
def attention_merge(O, LSE):
    return einsum("sbhq,sbhqf->bhqf", softmax(LSE, 0), O), logsumexp(LSE, 0)


@example(Q="bf16[2, 3, 5, 4]", K="bf16[2, 3, 2, 7, 4]", V="bf16[2, 3, 2, 7, 3]", scale=SCALE)
def attention_two_pass(Q, K, V, scale):
    return bf16(attend(scale * scores(Q, K.reshape(2, 3, 14, 4)), V.reshape(2, 3, 14, 3)))


@example(**QKV, scale=SCALE)
def attention_monoid(Q, K, V, scale):
    return bf16(attend(scale * scores(Q, K), V))


@example(**SELF, scale=SCALE)
def attention_sigmoid(Q, K, V, scale):
    S = scale * scores(Q, K) - np.log(7)
    return bf16(np.where(causal(S), expit(S), 0) @ V)


def elu1(x: Array) -> Array:
    return np.where(x > 0, x + 1, np.exp(x))


@example(**QKV)
def attention_linear(Q, K, V):
    S = scores(elu1(Q), elu1(K))
    return bf16(S / S.sum(-1, keepdims=True) @ V)


def stick_breaking(Q: Array, K: Array, V: Array, scale: float) -> Array:
    B = expit(scale * scores(Q, K))
    A = np.zeros_like(B)
    for q in range(B.shape[-2]):
        left = np.ones(B.shape[:2])
        for k in reversed(range(min(q, B.shape[-1]))):
            A[:, :, q, k] = B[:, :, q, k] * left
            left = left * (1 - B[:, :, q, k])
    return bf16(A @ V)


@example(**SELF, scale=SCALE)
def attention_stick_breaking(Q, K, V, scale):
    return stick_breaking(Q, K, V, scale)


@example(**SELF, scale=SCALE)
def attention_stick_breaking_scan(Q, K, V, scale):
    return stick_breaking(Q, K, V, scale)


def plain(Q: Array, K: Array, V: Array, scale: float) -> tuple[Array, Array]:
    """Attention and its log-sum-exp without a maximum, so that complex steps pass through."""
    E = np.exp(scale * scores(Q, K))
    return E @ V / E.sum(-1)[..., None], np.log(E.sum(-1))


@example(
    **QKV,
    O=lambda rng, g: bf16(plain(g["Q"], g["K"], g["V"], SCALE)[0]),
    dO="bf16[2, 3, 5, 3]",
    LSE=lambda rng, g: plain(g["Q"], g["K"], g["V"], SCALE)[1],
    scale=SCALE,
)
def attention_backward(Q, K, V, O, dO, LSE, scale):
    # The saved O is rounded, which adds the rounding of D times the gradient of the log-sum-exp.
    error = np.sum(dO * (plain(Q, K, V, scale)[0] - O), -1)

    def loss(Q, K, V):
        O, lse = plain(Q, K, V, scale)
        return np.sum(dO * O) + np.sum(error * lse)

    dQ, dK = gradient(lambda x: loss(x, K, V), Q), gradient(lambda x: loss(Q, x, V), K)
    return bf16(dQ), bf16(dK), bf16(gradient(lambda x: loss(Q, K, x), V))


@example(**QKV, dO="bf16[2, 3, 5, 3]", scale=SCALE)
def attention_dq(Q, K, V, dO, scale):
    return gradient(lambda x: np.sum(dO * plain(x, K, V, scale)[0]), Q)
