"""What castile does today, on real data: the words of its own licence.

    make demo            or            python examples/demo.py

The main job is the last part: a small Llama compiled with torch.compile(backend="castile"), its attention tuned for
20 s (`--budget SECONDS`), checked and timed against eager; it needs PyTorch and a C++ compiler. All before it needs the
core only: every number is computed by the float64 oracle while you look, and checked against plain NumPy.
"""

from __future__ import annotations

import argparse
import os
import re
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.text import Text

import castile

Array = npt.NDArray[Any]

HERE = Path(__file__).resolve().parent
LICENCE = (HERE.parent / "LICENSE").read_text(encoding="utf-8")
CASCADES = HERE / "cascades"

ATTENTION = """
def attention(Q: f32[q, d], K: f32[k, d], V: f32[k, f], scale: f32) -> O:
    S[q, k] = where(q > k, scale * sum[d](Q[q, d] * K[k, d]), -inf)
    M[q]    = max[k](S[q, k])
    P[q, k] = exp(S[q, k] - M[q])
    L[q]    = sum[k](P[q, k])
    A[q, k] = P[q, k] / L[q]
    O[q, f] = sum[k](A[q, k] * V[k, f])
"""

FLASH = """
@monoid(identity=(-inf, 0.0, 0.0))
def flash(m, l, o, n, s, v) -> (M, L, O):
    M = maximum(m, n)
    a = exp(m - M)
    b = exp(n - M)
    L = l * a + s * b
    O = o * a + v * b

def attention(Q: f32[q, d], K: f32[k, d], V: f32[k, f], scale: f32) -> O:
    S[q, k] = where(q > k, scale * sum[d](Q[q, d] * K[k, d]), -inf)
    (M[q], L[q], R[q, f]) = flash[k](S[q, k], 1.0, V[k, f])
    O[q, f] = R[q, f] / L[q]
"""

SOBEL = """
def edges(X: f32[h, w], Kx: f32[3, 3], Ky: f32[3, 3]) -> G:
    Gx[p, q] = sum[r, s](X[p + r, q + s] * Kx[r, s])
    Gy[p, q] = sum[r, s](X[p + r, q + s] * Ky[r, s])
    G[p, q]  = sqrt(Gx[p, q] ** 2 + Gy[p, q] ** 2)
"""

MISTAKE = """
def softmax(X: f32[m, n]) -> Y:
    M[m]    = max[n](X[m, n])
    E[m, n] = exp(X[m, n] - M[m])
    Y[m, n] = E[m, n] / sum[k](E[m, n])
"""

console = Console(highlight=False, soft_wrap=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="What castile does today.")
    parser.add_argument("--budget", type=float, default=20.0, metavar="SECONDS", help="spent on tuning; 20 unless told")
    budget = parser.parse_args().budget
    began = perf_counter()
    words = re.findall(r"[A-Za-z]+", LICENCE)[20:270]
    one_rank_three_passes(words)
    one_pass_by_hand(words)
    a_page_as_an_image()
    four_bit_search(words)
    an_error_that_teaches()
    try:
        a_model(budget)
    except castile.CastileError as error:  # no compiler, say
        say(str(error), "yellow")
    say(
        f"\nAll of it in {perf_counter() - began:.1f} s. Next: README.md, docs/language.md, castile explain FILE.",
        "dim",
    )


def one_rank_three_passes(words: list[str]) -> None:
    title("1. Attention over the words of the licence")
    show(ATTENTION)
    c = castile.parse(ATTENTION)
    passes(c)
    x = embedded(words)
    inputs = {"Q": x, "K": x, "scale": 12.0}

    # With the unit matrix as values, the output is the weights themselves.
    weights = castile.evaluate(c, {**inputs, "V": np.eye(len(words))})["O"]
    say(f"\n{len(words)} words, embedded by their letters. What a word looks at, among the words before it:")
    for word in ("controlled", "authorship", "modifications", "Derivative"):
        at = len(words) - 1 - words[::-1].index(word)
        looked: dict[str, float] = {}
        for other, weight in zip(words, weights[at], strict=True):
            looked[other.lower()] = looked.get(other.lower(), 0.0) + float(weight)
        best = sorted(looked, key=lambda other: -looked[other])[:4]
        say(f"    {word:<15}" + "   ".join(f"{other} {looked[other]:.2f}" for other in best))

    output = castile.evaluate(c, {**inputs, "V": x})["O"]
    scores = np.where(np.tri(len(words), k=-1, dtype=bool), 12.0 * (x @ x.T), -np.inf)[1:]
    direct = np.exp(scores - scores.max(-1, keepdims=True))
    direct = direct / direct.sum(-1, keepdims=True) @ x
    say("")
    check("every row of weights sums to 1", np.abs(weights[1:].sum(-1) - 1).max(), 1e-12)
    check("but the first: no word stands before it, and a wholly masked row is 0, not NaN", np.abs(weights[0]).max(), 0)
    check("agrees with four lines of NumPy", np.abs(output[1:] - direct).max(), 1e-12)


