"""Generated Triton compiled for GPUs that are not here: what it takes of them, and what is refused."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton")
torch = pytest.importorskip("torch")

import castile  # noqa: E402
from castile.codegen.triton import print_triton, standalone  # noqa: E402
from castile.codegen.triton_build import CudaProgram, compiled_digest, resources  # noqa: E402
from castile.codegen.triton_scope import largest_operation  # noqa: E402
from castile.ir.device import DEVICES  # noqa: E402
from castile.ir.errors import EvaluationError, InputError, UsageError  # noqa: E402
from castile.ir.footprint import tile_shapes  # noqa: E402
from castile.ir.mapping import Mapping  # noqa: E402
from castile.passes.defaults import default_mapping  # noqa: E402
from castile.passes.defaults_gpu import GPU_KNOBS  # noqa: E402
from castile.passes.mapped import mapped, nominal  # noqa: E402
from castile.passes.tile import TileProgram  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
CASCADES = ROOT / "examples" / "cascades"
# What to do where kernels have changed.
AGAIN = "run benchmarks/bench_cross_compile.py and commit its rows"
GPUS = tuple(t for t, d in DEVICES.items() if d.is_gpu)
# Their gradients hold inner reductions of several heads, tables or sequences.
SOME_GRADIENTS = ("attention_mla", "attention_pair_bias", "attention_two_pass", "gemm_int4_tiles", "retnet_parallel")
MATRIX = {"cuda:80": "mma", "cuda:90": "wgmma", "hip:gfx942": "mfma"}


def made(name: str, target: str, **changes: object) -> tuple[TileProgram, Mapping]:
    c = castile.load(CASCADES / f"{name}.cascade")
    extents = nominal(c)
    mapping = default_mapping(c, target, extents)
    if changes:
        mapping = Mapping.from_json({**mapping.to_dict(), **changes})
    return mapped(c, mapping, extents).program, mapping


@pytest.mark.parametrize("target", MATRIX)
@pytest.mark.parametrize("name", ["softmax", "gemm", "attention"])
def test_resources(name: str, target: str) -> None:
    program, mapping = made(name, target)
    found = resources(program, mapping, target)
    assert found.registers > 0
    assert found.spill_bytes == 0
    assert 0 < found.occupancy <= 1
    assert json.loads(json.dumps(found.to_dict()))["kernels"]
    if name != "softmax":
        assert found.instructions[MATRIX[target]] > 0
        assert found.shared_bytes > 0
    else:
        assert found.instructions["mufu"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_source_and_resources_are_known_and_a_call_says_why() -> None:
    c = castile.load(CASCADES / "softmax.cascade")
    k = castile.compile(c, target="cuda:90")
    assert "@triton.jit" in k.source
    assert k.resources.registers > 0
    with pytest.raises(UsageError, match="no GPU"):
        k(X=np.ones((3, 4), "f4"))


def test_tiles_that_cannot_fit_are_refused_before_compiling() -> None:
    program, mapping = made("gemm", "cuda:90", tiles={"m": 2048, "n": 1024, "k": 64})
    with pytest.raises(InputError, match="more elements") as caught:
        print_triton(program, mapping, "cuda:90")
    assert caught.value.rank == "m"
    with pytest.raises(InputError, match="more elements"):
        castile.emit(castile.load(CASCADES / "gemm.cascade"), "cuda:90", None, mapping)
    program, mapping = made("gemm", "cuda:89", tiles={"m": 128, "n": 128, "k": 256}, knobs={"stages": 4})
    with pytest.raises(InputError, match="shared memory") as caught:
        CudaProgram.build(program, mapping, "cuda:89")
    assert "tile rank" in caught.value.hint


def test_what_triton_pads_and_multiplies_out_counts() -> None:
    """Rows of a product are at least 16, and a contraction without columns is a sum over all its products."""
    text = "def f(A: f32[m, k], B: f32[k, n]) -> C:\n    C[m, n] = sum[k](A[m, k] * B[k, n])\n"
    c = castile.parse(text)
    mapping = Mapping(tiles={"m": 4, "n": 512, "k": 512}, knobs=GPU_KNOBS)
    (k,) = mapped(c, mapping, {"m": 4, "n": 512, "k": 512}).kernels
    assert largest_operation(k) == (512 * 512, "n")
    (k,) = mapped(c, Mapping(tiles={"m": 4, "n": 64, "k": 16}, knobs=GPU_KNOBS), {"m": 4, "n": 512, "k": 512}).kernels
    assert largest_operation(k) == (16 * 64, "n")
    scores = castile.load(CASCADES / "attention_monoid.cascade")
    for k in mapped(scores, Mapping(knobs=GPU_KNOBS), nominal(scores)).kernels:
        assert largest_operation(k)[0] >= max(math.prod(s) for s in tile_shapes(k))


@pytest.mark.parametrize("name", SOME_GRADIENTS)
def test_default_mappings_of_gradients_fit(name: str) -> None:
    fit(name, ("interpret", "cuda:90"))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(p.stem for p in CASCADES.glob("*.cascade")))
def test_default_mappings_fit_on_every_architecture(name: str) -> None:
    fit(name, ("interpret", *GPUS))


def fit(name: str, targets: Iterable[str]) -> None:
    """An example and its gradient, at nominal extents, are printed under their default mappings."""
    c = castile.load(CASCADES / f"{name}.cascade")
    kinds = [c]
    with contextlib.suppress(castile.CastileError):
        kinds.append(castile.grad(c))
    for x in kinds:
        extents = nominal(x)
        for target in targets:
            mapping = default_mapping(x, target, extents)
            print_triton(mapped(x, mapping, extents).program, mapping, target)


def test_what_only_the_binary_tells_is_refused_after_compiling() -> None:
    program, mapping = made("gemm", "hip:gfx942", tiles={"m": 128, "n": 128, "k": 64}, knobs={"stages": 2})
    assert resources(program, mapping, "hip:gfx942").shared_bytes <= 65536
    program, mapping = made("gemm", "cuda:89", tiles={"m": 128, "n": 128, "k": 64}, knobs={"stages": 5, "warps": 8})
    with pytest.raises(InputError, match="shared memory"):
        resources(program, mapping, "cuda:89")


def test_targets_without_triton() -> None:
    program, mapping = made("softmax", "cuda:90")
    with pytest.raises(UsageError):
        print_triton(program, mapping, "cpu")
    with pytest.raises(UsageError):
        print_triton(program, mapping, "cuda:1")


def test_compiling_works_beside_the_interpreter() -> None:
    text = f"""
