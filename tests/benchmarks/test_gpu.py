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
from typing import Any

import pytest

pytest.importorskip("triton")
torch = pytest.importorskip("torch")

from castile.benchmarks._gpu_check import compare  # noqa: E402
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


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_parts_run_dry_and_resume(gpu: ModuleType, tmp_path: Path) -> None:
    results = tmp_path / "rows.jsonl"
    dry = ["--dry", "--results", str(results)]
    assert gpu.main(["correct", "--only", "softmax_entropy", *dry]) == 0
    assert gpu.main(["race", "--only", "gemm n=1024", *dry]) == 0
    assert gpu.main(["profile", "--only", "softmax k=1024 default", *dry]) == 0
    assert gpu.main(["machine", *dry]) == 0
    found = rows(results)
    assert [r["part"] for r in found] == ["correct", "correct", "race", "profile", "machine"]
    assert [r["name"] for r in found[:2]] == ["softmax_entropy even", "softmax_entropy ragged"]
    assert [set(r["extents"].values()) for r in found[:2]] == [{4}, {5}]
    assert found[2]["speed"]
    assert found[2]["checked"]
    assert {"median_us", "low_us", "high_us", "host_us"} == found[2]["times"]["castile"].keys()
    assert found[3]["key"]
    assert found[3]["host_us"] > 0
    assert gpu.main(["race", "--only", "gemm n=1024", *dry]) == 0
    assert len(rows(results)) == 5


def test_a_new_folder_goes_on_from_earlier_results(gpu: ModuleType, tmp_path: Path) -> None:
    earlier, results = tmp_path / "earlier" / "gpu.jsonl", tmp_path / "out" / "gpu.jsonl"
    assert gpu.main(["correct", "--dry", "--only", "softmax_entropy even", "--results", str(earlier)]) == 0
    again = ["correct", "--dry", "--only", "softmax_entropy", "--results", str(results), "--earlier"]
    with pytest.raises(SystemExit):
        gpu.main([*again, str(tmp_path / "nowhere.jsonl")])
    assert gpu.main([*again, str(earlier)]) == 0
    assert [r["name"] for r in rows(results)] == ["softmax_entropy ragged"]
    assert len(rows(earlier)) == 1


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


def left_behind(results: Path, name: str, whole: bool) -> None:
    results.with_suffix(".running").write_text(json.dumps(["race", name, whole]))


def test_a_job_that_took_the_process_down_is_told_and_not_tried_again(gpu: ModuleType, tmp_path: Path) -> None:
    options = gpu.Options("interpret", 1000.0, "", tmp_path / "rows.jsonl", True)
    left_behind(options.results, "x", True)
    jobs = [("x", lambda row: row.update(tried="again")), ("y", lambda row: row.update(fine=1))]
    assert gpu.run_part("race", iter(jobs), options) == 1
    found = rows(options.results)
    assert [(r["name"], r.get("error")) for r in found] == [("x", "the process died"), ("y", None)]
    assert gpu.run_part("race", iter(jobs), options) == 0


def test_a_job_that_died_elsewhere_is_told_too_unless_the_end_cut_it_off(gpu: ModuleType, tmp_path: Path) -> None:
    earlier = tuple(tmp_path / name / "gpu.jsonl" for name in ("one", "two"))
    for path, whole in zip(earlier, (True, False), strict=True):
        path.parent.mkdir()
        path.touch()
        left_behind(path, path.parent.name, whole)
    options = gpu.Options("interpret", 1000.0, "", tmp_path / "gpu.jsonl", True, earlier=earlier)
    assert gpu.run_part("race", iter([(name, lambda row: None) for name in ("one", "two")]), options) == 1
    assert [(r["name"], r.get("error")) for r in rows(options.results)] == [("one", "the process died"), ("two", None)]


