"""How long a model's first call takes once it goes through torch.compile, with castile and with Inductor.

    python benchmarks/bench_model_start.py [NAME ...] [--tokens 128] [--dtype bf16] [--quick] [--json]

The models of `bench_models.py`, each call in a process of its own whose compiler caches are empty, castile and Inductor
in turn; the forward pass in eager comes before, so that what both load alike is not counted. Rows are appended to
`results/model_start.jsonl`. Exits 1 where castile takes more than half of Inductor's time; ``--quick`` takes one model
and writes no rows, whatever its time.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from castile.benchmarks import bench_models
from castile.benchmarks._cold import cold
from castile.benchmarks._machine import describe_device
from castile.benchmarks._rows import RESULTS, command_words, describe_versions

BACKENDS = ("castile", "inductor")
LIMIT = 0.5


def first_call(name: str, tokens: int, dtype: str, backend: str, report: str) -> None:
    """Write down the seconds of a model's first compiled forward pass, and of the second."""
    import numpy as np
    import torch

    model = bench_models.made(name, tokens).to(torch.float32 if dtype == "f32" else torch.bfloat16)
    inputs = bench_models.inputs(name, tokens, np.random.default_rng(0), model.dtype)
    run = torch.compile(model, backend=backend)
    seconds = []
    with torch.no_grad():
        model(**inputs)
        for _ in range(2):
            start = time.perf_counter()
            run(**inputs)
            seconds.append(time.perf_counter() - start)
    Path(report).write_text(json.dumps(seconds))


def row(name: str, tokens: int, dtype: str, processes: int) -> dict[str, Any]:
    """The median over some processes of what the first call takes beyond the second, for each backend."""
    found: dict[str, list[float]] = {backend: [] for backend in BACKENDS}
    with tempfile.TemporaryDirectory(prefix="castile-start-") as folder:
        report = Path(folder, "seconds.json")
        for _ in range(processes):
            for backend in BACKENDS:
                cold(first_call, name=name, tokens=tokens, dtype=dtype, backend=backend, report=str(report))
                first, second = json.loads(report.read_text())
                found[backend].append(first - second)
    seconds = {backend: round(statistics.median(times), 3) for backend, times in found.items()}
    return {
        "name": bench_models.title(name, tokens, dtype),
        **seconds,
        "ratio": round(seconds["castile"] / seconds["inductor"], 3),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=tuple(bench_models.MODELS), metavar="NAME", help="models to take")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--dtype", choices=("f32", "bf16"), default="f32")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="cold runs of each")
    parser.add_argument("--out", type=Path, default=RESULTS / "model_start.jsonl", metavar="FILE")
    parser.add_argument("--quick", action="store_true", help="the first model alone, whatever it takes; no rows")
    parser.add_argument("--json", action="store_true", help="rows as one JSON document on stdout")
    given = parser.parse_args(argv)
    told = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command_words(),
        "device": dataclasses.asdict(describe_device()),
        "versions": dataclasses.asdict(describe_versions()),
    }
    rows = []
    for name in given.names[:1] if given.quick else given.names:
        rows.append(row(name, given.tokens, given.dtype, given.processes))
        if not given.quick:
            with given.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(rows[-1] | told) + "\n")
        if not given.json:
            r = rows[-1]
            print(f"{r['name']:28} castile {r['castile']:6.1f} s  Inductor {r['inductor']:6.1f} s  {r['ratio']:.2f}")
    if given.json:
        print(json.dumps(rows, indent=1))
    return int(not given.quick and any(r["ratio"] > LIMIT for r in rows))


if __name__ == "__main__":
    sys.exit(main())
