"""`castile run`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from castile.cli.inputs import gather
from castile.cli.run import estimate
from castile.ir.evaluate import evaluate
from castile.ir.parse import load

CASCADES = Path(__file__).resolve().parents[2] / "examples" / "cascades"

EXAMPLES = sorted(CASCADES.glob("*.cascade"))


def test_an_input_file(castile: Any, gemm: Path, tmp_path: Path) -> None:
    a, b = np.arange(6.0).reshape(2, 3), np.ones((3, 2))
    np.savez(tmp_path / "in.npz", A=a, B=b)
    done = castile(
        "run", gemm, "--input", tmp_path / "in.npz", "--output", tmp_path / "out.npz", "--target", "oracle", "--json"
    )
    found = done.json
    assert found["engine"] == "oracle"
    assert found["extents"] == {"m": 2, "k": 3, "n": 2}
    assert found["inputs"]["A"] == {"dtype": "f32", "shape": [2, 3], "origin": "file"}
    assert found["outputs"]["C"]["corner"] == (a @ b).tolist()
    assert (found["outputs"]["C"]["min"], found["outputs"]["C"]["max"]) == (3.0, 12.0)
    with np.load(tmp_path / "out.npz") as written:
        np.testing.assert_array_equal(written["C"], a @ b)


@pytest.mark.parametrize("command", ["explain", "emit", "verify"])
def test_cascades_known_by_name(castile: Any, command: str) -> None:
    assert "softmax" in castile(command, "softmax").out


def test_a_file_goes_before_a_name(castile: Any, gemm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "softmax").write_text(gemm.read_text())
    monkeypatch.chdir(tmp_path)
    assert "gemm" in castile("explain", "softmax").out


def test_a_name_that_is_none(castile: Any) -> None:
    assert "did you mean `softmax`?" in castile("explain", "softmaxx").err


def test_a_kernel_computes_what_the_oracle_does(castile: Any, gemm: Path) -> None:
    words = ("run", gemm, "--random", "--shape", "m=5", "n=3", "k=7", "--json", "--target")
    ours, oracle = castile(*words, "cpu").json, castile(*words, "oracle").json
    assert (ours["engine"], oracle["engine"]) == ("cpu", "oracle")
    np.testing.assert_allclose(ours["outputs"]["C"]["corner"], oracle["outputs"]["C"]["corner"], rtol=1e-4, atol=1e-5)
    done = castile("run", gemm, "--random", "--shape", "m=5", "--target", "cpu", "--mapping", '{"tiles": {"m": 3}}')
    assert "by its kernel for cpu" in done.out


def test_the_kernel_refuses_a_read_out_of_bounds(castile: Any, tmp_path: Path) -> None:
    path = tmp_path / "c.cascade"
    path.write_text("def f(X: f32[k]) -> Y:\n    H[k] = H[k - 1] + X[k]\n    Y[k] = H[k]\n")
    done = castile("run", path, "--random", "--target", "cpu")
    assert done.code == 2
    assert f"{path}:2:12: `H[k - 1]` is read outside `H` at k=0" in done.err
    assert "where(k - 1 >= 0, H[k - 1], 0.0)" in done.err


def test_bfloat16_in_a_file(castile: Any, tmp_path: Path) -> None:
    (tmp_path / "c.cascade").write_text("def f(X: bf16[k]) -> y:\n    y = sum[k](X[k])\n")
    np.savez(tmp_path / "in.npz", X=np.array([1.5, 2.0], ml_dtypes.bfloat16))
    assert (
        castile("run", tmp_path / "c.cascade", "--input", tmp_path / "in.npz", "--json").json["outputs"]["y"]["corner"]
        == 3.5
    )


def test_random_inputs_repeat(castile: Any, gemm: Path) -> None:
    words = ("run", gemm, "--random", "--shape", "m=3", "n=2", "k=5", "--json")
    one, two, other = castile(*words).json, castile(*words).json, castile(*words, "--seed", "1").json
    assert one["outputs"] == two["outputs"] != other["outputs"]
    assert one["inputs"]["A"]["origin"] == "random"


def test_text_says_that_it_was_the_oracle(castile: Any, gemm: Path) -> None:
    done = castile("run", gemm, "--random", "--target", "oracle", "--shape", "m=3", "n=2", "k=5")
    assert "float64 oracle" in done.out
    assert "C   f32 [m=3, n=2]" in done.out
    assert done.err == ""


def test_scalars(castile: Any) -> None:
    words = ("run", CASCADES / "attention.cascade", "--random", "--set", "scale=0.0", "--json")
    found = castile(*words).json
    assert found["inputs"]["scale"]["origin"] == "command line"
    assert found["inputs"]["Q"]["origin"] == "random"


def test_a_sample_of_a_large_product(castile: Any, gemm: Path) -> None:
    words = ("run", gemm, "--random", "--shape", "m=2000", "n=2000", "k=500")
    done = castile(*words, "--sample", "4", "--json").json
    assert len(done["outputs"]["C"]["values"]) == len(done["at"]["m"]) == 4
    c = load(gemm)
    given = gather(c, {"m": 2000, "n": 2000, "k": 500}, None, {}, True).filled(c, 0).values
    m, n = done["at"]["m"][0], done["at"]["n"][0]
    assert done["outputs"]["C"]["values"][0] == pytest.approx(given["A"][m] @ given["B"][:, n])
    assert "C[m=" in castile(*words, "--sample", "2").out


@pytest.mark.parametrize("shape", ["m=8192 n=8192 k=16384", "m=100000 n=100000 k=1", "m=1 n=1 k=1000000000000"])
def test_what_would_take_forever_is_refused(castile: Any, gemm: Path, shape: str) -> None:
    done = castile("run", gemm, "--random", "--target", "oracle", "--shape", *shape.split())
    assert done.code == 2
    assert "the oracle would" in done.err
    assert "--sample 64" in done.err


def test_values_that_are_no_numbers_are_counted(castile: Any, tmp_path: Path) -> None:
    (tmp_path / "c.cascade").write_text("def f(X: f32[k]) -> Y:\n    Y[k] = log(-(X[k] ** 2))\n")
    done = castile("run", tmp_path / "c.cascade", "--random", "--shape", "k=3", "--json").json["outputs"]["Y"]
    assert done["nan"] == 3
    assert done["min"] is None
    assert done["corner"] == ["nan"] * 3
    assert "3 NaN" in castile("run", tmp_path / "c.cascade", "--random", "--shape", "k=3").out


def test_an_error_points_into_the_file(castile: Any, tmp_path: Path) -> None:
    path = tmp_path / "c.cascade"
    path.write_text("def f(X: f32[k]) -> Y:\n    H[k] = H[k - 1] + X[k]\n    Y[k] = H[k]\n")
    done = castile("run", path, "--random", "--target", "oracle")
    assert done.code == 2
    assert done.err.startswith(f"{path}:2:12: `H` is read at -1")
    assert "  |     H[k] = H[k - 1] + X[k]\n" in done.err


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_runs_on_random_inputs(path: Path) -> None:
    c = load(path)
    given = gather(c, {}, None, {}, True).filled(c, 0)
    for name, values in evaluate(c, given.values).items():
        assert np.isfinite(values.astype(np.float64)).all(), name
    assert estimate(c, given.extents, False)[1] < 5