def in_a_process(results: Path, seconds: float, job_seconds: float, job: str, grace: float = 20.0) -> int:
    """The exit code of a process that runs one job, ``x``."""
    text = f"""
import ctypes, time
from pathlib import Path
from castile.benchmarks import _gpu_run as run
run.GRACE_S = {grace}
options = run.Options("interpret", {seconds}, "", Path({str(results)!r}), True, {job_seconds})
run.run_part("race", iter([("x", lambda row: (row.update(times=3), {job}))]), options)
"""
    return subprocess.run([sys.executable, "-c", text], check=False, timeout=60, capture_output=True).returncode


def test_a_job_that_hangs_ends_the_process_and_leaves_a_row(tmp_path: Path) -> None:
    results = tmp_path / "rows.jsonl"
    assert in_a_process(results, 1000.0, 0.2, "time.sleep(50)") == 3
    assert "more than 0 s" in str(rows(results)[0]["error"])
    assert rows(results)[0]["times"] == 3


def test_a_job_cut_off_by_the_end_of_the_run_is_tried_again(gpu: ModuleType, tmp_path: Path) -> None:
    results = tmp_path / "rows.jsonl"
    assert in_a_process(results, 0.5, 1000.0, "time.sleep(50)") == 1
    (row,) = rows(results)
    assert (row["unfinished"], row["times"], "error" in row) == (True, 3, False)
    options = gpu.Options("interpret", 1000.0, "", results, True)
    assert not options.at_hand.exists()
    assert gpu.run_part("race", iter([("x", lambda row: row.update(times=4))]), options) == 0
    assert [r.get("unfinished") for r in rows(results)] == [True, None]
    assert gpu.run_part("race", iter([("x", lambda row: 1 / 0)]), options) == 0


def test_a_call_that_keeps_the_interpreter_is_ended_too(gpu: ModuleType, tmp_path: Path) -> None:
    results = tmp_path / "rows.jsonl"
    # As a library does that never lets another thread run.
    assert in_a_process(results, 1000.0, 0.2, "ctypes.PyDLL(None).sleep(50)", grace=0.3) == 1
    assert gpu.run_part("race", iter([]), gpu.Options("interpret", 1000.0, "", results, True)) == 1
    assert [r["error"] for r in rows(results)] == ["the process died"]


SUPERVISED = """
import ctypes, os, sys, time
from pathlib import Path
from castile.benchmarks import _gpu_run as run
seconds = float(sys.argv[sys.argv.index("--seconds") + 1])
options = run.Options("interpret", seconds, "", Path(sys.argv[1]), True, 3.0)
jobs = [("x", lambda row: time.sleep(50)), ("y", lambda row: os.abort()), ("z", lambda row: None)]
sys.exit(run.run_part("race", iter(jobs), options))
"""


def test_what_takes_its_process_down_costs_no_other_job(gpu: ModuleType, tmp_path: Path) -> None:
    options = gpu.Options("interpret", 60.0, "", tmp_path / "rows.jsonl", True)
    command = [sys.executable, "-c", SUPERVISED, str(options.results)]
    assert gpu.supervise(command, options) == 1
    told = {r["name"]: r.get("error") for r in rows(options.results)}
    assert told == {"x": "it took more than 3 s", "y": "the process died", "z": None}
    assert gpu.supervise(command, options) == 0
    assert not options.at_hand.exists()
    # What fails before any job is not tried again and again.
    assert gpu.supervise([sys.executable, "-c", "import nothing_of_this_name"], options) == 1


def test_the_command_runs_a_part(tmp_path: Path) -> None:
    results = tmp_path / "rows.jsonl"
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "machine", "--dry", "--results", str(results)]
    assert subprocess.run(command, check=False, capture_output=True).returncode == 0
    assert [r["part"] for r in rows(results)] == ["machine"]


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
    assert {"rmsnorm k=4096", "layernorm k=1024"} <= set(found)


def test_races_begin_with_one_of_each_kind() -> None:
    from castile.benchmarks._gpu_races import families, races

    kinds = [{r.name.rsplit(" ", 1)[0].removesuffix(" d=128").removesuffix(" d=64") for r in f} for f in families()]
    assert all(len(kind) == 1 for kind in kinds)
    names = [r.name for r in races()]
    assert len(set(names)) == len(names) == sum(map(len, families()))
    first = names[: len(kinds)]
    assert [kind for kind, name in zip(kinds, first, strict=True) if not name.startswith(min(kind))] == []


