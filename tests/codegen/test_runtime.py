"""Calling compiled programs: arrays of either kind, any strides, `out=`, and one clear error for what does not fit."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hand import Written, access, expr, load, store, tile, written

import castile
from castile.codegen.arguments import likeness
from castile.codegen.runtime import CpuProgram, thread_count, threads_without_torch
from castile.ir.cascade import Access, Param, Rank
from castile.ir.errors import InputError
from castile.ir.tile import Fold

SCALED = written(
    "X: f32[m, n], s: f32, i: i32",
    {"Y": "f32[m, n]"},
    {"m": 3, "n": 32},
    (load("x", "X", "m n"), store("Y", "m n", expr("x * s + f32(i)", "x s i:i32"))),
)
TWO = written(
    "X: f32[m, n]",
    {"Y": "bf16[m, n]", "Z": "f32[m]"},
    {"m": 2},
    (
        load("x", "X", "m n"),
        Fold(tile("z", "m"), "sum", ("n",), Access("x")),
        store("Z", "m", "z"),
        store("Y", "m n", "x"),
    ),
    {"n": 5},
)


def chain() -> Written:
    """Two kernels with a scratch tensor and a scratch scalar between them."""
    first = written(
        "X: f32[n]",
        {"S": "f32", "D": "f32[n]"},
        {},
        (
            load("x", "X", "n"),
            Fold(tile("s"), "sum", ("n",), Access("x")),
            store("S", "", "s"),
            store("D", "n", expr("2.0 * x", "x")),
        ),
        {"n": 9},
    ).kernels[0]
    whole = written("X: f32[n]", {"Y": "f32[n]"}, {"n": 4}, (load("d", "D_", "n"),))
    second = replace(
        whole.kernels[0],
        tensors=(Param("D", "f32", (Rank("n"),)), Param("S", "f32"), Param("Y", "f32", (Rank("n"),))),
        body=(load("d", "D", "n"), store("Y", "n", expr("d / S", "d S"))),
    )
    return Written(whole.cascade, (first, second), (Param("S", "f32"), Param("D", "f32", (Rank("n"),))))


BYTES = written(
    "X: bf16[n]",
    {"Y": "u8[n]", "B": "bool[n]"},
    {"n": 8},
    (load("x", "X", "n", "bf16"), store("Y", "n", expr("u8(x)", "x:bf16")), store("B", "n", expr("x > 3.0", "x:bf16"))),
)
GATHER = written(
    "T: f32[v], I: i64[n]",
    {"Y": "f32[n]"},
    {"n": 4},
    (
        load("i", "I", "n", "i64"),
        replace(load("x", "T", "n"), source=Access("T", (Access("i"),))),
        store("Y", "n", "x"),
    ),
)


@pytest.fixture(scope="module")
def programs() -> dict[str, CpuProgram]:
    names = ("scaled", "two", "chain", "bytes", "gather")
    return dict(zip(names, CpuProgram.build_all([SCALED, TWO, chain(), BYTES, GATHER]), strict=True))


X = np.arange(77, dtype=np.float32).reshape(7, 11)


class Sub(np.ndarray):
    """A class of arrays of its own."""


def layouts() -> list[tuple[str, Any]]:
    big = np.arange(14 * 44, dtype=np.float32).reshape(14, 44)
    raw = np.zeros(77 * 4 + 1, np.uint8)[1:].view(np.float32).reshape(7, 11)
    raw[:] = X
    frozen = X.copy()
    frozen.flags.writeable = False
    return [
        ("contiguous", X),
        ("transposed", np.ascontiguousarray(X.T).T),
        ("strided", big[::2, ::4]),
        ("reversed", X[::-1, ::-1]),
        ("broadcast", np.broadcast_to(X[:1], (7, 11))),
        ("unaligned", raw),
        ("read-only", frozen),
        ("subclass", X.view(Sub)),
        ("no rows", X[:0]),
        ("no columns", X[:, :0]),
    ]


@pytest.mark.parametrize(("name", "x"), layouts(), ids=lambda v: v if isinstance(v, str) else "")
def test_any_layout(programs: dict[str, CpuProgram], name: str, x: Any) -> None:
    got = programs["scaled"](X=x, s=0.5, i=3)
    assert type(got) is np.ndarray
    np.testing.assert_array_equal(got, np.asarray(x) * np.float32(0.5) + 3)


def test_torch_in_torch_out(programs: dict[str, CpuProgram]) -> None:
    torch = pytest.importorskip("torch")
    x = torch.from_numpy(X.copy())
    got = programs["scaled"](X=x, s=torch.tensor(0.5), i=torch.tensor(3))
    assert torch.equal(got, x * 0.5 + 3)
    assert torch.equal(programs["scaled"](X=x.t().contiguous().t(), s=2, i=0), x * 2)
    assert torch.equal(programs["scaled"](X=x[:1].expand(7, 11), s=2, i=0), (x[:1] * 2).expand(7, 11))
    y, z = programs["two"](X=x[:, :5].requires_grad_())
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, x[:, :5].to(torch.bfloat16))
    assert torch.allclose(z, x[:, :5].sum(1))
    out = torch.full((11, 7), float("nan")).t()
    assert programs["scaled"](X=x, s=1.0, i=1, out=out) is out
    assert torch.equal(out, x + 1)
    got, truth = programs["bytes"](X=torch.tensor([1.5, 300.0, -2.0], dtype=torch.bfloat16))
    assert got.tolist() == [1, 255, 0]
    assert truth.tolist() == [False, True, False]
    with pytest.raises(InputError, match="needs a gradient"):
        programs["scaled"](X=x, s=1.0, i=1, out=torch.empty(7, 11, requires_grad=True))
    with pytest.raises(InputError, match="on meta"):
        programs["scaled"](X=torch.empty(7, 11, device="meta"), s=1.0, i=1)
    with pytest.raises(InputError, match="sparse"):
        programs["scaled"](X=x.to_sparse(), s=1.0, i=1)
    with pytest.raises(InputError, match=r"torch\.float64, not f32"):
        programs["scaled"](X=x.double(), s=1.0, i=1)
    with pytest.raises(InputError, match="overlaps"):
        programs["scaled"](X=x, s=1.0, i=1, out=x)


def test_after_calls_others_are_looked_at_anew() -> None:
    """What was accepted is taken again only for what is like it in all that was asked."""
    torch = pytest.importorskip("torch")
    double = castile.compile(castile.parse("def double(X: f32[m, n]) -> Y:\n    Y[m, n] = 2.0 * X[m, n]\n"))
    x, out = torch.arange(12.0).reshape(3, 4), torch.empty(3, 4)
    want = (2 * x).tolist()

    def accepted(**given: Any) -> None:
        """Calls that are like each other, so that the next one is taken for another of them at first."""
        for _ in range(3):
            assert double(X=x, **given).tolist() == want

    negated = torch.imag(torch.complex(x, -x).conj())
    assert negated.is_neg()
    apart = torch.frombuffer(bytearray(b"\0" + x.numpy().tobytes()), dtype=torch.float32, offset=1, count=12)
    others = [negated, x.T.contiguous().T, x.numpy(), x.numpy().view(type("Named", (np.ndarray,), {}))]
    others += [torch.nn.Parameter(x), x.as_subclass(type("Sub", (torch.Tensor,), {})), apart.reshape(3, 4)]
    for other in others:
        accepted()
        assert double(X=other).tolist() == want
    accepted()
    assert double(X=x[:2]).tolist() == want[:2]
    turned = x.clone()
    assert double(X=turned).tolist() == double(X=turned).tolist() == want
    turned.t_()
    assert double(X=turned).tolist() == (2 * x.T).tolist()
    for wrong in (x.to_sparse(), x.to("meta"), x.double(), x[0], None, [1.0], np.ma.array(x.numpy())):
        accepted()
        with pytest.raises(InputError):
            double(X=wrong)
    accepted()
    with pytest.raises(InputError, match="no parameter `Z`"):
        double(X=x, Z=x)
    with pytest.raises(InputError, match="missing"):
        double()
    with torch.inference_mode():
        accepted()
    frozen = np.empty((3, 4), np.float32)
    frozen.flags.writeable = False
    needing = torch.empty(3, 4, requires_grad=True)
    wrongs = {"gradient": needing, "negated": negated, "overlaps": x, "shape": out[:2], "2 arrays": (out, out)}
    for match, wrong in (wrongs | {"read-only": frozen, "no array": 3}).items():
        accepted(out=out)
        with pytest.raises(InputError, match=match):
            double(X=x, out=wrong)
    accepted(out=out)
    with pytest.raises(InputError, match="overlaps"):
        double(X=out, out=out)
    accepted(out=out)


def test_likeness_asks_what_a_signature_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    x, y = torch.zeros(3, 4), torch.zeros(4)
    alike = likeness([x, y])
    assert alike(x, y)
    assert alike(torch.ones(3, 4), torch.ones(4))
    unlike = [torch.zeros(4, 3).T, torch.zeros(3, 5), torch.zeros(3, 4, device="meta"), torch.zeros(3, 4).double()]
    unlike += [torch.zeros(3, 4).to_sparse(), torch.zeros(3, 4, requires_grad=True), torch._neg_view(x)]
    unlike += [x.numpy(), None]
    assert not any(alike(other, y) for other in unlike)
    assert not likeness([x, x])(x, x)
    assert not likeness([x.numpy()])(x.numpy())
    monkeypatch.delitem(sys.modules, "torch")
    assert not likeness([x])(x)


def test_calls_keep_no_tensor_alive() -> None:
    torch = pytest.importorskip("torch")
    double = castile.compile(castile.parse("def double(X: f32[m, n]) -> Y:\n    Y[m, n] = 2.0 * X[m, n]\n"))
    x, y = torch.zeros(3, 4), torch.empty(3, 4)
    for _ in range(3):
        double(X=x, out=y)
    alive = [weakref.ref(x), weakref.ref(y)]
    del x, y
    assert [t() for t in alive] == [None, None]


def test_bf16_by_ml_dtypes(programs: dict[str, CpuProgram]) -> None:
    got, _ = programs["bytes"](X=np.array([1.5, 300.0, -2.0]).astype(ml_dtypes.bfloat16))
    assert got.tolist() == [1, 255, 0]
    y, _ = programs["two"](X=X[:, :5])
    assert y.dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize("n", [9])
def test_scratch_between_kernels(programs: dict[str, CpuProgram], n: int) -> None:
    x = np.arange(1, n + 1, dtype=np.float32)
    np.testing.assert_allclose(programs["chain"](X=x), 2 * x / x.sum(), rtol=1e-6)


@pytest.mark.parametrize("s", [1, 1.0, True, np.float32(1), np.float64(1), np.array(1.0), np.int8(1)])
def test_any_number_is_a_scalar(programs: dict[str, CpuProgram], s: Any) -> None:
    np.testing.assert_array_equal(programs["scaled"](X=X, s=s, i=np.int64(-1)), X - 1)


def test_outputs_are_written_in_place(programs: dict[str, CpuProgram]) -> None:
    out = np.full((7, 11), np.nan, np.float32)
    assert programs["scaled"](X=X, s=1.0, i=1, out=out) is out
    np.testing.assert_array_equal(out, X + 1)
    both = (np.empty((7, 5), ml_dtypes.bfloat16), np.empty(7, np.float32))
    assert programs["two"](X=X[:, :5], out=both) is both
    np.testing.assert_array_equal(both[1], X[:, :5].sum(1))
    # Interleaved with the input, yet apart from it.
    pair = np.zeros((7, 22), np.float32)
    programs["scaled"](X=pair[:, ::2], s=1.0, i=1, out=pair[:, 1::2])
    np.testing.assert_array_equal(pair, np.tile([0, 1], (7, 11)))


def locked() -> Any:
    out = np.empty((7, 11), np.float32)
    out.flags.writeable = False
    return out


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"X": X.astype(np.float64)}, "float64, not f32"),
        ({"X": X.astype(">f4")}, "not f32"),
        ({"X": X.astype(np.float16)}, "float16, not f32"),
        ({"X": X.astype(ml_dtypes.bfloat16)}, "bfloat16, not f32"),
        ({"X": X.astype(complex)}, "complex128, not f32"),
        ({"X": X[0]}, "1 axis, not 2"),
        ({"X": X.tolist()}, "is no array"),
        ({"X": None}, "is no array"),
        ({"X": np.ma.masked_array(X)}, "is no array"),
        ({"s": "1"}, "is no number"),
        ({"s": np.ones(2)}, "is no number"),
        ({"i": 1.5}, "is no integer"),
        ({"i": 1 << 31}, "does not fit i32"),
        ({"Q": X}, "no parameter `Q`"),
        ({"out": X}, "overlaps `X`"),
        ({"out": np.empty((7, 12), np.float32)}, "wrong shape"),
        ({"out": np.empty((7, 11))}, "float64, not f32"),
        ({"out": np.empty((7, 11), np.int32)}, "int32, not f32"),
        ({"out": np.empty((7, 11), ">f4")}, "not f32"),
        ({"out": locked()}, "is read-only"),
        ({"out": (locked(), locked())}, "2 arrays for 1 output"),
        ({"out": np.lib.stride_tricks.as_strided(np.empty(80, np.float32), (7, 11), (0, 4))}, "share memory"),
        ({"out": np.lib.stride_tricks.as_strided(np.empty(80, np.float32), (7, 11), (8, 4))}, "share memory"),
        ({"out": 3}, "is no array"),
        ({"out": np.float32(1)}, "is no array"),
    ],
)
def test_what_does_not_fit_is_refused(programs: dict[str, CpuProgram], changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        programs["scaled"](**{"X": X, "s": 1.0, "i": 1, **changes})


def test_missing_and_overlapping(programs: dict[str, CpuProgram]) -> None:
    with pytest.raises(InputError, match="`s` is missing"):
        programs["scaled"](X=X, i=1)
    shared = np.empty(7 * 5 * 4 + 7 * 4, np.uint8)
    y, z = shared[: 7 * 5 * 2].view(ml_dtypes.bfloat16).reshape(7, 5), shared[60:88].view(np.float32)
    with pytest.raises(InputError, match="`Z` overlaps `Y`"):
        programs["two"](X=X[:, :5], out=(y, z))
    with pytest.raises(InputError, match="compiled for fewer elements of it"):
        programs["two"](X=X)


def test_threads_call_one_program(programs: dict[str, CpuProgram]) -> None:
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(50):
            if not np.array_equal(programs["scaled"](X=X, s=1.0, i=i), X + i):
                wrong.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert not wrong


def run_python(text: str, **env: str) -> str:
    code = f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n{text}"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


FORKED = """
import os, numpy as np
{first}
from test_runtime import SCALED
import castile
from castile.codegen.arguments import likeness
from castile.codegen.runtime import CpuProgram, thread_count
program = CpuProgram.build(SCALED)
x = np.ones((600, 640), np.float32)
assert (program(X=x, s=2.0, i=1) == 3).all()
child = os.fork()
if child == 0:
    assert thread_count() == 1
    os._exit(0 if (program(X=x, s=2.0, i=1) == 3).all() else 1)
