"""`castile tune`: find the fastest mapping of a cascade on this machine, and record it."""

from __future__ import annotations

import os
import re
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .terminal import File, Json, More, Shape, emit, err, extents, fail, note, of_file, out, read_cascade, sorted_out

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ..autotune.tuner import Progress, TuneResult
    from ..ir.cascade import Cascade

# How many mappings of a shortlist are printed.
SHORT = 8

_UNITS = {"": 1.0, "s": 1.0, "sec": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}


def tune(
    what: File,
    more: More = None,
    shape: Shape = None,
    target: Annotated[
        str,
        typer.Option(
            "--target", metavar="T", help="What to tune for: cpu; with --offline a GPU: cuda:90, hip:gfx942, …"
        ),
    ] = "cpu",
    offline: Annotated[
        bool, typer.Option("--offline", help="Compile for a GPU that is not here, and rank what fits it.")
    ] = False,
    budget: Annotated[str, typer.Option("--budget", metavar="TIME", help="Time to spend, such as 60s or 5m.")] = "60s",
    trials: Annotated[
        int | None, typer.Option("--trials", min=1, help="At most so many mappings.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the search and of the inputs.")] = 0,
    w: Annotated[str, typer.Option("--w", metavar="FORMAT", help="Format of gemm's weights: int4.")] = "",
    group: Annotated[int, typer.Option("--group", help="Values that share a scale, with --w int4.")] = 128,
    records: Annotated[
        Path | None, typer.Option("--records", help="The file of records; else the user's.", show_default=False)
    ] = None,
    json: Json = False,
) -> None:
    """Search the mappings of a cascade, each checked against the oracle, and record the fastest.

    For example: castile tune attention --shape q=4096 --budget 60s. Extents that are not given are the usual ones.
    """
    # The search's matrices are small, and kernels are measured elsewhere. This must stand before NumPy is loaded.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    began = monotonic()
    from ..autotune.presets import PRESETS, preset
    from ..autotune.tuner import tune as run

    what, words = sorted_out(what, more)
    seconds = duration(budget)
    named = what in PRESETS and not os.path.isfile(what)
    c, like = preset(what, w, group) if named else (read_cascade(what), {})
    if w and not named:
        fail("--w is for gemm", "castile tune gemm --w int4 --group 128")
    given = extents([*(shape or ()), *words])
    with of_file(what):
        shapes = complete(c, given, dict(like))
    if offline:
        with of_file(what):
            _offline(c, shapes, target, max(1.0, seconds - (monotonic() - began)), trials, seed, json)
        return
    with of_file(what), _Display(c, seconds, quiet=json) as display:
        left = max(1.0, seconds - (monotonic() - began))  # loading and deriving count
        try:
            result = run(c, shapes, target, left, trials, seed, path=records, progress=display.show)
        except KeyboardInterrupt:
            display.stopped()
            raise
    if json:
        emit(document(c, shapes, result))
    else:
        _print(c, shapes, result)


def _offline(
    c: Cascade, shapes: dict[str, int], target: str, seconds: float, trials: int | None, seed: int, json: bool
) -> None:
    """The shortlist for a GPU that is not here."""
    from rich.progress import Progress
    from rich.table import Table

    from ..autotune.offline import shortlist
    from ..autotune.report import spelled

    with Progress(console=err(), transient=True, disable=json) as bar:
        task = bar.add_task(f"compiling {c.name} for {target}", total=None)

        def show(done: int, of: int) -> None:
            bar.update(task, completed=done, total=of)

        found = shortlist(c, shapes, target, seconds, trials, seed, show)
    best = found.candidates[:SHORT]
    if json:
        rows = [
            {"mapping": s.mapping.to_dict(), "estimate_s": s.estimate_s, "foreseen_registers": round(s.foreseen, 1)}
            | {**s.resources}
            for s in best
        ]
        told = {"target": target, "device": found.device, "compiled": found.compiled, "space": found.space}
        told["register_error"] = round(found.register_error, 4)
        emit(
            {"cascade": c.name, "shapes": shapes, **told, "rejected": dict(found.rejected), "seconds": found.seconds}
            | {"shortlist": rows}
        )
        return
    table = Table(title=f"{c.name} for {found.device}  {'  '.join(f'{k}={v}' for k, v in shapes.items())}")
    for head in ("estimate", "shared", "registers", "foreseen", "spills", "occupancy", "mapping"):
        table.add_column(head)
    for s in best:
        r = s.resources
        registers = str(r["registers"]), f"{s.foreseen:.0f}"
        numbers = (f"{r['shared_bytes']} B", *registers, f"{r['spill_bytes']} B", f"{r['occupancy']:.0%}")
        table.add_row(spelled(s.estimate_s), *numbers, str(s.mapping))
    out().print(table)
    rejected = "; ".join(f"{n} rejected: {what}" for what, n in found.rejected.items())
    out().print(f"{found.compiled} of {found.space} mappings compiled in {found.seconds:.1f} s. {rejected}".strip())
    out().print(f"registers were foreseen before compiling with a median error of {found.register_error:.0%}")
    out().print("estimates are by the roofline and the occupancy; nothing was measured")


