"""From C++ text to a loaded library: a cache of what the compiler made.

An entry of the cache is one file, named by the key of what went into it and by the hash of its own bytes, put there by
an atomic rename. Before one is loaded, it must be a plain file of ours with the bytes that its name promises, in a
folder of ours that nobody else may write to; anything else is left alone or built again. A link that is named by the
key alone says which entry is meant, so that nobody reads through a folder of thousands; where it says nothing that
holds, the folder is listed. Where no such folder can be had, or written to, libraries live in a temporary folder of
this process.

Reading the header takes GCC as long as compiling a small kernel. Who builds one kernel builds more: from the third on,
the cache also holds the header as GCC keeps it when it has read it.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import hashlib
import os
import secrets
import shutil
import stat
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ..ir.errors import UsageError
from ..ir.machine import home
from .compiler import Compiler, find_compiler, header_ahead, key_of, library, refusal, warn_refusal
from .cpp import INCLUDE, header, standalone
from .files import read_ours, write_whole

SUFFIX, AHEAD = ".so", ".gch"

# Kernels in the cache before the header is kept, headers kept for other compilers and flags, and bytes that must be
# free for it.
KERNELS, HEADERS, ROOM = 2, 2, 1 << 30


@dataclass(frozen=True, slots=True)
class Entry:
    """One library of the cache."""

    path: Path
    key: str
    bytes: int
    modified: float


def build(source: str) -> Path:
    """The path of the library made from a printed translation unit: from the cache, else compiled now.

    Raises `UsageError` when there is no compiler or it fails.
    """
    compiler = find_compiler()
    key = key_of(standalone(source), compiler)
    folder = cache_folder()
    if folder is not None:
        found = _lookup(folder, key)
        if found is not None:
            return found
    data = library(source, compiler, _header(folder, compiler) if folder is not None and INCLUDE in source else None)
    for place in (folder, _private_folder):
        if place is None:
            continue
        with contextlib.suppress(OSError):
            return _keep(place() if callable(place) else place, key, data)
    raise UsageError(
        "a compiled kernel can be written nowhere",
        hint="free some space, or set CASTILE_CACHE_DIR to a folder that can be written",
    )


def load(source: str) -> ctypes.CDLL:
    """The library made from a printed translation unit, loaded; a warning where it is not built for this processor."""
    path = build(source)
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise UsageError(f"a compiled kernel does not load: {error}", hint=f"remove {path} and try again") from error
    said = refusal(loaded)
    if said:
        warn_refusal(find_compiler(), said)
    return loaded


# The header, read ahead

_making = threading.Lock()
_in_vain: set[str] = set()


def _header(folder: Path, compiler: Compiler) -> Path | None:
    """The header as the compiler keeps it, made now where the cache has kernels but not yet this; None without it."""
    key = key_of(f"{AHEAD}\n{header()}", compiler)
    if not _making.acquire(timeout=60):  # it may have been held when this process was forked
        return None
    try:
        found = _lookup(folder, key, AHEAD)
        if found is not None or key in _in_vain or sum(1 for _ in _entries(folder)) < KERNELS:
            return found
        _in_vain.add(key)
        with contextlib.suppress(OSError):
            data = header_ahead(compiler) if shutil.disk_usage(folder).free >= ROOM else None
            if data is not None:
                others = sorted(_entries(folder, AHEAD), key=lambda e: -e.modified)
                for old in others[HEADERS - 1 :]:
                    old.path.unlink(missing_ok=True)
                    (folder / f"{old.key}{AHEAD}").unlink(missing_ok=True)
                made = _keep(folder, key, data, AHEAD)
                _in_vain.discard(key)
                return made
        return None
    finally:
        _making.release()


# The cache


def wanted_folder() -> Path:
    """Where the cache is to lie: ``CASTILE_CACHE_DIR``, else ``~/.cache/castile``; from the root, as compilers run in
    folders of their own, and loaders look for a bare name elsewhere."""
    named = os.environ.get("CASTILE_CACHE_DIR")
    return Path(named).absolute() if named else home() / ".cache" / "castile"


def cache_folder() -> Path | None:
    """The cache's folder, made if need be; None where there is none of ours that only we write to."""
    try:
        folder = wanted_folder()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
            return None
        if status.st_mode & 0o022:
            if status.st_mode & stat.S_ISVTX:  # everybody's, such as /tmp, which must not be closed to them
                return None
            folder.chmod(0o700)
    except OSError:
        return None
    return folder


