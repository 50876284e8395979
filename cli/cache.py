"""`castile cache`: the compiled kernels that are kept between runs."""

from __future__ import annotations

import time

import typer

from .terminal import Json, emit, say

app = typer.Typer(help="The compiled kernels that are kept between runs.", no_args_is_help=True)


@app.command("list")
def list_entries(json: Json = False) -> None:
    """The compiled kernels in the cache, newest first."""
    from ..codegen.build import cache_folder, entries, wanted_folder

    folder = cache_folder()
    found = sorted(entries(), key=lambda e: -e.modified)
    if json:
        listed = [{"key": e.key, "bytes": e.bytes, "modified": e.modified, "path": str(e.path)} for e in found]
        emit({"folder": str(folder or wanted_folder()), "usable": folder is not None, "entries": listed})
        return
    if folder is None:
        say(f"{wanted_folder()} cannot be used: kernels are built anew in every process")
        return
    for e in found:
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(e.modified))
        say(f"{e.key[:16]}  {e.bytes / 1024:8.0f} KiB  {when}")
    say(f"{len(found)} kernels, {sum(e.bytes for e in found) / 2**20:.1f} MiB in {folder}", "dim")


@app.command("clear")
def clear(json: Json = False) -> None:
    """Remove every compiled kernel; each is built again when it is needed."""
    from ..codegen import build

    gone = build.clear()
    if json:
        emit({"removed": gone})
    else:
        say(f"removed {gone} kernels")