@pytest.mark.slow
@pytest.mark.parametrize("part", ["race", "profile", "tune"])
def test_all_races_run_dry(gpu: ModuleType, tmp_path: Path, part: str) -> None:
    assert gpu.main([part, "--dry", "--seconds", "900", "--results", str(tmp_path / "rows.jsonl")]) == 0


def test_comparison_catches_a_wrong_output() -> None:
    import castile

    c = castile.parse("def f(X: f32[n]) -> Y:\n    Y[n] = X[n] * 2.0\n")
    x = torch.arange(4.0)
    assert compare(c, {"n": 4}, {"X": x}, (2 * x,), 0) <= 1
    with pytest.raises(AssertionError):
        compare(c, {"n": 4}, {"X": x}, (2 * x + 1,), 0)


@pytest.mark.parametrize("corner", [(0, 0), (-1, -1)])
def test_comparison_sees_the_first_and_the_last_output(gpu: ModuleType, corner: tuple[int, int]) -> None:
    c = example("gemm")
    extents = {"m": 300, "n": 301, "k": 16}
    inputs = gpu.tensors(c, extents, 0, "cpu")
    y = (inputs["A"].float() @ inputs["B"].float()).to(torch.bfloat16)
    assert compare(c, extents, inputs, (y,), 0) <= 1
    y[corner] += 30
    with pytest.raises(AssertionError):
        compare(c, extents, inputs, (y,), 0)


