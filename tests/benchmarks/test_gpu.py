"""The GPU benchmark's logic, in dry runs under Triton's interpreter."""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
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
    def wrong(row: dict[str, object]) -> None:
        raise AssertionError("Y[0] = 1, oracle 2")

    options = gpu.Options("interpret", 10.0, "", tmp_path / "rows.jsonl", True)
    assert gpu.run_part("correct", iter([("x", wrong)]), options) == 1
    assert "oracle 2" in str(rows(options.results)[0]["error"])


def test_a_job_that_took_the_process_down_is_told_and_not_tried_again(gpu: ModuleType, tmp_path: Path) -> None:
    options = gpu.Options("interpret", 10.0, "", tmp_path / "rows.jsonl", True)
    options.results.with_suffix(".running").write_text(json.dumps(["race", "x"]))
    jobs = [("x", lambda row: row.update(tried="again")), ("y", lambda row: row.update(fine=1))]
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
gpu.run_part("race", iter([("x", lambda row: (row.update(times=3), time.sleep(60)))]), options)
"""
    assert subprocess.run([sys.executable, "-c", text], check=False, timeout=30).returncode == 1
    assert "more than 0 s" in str(rows(results)[0]["error"])
    assert rows(results)[0]["times"] == 3


def test_every_race_has_its_peers_and_extents_that_fit() -> None:
    from castile.benchmarks._gpu_races import races

    found = {r.name: r for r in races()}
    for r in found.values():
        resolve(r.cascade, dict(r.extents))
        resolve(r.cascade, dict(r.tiny))
        assert r.peers
    assert {"flash", "cudnn", "efficient", "flash-attn", "flex"} <= set(found["attention_causal d=128 n=16384"].peers)
    assert {"flash", "cudnn", "efficient", "flex"} <= set(found["backward d=64 n=1024"].peers)
    assert {"flash", "cudnn", "efficient", "flex"} <= set(found["backward causal d=128 n=16384"].peers)
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


def test_shares_do_all_jobs_once_and_keep_apart(gpu: ModuleType, tmp_path: Path) -> None:
    results, done = tmp_path / "rows.jsonl", []
    jobs = [(str(i), lambda row, i=i: done.append(i)) for i in range(7)]
    for part in ("1/3", "2/3", "3/3"):
        options = gpu.Options("interpret", 10.0, "", results, True, share=gpu.share(part))
        assert gpu.run_part("correct", iter(jobs), options) == 0
    assert sorted(done) == list(range(7))
    assert len({gpu.Options("x", 1.0, "", results, True, share=(i, 3)).at_hand for i in range(3)}) == 3
    assert gpu.main(["correct", "--dry", "--only", "no such example", "--share", "2/3", "--results", str(results)]) == 0
    for text in ("0/3", "4/3", "x", "1"):
        with pytest.raises(argparse.ArgumentTypeError):
            gpu.share(text)


def test_a_peer_that_computes_something_else_is_not_raced(gpu: ModuleType, tmp_path: Path) -> None:
    from castile.benchmarks._gpu_races import races

    r = next(x for x in races() if x.name == "gemm n=1024")
    peers = {
        "torch other": lambda inputs: lambda: inputs["A"] @ inputs["B"] * 1.1,
        "torch shape": lambda inputs: lambda: (inputs["A"] @ inputs["B"])[1:],
        "torch two": lambda inputs: lambda: (inputs["A"], inputs["B"]),
        "torch same": lambda inputs: lambda: inputs["A"] @ inputs["B"],
    }
    row: dict[str, object] = {}
    gpu.race_row(replace(r, peers=peers), gpu.Options("interpret", 10.0, "", tmp_path / "x", True), row)
    assert row["speed"].keys() == {"torch same"}
    assert row["absent"].keys() == peers.keys() - {"torch same"}
    nothing = torch.full((2, 2), float("nan"))
    with pytest.raises(AssertionError):
        gpu.alike((torch.ones(2, 2),), nothing)


@pytest.mark.parametrize("name", ["backward causal d=64 n=1024", "int4 m=16"])
def test_peers_of_races_compute_the_same(gpu: ModuleType, tmp_path: Path, name: str) -> None:
    results = tmp_path / "rows.jsonl"
    assert gpu.main(["race", "--dry", "--only", name, "--results", str(results)]) == 0
    (row,) = rows(results)
    assert row["speed"].keys() == {"torch math" if "backward" in name else "torch half"}, row["absent"]


def test_other_tiles_are_those_that_fit(gpu: ModuleType, tmp_path: Path) -> None:
    from castile.benchmarks._gpu_races import races

    options = gpu.Options("cuda:90", 10.0, "", tmp_path / "x", False)
    # Of attention's at d=128 none of twice the size fits; a GEMM's all do, also where pieces of a sum are merged.
    for name, doubled in {"attention d=128 n=1024": False, "gemm n=1024": True}.items():
        r = next(x for x in races() if x.name == name)
        tiles = gpu.default_mapping(r.cascade, "cuda:90", resolve(r.cascade, dict(r.extents))).tiles
        halves, doubles = ({(rank, int(size * f)) for rank, size in tiles.items()} for f in (0.5, 2))
        assert set(gpu.other_tiles(r, options)) == halves | (doubles if doubled else set())
