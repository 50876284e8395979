"""Knobs of GPUs: under the interpreter each leaves the result as it is, and the compiled binaries show what it does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from judged import within_bound

pytest.importorskip("triton")
pytest.importorskip("torch")

import castile
from castile.autotune.space import space_of
from castile.codegen.triton import print_triton
from castile.codegen.triton_build import Resources, resources
from castile.ir.device import device_of
from castile.ir.dtypes import numpy_dtype
from castile.ir.extents import resolve, shape_of
from castile.ir.footprint import heaviest_last
from castile.ir.mapping import Mapping
from castile.passes.defaults import default_mapping
from castile.passes.mapped import mapped, nominal

CASCADES = Path(__file__).resolve().parents[2] / "examples" / "cascades"
SIZES = {
    "gemm": {"m": 70, "n": 37, "k": 40},
    "gemm_int8": {"m": 40, "n": 37, "k": 70},
    "attention_causal": {"b": 1, "h": 2, "q": 70, "k": 67, "d": 16, "f": 16},
    "attention_gqa": {"b": 1, "h": 8, "q": 3, "k": 40, "d": 16, "f": 16},
    "softmax": {"n": 5, "k": 70},
}
# So many programs that no loop is cut in pieces.
MANY = {"b": 16, "h": 16, "q": 2048, "k": 2048, "d": 64, "f": 64}
TILES = {
    "gemm": {"m": 16, "n": 16, "k": 16},
    "gemm_int8": {"m": 16, "n": 16, "k": 32},
    "attention_causal": {"q": 32, "k": 16},
    "attention_gqa": {"h": 4, "q": 1, "k": 16},
    "softmax": {"n": 2, "k": 16},
}


def example(name: str) -> castile.Cascade:
    return castile.load(CASCADES / f"{name}.cascade")


def changed(c: castile.Cascade, target: str, extents: dict[str, int], tiles: dict[str, int], **knobs: int) -> Mapping:
    usual = default_mapping(c, target, extents)
    return Mapping(usual.form, usual.gauge, {**usual.tiles, **tiles}, {}, {**usual.knobs, **knobs})


def agrees(name: str, tiles: dict[str, int] | None = None, **knobs: int) -> None:
    c, rng = example(name), np.random.default_rng(1)
    extents = resolve(c, SIZES[name])
    inputs: dict[str, Any] = {p.name: 0.125 for p in c.params if not p.indices}
    for p in c.params:
        if p.indices:
            drawn = rng.standard_normal(shape_of(c, p.name, extents)) * (30 if p.dtype == "i8" else 1)
            inputs[p.name] = drawn.astype(numpy_dtype(p.dtype))
    mapping = changed(c, "interpret", extents, TILES[name] if tiles is None else tiles, **knobs)
    got = castile.compile(c, "interpret", extents, mapping)(**inputs)
    within_bound(c, inputs, got)


@pytest.mark.parametrize(
    ("name", "knobs"),
    [
        ("gemm", {"swizzle": 2}),
        ("gemm", {"swizzle": 4, "persistent": 1}),
        ("gemm", {"descriptors": 1}),
        ("gemm_int8", {}),
        ("attention_causal", {"heavy": 0}),
        ("attention_causal", {"heavy": 2, "persistent": 2}),
        ("attention_causal", {"specialize": 1, "descriptors": 1}),
        ("attention_causal", {"ahead": 1, "specialize": 1, "stages": 3}),
        ("softmax", {"ahead": 1}),
        ("attention_gqa", {"heavy": 1}),
        ("attention_gqa", {"descriptors": 1}),
    ],
)
def test_a_knob_leaves_the_result_as_it_is(name: str, knobs: dict[str, int]) -> None:
    agrees(name, **knobs)


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("persistent", [0, 1])
@pytest.mark.parametrize("heavy", [0, 1, 2])
@pytest.mark.parametrize("descriptors", [0, 1])
@pytest.mark.parametrize("swizzle", [1, 2, 16])
def test_knobs_together(name: str, persistent: int, heavy: int, descriptors: int, swizzle: int) -> None:
    agrees(name, persistent=persistent, heavy=heavy, descriptors=descriptors, swizzle=swizzle)


def test_the_heaviest_tiles_are_the_last_ones_of_a_causal_mask_and_go_first() -> None:
    c = example("attention_causal")
    extents = resolve(c, MANY)
    mapping = default_mapping(c, "cuda:90", extents)
    (k,) = mapped(c, mapping, extents).kernels
    assert heaviest_last(k) == "q"
    assert mapping.knob("heavy") == 1
    assert "tl.cdiv(q_extent, BLOCK_q) - 1 - pid" in print_triton(
        mapped(c, mapping, extents).program, mapping, "cuda:90"
    )
    (full,) = mapped(example("attention"), mapping, extents).kernels
    assert heaviest_last(full) is None


@pytest.mark.parametrize("form", ["h // 4", "h // 6"])
def test_heads_that_share_keys_share_a_program_where_queries_are_few(form: str) -> None:
    text = (CASCADES / "attention_gqa.cascade").read_text().replace("h // 4", form)
    c, group = castile.parse(text), int(form[-1])
    extents = resolve(c, {"b": 2, "h": 12, "q": 1, "k": 512, "d": 64, "f": 64})
    mapping = default_mapping(c, "cuda:90", extents)
    assert mapping.tiles["h"] == group
    k = mapped(c, mapping, extents).kernels[0]
    assert "K_6[d, k]: bf16 = load K[b, " + form in str(k)
    many = default_mapping(c, "cuda:90", resolve(c, {**extents, "q": 512}))
    assert "h" not in many.tiles


def taken(name: str, target: str, **knobs: int) -> Resources:
    c = example(name)
    extents = nominal(c)
    mapping = changed(c, target, extents, {}, **knobs)
    return resources(mapped(c, mapping, extents).program, mapping, target)


def test_descriptors_load_by_the_copy_engine() -> None:
    found = taken("gemm", "cuda:90", descriptors=1)
    assert found.instructions["tma"] > 0
    assert "ldgsts" not in found.instructions
    assert found.instructions["wgmma"] > 0
    assert "tma" not in taken("gemm", "cuda:80", descriptors=1).instructions


def test_integers_are_multiplied_by_the_matrix_unit() -> None:
    assert taken("gemm_int8", "cuda:90").instructions["wgmma"] > 0
    assert taken("gemm_int8", "hip:gfx942").instructions["mfma"] > 0


def test_f32_as_three_products_of_tf32() -> None:
    c = castile.parse("def f(A: f32[m, k], B: f32[k, n]) -> C:\n    C[m, n] = sum[k](A[m, k] * B[k, n])\n")
    extents = nominal(c)
    mapping = changed(c, "cuda:90", extents, {}, tf32x3=1)
    program = mapped(c, mapping, extents).program
    assert 'input_precision="tf32x3"' in print_triton(program, mapping, "cuda:90")
    assert 'input_precision="ieee"' in print_triton(program, mapping, "hip:gfx942")
    found = resources(program, mapping, "cuda:90")
    assert found.instructions.get("mma", 0) + found.instructions.get("wgmma", 0) > 0


def test_loops_without_products_load_ahead_where_a_knob_says_so() -> None:
    plain, ahead = taken("softmax", "cuda:90", stages=3), taken("softmax", "cuda:90", stages=3, ahead=1)
    assert ahead.instructions["ldgsts"] > plain.instructions.get("ldgsts", 0) == 0
    # Of three stages one is in registers.
    assert ahead.shared_bytes > 2 * 4 * 1024 > plain.shared_bytes
    assert taken("softmax", "cuda:90", stages=1, ahead=1) == taken("softmax", "cuda:90", stages=1)


def test_a_tuner_is_offered_the_knobs_that_a_program_and_a_device_have_a_use_for() -> None:
    def knobs(name: str, target: str) -> set[str]:
        c = example(name)
        extents = resolve(c, MANY) if name.startswith("attention") else nominal(c)
        space = space_of(c, extents, target, device_of(target))
        return {choice.name for choice in space.choices if choice.part == "knobs"}

    assert {"swizzle", "descriptors", "specialize", "persistent"} <= knobs("gemm", "cuda:90")
    assert not {"heavy", "descriptors", "specialize"} & knobs("gemm", "cuda:80")
    assert "heavy" in knobs("attention_causal", "hip:gfx942")
    assert not {"swizzle", "heavy", "specialize", "tf32x3"} & knobs("softmax", "cuda:90")
    assert "ahead" in knobs("softmax", "cuda:90")
