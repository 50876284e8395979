"""The `castile` command: gathers the subcommands, one file each.

Starts quickly: a command's own file imports what it needs when it runs.
"""

from __future__ import annotations

import io
import sys
import warnings
from functools import partial
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from . import bench, cache, costmodel, device, doctor, emit, explain, records, replay, report, run, tune, verify
from .terminal import guarded, warned


class Commands(TyperGroup):
    """The group of commands, with castile's exit codes and errors in place of tracebacks."""

    def main(self, *args: Any, **extra: Any) -> Any:
        start = partial(super().main, *args, **{**extra, "standalone_mode": False})
        if not extra.get("standalone_mode", True):
            return start()
        sys.exit(guarded(start))


app = typer.Typer(
    cls=Commands,
    name="castile",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
app.command("explain")(explain.explain)
app.command("run")(run.run)
app.command("emit")(emit.emit)
app.command("bench")(bench.bench)
app.command("verify")(verify.verify)
app.command("tune")(tune.tune)
app.command("replay")(replay.replay)
app.add_typer(costmodel.app, name="costmodel")
app.add_typer(records.app, name="records")
app.command("report")(report.report)
app.add_typer(cache.app, name="cache")
app.add_typer(device.app, name="device")
app.command("doctor")(doctor.doctor)


def _version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        print(f"castile {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def castile(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Compile tensor programs, written as cascades of Einsums, into tuned kernels."""
    if context.invoked_subcommand is None:
        print(context.get_help())


def main() -> None:
    """The console script."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that lacks `·` shows `?`
    warnings.showwarning = warned
    try:
        app(prog_name="castile")
    except KeyboardInterrupt:
        sys.exit(130)
