"""castile on the GPU that is present, in parts of at most nine minutes each; run again, it goes on where it stopped.

    python3 benchmarks/gpu.py correct|race|tune|profile|machine [--seconds 520] [--only TEXT] [--results FILE]
        [--earlier FILE …] [--share 1/3] [--dry]

``correct``: every example against the float64 oracle, at extents that tiles divide and at ragged ones, outputs poisoned
first; then some of them under other mappings. ``race``: ratios against torch's attention (flash, cuDNN, efficient),
compiled FlexAttention, cuBLAS, torch's softmax and norms, Inductor, flash-attn and gemlite, forward and backward, where
these are present; one of each kind comes before other sizes. ``tune``: from a race's default mapping to a faster one,
choice by choice. ``profile``: rows for a cost model (cascade key, mapping, times). ``machine``: clocks idle
and under load, driver, versions, measured copy and GEMM ceilings. ``--dry`` runs the same logic on the CPU, under
Triton's interpreter, at tiny sizes, without peers that need a GPU.

It needs the repository, torch, triton, numpy and ml_dtypes. From a checkout where nothing is installed, with ``$OUT`` a
folder that is empty at first, and then again with the rows of earlier commands:

    mkdir -p build/site && ln -sfn ../.. build/site/castile && export PYTHONPATH=$PWD/build/site
    python3 benchmarks/gpu.py machine --results $OUT/gpu.jsonl
    python3 benchmarks/gpu.py race --seconds 500 --results $OUT/gpu.jsonl
    cat $OUT/gpu.jsonl >> benchmarks/results/gpu.jsonl
    python3 benchmarks/gpu.py race --seconds 520 --results $OUT/gpu.jsonl --earlier benchmarks/results/gpu.jsonl

``correct`` mostly waits for compilers and the oracle, so that several processes may share it (times would suffer); with
16 cores and what nine minutes hold:

    for i in 1 2 3 4 5 6 7 8; do
      OMP_NUM_THREADS=2 python3 benchmarks/gpu.py correct --share $i/8 --results $OUT/gpu.jsonl &
    done; wait

A job that takes its process down, or more than 150 s, gets a row that says so, and a new process does the others.
docs/measuring.md says what stands in a row.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from pathlib import Path

import castile
from castile.benchmarks._gpu_check import alike, checked_again, sizes, tensors
from castile.benchmarks._gpu_mappings import CHANGES, changed, label, other_tiles, profile_row, tune_row
from castile.benchmarks._gpu_races import Call, Race, families, races
from castile.benchmarks._gpu_run import Job, Options, Row, run_part, supervise
from castile.benchmarks._gpu_times import times_us
from castile.ir.device import DEVICES, device_of
from castile.ir.errors import CastileError
from castile.ir.extents import resolve
from castile.passes.defaults import default_mapping

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples" / "cascades"
RESULTS = ROOT / "benchmarks" / "results" / "gpu.jsonl"

# Extents of the ranks of an example that are wide: what tiles divide, and what they do not.
EXTENTS = {"even": 256, "ragged": 257}
DRY_EXTENTS = {"even": 4, "ragged": 5}

# Examples that are checked under other mappings too.
VARIED = ("gemm", "attention_causal", "attention_backward", "gemm_int4", "softmax")

# Calls timed before all peers are there.
FEW_CALLS = 3


# Correctness


def correct(options: Options) -> Iterator[tuple[str, Job]]:
    kinds = DRY_EXTENTS if options.dry else EXTENTS
    for kind, most in kinds.items():
        for path in sorted(EXAMPLES.glob("*.cascade")):
            yield f"{path.stem} {kind}", partial(correct_row, path, most, {}, options)
    for change in filter(None, CHANGES):
        for kind, most in kinds.items():
            for name in VARIED:
                job = partial(correct_row, EXAMPLES / f"{name}.cascade", most, change, options)
                yield f"{name} {kind} {label(change)}", job


def correct_row(path: Path, most: int, change: Mapping[str, int], options: Options, row: Row) -> None:
    """One example: how far from the oracle, as a multiple of its bound. Raises `AssertionError` past it."""
    c = castile.load(path)
    extents = sizes(c, most)
    mapping = changed(default_mapping(c, options.target, extents), change) if change else None
    kernel = castile.compile(c, options.target, extents, mapping)
    row |= {"mapping": kernel.mapping.to_dict(), "extents": dict(extents)}
    inputs = tensors(c, extents, most, options.device)
    outs = kernel(**inputs)
    row["worst"] = checked_again(kernel, extents, inputs, outs, most)


# Races


def race(options: Options) -> Iterator[tuple[str, Job]]:
    for r in races():
        yield r.name, partial(race_row, r, options)


def _forget() -> None:
    """Let torch.compile start afresh: after a few shapes of one function it would run it eagerly, or for any shape."""
    import torch

    if torch.cuda.is_available():
        torch.compiler.reset()


def race_row(r: Race, options: Options, row: Row) -> None:
    """Times of castile and of the peers that are here, and castile's speed as a multiple of each.

    A peer that gives other numbers is left out. A few calls come first, so that a row which runs out of time has them;
    the oracle comes last, as the device waits for it.
    """
    extents = resolve(r.cascade, dict(r.tiny if options.dry else r.extents))
    kernel = castile.compile(r.cascade, options.target, extents)
    inputs = r.prepare(tensors(r.cascade, extents, 0, options.device))
    outs = kernel(**inputs)
    ours = outs if isinstance(outs, tuple) else (outs,)
    calls: dict[str, Call] = {"castile": partial(kernel, **inputs, out=outs)}
    row |= {"absent": {}, "checked": False, "mapping": kernel.mapping.to_dict()}
    _timed(r, calls, options, row, FEW_CALLS)
    for name, build in r.peers.items():
        if options.dry and not name.startswith("torch"):
            continue
        _forget()
        try:
            call = build(inputs)
            alike(ours, call())
        except Exception as error:  # a peer that cannot run here, or computes something else
            row["absent"][name] = f"{type(error).__name__}: {error}"[:400]
            continue
        calls[name] = call
        _timed(r, {n: calls[n] for n in ("castile", name)}, options, row, FEW_CALLS)
    _timed(r, calls, options, row)
    row["worst"] = checked_again(kernel, extents, inputs, outs, 0)
    row["checked"] = True


def _timed(r: Race, calls: Mapping[str, Call], options: Options, row: Row, repeats: int = 30) -> None:
    """Times of calls put in a row, and what follows from them."""
    measured = {name: times.summary() for name, times in times_us(calls, options.dry, repeats).items()}
    ours = measured["castile"]["median_us"]
    row["times"] = {**row.get("times", {}), **measured}
    row["speed"] = {n: round(m["median_us"] / ours, 4) for n, m in row["times"].items() if n != "castile"}
    if not options.dry:
        row["tflops"], row["tb_per_s"] = round(r.flops / ours / 1e6, 2), round(r.bytes / ours / 1e6, 3)


# Other mappings


def tune(options: Options) -> Iterator[tuple[str, Job]]:
    for r in races():
        yield r.name, partial(tune_row, r, options)


def profile(options: Options) -> Iterator[tuple[str, Job]]:
    """One change of all kinds' first races, then the next change; then so for their second races, and so on."""
    for turn in zip_longest(*families()):
        chosen = [r for r in turn if r is not None]
        for change in CHANGES:
            for r in chosen:
                yield f"{r.name} {label(change)}", partial(profile_row, r, change, {}, options)
        for r in chosen:
            if options.only in r.name or options.only.startswith(r.name):
                for rank, size in other_tiles(r, options):
                    yield f"{r.name} tile {rank}={size}", partial(profile_row, r, {}, {rank: size}, options)


