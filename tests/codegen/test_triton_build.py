"""Generated Triton compiled for GPUs that are not here: what it takes of them, and what is refused."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton")
torch = pytest.importorskip("torch")

from judged import within_bound  # noqa: E402

import castile  # noqa: E402
from castile.codegen.triton import fits_grid, print_triton, standalone  # noqa: E402
from castile.codegen.triton_build import CudaProgram, _asked, compiled_digest, resources  # noqa: E402
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


def test_more_tiles_than_a_launch_takes_are_refused() -> None:
    program, _ = made("softmax", "cuda:90")
    (k,) = program.kernels
    assert [g.rank for g in k.grid] == ["n"]
    rows = k.grid[0].size
    fits_grid((k,), {"n": rows * ((1 << 31) - 1), "k": 8})
    with pytest.raises(InputError, match="more tiles than a GPU takes") as error:
        fits_grid((k,), {"n": rows << 31, "k": 8})
    assert error.value.rank == "n"
    assert str(1 << 31) in str(error.value)


def test_strict_numerics_fuse_no_operations_and_others_say_so() -> None:
    for numerics, fused in (("strict", False), ("standard", True), ("fast", True)):
        c = replace(castile.load(CASCADES / "softmax.cascade"), numerics=numerics)
        mapping = default_mapping(c, "cuda:90", nominal(c))
        program = mapped(c, mapping, nominal(c)).program
        assert f"enable_fp_fusion={fused}," in print_triton(program, mapping, "cuda:90")
        found = {row["options"].get("enable_fp_fusion", True) for row in _asked(program, mapping, "cuda:90")[1]}
        assert found == {fused}


def test_a_kernel_that_cannot_be_shared_out_is_tried_once() -> None:
    """The launch of a module with a kernel that is told to refuse; it runs each time all the same."""
    program, mapping = made("gemm", "cuda:90", knobs={"descriptors": 1, "specialize": 1, "warps": 4})
    found: dict[str, Any] = {}
    text = print_triton(program, mapping, "cuda:90")
    exec(text[text.index("unshared = set()") :], found)  # the module's functions for the host
    asked: list[bool] = []

    def kernel(*_: object, SPECIALIZE: bool, **others: object) -> None:
        asked.append(SPECIALIZE)
        if SPECIALIZE:
            raise RuntimeError("no")

    (name,) = (k for k in found["launch"].__code__.co_names if k.endswith("_kernel"))
    found |= {"torch": torch, name: type("K", (), {"__getitem__": lambda self, grid: kernel})()}
    found |= {"described": lambda *_: None, "triton": importlib.import_module("triton")}
    found["tl"] = found["triton"].language
    for n in (256, 256, 257, 257):
        x = torch.zeros(n, n, dtype=torch.bfloat16)
        found["launch"](x, x, x, n, n, n)
    assert asked == [True, False, False, True, False, False]


def test_arguments_may_have_the_names_of_helpers() -> None:
    c = castile.parse("def f(sigmoid_exact: f32[n], reduce_max: f32[n]) -> Y:\n    Y[n] = sigmoid(sigmoid_exact[n])\n")
    x = np.linspace(-40, 9, 50, dtype="f4")
    kernel = castile.compile(c, "interpret", {"n": 50})
    within_bound(c, {"sigmoid_exact": x, "reduce_max": x}, kernel(sigmoid_exact=x, reduce_max=x))


def test_the_exponential_of_a_sigmoid_is_exact_where_its_argument_is() -> None:
    """Triton's own loses as many bits as its argument has before the point."""
    for e, helper in {"X[n]": "sigmoid_exact(", "X[n] * 3.0": "sigmoid("}.items():
        c = castile.parse(f"def f(X: f32[n]) -> Y:\n    Y[n] = sigmoid({e})\n")
        _, body = castile.compile(c, "cuda:90", {"n": 64}).source.split("_kernel(", 1)
        assert helper in body


