"""A brute-forced table of castile's own CPU kernels, made in slices that resume where the last one ended.

    python benchmarks/make_table.py plan
    python benchmarks/make_table.py compile --seconds 200     # again, until nothing is left; beside other work
    python benchmarks/make_table.py check --seconds 200       # each kernel against the oracle; beside other work
    python benchmarks/make_table.py measure --seconds 110     # alone on the machine
    python benchmarks/make_table.py export costmodel/data

A workload is a cascade at some extents. Its mappings are drawn from the space that `castile tune` searches: the
default, what differs from it in one choice, and random ones. Mappings that print the same source count once; a source
that serves several extents is compiled once. All mappings of a workload are timed in turn, round after round in an
order that changes, so that what the machine does meanwhile meets all alike.

Compiling is what takes long: the header's parse, and the contraction kernels in it that each source makes anew. So the
header is precompiled, and sources share a compilation, a dozen at a time, from which each takes its library. That is
right only where inlining does not tell such a kernel from one compiled alone: `compare` times some of both in turn.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import gzip
import hashlib
import io
import json
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

for _name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

import numpy as np  # noqa: E402

import castile  # noqa: E402
from castile.autotune.dataset import learned, row_of, shipped  # noqa: E402
from castile.autotune.exchange import t4  # noqa: E402
from castile.autotune.measure import Limits, Measurer  # noqa: E402
from castile.autotune.probe import describe_cpu, device_name  # noqa: E402
from castile.autotune.record import Record  # noqa: E402
from castile.autotune.space import Space, space_of  # noqa: E402
from castile.codegen import build, targets  # noqa: E402
from castile.codegen.compiler import VARIANTS, Compiler, find_compiler, header_ahead, key_of, more_flags  # noqa: E402
from castile.codegen.cpp import FLAGS, INCLUDE, header, standalone  # noqa: E402
from castile.costmodel.features import schema  # noqa: E402
from castile.costmodel.shipped import COLUMNS, device_to_dict  # noqa: E402
from castile.ir.key import content_key  # noqa: E402
from castile.ir.mapping import Mapping as Tuned  # noqa: E402
from castile.passes.mapped import mapped  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
CASCADES = ROOT / "examples" / "cascades"

# Mappings of a workload.
MAPPINGS = 208

# Sources that share a compilation, and the cascades whose sources must not: their contraction kernels are specialised
# for the one place that calls them, and in a pack they run 1.2 times as long (`compare`; attention: 0.997).
PACK = 12
ALONE = ("gemm", "gemm_int4", "gemm_bias_gelu", "gemm_nt", "rmsnorm_gemm")

# Rounds of samples, and seconds that they may take for one workload; fewer rounds for what the check found to be slower
# than the fastest by the factor.
ROUNDS, ROUNDS_S, HOPELESS, HOPELESS_ROUNDS = 15, 25.0, 12.0, 3

# A workload is not believed where a tenth of its mappings have halves of their samples further apart than this.
STEADY = 0.25

# Ensembles that ship are small ones: the files are to stay below 3 MB.
BAGS = 3

Shapes = dict[str, int]

DATASHEET = """# Kernels that were measured

{rows} rows: {workloads} workloads (a cascade at some extents), each under some 200 mappings, on one device.
`benchmarks/make_table.py` makes them in slices that resume: what it plans and has not measured yet joins them
later.

| | |
|---|---|
| device | {device} |
| measured | {begun} to {ended} |
| castile | {castile} |
| compiler | {compiler} |
| Python, NumPy | {python}, {numpy} |

## Files

- `rows.csv.gz`: one row for each mapping: cascade, extents and mapping (JSON), how its check ended, the median
  time, the distance of its quartiles and the number of samples (seconds), the roofline (seconds), and the features
  that the cost model sees. `table.json` holds its SHA-256, the device, the versions and the text of each cascade.
  Where pyarrow is installed, the export writes `rows.parquet` too; it is not shipped, since castile does not depend
  on pyarrow.
- `t4/`: the same for each workload in the T4 format, with every sample; `castile replay` reads them.
- `model/`: the cost model trained on all rows (`castile costmodel info`), its trees as arrays with a checksum.

