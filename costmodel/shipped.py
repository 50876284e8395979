"""What ships with castile: rows of kernels that were measured, and the model that was trained on them.

`benchmarks/make_table.py` writes the rows; ``data/README.md`` says where they come from. Both are checked against
their hashes before they are used.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ..ir.device import Device, MemoryLevel
from ..ir.errors import InputError
from .features import NAMES, schema, usual
from .model import CostModel

Array = Any

DATA = Path(__file__).with_name("data")

# A row: a cascade at some extents under a mapping, how its check ended, its median time and the distance of the
# quartiles in seconds, the number of samples, the roofline in seconds, and the features.
COLUMNS = ("cascade", "shapes", "mapping", "status", "time_s", "spread_s", "samples", "roofline_s", *NAMES)

LARGEST_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Shipped:
    """Rows that ran: ``features`` ``[N, F]``, ``times`` and ``rooflines`` ``[N]`` in seconds, and for each row its
    cascade's name, its extents and its mapping as JSON. ``about`` is what ``table.json`` says of them."""

    cascades: tuple[str, ...]
    shapes: tuple[str, ...]
    mappings: tuple[str, ...]
    features: Array
    times: Array
    rooflines: Array
    about: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.times)


def shipped_rows(folder: Path = DATA) -> Shipped:
    """The rows that ship with castile. Raises `InputError` where they are damaged or of other features."""
    try:
        about = json.loads((folder / "table.json").read_text(encoding="utf-8"))
        packed = (folder / "rows.csv.gz").read_bytes()
    except (OSError, ValueError) as error:
        raise InputError(f"there is no table in {folder}: {str(error)[:80]}", hint="install castile again") from None
    if hashlib.sha256(packed).hexdigest() != about.get("sha256"):
        raise InputError(f"{folder / 'rows.csv.gz'} is not the file that table.json speaks of")
    try:
        with gzip.open(io.BytesIO(packed)) as file:
            text = file.read(LARGEST_BYTES).decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise InputError(f"{folder / 'rows.csv.gz'} cannot be read: {error}") from None
    head, *rows = list(csv.reader(io.StringIO(text))) or [[]]
    columns = _columns(tuple(head), about.get("schema"), folder)
    good = [r for r in rows if r[3] == "ok" and r[4]]
    numbers = np.array([[float(r[4]), float(r[7]), *(float(r[i]) if i >= 0 else w for i, w in columns)] for r in good])
    numbers = numbers.reshape(len(good), len(NAMES) + 2)
    names, shapes, mappings = ([r[i] for r in good] for i in range(3))
    return Shipped(
        tuple(names), tuple(shapes), tuple(mappings), numbers[:, 2:], numbers[:, 0], numbers[:, 1], about
    )  # fmt: skip


def _columns(head: tuple[str, ...], listed: Any, folder: Path) -> list[tuple[int, float]]:
    """For each feature its column, or -1 and its value: rows may be older than a knob, and then all had its default."""
    fixed = COLUMNS[: -len(NAMES)]
    names = head[len(fixed) :]
    lost = [n for n in NAMES if n not in names and usual(n) is None]
    if head[: len(fixed)] != fixed or listed != schema(names) or lost:
        raise InputError(
            f"the rows in {folder} hold other features",
            expected=schema(),
            got=str(listed)[:40],
            hint="benchmarks/make_table.py export writes them anew",
        )
    # A feature may be called like one of the fixed columns, which are not in its scale.
    places = {n: len(fixed) + i for i, n in enumerate(names)}
    return [(places[n], 0.0) if n in places else (-1, usual(n) or 0.0) for n in NAMES]


@cache
def shipped_model(folder: Path = DATA / "model") -> CostModel | None:
    """The model that ships with castile; None where there is none. Raises `InputError` where it is damaged."""
    return CostModel.load(folder) if (folder / "model.json").is_file() else None


def device_to_dict(device: Device) -> dict[str, Any]:
    """The JSON form of a device."""
    data = {name: getattr(device, name) for name in device.__dataclass_fields__}
    data["flops"] = dict(device.flops)
    data["memory"] = [asdict(level) for level in device.memory]
    data["features"] = sorted(device.features)
    return data


def device_from_dict(data: Mapping[str, Any]) -> Device:
    """The device of a JSON form that `device_to_dict` gave."""
    given = dict(data)
    given["memory"] = tuple(MemoryLevel(**level) for level in given["memory"])
    given["features"] = frozenset(given["features"])
    return Device(**given)