import os
os.environ["TRITON_INTERPRET"] = "1"
import triton, castile, numpy as np
c = castile.load({str(CASCADES / "softmax.cascade")!r})
print(castile.compile(c, target="cuda:80").resources.registers > 0)
print(castile.compile(c, target="interpret")(X=np.zeros((2, 4), "f4")).tolist())
"""
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.split("\n")[:2] == ["True", str([[0.25] * 4] * 2)]


@pytest.mark.parametrize(
    ("name", "changes"),
    [("attention_gqa", {}), ("gemm_int8", {}), ("rope_interleaved", {"tiles": {"t": 16, "h": 16, "d": 64}})],
)
def test_a_standalone_file_compares_itself_with_the_cascade_in_float64(
    name: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    """It needs torch and triton alone; under the interpreter it runs on the CPU."""
    program, mapping = made(name, "interpret", **changes)
    path = tmp_path / "generated.py"
    path.write_text(standalone(program, mapping, "interpret", castile.load(CASCADES / f"{name}.cascade")))
    assert "castile" not in [line.split()[1] for line in path.read_text().split("\n") if line.startswith("import")]
    done = subprocess.run(
        [sys.executable, str(path)],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
        cwd=tmp_path,
        env={"TRITON_INTERPRET": "1", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
    )
    assert "agrees with the cascade in float64" in done.stdout


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_cross", ROOT / "benchmarks" / "bench_cross_compile.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("target", [t for t, d in DEVICES.items() if d.is_gpu])
def test_causal_attention_is_clean_on_every_architecture(bench: ModuleType, target: str) -> None:
    assert not list(bench.faults(bench.row_of("attention_causal", target)))


@pytest.mark.slow
@pytest.mark.parametrize("target", [t for t, d in DEVICES.items() if d.is_gpu])
def test_what_must_be_clean_is_so_on_every_architecture(bench: ModuleType, target: str) -> None:
    names = [p.stem for p in CASCADES.glob("*.cascade") if p.stem.startswith(bench.CLEAN)]
    assert not [text for name in names for text in bench.faults(bench.row_of(name, target))]


def test_the_benchmark_resumes(bench: ModuleType, tmp_path: Path) -> None:
    results = tmp_path / "rows.jsonl"
    assert bench.main(["softmax", "--target", "cuda:90", "--results", str(results)]) == 0
    assert bench.main(["softmax", "--target", "cuda:90", "--results", str(results)]) == 0
    assert len(results.read_text().splitlines()) == 1


def test_the_table_has_every_example_and_nothing_is_wrong_with_it(bench: ModuleType) -> None:
    rows = bench.known(bench.RESULTS)
    assert rows.keys() == {(p.stem, t) for p in CASCADES.glob("*.cascade") for t in bench.GPUS}, AGAIN
    assert not [text for row in rows.values() for text in bench.faults(row)]


@pytest.mark.parametrize("part", range(6))
def test_the_table_is_what_todays_code_gives(bench: ModuleType, part: int) -> None:
    """A sample: each row tells of what it was compiled."""
    rows = list(bench.known(bench.RESULTS).values())
    for row in rows[17 + 29 * part :: 211]:
        mapping, program = bench.made(row["example"], row["target"])
        assert row["mapping"] == mapping.to_dict(), f"{row['example']} on {row['target']}: {AGAIN}"
        assert row["digest"] == compiled_digest(program, mapping, row["target"]), AGAIN


def test_a_digest_stands_for_what_is_compiled_and_not_for_comments() -> None:
    program, mapping = made("softmax", "cuda:90")
    same = replace(program, cascade=replace(program.cascade, doc="Another text."))
    assert compiled_digest(program, mapping, "cuda:90") == compiled_digest(same, mapping, "cuda:90")
    others = [(mapping, "cuda:80"), (Mapping.from_json({**mapping.to_dict(), "knobs": {"warps": 2}}), "cuda:90")]
    digests = {compiled_digest(program, m, target) for m, target in [(mapping, "cuda:90"), *others]}
    assert len(digests) == 3


def test_a_row_of_something_else_is_compiled_again(bench: ModuleType, tmp_path: Path) -> None:
    results = tmp_path / "rows.jsonl"
    row = bench.known(bench.RESULTS)["softmax", "cuda:90"]
    words = ["softmax", "--target", "cuda:90", "--results", str(results)]
    assert bench.main([*words, "--check"]) == 1
    bench.write(results, {("softmax", "cuda:90"): {**row, "digest": "0" * 16, "registers": 0}})
    assert bench.main([*words, "--check"]) == 1
    assert bench.main(words) == 0
    assert bench.known(results)["softmax", "cuda:90"]["registers"] > 0
    assert bench.main([*words, "--check"]) == 0


def test_the_benchmark_tells_what_is_wrong(bench: ModuleType) -> None:
    row = {"example": "gemm", "target": "cuda:90", "spill_bytes": 8, "instructions": {"mma": 3}, "fills": True}
    assert list(bench.faults(row)) == ["gemm on cuda:90 spills 8 bytes", "gemm on cuda:90 has no wgmma"]
    assert list(bench.faults({"example": "x", "target": "cuda:90", "error": "no"})) == ["x on cuda:90: no"]


def test_a_compilation_has_so_many_seconds_and_the_next_one_starts_afresh(monkeypatch: pytest.MonkeyPatch) -> None:
    # A tile that nothing was compiled for: Triton's cache may answer while nobody looks at the clock.
    program, mapping = made("softmax", "cuda:80", tiles={"k": 513 + time.time_ns() % 500})
    monkeypatch.setenv("CASTILE_COMPILE_SECONDS", "1e-9")
    with pytest.raises(EvaluationError, match="took more than"):
        resources(program, mapping, "cuda:80")
    monkeypatch.setenv("CASTILE_COMPILE_SECONDS", "soon")
    with pytest.raises(UsageError, match="no number of seconds"):
        resources(program, mapping, "cuda:80")
    monkeypatch.delenv("CASTILE_COMPILE_SECONDS")
    assert resources(program, mapping, "cuda:80").registers > 0