## How it was measured

Mappings are drawn from the space that `castile tune` searches: the default, all that differ from it in one choice,
and random ones, each generated source once. Each kernel ran against the float64 oracle within the derived error
bound, on outputs between guarded pages, before it was timed. Then all mappings of a workload were timed in one
process in turn, {rounds} rounds in an order that changes, with nothing else running on the machine; those slower
than the fastest by {hopeless} times only {few} rounds. A sample is at least 0.2 ms. Inputs and outputs are those of
the round before, so what fits the last cache is there. Two threads on a virtual machine of two cores.

Kernels without contractions, and attention, were compiled a dozen to a translation unit; the former are the same
instructions as compiled alone, the latter run 0.997 times as long (80% of them 0.979 to 1.019). All others were
compiled alone.

*Noise* is how far the medians of the odd and the even samples of one mapping are apart.

## Workloads

{table}
"""


def _attention(*rows: tuple[int, int, int, int]) -> tuple[Shapes, ...]:
    return tuple({"b": 1, "h": h, "q": q, "k": k, "d": d, "f": d} for h, q, k, d in rows)


def _two(*rows: tuple[int, int]) -> tuple[Shapes, ...]:
    return tuple({"n": n, "k": k} for n, k in rows)


def _three(*rows: tuple[int, int, int]) -> tuple[Shapes, ...]:
    return tuple({"m": m, "n": n, "k": k} for m, n, k in rows)


# The cascades, each at several extents.
WORKLOADS: Mapping[str, tuple[Shapes, ...]] = {
    "gemm": _three((512, 512, 512), (64, 1024, 1024), (16, 2048, 1024), (1024, 384, 768)),
    "softmax": _two((1024, 1024), (4096, 320), (256, 8192), (48, 40000)),
    "attention": _attention((8, 512, 512, 64), (4, 1024, 1024, 64), (4, 256, 256, 128), (8, 96, 1500, 64)),
    "layernorm": _two((1024, 1024), (4096, 320), (256, 8192), (48, 40000)),
    "gemm_int4": _three((16, 1024, 1024), (128, 1024, 512), (1, 4096, 2048), (512, 512, 512)),
    "attention_causal": _attention((8, 512, 512, 64), (4, 1024, 1024, 64), (4, 256, 256, 128), (8, 640, 640, 80)),
    "rmsnorm": _two((1024, 1024), (4096, 320), (256, 8192), (48, 40000)),
    "gemm_bias_gelu": _three((512, 512, 512), (64, 1024, 1024), (16, 2048, 1024), (1024, 384, 768)),
    "softmax_backward": _two((1024, 1024), (4096, 320), (256, 8192), (48, 40000)),
    "log_softmax": _two((1024, 1024), (4096, 320), (256, 8192), (48, 40000)),
    "rmsnorm_gemm": _three((512, 512, 512), (64, 1024, 1024), (16, 2048, 1024)),
    "attention_gqa": _attention((8, 512, 512, 64), (16, 128, 1024, 64), (4, 256, 256, 128)),
    "gemm_nt": _three((512, 512, 512), (64, 1024, 1024), (16, 2048, 1024)),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Entry:
    """One mapping of a workload, and the hash of the source that it prints."""

    mapping: Tuned
    source: str


@dataclass(frozen=True, slots=True)
class Workload:
    """A cascade at some extents with the mappings to measure, the default first."""

    name: str
    shapes: Shapes
    entries: tuple[Entry, ...]

    @property
    def key(self) -> str:
        return " ".join([self.name, *(f"{r}={n}" for r, n in self.shapes.items())])


class State:
    """The folder that holds what was planned, built, checked and measured: lines of JSON, only ever appended."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def append(self, what: str, row: Mapping[str, Any]) -> None:
        with (self.folder / f"{what}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def rows(self, what: str) -> Iterator[dict[str, Any]]:
        path = self.folder / f"{what}.jsonl"
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                yield json.loads(line)

    def workloads(self) -> list[Workload]:
        """What was planned: the first extents of every cascade, then the second, …"""
        found = []
        for row in self.rows("plan"):
            entries = tuple(Entry(Tuned.from_json(m), s) for m, s in row["entries"])
            found.append((row["place"], Workload(row["name"], row["shapes"], entries)))
        return [w for _, w in sorted(found, key=lambda pair: pair[0])]

    def cache(self, name: str) -> Path:
        """The build cache of a cascade: small folders are quick to look things up in."""
        path = self.folder / "cache" / name
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        return path


@cache
def cascade(name: str) -> castile.Cascade:
    return castile.load(CASCADES / f"{name}.cascade")


def printed(name: str, mapping: Tuned, shapes: Shapes) -> str:
    """The source of a mapping, without the header."""
    return targets.print_source(mapped(cascade(name), mapping, shapes).program, mapping, "cpu")


def digest(source: str) -> str:
    return hashlib.sha256(source.encode()).hexdigest()[:24]


# Plan


def plan(state: State, count: int) -> None:
    """Draw the mappings of every workload that has none yet."""
    known = {w.key for w in state.workloads()}
    device = describe_cpu()
    for place, (name, shapes) in enumerate(WORKLOADS.items()):
        chosen: dict[str, Tuned] = {}  # a mapping that serves several extents is taken for all of them
        for turn, extents in enumerate(shapes):
            drawn = _drawn(name, extents, space_of(cascade(name), extents, "cpu", device), count, chosen)
            w = Workload(name, extents, tuple(drawn))
            if w.key not in known:
                entries = [[e.mapping.to_dict(), e.source] for e in drawn]
                state.append("plan", {"place": [turn, place], "name": name, "shapes": extents, "entries": entries})
            print(f"{w.key}: {len(drawn)} mappings", flush=True)


def _drawn(name: str, extents: Shapes, space: Space, count: int, chosen: dict[str, Tuned]) -> list[Entry]:
    """The default, its neighbours, mappings that other extents have too, and random ones; each source once."""
    combinations = space.combinations()
    every = [space.mapping(*one) for one in combinations]
    usual = space.usual
    near = [
        m
        for m, (form, values) in zip(every, combinations, strict=True)
        if (form != 0) + sum(a != b for a, b in zip(values, usual, strict=True)) == 1
    ]
    shared = [m for m in chosen.values() if _belongs(m, space)]
    rng = np.random.default_rng(0)
    others = [every[i] for i in rng.permutation(len(every))]
    found: dict[str, Tuned] = {}
    for m in (every[0], *near, *shared, *others):
        found.setdefault(digest(printed(name, m, extents)), m)
        if len(found) >= count:
            break
    chosen.update({m.to_json(): m for m in found.values()})
    return [Entry(m, s) for s, m in found.items()]


def _belongs(m: Tuned, space: Space) -> bool:
    """Whether a space has a mapping."""
    parts = {"tiles": m.tiles, "splits": m.splits, "knobs": m.knobs}
    values = tuple(int(parts[c.part].get(c.name, c.default)) for c in space.choices)
    if (m.form, m.gauge) not in space.forms or any(
        v not in c.values for v, c in zip(values, space.choices, strict=True)
    ):
        return False
    form = space.forms.index((m.form, m.gauge))
    return space.mapping(form, values) == m and space.fits(form, values)


# Compile


def compile_all(state: State, seconds: float) -> int:
    """Build what was planned for some seconds; how many sources are left."""
    end, left = time.monotonic() + seconds, 0
    compiler = find_compiler()
    done = {row["source"] for row in state.rows("built")}
    with tempfile.TemporaryDirectory() as folder:
        place = _precompiled(compiler, Path(folder))
        for w in state.workloads():
            todo = [e for e in w.entries if e.source not in done]
            size = 1 if w.name in ALONE else PACK
            for start in range(0, len(todo), size):
                part = todo[start : start + size]
                if time.monotonic() > end:
                    left += len(part)
                    continue
                began = time.monotonic()
                sources = [printed(w.name, e.mapping, w.shapes) for e in part]
                if any(digest(source) != e.source for source, e in zip(sources, part, strict=True)):
                    sys.exit("castile prints another source than was planned: begin anew, in another --state")
                libraries = _packed(compiler, place, sources)
                took = round((time.monotonic() - began) / len(part), 3)
                for e, source, library in zip(part, sources, libraries, strict=True):
                    if library is not None:
                        build._keep(state.cache(w.name), key_of(standalone(source), compiler), library)
                    done.add(e.source)
                    state.append("built", {"source": e.source, "failed": library is None, "seconds": took})
    print(f"{len(done)} sources built, {left} mappings left")
    return left


def _command(compiler: Compiler) -> list[str]:
    return [*compiler.command, *FLAGS, *VARIANTS[0], *more_flags(), "-shared", "-fPIC"]


def _precompiled(compiler: Compiler, folder: Path) -> Path:
    """A folder with the header and, where the compiler can, its precompiled form."""
    (folder / "tile.h").write_text(header(), encoding="utf-8")
    ahead = header_ahead(compiler)
    if ahead is not None:
        (folder / "tile.h.gch").write_bytes(ahead)
    return folder


def _alone(compiler: Compiler, folder: Path, source: str) -> bytes | None:
    """The library of one source, as castile builds it."""
    (folder / "kernel.cpp").write_text(source, encoding="utf-8")
    command = [*_command(compiler), "kernel.cpp", "-o", "kernel.so"]
    done = subprocess.run(command, cwd=folder, capture_output=True, check=False, timeout=300)
    return (folder / "kernel.so").read_bytes() if done.returncode == 0 else None


def _packed(compiler: Compiler, folder: Path, sources: list[str]) -> list[bytes | None]:
    """The libraries of sources that are compiled as one: each exports the entries of its own."""
    if len(sources) == 1:
        return [_alone(compiler, folder, sources[0])]
    renamed = [re.sub(r"\bcastile_(\w+)", rf"castile_{i}_\1", s.replace(INCLUDE, "")) for i, s in enumerate(sources)]
    (folder / "pack.cpp").write_text("\n".join([INCLUDE, *renamed]), encoding="utf-8")
    command = [*_command(compiler), "-ffunction-sections", "-c", "pack.cpp", "-o", "pack.o"]
    if subprocess.run(command, cwd=folder, capture_output=True, check=False, timeout=600).returncode:
        return [_alone(compiler, folder, source) for source in sources]
    return [
        _linked(compiler, folder, i, source) or _alone(compiler, folder, source) for i, source in enumerate(sources)
    ]


def _linked(compiler: Compiler, folder: Path, place: int, source: str) -> bytes | None:
    """The library of one of the sources of a pack."""
    entries = re.findall(r'extern "C"\s+\w+ castile_(\w+)\(', source)
    (folder / "exports").write_text("{ global: " + "".join(f"castile_{e}; " for e in entries) + "local: *; };")
    words = ["--version-script=exports", "--gc-sections"]
    words += [f"--defsym=castile_{e}=castile_{place}_{e}" for e in entries]
    command = [*_command(compiler), "pack.o", "-o", "linked.so", *(f"-Wl,{word}" for word in words)]
    done = subprocess.run(command, cwd=folder, capture_output=True, check=False, timeout=300)
    return (folder / "linked.so").read_bytes() if done.returncode == 0 and entries else None


# Check and measure


def _measurer(w: Workload, threads: int | None) -> Measurer:
    return Measurer(cascade(w.name), w.shapes, "cpu", 0, Limits(run_s=60.0), threads=threads)


def check_all(state: State, seconds: float) -> int:
    """Check every built kernel against the oracle for some seconds; how many are left."""
    end, left = time.monotonic() + seconds, 0
    built = {row["source"]: row["failed"] for row in state.rows("built")}
    checked = {(row["key"], row["source"]) for row in state.rows("checked")}
    for w in state.workloads():
        todo = [e for e in w.entries if e.source in built and (w.key, e.source) not in checked]
        if not todo:
            continue
        if time.monotonic() > end:
            left += len(todo)
            continue
        os.environ["CASTILE_CACHE_DIR"] = str(state.cache(w.name))
        with _measurer(w, 1) as bench:
            for e in todo:
                if time.monotonic() > end:
                    left += 1
                    continue
                began = time.monotonic()
                if built[e.source]:
                    status, detail = "compile_error", "the compiler refuses it"
                else:
                    outcome = bench.check(e.mapping)
                    status, detail = outcome.status, outcome.detail[:300]
                took = round(time.monotonic() - began, 4)
                state.append(
                    "checked",
                    {"key": w.key, "source": e.source, "status": status, "detail": detail, "seconds": took},
                )
    print(f"{left} left to check")
    return left


def measure_all(state: State, seconds: float) -> int:
    """Time workloads whose mappings are all checked, for some seconds; how many workloads are left."""
    end, left = time.monotonic() + seconds, 0
    checks = {(row["key"], row["source"]): row for row in state.rows("checked")}
    measured = {row["key"] for row in state.rows("measured")}
    for w in state.workloads():
        if w.key in measured or any((w.key, e.source) not in checks for e in w.entries):
            left += w.key not in measured
            continue
        if time.monotonic() + 12 > end:
            left += 1
            continue
        good = [e for e in w.entries if checks[w.key, e.source]["status"] == "ok"]
        os.environ["CASTILE_CACHE_DIR"] = str(state.cache(w.name))
        began = time.monotonic()
        with _measurer(w, None) as bench:
            times = _timed(bench, w, good, min(ROUNDS_S, end - began))
        if times is None:
            print(f"{w.key}: the worker died")
            continue
        noise = float(np.quantile(apart(times.values()), 0.9))
        if noise > STEADY:
            print(f"{w.key}: disturbed, {noise:.0%} between halves of the samples; it is measured again")
            left += 1
            continue
        row = {
            "key": w.key,
            "times": {s: [float(f"{t:.5g}") for t in samples] for s, samples in times.items()},
            "at": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - began, 2),
            "versions": _versions(),
        }
        state.append("measured", row)
        best = min(times, key=lambda s: median(times[s]))
        usual = median(times[w.entries[0].source])
        print(
            f"{w.key}: {len(times)} timed in {row['seconds']} s; best {median(times[best]) * 1e6:.0f} us, "
            f"default {usual / median(times[best]):.3f}x that",
            flush=True,
        )
    print(f"{left} workloads left to measure")
    return left


