"""Rows: what one measurement found, under which conditions, and whether it may be believed."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from castile.benchmarks._machine import Device, command_line
from castile.benchmarks._stats import Interval

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True, slots=True)
class Versions:
    """What ran: releases, the checkout's commit (with a `+` if files differ from it), the C compiler, the system."""

    python: str
    numpy: str
    torch: str | None
    castile: str
    compiler: str
    system: str


@dataclass(frozen=True, slots=True)
class Row:
    """One candidate of one case. Times are seconds per call; a ratio is baseline time / candidate time (> 1: faster).

    The baseline's own row holds the A/A control as its ratio. `samples_s` is in the order of the rounds, so ratios can
    be recomputed from a case's rows. A row whose `void` is not None must not be quoted.
    """

    id: str
    name: str
    candidate: str
    baseline: str
    seconds: Interval
    quartiles_s: tuple[float, float]
    ratio: Interval
    aa_ratio: Interval
    gflops: float
    gbytes_s: float
    void: str | None
    samples_s: tuple[float, ...]
    rounds_kept: int
    rounds_dropped: int
    calls_per_sample: int
    cache: str
    input_sets: int
    allocates: bool
    allocator: str
    threads: int
    peak_before_gflops: float
    peak_after_gflops: float
    peak_best_gflops: float
    probe: str
    others_cores: float | None
    load_average: float | None
    seed: int
    device: Device
    versions: Versions
    date: str
    command: str


def describe_versions() -> Versions:
    """Versions of what runs here. torch is asked for its version without being imported."""
    try:
        torch: str | None = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        torch = None
    git = ("git", "-C", str(ROOT))
    commit = command_line(*git, "rev-parse", "HEAD")
    changed = command_line(*git, "status", "--porcelain", "--", ".", ":!benchmarks/results")
    return Versions(
        python=platform.python_version(),
        numpy=np.__version__,
        torch=torch,
        castile=(commit or "unknown") + ("+" if changed else ""),
        compiler=command_line(os.environ.get("CC", "cc"), "--version"),
        system=f"{platform.system()} {platform.release()}",
    )


def command_words() -> str:
    """This process's command line, with the interpreter's and the checkout's own places left out."""
    words = (word.replace(f"{ROOT}{os.sep}", "") for word in sys.orig_argv[1:])
    return shlex.join(("python", *words))


def append_row(row: Row, path: Path) -> None:
    """Append one JSON line to `path` in a single write under a lock, so that concurrent runs never mix their lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = (json.dumps(asdict(row), allow_nan=False) + "\n").encode()
    with path.open("ab+", buffering=0) as file:
        if sys.platform != "win32":
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        end = file.seek(0, os.SEEK_END)
        if end:
            file.seek(end - 1)
            line = line if file.read(1) == b"\n" else b"\n" + line
        file.write(line)
        os.fsync(file.fileno())


def read_rows(path: Path) -> tuple[Mapping[str, object], ...]:
    """The rows of a results file. A later line replaces an earlier one of the same id; what is no row is skipped."""
    rows: dict[str, Mapping[str, object]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("id"), str):
            rows[row["id"]] = row
    return tuple(rows.values())


def known_peak_gflops(folder: Path, device: Device, threads: int, probe: str) -> float:
    """Highest peak, in GFLOP/s, that rows in `folder` hold of the same device, threads and probe; 0 if none."""
    wanted = json.loads(json.dumps({"device": asdict(device), "threads": threads, "probe": probe}))
    best = 0.0
    for path in sorted(folder.glob("*.jsonl")):
        for row in read_rows(path):
            if all(row.get(key) == value for key, value in wanted.items()):
                readings = (row.get("peak_before_gflops"), row.get("peak_after_gflops"))
                best = max(best, *(float(r) for r in readings if isinstance(r, float | int)))
    return best


def _time(seconds: float) -> str:
    """Seconds with three digits and a unit."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def table(rows: Sequence[Row]) -> str:
    """Rows as aligned text for people: numbers to the right, words to the left."""
    head = ("case", "candidate", "time", "±", "GFLOP/s", "GB/s", "ratio", "95%", "")
    body = [
        (
            row.name,
            row.candidate,
            _time(row.seconds.median),
            f"{50 * (row.seconds.high - row.seconds.low) / row.seconds.median:.1f}%",
            f"{row.gflops:.1f}",
            f"{row.gbytes_s:.1f}",
            "(A/A) " * (row.candidate == row.baseline) + f"{row.ratio.median:.3f}",
            f"{row.ratio.low:.3f}-{row.ratio.high:.3f}",
            f"VOID: {row.void}" if row.void else "",
        )
        for row in rows
    ]
    return aligned((head, *body), left=(0, 1, 8))


def aligned(lines: Iterable[Sequence[str]], left: Sequence[int]) -> str:
    """Cells in columns two spaces apart; columns named in `left` flush left, the rest flush right."""
    lines = tuple(lines)
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]

    def cell(i: int, text: str) -> str:
        return text.ljust(widths[i]) if i in left else text.rjust(widths[i])

    return "\n".join("  ".join(cell(i, text) for i, text in enumerate(line)).rstrip() for line in lines)
