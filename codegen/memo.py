"""What castile worked out before, kept as JSON beside the compiled kernels.

A file is named by the key of all that its content follows from, this version of castile among them, and begins with
the hash of the rest. What is not whole, not ours or not writable is as if it were not there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from .build import cache_folder

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
        _write(path, value)
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
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
            status = os.fstat(file.fileno())
            ours = stat.S_ISREG(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022
            if not ours or status.st_size > LARGEST:
                return None
            digest, _, data = file.read().partition(b"\n")
            if hashlib.sha256(data).hexdigest().encode() != digest:
                return None
            return (json.loads(data),)
    except (OSError, ValueError):
        return None


def _write(path: Path, value: Any) -> None:
    """Whole or not at all."""
    data = json.dumps(value).encode()
    handle, name = tempfile.mkstemp(prefix=".new-", dir=path.parent)
    try:
        with open(handle, "wb") as file:
            file.write(hashlib.sha256(data).hexdigest().encode() + b"\n" + data)
        os.chmod(name, 0o600)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
