"""The C++ target on NEON: emitted programs, cross-compiled and run under an emulator, agree with the oracle.

A sample; `test_neon_all` has every example and every operation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_cpp
import test_cpp_values
import test_examples_cpu
import test_vectors
from foreign import NEON, Foreign
from judged import within_bound

from castile.ir.extents import resolve
from castile.passes.defaults import default_mapping
from castile.passes.mapped import mapped

pytestmark = pytest.mark.skipif(
    bool(NEON.lacks), reason=f"{NEON.lacks} is not installed (Debian: apt install g++-aarch64-linux-gnu qemu-user)"
)

DRAWN = ("gemm_int4", "gemm_mxfp8", "conv1d_causal", "attention_decode_paged", "rope_interleaved", "logsumexp_monoid")


class Library(Mapping[str, Foreign]):
    """The programs of `test_cpp` and `test_cpp_values` by name, each built when it is asked for."""

    written = test_cpp.A | test_cpp_values.A

    def __init__(self, folder: Path) -> None:
        self.made = cache(lambda name: Foreign(NEON, self.written[name], folder / name.replace(" ", "_")))

    def __getitem__(self, name: str) -> Foreign:
        return self.made(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.written)

    def __len__(self) -> int:
        return len(self.written)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return Library(tmp_path_factory.mktemp("neon"))


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
@pytest.mark.parametrize("name", test_vectors.NAMES)
def test_default_mappings(name: str, dtype: str, tmp_path: Path) -> None:
    c = test_vectors.cascade(name, dtype)
    if dtype != "f32" and c == test_vectors.cascade(name, "f32"):
        pytest.skip("has no 16-bit form")
    program = Foreign(NEON, test_vectors.program(name, dtype).program, tmp_path)
    given = test_vectors.inputs(c, test_vectors.SIZES[name])
    within_bound(c, given, program(**given))


def example(name: str, tmp_path: Path) -> None:
    """An example as it is mapped where nothing was tuned."""
    c, inputs = test_examples_cpu.drawn(name)
    extents = resolve(c, {}, {n: np.shape(x) for n, x in inputs.items()})
    program = Foreign(NEON, mapped(c, default_mapping(c, "cpu", extents), extents).program, tmp_path)
    within_bound(c, inputs, program(**inputs))


@pytest.mark.parametrize("name", DRAWN)
def test_some_examples(name: str, tmp_path: Path) -> None:
    example(name, tmp_path)


def test_operations(run: Any) -> None:
    """Operands of a dot, a function in vectors and one with a branch, rounding both ways, words that wrap, folds."""
    test_cpp.test_gemm(run, "gemm bf16", 14, 131, 65)
    test_cpp.test_a_zero_of_the_left_annihilates(run, "f32")
    test_cpp.test_a_zero_of_the_left_annihilates(run, "bf16")
    test_cpp.test_folds(run)
    test_cpp.test_gather(run)
    test_cpp_values.test_functions(run, "exp", "f32")
    test_cpp_values.test_functions(run, "sin", "f32")
    test_cpp_values.test_casts(run, "f32")
    test_cpp_values.test_casts(run, "f16")
    test_cpp_values.test_integers(run, "far", "i32")
