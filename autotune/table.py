"""Brute-forced tables: every configuration of a kernel with its time, measured by others.

Two forms are read, plain or gzipped: Kernel Tuner's cache and T4, which castile's records are exported as. Both are
data from strangers: sizes are capped before anything is parsed, and what does not fit ends in one `InputError`.
"""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..ir.errors import InputError

LARGEST_BYTES = 512 * 1024**2
MOST_ROWS, MOST_COLUMNS, LONGEST_NAME = 2_000_000, 256, 200

# Kernel Tuner once wrote this in place of a failed configuration's time.
_FAILED_TIME = 1e20

_HINT = "a table is a cache file of Kernel Tuner or T4 JSON, plain or .gz"


@dataclass(frozen=True, slots=True)
class Table:
    """A brute-forced table: ``columns`` holds the values of each parameter, ``times`` ``[N]`` is NaN where one failed.

    ``times`` are those of ``objective``; where more of it is better, its inverse.
    """

    name: str
    device: str
    parameters: tuple[str, ...]
    columns: tuple[tuple[Any, ...], ...]
    times: Any
    objective: str

    def __len__(self) -> int:
        return len(self.times)

    @property
    def best(self) -> float:
        return float(np.nanmin(self.times))


def read_table(path: str | Path) -> Table:
    """The table in a file. Raises `InputError` for a file that holds none."""
    data = _document(Path(path))
    if not isinstance(data, dict):
        raise InputError(f"{path} holds no table", expected="a JSON object", got=type(data).__name__, hint=_HINT)
    if isinstance(data.get("cache"), dict):
        name, device, rows = data.get("kernel_name"), data.get("device_name"), _cache_rows(data, path)
        wanted = data.get("objective")
    elif isinstance(data.get("results"), list):
        name, device, rows, wanted = _t4_names(data) + _t4_rows(data, path)
    else:
        raise InputError(f"{path} holds no table", expected="`cache` or `results`", hint=_HINT)
    if len(rows) > MOST_ROWS:
        raise InputError(f"{path} holds too many configurations", expected=f"at most {MOST_ROWS}", got=str(len(rows)))
    return _table(path, str(name or Path(path).name)[:LONGEST_NAME], str(device or "")[:LONGEST_NAME], rows, wanted)


def _document(path: Path) -> Any:
    """The JSON of a file, unzipped where it is zipped, never more than `LARGEST_BYTES` of it."""
    try:
        with path.open("rb") as file:
            zipped = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            if zipped:
                with gzip.open(file) as unzipped:
                    raw = unzipped.read(LARGEST_BYTES + 1)
            else:
                raw = file.read(LARGEST_BYTES + 1)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise InputError(
            f"cannot read {path}: {getattr(error, 'strerror', None) or error or 'the file ends early'}", hint=_HINT
        ) from None
    if len(raw) > LARGEST_BYTES:
        raise InputError(f"{path} is too large", expected=f"at most {LARGEST_BYTES >> 20} MiB, unzipped")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start})", hint=_HINT) from None
    problem: Exception | None = None
    # While Kernel Tuner is at work its cache lacks the last two braces.
    for whole in (text, text.rstrip().rstrip(",") + "}}"):
        try:
            return json.loads(whole)
        except (ValueError, RecursionError) as error:
            problem = problem or error
    raise InputError(f"{path} is no JSON: {str(problem)[:120]}", hint=_HINT)


@dataclass(frozen=True, slots=True)
class _Row:
    configuration: Mapping[str, Any]
    measured: Mapping[str, Any]
    failed: bool


def _cache_rows(data: Mapping[str, Any], path: str | Path) -> list[_Row]:
    names = data.get("tune_params_keys")
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        raise InputError(f"{path} does not name its parameters", expected="`tune_params_keys`: a list of names")
    if len(names) > MOST_COLUMNS:
        raise InputError(f"{path} has too many parameters", expected=f"at most {MOST_COLUMNS}", got=str(len(names)))
    rows = []
    for key, row in data["cache"].items():
        if not isinstance(row, dict):
            raise InputError(f"{path}: configuration {key[:60]!r} is no object", got=type(row).__name__)
        missing = [n for n in names if n not in row]
        if missing:
            raise InputError(f"{path}: configuration {key[:60]!r} lacks a parameter", expected=missing[0][:60])
        rows.append(_Row({n: row[n] for n in names}, row, False))
    return rows