def one_pass_by_hand(words: list[str]) -> None:
    title("2. The same in one pass, spelled out")
    say("FlashAttention is the same reduction over another state, a monoid. Written by hand it reads:")
    show(FLASH)
    c = castile.parse(FLASH)
    passes(c)
    x = embedded(words[:80])
    inputs = {"Q": x, "K": x, "V": x, "scale": 12.0}
    say("")
    textbook = castile.evaluate(castile.parse(ATTENTION), inputs)["O"]
    check("same values as the textbook form", np.abs(castile.evaluate(c, inputs)["O"] - textbook).max(), 1e-12)


def a_page_as_an_image() -> None:
    title("3. The page as an image: convolution is one Einsum with indices p + r, q + s")
    show(SOBEL)
    c = castile.parse(SOBEL)
    lines = [line.ljust(76)[:76] for line in LICENCE.splitlines()[6:17]]
    page = np.array([[0.0 if mark == " " else 1.0 for mark in line] for line in lines])
    kx = np.array([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])
    edges = castile.evaluate(c, {"X": page, "Kx": kx, "Ky": kx.T})["G"]
    for row in edges:
        console.print(Text("    " + "".join(" ░▒▓█"[min(4, round(float(g)))] for g in row).rstrip(), style="cyan"))
    r = castile.explain(c, {"h": page.shape[0], "w": page.shape[1]})
    say(
        f"\nNobody said how large the result is: p = {r.extents['p']}, q = {r.extents['q']} keep every index in bounds."
    )
    say("")
    windows = np.lib.stride_tricks.sliding_window_view(page, (3, 3))
    gx, gy = (np.einsum("pqrs,rs->pq", windows, k) for k in (kx, kx.T))
    check("agrees with NumPy's sliding windows", np.abs(edges - np.hypot(gx, gy)).max(), 1e-12)


def four_bit_search(words: list[str]) -> None:
    title("4. Search in 4 bits: eight weights to a 32-bit word, unpacked inside the product")
    c = castile.load(CASCADES / "gemm_int4.cascade")
    show("\n".join(str(c).splitlines()[:1] + str(c).splitlines()[-3:]))
    vocabulary = sorted(set(words))
    table = embedded(vocabulary, 128).T
    packed = pack(table)
    asked = ("license", "distributing", "modified", "contribution")
    queries = embedded(list(asked), 128)
    found = castile.evaluate(c, {"A": queries, **packed})["C"]
    exact = queries @ table
    for word, row, truth in zip(asked, found, exact, strict=True):
        best = np.argsort(-row)[:3]
        close = "   ".join(f"{vocabulary[n]} {row[n]:.2f} ({truth[n]:.2f})" for n in best)
        say(f"    {word:<13} {close}")
    say("    in brackets: without quantisation", "dim")
    kept = packed["W"].nbytes + 2 * packed["scale"].size + packed["zero"].nbytes
    say(f"\n{len(vocabulary)} words of 128 numbers take {kept} bytes, not {4 * table.size}.\n")
    words_of_bits = np.repeat(packed["W"], 8, axis=0) >> (4 * (np.arange(128) % 8))[:, None] & 15
    plain = packed["scale"][0] * (words_of_bits - packed["zero"][0].astype(float))
    direct = bf16(bf16(queries) @ plain)
    check("agrees with unpacking in NumPy", np.abs(found - direct).max(), 2**-8)


def an_error_that_teaches() -> None:
    title("5. A mistake, and what castile says")
    show(MISTAKE)
    try:
        castile.parse(MISTAKE.strip() + "\n", "softmax.cascade")
    except castile.CastileError as error:
        say(str(error), "yellow")


