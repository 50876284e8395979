"""How soon a kernel gives its first result on the CPU, and what a call of it costs beside its work.

    python benchmarks/bench_start.py [NAME ...] [--quick] [--json]

For each example: milliseconds from its text to its first result in a process that has imported castile, with nothing
cached (cold) and with the kernel on disk (cached), each the median of a few processes; then the microseconds of a call
with extents of 1, where there is next to nothing to compute (call). Exits 1 where one is above the limits below;
``--quick`` takes one example, once, and no limits.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import castile
from castile.benchmarks._cold import fresh_caches
from castile.ir.dtypes import numpy_dtype
from castile.ir.extents import resolve, shape_of
from castile.passes.mapped import nominal

CASCADES = Path(__file__).resolve().parents[1] / "examples" / "cascades"
NAMES = ("softmax", "rmsnorm", "gemm", "gemm_bias_gelu", "attention", "attention_causal", "attention_backward")
LIMITS = {"cold_ms": 2000.0, "cached_ms": 10.0, "call_us": 15.0}
PROCESSES = 5


def drawn(c: castile.Cascade, extents: Mapping[str, int]) -> dict[str, Any]:
    """Inputs in the declared types."""
    rng = np.random.default_rng(0)
    found = {}
    for p in c.params:
        array = rng.random(shape_of(c, p.name, extents)).astype(numpy_dtype(p.dtype))
        found[p.name] = array if p.indices else array[()]
    return found


def first(name: str) -> float:
    """Milliseconds from the text of an example to its first result, at its nominal extents."""
    text = (CASCADES / f"{name}.cascade").read_text(encoding="utf-8")
    c = castile.parse(text)
    inputs, compiler = drawn(c, nominal(c)), castile.compile
    start = time.perf_counter()
    compiler(castile.parse(text), target="cpu")(**inputs)
    return 1e3 * (time.perf_counter() - start)


def least(name: str) -> float:
    """Milliseconds of the same call once more, which is its work."""
    c = castile.load(CASCADES / f"{name}.cascade")
    kernel, inputs = castile.compile(c, target="cpu"), drawn(c, nominal(c))
    times = []
    for _ in range(6):
        start = time.perf_counter()
        kernel(**inputs)
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


def call(name: str) -> float:
    """Microseconds of a call at extents of 1, with the outputs given."""
    c = castile.load(CASCADES / f"{name}.cascade")
    kernel, inputs = castile.compile(c, target="cpu"), drawn(c, resolve(c, dict.fromkeys(c.ranks, 1)))
    out = kernel(**inputs)
    best = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(200):
            kernel(**inputs, out=out)
        best = min(best, (time.perf_counter() - start) / 200)
    return 1e6 * best


MEASURES = {f.__name__: f for f in (first, least, call)}


def apart(measure: str, name: str, caches: Mapping[str, str]) -> float:
    """A measurement in a process of its own."""
    argv = (sys.executable, __file__, name, "--child", measure)
    # Modules come from their bytecode, as they do for those who installed them.
    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"} | dict(caches)
    done = subprocess.run(argv, env=env, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{name}: {measure} failed:\n{done.stderr}")
    return float(done.stdout)


def row(name: str, processes: int) -> dict[str, Any]:
    """The times of one example; what its work takes is not counted in the first two."""
    cold, cached = [], []
    for _ in range(processes):
        with fresh_caches() as caches:
            cold.append(apart("first", name, caches))
            cached.append(apart("first", name, caches))
            work, one = apart("least", name, caches), apart("call", name, caches)
    times = {"cold_ms": statistics.median(cold) - work, "cached_ms": statistics.median(cached) - work, "call_us": one}
    return {"example": name, **{k: round(v, 2) for k, v in times.items()}, "work_ms": round(work, 2)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=NAMES, metavar="NAME", help="examples to take")
    parser.add_argument("--quick", action="store_true", help="the first example once, whatever it takes")
    parser.add_argument("--json", action="store_true", help="rows as one JSON document on stdout")
    parser.add_argument("--child", choices=sorted(MEASURES), help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.child:
        print(MEASURES[given.child](given.names[0]))
        return 0
    rows = [row(name, 1) for name in given.names[:1]] if given.quick else [row(n, PROCESSES) for n in given.names]
    if given.json:
        print(json.dumps(rows, indent=1))
    else:
        print(f"{'example':24} {'cold ms':>9} {'cached ms':>10} {'call us':>8} {'work ms':>8}")
        for r in rows:
            print(
                f"{r['example']:24} {r['cold_ms']:9.0f} {r['cached_ms']:10.1f} {r['call_us']:8.1f} {r['work_ms']:8.1f}"
            )
    return int(not given.quick and any(r[k] > most for r in rows for k, most in LIMITS.items()))


if __name__ == "__main__":
    sys.exit(main())
