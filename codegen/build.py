"""From C++ text to a loaded library: the system's compiler, and a cache of what it made.

An entry of the cache is one file, named by the key of what went into it and by the hash of its own bytes, put there by
an atomic rename. Before one is loaded, it must be a plain file of ours with the bytes that its name promises, in a
folder of ours that nobody else can enter; anything else is left alone or built again. Where no such folder can be
had, or written to, libraries live in a temporary folder of this process.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ..ir.errors import UsageError
from .cpp import FLAGS

CANDIDATES = ("c++", "g++", "clang++")
SUFFIX = ".so"

# Tried in turn: a compiler may lack OpenMP's runtime (Apple's clang) or the name of this machine's CPU. GCC spends a
# third of its time on threading jumps, which kernels hardly have; Clang does not know the word.
VARIANTS = (
    ("-march=native", "-fopenmp", "-fno-thread-jumps"),
    ("-march=native", "-fopenmp"),
    ("-march=native", "-fopenmp-simd", "-pthread"),
    ("-fopenmp-simd", "-pthread"),
)


@dataclass(frozen=True, slots=True)
class Compiler:
    """A C++ compiler: how it is called, and what tells it from another one of the same name."""

    command: tuple[str, ...]
    identity: str


@dataclass(frozen=True, slots=True)
class Entry:
    """One library of the cache."""

    path: Path
    key: str
    bytes: int
    modified: float


def find_compiler() -> Compiler:
    """The compiler that ``CXX`` names, else the first of c++, g++ and clang++ on the path.

    Raises `UsageError` when there is none.
    """
    named = os.environ.get("CXX", "").strip()
    return _find_compiler(named, os.environ.get("PATH", ""))


@cache
def _find_compiler(named: str, path: str) -> Compiler:
    try:
        words = shlex.split(named)
    except ValueError:
        words = [named]
    for command in [words] if words else [[name] for name in CANDIDATES]:
        found = shutil.which(command[0], path=path)
        if found is None:
            continue
        # Running it to ask its version would take longer than a cached kernel does to load.
        real = Path(found).resolve()
        status = real.stat()
        return Compiler((found, *command[1:]), f"{real} {status.st_size} {status.st_mtime_ns}")
    raise UsageError(
        f"`CXX` names no program: {named}" if named else "there is no C++ compiler",
        expected="a C++17 compiler",
        got=named or f"none of {', '.join(CANDIDATES)} on the path",
        hint="install one (Debian: apt install g++; macOS: xcode-select --install), or set CXX",
    )


@cache
def cpu_identity() -> str:
    """What ``-march=native`` means here: the CPU's features as the system tells them."""
    words = [platform.system(), platform.machine()]
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
        wanted = ("flags", "features", "model name", "cpu part", "isa")
        for line in lines:
            if not line.strip():
                break  # the first core speaks for all
            if line.split(":")[0].strip().lower() in wanted:
                words.append(line.strip())
    if len(words) == 2:
        words.append(platform.processor())  # runs a program to find out
    return "\n".join(words)


def more_flags() -> tuple[str, ...]:
    """What ``CASTILE_CXXFLAGS`` adds to every build: sanitizers, another ``-march``."""
    try:
        return tuple(shlex.split(os.environ.get("CASTILE_CXXFLAGS", "")))
    except ValueError as error:
        raise UsageError(f"`CASTILE_CXXFLAGS` is no list of words: {error}") from error


def key_of(source: str, compiler: Compiler) -> str:
    """The key of what is built from a source here, 64 hex digits."""
    flags = (*FLAGS, *more_flags(), *(" ".join(v) for v in VARIANTS))
    parts = [source, compiler.identity, *compiler.command, *flags, cpu_identity()]
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogateescape")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def build(source: str) -> Path:
    """The path of the library made from a self-contained C++ text: from the cache, else compiled now.

    Raises `UsageError` when there is no compiler or it fails.
    """
    compiler = find_compiler()
    key = key_of(source, compiler)
    folder = cache_folder()
    if folder is not None:
        found = _lookup(folder, key)
        if found is not None:
            return found
    data = _compile(source, compiler)
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
    """The library made from a C++ text, loaded."""
    path = build(source)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise UsageError(f"a compiled kernel does not load: {error}", hint=f"remove {path} and try again") from error