def compare(state: State, names: list[str], count: int) -> None:
    """Time kernels that were compiled in packs beside the same compiled alone, in turn."""
    from castile.autotune.worker import Workload as Timed
    from castile.autotune.worker import built, calls, once

    compiler = find_compiler()
    done = {row["source"] for row in state.rows("built")}
    for w in [w for w in state.workloads() if w.name in names]:
        entries = [e for e in w.entries if e.source in done][:count]
        timed = Timed(cascade(w.name), w.shapes, "cpu", built, 0)
        outputs, pairs = timed.outputs(trap=False), []
        with tempfile.TemporaryDirectory() as folder:
            place, alone = _precompiled(compiler, Path(folder)), Path(folder) / "alone"
            alone.mkdir(mode=0o700)
            for e in entries:
                source = printed(w.name, e.mapping, w.shapes)
                library = _alone(compiler, place, source)
                if library is None:
                    continue
                build._keep(alone, key_of(standalone(source), compiler), library)
                kernels = []
                for cached in (state.cache(w.name), alone):
                    os.environ["CASTILE_CACHE_DIR"] = str(cached)
                    kernels.append(built(cascade(w.name), e.mapping, w.shapes, "cpu"))
                pairs.append(kernels)
        ratios = []
        for kernels in pairs:
            counts = [calls(timed, k, outputs) for k in kernels]
            rounds = [[once(timed, k, outputs, n) for k, n in zip(kernels, counts, strict=True)] for _ in range(15)]
            ratios.append(median(a for a, _ in rounds) / median(b for _, b in rounds))
        if ratios:
            low, middle, high = np.quantile(ratios, [0.1, 0.5, 0.9])
            print(
                f"{w.key}: packed over alone, {len(ratios)} kernels: {middle:.3f} (10 to 90%: {low:.3f} to {high:.3f})"
            )