def test_a_wrong_race_keeps_its_times(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from castile.benchmarks._gpu_races import gemm

    def wrong(*given: object) -> float:
        raise AssertionError("C[0, 0] = 1, oracle 2")

    monkeypatch.setattr("castile.benchmarks._gpu_check.compare", wrong)
    options = gpu.Options("interpret", 1000.0, "", tmp_path / "rows.jsonl", True)
    assert gpu.run_part("race", iter([("gemm", lambda row: gpu.race_row(gemm(1024), options, row))]), options) == 1
    (row,) = rows(options.results)
    assert "oracle 2" in row["error"]
    assert row["times"]["torch cublas"]
    assert not row["checked"]


# What is checked, and at which extents


def example(name: str) -> Any:
    import castile

    return castile.load(ROOT / "examples" / "cascades" / f"{name}.cascade")


@pytest.mark.parametrize("most", [256, 257])
@pytest.mark.parametrize("name", ["attention_merge", "ssd", "conv2d", "attention", "gemm_int4", "delta_rule", "rope"])
def test_examples_are_small_enough_and_keep_their_parity(name: str, most: int) -> None:
    from castile.benchmarks import _gpu_check as check
    from castile.ir.extents import given_ranks

    c = example(name)
    extents = check.sizes(c, most)
    assert not check.too_large(c, extents)
    given = {extents[r] for r in given_ranks(c) if extents[r] not in (check.ON_CHIP, most)}
    assert all(n == 2 + most % 2 or n >= check.LEAST for n in given)
    assert {n % 2 for n in given} <= {most % 2}


def test_extents_leave_windows_room_and_scans_steps() -> None:
    from castile.benchmarks import _gpu_check as check

    assert check.sizes(example("conv2d"), 256)["p"] > 1
    assert check.sizes(example("conv1d_dilated"), 257)["p"] > 1
    assert check.sizes(example("delta_rule"), 256)["t"] > 1
    assert check.sizes(example("attention"), 257) == {"b": 3, "h": 3, "q": 257, "d": 64, "k": 257, "f": 64}
    assert check.sizes(example("attention"), 256) == {"b": 2, "h": 2, "q": 256, "d": 64, "k": 256, "f": 64}


@pytest.mark.parametrize(
    ("name", "ranks"),
    [
        ("gemm", "m n"),
        ("attention", "b f h q"),
        ("attention_causal", "b f h"),
        ("attention_backward", "b h"),
        ("gemm_int4", "m n"),
        ("mamba", "b c"),
        ("conv2d", "n o"),
        ("cumulative_sum", "n"),
        ("softmax", "n"),
        ("rope", "b h t"),
        ("embedding_bag", "b d"),
    ],
)
def test_ranks_along_which_outputs_are_independent(name: str, ranks: str) -> None:
    from castile.benchmarks._gpu_check import independent

    assert " ".join(sorted(independent(example(name)))) == ranks


@pytest.mark.parametrize("name", ["gemm_int4", "attention_causal", "attention_backward", "mamba", "conv2d", "rope"])
def test_the_oracle_says_the_same_of_what_goes_to_the_host(gpu: ModuleType, name: str) -> None:
    import numpy as np

    from castile.benchmarks import _gpu_check as check
    from castile.ir.bound import reference

    c = example(name)
    extents = check.sizes(c, 5)
    inputs = gpu.tensors(c, extents, 0, "cpu")
    at = {r: places[:2] for r, places in check.sample(c, extents, 0).items()}
    arrays, local = check.narrowed(c, inputs, at)
    assert sum(np.size(x) for x in arrays.values()) < sum(getattr(x, "numel", lambda: 1)() for x in inputs.values())
    whole = reference(c, {n: check.numbers(x) for n, x in inputs.items()}, at)
    for output, found in reference(c, arrays, local).items():
        np.testing.assert_allclose(found, whole[output], rtol=1e-12)


def test_samples_are_few_where_the_oracle_takes_long() -> None:
    from castile.benchmarks import _gpu_check as check
    from castile.benchmarks._gpu_races import races

    def count(c: Any, extents: Any) -> int:
        return len(next(iter(check.sample(c, extents, 0).values())))

    assert count(example("gemm"), {"m": 8192, "n": 8192, "k": 8192}) == check.MOST_SAMPLES
    monoid = example("attention_monoid")
    assert count(monoid, check.sizes(monoid, 257)) == check.LEAST_SAMPLES
    found = {r.name: r for r in races()}
    for name in ("attention d=128 n=16384", "backward d=128 n=16384", "decode n=131072", "softmax k=1048576"):
        r = found[name]
        at = check.sample(r.cascade, resolve(r.cascade, dict(r.extents)), 0)
        kept = {q: len(set(places)) for q, places in at.items()}
        assert check.LEAST_SAMPLES <= count(r.cascade, resolve(r.cascade, dict(r.extents))) < check.MOST_SAMPLES
        assert len(set(zip(*(places.tolist() for places in at.values()), strict=True))) > 2, kept


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float8_e4m3fn", "float8_e5m2", "uint8", "uint32", "bool"])
def test_every_type_is_picked_from(kind: str) -> None:
    from castile.benchmarks._gpu_check import _picked

    x = torch.tensor([[0.0, 1.0, 2.0], [1.0, 0.0, 3.0]]).to(torch.int32)
    x = x.view(torch.uint32) if kind == "uint32" else x.to(getattr(torch, kind))
    assert _picked(x, [[0, 1], [2, 0]]).tolist() == [x.tolist()[0][2], x.tolist()[1][0]]
    assert _picked(x.T, [slice(None), [1]]).tolist() == [[row] for row in x.tolist()[1]]


# Times


def test_the_device_is_held_before_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    from castile.benchmarks import _gpu_times as times

    slept: list[object] = []
    flush = SimpleNamespace(is_cuda=True, zero_=lambda: slept.append("flush"))
    monkeypatch.setattr(torch.cuda, "_sleep", slept.append, raising=False)
    times.hold(flush)
    assert slept == [times.HOLD_CYCLES]
    monkeypatch.delattr(torch.cuda, "_sleep")
    times.hold(flush)
    assert slept[1:] == ["flush"] * times.HOLD_FLUSHES


def test_on_a_device_each_call_stands_between_events_behind_a_held_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    from castile.benchmarks import _gpu_times as times

    told: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            told.append("event")

        def elapsed_time(self, other: Event) -> float:
            assert told[-1] == "wait"
            return 0.25

    flush = SimpleNamespace(is_cuda=True, zero_=lambda: told.append("flush"))
    monkeypatch.setattr(torch, "empty", lambda *size, **given: flush)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: told.append("hold"), raising=False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: told.append("wait"))
    found = times.times_us({"a": lambda: told.append("a"), "b": lambda: told.append("b")}, False, 2)
    one = ["flush", "hold", "event", "{}", "event", "wait"]
    assert told == ["a", "b", *[t.format(n) for _ in range(2) for n in "ab" for t in one]]
    assert found["a"].device == found["b"].device == [250.0, 250.0]


