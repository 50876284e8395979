"""The machine that castile runs on: its cores and its second cache, which default mappings follow, and the home."""

from __future__ import annotations

import os
import tempfile
from functools import cache
from pathlib import Path

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")

# The second cache of a core of a current server, for systems that do not tell.
USUAL = 1 << 20
UNITS = {"K": 1 << 10, "M": 1 << 20}


def cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def home() -> Path:
    """The user's home; for one without, as in some containers, a folder of their own beside what is temporary."""
    found = os.path.expanduser("~")
    return Path(found) if os.path.isabs(found) else Path(tempfile.gettempdir()) / f"castile-{os.getuid()}"


@cache
def second_cache() -> int:
    """The bytes of a core's second cache, as Linux tells them, else those of a usual one."""
    for index in sorted(CACHES.glob("index*")):
        try:
            level, size = ((index / name).read_text(encoding="ascii").strip() for name in ("level", "size"))
        except (OSError, UnicodeDecodeError):
            continue
        if level == "2" and size[:-1].isdecimal() and size[-1:] in UNITS:
            return int(size[:-1]) * UNITS[size[-1]] or USUAL
    return USUAL