@cache
def _private_folder_of(process: int) -> Path:
    folder = tempfile.mkdtemp(prefix="castile-")

    def remove() -> None:
        if os.getpid() == process:  # and not in a child that was forked since
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return Path(folder)


def _private_folder() -> Path:
    """A temporary folder of this process, mode 0700, removed at its end."""
    return _private_folder_of(os.getpid())


def _lookup(folder: Path, key: str, suffix: str = SUFFIX) -> Path | None:
    """The sound entry of a key; entries that are not what their names say are removed."""
    with contextlib.suppress(OSError):
        named = os.readlink(folder / f"{key}{suffix}")
        if _is_entry(named, suffix, key) and _sound(folder / named):
            return folder / named
    for entry in _entries(folder, suffix, key):
        if _sound(entry.path):
            _point(entry.path, key)
            return entry.path
        with contextlib.suppress(OSError):
            entry.path.unlink()
    return None


def _sound(path: Path) -> bool:
    """Whether a file is ours alone and holds the bytes that its name promises."""
    data = read_ours(path)
    return data is not None and hashlib.sha256(data).hexdigest() == path.stem.partition("-")[2]


def _keep(folder: Path, key: str, data: bytes, suffix: str = SUFFIX) -> Path:
    """Put what a compiler made into a folder under its final name, whole or not at all."""
    path = folder / f"{key}-{hashlib.sha256(data).hexdigest()}{suffix}"
    write_whole(path, data, 0o700)
    _point(path, key)
    return path


def _point(path: Path, key: str) -> None:
    """Let the key's link name an entry; a folder in which that fails is listed, as before."""
    new = path.parent / f".new-{secrets.token_hex(8)}"
    with contextlib.suppress(OSError):
        new.symlink_to(path.name)
        new.replace(path.parent / f"{key}{path.suffix}")


def _is_entry(name: str, suffix: str, key: str = "") -> bool:
    """Whether a name is that of an entry: what went into it, a dash, what came out."""
    found, dash, content = name.removesuffix(suffix).partition("-")
    return (
        name.startswith(key)
        and name.endswith(suffix)
        and bool(dash)
        and len(found) == len(content) == 64
        and os.sep not in name
    )


def _entries(folder: Path, suffix: str = SUFFIX, key: str = "") -> Iterator[Entry]:
    """The entries of one kind, all or those of one key; of thousands, only these are looked at."""
    try:
        names = [n for n in os.listdir(folder) if n.startswith(key) and _is_entry(n, suffix, key)]
    except OSError:
        return
    for name in sorted(names):
        with contextlib.suppress(OSError):
            status = os.lstat(folder / name)
            yield Entry(folder / name, name.partition("-")[0], status.st_size, status.st_mtime)


def entries() -> tuple[Entry, ...]:
    """The libraries in the cache."""
    folder = cache_folder()
    return () if folder is None else tuple(_entries(folder))


def clear() -> int:
    """Remove every library from the cache, what was remembered of kernels and of the header, and what a killed process
    left half written; how many libraries went."""
    folder = cache_folder()
    if folder is None:
        return 0
    gone = 0
    for entry in tuple(_entries(folder)):
        with contextlib.suppress(OSError):
            entry.path.unlink()
            gone += 1
    for entry in tuple(_entries(folder, AHEAD)):
        with contextlib.suppress(OSError):
            entry.path.unlink()
    for name in os.listdir(folder):
        kept = Path(name)
        if name.startswith(".new-") or (kept.suffix in (".json", SUFFIX, AHEAD) and len(kept.stem) == 64):
            with contextlib.suppress(OSError):
                os.unlink(folder / name)
    return gone
