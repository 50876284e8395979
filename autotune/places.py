"""Where what is kept lies."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from ..ir.machine import home


def records_path() -> Path:
    """Where records are kept: ``CASTILE_RECORDS``, else in the user's data folder."""
    named = os.environ.get("CASTILE_RECORDS")
    if named:
        return Path(named)
    if sys.platform == "darwin":
        return home() / "Library" / "Application Support" / "castile" / "records.sqlite"
    base = os.environ.get("XDG_DATA_HOME") or str(home() / ".local" / "share")
    return Path(base) / "castile" / "records.sqlite"


def have_records(path: Path) -> bool:
    """Whether there is a file of records; an empty one holds none."""
    try:
        return path.is_file() and path.stat().st_size > 0
    except OSError:
        return False


def model_path() -> Path:
    """The folder of the user's cost model: ``CASTILE_MODEL``, else beside the records."""
    named = os.environ.get("CASTILE_MODEL")
    return Path(named) if named else records_path().with_name("costmodel")
