"""Every example on all eight GPU architectures with its default mapping: what the compiled binaries take of a device.

    python benchmarks/bench_cross_compile.py [NAME ...] [--target T] [--results FILE]

Needs triton and no GPU. Prints one JSON row for each example and target, and appends it to the results; rows that are
there already are kept if they were made with what is the default mapping now. Exits 1 if a kernel does not compile,
does not fit, or, of attention, softmax and GEMM, spills or lacks the matrix instruction of its device.
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
from castile.ir.cascade import Access, walk
from castile.ir.device import DEVICES
from castile.ir.errors import CastileError
from castile.ir.footprint import scoped_sizes
from castile.ir.tile import Dot, For, Load, TileKernel, operations, tiles_of
from castile.passes.mapped import default_mapping, mapped, nominal
from castile.passes.registers import sides

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples" / "cascades"
RESULTS = ROOT / "benchmarks" / "results" / "cross_compile.jsonl"
GPUS = tuple(t for t, d in DEVICES.items() if d.is_gpu)

# Families of examples that must not spill, and whose 16-bit products must use the matrix unit.
CLEAN = ("attention", "softmax", "gemm")
MATRIX = {"cuda:90": "wgmma", "cuda:100": "tcgen05", "hip:gfx942": "mfma", "hip:gfx950": "mfma", "hip:gfx1100": "wmma"}


# Rows of a product from which these units take it; others take 16.
LEAST = {"cuda:90": 64, "cuda:100": 64}


def row_of(name: str, target: str) -> dict[str, Any]:
    """What one example takes on one target; "error" says why there is no answer.

    "fills" is whether a product of 16-bit tiles, none of them gathered, is large enough for the matrix unit.
    """
    started = time.monotonic()
    row: dict[str, Any] = {"example": name, "target": target}
    try:
        c = castile.load(EXAMPLES / f"{name}.cascade")
        extents = nominal(c)
        mapping = default_mapping(c, target, extents)
        row["mapping"] = mapping.to_dict()
        program = mapped(c, mapping, extents).program
        row["fills"] = any(fills(k, LEAST.get(target, 16)) for k in program.kernels)
        found = resources(program, mapping, target)
        row |= found.to_dict()
    except CastileError as error:
        row["error"] = f"{type(error).__name__}: {error.message}"
    row["seconds"] = round(time.monotonic() - started, 2)
    return row


def fills(k: TileKernel, least: int) -> bool:
    """Whether a kernel has a product of 16-bit tiles with so many rows, whose operands are loaded at places known
    beforehand."""
    axes = {name: t.axes for name, t in tiles_of(k).items()}
    sizes = scoped_sizes(k) | {op.rank: op.size for op in operations(k.body) if isinstance(op, For)}
    loads = (op for op in operations(k.body) if isinstance(op, Load))
    gathered = {x.tile.name for x in loads if any(isinstance(n, Access) for i in x.source.indices for n in walk(i))}
    for op in operations(k.body):
        if isinstance(op, Dot) and op.operand in ("f16", "bf16") and not {op.left, op.right} & gathered:
            rows, columns = sides(op, axes, sizes)
            if rows >= least and columns >= 16:
                return True
    return False


def faults(row: dict[str, Any]) -> Iterator[str]:
    """What is wrong with a row."""
    where = f"{row['example']} on {row['target']}"
    if "error" in row:
        yield f"{where}: {row['error']}"
        return
    if not row["example"].startswith(CLEAN):
        return
    if row["spill_bytes"]:
        yield f"{where} spills {row['spill_bytes']} bytes"
    wanted = MATRIX.get(row["target"], "mma")
    if row["fills"] and not row["instructions"].get(wanted):
        yield f"{where} has no {wanted}"


def known(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """The rows that are there, the last one for each example and target, without errors."""
    if not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    return {(r["example"], r["target"]): r for r in rows if "error" not in r}


def current(row: dict[str, Any]) -> bool:
    """Whether a row was made with what is now the default mapping of its example."""
    path = EXAMPLES / f"{row['example']}.cascade"
    if not path.exists() or "fills" not in row:
        return False
    c = castile.load(path)
    return bool(default_mapping(c, row["target"], nominal(c)).to_dict() == row["mapping"])


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="examples; all if none is named")
    parser.add_argument("--target", action="append", choices=GPUS)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so many; the next run goes on")
    given = parser.parse_args(words)
    names = given.names or sorted(p.stem for p in EXAMPLES.glob("*.cascade"))
    done = {at: row for at, row in known(given.results).items() if current(row)}
    given.results.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, sort_keys=True) + "\n" for _, row in sorted(done.items())]
    given.results.write_text("".join(lines), encoding="utf-8")
    bad = [text for row in done.values() for text in faults(row)]
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
