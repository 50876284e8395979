"""The system's C++ compiler: which it is, what of this machine it builds for, and libraries from C++ text.

Where it does not build for this processor, the library remembers what it said, and whoever loads it is told so.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ..ir.errors import UsageError
from ..ir.machine import cores
from .cpp import FLAGS, header, shares, standalone

CANDIDATES = ("c++", "g++", "clang++")

# Tried in turn: a compiler may lack OpenMP's runtime (Apple's clang) or the name of this machine's CPU. GCC spends a
# third of its time on threading jumps, which kernels hardly have; Clang does not know the word.
NATIVE = "-march=native"
VARIANTS = (
    (NATIVE, "-fopenmp", "-fno-thread-jumps"),
    (NATIVE, "-fopenmp"),
    (NATIVE, "-fopenmp-simd", "-pthread"),
    ("-fopenmp-simd", "-pthread"),
)

# Characters of a translation unit from which on it is not optimised, and the flag for that. Flags of masks within flags
# can make 4 MB of one function, over which GCC sits for more than a quarter of an hour at -O1; at -O0 for 20 s.
LONG, PLAIN = 1 << 19, "-O0"

# The function of a library that tells what the compiler said of NATIVE, in those that were built without.
REFUSED = "castile_refused"


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
        # Running it to ask its version would take longer than a cached kernel does to load. It runs in another folder.
        real = Path(found).resolve()
        status = real.stat()
        return Compiler((os.path.abspath(found), *command[1:]), f"{real} {status.st_size} {status.st_mtime_ns}")
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

    Kernels are shared out among the cores that compile nothing else. ``ahead`` is what `header_ahead` made of the
    header: the compiler takes it where it can. Raises `UsageError` where the compiler fails or cannot be run.
    """
    said = ""
    try:
        with tempfile.TemporaryDirectory(prefix="castile-build-") as folder, _free_cores(source) as most:
            if ahead is not None:
                (Path(folder) / "tile.h").write_text(header(), encoding="utf-8")
                (Path(folder) / "tile.h.gch").symlink_to(ahead)
            units = {f"kernel{n}.cpp": unit for n, unit in enumerate(shares(source, most))}
            for name, unit in units.items():
                text = standalone(unit) if ahead is None else unit
                (Path(folder) / name).write_text(text, encoding="utf-8")
            files = [(*((PLAIN,) if len(unit) > LONG else ()), name) for name, unit in units.items()]
            for variant in VARIANTS:
                if _is_slow(variant):
                    with (Path(folder) / next(iter(units))).open("a", encoding="utf-8") as first:
                        first.write(_refusal(_first_error(said)))
                status, output = _linked(compiler, variant, files, folder)
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


def _is_slow(variant: Sequence[str]) -> bool:
    """Whether kernels are many times slower than they could be here: without the processor's own vectors, on x86. On
    ARM the header's vectors are part of every processor; and who names a processor gets that one."""
    named = any(flag.startswith(("-march=", "-mcpu=")) for flag in (*variant, *more_flags()))
    return not named and platform.machine() not in ("aarch64", "arm64")


def _refusal(said: str) -> str:
    """The function `REFUSED`, as text."""
    text = json.dumps(said.encode("ascii", "replace").decode()[:400])
    return f'\nextern "C" const char* {REFUSED}() {{ return {text}; }}\n'


def refusal(library: ctypes.CDLL) -> str:
    """What the compiler said before it built a library without this processor's vectors; "" where it built it with."""
    function = getattr(library, REFUSED, None)
    if function is None:
        return ""
    function.restype = ctypes.c_char_p
    return str(function().decode())


_refusals: dict[Compiler, str] = {}


def warn_refusal(compiler: Compiler, said: str) -> None:
    """Warn that a compiler does not build for this processor, the first time in this process."""
    if compiler in _refusals:
        return
    _refusals[compiler] = said
    problem = UsageError(
        f"the C++ compiler `{' '.join(compiler.command)}` does not build for this processor: kernels are slow",
        expected=f"a build with {NATIVE}",
        got=said,
        hint="set CXX to a newer g++ or clang++, or have it tried again after `castile cache clear`; what a new"
        " compiler refuses is a fault of castile, please report it",
    )
    warnings.warn(f"castile: {problem}", RuntimeWarning, stacklevel=3)


def refused() -> str:
    """What was warned of in this process, for one that asked it to build; "" if nothing was."""
    return next(iter(_refusals.values()), "")


_cores = threading.Semaphore(cores())


@contextlib.contextmanager
def _free_cores(source: str) -> Iterator[int]:
    """How many compilers may run at once on a translation unit: at least one, and no more than it can be shared out to
    or than there are cores without one of ours."""
    taken = [_cores.acquire(blocking=False) for _ in shares(source, cores())]
    try:
        yield max(1, sum(taken))
    finally:
        for held in taken:
            if held:
                _cores.release()


def _linked(
    compiler: Compiler, variant: Sequence[str], files: Sequence[tuple[str, ...]], folder: str
) -> tuple[int, str]:
    """Make kernel.so of translation units, by a compiler for each: the first status but 0, and what was said.

    ``files`` are their names, each after the flags of its own.
    """
    target = ("-shared", "-o", "kernel.so")
    if len(files) == 1:
        return _run(compiler, variant, (*target, *files[0]), folder)
    with ThreadPoolExecutor(len(files)) as pool:
        done = list(pool.map(lambda file: _run(compiler, variant, ("-c", *file), folder), files))
    failed = next((d for d in done if d[0] != 0), None)
    return failed or _run(compiler, variant, (*target, *(f"{Path(f[-1]).stem}.o" for f in files)), folder)


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
