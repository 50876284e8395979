"""`castile report`: what was tuned, as a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .terminal import Json, emit, note, write_file


def report(
    file: Annotated[Path, typer.Argument(metavar="OUT.html", help="Where to write the page.", show_default=False)],
    records: Annotated[
        Path | None, typer.Option("--records", help="The file of records; else the user's.", show_default=False)
    ] = None,
    cascade: Annotated[str | None, typer.Option("--cascade", help="Only this cascade.", show_default=False)] = None,
    json: Json = False,
) -> None:
    """Write a page of what was tuned: winners, best so far against seconds, failures by kind. It needs nothing else."""
    from ..autotune.records import Records
    from ..autotune.report import html

    with Records(records, read_only=True) as opened:
        found = opened.all(name=cascade)
    write_file(file, html(found))
    if json:
        emit({"file": str(file), "records": len(found)})
    else:
        note(f"wrote {len(found)} records to {file}")
