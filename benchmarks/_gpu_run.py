"""How the parts of the GPU benchmark run: job after job within a time, a row for each, nothing done twice."""

from __future__ import annotations

import datetime
import faulthandler
import gc
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# What a job fills: all that it has by the time it ends, or is ended.
Row = dict[str, Any]
Job = Callable[[Row], object]


# Seconds after which a job that no thread of Python can end is ended all the same.
GRACE_S = 20.0

# What a process ends with when another one should do the jobs that are left, and seconds that make it worth its start.
GO_ON, START_S = 3, 15.0


@dataclass(frozen=True)
class Options:
    """How a run goes: ``target`` is the device's, "interpret" in a dry run.

    It ends ``seconds`` after ``started``, and a job after ``job_seconds``. What has a row in ``results`` or in one of
    ``earlier`` is done. With ``share`` (i, n) it does every n-th job from the i-th on, so that n processes may go on
    together.
    """

    target: str
    seconds: float
    only: str
    results: Path
    dry: bool
    job_seconds: float = 150.0
    share: tuple[int, int] = (0, 1)
    earlier: tuple[Path, ...] = ()
    started: float = field(default_factory=time.monotonic)

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    @property
    def at_hand(self) -> Path:
        """Where the name of the job at hand stands."""
        return self.beside(self.results)

    def beside(self, results: Path) -> Path:
        """Where a run that wrote these results left the name of its job at hand."""
        return results.with_suffix(".running" if self.share[1] == 1 else f".running{self.share[0]}")

    def left_s(self) -> float:
        """Seconds until the run ends."""
        return self.started + self.seconds - time.monotonic()


def known(*paths: Path) -> set[tuple[str, str]]:
    """The part and name of every finished row that is there."""
    texts = [path.read_text(encoding="utf-8") for path in paths if path.exists()]
    rows = [json.loads(line) for text in texts for line in text.splitlines() if line]
    return {(r["part"], r["name"]) for r in rows if not r.get("unfinished")}


def run_part(part: str, jobs: Iterator[tuple[str, Job]], options: Options) -> int:
    """Do what no row is there for, until the time is up; 0 when nothing is left and nothing was wrong.

    A job that takes too long gets a row that says so, with what it had measured, and is not tried again; neither is one
    that took the process down. One that was cut off as the run ended gets a row that is unfinished, and is tried again.
    """
    options.results.parent.mkdir(parents=True, exist_ok=True)
    done = known(*options.earlier, options.results)
    bad = _died(options, done)
    left = 0
    mine, of = options.share
    for i, (name, job) in enumerate(jobs):
        if i % of != mine or (part, name) in done or options.only not in name:
            continue
        if options.left_s() <= 0:
            left += 1
            continue
        row = _run(part, name, job, options)
        bad |= _keep(part, name, options, row)
        options.at_hand.unlink()
        if "error" in row and not usable(options):
            print("the device is in no state to go on; run again", file=sys.stderr)
            return GO_ON
        _release()
    if left:
        print(f"{left} left; run again to go on", file=sys.stderr)
    return 1 if bad or left else 0


def _died(options: Options, done: set[tuple[str, str]]) -> bool:
    """Write rows for jobs that took their process down, which then count as done; whether there was one.

    The name of the job at hand stands in a file beside the results. One that was given less than a job's time may have
    been cut off, and has another chance.
    """
    found = False
    for results in (*options.earlier, options.results):
        path = options.beside(results)
        if not path.exists():
            continue
        part, name, whole = json.loads(path.read_text(encoding="utf-8"))
        if whole and (part, name) not in done:
            found = _keep(part, name, options, {"error": "the process died"})
            done.add((part, name))
    options.at_hand.unlink(missing_ok=True)
    return found


def _run(part: str, name: str, job: Job, options: Options) -> Row:
    """The row of one job, which has its time or what is left of the run's."""
    limit = min(options.job_seconds, options.left_s())
    whole = limit >= options.job_seconds
    options.at_hand.write_text(json.dumps([part, name, whole]), encoding="utf-8")
    row: Row = {}
    watch = threading.Timer(limit, _stop, (part, name, options, row, whole))
    watch.daemon = True
    watch.start()
    # A call that never lets another thread of Python run is ended from outside of Python.
    faulthandler.dump_traceback_later(limit + GRACE_S, exit=True, file=sys.__stderr__)
    try:
        job(row)
    except Exception as error:  # one failure must not cost the other rows
        row["error"] = f"{type(error).__name__}: {error}"[:2000]
    watch.cancel()
    faulthandler.cancel_dump_traceback_later()
    return row


def _keep(part: str, name: str, options: Options, found: Mapping[str, Any]) -> bool:
    """Print and append a row; whether it holds an error."""
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    text = json.dumps({"part": part, "name": name, "target": options.target, "date": date, **found}, sort_keys=True)
    print(text, flush=True)
    with options.results.open("a", encoding="utf-8") as file:
        file.write(text + "\n")
    return "error" in found


def _stop(part: str, name: str, options: Options, row: Row, whole: bool) -> None:
    """End the process: a kernel or a compiler that hangs cannot be told to stop. What was measured is kept."""
    late = {"error": f"it took more than {options.job_seconds:.0f} s"} if whole else {"unfinished": True}
    _keep(part, name, options, {**dict(row), **late})
    options.at_hand.unlink(missing_ok=True)
    if not whole:
        print(f"the time is up, and {name} is unfinished; run again to go on", file=sys.stderr, flush=True)
    os._exit(GO_ON if whole else 1)


def supervise(command: Sequence[str], options: Options) -> int:
    """Run a command that does jobs, and once more whenever a job has taken its process down and time is left; 0 when
    nothing is left and nothing was wrong."""
    bad = False
    while options.left_s() > START_S:
        before = _text(options.at_hand)
        found = subprocess.run([*command, "--seconds", f"{options.left_s():.1f}"], check=False).returncode
        after = _text(options.at_hand)
        if found != GO_ON and after in ("", before):
            return found or int(bad)
        bad = True
        if after and options.left_s() > 0:
            # There was time left, so the job itself ended the process.
            options.at_hand.write_text(json.dumps([*json.loads(after)[:2], True]), encoding="utf-8")
    return 1


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _release() -> None:
    """Give back what the last job's tensors took: the next one may need all of the device."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def usable(options: Options) -> bool:
    """Whether the device still answers: after a fault in a kernel no call of the same process does."""
    import torch

    try:
        return options.dry or bool((torch.ones(2, device="cuda") + 1).sum().item() == 4)
    except Exception:
        return False