# The compiler


def _compile(source: str, compiler: Compiler) -> bytes:
    """The bytes of the library; nothing is left behind."""
    said = ""
    try:
        with tempfile.TemporaryDirectory(prefix="castile-build-") as folder:
            (Path(folder) / "kernel.cpp").write_text(source, encoding="utf-8")
            for variant in VARIANTS:
                status, output = _run(compiler, variant, folder)
                made = Path(folder) / "kernel.so"
                if status == 0 and made.is_file():
                    return made.read_bytes()
                if status < 0:
                    raise UsageError(
                        f"the C++ compiler was killed by signal {-status}", hint="is memory short? then try again"
                    )
                said = output or said
    except OSError as error:
        raise UsageError(
            f"the C++ compiler cannot be run: {error}", hint="is there space in the temporary folder?"
        ) from error
    raise UsageError(
        f"the C++ compiler `{' '.join(compiler.command)}` fails: {_first_error(said)}",
        hint="set CXX to a C++17 compiler, such as g++ 9 or clang++ 10; a kernel that it refuses is a fault of castile",
    )


def _run(compiler: Compiler, variant: Sequence[str], folder: str) -> tuple[int, str]:
    command = [*compiler.command, *FLAGS, *variant, *more_flags(), "-shared", "-fPIC", "kernel.cpp", "-o", "kernel.so"]
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "LC_ALL": "C"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    return done.returncode, done.stdout


def _first_error(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line), lines[0] if lines else "it says nothing")


# The cache


def wanted_folder() -> Path:
    """Where the cache is to lie: ``CASTILE_CACHE_DIR``, else ``~/.cache/castile``."""
    named = os.environ.get("CASTILE_CACHE_DIR")
    return Path(named) if named else Path(os.path.expanduser("~")) / ".cache" / "castile"


def cache_folder() -> Path | None:
    """The cache's folder, made if need be; None where there is none that is ours alone."""
    folder = wanted_folder()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
            return None
        if status.st_mode & 0o077:
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


def _lookup(folder: Path, key: str) -> Path | None:
    """The sound entry of a key; entries that are not what their names say are removed."""
    for entry in _entries(folder):
        if entry.key == key:
            if _sound(entry.path):
                return entry.path
            with contextlib.suppress(OSError):
                entry.path.unlink()
    return None


def _sound(path: Path) -> bool:
    """Whether a file is plain, ours, written by nobody else, and holds the bytes that its name promises."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
                return False
            return hashlib.sha256(file.read()).hexdigest() == path.name.removesuffix(SUFFIX).partition("-")[2]
    except OSError:
        return False


def _keep(folder: Path, key: str, data: bytes) -> Path:
    """Put a library into a folder under its final name, whole or not at all."""
    path = folder / f"{key}-{hashlib.sha256(data).hexdigest()}{SUFFIX}"
    handle, name = tempfile.mkstemp(prefix=".new-", dir=folder)
    try:
        with open(handle, "wb") as file:
            file.write(data)
        os.chmod(name, 0o700)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
    return path


def _entries(folder: Path) -> Iterator[Entry]:
    try:
        found = sorted(os.scandir(folder), key=lambda e: e.name)
    except OSError:
        return
    for item in found:
        key, dash, content = item.name.removesuffix(SUFFIX).partition("-")
        if item.name.endswith(SUFFIX) and dash and len(key) == len(content) == 64:
            with contextlib.suppress(OSError):
                status = item.stat(follow_symlinks=False)
                yield Entry(Path(item.path), key, status.st_size, status.st_mtime)


def entries() -> tuple[Entry, ...]:
    """The libraries in the cache."""
    folder = cache_folder()
    return () if folder is None else tuple(_entries(folder))


def clear() -> int:
    """Remove every library from the cache, what was remembered of kernels, and what a killed process left half written;
    how many libraries went."""
    folder = cache_folder()
    if folder is None:
        return 0
    gone = 0
    for entry in tuple(_entries(folder)):
        with contextlib.suppress(OSError):
            entry.path.unlink()
            gone += 1
    for name in os.listdir(folder):
        if name.startswith(".new-") or (name.endswith(".json") and len(name) == 69):
            with contextlib.suppress(OSError):
                os.unlink(folder / name)
    return gone