def _timed(bench: Measurer, w: Workload, entries: list[Entry], seconds: float) -> dict[str, tuple[float, ...]] | None:
    """Samples of each source: two rounds of all, then more of those that are not far behind."""
    first = bench.compete([e.mapping for e in entries], seconds, 2)
    if first is None:
        return None
    found = {e.source: t for e, t in zip(entries, first, strict=True)}
    fastest = min(min(t) for t in first)
    near = [e for e in entries if min(found[e.source]) < HOPELESS * fastest]
    far = [e for e in entries if min(found[e.source]) >= HOPELESS * fastest]
    for group, rounds in ((near, ROUNDS), (far, HOPELESS_ROUNDS - 2)):
        more = bench.compete([e.mapping for e in group], seconds, rounds) if group else []
        if more is None:
            return None
        for e, t in zip(group, more, strict=True):
            # The first rounds met cold pages; where there are enough others, they are left out.
            found[e.source] = t if len(t) >= 5 else (*found[e.source], *t)
    return found


# Export


def export(state: State, folder: Path) -> None:
    """Write what was measured: a table of rows, T4 for each workload, and what tells of them."""
    checks = {(row["key"], row["source"]): row for row in state.rows("checked")}
    measured = {row["key"]: row for row in state.rows("measured")}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "t4").mkdir(exist_ok=True)
    device, rows, about = describe_cpu(), [], []
    for w in state.workloads():
        if w.key not in measured:
            continue
        c, found = cascade(w.name), measured[w.key]
        records = [_record(w, e, checks[w.key, e.source], found) for e in w.entries]
        rows += [_row(w, c, r, device) for r in records]
        name = re.sub(r"[^a-z0-9]+", "-", w.key)
        document = {**t4(records), "metadata": {**t4(records[:1])["metadata"], "cascade": str(c)}}
        _write(folder / "t4" / f"{name}.json.gz", json.dumps(document, separators=(",", ":")).encode())
        about.append(_about(w, records, found))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(rows)
    _write(folder / "rows.csv.gz", text.getvalue().encode())
    versions = next(iter(measured.values()))["versions"]
    table = {
        "schema": schema(),
        "sha256": hashlib.sha256((folder / "rows.csv.gz").read_bytes()).hexdigest(),
        "device": device_to_dict(device),
        "versions": versions,
        "at": [min(m["at"] for m in measured.values()), max(m["at"] for m in measured.values())],
        "cascades": {name: str(cascade(name)) for name in dict.fromkeys(a["cascade"] for a in about)},
        "workloads": about,
    }
    (folder / "table.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(_datasheet(table, len(rows)), encoding="utf-8")
    data = shipped(folder)
    learned(data, bags=BAGS).save(folder / "model")
    print(f"{len(rows)} rows of {len(about)} workloads in {folder}")
    _parquet(folder, text.getvalue())


def _record(w: Workload, e: Entry, check: Mapping[str, Any], found: Mapping[str, Any]) -> Record:
    times = tuple(found["times"].get(e.source, ()))
    return Record(
        str(cascade(w.name)),
        "cpu",
        device_name(),
        w.shapes,
        e.mapping,
        check["status"] if times or check["status"] != "ok" else "crash",
        check["detail"],
        median(times) if times else None,
        times,
        versions=found["versions"],
        at=found["at"],
        key=content_key(cascade(w.name)),
        name=w.name,
        ranks=tuple(cascade(w.name).ranks),
    )


def _row(w: Workload, c: castile.Cascade, r: Record, device: Any) -> list[Any]:
    row, roofline = row_of(c, r.mapping, w.shapes, device)
    spread = float(np.subtract(*np.quantile(r.times, [0.75, 0.25]))) if r.times else ""
    return [
        w.name,
        json.dumps(w.shapes),
        r.mapping.to_json(),
        r.status,
        f"{r.time_s:.5g}" if r.time_s else "",
        f"{spread:.3g}" if r.times else "",
        len(r.times),
        f"{roofline:.5g}",
        *(f"{x:.6g}" for x in row),
    ]


def _about(w: Workload, records: list[Record], found: Mapping[str, Any]) -> dict[str, Any]:
    """A line of the datasheet: how many, how fast, and how far two halves of the samples are apart."""
    good = [r for r in records if r.time_s]
    noise = apart(r.times for r in good)
    best = min(r.time_s or math.inf for r in good)
    return {
        "cascade": w.name,
        "shapes": w.shapes,
        "mappings": len(records),
        "failed": len(records) - len(good),
        "best_s": best,
        "default_over_best": (records[0].time_s or math.inf) / best,
        "noise_median": round(float(np.median(noise)), 4),
        "noise_90": round(float(np.quantile(noise, 0.9)), 4),
        "at": found["at"],
    }


def _datasheet(table: Mapping[str, Any], rows: int) -> str:
    """What the files are, how they were made, and a line for each workload."""
    versions, device, about = table["versions"], table["device"], table["workloads"]
    lines = [
        "| cascade | extents | mappings | failed | best | default over best | noise (median, 90%) |",
        "|---|---|---|---|---|---|---|",
    ]
    for a in about:
        shapes = " ".join(f"{r}={n}" for r, n in a["shapes"].items())
        lines.append(
            f"| {a['cascade']} | {shapes} | {a['mappings']} | {a['failed']} | {a['best_s'] * 1e6:.0f} µs "
            f"| {a['default_over_best']:.3f} | {a['noise_median']:.1%}, {a['noise_90']:.1%} |"
        )
    return DATASHEET.format(
        rows=rows,
        workloads=len(about),
        device=device["name"],
        begun=table["at"][0],
        ended=table["at"][1],
        compiler=versions["compiler"],
        python=versions["python"],
        numpy=versions["numpy"],
        castile=f"{versions['castile']} ({versions['commit']})",
        rounds=ROUNDS,
        hopeless=f"{HOPELESS:g}",
        few=HOPELESS_ROUNDS,
        table="\n".join(lines),
    )


def apart(samples: Iterable[Sequence[float]]) -> list[float]:
    """For each mapping that was timed often enough, how far the medians of odd and even samples are apart."""
    return [abs(median(t[::2]) / median(t[1::2]) - 1) for t in samples if len(t) >= 4]


def _write(path: Path, data: bytes) -> None:
    """A gzip file whose bytes say nothing of when it was written."""
    path.write_bytes(gzip.compress(data, 9, mtime=0))


def _parquet(folder: Path, text: str) -> None:
    """The same rows as Parquet, where pyarrow is installed; castile itself does not need it."""
    try:
        from pyarrow import csv as arrow
        from pyarrow import parquet
    except ImportError:
        print("no pyarrow: rows.parquet is not written")
        return
    parquet.write_table(arrow.read_csv(io.BytesIO(text.encode())), folder / "rows.parquet", compression="zstd")


def _versions() -> dict[str, str]:
    from castile.autotune.tuner import versions

    done = subprocess.run(["c++", "--version"], capture_output=True, text=True, check=False)
    commit = os.environ.get("CASTILE_COMMIT", "")
    return {**versions(), "compiler": done.stdout.split("\n")[0][:120], "commit": commit, "system": platform.system()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("step", choices=("plan", "compile", "check", "measure", "export", "compare"))
    parser.add_argument("folder", nargs="?", type=Path, help="where export writes")
    parser.add_argument("--state", type=Path, default=ROOT / "build" / "table")
    parser.add_argument("--seconds", type=float, default=110.0, help="how long a slice may take, about")
    parser.add_argument("--only", default="gemm,attention", help="cascades to compare")
    parser.add_argument("--mappings", type=int, default=MAPPINGS)
    given = parser.parse_args()
    state = State(given.state)
    if given.step == "plan":
        plan(state, given.mappings)
    elif given.step == "compile":
        compile_all(state, given.seconds)
    elif given.step == "check":
        check_all(state, given.seconds)
    elif given.step == "export":
        export(state, given.folder or ROOT / "costmodel" / "data")
    elif given.step == "compare":
        compare(state, given.only.split(","), 16)
    elif given.step == "measure":
        measure_all(state, given.seconds)


if __name__ == "__main__":
    main()