def a_model(budget: float) -> None:
    title("6. The main job: a small Llama, its attention tuned")
    try:
        import torch
        from llama_block import Llama
    except ImportError:
        say("PyTorch is not installed; `make demo` installs it, and so does `pip install torch`.", "yellow")
        return

    torch.manual_seed(0)
    model, tokens = Llama().eval(), torch.randint(0, 2048, (1, 256))
    # What the demo tunes is gone when it ends: it begins alike each time.
    with TemporaryDirectory() as folder, torch.no_grad():
        os.environ["CASTILE_RECORDS"] = str(Path(folder) / "records.sqlite")
        found = castile.explain_model(model, tokens)
        say(str(found).splitlines()[0])
        attention = next(r for r in found.regions if r.kind == "attention" and r.cascade is not None)
        show(str(attention.cascade))
        say(", ".join(f"passes over {r}: {a} → {b}" for r, (a, b) in attention.passes.items()))
        say(f"\nTuning it for {budget:.0f} s …")
        try:
            tuned = castile.tune(attention.cascade, attention.extents, budget_s=budget)
        except castile.CastileError as error:  # a slow machine may not measure one in time
            say(str(error), "yellow")
        else:
            trials = sum(t.kind == "trial" for t in tuned.records)
            say(f"    {trials} of {tuned.space} mappings in {tuned.seconds:.0f} s; the best against the default:")
            say(f"    {1 / tuned.ratio:.2f} times its speed, {tuned.best.mapping}")

        torch._dynamo.reset()
        compiled = torch.compile(model, backend="castile")
        worst = (compiled(tokens) - model(tokens)).abs().max().item()
        say("")
        check("the compiled model's logits are eager's", worst, 1e-4)
        fast, slow = timed(lambda: compiled(tokens)), timed(lambda: model(tokens))
        fast, slow = min(fast, timed(lambda: compiled(tokens))), min(slow, timed(lambda: model(tokens)))
        say(f"    eager {1e3 * slow:.1f} ms, castile {1e3 * fast:.1f} ms: {slow / fast:.2f} times the speed", "bold")
        say("    matrix products, most of the time, are PyTorch's in both", "dim")


def timed(run: Callable[[], object], times: int = 9) -> float:
    """The median of some calls, in seconds."""
    taken = []
    for _ in range(times):
        began = perf_counter()
        run()
        taken.append(perf_counter() - began)
    return median(taken)


# Data


def embedded(words: list[str], size: int = 96) -> Array:
    """Unit vectors from the letters of words: counts of their trigrams, hashed. Words that look alike lie close."""
    rows = np.zeros((len(words), size))
    for row, word in zip(rows, words, strict=True):
        marked = f"<{word.lower()}>"
        for start in range(len(marked) - 2):
            row[zlib.crc32(marked[start : start + 3].encode()) % size] += 1
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def pack(table: Array, group: int = 128) -> Mapping[str, Array]:
    """4-bit codes with a scale and a zero point for each group of a column, eight codes to a word."""
    k, n = table.shape
    grouped = table.reshape(k // group, group, n)
    low, high = grouped.min(1), grouped.max(1)
    scale = bf16((high - low) / 15)
    zero = np.clip(np.rint(-low / scale), 0, 15)
    codes = np.clip(np.rint(grouped / scale[:, None] + zero[:, None]), 0, 15).astype(np.uint32).reshape(k // 8, 8, n)
    words = sum((codes[:, i] << np.uint32(4 * i) for i in range(8)), np.zeros((k // 8, n), np.uint32))
    return {"W": words, "scale": scale, "zero": zero.astype(np.uint8)}


def bf16(x: Array) -> Array:
    import ml_dtypes

    return x.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)


# Output


def title(text: str) -> None:
    console.print("\n" + text, style="bold blue", markup=False)
    console.print("─" * len(text), style="blue")


def show(text: str) -> None:
    console.print(Text("\n".join(("    " + line).rstrip() for line in text.strip().splitlines()), style="dim"))
    console.print()


def say(text: str, style: str = "") -> None:
    console.print(text, style=style or None, markup=False)


def passes(c: castile.Cascade) -> None:
    """How often each rank is traversed, and what has to wait for what."""
    r = castile.explain(c)
    for rank, (before, after) in r.passes.items():
        stages: dict[int, list[str]] = {}
        for e in r.einsums:
            if rank in e.passes:
                stages.setdefault(e.passes[rank], []).extend(e.outputs)
        order = "  then  ".join(" ".join(names) for _, names in sorted(stages.items()))
        count = f"{before}" if before == after else f"{before} → {after}"
        say(f"passes over {rank}: {count:<8} {order}")


def check(claim: str, worst: float, allowed: float) -> None:
    good = worst <= allowed
    style = "green" if good else "bold red"
    console.print(f"{'ok' if good else 'WRONG':<4}{claim} (off by {worst:.1e})", style=style, markup=False)
    if not good:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
