"""`castile tune`, `records`, `replay`, `report` and `device`: what they print, write and refuse."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from castile.autotune.probe import device_name
from castile.autotune.record import Record
from castile.autotune.records import Records
from castile.cli.tune import duration
from castile.ir.errors import UsageError
from castile.ir.mapping import Mapping

TEXT = "def double(x: f32[n]) -> y:\n    y[n] = 2 * x[n]\n"


@pytest.fixture(autouse=True)
def own_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "records.sqlite"
    monkeypatch.setenv("CASTILE_RECORDS", str(path))
    return path


@pytest.fixture
def filled(own_records: Path) -> Path:
    with Records() as r:
        r.add(
            [
                Record(TEXT, "cpu", "<b>a CPU</b>", {"n": 64}, Mapping(tiles={"n": 4}), time_s=1e-3, times=(1e-3,)),
                Record(TEXT, "cpu", "<b>a CPU</b>", {"n": 64}, Mapping(tiles={"n": 8}), "crash", "SIGSEGV"),
                Record(TEXT, "cpu", "<b>a CPU</b>", {"n": 64}, Mapping(tiles={"n": 2}), time_s=9e-4, kind="final"),
            ]
        )
    return own_records


def test_tune_records_and_replays(castile: Any, tmp_path: Path) -> None:
    done = castile("tune", "softmax", "--shape", "n=16", "k=32", "--trials", 2, "--budget", "30s", "--json")
    assert done.code == 0, done.err
    assert done.json["trials"] == 2
    assert done.json["shapes"] == {"n": 16, "k": 32}
    assert done.json["best"]["time_s"] > 0
    (row,) = castile("records", "list", "--json").json
    assert (row["cascade"], row["trials"], row["failed"]) == ("softmax", 2, 0)
    assert "softmax" in castile("records", "show").out


def test_interrupted(tmp_path: Path) -> None:
    """Ctrl-C leaves what was measured, says so in a line, and the same command goes on from there."""
    records = tmp_path / "r"
    command = [sys.executable, "-m", "castile", "tune", "softmax", "--shape", "n=16", "k=32", "--records", str(records)]

    def heard() -> None:  # what a shell starts in the background ignores Ctrl-C
        signal.signal(signal.SIGINT, signal.default_int_handler)

    pipe = subprocess.PIPE
    tuner = subprocess.Popen(command, stderr=pipe, stdout=pipe, text=True, preexec_fn=heard)
    for _ in range(600):
        with contextlib.suppress(UsageError), Records(records, read_only=True) as r:
            if len(r.all()) > 1:
                break
        time.sleep(0.1)
    tuner.send_signal(signal.SIGINT)
    out, err = tuner.communicate(timeout=30)
    assert tuner.returncode == 130
    assert out == ""
    assert re.fullmatch(r"interrupted: \d+ trials are on record; the best so far takes .*\n", err)
    with Records(records) as r:
        assert len(r.all()) >= int(err.split()[1])


def test_without_scipy(castile: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    done = castile("tune", "softmax", "--shape", "n=16", "k=32", "--trials", 2)
    assert done.code == 2
    assert "needs scipy" in done.err


def test_list_show_export_import_merge(castile: Any, filled: Path, tmp_path: Path) -> None:
    (row,) = castile("records", "list", "--json").json
    assert (row["trials"], row["failed"], row["time_s"]) == (2, 1, 9e-4)
    assert "crash" in castile("records", "show", "--status", "crash").out
    unknown = castile("records", "show", "--status", "crush")
    assert (unknown.code, unknown.out) == (2, "")
    assert "did you mean `crash`?" in unknown.err
    lines = tmp_path / "lines"
    assert castile("records", "export", "-o", lines).code == 0
    assert castile("records", "import", lines, "--json").json == {"read": 3, "added": 0}
    other = tmp_path / "other"
    assert castile("records", "import", lines, "--records", other, "--json").json == {"read": 3, "added": 3}
    assert castile("records", "merge", filled, "--records", other, "--json").json == {"read": 3, "added": 0}


def test_records_do_not_steer_the_terminal(castile: Any, own_records: Path) -> None:
    with Records() as r:
        r.add([Record(TEXT, "cpu\x1b[2J", "a", {"n": 64}, Mapping(), "crash", "\x1b[2J\x9b", at="\x1b[2J")])
    listed, shown = castile("records", "list").out, castile("records", "show").out
    assert "\x1b" not in listed + shown
    assert "cpu?[2J" in listed
    assert shown.endswith("crash: ?[2J?\n")


def test_t4_and_replay(castile: Any, filled: Path, tmp_path: Path) -> None:
    table = tmp_path / "t4.json"
    assert castile("records", "export", "--t4", "-o", table).code == 0
    found = castile("replay", table, "--trials", 2, "--seeds", 2, "--json").json
    assert (found["configurations"], found["valid"]) == (2, 1)
    assert found["median_regret"] == {"2": 0.0}
    assert "regret" in castile("replay", table, "--trials", 2, "--seeds", 1).out


def test_one_size_of_several_is_exported(castile: Any, filled: Path) -> None:
    with Records() as r:
        r.add([Record(TEXT, "cpu", "<b>a CPU</b>", {"n": 65}, Mapping(tiles={"n": 4}), time_s=1e-3, times=(1e-3,))])
    assert "--shape" in castile("records", "export", "--t4").err
    assert len(castile("records", "export", "--t4", "--shape", "n=65").json["results"]) == 1
    assert len(castile("records", "export", "--shape", "n=64").out.splitlines()) == 3


def test_emit_takes_what_was_tuned(castile: Any, own_records: Path, tmp_path: Path) -> None:
    file = tmp_path / "double.cascade"
    file.write_text(TEXT)
    words = ("emit", file, "--target", "cpu", "--shape", "n=64", "--json")
    before = castile(*words).json
    with Records() as r:
        r.add([Record(TEXT, "cpu", device_name("cpu"), {"n": 64}, Mapping(tiles={"n": 24}), time_s=1e-3, kind="final")])
    after = castile(*words).json
    assert after["mapping"]["tiles"] == {"n": 24}
    assert "24" in after["source"]
    assert after["source"] != before["source"]
    given = castile(*words, "--mapping", json.dumps(before["mapping"])).json
    assert (given["mapping"], given["source"]) == (before["mapping"], before["source"])


def test_lock(castile: Any, filled: Path, tmp_path: Path) -> None:
    lock = tmp_path / "castile.lock"
    assert castile("records", "lock", "-o", lock).code == 0
    assert len(json.loads(lock.read_text())["pins"]) == 1
    other = tmp_path / "other"
    assert castile("records", "replay", lock, "--records", other, "--json").json == {"read": 1, "added": 1}


def test_what_is_listed_is_what_is_used(castile: Any, own_records: Path, tmp_path: Path) -> None:
    """Of winners the last, and a pin before any winner: in the list, on the page, and in a lock."""
    tiles = ("pinned", 2, 1e-3), ("final", 4, 1e-4), ("final", 8, 2e-4)
    page, pins = tmp_path / "out.html", tmp_path / "lock"
    for first, tile in ((1, 8), (0, 2)):
        path = tmp_path / f"{first}.sqlite"
        with Records(path) as r:
            for kind, n, time_s in tiles[first:]:
                r.add([Record(TEXT, "cpu", "a", {"n": 64}, Mapping(tiles={"n": n}), time_s=time_s, kind=kind)])
        (row,) = castile("records", "list", "--records", path, "--json").json
        assert row["mapping"]["tiles"] == {"n": tile}
        assert castile("records", "lock", "-o", pins, "--records", path).code == 0
        assert json.loads(pins.read_text())["pins"][0]["mapping"]["tiles"] == {"n": tile}
        assert castile("report", page, "--records", path).code == 0
        assert re.findall(r"n:(\d)", page.read_text())[0] == str(tile)


def test_report_is_whole_and_escaped(castile: Any, filled: Path, tmp_path: Path) -> None:
    page = tmp_path / "out.html"
    assert castile("report", page).code == 0
    text = page.read_text()
    assert "<b>" not in text
    assert "&lt;b&gt;a CPU" in text
    assert not re.search(r"(src|href)=|https?:|<script", text)
    assert "crash" in text


def test_device(castile: Any) -> None:
    assert castile("device", "--json").json["target"] == "cpu"
    assert castile("device", "--target", "cuda:90", "--json").json["features"]
    assert "exponentials" in castile("device").out
    assert castile("device", "--target", "cuda:9").code == 2


def test_device_measure(castile: Any) -> None:
    found = castile("device", "measure", "--seconds", "0.01", "--json").json
    rates = [m["bytes_per_s"] for m in found["memory"]]
    assert found["flops_per_s"]["f32"] > 1e9
    assert min(rates) > 1e8
    assert found["copy_bytes_per_s"] > 1e8


@pytest.mark.parametrize(
    "words",
    [
        ["tune", "attentoin"],
        ["tune", "gemm", "--w", "int3"],
        ["tune", "gemm", "--w", "int4", "--group", "7"],
        ["tune", "softmax", "--w", "int4"],
        ["tune", "softmax", "--budget", "soon"],
        ["tune", "softmax", "--budget", "0s"],
        ["tune", "softmax", "--shape", "zz=4"],
        ["tune", "softmax", "--target", "cuda:90"],
        ["tune"],
        ["records", "list"],
        ["records", "import", "none"],
        ["records", "merge", "none"],
        ["records", "replay", "none"],
        ["records", "lock", "-o", "/none/lock"],
        ["replay", "none"],
        ["report", "x.html"],
    ],
)
def test_mistakes(castile: Any, words: list[str]) -> None:
    done = castile(*words)
    assert done.code == 2
    assert done.out == ""
    assert done.err.startswith(("error: ", "none:"))


def test_reads_outside_are_told_where_they_stand(castile: Any, tmp_path: Path) -> None:
    """Before a kernel is built that would die of them."""
    path = tmp_path / "shift.cascade"
    path.write_text("def shift(x: f32[n]) -> y:\n    y[n] = x[n + 1]\n")
    for words in ((), ("--offline", "--target", "cuda:90")):
        done = castile("tune", path, "--shape", "n=8", "--budget", "5s", *words)
        assert (done.code, done.out) == (2, "")
        assert f"{path}:2:12: `x[n + 1]` is read outside `x` at n=7" in done.err


def test_too_few_compiled_rows(castile: Any, tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    rows = tmp_path / "rows.jsonl"
    rows.write_text((root / "benchmarks" / "results" / "cross_compile.jsonl").read_text().splitlines()[0])
    done = castile("costmodel", "eval", "--compiled", rows, "--cascades", root / "examples" / "cascades")
    assert (done.code, done.out) == (2, "")
    assert "too few examples" in done.err


def test_no_hint_leads_in_a_circle(castile: Any) -> None:
    for words in ((), ("--offline",)):
        done = castile("tune", "softmax", "--target", "interpret", *words)
        assert done.code == 2
        assert "offline out" not in done.err
        assert "tune --offline" not in done.err


def test_durations() -> None:
    assert [duration(t) for t in ("60", "60s", "5m", "1h", "1.5 min")] == [60, 60, 300, 3600, 90]
    for text in ("", "s", "-1s", "1 day", "inf", "1e3s", "8000h"):
        with pytest.raises(UsageError):
            duration(text)
