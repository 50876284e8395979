"""Files of the cache: read only where they are ours alone, written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from pathlib import Path


def read_ours(path: Path, most: int | None = None) -> bytes | None:
    """The bytes of a plain file that is ours and that nobody else may write; None for any other, for a link, and for
    one of more than ``most`` bytes."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
            status = os.fstat(file.fileno())
            ours = stat.S_ISREG(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022
            return file.read() if ours and (most is None or status.st_size <= most) else None
    except OSError:
        return None


def write_whole(path: Path, data: bytes, mode: int) -> None:
    """Put bytes under a name in one step. Raises `OSError`, and leaves nothing behind then."""
    handle, name = tempfile.mkstemp(prefix=".new-", dir=path.parent)
    try:
        with open(handle, "wb") as file:
            file.write(data)
        os.chmod(name, mode)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
