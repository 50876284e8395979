"""A worker whose kernels go wrong, each in the way that its mapping names by the tile of `n`."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import subprocess
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from castile.autotune.worker import main
from castile.ir.cascade import Cascade
from castile.ir.mapping import Mapping as Tuned

# The tile of `n` -> what goes wrong. Tiles that are not here are right, and the faster the larger.
FAULTS = {
    101: "crash",
    102: "hang",
    103: "memory",
    104: "overrun",
    105: "wrong",
    106: "wavering",
    107: "compile_error",
    108: "compile_timeout",
    109: "far overrun",
    110: "exits",
    111: "unwritten",
    112: "not a number",
    113: "aborts",
    114: "eats slowly",
    115: "changes its input",
    116: "reads past its input",
    117: "compiler eats memory",
    118: "maps too much",
}


def build(c: Cascade, mapping: Tuned, extents: Mapping[str, int], target: str) -> Callable[..., Any]:
    fault = FAULTS.get(mapping.tiles.get("n", 0), "")
    if fault == "compile_error":
        raise RuntimeError("the compiler does not like it")
    if fault == "compile_timeout":
        subprocess.run(["sleep", "60"], check=True)
    if fault == "compiler eats memory":
        np.ones(1 << 36, np.uint8)
    runs = itertools.count()
    kept: list[Any] = []
    pause = 2e-3 if not mapping.tiles.get("n") else 2e-2 / mapping.tiles["n"]

    def kernel(X: Any, out: Any) -> None:
        time.sleep(pause)
        e = np.exp(X - X.max(axis=1, keepdims=True))
        np.divide(e, e.sum(axis=1, keepdims=True), out=out)
        address = out.__array_interface__["data"][0]
        match fault:
            case "crash":
                ctypes.memset(8, 0, 1)
            case "hang":
                time.sleep(60)
            case "memory":
                np.ones(1 << 45, np.uint8)
            case "maps too much":
                mmap.mmap(-1, 1 << 45)
            case "eats slowly":
                while True:
                    kept.append(np.empty(1 << 24, np.uint8))
            case "changes its input":
                ctypes.memset(X.__array_interface__["data"][0], 0, 1)
            case "reads past its input":
                ctypes.string_at(X.__array_interface__["data"][0] + X.nbytes, 1)
            case "overrun":
                ctypes.memset(address + out.nbytes, 0, 1)
            case "far overrun":
                ctypes.memset(address - 1, 0, 1)
            case "wrong":
                out[-1, -1] *= 1.001
            case "wavering":
                out[0, 0] *= 1 + 2e-7 * (next(runs) % 2)
            case "exits":
                os._exit(3)
            case "aborts":
                os.abort()
            case "unwritten":
                out[0, 0] = np.frombuffer(b"\x3c\x3c\x3c\x3c", np.float32)[0]
            case "not a number":
                out[0, 0] = np.nan

    return kernel


if __name__ == "__main__":
    main(build)
