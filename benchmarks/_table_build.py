"""Building the kernels of a table.

Compiling is what takes long: the header's parse, and the contraction kernels in it that each source makes anew. So the
header is precompiled, and sources share a compilation, a dozen at a time, from which each takes its library. That is
right only where inlining does not tell such a kernel from one compiled alone: `compare` times some of both in turn.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from castile.benchmarks._table import State, digest, printed
from castile.codegen import build
from castile.codegen.compiler import VARIANTS, Compiler, find_compiler, header_ahead, key_of, more_flags
from castile.codegen.cpp import FLAGS, INCLUDE, header, standalone

# Sources that share a compilation, and the cascades whose sources must not: their contraction kernels are specialised
# for the one place that calls them, and in a pack they run 1.2 times as long (`compare`; attention: 0.997).
PACK = 12
ALONE = ("gemm", "gemm_int4", "gemm_bias_gelu", "gemm_nt", "rmsnorm_gemm")


def compile_all(state: State, seconds: float) -> int:
    """Build what was planned for some seconds; how many sources are left."""
    end, left = time.monotonic() + seconds, 0
    compiler = find_compiler()
    done = {row["source"] for row in state.rows("built")}
    with tempfile.TemporaryDirectory() as folder:
        place = precompiled(compiler, Path(folder))
        for w in state.workloads():
            todo = [e for e in w.entries if e.source not in done]
            size = 1 if w.name in ALONE else PACK
            for start in range(0, len(todo), size):
                part = todo[start : start + size]
                if time.monotonic() > end:
                    left += len(part)
                    continue
                began = time.monotonic()
                sources = [printed(w.name, e.mapping, w.shapes) for e in part]
                if any(digest(source) != e.source for source, e in zip(sources, part, strict=True)):
                    sys.exit("castile prints another source than was planned: begin anew, in another --state")
                libraries = _packed(compiler, place, sources)
                took = round((time.monotonic() - began) / len(part), 3)
                for e, source, library in zip(part, sources, libraries, strict=True):
                    if library is not None:
                        build._keep(state.cache(w.name), key_of(standalone(source), compiler), library)
                    done.add(e.source)
                    state.append("built", {"source": e.source, "failed": library is None, "seconds": took})
    print(f"{len(done)} sources built, {left} mappings left")
    return left


def _command(compiler: Compiler) -> list[str]:
    return [*compiler.command, *FLAGS, *VARIANTS[0], *more_flags(), "-shared", "-fPIC"]


def precompiled(compiler: Compiler, folder: Path) -> Path:
    """A folder with the header and, where the compiler can, its precompiled form."""
    (folder / "tile.h").write_text(header(), encoding="utf-8")
    ahead = header_ahead(compiler)
    if ahead is not None:
        (folder / "tile.h.gch").write_bytes(ahead)
    return folder


def built_alone(compiler: Compiler, folder: Path, source: str) -> bytes | None:
    """The library of one source, as castile builds it."""
    (folder / "kernel.cpp").write_text(source, encoding="utf-8")
    command = [*_command(compiler), "kernel.cpp", "-o", "kernel.so"]
    done = subprocess.run(command, cwd=folder, capture_output=True, check=False, timeout=300)
    return (folder / "kernel.so").read_bytes() if done.returncode == 0 else None


def _packed(compiler: Compiler, folder: Path, sources: list[str]) -> list[bytes | None]:
    """The libraries of sources that are compiled as one: each exports the entries of its own."""
    if len(sources) == 1:
        return [built_alone(compiler, folder, sources[0])]
    renamed = [re.sub(r"\bcastile_(\w+)", rf"castile_{i}_\1", s.replace(INCLUDE, "")) for i, s in enumerate(sources)]
    (folder / "pack.cpp").write_text("\n".join([INCLUDE, *renamed]), encoding="utf-8")
    command = [*_command(compiler), "-ffunction-sections", "-c", "pack.cpp", "-o", "pack.o"]
    if subprocess.run(command, cwd=folder, capture_output=True, check=False, timeout=600).returncode:
        return [built_alone(compiler, folder, source) for source in sources]
    return [
        _linked(compiler, folder, i, source) or built_alone(compiler, folder, source)
        for i, source in enumerate(sources)
    ]


def _linked(compiler: Compiler, folder: Path, place: int, source: str) -> bytes | None:
    """The library of one of the sources of a pack."""
    entries = re.findall(r'extern "C"\s+\w+ castile_(\w+)\(', source)
    (folder / "exports").write_text("{ global: " + "".join(f"castile_{e}; " for e in entries) + "local: *; };")
    words = ["--version-script=exports", "--gc-sections"]
    words += [f"--defsym=castile_{e}=castile_{place}_{e}" for e in entries]
    command = [*_command(compiler), "pack.o", "-o", "linked.so", *(f"-Wl,{word}" for word in words)]
    done = subprocess.run(command, cwd=folder, capture_output=True, check=False, timeout=300)
    return (folder / "linked.so").read_bytes() if done.returncode == 0 and entries else None
