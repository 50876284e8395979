"""The GPU benchmark's logic, in dry runs under Triton's interpreter."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("triton")
torch = pytest.importorskip("torch")

from castile.ir.extents import resolve  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_gpu", ROOT / "benchmarks" / "gpu.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_gpu"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def rows(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_parts_run_dry_and_resume(gpu: ModuleType, tmp_path: Path) -> None:
    results = tmp_path / "rows.jsonl"
    dry = ["--dry", "--results", str(results)]
    assert gpu.main(["correct", "--only", "softmax_entropy", *dry]) == 0
    assert gpu.main(["race", "--only", "gemm n=1024", *dry]) == 0
    assert gpu.main(["profile", "--only", "softmax k=1024 default", *dry]) == 0
    assert gpu.main(["machine", *dry]) == 0
    found = rows(results)
    assert [r["part"] for r in found] == ["correct", "race", "profile", "machine"]
    assert found[1]["speed"]
    assert found[1]["checked"]
    assert found[2]["key"]
    assert gpu.main(["race", "--only", "gemm n=1024", *dry]) == 0
    assert len(rows(results)) == 4


def test_it_stops_in_time_and_says_so(gpu: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "rows.jsonl"
    assert gpu.main(["machine", "--dry", "--seconds", "-1", "--results", str(results)]) == 1
    assert "1 left" in capsys.readouterr().err


def test_a_wrong_result_is_a_row_with_an_error(gpu: ModuleType, tmp_path: Path) -> None:
    def wrong() -> dict[str, object]:
        raise AssertionError("Y[0] = 1, oracle 2")

    options = gpu.Options("interpret", 10.0, "", tmp_path / "rows.jsonl", True)
    assert gpu.run_part("correct", iter([("x", wrong)]), options) == 1
    assert "oracle 2" in str(rows(options.results)[0]["error"])


def test_a_job_that_took_the_process_down_is_told_and_not_tried_again(gpu: ModuleType, tmp_path: Path) -> None:
    options = gpu.Options("interpret", 10.0, "", tmp_path / "rows.jsonl", True)
    options.results.with_suffix(".running").write_text(json.dumps(["race", "x"]))
    jobs = [("x", lambda: {"tried": "again"}), ("y", lambda: {"fine": 1})]
    assert gpu.run_part("race", iter(jobs), options) == 1
    found = rows(options.results)
    assert [(r["name"], r.get("error")) for r in found] == [("x", "the process died"), ("y", None)]
    assert gpu.run_part("race", iter(jobs), options) == 0


def test_a_job_that_hangs_ends_the_process_and_leaves_a_row(tmp_path: Path) -> None:
    results = tmp_path / "rows.jsonl"
    text = f"""
import time
from pathlib import Path
from castile.benchmarks import gpu
options = gpu.Options("interpret", 10.0, "", Path({str(results)!r}), True, 0.2)
gpu.run_part("race", iter([("x", lambda: time.sleep(60))]), options)
"""
    assert subprocess.run([sys.executable, "-c", text], check=False, timeout=30).returncode == 1
    assert "more than 0 s" in str(rows(results)[0]["error"])


def test_every_race_has_its_peers_and_extents_that_fit() -> None:
    from castile.benchmarks._gpu_races import races

    found = {r.name: r for r in races()}
    for r in found.values():
        resolve(r.cascade, dict(r.extents))
        resolve(r.cascade, dict(r.tiny))
        assert r.peers
    assert {"flash", "cudnn", "efficient", "flash-attn", "flex"} <= set(found["attention_causal d=128 n=16384"].peers)
    assert {"flash", "cudnn", "efficient", "flex"} <= set(found["backward d=64 n=1024"].peers)
    assert {f"{v} d=128 n=4096" for v in ("window", "softcap", "alibi", "document", "sink")} <= set(found)
    assert {"decode n=131072", "decode gqa n=8192", "softmax k=1048576", "gemm n=8192", "int4 m=16"} <= set(found)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["race", "profile"])
def test_all_races_run_dry(gpu: ModuleType, tmp_path: Path, part: str) -> None:
    assert gpu.main([part, "--dry", "--seconds", "900", "--results", str(tmp_path / "rows.jsonl")]) == 0


def test_comparison_catches_a_wrong_output(gpu: ModuleType) -> None:
    import castile

    c = castile.parse("def f(X: f32[n]) -> Y:\n    Y[n] = X[n] * 2.0\n")
    x = torch.arange(4.0)
    assert gpu.compare(c, {"n": 4}, {"X": x}, (2 * x,), 0) <= 1
    with pytest.raises(AssertionError):
        gpu.compare(c, {"n": 4}, {"X": x}, (2 * x + 1,), 0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_clear_line(gpu: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["machine"]) == 2
    assert "no GPU" in capsys.readouterr().err
