"""Records in other forms: JSON lines, T4 for other tuners, and lock files, which pin mappings for a repository.

What is read comes from strangers: it is checked as `record_of` checks it, and sizes are capped first.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..ir.errors import InputError
from ..ir.mapping import Mapping as Tuned
from .record import Record, foremost, record_of
from .records import VERSION, Records

_LINES = 1_000_000


def export(records: Iterable[Record]) -> str:
    """Records as JSON lines, which `imported` reads."""
    return "".join(json.dumps(r.to_dict(), ensure_ascii=False) + "\n" for r in records)


def imported(text: str) -> list[Record]:
    """Records from JSON lines. Raises `InputError` that names the line which is none."""
    found = []
    lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    if len(lines) > _LINES:
        raise InputError("too many records in one file", expected=f"at most {_LINES}", got=str(len(lines)))
    for n, line in lines:
        try:
            found.append(record_of(json.loads(line)))
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"line {n} is no JSON: {str(error)[:80]}", hint="castile records export writes it"
            ) from None
        except InputError as error:
            raise InputError(f"line {n}: {error.message}", expected=error.expected, got=error.got) from None
    return found


def t4(records: Iterable[Record]) -> dict[str, Any]:
    """The trials of one workload in the T4 format, which `castile replay` and other tuners read."""
    kinds = {"ok": "correct", "compile_error": "compile", "compile_timeout": "compile", "wrong": "correctness"}
    results: list[dict[str, Any]] = []
    first: Record | None = None
    for r in records:
        if first is None:
            first = r
        elif (r.key, r.target, r.device, r.shapes) != (first.key, first.target, first.device, first.shapes):
            raise InputError("T4 holds one workload", hint="choose one: --cascade, --target, --shape")
        results.append(
            {
                "timestamp": r.at,
                "configuration": flat(r.mapping),
                "times": {"runtimes": [t * 1e3 for t in r.times]},
                "invalidity": kinds.get(r.status, "runtime"),
                "correctness": float(r.status == "ok"),
                "measurements": [{"name": "time", "value": r.time_s * 1e3, "unit": "ms"}] if r.time_s else [],
                "objectives": ["time"],
            }
        )
    about = (
        {} if first is None else {"kernel_name": first.name, "device_name": first.device, "shapes": dict(first.shapes)}
    )
    # A tile that one mapping names and another leaves to the target is a parameter of both.
    names = dict.fromkeys(n for result in results for n in result["configuration"])
    for result in results:
        result["configuration"] = {n: result["configuration"].get(n, "default") for n in names}
    return {"schema_version": "1.0.0", "metadata": about, "results": results}


def flat(mapping: Tuned) -> dict[str, Any]:
    """A mapping as one name and value for each choice."""
    found: dict[str, Any] = {"form": mapping.form, "gauge": mapping.gauge}
    for part in ("tiles", "splits", "knobs"):
        found |= {f"{part}.{name}": value for name, value in getattr(mapping, part).items()}
    return found


# Lock files

_LOCK_BYTES = 16 << 20


def lock(records: Records) -> str:
    """The text of a ``castile.lock``: the best mapping of every cascade, target, device and extents on record."""
    found: dict[tuple[str, ...], list[Record]] = {}
    for r in records.all(status="ok"):
        found.setdefault(_workload(r), []).append(r)
    entries = [
        {**replace(r, times=(), detail="", session="", kind="pinned").to_dict(), "uid": ""}
        for r in (foremost(group) for _, group in sorted(found.items()))
        if r is not None
    ]
    return json.dumps({"castile.lock": VERSION, "pins": entries}, indent=1, ensure_ascii=False) + "\n"


def unlocked(path: str | Path) -> list[Record]:
    """The pinned records of a lock file. Raises `InputError` for a file that is none."""
    try:
        with Path(path).open("rb") as file:
            raw = file.read(_LOCK_BYTES + 1)
        data = json.loads(raw.decode("utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is no lock file: {str(error)[:80]}", hint="castile records lock writes it") from None
    if len(raw) > _LOCK_BYTES:
        raise InputError(f"{path} is too large", expected=f"at most {_LOCK_BYTES >> 20} MiB")
    if not isinstance(data, dict) or not isinstance(data.get("pins"), list):
        raise InputError(f"{path} is no lock file", expected="`castile.lock` and `pins`")
    if data.get("castile.lock") != VERSION:
        raise InputError(
            f"{path} is of another version", expected=str(VERSION), got=repr(data.get("castile.lock"))[:40]
        )
    pins = [replace(record_of(pin), kind="pinned") for pin in data["pins"]]
    # The same pin twice is one.
    return [replace(p, uid=_pin_uid(p)) for p in pins]


def pin(records: Records, pins: Iterable[Record]) -> int:
    """Append what `unlocked` read, so that it is the last of its workload and goes before all else; how many were not
    so already. A pin that was there before another one comes once more."""
    there = records.all(kind="pinned")
    last = {_workload(r): _pin_uid(r) for r in there}
    taken = {r.uid for r in there}
    wanted = {_workload(p): p for p in pins}
    fresh = [p for place, p in wanted.items() if last.get(place) != _pin_uid(p)]
    return records.add(replace(p, uid="") if p.uid in taken else p for p in fresh)


def _workload(r: Record) -> tuple[str, ...]:
    return r.key, r.target, r.device, json.dumps(dict(sorted(r.shapes.items())))


def _pin_uid(p: Record) -> str:
    words = json.dumps([p.key, p.target, p.device, sorted(p.shapes.items()), p.mapping.to_json(), p.time_s])
    return uuid.uuid5(uuid.NAMESPACE_OID, words).hex
