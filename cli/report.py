"""`castile report`: what was tuned, as a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .terminal import Json, emit, note, write_file

# Trials that are set against the roofline and the model: each is derived anew.
MOST_JUDGED = 1000


def report(
    file: Annotated[Path, typer.Argument(metavar="OUT.html", help="Where to write the page.", show_default=False)],
    records: Annotated[
        Path | None, typer.Option("--records", help="The file of records; else the user's.", show_default=False)
    ] = None,
    cascade: Annotated[str | None, typer.Option("--cascade", help="Only this cascade.", show_default=False)] = None,
    json: Json = False,
) -> None:
    """Write a page of what was tuned: trials against the roofline and the model, winners, best so far against seconds,
    failures by kind. It needs nothing else."""
    from ..autotune.dataset import judged
    from ..autotune.probe import describe_cpu
    from ..autotune.records import Records
    from ..autotune.report import html
    from ..autotune.tuner import leader

    with Records(records, read_only=True) as opened:
        found = opened.all(name=cascade)
    device = describe_cpu()
    write_file(file, html(found, judged=judged(found[-MOST_JUDGED:], device, leader()), device=device))
    if json:
        emit({"file": str(file), "records": len(found)})
    else:
        note(f"wrote {len(found)} records to {file}")
