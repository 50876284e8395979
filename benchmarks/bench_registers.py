"""What mappings drawn from the space take of GPUs that are not here: rows for the model of registers.

    python benchmarks/bench_registers.py [--seconds 200] [--drawn 8]      # again, until nothing is left
    castile costmodel eval --compiled benchmarks/results/registers.jsonl

`bench_cross_compile.py` compiles every example under its default mapping; a tuner asks about all the others. Needs
triton and no GPU. Rows are those of that benchmark, and where they are already, they are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

import castile
from castile.autotune.space import space_of
from castile.codegen.triton_build import resources
from castile.codegen.triton_process import LIMIT
from castile.ir.device import device_of
from castile.ir.errors import CastileError
from castile.ir.mapping import Mapping
from castile.passes.mapped import mapped, nominal

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples" / "cascades"
RESULTS = ROOT / "benchmarks" / "results" / "registers.jsonl"

TARGETS = ("cuda:90", "hip:gfx942", "cuda:80")
NAMES = (
    *("gemm", "attention", "softmax", "gemm_int4", "attention_causal", "layernorm", "gemm_bias_gelu", "attention_gqa"),
    *("gemm_swiglu", "rmsnorm_gemm", "attention_dq", "cross_entropy", "gemm_fp8", "softmax_backward", "gemm_chain"),
    *("attention_decode", "linear_cross_entropy", "conv1d", "gemm_mxfp4", "attention_softcap"),
)


def drawn(c: castile.Cascade, target: str, count: int) -> list[Mapping]:
    """Mappings of a cascade's space at its nominal extents, none of them the default."""
    space = space_of(c, nominal(c), target, device_of(target))
    combinations = space.combinations()
    order = np.random.default_rng(0).permutation(np.arange(1, len(combinations)))
    return [space.mapping(*combinations[i]) for i in order[:count]]


def row_of(name: str, c: castile.Cascade, target: str, mapping: Mapping) -> dict[str, Any]:
    """What one mapping takes; "error" says why there is no answer."""
    row: dict[str, Any] = {"example": name, "target": target, "triton": version("triton"), "mapping": mapping.to_dict()}
    try:
        row |= resources(mapped(c, mapping, nominal(c)).program, mapping, target).to_dict()
    except CastileError as error:
        row["error"] = f"{type(error).__name__}: {error.message}"[:200]
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="examples; some are taken if none is named")
    parser.add_argument("--seconds", type=float, default=200.0, help="stop after so many; the next run goes on")
    parser.add_argument("--drawn", type=int, default=8, help="mappings of each example on each target")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="one mapping of one example, on record nowhere")
    given = parser.parse_args()
    os.environ.setdefault(LIMIT, "20")  # a tuner would give up too
    names, count = (NAMES[:1], 1) if given.quick else (given.names or NAMES, given.drawn)
    lines = given.results.read_text(encoding="utf-8").splitlines() if given.results.is_file() else []
    known = {(r["example"], r["target"], json.dumps(r["mapping"])) for r in map(json.loads, lines)}
    end = time.monotonic() + given.seconds
    for turn in range(count):
        for target in TARGETS:
            for name in names:
                c = castile.load(EXAMPLES / f"{name}.cascade")
                mappings = drawn(c, target, count)
                if turn >= len(mappings) or (name, target, json.dumps(mappings[turn].to_dict())) in known:
                    continue
                if time.monotonic() > end:
                    print("stopped; run again to go on", file=sys.stderr)
                    return 1
                row = row_of(name, c, target, mappings[turn])
                print(name, target, row.get("registers", row.get("error")), flush=True)
                if given.quick:
                    return 0
                with given.results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row, sort_keys=True) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
