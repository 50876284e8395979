"""castile on the GPU that is present, in parts of at most nine minutes each; run again, it goes on where it stopped.

    python benchmarks/gpu.py correct|race|profile|machine [--seconds 520] [--only TEXT] [--share 1/3] [--dry]

``correct``: every example against the float64 oracle, fresh inputs, outputs poisoned first. ``race``: ratios against
torch's attention (flash, cuDNN, efficient), compiled FlexAttention, cuBLAS, torch's softmax, Inductor, flash-attn and
gemlite, forward and backward, where these are present. ``profile``: rows for a cost model (cascade key, mapping,
resources, times). ``machine``: clocks idle and under load, driver, versions, measured
copy and GEMM ceilings. A peer whose outputs differ from ours is not raced. The L2 cache is flushed
before every call; times are medians of interleaved calls. It needs the repository, torch and triton. ``--dry`` runs the
same logic on the CPU, under Triton's interpreter, at tiny sizes, without peers that need a GPU.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import castile
from castile.benchmarks._gpu_races import Call, Race, races
from castile.benchmarks._gpu_run import Job, Options, Row, run_part
from castile.ir.bound import judge
from castile.ir.device import DEVICES, device_of
from castile.ir.dtypes import DTYPES, numpy_dtype
from castile.ir.errors import CastileError
from castile.ir.extents import bindings, resolve, shape_of
from castile.passes.defaults import default_mapping
from castile.passes.defaults_gpu import need
from castile.passes.mapped import mapped, nominal

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples" / "cascades"
RESULTS = ROOT / "benchmarks" / "results" / "gpu.jsonl"

# Outputs at which an example is compared with the oracle, and the extent of ranks that are not on chip.
SAMPLE, EXTENT = 200, 257

# Elements of inputs up to which a race's outputs are compared with the oracle; part `correct` covers the cascades.
MOST_CHECKED = 1 << 27

# How far a peer's outputs may be from ours, as a part of their length, and calls timed before all peers are there.
ALIKE, FEW_CALLS = 0.03, 3

# Bytes written between calls, more than any L2 cache.
FLUSH_BYTES = 1 << 28


# Inputs


def tensors(c: castile.Cascade, extents: Mapping[str, int], seed: int, device: str) -> dict[str, Any]:
    """Fresh random inputs: floats of unit variance, integers that may index any rank, scalars of one eighth or 2."""
    import torch

    generator = torch.Generator(device).manual_seed(seed)
    most = max(1, min((n for n in extents.values() if n > 0), default=1))
    found: dict[str, Any] = {}
    for p in c.params:
        row, shape = DTYPES[p.dtype], shape_of(c, p.name, extents)
        kind = getattr(torch, str(numpy_dtype(p.dtype)))
        if not p.indices:
            found[p.name] = 0.125 if row.is_float else min(2, most)
        elif row.is_float:
            wide = torch.float64 if p.dtype == "f64" else torch.float32
            found[p.name] = torch.randn(shape, generator=generator, device=device, dtype=wide).to(kind)
        else:
            high = 2 if row.kind == "bool" else max(1, min(most, 8))
            x = torch.randint(0, high, shape, generator=generator, device=device, dtype=torch.int32)
            found[p.name] = x.view(torch.uint32) if p.dtype == "u32" else x.to(kind)
    return found


def numbers(x: Any) -> Any:
    """A tensor as NumPy computes with it."""
    if not hasattr(x, "detach"):
        return x
    return x.detach().double().cpu().numpy() if x.is_floating_point() else x.detach().cpu().numpy()


# Correctness


def correct(options: Options) -> Iterator[tuple[str, Job]]:
    for path in sorted(EXAMPLES.glob("*.cascade")):
        yield path.stem, partial(correct_row, path, options)


def correct_row(path: Path, options: Options, row: Row) -> None:
    """One example: how far from the oracle, as a multiple of its bound. Raises `AssertionError` past it."""
    c = castile.load(path)
    extents = sizes(c, 5 if options.dry else EXTENT)
    kernel = castile.compile(c, options.target, extents)
    row |= {"mapping": kernel.mapping.to_dict(), "extents": dict(extents)}
    worst = 0.0
    for seed in range(2):
        inputs = tensors(c, extents, seed, options.device)
        outs = kernel(**inputs)
        outs = outs if isinstance(outs, tuple) else (outs,)
        for x in outs:
            poison(x)
        kernel(**inputs, out=outs if len(outs) > 1 else outs[0])
        worst = max(worst, compare(c, extents, inputs, outs, seed))
        row["worst"] = worst


def sizes(c: castile.Cascade, most: int) -> dict[str, int]:
    """Nominal extents cut to odd ones, or as they are where that contradicts the cascade."""
    known = {r: n if n <= 64 else most for r, n in nominal(c).items()}
    if most < 64:
        known = {r: min(n, most) for r, n in known.items()}
    try:
        return resolve(c, {b.rank: known[b.rank] for b in bindings(c) if b.param is not None})
    except CastileError:
        return nominal(c)


def poison(x: Any) -> None:
    """Fill a tensor with what no result is."""
    if x.is_floating_point():
        x.fill_(float("nan"))
    elif x.numel():
        x.fill_(True if str(x.dtype) == "torch.bool" else 77)


def compare(
    c: castile.Cascade, extents: Mapping[str, int], inputs: Mapping[str, Any], outs: tuple[Any, ...], seed: int
) -> float:
    """The greatest error at a sample of the outputs, as a multiple of the bound; `AssertionError` above 1."""
    arrays = {n: numbers(x) for n, x in inputs.items()}
    rng = np.random.default_rng(seed)
    worst = 0.0
    ranks = {r for name in c.outputs for r in _ranks(c, name)}
    if any(extents[r] == 0 for r in ranks):
        return worst
    at = {r: rng.integers(0, max(1, extents[r]), SAMPLE) for r in ranks}
    got = {}
    for name, x in zip(c.outputs, outs, strict=True):
        got[name] = numbers(x)[tuple(at[r] for r in _ranks(c, name))] if _ranks(c, name) else numbers(x)
    for judgement in judge(c, arrays, got, at if ranks else None):
        worst = max(worst, judgement.worst)
        if not judgement.ok:
            raise AssertionError(str(judgement))
    return worst


def _ranks(c: castile.Cascade, name: str) -> tuple[str, ...]:
    return next(o.ranks for e in c.einsums for o in e.outputs if o.name == name)


# Times


def times_us(calls: Mapping[str, Call], options: Options, repeats: int = 30) -> dict[str, list[float]]:
    """Microseconds of each call, interleaved, the L2 cache flushed before each."""
    import torch

    for call in calls.values():
        call()
    found: dict[str, list[float]] = {name: [] for name in calls}
    flush = torch.empty(1 if options.dry else FLUSH_BYTES, dtype=torch.uint8, device=options.device)
    for _ in range(2 if options.dry else repeats):
        for name, call in calls.items():
            flush.zero_()
            if options.dry:
                started = time.perf_counter()
                call()
                found[name].append(1e6 * (time.perf_counter() - started))
                continue
            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            # More to flush, so that the call is on its way before the device is free: its launch is not the kernel's.
            for _ in range(4):
                flush.zero_()
            first.record()
            call()
            last.record()
            torch.cuda.synchronize()
            found[name].append(1e3 * first.elapsed_time(last))
    return found


def summary(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    low, high = ordered[len(ordered) // 4], ordered[3 * len(ordered) // 4]
    return {"median_us": round(statistics.median(ordered), 2), "low_us": round(low, 2), "high_us": round(high, 2)}


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

    A peer that gives other numbers is left out. A few calls come first, so that a row which runs out of time has them.
    """
    extents = resolve(r.cascade, dict(r.tiny if options.dry else r.extents))
    kernel = castile.compile(r.cascade, options.target, extents)
    inputs = r.prepare(tensors(r.cascade, extents, 0, options.device))
    outs = kernel(**inputs)
    ours = outs if isinstance(outs, tuple) else (outs,)
    checked = sum(x.numel() for x in inputs.values() if hasattr(x, "numel")) <= MOST_CHECKED
    if checked:
        compare(r.cascade, extents, inputs, ours, 0)
    calls: dict[str, Call] = {"castile": partial(kernel, **inputs, out=outs)}
    row |= {"absent": {}, "checked": checked, "mapping": kernel.mapping.to_dict()}
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


