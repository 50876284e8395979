"""`castile verify`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

CASCADES = Path(__file__).resolve().parents[2] / "examples" / "cascades"


MONOID = """@monoid(identity={identity})
def op(m, l, n, s) -> (M, L):
    M = {first}
    L = {second}

def f(X: f32[q, k]) -> (M, L):
    (M[q], L[q]) = op[k](X[q, k], 1.0)
"""
LSE = {"identity": "(-inf, 0.0)", "first": "maximum(m, n)", "second": "l * exp(m - M) + s * exp(n - M)"}


def checks(outcome: Any) -> dict[str, Any]:
    return {check["name"]: check for check in outcome.json["checks"]}


@pytest.mark.parametrize("name", ["attention_decode_paged", "conv2d_transposed", "delta_rule", "gemm_int4", "viterbi"])
def test_examples_hold(castile: Any, name: str) -> None:
    done = castile("verify", CASCADES / f"{name}.cascade", "--json")
    assert done.code == 0
    assert done.json["ok"]
    assert {"reads", "round trip", "key", "runs"} <= checks(done).keys()
    text = castile("verify", CASCADES / f"{name}.cascade", "--cases", 1)
    assert text.code == 0
    assert text.out.startswith(f"{name}   OK\n")


@pytest.mark.parametrize("name", ["attention_monoid", "logsumexp_monoid", "variance_monoid", "logcumsumexp"])
def test_laws_of_good_monoids(castile: Any, name: str) -> None:
    done = castile("verify", CASCADES / f"{name}.cascade", "--cases", 2, "--json")
    assert done.code == 0, done.out


@pytest.mark.parametrize(
    ("change", "law"),
    [
        ({"second": "l * exp(m - M) + s"}, "associativity"),
        ({"first": "0.5 * (m + n)"}, "associativity"),
        ({"identity": "(0.0, 0.0)"}, "left identity"),
        ({"first": "m", "second": "l"}, "left identity"),
        ({"first": "n", "second": "s"}, "right identity"),
    ],
)
def test_laws_of_bad_monoids(castile: Any, tmp_path: Path, change: dict[str, str], law: str) -> None:
    path = tmp_path / "bad.cascade"
    path.write_text(MONOID.format(**{**LSE, **change}))
    done = castile("verify", path, "--json")
    assert done.code == 1
    found = checks(done)["monoid op in M"]
    assert not found["ok"]
    assert law in found["detail"]
    text = castile("verify", path)
    assert text.code == 1
    assert "FAILED" in text.out
    assert "again: castile verify" in text.out


def test_nan_from_infinite_data_is_a_remark(castile: Any, tmp_path: Path) -> None:
    path = tmp_path / "lse.cascade"
    path.write_text(MONOID.format(**LSE))
    done = castile("verify", path, "--json")
    assert done.code == 0
    assert "infinite" in checks(done)["monoid op in M"]["notes"][0]


def test_a_read_out_of_bounds_comes_with_a_reproducer(castile: Any, tmp_path: Path) -> None:
    path = tmp_path / "c.cascade"
    path.write_text("def f(X: f32[k]) -> Y:\n    Y[k] = X[k] + where(k < 3, 0, X[k + 1])\n")
    done = castile("verify", path, "--json")
    assert done.code == 1
    failed = checks(done)["runs"]
    assert "`X` is read at" in failed["detail"]
    again = castile(*shlex.split(failed["again"])[1:])
    assert again.code == 2
    assert "`X` is read at" in again.err


def test_extents_that_must_agree_are_a_remark(castile: Any) -> None:
    done = castile("verify", CASCADES / "attention_rope.cascade", "--json")
    assert done.code == 0
    assert "not every choice of extents works" in checks(done)["runs"]["notes"][0]


def test_a_text_that_does_not_parse(castile: Any, tmp_path: Path) -> None:
    path = tmp_path / "bad.cascade"
    path.write_text("def f(X: f32[k]) -> Y:\n    Y = sum[k](X[j])\n")
    done = castile("verify", path, "--json")
    assert done.code == 2
    assert done.json["ok"] is False
    assert "rank `j`" in done.json["error"]
    assert castile("verify", path).out == ""
