"""How long derivation takes: every example, and chains and trees of up to 500 Einsums.

python benchmarks/bench_derive.py            # a table: cascade, Einsums, passes before -> after, milliseconds of CPU
python benchmarks/bench_derive.py --quick    # small sizes, each derived once
python benchmarks/bench_derive.py --json     # the same rows as one JSON document
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import castile
from castile.passes.count import count_passes
from castile.passes.derive import derive

CASCADES = Path(__file__).resolve().parents[1] / "examples" / "cascades"
SIZES = (50, 100, 200, 500)


def normalised(n: int) -> castile.Cascade:
    """Softmax of softmax of ...: each normaliser is a barrier for the next."""
    lines, last = ["def normalised(X: f32[n, k]) -> Y:"], "X"
    for i in range(n // 4):
        lines += [
            f"    M{i}[n] = max[k]({last}[n, k])",
            f"    P{i}[n, k] = exp({last}[n, k] - M{i}[n])",
            f"    L{i}[n] = sum[k](P{i}[n, k])",
            f"    A{i}[n, k] = P{i}[n, k] / L{i}[n]",
        ]
        last = f"A{i}"
    return castile.parse("\n".join([*lines, f"    Y[n] = sum[k]({last}[n, k] * X[n, k])"]))


def side_by_side(n: int) -> castile.Cascade:
    """Many normalisers of one tensor, side by side."""
    lines = ["def side_by_side(X: f32[n, k]) -> Y:"]
    for i in range(n // 3):
        lines += [
            f"    M{i}[n] = max[k](X[n, k] * {i + 1}.5)",
            f"    P{i}[n, k] = exp(X[n, k] * {i + 1}.5 - M{i}[n])",
            f"    L{i}[n] = sum[k](P{i}[n, k])",
        ]
    return castile.parse("\n".join([*lines, "    Y[n] = " + " + ".join(f"L{i}[n]" for i in range(min(n // 3, 40)))]))


def pointwise(n: int) -> castile.Cascade:
    lines, last = ["def pointwise(X: f32[n, k]) -> Y:"], "X"
    for i in range(n):
        lines.append(f"    T{i}[n, k] = tanh({last}[n, k] * 2 + X[n, k])")
        last = f"T{i}"
    return castile.parse("\n".join([*lines, f"    Y[n] = sum[k]({last}[n, k])"]))


def residual(n: int) -> castile.Cascade:
    """A residual network: norm, product, gate, product, sum, again and again."""
    lines, last = ["def residual(X: f32[n, k], W: f32[k, j], V: f32[j, k]) -> Y:"], "X"
    for i in range(n // 6):
        lines += [
            f"    Q{i}[n] = sum[k]({last}[n, k] * {last}[n, k])",
            f"    N{i}[n, k] = {last}[n, k] * rsqrt(Q{i}[n] / extent(k) + 0.001)",
            f"    H{i}[n, j] = sum[k](N{i}[n, k] * W[k, j])",
            f"    G{i}[n, j] = H{i}[n, j] * sigmoid(H{i}[n, j])",
            f"    D{i}[n, k] = sum[j](G{i}[n, j] * V[j, k])",
            f"    X{i}[n, k] = {last}[n, k] + D{i}[n, k]",
        ]
        last = f"X{i}"
    return castile.parse("\n".join([*lines, f"    Y[n, k] = {last}[n, k]"]))


FAMILIES = (normalised, side_by_side, pointwise, residual)


def cases(quick: bool) -> Iterator[castile.Cascade]:
    for path in sorted(CASCADES.glob("*.cascade")):
        yield castile.load(path)
    for family in FAMILIES:
        for n in SIZES[:1] if quick else SIZES:
            yield family(n)


def row(c: castile.Cascade, repeat: int) -> dict[str, object]:
    times = []
    for _ in range(repeat):
        # Content is cached on the cascade, so each run takes a fresh one.
        fresh = castile.parse(str(c))
        start = time.process_time()
        d = derive(fresh)
        times.append(time.process_time() - start)
    before = count_passes(c)
    passes = {r: (before[r], d.passes[r]) for r in before}
    return {"cascade": c.name, "einsums": len(c.einsums), "passes": passes, "ms": 1000 * min(times)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, once each")
    parser.add_argument("--json", action="store_true", help="rows as one JSON document on stdout")
    options = parser.parse_args(argv)
    rows = []
    for c in cases(options.quick):
        found = row(c, 1 if options.quick else 3)
        rows.append(found)
        if not options.json:
            passes = ", ".join(f"{r}: {a} -> {b}" for r, (a, b) in found["passes"].items())  # type: ignore[attr-defined]
            print(f"{found['cascade']:32} {found['einsums']:4}  {found['ms']:9.1f} ms  {passes}", flush=True)
    if options.json:
        json.dump(rows, sys.stdout, indent=1)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
