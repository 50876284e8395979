"""What castile worked out before, kept as JSON beside the compiled kernels.

A file is named by the key of all that its content follows from, this version of castile among them, and begins with
the hash of the rest. What is not whole, not ours or not writable is as if it were not there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from .build import cache_folder
from .files import read_ours, write_whole

SUFFIX = ".json"
LARGEST = 1 << 24


def recall(parts: Sequence[str], make: Callable[[], Any]) -> Any:
    """The JSON value that ``make`` gives, or gave before for the same words."""
    folder = cache_folder()
    if folder is None:
        return make()
    path = folder / (_key(parts) + SUFFIX)
    found = _read(path)
    if found is not None:
        return found[0]
    value = make()
    with contextlib.suppress(OSError):
        data = json.dumps(value).encode()
        write_whole(path, hashlib.sha256(data).hexdigest().encode() + b"\n" + data, 0o600)
    return value


def _key(parts: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for part in (fingerprint(), *parts):
        data = part.encode("utf-8", "surrogateescape")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


@cache
def fingerprint() -> str:
    """What tells this castile from another: the files that decide what is generated, by size and time of change."""
    root = Path(__file__).resolve().parent.parent
    words = []
    for folder in ("ir", "passes", "codegen"):
        for item in sorted(os.scandir(root / folder), key=lambda e: e.name):
            if item.name.endswith((".py", ".h")):
                status = item.stat()
                words.append(f"{item.name} {status.st_size} {status.st_mtime_ns}")
    return "\n".join(words)


def _read(path: Path) -> tuple[Any] | None:
    """What a sound file holds."""
    digest, _, data = (read_ours(path, LARGEST) or b"").partition(b"\n")
    if hashlib.sha256(data).hexdigest().encode() != digest:
        return None
    with contextlib.suppress(ValueError):
        return (json.loads(data),)
    return None
