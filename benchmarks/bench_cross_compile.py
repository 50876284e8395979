"""Every example on all eight GPU architectures with its default mapping: what the compiled binaries take of a device.

    python benchmarks/bench_cross_compile.py [NAME ...] [--target T] [--results FILE]

Needs triton and no GPU. Prints one JSON row for each example and target, and appends it to the results; rows that are
there already are not made again. Exits 1 if a kernel does not compile, does not fit, or, of attention, softmax and
GEMM, spills or lacks the matrix instruction of its device.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import castile
from castile.codegen.triton_build import resources
from castile.ir.device import DEVICES
from castile.ir.errors import CastileError
from castile.passes.mapped import default_mapping, mapped, nominal

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples" / "cascades"
RESULTS = ROOT / "benchmarks" / "results" / "cross_compile.jsonl"
GPUS = tuple(t for t, d in DEVICES.items() if d.is_gpu)

# Examples that must not spill, and those whose 16-bit products must use the matrix unit.
CLEAN = (
    "attention",
    "attention_causal",
    "attention_gqa",
    "attention_lse",
    "attention_prefix",
    "attention_sink",
    "softmax",
    "gemm",
    "gemm_batched",
    "gemm_nt",
    "gemm_tn",
)
MATRIX = {"cuda:90": "wgmma", "cuda:100": "tcgen05", "hip:gfx942": "mfma", "hip:gfx950": "mfma", "hip:gfx1100": "wmma"}


def row_of(name: str, target: str) -> dict[str, Any]:
    """What one example takes on one target; "error" says why there is no answer."""
    started = time.monotonic()
    row: dict[str, Any] = {"example": name, "target": target}
    try:
        c = castile.load(EXAMPLES / f"{name}.cascade")
        extents = nominal(c)
        mapping = default_mapping(c, target, extents)
        row["mapping"] = mapping.to_dict()
        found = resources(mapped(c, mapping, extents).program, mapping, target)
        row |= found.to_dict()
    except CastileError as error:
        row["error"] = f"{type(error).__name__}: {error.message}"
    row["seconds"] = round(time.monotonic() - started, 2)
    return row


def faults(row: dict[str, Any]) -> Iterator[str]:
    """What is wrong with a row."""
    where = f"{row['example']} on {row['target']}"
    if "error" in row:
        yield f"{where}: {row['error']}"
        return
    if row["example"] not in CLEAN:
        return
    if row["spill_bytes"]:
        yield f"{where} spills {row['spill_bytes']} bytes"
    wanted = MATRIX.get(row["target"], "mma")
    if row["example"] != "softmax" and not row["instructions"].get(wanted):
        yield f"{where} has no {wanted}"


def known(path: Path) -> set[tuple[str, str]]:
    if not path.exists():
        return set()
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    return {(r["example"], r["target"]) for r in rows}


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="examples; all if none is named")
    parser.add_argument("--target", action="append", choices=GPUS)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so many; the next run goes on")
    given = parser.parse_args(words)
    names = given.names or sorted(p.stem for p in EXAMPLES.glob("*.cascade"))
    done = known(given.results)
    given.results.parent.mkdir(parents=True, exist_ok=True)
    bad: list[str] = []
    started = time.monotonic()
    with given.results.open("a", encoding="utf-8") as file:
        for name in names:
            for target in given.target or GPUS:
                if (name, target) in done:
                    continue
                if time.monotonic() - started > given.seconds:
                    print("stopped; run again to go on", file=sys.stderr)
                    return 1
                row = row_of(name, target)
                text = json.dumps(row, sort_keys=True)
                print(text, flush=True)
                file.write(text + "\n")
                file.flush()
                bad += faults(row)
    for text in bad:
        print(text, file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
