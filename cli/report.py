"""`castile report`: what was tuned, as a page."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from .terminal import Json, emit, note, write_file

# Trials that are set against the roofline and the model: each is derived anew.
MOST_JUDGED = 1000

# Seconds for which each rate of this machine is measured.
MEASURED_S = 0.05


def report(
    file: Annotated[Path, typer.Argument(metavar="OUT.html", help="Where to write the page.", show_default=False)],
    records: Annotated[
        Path | None, typer.Option("--records", help="The file of records; else the user's.", show_default=False)
    ] = None,
    cascade: Annotated[str | None, typer.Option("--cascade", help="Only this cascade.", show_default=False)] = None,
    json: Json = False,
) -> None:
    """Write a page of what was tuned: winners, best so far against seconds, failures by kind, and what ran on this
    machine against its roofline, which is measured, and the model. The page needs nothing else."""
    from ..autotune.dataset import judged
    from ..autotune.probe import describe_cpu, measure_cpu
    from ..autotune.records import Records
    from ..autotune.report import html
    from ..autotune.tuner import leader
    from ..codegen.runtime import thread_count
    from ..ir.errors import UsageError

    with Records(records, read_only=True) as opened:
        found = opened.all(name=cascade)
    told = describe_cpu()
    known = judged([r for r in found if r.device == told.name][-MOST_JUDGED:], told, leader())
    device = None
    if known:
        with suppress(UsageError):  # there are records of kernels, yet no compiler any more
            device = measure_cpu(MEASURED_S, thread_count())
    write_file(file, html(found, judged=known, device=device))
    if json:
        emit({"file": str(file), "records": len(found)})
    else:
        note(f"wrote {len(found)} records to {file}")
