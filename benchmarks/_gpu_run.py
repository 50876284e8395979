"""How the parts of the GPU benchmark run: job after job within a time, a row for each, nothing done twice."""

from __future__ import annotations

import datetime
import gc
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# What a job fills: all that it has by the time it ends, or is ended.
Row = dict[str, Any]
Job = Callable[[Row], object]


@dataclass(frozen=True)
class Options:
    """How a run goes: ``target`` is the device's, "interpret" in a dry run.

    With ``share`` (i, n) it does every n-th job from the i-th on, so that n processes may go on together.
    """

    target: str
    seconds: float
    only: str
    results: Path
    dry: bool
    job_seconds: float = 150.0
    share: tuple[int, int] = (0, 1)

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    @property
    def at_hand(self) -> Path:
        """Where the name of the job at hand stands."""
        return self.results.with_suffix(".running" if self.share[1] == 1 else f".running{self.share[0]}")


def known(path: Path) -> set[tuple[str, str]]:
    """The part and name of every row that is there."""
    if not path.exists():
        return set()
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    return {(r["part"], r["name"]) for r in rows}


def run_part(part: str, jobs: Iterator[tuple[str, Job]], options: Options) -> int:
    """Do what no row is there for, until the time is up; 0 when nothing is left and nothing was wrong.

    The name of the job at hand stands in a file beside the results: one that took the process down, or that took too
    long, gets a row that says so, with what it had measured, and is not tried again.
    """
    options.results.parent.mkdir(parents=True, exist_ok=True)
    at_hand = options.at_hand
    bad = 0
    if at_hand.exists():
        died, name = json.loads(at_hand.read_text(encoding="utf-8"))
        bad += (died, name) not in known(options.results) and _keep(died, name, options, {"error": "the process died"})
        at_hand.unlink()
    done, started, left = known(options.results), time.monotonic(), 0
    mine, of = options.share
    for i, (name, job) in enumerate(jobs):
        if i % of != mine or (part, name) in done or options.only not in name:
            continue
        if time.monotonic() - started > options.seconds:
            left += 1
            continue
        at_hand.write_text(json.dumps([part, name]), encoding="utf-8")
        row: Row = {}
        watch = threading.Timer(options.job_seconds, _stop, (part, name, options, row))
        watch.daemon = True
        watch.start()
        try:
            job(row)
        except Exception as error:  # one failure must not cost the other rows
            row["error"] = f"{type(error).__name__}: {error}"[:2000]
        watch.cancel()
        bad += _keep(part, name, options, row)
        at_hand.unlink()
        if "error" in row and not _usable(options):
            print("the device is in no state to go on; run again", file=sys.stderr)
            return 1
        _release()
    if left:
        print(f"{left} left; run again to go on", file=sys.stderr)
    return 1 if bad or left else 0


def _keep(part: str, name: str, options: Options, found: Mapping[str, Any]) -> bool:
    """Print and append a row; whether it holds an error."""
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    text = json.dumps({"part": part, "name": name, "target": options.target, "date": date, **found}, sort_keys=True)
    print(text, flush=True)
    with options.results.open("a", encoding="utf-8") as file:
        file.write(text + "\n")
    return "error" in found


def _stop(part: str, name: str, options: Options, row: Row) -> None:
    """End the process: a kernel or a compiler that hangs cannot be told to stop. What was measured is kept."""
    _keep(part, name, options, {**dict(row), "error": f"it took more than {options.job_seconds:.0f} s"})
    options.at_hand.unlink(missing_ok=True)
    os._exit(1)


def _release() -> None:
    """Give back what the last job's tensors took: the next one may need all of the device."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _usable(options: Options) -> bool:
    """Whether the device still answers: after a fault in a kernel no call of the same process does."""
    import torch

    try:
        return options.dry or bool((torch.ones(2, device="cuda") + 1).sum().item() == 4)
    except Exception:
        return False
