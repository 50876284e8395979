"""Whatever a user gets wrong ends in exit code 2, one clear line and no traceback."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

MISTAKES = [
    "explain nope.cascade: cannot read nope.cascade: No such file or directory",
    "explain folder: cannot read folder: Is a directory",
    "explain binary: binary is not UTF-8 text",
    "explain empty: the text holds no cascade",
    "explain wrong.cascade: rank `j` is neither on the left nor reduced",
    "explain: Missing argument 'FILE|NAME'",
    "explain gemm.cascade --bogus: No such option: --bogus",
    "explain gemm.cascade --shape m=3: rank `k` has no extent",
    "explain gemm.cascade --shape m=3 n=1 k=1 z=2: the cascade has no rank `z`",
    "explain gemm.cascade --shape m: `m` is not of the form name=value",
    "explain gemm.cascade --shape m=1e3 n=1 k=1: an extent is an integer",
    "explain gemm.cascade --shape m=-1 n=1 k=1: rank `m` cannot have extent -1",
    "explain gemm.cascade --shape m=1 m=2 n=1 k=1: gives rank `m` two extents",
    "explain gemm.cascade --svg folder: cannot write folder",
    "explain gemm.cascade --svg .: cannot write .: Is a directory",
    "emit gemm.cascade -o /: cannot write /: Is a directory",
    "frobnicate: No such command 'frobnicate'",
    "run gemm.cascade: no value for `A`, `B`",
    "run gemm.cascade --input nope.npz: cannot read nope.npz",
    "run gemm.cascade --input folder: cannot read folder",
    "run gemm.cascade --input gemm.cascade: is not an .npz file",
    "run gemm.cascade --input truncated.npz: truncated.npz",
    "run gemm.cascade --input objects.npz: objects.npz holds Python objects, not numbers",
    "run gemm.cascade --input lies.npz: lies.npz",
    "run gemm.cascade --input words.npz: `A` is no array of",
    "run gemm.cascade --input misfit.npz: rank `k` has two extents",
    "run gemm.cascade --input extra.npz: `gemm` has no parameter `Z`",
    "run gemm.cascade --input half.npz: no value for `B`",
    "run gemm.cascade --random --set A=1: `A` is no scalar",
    "run gemm.cascade --random --set A=x: `x` is no number",
    "run gemm.cascade --random --set Q=1: `gemm` has no parameter `Q`",
    "run gemm.cascade --random --seed x: Invalid value for '--seed'",
    "run gemm.cascade --random --sample 0: Invalid value for '--sample'",
    "run gemm.cascade --random --sample 2 --shape m=0: rank `m` is empty",
    "run gemm.cascade --random --output nowhere/out.npz: cannot write nowhere/out.npz",
    "run gemm.cascade --random --shape m=99999999999999: rank `m` cannot have extent",
    "run gemm.cascade --random stray: `stray` is not of the form name=value",
    "verify wrong.cascade: rank `j` is neither on the left nor reduced",
    "verify gemm.cascade --cases x: Invalid value for '--cases'",
    "doctor stray: Got unexpected extra argument",
    "bench sofmax: no case of the benchmarks is called 'sofmax'",
]


@pytest.fixture
def files(tmp_path: Path, gemm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "binary").write_bytes(b"\xff\x00" * 100)
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "wrong.cascade").write_text("def f(X: f32[m, k]) -> Y:\n    Y[m] = sum[k](X[m, j])\n")
    a, b = np.ones((3, 4)), np.ones((4, 2))
    np.savez("good.npz", A=a, B=b)
    np.savez("objects.npz", A=np.array([{}], dtype=object), B=b)
    np.savez("words.npz", A=np.array([["a", "b"]]), B=np.ones((2, 2)))
    np.savez("misfit.npz", A=a, B=np.ones((5, 2)))
    np.savez("extra.npz", A=a, B=b, Z=b)
    np.savez("half.npz", A=a)
    whole = (tmp_path / "good.npz").read_bytes()
    (tmp_path / "truncated.npz").write_bytes(whole[: len(whole) // 2])
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (99999999999999, 4), }".ljust(117) + b"\n"
    with zipfile.ZipFile("lies.npz", "w") as archive:
        archive.writestr("A.npy", b"\x93NUMPY\x01\x00\x76\x00" + header)
        archive.writestr("B.npy", b"garbage")


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.usefixtures("files")
def test_a_mistake(castile: Any, mistake: str) -> None:
    command, _, message = mistake.partition(": ")
    done = castile(*command.split())
    assert done.code == 2
    assert done.out == ""
    assert message in done.err.splitlines()[0]
    assert "Traceback" not in done.err
    assert len(done.err.splitlines()) <= 5


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("at", range(0, 500, 7))
def test_a_damaged_file_of_arrays(castile: Any, at: int) -> None:
    """Any byte of the archive may be wrong; what comes of it is an answer or an error."""
    raw = bytearray(Path("good.npz").read_bytes())
    raw[at % len(raw)] ^= 0x55
    Path("damaged.npz").write_bytes(bytes(raw))
    done = castile("run", "gemm.cascade", "--input", "damaged.npz", "--json")
    assert done.code in (0, 2)
    assert "Traceback" not in done.err


def test_an_archive_that_unpacks_to_too_much(castile: Any, gemm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("castile.cli.inputs.MAX_FILE_BYTES", 100)
    np.savez(gemm.with_name("in.npz"), A=np.ones((3, 4)), B=np.ones((4, 2)))
    done = castile("run", gemm, "--input", gemm.with_name("in.npz"))
    assert done.code == 2
    assert "at most 100 are read" in done.err