assert os.waitpid(child, 0)[1] == 0
assert (program(X=x, s=2.0, i=1) == 3).all()
print(thread_count())
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_after_a_fork() -> None:
    assert run_python(FORKED.format(first=""), OMP_NUM_THREADS="3") == "3"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_after_a_fork_with_torch() -> None:
    pytest.importorskip("torch")
    assert run_python(FORKED.format(first="import torch\ntorch.set_num_threads(2)"), OMP_NUM_THREADS="3") == "2"


FORKED_WHILE_BUILT = """
import os, signal, sys, threading, time
import numpy as np
import castile
kernel = castile.compile(castile.parse("def double(x: f32[n]) -> y:\\n    y[n] = 2 * x[n]\\n"), "cpu")
x = np.ones(5, np.float32)
thread = threading.Thread(target=lambda: kernel(x=x))
thread.start()
while not os.path.exists(sys.argv[1]):
    time.sleep(0.01)
child = os.fork()
if child == 0:
    signal.alarm(30)
    os._exit(0 if (kernel(x=x) == 2).all() else 1)
thread.join()
print(os.waitpid(child, 0)[1])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_fork_while_another_thread_builds(tmp_path: Path) -> None:
    """The child builds for itself: what its parent's thread holds is never let go there."""
    compiler, begun = tmp_path / "c++", tmp_path / "begun"
    compiler.write_text(f'#!/bin/sh\ntouch "{begun}"\nsleep 1\nexec c++ "$@"\n')
    compiler.chmod(0o755)
    named = {"CXX": str(compiler), "CASTILE_CACHE_DIR": str(tmp_path / "cache"), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-c", FORKED_WHILE_BUILT, str(begun)],
        env={**os.environ, **named},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr


def test_torch_is_not_imported() -> None:
    assert run_python("import castile.codegen.runtime\nprint('torch' in sys.modules)") == "False"


def test_one_openmp_runtime() -> None:
    pytest.importorskip("torch")
    text = "import torch\nfrom test_runtime import CpuProgram, SCALED\nCpuProgram.build(SCALED)\n"
    text += "print(len({l.split()[-1] for l in open('/proc/self/maps') if 'gomp' in l or 'iomp' in l}))"
    if not Path("/proc/self/maps").exists():
        pytest.skip("this system does not tell what is loaded")
    assert run_python(text) == "1"


@pytest.mark.parametrize(("named", "threads"), [("3", 3), ("2,4", 2), ("", None), ("no", None)])
def test_thread_count(monkeypatch: pytest.MonkeyPatch, named: str, threads: int | None) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", named)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    threads_without_torch.cache_clear()
    assert thread_count() == (
        threads or len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    )


@pytest.mark.timing
def test_a_call_costs_little(programs: dict[str, CpuProgram]) -> None:
    """15 µs, the best of several runs, as a busy machine only ever adds."""
    best = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(200):
            programs["scaled"](X=X, s=1.0, i=1)
        best = min(best, (time.perf_counter() - start) / 200)
    assert best < 15e-6, f"{best * 1e6:.1f} µs"


def test_an_empty_table_is_not_read(programs: dict[str, CpuProgram]) -> None:
    got = programs["gather"](T=np.empty(0, np.float32), I=np.empty(0, np.int64))
    assert got.shape == (0,)


def test_axes_are_told_apart() -> None:
    assert access("X", "a b") == Access("X", (Rank("a"), Rank("b")))


def test_a_launcher_reads_its_addresses_anew() -> None:
    k = castile.compile(castile.parse("def f(X: f32[n]) -> Y:\n    Y[n] = X[n] + 1\n"), target="cpu")
    x, more = np.arange(5, dtype=np.float32), np.arange(5, 10, dtype=np.float32)
    out = np.empty(5, np.float32)
    launch = k.launcher({"X": x}, [out])
    assert launch is not None
    places = [x.ctypes.data, out.ctypes.data]
    launch([], places)
    places[0] = more.ctypes.data
    launch([], places)
    np.testing.assert_array_equal(out, more + 1)