def test_times_are_interleaved_and_tell_the_host_s_share() -> None:
    from castile.benchmarks import _gpu_times as times

    called: list[str] = []
    found = times.times_us({n: lambda n=n: called.append(n) for n in "ab"}, True)
    assert called == list("ab" * (1 + times.DRY_REPEATS))
    assert all(len(t.device) == len(t.host) == times.DRY_REPEATS for t in found.values())
    summary = times.Times([5.0, 1.0, 2.0, 3.0, 4.0], [9.0, 7.0, 8.0]).summary()
    assert summary == {"median_us": 3.0, "low_us": 2.0, "high_us": 4.0, "host_us": 8.0}


def test_other_mappings_are_checked_too(gpu: ModuleType, tmp_path: Path) -> None:
    # With 8 warps Triton shares nothing out.
    assert {"descriptors": 1, "specialize": 1, "warps": 4} in gpu.CHANGES
    results = tmp_path / "rows.jsonl"
    dry = ["--dry", "--results", str(results), "--only"]
    assert gpu.main(["correct", *dry, "gemm ragged descriptors=1,specialize=1,warps=4"]) == 0
    (row,) = rows(results)
    assert row["worst"] <= 1
    assert row["mapping"]["knobs"].items() >= {"descriptors": 1, "specialize": 1, "warps": 4}.items()
    options = gpu.Options("cuda:90", 10.0, "", results, False)
    names = [name for name, _ in gpu.correct(options)]
    assert len(set(names)) == len(names)
    assert {f"{name} {kind} stages=4" for name in gpu.VARIED for kind in gpu.EXTENTS} <= set(names)


def test_a_profile_has_some_of_each_kind_before_much_of_any(gpu: ModuleType, tmp_path: Path) -> None:
    from castile.benchmarks._gpu_races import families

    names = [name for name, _ in gpu.profile(gpu.Options("cuda:90", 10.0, "none", tmp_path / "x", False))]
    assert len(set(names)) == len(names)
    first = [f[0].name for f in families()]
    assert names[: len(first)] == [f"{name} default" for name in first]
    assert names[len(first) : 2 * len(first)] == [f"{name} descriptors=1" for name in first]


