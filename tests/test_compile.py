"""`castile.compile` and `castile.emit` on the CPU: from a cascade to numbers, for shapes, kinds and mistakes."""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import json
import pickle
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import castile
from castile import driver
from castile.codegen.compiler import find_compiler
from castile.ir.bound import judge
from castile.ir.dtypes import numpy_dtype
from castile.ir.mapping import Mapping
from castile.passes.mapped import bucket, derived, nominal

CASCADES = Path(__file__).resolve().parents[1] / "examples" / "cascades"

SOFTMAX = """
def softmax(X: f32[m, n]) -> Y:
    M[m] = max[n](X[m, n])
    E[m, n] = exp(X[m, n] - M[m])
    Y[m, n] = E[m, n] / sum[n](E[m, n])
"""
ATTENTION = """
def attention(Q: f32[h, q, d], K: f32[h, k, d], V: f32[h, k, f], scale: f32) -> (O, L):
    S[h, q, k] = where(q >= k, scale * sum[d](Q[h, q, d] * K[h, k, d]), -inf)
    M[h, q] = max[k](S[h, q, k])
    P[h, q, k] = exp(S[h, q, k] - M[h, q])
    Z[h, q] = sum[k](P[h, q, k])
    L[h, q] = M[h, q] + log(Z[h, q])
    O[h, q, f] = sum[k](P[h, q, k] / Z[h, q] * V[h, k, f])
"""


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CASTILE_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def softmax() -> castile.Kernel:
    return castile.compile(castile.parse(SOFTMAX), "cpu")


@pytest.fixture(scope="module")
def attention() -> castile.Kernel:
    return castile.compile(castile.parse(ATTENTION), "cpu")


def draw(*shape: int) -> Any:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def agrees(c: castile.Cascade, inputs: dict[str, Any], got: Any) -> None:
    results = got if isinstance(got, tuple) else (got,)
    for judgement in judge(c, inputs, dict(zip(c.outputs, map(np.asarray, results), strict=True))):
        assert judgement.ok, str(judgement)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (17, 64), (65, 129), (0, 4), (4, 0), (2, 1031)])
def test_softmax_of_any_shape(softmax: castile.Kernel, shape: tuple[int, int]) -> None:
    x = draw(*shape)
    agrees(softmax.cascade, {"X": x}, softmax(X=x))


@pytest.mark.parametrize(("q", "k", "d"), [(5, 5, 3), (1, 70, 16), (70, 1, 64), (33, 65, 24), (64, 64, 64)])
def test_attention_of_any_shape(attention: castile.Kernel, q: int, k: int, d: int) -> None:
    inputs = {"Q": draw(2, q, d), "K": draw(2, k, d), "V": draw(2, k, d + 1), "scale": 0.3}
    agrees(attention.cascade, inputs, attention(**inputs))


def test_arrays_in_arrays_out(softmax: castile.Kernel) -> None:
    torch = pytest.importorskip("torch")
    x = draw(6, 10)
    expected = softmax(X=x)
    assert type(expected) is np.ndarray
    assert type(softmax(X=torch.from_numpy(x))) is torch.Tensor
    out = np.full((6, 20), 7.0, np.float32)
    assert softmax(X=x, out=out[:, ::2]).base is out
    np.testing.assert_array_equal(out[:, ::2], expected)
    assert (out[:, 1::2] == 7).all()
    for view in (np.asfortranarray(x), x[::-1, ::-1], np.broadcast_to(x[:1], x.shape)):
        np.testing.assert_allclose(softmax(X=view), softmax(X=np.ascontiguousarray(view)), rtol=1e-6)


def test_several_outputs_come_in_order(attention: castile.Kernel) -> None:
    inputs = {"Q": draw(1, 9, 4), "K": draw(1, 9, 4), "V": draw(1, 9, 3), "scale": 0.5}
    o, l = attention(**inputs)
    assert (o.shape, l.shape) == ((1, 9, 3), (1, 9))
    outs = (np.empty_like(o), np.empty_like(l))
    assert attention(**inputs, out=outs) is outs
    np.testing.assert_array_equal(outs[0], o)


def test_variants_by_bucket_share_a_program() -> None:
    k = castile.compile(castile.parse(SOFTMAX), "cpu")
    assert k.variants == ()
    for m in (2, 3, 200, 210):
        k(X=draw(m, 8))
    assert len(k.variants) == 2
    assert "default" in str(k.variants[0])
    assert len({id(r) for r in k._runs.values()}) == len({v.source for v in k.variants})


