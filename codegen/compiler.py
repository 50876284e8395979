"""The system's C++ compiler: which it is, what of this machine it builds for, and libraries from C++ text."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ..ir.errors import UsageError
from .cpp import FLAGS, header, standalone

CANDIDATES = ("c++", "g++", "clang++")

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
    """The key of what is built here from a text that includes nothing of ours, 64 hex digits."""
    flags = (*FLAGS, *more_flags(), *(" ".join(v) for v in VARIANTS))
    parts = [source, compiler.identity, *compiler.command, *flags, cpu_identity()]
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogateescape")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


# Compiling


def library(source: str, compiler: Compiler, ahead: Path | None = None) -> bytes:
    """The bytes of the library made from a printed translation unit; nothing is left behind.

    ``ahead`` is what `header_ahead` made of the header: the compiler takes it where it can. Raises `UsageError` where
    the compiler fails or cannot be run.
    """
    said = ""
    try:
        with tempfile.TemporaryDirectory(prefix="castile-build-") as folder:
            if ahead is not None:
                (Path(folder) / "tile.h").write_text(header(), encoding="utf-8")
                (Path(folder) / "tile.h.gch").symlink_to(ahead)
            text = standalone(source) if ahead is None else source
            (Path(folder) / "kernel.cpp").write_text(text, encoding="utf-8")
            for variant in VARIANTS:
                status, output = _run(compiler, variant, ("-shared", "kernel.cpp", "-o", "kernel.so"), folder)
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


def header_ahead(compiler: Compiler) -> bytes | None:
    """The header as GCC keeps it when it has read it, tens of megabytes; None where that is not to be had.

    GCC takes it only for the flags that it was made with, and reads the header itself otherwise.
    """
    with contextlib.suppress(OSError), tempfile.TemporaryDirectory(prefix="castile-build-") as folder:
        status, told = _run(compiler, (), ("--version",), folder)
        if status != 0 or "clang" in told:  # which has another way
            return None
        (Path(folder) / "tile.h").write_text(header(), encoding="utf-8")
        status, _ = _run(compiler, VARIANTS[0], ("-x", "c++-header", "tile.h", "-o", "tile.h.gch"), folder)
        if status == 0:
            return (Path(folder) / "tile.h.gch").read_bytes()
    return None


def _run(compiler: Compiler, variant: Sequence[str], what: Sequence[str], folder: str) -> tuple[int, str]:
    done = subprocess.run(
        [*compiler.command, *FLAGS, *variant, *more_flags(), "-fPIC", *what],
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
