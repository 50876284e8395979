"""Every example on all eight GPU architectures with its default mapping: what the compiled binaries take of a device.

    python benchmarks/bench_cross_compile.py [NAME ...] [--target T] [--results FILE]

Needs triton and no GPU. Prints one JSON row for each example and target, and puts it in the results; rows that are
there already are kept if the same Triton would be given the same kernels now: a row's "digest" tells. Exits 1 if a
kernel does not compile, does not fit, or, of attention, softmax and GEMM, spills or lacks the matrix instruction of its
device; `--check` compiles nothing and exits 1 if a row is missing or not what today's code gives.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import castile
from castile.codegen.triton_build import compiled_digest, resources
from castile.ir.cascade import Access, walk
from castile.ir.device import DEVICES
from castile.ir.errors import CastileError
from castile.ir.footprint import scoped_sizes
from castile.ir.mapping import Mapping
from castile.ir.tile import Dot, For, Load, TileKernel, operations, tiles_of
from castile.passes.defaults import default_mapping
from castile.passes.mapped import mapped, nominal
from castile.passes.registers import sides
from castile.passes.tile import TileProgram

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
    row: dict[str, Any] = {"example": name, "target": target, "triton": version("triton")}
    try:
        mapping, program = made(name, target)
        row["mapping"] = mapping.to_dict()
        row["digest"] = compiled_digest(program, mapping, target)
        row["fills"] = any(fills(k, LEAST.get(target, 16)) for k in program.kernels)
        found = resources(program, mapping, target)
        row |= found.to_dict()
    except CastileError as error:
        row["error"] = f"{type(error).__name__}: {error.message}"
    row["seconds"] = round(time.monotonic() - started, 2)
    return row


def made(name: str, target: str) -> tuple[Mapping, TileProgram]:
    """An example's default mapping for a target, and its program under it."""
    c = castile.load(EXAMPLES / f"{name}.cascade")
    extents = nominal(c)
    mapping = default_mapping(c, target, extents)
    return mapping, mapped(c, mapping, extents).program


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
    return {(r["example"], r["target"]): r for r in rows if "error" not in r and "digest" in r}


def current(row: dict[str, Any]) -> bool:
    """Whether a row was made of what is compiled now for its example, by this Triton."""
    if not (EXAMPLES / f"{row['example']}.cascade").exists() or row.get("triton") != version("triton"):
        return False
    mapping, program = made(row["example"], row["target"])
    return bool(
        row["mapping"] == mapping.to_dict() and row["digest"] == compiled_digest(program, mapping, row["target"])
    )


def write(path: Path, rows: dict[tuple[str, str], dict[str, Any]]) -> None:
    """The rows in order, in place of what was there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, sort_keys=True) + "\n" for _, row in sorted(rows.items()))
    path.write_text(text, encoding="utf-8")


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="examples; all if none is named")
    parser.add_argument("--target", action="append", choices=GPUS)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so many; the next run goes on")
    parser.add_argument(
        "--check", "--quick", dest="check", action="store_true", help="only tell which rows are missing or stale"
    )
    given = parser.parse_args(words)
    examples = sorted(p.stem for p in EXAMPLES.glob("*.cascade"))
    rows = {at: row for at, row in known(given.results).items() if at[0] in examples}
    wanted = [(name, target) for name in given.names or examples for target in given.target or GPUS]
    stale = [at for at in wanted if at not in rows or not current(rows[at])]
    if given.check:
        for at in stale:
            print("stale:" if at in rows else "missing:", *at)
        return 1 if stale else 0
    started = time.monotonic()
    for at in stale:
        if time.monotonic() - started > given.seconds:
            print("stopped; run again to go on", file=sys.stderr)
            return 1
        rows[at] = row_of(*at)
        print(json.dumps(rows[at], sort_keys=True), flush=True)
        write(given.results, rows)
    bad = [text for at in wanted for text in faults(rows[at])]
    for text in bad:
        print(text, file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
