"""`castile records`: what was measured, and what follows from it."""

from __future__ import annotations

import json as jsons
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..ir.errors import did_you_mean
from .terminal import Json, More, Shape, emit, extents, fail, note, out, say, write_file

if TYPE_CHECKING:
    from ..autotune.record import Record

app = typer.Typer(no_args_is_help=True, help="List, show, import, export, merge, lock and replay records.")

From = Annotated[
    Path | None, typer.Option("--records", help="The file of records; else the user's.", show_default=False)
]
Name = Annotated[str | None, typer.Option("--cascade", help="Only cascades of this name.", show_default=False)]
Target = Annotated[str | None, typer.Option("--target", help="Only this target.", show_default=False)]
Status = Annotated[str | None, typer.Option("--status", help="Only trials that ended so.", show_default=False)]
To = Annotated[Path | None, typer.Option("-o", "--output", help="Write here; else to stdout.", show_default=False)]

LARGEST_IMPORT = 256 << 20


@app.command("list")
def list_records(
    records: From = None, cascade: Name = None, target: Target = None, status: Status = None, json: Json = False
) -> None:
    """List what was tuned: one line for each cascade, target and extents."""
    found = _read(records, name=cascade, target=target, status=status)
    rows = _workloads(found)
    if json:
        emit(rows)
        return
    from rich.table import Table

    from ..autotune.report import spelled

    table = Table("cascade", "target", "extents", "trials", "failed", "best", "mapping")
    for row in rows:
        sizes = " ".join(f"{k}={v}" for k, v in row["shapes"].items())
        mapping = row["mapping_text"] or ""
        trials, failed = str(row["trials"]), str(row["failed"])
        table.add_row(row["cascade"], _plain(row["target"]), sizes, trials, failed, spelled(row["time_s"]), mapping)
    out().print(table)


@app.command()
def show(
    records: From = None, cascade: Name = None, target: Target = None, status: Status = None, json: Json = False
) -> None:
    """Show every trial, in the order in which they were measured."""
    found = _read(records, name=cascade, target=target, status=status)
    if json:
        emit([r.to_dict() for r in found])
        return
    from ..autotune.report import spelled

    for r in found:
        sizes = " ".join(f"{k}={v}" for k, v in r.shapes.items())
        result = (
            spelled(r.time_s) if r.status == "ok" else f"{r.status}: {r.detail.splitlines()[0] if r.detail else ''}"
        )
        say(_plain(f"{r.at}  {r.kind:6}  {r.name}  {sizes}  {r.mapping}  {result}"))


@app.command("import")
def import_records(
    file: Annotated[Path, typer.Argument(help="What castile records export wrote.", show_default=False)],
    records: From = None,
    json: Json = False,
) -> None:
    """Append records from a file; those that are there already are left out."""
    from ..autotune.exchange import imported
    from ..autotune.records import Records

    try:
        with file.open("rb") as opened:
            raw = opened.read(LARGEST_IMPORT + 1)
        text = raw.decode("utf-8")
    except OSError as error:
        fail(f"cannot read {file}: {error.strerror or error}")
    except UnicodeDecodeError as error:
        fail(f"{file} is not UTF-8 text (byte {error.start})", "castile records export writes it")
    if len(raw) > LARGEST_IMPORT:
        fail(f"{file} is larger than {LARGEST_IMPORT >> 20} MiB")
    found = imported(text)
    with Records(records) as opened_records:
        _added(opened_records.add(found), len(found), json)


@app.command()
def merge(
    other: Annotated[Path, typer.Argument(help="Another file of records.", show_default=False)],
    records: From = None,
    json: Json = False,
) -> None:
    """Append what another file of records holds; those that are there already are left out."""
    from ..autotune.records import Records

    with Records(other, read_only=True) as source:
        found = source.all()
    with Records(records) as opened:
        _added(opened.add(found), len(found), json)


@app.command()
def export(
    output: To = None,
    records: From = None,
    cascade: Name = None,
    target: Target = None,
    shape: Shape = None,
    more: More = None,
    status: Status = None,
    t4: Annotated[bool, typer.Option("--t4", help="One workload as T4 JSON, for other tuners.")] = False,
) -> None:
    """Write records as JSON lines, or one workload as T4. ``--shape`` keeps those of these extents."""
    from ..autotune.exchange import export as lines
    from ..autotune.exchange import t4 as as_t4

    found = _read(records, name=cascade, target=target, status=status)
    sizes = extents([*(shape or ()), *(more or ())])
    found = [r for r in found if sizes.items() <= dict(r.shapes).items()]
    if t4:
        found = [r for r in found if r.kind == "trial"]
    text = jsons.dumps(as_t4(found), ensure_ascii=False) + "\n" if t4 else lines(found)
    _write(output, text, f"{len(found)} records")


@app.command()
def lock(output: To = None, records: From = None) -> None:
    """Write a lock file: the best mapping of everything on record, to be kept in a repository."""
    from ..autotune.exchange import lock as locked
    from ..autotune.records import Records

    with Records(records, read_only=True) as opened:
        text = locked(opened)
    _write(output or Path("castile.lock"), text, "the best mappings")


@app.command()
def replay(
    file: Annotated[Path, typer.Argument(help="A castile.lock.", show_default=False)] = Path("castile.lock"),
    records: From = None,
    json: Json = False,
) -> None:
    """Take the mappings of a lock file: from now on they go before whatever was measured here."""
    from ..autotune.exchange import pin, unlocked
    from ..autotune.records import Records

    found = unlocked(file)
    with Records(records) as opened:
        _added(pin(opened, found), len(found), json)


def _read(path: Path | None, **where: str | None) -> list[Record]:
    from ..autotune.record import STATUSES
    from ..autotune.records import Records

    status = where.get("status")
    if status is not None and status not in STATUSES:
        fail(f"no trial ends as `{status[:40]}`", did_you_mean(status, STATUSES) or f"one of {', '.join(STATUSES)}")
    with Records(path, read_only=True) as opened:
        return opened.all(**where)


def _plain(text: str) -> str:
    """A line without what moves a terminal's cursor or colours it: records come from strangers, too."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _added(new: int, of: int, json: bool) -> None:
    if json:
        emit({"read": of, "added": new})
    else:
        say(f"{new} of {of} records added")


def _write(path: Path | None, text: str, what: str) -> None:
    if path is None:
        print(text, end="")
        return
    write_file(path, text)
    note(f"wrote {what} to {path}")


def _workloads(found: list[Record]) -> list[dict[str, Any]]:
    from ..autotune.record import foremost

    groups: dict[tuple[str, ...], list[Record]] = {}
    for r in found:
        groups.setdefault((r.key, r.target, r.device, jsons.dumps(dict(r.shapes))), []).append(r)
    rows = []
    for group in groups.values():
        good = [r for r in group if r.status == "ok"]
        best = foremost(good)
        rows.append(
            {
                "cascade": group[0].name,
                "key": group[0].key,
                "target": group[0].target,
                "device": group[0].device,
                "shapes": dict(group[0].shapes),
                "trials": sum(r.kind == "trial" for r in group),
                "failed": len(group) - len(good),
                "time_s": best.time_s if best else None,
                "mapping": best.mapping.to_dict() if best else None,
                "mapping_text": str(best.mapping) if best else None,
            }
        )
    return rows