def _timed(r: Race, calls: Mapping[str, Call], options: Options, row: Row, repeats: int = 30) -> None:
    """Times of calls put in a row, and what follows from them."""
    measured = {name: summary(values) for name, values in times_us(calls, options, repeats).items()}
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
    values = times_us({"castile": partial(kernel, **inputs, out=outs)}, options)["castile"]
    row |= {**summary(values), "times_us": [round(t, 2) for t in values]}


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
    measured = times_us({"gemm": partial(torch.matmul, a, b), "copy": partial(y.copy_, x)}, options)
    row["gemm_tflops"] = round(2.0 * size**3 / statistics.median(measured["gemm"]) / 1e6, 2)
    row["copy_tb_per_s"] = round(2.0 * x.numel() / statistics.median(measured["copy"]) / 1e6, 3)
    if not options.dry:
        row["device"] = torch.cuda.get_device_name()
        row["idle"] = _clocks()
        # A second or two of products wait in the queue while the clocks are read.
        for _ in range(int(2e6 / statistics.median(measured["gemm"]))):
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
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--seconds", type=float, default=520.0)
    parser.add_argument("--only", default="", help="names with this text in them")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--share", type=share, default=(0, 1), help="1/3 is the first of three that run together")
    parser.add_argument("--dry", action="store_true")
    given = parser.parse_args(words)
    try:
        target = "interpret" if given.dry else present()
    except CastileError as error:
        print(error, file=sys.stderr)
        return 2
    options = Options(target, given.seconds, given.only, given.results, given.dry, share=given.share)
    return run_part(given.part, PARTS[given.part](options), options)


if __name__ == "__main__":
    sys.exit(main())
