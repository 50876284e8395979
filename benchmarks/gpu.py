"""castile on the GPU that is present, in parts of at most nine minutes each; run again, it goes on where it stopped.

    python benchmarks/gpu.py correct|race|profile|machine [--seconds 520] [--only TEXT] [--results FILE]
        [--earlier FILE …] [--share 1/3] [--dry]

``correct``: every example against the float64 oracle, at extents that tiles divide and at ragged ones, outputs poisoned
first. ``race``: ratios against torch's attention (flash, cuDNN, efficient), compiled FlexAttention, cuBLAS, torch's
softmax and norms, Inductor, flash-attn and gemlite, forward and backward, where these are present; one of each kind
comes before other sizes. ``profile``: rows for a cost model (cascade key, mapping, resources, times). ``machine``:
clocks idle and under load, driver, versions, measured copy and GEMM ceilings. ``--dry`` runs the same logic on the CPU,
under Triton's interpreter, at tiny sizes, without peers that need a GPU.

It needs the repository, torch, triton, numpy and ml_dtypes. From a checkout where nothing is installed, with ``$OUT`` a
folder that is empty at first, and then again with the rows of earlier commands:

    mkdir -p build/site && ln -sfn ../.. build/site/castile && export PYTHONPATH=$PWD/build/site
    python benchmarks/gpu.py race --seconds 520 --results $OUT/gpu.jsonl
    cat $OUT/gpu.jsonl >> benchmarks/results/gpu.jsonl
    python benchmarks/gpu.py race --seconds 520 --results $OUT/gpu.jsonl --earlier benchmarks/results/gpu.jsonl

``correct`` mostly waits for compilers and the oracle, so that several processes may share it (times would suffer):

    for i in 1 2 3 4; do
      OMP_NUM_THREADS=4 python benchmarks/gpu.py correct --share $i/4 --results $OUT/gpu.jsonl &
    done; wait

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
from pathlib import Path
from typing import Any

import castile
from castile.benchmarks._gpu_check import compare, poison, sizes
from castile.benchmarks._gpu_races import Call, Race, races
from castile.benchmarks._gpu_run import Job, Options, Row, run_part
from castile.benchmarks._gpu_times import times_us
from castile.ir.device import DEVICES, device_of
from castile.ir.dtypes import DTYPES, numpy_dtype
from castile.ir.errors import CastileError
from castile.ir.extents import resolve, shape_of
from castile.ir.samples import integer_spans
from castile.passes.defaults import default_mapping
from castile.passes.defaults_gpu import need
from castile.passes.mapped import mapped

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples" / "cascades"
RESULTS = ROOT / "benchmarks" / "results" / "gpu.jsonl"

# Extents of the ranks of an example that are wide: what tiles divide, and what they do not.
EXTENTS = {"even": 256, "ragged": 257}
DRY_EXTENTS = {"even": 4, "ragged": 5}

# How far a peer's outputs may be from ours, as a part of their length, and calls timed before all peers are there.
ALIKE, FEW_CALLS = 0.03, 3


# Inputs


def tensors(c: castile.Cascade, extents: Mapping[str, int], seed: int, device: str) -> dict[str, Any]:
    """Fresh random inputs: floats of unit variance, integers that the cascade can take, scalars of one eighth or 2."""
    import torch

    generator = torch.Generator(device).manual_seed(seed)
    spans = integer_spans(c, extents)
    found: dict[str, Any] = {}
    for p in c.params:
        row, shape = DTYPES[p.dtype], shape_of(c, p.name, extents)
        kind = getattr(torch, str(numpy_dtype(p.dtype)))
        if not p.indices:
            found[p.name] = 0.125 if row.is_float else min([2, *(n for n in extents.values() if n)])
        elif row.is_float:
            wide = torch.float64 if p.dtype == "f64" else torch.float32
            found[p.name] = torch.randn(shape, generator=generator, device=device, dtype=wide).to(kind)
        elif p.dtype == "u32" and p.name not in spans:
            words = torch.randint(-(1 << 31), 1 << 31, shape, generator=generator, device=device)
            found[p.name] = words.to(torch.int32).view(kind)
        else:
            low, high = (0, 1) if row.kind == "bool" else spans.get(p.name, (0, 7))
            found[p.name] = torch.randint(low, high + 1, shape, generator=generator, device=device).to(kind)
    return found


# Correctness


def correct(options: Options) -> Iterator[tuple[str, Job]]:
    for kind, most in (DRY_EXTENTS if options.dry else EXTENTS).items():
        for path in sorted(EXAMPLES.glob("*.cascade")):
            yield f"{path.stem} {kind}", partial(correct_row, path, most, options)


def correct_row(path: Path, most: int, options: Options, row: Row) -> None:
    """One example: how far from the oracle, as a multiple of its bound. Raises `AssertionError` past it."""
    c = castile.load(path)
    extents = sizes(c, most)
    kernel = castile.compile(c, options.target, extents)
    row |= {"mapping": kernel.mapping.to_dict(), "extents": dict(extents)}
    inputs = tensors(c, extents, most, options.device)
    outs = kernel(**inputs)
    row["worst"] = checked_again(kernel, extents, inputs, outs, most)


def checked_again(kernel: Any, extents: Mapping[str, int], inputs: Mapping[str, Any], outs: Any, seed: int) -> float:
    """What `compare` finds when a kernel has written once more into outputs that were spoilt."""
    every = outs if isinstance(outs, tuple) else (outs,)
    for x in every:
        poison(x)
    kernel(**inputs, out=outs)
    return compare(kernel.cascade, extents, inputs, every, seed)


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
            row["absent"][name] = f"{type(error).__name__}: {error}"[:200]
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


def alike(ours: tuple[Any, ...], theirs: Any) -> None:
    """Raise `AssertionError` for a peer whose outputs differ by more than the rounding of 16-bit numbers explains."""
    others = theirs if isinstance(theirs, tuple | list) else (theirs,)
    if len(others) != len(ours):
        raise AssertionError(f"it gives {len(others)} outputs in place of {len(ours)}")
    for x, y in zip(ours, others, strict=True):
        if tuple(x.shape) != tuple(y.shape):
            raise AssertionError(f"its output is {list(y.shape)} in place of {list(x.shape)}")
        # By the first axis, as a copy in f32 of all may not fit.
        pairs = [(a.float(), b.float()) for a, b in zip(x, y, strict=True)] if x.ndim else [(x.float(), y.float())]
        apart = sum(float(((a - b) ** 2).sum()) for a, b in pairs)
        size = sum(float((a**2).sum()) for a, _ in pairs)
        if not apart <= ALIKE**2 * size:
            raise AssertionError(f"it computes something else: {(apart / size) ** 0.5 if size else apart:.3g} apart")


# Rows for a cost model


# The least tile that is tried.
LEAST_TILE = 16

# What a row of the profile changes of the default mapping.
CHANGES: tuple[Mapping[str, int], ...] = (
    {},
    {"warps": 8},
    {"warps": 4},
    {"stages": 2},
    {"stages": 3},
    {"stages": 4},
    {"persistent": 1},
    {"descriptors": 1},
    {"descriptors": 1, "persistent": 1},
    {"descriptors": 1, "specialize": 1},
    # With 8 warps Triton 3.6 shares nothing out.
    {"descriptors": 1, "specialize": 1, "warps": 4},
    {"swizzle": 1},
    {"heavy": 0},
    {"heavy": 2},
)


def profile(options: Options) -> Iterator[tuple[str, Job]]:
    for r in races():
        for change in CHANGES:
            label = ",".join(f"{k}={v}" for k, v in change.items()) or "default"
            yield f"{r.name} {label}", partial(profile_row, r, change, {}, options)
        if options.only in r.name or options.only.startswith(r.name):
            for rank, size in other_tiles(r, options):
                yield f"{r.name} tile {rank}={size}", partial(profile_row, r, {}, {rank: size}, options)


def other_tiles(r: Race, options: Options) -> list[tuple[str, int]]:
    """Tiles of half and of twice the default's size, as far as registers and shared memory hold the kernels."""
    extents = resolve(r.cascade, dict(r.tiny if options.dry else r.extents))
    mapping, device = default_mapping(r.cascade, options.target, extents), device_of(options.target)
    found = []
    for rank, size in mapping.tiles.items():
        for other in (size // 2, 2 * size):
            if LEAST_TILE <= other <= 2 * extents[rank]:
                changed = replace(mapping, tiles={**mapping.tiles, rank: other})
                if need(mapped(r.cascade, changed, extents).kernels, changed, device) <= 1:
                    found.append((rank, other))
    return found


def profile_row(r: Race, change: Mapping[str, int], tiles: Mapping[str, int], options: Options, row: Row) -> None:
    extents = resolve(r.cascade, dict(r.tiny if options.dry else r.extents))
    mapping = default_mapping(r.cascade, options.target, extents)
    mapping = replace(mapping, tiles={**mapping.tiles, **tiles}, knobs={**mapping.knobs, **change})
    kernel = castile.compile(r.cascade, options.target, extents, mapping)
    row |= {"key": r.cascade.key, "extents": dict(extents), "mapping": mapping.to_dict()}
    row["resources"] = {} if options.dry else kernel.resources.to_dict()
    inputs = r.prepare(tensors(r.cascade, extents, 0, options.device))
    outs = kernel(**inputs)
    times = times_us({"castile": partial(kernel, **inputs, out=outs)}, options.dry)["castile"]
    row |= {**times.summary(), "times_us": [round(t, 2) for t in times.device]}


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


PARTS = {"correct": correct, "race": race, "profile": profile, "machine": machine}


def present() -> str:
    """The target of the GPU that is here, its architecture's own or, failing a row for it, the nearest below."""
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


def main(words: list[str] | None = None) -> int:
    started = time.monotonic()
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--seconds", type=float, default=520.0, help="it ends after so long")
    parser.add_argument("--only", default="", help="names with this text in them")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where rows are appended")
    parser.add_argument("--earlier", type=Path, nargs="+", default=[], help="results whose rows are not made again")
    parser.add_argument("--share", type=share, default=(0, 1), help="1/3 is the first of three that run together")
    parser.add_argument("--dry", action="store_true", help="on the CPU, at tiny sizes")
    given = parser.parse_args(words)
    missing = [str(path) for path in given.earlier if not path.is_file()]
    if missing:
        parser.error(f"there is no file {', '.join(missing)}")
    try:
        target = "interpret" if given.dry else present()
    except CastileError as error:
        print(error, file=sys.stderr)
        return 2
    options = Options(
        target,
        given.seconds,
        given.only,
        given.results,
        given.dry,
        share=given.share,
        earlier=tuple(given.earlier),
        started=started,
    )
    return run_part(given.part, PARTS[given.part](options), options)


if __name__ == "__main__":
    sys.exit(main())
