"""Tile programs under the NumPy interpreter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from castile.codegen.arguments import param_shape
from castile.codegen.assembly import Program
from castile.ir.evaluate import read_inputs
from castile.ir.interpret import run_kernel
from castile.ir.scalar import array_type


def interpreted(program: Program, inputs: Mapping[str, Any], extents: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Run all kernels of a program; every tensor that they write starts poisoned."""
    c = program.cascade
    arrays = read_inputs(c, inputs)
    written = {p.name: p for k in program.kernels for p in k.tensors if p.name in k.outputs}
    # How many pieces there are is known of scratch tensors, not of what a kernel writes.
    written |= {p.name: p for p in program.scratch}
    for p in written.values():
        held = array_type(p.dtype)
        arrays[p.name] = np.full(param_shape(p, extents), np.nan if held is np.float64 else 1, held)
    for kernel in program.kernels:
        run_kernel(kernel, arrays, extents)
    return {o: arrays[o] for o in c.outputs}