def _t4_names(data: Mapping[str, Any]) -> tuple[Any, Any]:
    metadata = data.get("metadata")
    found = metadata if isinstance(metadata, dict) else {}
    return found.get("kernel_name") or found.get("workload"), found.get("device_name") or found.get("device")


def _t4_rows(data: Mapping[str, Any], path: str | Path) -> tuple[list[_Row], Any]:
    rows, wanted = [], None
    for n, row in enumerate(data["results"]):
        if not isinstance(row, dict) or not isinstance(row.get("configuration"), dict):
            raise InputError(f"{path}: result {n} has no configuration", expected="`configuration`: an object")
        if len(row["configuration"]) > MOST_COLUMNS:
            raise InputError(f"{path} has too many parameters", expected=f"at most {MOST_COLUMNS}")
        measured: dict[str, Any] = {}
        times = row.get("times")
        runs = times.get("runtimes") if isinstance(times, dict) else None
        if isinstance(runs, list) and runs and all(_number(r) is not None for r in runs):
            measured["time"] = sum(float(r) for r in runs) / len(runs)
        more = row.get("measurements")
        for m in more if isinstance(more, list) else ():
            if isinstance(m, dict) and isinstance(m.get("name"), str):
                measured[m["name"]] = m.get("value")
        objectives = row.get("objectives")
        if wanted is None and isinstance(objectives, list) and objectives:
            wanted = objectives[0]
        rows.append(_Row(row["configuration"], measured, row.get("invalidity", "correct") != "correct"))
    return rows, wanted


def _number(value: Any) -> float | None:
    """A positive finite number, or None for whatever else stands in its place."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) and 0 < found < _FAILED_TIME else None


def _table(path: str | Path, name: str, device: str, rows: list[_Row], wanted: Any) -> Table:
    # The time, where there is one; then what the file says that it tunes for.
    names = ["time", *([wanted] if isinstance(wanted, str) else [])]
    objective = next((n for n in names if any(_number(r.measured.get(n)) for r in rows)), None)
    if objective is None:
        raise InputError(f"{path}: no configuration has a time", expected="numbers above 0", hint=_HINT)
    more = objective != "time" and any(w in objective.lower() for w in ("/s", "flop", "throughput", "bandwidth"))
    parameters = tuple(dict.fromkeys(n for r in rows for n in r.configuration))
    if not parameters:
        raise InputError(f"{path}: no configuration has a parameter", hint=_HINT)
    seen: dict[str, int] = {}
    kept: list[_Row] = []
    for r in rows:  # a configuration that was measured again counts once, as it was measured last
        key = json.dumps([r.configuration.get(n) for n in parameters], sort_keys=True, default=str)
        if key in seen:
            kept[seen[key]] = r
        else:
            seen[key] = len(kept)
            kept.append(r)
    times = np.full(len(kept), np.nan)
    for i, r in enumerate(kept):
        value = None if r.failed else _number(r.measured.get(objective))
        if value is not None:
            times[i] = 1.0 / value if more else value
    if np.count_nonzero(np.isfinite(times)) == 0:
        raise InputError(f"{path}: every configuration failed")
    columns = tuple(tuple(_plain(r.configuration.get(n)) for r in kept) for n in parameters)
    return Table(name, device, parameters, columns, times, objective)


def _plain(value: Any) -> Any:
    """A parameter's value as something to compare: a number or a text."""
    if isinstance(value, (int, float)):
        try:
            return float(value)
        except OverflowError:
            return str(value)[:LONGEST_NAME]
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)[:LONGEST_NAME]