def test_buckets() -> None:
    c = castile.parse(ATTENTION)
    extents = {"h": 3, "q": 100, "d": 60, "k": 300, "f": 64}
    assert bucket(c, extents) == {"h": 16, "q": 256, "d": 64, "k": 1024, "f": 64}
    assert nominal(c)["d"] == 64
    assert nominal(c)["k"] == 2048


@pytest.mark.parametrize(("i", "j", "b"), [(2, 17, 34), (5, 3, 15), (3, 64, 300)])
def test_rounding_up_leaves_no_other_rank_empty(i: int, j: int, b: int) -> None:
    """Nor does it fill one that is: of 64 positions but the first 64 none is left."""
    c = castile.parse("""
def f(x: f32[b, h], y: f32[i, j, h]) -> (S, T):
    S[i, h] = sum[k](x[i * 17 + (k + 1), h] + y[i, k + 1, h])
    T[i, h] = sum[l](y[i, l + 64, h]) / extent(l)
""")
    rng = np.random.default_rng(0)
    inputs = {"x": rng.standard_normal((b, 4), np.float32), "y": rng.standard_normal((i, j, 4), np.float32)}
    for got, want in zip(castile.compile(c, "cpu")(**inputs), castile.evaluate(c, inputs).values(), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("i", "b", "e"), [(17, 256, 300), (5, 64, 80), (2, 64, 100), (3, 100, 70)])
def test_rounding_up_leaves_no_other_rank_smaller(i: int, b: int, e: int) -> None:
    """A rank that is kept on chip follows from others."""
    c = castile.parse("""
def f(x: f32[b], y: f32[n, e], V: f32[n, g], s: f32[i]) -> O:
    S[i, n] = sum[d](x[i * 4 + d] * y[n, d + 1]) + s[i]
    M[i] = max[n](S[i, n])
    P[i, n] = exp(S[i, n] - M[i])
    O[i, g] = sum[n](P[i, n] * V[n, g]) / sum[n](P[i, n])
""")
    rng = np.random.default_rng(0)
    inputs = {"x": 0.2 * rng.standard_normal(b), "y": rng.standard_normal((40, e)), "V": rng.standard_normal((40, 8))}
    inputs = {name: x.astype(np.float32) for name, x in inputs.items()} | {"s": np.zeros(i, np.float32)}
    np.testing.assert_allclose(castile.compile(c, "cpu")(**inputs), castile.evaluate(c, inputs)["O"], 1e-4, 1e-5)


def test_a_mapping_is_kept_prints_and_returns(attention: castile.Kernel) -> None:
    mapping = Mapping(form="full", gauge="exponent", tiles={"q": 8, "k": 24})
    k = castile.compile(attention.cascade, "cpu", mapping=mapping)
    assert k.mapping == mapping == Mapping.from_json(k.mapping.to_json())
    assert str(mapping) == "full exponent k:24 q:8"
    inputs = {"Q": draw(2, 30, 8), "K": draw(2, 30, 8), "V": draw(2, 30, 5), "scale": 0.3}
    agrees(k.cascade, inputs, k(**inputs))
    assert k.source != attention.source


@pytest.mark.parametrize("form", ["none", "defer"])
def test_other_forms_compute_the_same(attention: castile.Kernel, form: str) -> None:
    k = castile.compile(attention.cascade, "cpu", mapping=Mapping(form=form))
    inputs = {"Q": draw(2, 30, 8), "K": draw(2, 30, 8), "V": draw(2, 30, 5), "scale": 0.3}
    agrees(k.cascade, inputs, k(**inputs))


def test_mistakes_are_told(softmax: castile.Kernel) -> None:
    c = softmax.cascade
    with pytest.raises(castile.CastileError, match="no target is called `gpu`"):
        castile.compile(c, "gpu")
    with pytest.raises(castile.CastileError, match="no numerics of that name"):
        castile.compile(c, "cpu", numerics="loose")
    with pytest.raises(castile.CastileError, match="the mapping names a rank `z`"):
        castile.compile(c, "cpu", mapping=Mapping(tiles={"z": 4}))
    with pytest.raises(castile.CastileError, match="over which `softmax` reduces nothing"):
        castile.compile(c, "cpu", mapping=Mapping(splits={"m": 2})).source  # noqa: B018
    with pytest.raises(castile.CastileError, match="no resources to tell"):
        castile.compile(c, "cpu").resources  # noqa: B018
    with pytest.raises(castile.CastileError, match="parse the text first"):
        castile.compile(SOFTMAX)  # type: ignore[arg-type]
    with pytest.raises(castile.CastileError, match="has no rank `z`"):
        castile.compile(c, "cpu", shapes={"z": 3})
    with pytest.raises(castile.CastileError, match="`X` is missing"):
        softmax()
    with pytest.raises(castile.CastileError, match="no parameter `Z`"):
        softmax(X=draw(2, 2), Z=1)
    with pytest.raises(castile.CastileError, match="`X` has 1 axis, not 2"):
        softmax(X=draw(2))
    with pytest.raises(castile.CastileError, match="float64, not f32"):
        softmax(X=draw(2, 2).astype(np.float64))
    with pytest.raises(castile.CastileError, match="is no array"):
        softmax(X=[[1.0]])


