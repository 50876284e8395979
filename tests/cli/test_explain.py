"""`castile explain`."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import castile as package


def test_text(castile: Any, gemm: Path) -> None:
    done = castile("explain", gemm)
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("gemm   1 Einsum, numerics standard\n")
    assert "2·m·n·k matrix" in done.out
    assert "\x1b" not in done.out


def test_it_is_what_python_prints(castile: Any, gemm: Path) -> None:
    assert castile("explain", gemm).out == str(package.explain(package.load(gemm))) + "\n"


def test_json_is_one_document_with_the_same_content(castile: Any, gemm: Path) -> None:
    done = castile("explain", gemm, "--json")
    assert done.err == ""
    assert done.json == json.loads(package.explain(package.load(gemm)).to_json())
    assert done.json["passes"] == {"k": [1, 1]}
    assert done.json["einsums"][0]["operations"]["matrix"] == {"formula": "2*m*n*k", "value": None}


def test_extents_give_values(castile: Any, gemm: Path) -> None:
    forms = (["--shape", "m=2", "n=3", "k=4"], ["--shape", "m=2,n=3", "--shape", "k=4"], ["m=2", "n=3", "k=4"])
    for form in forms:
        found = castile("explain", gemm, *form, "--json").json
        assert found["extents"] == {"m": 2, "k": 4, "n": 3}
        assert found["total"]["operations"]["matrix"]["value"] == 48
        assert found["total"]["bytes_least"]["value"] == 4 * (2 * 4 + 4 * 3 + 2 * 3)
    assert castile("explain", "--shape", "m=2", "n=3", "k=4", gemm).code == 0


def test_a_drawing(castile: Any, gemm: Path, tmp_path: Path) -> None:
    done = castile("explain", gemm, "--svg", tmp_path / "gemm.svg", "--json")
    assert done.json["name"] == "gemm"
    assert "drew" in done.err
    assert ElementTree.parse(tmp_path / "gemm.svg").getroot().tag.endswith("svg")


def test_stdin(castile: Any, gemm: Path) -> None:
    assert castile("explain", "-", input=gemm.read_text()).out == castile("explain", gemm).out