# The machine


def machine(options: Options) -> Iterator[tuple[str, Job]]:
    yield "machine", partial(machine_row, options)


def machine_row(options: Options, row: Row) -> None:
    """What ran all this, and its measured ceilings."""
    import torch
    import triton

    row |= {"torch": torch.__version__, "triton": triton.__version__, "python": sys.version.split()[0]}
    row |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    size = 64 if options.dry else 8192
    kind = torch.float32 if options.dry else torch.bfloat16
    a, b = (torch.randn(size, size, device=options.device).to(kind) for _ in range(2))
    x = torch.empty(1 << (10 if options.dry else 30), dtype=torch.uint8, device=options.device)
    y = torch.empty_like(x)
    measured = times_us({"gemm": partial(torch.matmul, a, b), "copy": partial(y.copy_, x)}, options.dry)
    gemm, copy = (measured[name].summary()["median_us"] for name in ("gemm", "copy"))
    row["gemm_tflops"] = round(2.0 * size**3 / gemm / 1e6, 2)
    row["copy_tb_per_s"] = round(2.0 * x.numel() / copy / 1e6, 3)
    if not options.dry:
        row["device"] = torch.cuda.get_device_name()
        row["idle"] = _clocks()
        # A second or two of products wait in the queue while the clocks are read.
        for _ in range(int(2e6 / gemm)):
            torch.matmul(a, b)
        row["under_load"] = _clocks()
        torch.cuda.synchronize()