@pytest.mark.parametrize(
    "text",
    [
        '{"tile": {}}',
        "[]",
        "{",
        '{"tiles": {"q": 0}}',
        '{"tiles": {"q": 1e9}}',
        '{"tiles": {"q": true}}',
        '{"form": 3}',
        '{"knobs": {"warps": 3}}',
        '{"knobs": {"warps": 4.0}}',
        '{"knobs": {"wraps": 4}}',
        '{"splits": {"k": -1}}',
        "[" * 100_000,
    ],
)
def test_mappings_from_strangers(text: str) -> None:
    with pytest.raises(castile.CastileError):
        Mapping.from_json(text)


def test_mappings_are_copied_and_pickled() -> None:
    m = Mapping("defer", tiles={"q": 8}, splits={"k": 2}, knobs={"warps": 4})
    for other in (copy.copy(m), copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
        assert (other, hash(other)) == (m, hash(m))


def test_strict_rows_do_not_hang_on_how_many_there_are() -> None:
    """A row alone is multiplied as one of many is, though its tiles and its kernel are others."""
    c = castile.parse("def gemm(A: f32[m, k], B: f32[k, n]) -> C:\n    C[m, n] = sum[k](A[m, k] * B[k, n])\n")
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(shape, dtype=np.float32) for shape in ((64, 600), (600, 70)))
    k = castile.compile(c, "cpu", numerics="strict")
    many = k(A=a, B=b)
    assert np.array_equal(k(A=a[:1], B=b), many[:1])


def test_numerics_override() -> None:
    k = castile.compile(castile.parse(SOFTMAX), "cpu", numerics="strict")
    assert k.cascade.numerics == "strict"
    x = draw(64, 33)
    rows = [k(X=x[i : i + 1]) for i in range(3)]
    np.testing.assert_array_equal(np.concatenate(rows), k(X=x)[:3])


def test_every_stage_is_dumped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CASTILE_DUMP", str(tmp_path))
    k = castile.compile(castile.parse(SOFTMAX), "cpu")
    assert k.source
    names = sorted(p.name for p in tmp_path.iterdir())
    assert [n.split(".", 2)[2] for n in names] == [
        "input.cascade",
        "derive-none-maximum.cascade",
        "rewrites.txt",
        "mapping.json",
        "tiles.txt",
        "source.cpp",
    ]
    assert json.loads((tmp_path / "softmax.03.mapping.json").read_text()) == k.mapping.to_dict()
    assert (tmp_path / "softmax.05.source.cpp").read_text() == k.source


def test_what_was_worked_out_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CASTILE_CACHE_DIR", str(tmp_path))
    forget = driver._variant.cache_clear  # as a new process would have
    forget()
    c, x = castile.parse(SOFTMAX), draw(5, 7)
    first = castile.compile(c, "cpu")
    expected = first(X=x)
    kept = sorted(tmp_path.glob("*.json"))
    assert len(kept) == 2
    with pytest.MonkeyPatch.context() as patch:
        forget()
        patch.setattr("castile.driver.mapped", None)  # nothing is derived or printed again
        again = castile.compile(c, "cpu")
        np.testing.assert_array_equal(again(X=x), expected)
    assert again.variants[0].source == first.variants[0].source
    for path in kept:  # what was tampered with is not believed
        path.write_bytes(path.read_bytes()[:-9])
    forget()
    np.testing.assert_array_equal(castile.compile(c, "cpu")(X=x), expected)
    path.chmod(0o666)
    forget()
    np.testing.assert_array_equal(castile.compile(c, "cpu")(X=x), expected)


def test_a_gpu_is_missed_with_one_clear_error() -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(castile.CastileError, match="there is no GPU here") as caught:
        castile.compile(castile.parse(SOFTMAX), "cuda")
    assert "cuda:90" in str(caught.value)


CONV = """
def conv(X: f32[w], F: f32[r], page: i32[p]) -> Y:
    C[p] = sum[r](X[2 * p + r] * F[r])
    Y[p] = C[page[p]]
"""


def built(text: str, folder: Path) -> ctypes.CDLL:
    """An emitted file, built by the line in its own header."""
    line = next(t.removeprefix("// ") for t in text.splitlines() if t.startswith("// c++ "))
    words = line.split()
    name, made = words[-3], words[-1]
    (folder / name).write_text(text)
    words = [*find_compiler().command, *words[1:]]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(folder / made))