class Stub:
    """Stands for a compiled kernel: keeps what it is started with."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda *given, **_: self.calls.append(given)


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[castile.Kernel, dict[str, int]], Stub]:
    """What runs a kernel for a GPU that is not here: all but Triton's own work, on tensors of the CPU."""
    monkeypatch.setattr(CudaProgram, "_here", lambda self, x: True)
    monkeypatch.setattr("castile.codegen.triton_build._torch", lambda target: torch)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())

    def stubbed(kernel: castile.Kernel, extents: dict[str, int]) -> Stub:
        runner: Any = kernel.runner(extents)
        names = [n for n in runner._launch.__globals__ if n.endswith("_kernel")]
        runner._launch.__globals__.update(dict.fromkeys(names, stub := Stub()))
        return stub

    return stubbed


def test_a_call_like_the_last_is_not_looked_at_again(
    on_a_gpu: Callable[..., Stub], monkeypatch: pytest.MonkeyPatch
) -> None:
    c = castile.parse("def f(X: f32[n, k], s: f32) -> Y:\n    Y[n] = s * sum[k](X[n, k])\n")
    k = castile.compile(c, "cuda:90", {"n": 8, "k": 16})
    stub = on_a_gpu(k, {"n": 8, "k": 16})
    looked: list[int] = []
    fitted = CudaProgram._fitted
    monkeypatch.setattr(CudaProgram, "_fitted", lambda *given: looked.append(1) or fitted(*given))
    x, other = torch.zeros(8, 16), torch.ones(8, 16)
    first = k(X=x, s=2.0)
    again = k(X=other, s=3.0)
    assert (again.shape, again.dtype) == (first.shape, first.dtype) == ((8,), torch.float32)
    assert again.data_ptr() != first.data_ptr()
    assert len(looked) == 1
    assert stub.calls[-1][0] is other
    assert [a for a in stub.calls[-1] if isinstance(a, float)] == [3.0]
    # Another layout, type, place of what is written, kind of array or number of outputs is looked at.
    y = torch.empty(8)
    assert k(X=x, s=2.0, out=y) is y
    assert k(X=x, s=2.0, out=y) is y
    assert len(looked) == 2
    assert k(X=x, s=2.0, out=y[:]) is not None
    assert len(looked) == 2
    with pytest.raises(InputError, match="overlaps"):
        k(X=x, s=2.0, out=x[0, :8])
    with pytest.raises(InputError, match="overlaps"):
        k(X=other, s=2.0, out=other[:, 0])
    k(X=x, s=2.0)
    for wrong, text in ((x.double(), "is torch.float64"), (None, "no array")):
        with pytest.raises(InputError, match=text):
            k(X=wrong, s=2.0)
    with pytest.raises(InputError, match="`out` holds 0 arrays"):
        k(X=x, s=2.0, out=())
    with pytest.raises(InputError, match="missing"):
        k(X=x)
    count = len(looked)
    k(X=torch.zeros(16, 8).t(), s=2.0)
    assert len(looked) == count + 1
    with pytest.raises(InputError, match="no number"):
        k(X=x, s=x)


def test_an_index_outside_is_told_by_each_call(on_a_gpu: Callable[..., Stub]) -> None:
    c = castile.parse("def f(X: f32[n], i: i32[m]) -> Y:\n    Y[m] = X[i[m]]\n")
    k = castile.compile(c, "cuda:90", {"n": 8, "m": 4})
    on_a_gpu(k, {"n": 8, "m": 4})
    given = {"X": torch.zeros(8), "i": torch.zeros(4, dtype=torch.int32)}
    k(**given)
    runner: Any = k.runner({"n": 8, "m": 4})

    def fault(*given: Any, **_: object) -> None:
        next(x for x in given if torch.is_tensor(x) and x.dtype == torch.int32 and x.ndim == 1 and len(x) == 1)[0] = 1

    names = [n for n in runner._launch.__globals__ if n.endswith("_kernel")]
    runner._launch.__globals__.update({n: type("K", (), {"__getitem__": lambda s, g: fault})() for n in names})
    for _ in range(2):
        with pytest.raises(InputError, match="lies outside `X`"):
            k(**given)