def duration(text: str) -> float:
    """Seconds from ``60``, ``60s``, ``5m`` or ``1h``."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    if not found or found[2] not in _UNITS or not 0 < float(found[1]) * _UNITS[found[2]] <= 7 * 86400:
        fail(f"--budget {text[:40]}: that is no time", "write --budget 60s, 5m or 1h")
    return float(found[1]) * _UNITS[found[2]]


def complete(c: Cascade, given: dict[str, int], like: dict[str, str]) -> dict[str, int]:
    """The extents to tune for: those given, then ranks that follow these, then the usual ones."""
    from ..ir.extents import bindings, resolve
    from ..passes.mapped import nominal

    usual = nominal(c)
    known = dict(given)
    for rank, other in like.items():
        if other in given:
            known.setdefault(rank, given[other])
    for b in bindings(c):
        if b.param is not None:
            known.setdefault(b.rank, usual[b.rank])
    return resolve(c, known)


def document(c: Cascade, shapes: dict[str, int], r: TuneResult) -> dict[str, Any]:
    """The result as JSON."""
    return {
        "cascade": c.name,
        "shapes": shapes,
        "target": r.best.target,
        "device": r.best.device,
        "best": {"mapping": r.best.mapping.to_dict(), "time_s": r.best.time_s},
        "default": None if r.default is None else {"mapping": r.default.mapping.to_dict(), "time_s": r.default.time_s},
        "ratio": r.ratio,
        "interval": list(r.interval),
        "trials": sum(t.kind == "trial" for t in r.records),
        "failures": _failures(r),
        "space": r.space,
        "seconds": r.seconds,
        "records": r.recorded_in,
    }


def _failures(r: TuneResult) -> dict[str, int]:
    kinds = [t.status for t in r.records if t.status != "ok"]
    return {k: kinds.count(k) for k in sorted(set(kinds))}


class _Display:
    """What is known so far, on stderr: a live panel on a terminal, nothing in a pipe."""

    def __init__(self, c: Cascade, budget: float, quiet: bool) -> None:
        from rich.live import Live

        self._name, self._budget = c.name, budget
        console = err()
        self._live = None if quiet or not console.is_terminal else Live(console=console, transient=True)
        self._last: Progress | None = None

    def __enter__(self) -> _Display:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def stopped(self) -> None:
        """What is left of a search that the user ended."""
        from ..autotune.report import spelled

        p = self._last
        if self._live is not None:
            self._live.stop()
        if p is None or not p.trials:
            note("interrupted before anything was measured")
            return
        best = f"; the best so far takes {spelled(p.best_s)}, the default {spelled(p.default_s)}" if p.best_s else ""
        note(f"interrupted: {p.trials} trials are on record{best}. The same command goes on from there")

    def show(self, p: Progress) -> None:
        self._last = p
        if self._live is not None:
            self._live.update(self._panel(p), refresh=True)

    def _panel(self, p: Progress) -> RenderableType:
        from rich.table import Table

        from ..autotune.report import spelled

        table = Table.grid(padding=(0, 2))
        stage = "comparing the best with the default" if p.stage == "final" else f"{p.trials} of {p.space} mappings"
        table.add_row(f"tuning {self._name}", stage, f"{p.left_s:.0f} s left")
        gain = f"{p.default_s / p.best_s:.2f}x the default" if p.default_s and p.best_s else ""
        table.add_row("best so far", spelled(p.best_s), gain)
        if p.error is not None:
            table.add_row("forecasts off by", f"{p.error:.0%}", "")
        if p.last is not None:
            result = spelled(p.last.time_s) if p.last.status == "ok" else p.last.status
            table.add_row("last", result, str(p.last.mapping))
        return table


def _print(c: Cascade, shapes: dict[str, int], r: TuneResult) -> None:
    from rich.table import Table

    from ..autotune.report import spelled

    table = Table(title=f"{c.name}  {'  '.join(f'{k}={v}' for k, v in shapes.items())}", show_header=True)
    for head in ("", "time", "mapping"):
        table.add_column(head)
    same = r.default is not None and r.best.mapping == r.default.mapping
    table.add_row("default" if same else "winner", spelled(r.best.time_s), str(r.best.mapping))
    if r.default is not None and not same:
        table.add_row("default", spelled(r.default.time_s), str(r.default.mapping))
    console = out()
    console.print(table)
    count = sum(t.kind == "trial" for t in r.records)
    if same:
        console.print("nothing was faster than the default beyond doubt")
    elif r.default is not None:
        low, high = r.interval
        console.print(f"{1 / r.ratio:.2f}x the default's speed (95%: {1 / high:.2f} to {1 / low:.2f})")
    failures = ", ".join(f"{n} {k}" for k, n in _failures(r).items())
    console.print(f"{count} of {r.space} mappings in {r.seconds:.1f} s{'; ' + failures if failures else ''}")
    console.print(f"recorded in {r.recorded_in}")
