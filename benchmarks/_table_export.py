"""Writing a table of kernels for those who learn from it: rows, T4 documents, datasheet, the model trained on them."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import castile
from castile.autotune.dataset import learned, row_of, shipped
from castile.autotune.exchange import t4
from castile.autotune.probe import describe_cpu, device_name
from castile.autotune.record import Record
from castile.benchmarks._table import Entry, State, Workload, cascade
from castile.costmodel.features import schema
from castile.costmodel.shipped import COLUMNS, device_to_dict
from castile.ir.key import content_key

# Rounds of samples; fewer for what the check found to be slower than the fastest by the factor.
ROUNDS, HOPELESS, HOPELESS_ROUNDS = 15, 12.0, 3

# Ensembles that ship are small ones: the files are to stay below 3 MB.
BAGS = 3

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