def test_a_climb_keeps_what_went_wrong_and_ends_with_the_best(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from castile.benchmarks import _gpu_mappings as mappings
    from castile.benchmarks._gpu_times import Times

    compiled = mappings.castile.compile

    def stands_in(c: Any, target: str, extents: Any, mapping: Any) -> Any:
        if mapping.knob("persistent"):
            raise RuntimeError("out of resource")
        found = compiled(c, target, extents, mapping)
        us.append(100.0 - 10 * mapping.knob("descriptors") - mapping.knob("warps"))
        return found

    us: list[float] = []
    monkeypatch.setattr(mappings.castile, "compile", stands_in)
    monkeypatch.setattr(mappings, "times_us", lambda calls, *_: {n: Times([us[-1]], [1.0]) for n in calls})
    row: dict[str, Any] = {}
    r = next(x for x in mappings_races() if x.name == "softmax k=1024")
    mappings.tune_row(r, gpu.Options("interpret", 1e4, "", tmp_path / "x", True), row)
    assert row["mapping"]["knobs"].items() >= {"descriptors": 1, "warps": 16}.items()
    assert row["worst"] <= 1
    assert "out of resource" in next(t["error"] for t in row["trials"] if "error" in t)
    kept = [json.dumps(t["mapping"]) for t in row["trials"]]
    assert len(set(kept)) == len(kept)
    assert kept[0] == json.dumps(row["default"])


def mappings_races() -> Any:
    from castile.benchmarks._gpu_races import races

    return races()


def test_another_mapping_that_computes_something_else_is_an_error(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from castile.benchmarks import _gpu_mappings as mappings

    compiled = mappings.castile.compile

    def wrong(c: Any, target: str, extents: Any, mapping: Any) -> Any:
        found = compiled(c, target, extents, mapping)
        if not mapping.knob("descriptors"):
            return found
        return type("Wrong", (), {"__call__": lambda self, out=None, **given: found(**given) * 1.1})()

    monkeypatch.setattr(mappings.castile, "compile", wrong)
    options = gpu.Options("interpret", 1e3, "softmax k=1024 descriptors=1", tmp_path / "rows.jsonl", True)
    assert gpu.run_part("profile", gpu.profile(options), options) == 1
    assert ["something else" in r["error"] for r in rows(options.results)] == [True, True, True, True]
    assert all(r["median_us"] for r in rows(options.results))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_clear_line(gpu: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["machine"]) == 2
    assert "no GPU" in capsys.readouterr().err


def test_shares_do_all_jobs_once_and_keep_apart(gpu: ModuleType, tmp_path: Path) -> None:
    results, done = tmp_path / "rows.jsonl", []
    jobs = [(str(i), lambda row, i=i: done.append(i)) for i in range(7)]
    for part in ("1/3", "2/3", "3/3"):
        options = gpu.Options("interpret", 1000.0, "", results, True, share=gpu.share(part))
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


def test_kernels_are_alike_part_by_part(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("castile.benchmarks._gpu_check.PART", 6)
    x = torch.randn(7, 3)
    gpu.alike((x, x[0, 0], x[:0]), (x + 1e-3, x[0, 0], x[:0]))
    gpu.alike((torch.tensor([float("inf"), float("nan"), 1.0]),), torch.tensor([float("inf"), float("nan"), 1.001]))
    for wrong in (x * 1.1, torch.full_like(x, float("nan")), torch.cat([x[:6], -x[6:]])):
        with pytest.raises(AssertionError):
            gpu.alike((x,), wrong)


@pytest.mark.parametrize("name", ["backward causal d=64 n=1024", "int4 m=16"])
def test_peers_of_races_compute_the_same(gpu: ModuleType, tmp_path: Path, name: str) -> None:
    results = tmp_path / "rows.jsonl"
    assert gpu.main(["race", "--dry", "--only", name, "--results", str(results)]) == 0
    (row,) = rows(results)
    assert row["speed"].keys() == {"torch math" if "backward" in name else "torch half"}, row["absent"]


def test_other_tiles_are_those_that_fit(gpu: ModuleType, tmp_path: Path) -> None:
    from castile.benchmarks._gpu_races import races
    from castile.passes.defaults import default_mapping

    options = gpu.Options("cuda:90", 10.0, "", tmp_path / "x", False)
    # Of attention's at d=128 none of twice the size fits; a GEMM's all do, also where pieces of a sum are merged.
    for name, doubled in {"attention d=128 n=1024": False, "gemm n=1024": True}.items():
        r = next(x for x in races() if x.name == name)
        tiles = default_mapping(r.cascade, "cuda:90", resolve(r.cascade, dict(r.extents))).tiles
        halves, doubles = ({(rank, int(size * f)) for rank, size in tiles.items()} for f in (0.5, 2))
        assert set(gpu.other_tiles(r, options)) == halves | (doubles if doubled else set())
    decode = next(x for x in races() if x.name == "decode n=8192")  # some of its tiles are of 1
    assert all(size >= 16 for _, size in gpu.other_tiles(decode, options))