def test_an_emitted_file_stands_alone(tmp_path: Path) -> None:
    text = castile.emit(castile.parse(SOFTMAX), "cpu")
    assert "castile" in text.splitlines()[0]
    assert "import" not in text
    library = built(text, tmp_path)
    x, y = draw(37, 50), np.empty((37, 50), np.float32)
    pointer = ctypes.c_void_p
    status = library.softmax(pointer(x.ctypes.data), pointer(y.ctypes.data), *map(ctypes.c_int64, (37, 50, 2)))
    assert status == 0
    agrees(castile.parse(SOFTMAX), {"X": x}, y)


def test_an_emitted_file_derives_extents_and_checks_data(tmp_path: Path) -> None:
    c = castile.parse(CONV)
    library = built(castile.emit(c, "cpu"), tmp_path)
    x, f, page = draw(21), draw(4), np.arange(9, dtype=np.int32)[::-1].copy()
    y = np.empty(9, np.float32)
    arrays = [ctypes.c_void_p(a.ctypes.data) for a in (x, f, page, y)]
    extents = [ctypes.c_int64(n) for n in (21, 4, 9, 1)]
    library.conv.restype = ctypes.c_int64
    assert library.conv(*arrays, *extents) == 0
    agrees(c, {"X": x, "F": f, "page": page}, y)
    page[3] = 99
    assert library.conv(*arrays, *extents) != 0


def test_a_read_that_a_condition_keeps_inside_stays_inside() -> None:
    c = castile.parse("def f(X: f32[k], Z: f32[3]) -> Y:\n    Y[k] = X[k] + where(k < 3, Z[k], 0.0)\n")
    k = castile.compile(c, "cpu")
    assert "Z[k] if" in k.source
    np.testing.assert_array_equal(k(X=draw(7) * 0, Z=np.ones(3, np.float32)), [1, 1, 1, 0, 0, 0, 0])


def test_a_read_that_data_lead_outside_is_refused() -> None:
    c = castile.parse("def f(X: f32[k], L: i32[b]) -> Y:\n    Y[b, k] = where(k < L[b], X[k + 2], 0.0)\n")
    k = castile.compile(c, "cpu")
    x = np.arange(7, dtype=np.float32)
    inputs = {"X": x, "L": np.array([1, 5], np.int32)}
    agrees(c, inputs, k(**inputs))
    with pytest.raises(castile.CastileError, match="lies outside `X`"):
        k(X=x, L=np.array([1, 7], np.int32))


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("axes", ["k, n", "n, k"])
def test_products_of_few_rows(dtype: str, axes: str) -> None:
    c = castile.parse(f"def f(A: {dtype}[m, k], B: {dtype}[{axes}]) -> C:\n    C[m, n] = sum[k](A[m, k] * B[{axes}])\n")
    k = castile.compile(c, "cpu")
    for m, n, depth in ((1, 70, 37), (2, 150, 64), (3, 64, 33), (7, 17, 100), (8, 130, 5), (9, 65, 70)):
        b = draw(depth, n) if axes == "k, n" else draw(n, depth)
        inputs = {name: x.astype(numpy_dtype(dtype)) for name, x in (("A", draw(m, depth)), ("B", b))}
        agrees(c, inputs, k(**inputs))


def test_heads_that_share_keys_are_rows_of_one_product() -> None:
    c = castile.load(CASCADES / "attention_gqa.cascade")
    inputs = {"Q": draw(1, 8, 1, 16), "K": draw(1, 2, 70, 16), "V": draw(1, 2, 70, 16)}
    inputs = {name: x.astype(numpy_dtype("bf16")) for name, x in inputs.items()} | {"scale": 0.25}
    k = castile.compile(c, "cpu", shapes={"b": 1, "h": 8, "q": 1, "k": 70, "d": 16, "f": 16})
    assert k.mapping.tiles["h"] == 4
    agrees(c, inputs, k(**inputs))


def test_a_docstring_is_the_cascades_own() -> None:
    c = castile.load(CASCADES / "gemm.cascade")
    bare = dataclasses.replace(c, doc="")
    assert derived(bare, "full", "maximum").cascade.doc == ""
    assert derived(c, "full", "maximum").cascade.doc == c.doc != ""


def test_arguments_have_names() -> None:
    c = castile.parse("def double(X: f32[n], s: f32) -> Y:\n    Y[n] = 2 * s * X[n]\n")
    with pytest.raises(castile.CastileError, match="have names, and 2 came without") as caught:
        castile.compile(c, "cpu")(np.ones(3, np.float32), 1.0)
    assert "X=…, s=…" in str(caught.value)