def _clocks() -> dict[str, str]:
    """What the driver tells of the device, by its own names."""
    fields = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        text = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(fields.split(","), (x.strip() for x in text.partition("\n")[0].split(",")), strict=False))


PARTS = {"correct": correct, "race": race, "tune": tune, "profile": profile, "machine": machine}


def present() -> str:
    """The target of the GPU that is here, its architecture's own or, failing a row for it, the nearest below."""
    # torch is asked in any case: not every machine with a GPU shows its driver in the file system.
    import torch  # noqa: F401

    from castile.codegen.targets import named

    found = named("cuda")
    if found in DEVICES:
        return found
    arch = int(found.partition(":")[2]) if found.startswith("cuda") else 0
    below = [t for t in DEVICES if t.startswith("cuda") and int(t.partition(":")[2]) <= arch]
    return max(below, key=lambda t: int(t.partition(":")[2])) if below else device_of(found).target


def share(text: str) -> tuple[int, int]:
    """``2/3`` as (1, 3)."""
    part, _, of = text.partition("/")
    if not (part.isdigit() and of.isdigit() and 1 <= int(part) <= int(of)):
        raise argparse.ArgumentTypeError(f"a share is written as 1/3, not {text!r}")
    return int(part) - 1, int(of)


def parsed(words: list[str] | None) -> tuple[str, bool, Options]:
    """The part, whether it runs in this process, and how. The device is not asked."""
    started = time.monotonic()
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--seconds", type=float, default=520.0, help="it ends after so long")
    parser.add_argument("--only", default="", help="names with this text in them")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where rows are appended")
    parser.add_argument("--earlier", type=Path, nargs="+", default=[], help="results whose rows are not made again")
    parser.add_argument("--share", type=share, default=(0, 1), help="1/3 is the first of three that run together")
    parser.add_argument("--dry", action="store_true", help="on the CPU, at tiny sizes")
    parser.add_argument("--alone", action="store_true", help="in this process, which a job may take down")
    given = parser.parse_args(words)
    missing = [str(path) for path in given.earlier if not path.is_file()]
    if missing:
        parser.error(f"there is no file {', '.join(missing)}")
    options = Options(
        "interpret",
        given.seconds,
        given.only,
        given.results,
        given.dry,
        share=given.share,
        earlier=tuple(given.earlier),
        started=started,
    )
    return given.part, given.alone, options


def main(words: list[str] | None = None) -> int:
    """Do a part in this process."""
    part, _, options = parsed(words)
    if not options.dry:
        try:
            options = replace(options, target=present())
        except CastileError as error:
            print(error, file=sys.stderr)
            return 2
    return run_part(part, PARTS[part](options), options)


def supervised(words: list[str]) -> int:
    """As `main`, in processes of their own."""
    _, alone, options = parsed(words)
    if alone:
        return main(words)
    return supervise([sys.executable, __file__, *words, "--alone"], options)


if __name__ == "__main__":
    sys.exit(supervised(sys.argv[1:]))
