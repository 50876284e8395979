"""Emitted C++ as a program of its own: built for any processor, run there or under an emulator, results read back.

Each array ends at a page that nobody may touch, so what reads or writes past one does not go unseen.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from castile.codegen.assembly import Program
from castile.codegen.cpp import FLAGS
from castile.codegen.names import safe
from castile.codegen.standalone import standalone_cpp
from castile.ir.dtypes import numpy_dtype
from castile.ir.errors import InputError
from castile.ir.extents import given_ranks, resolve, shape_of

# argv[1] holds the bytes of each array and the extents as int64, then the inputs' bytes; the outputs go to argv[2].
MAIN = """
#include <cstdio>
#include <sys/mman.h>
#include <unistd.h>

namespace {
struct Buffer {
  char* at;
  size_t bytes;
  template <class T>
  operator T*() const { return reinterpret_cast<T*>(at); }
  template <class T>
  operator T() const { T x; std::memcpy(&x, at, sizeof x); return x; }
};

Buffer buffer(size_t bytes) {
  const size_t page = size_t(sysconf(_SC_PAGESIZE)), whole = (bytes + page - 1) / page * page;
  void* const got = mmap(nullptr, whole + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (got == MAP_FAILED || mprotect(static_cast<char*>(got) + whole, page, PROT_NONE) != 0) std::abort();
  std::memset(got, 0xff, whole);
  return {static_cast<char*>(got) + whole - bytes, bytes};
}
}  // namespace

int main(int, char** argv) {
  std::FILE* const in = std::fopen(argv[1], "rb");
  int64_t words[ARRAYS + EXTENTS + 1] = {};
  if (std::fread(words, 8, ARRAYS + EXTENTS, in) != ARRAYS + EXTENTS) return 1;
  Buffer b[ARRAYS];
  for (int i = 0; i < ARRAYS; ++i) {
    b[i] = buffer(size_t(words[i]));
    if (i < INPUTS && std::fread(b[i].at, 1, b[i].bytes, in) != b[i].bytes) return 1;
  }
  const int64_t* const e = words + ARRAYS;
  (void)e;
  const int64_t status = CALL;
  std::FILE* const out = std::fopen(argv[2], "wb");
  std::fwrite(&status, 8, 1, out);
  for (int i = INPUTS; i < ARRAYS; ++i) std::fwrite(b[i].at, 1, b[i].bytes, out);
  return std::fclose(out);
}
"""


@dataclass(frozen=True)
class Machine:
    """A compiler with its flags, and the command before a program that runs it; none where it runs as it is."""

    compiler: str
    flags: tuple[str, ...]
    emulator: tuple[str, ...] = ()

    @property
    def lacks(self) -> str:
        """The first command that is not installed; "" if all are."""
        return next((x for x in (self.compiler, *self.emulator[:1]) if shutil.which(x) is None), "")


# Static, so that the emulator needs no library of the other system; what is not inlined would be a call.
NEON = Machine("aarch64-linux-gnu-g++", ("-static", "-fopenmp"), ("qemu-aarch64",))


class Foreign:
    """A program for another machine, called as a compiled one is: with NumPy arrays by name.

    Raises `AssertionError` with what was said where it does not build or run.
    """

    def __init__(self, machine: Machine, program: Program, folder: Path, threads: int = 2) -> None:
        c = program.cascade
        written = {p.name: p for k in program.kernels for p in k.tensors if p.name in k.outputs}
        self.cascade, self.machine = c, machine
        self.params, self.outputs = c.params, tuple(written[name] for name in c.outputs)
        self.free = given_ranks(c)
        count = len(self.params) + len(self.outputs)
        words = [f"b[{i}]" for i in range(count)] + [f"e[{i}]" for i in range(len(self.free))]
        main = MAIN.replace("INPUTS", str(len(self.params))).replace("ARRAYS", str(count))
        main = main.replace("EXTENTS", str(len(self.free)))
        main = main.replace("CALL", f"{safe(c.name)}({', '.join([*words, str(threads)])})")
        folder.mkdir(parents=True, exist_ok=True)
        self.files = [folder / name for name in ("program", "in", "out")]
        source = folder / "program.cpp"
        source.write_text(standalone_cpp(program) + main, encoding="utf-8")
        _done([machine.compiler, *FLAGS, *machine.flags, str(source), "-o", str(self.files[0])])

    def __call__(self, **inputs: Any) -> Any:
        c = self.cascade
        arrays = [np.ascontiguousarray(inputs[p.name], numpy_dtype(p.dtype)) for p in c.params]
        extents = resolve(c, {}, {p.name: np.shape(inputs[p.name]) for p in c.params})
        outputs = [np.empty(shape_of(c, p.name, extents), numpy_dtype(p.dtype)) for p in self.outputs]
        words = [*(x.nbytes for x in (*arrays, *outputs)), *(extents[r] for r in self.free)]
        program, given, got = self.files
        given.write_bytes(np.array(words, np.int64).tobytes() + b"".join(x.tobytes() for x in arrays))
        _done([*self.machine.emulator, *map(str, (program, given, got))])
        data = got.read_bytes()
        status = int(np.frombuffer(data[:8], np.int64)[0])
        if status:
            raise InputError(f"an index that was read from data lies outside `{c.params[status - 1].name}`")
        results, at = [], 8
        for x in outputs:
            results.append(np.frombuffer(data[at : at + x.nbytes], x.dtype).reshape(x.shape))
            at += x.nbytes
        return results[0] if len(results) == 1 else tuple(results)


def _done(command: Sequence[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0, f"{command[0]} gives {done.returncode}: {done.stdout[-2000:]}"
