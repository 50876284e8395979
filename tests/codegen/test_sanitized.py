"""Emitted C++ as a program of its own under AddressSanitizer, UBSan and LeakSanitizer: no fault and no leak.

`make sanitize` takes more of the suite so, inside Python, where leaks cannot be told from the interpreter's.
"""

from __future__ import annotations

import platform
import subprocess
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import test_cpp
import test_examples_cpu
import test_vectors
from foreign import Foreign, Machine
from judged import within_bound

from castile.ir.extents import resolve
from castile.passes.defaults import default_mapping
from castile.passes.mapped import mapped

CHECKS = ("-O1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
NATIVE = Machine("c++", ("-march=native", "-fopenmp", *CHECKS))
AVX2 = Machine("c++", ("-march=haswell", "-fopenmp", *CHECKS))

DRAWN = ("gemm_int4", "logsumexp_monoid", "conv2d_same")


@cache
def why_not(folder: Path) -> str:
    """What keeps a program under the sanitizers from running here; "" if nothing does."""
    source, made = folder / "none.cpp", folder / "none"
    source.write_text("int main() { return 0; }\n")
    for command in ([NATIVE.compiler, *NATIVE.flags, str(source), "-o", str(made)], [str(made)]):
        try:
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        except OSError as error:
            return str(error)
        if done.returncode:
            return done.stdout[:200]
    return ""


@pytest.fixture(autouse=True)
def sanitizers(tmp_path_factory: pytest.TempPathFactory) -> None:
    reason = why_not(tmp_path_factory.getbasetemp())
    if reason:
        pytest.skip(f"no sanitizers here: {reason}")


@pytest.mark.parametrize("machine", [NATIVE, AVX2], ids=["native", "avx2"])
@pytest.mark.parametrize(("name", "dtype"), [("gemm", "bf16"), ("rmsnorm_gemm", "f32"), ("softmax", "f32")])
def test_default_mappings(name: str, dtype: str, machine: Machine, tmp_path: Path) -> None:
    if machine is AVX2 and platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("AVX2 is of x86-64")
    c = test_vectors.cascade(name, dtype)
    given = test_vectors.inputs(c, test_vectors.SIZES[name])
    got = Foreign(machine, test_vectors.program(name, dtype).program, tmp_path)(**given)
    within_bound(c, given, got)


@pytest.mark.parametrize("name", DRAWN)
def test_some_examples(name: str, tmp_path: Path) -> None:
    c, given = test_examples_cpu.drawn(name)
    extents = resolve(c, {}, {n: np.shape(x) for n, x in given.items()})
    got = Foreign(NATIVE, mapped(c, default_mapping(c, "cpu", extents), extents).program, tmp_path)(**given)
    within_bound(c, given, got)


def test_data_as_indices(tmp_path: Path) -> None:
    test_cpp.test_gather({"gather": Foreign(NATIVE, test_cpp.A["gather"], tmp_path)})  # type: ignore[dict-item]
