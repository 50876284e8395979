"""Records: what goes in comes out, whoever else writes; what is damaged is refused and left as it is."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest

import castile
from castile.autotune import records as module
from castile.autotune.exchange import export, imported, lock, pin, t4, unlocked
from castile.autotune.places import records_path
from castile.autotune.probe import device_name
from castile.autotune.record import STATUSES, Record
from castile.autotune.records import Records, distance, recorded
from castile.autotune.table import read_table
from castile.ir.errors import CastileError, InputError, UsageError
from castile.ir.mapping import Mapping

TEXT = """def softmax(X: f32[n, k]) -> Y:
    M[n] = max[k](X[n, k])
    P[n, k] = exp(X[n, k] - M[n])
    Y[n, k] = P[n, k] / sum[k](P[n, k])
"""
RENAMED = TEXT.replace("n,", "rows,").replace("[n]", "[rows]")


def record(**changes: object) -> Record:
    made = Record(TEXT, "cpu", "a CPU", {"n": 64, "k": 512}, Mapping(tiles={"n": 4}), time_s=1e-3, times=(1e-3, 2e-3))
    return replace(made, **changes)  # type: ignore[arg-type]


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "r.sqlite"
    with Records(path) as r:
        assert r.add([record(), record(status="crash", time_s=None, times=(), detail="SIGSEGV")]) == 2
    with Records(path, read_only=True) as r:
        first, second = r.all()
    assert (first.mapping, first.shapes, first.times) == (Mapping(tiles={"n": 4}), {"n": 64, "k": 512}, (1e-3, 2e-3))
    assert second.status == "crash"
    assert imported(export([first, second])) == [first, second]


def test_what_a_system_says_of_strange_paths_is_kept(tmp_path: Path) -> None:
    with Records(tmp_path / "r") as r:
        r.add([record(status="compile_error", time_s=None, times=(), detail=os.fsdecode(b"/folder/\xff: no"))])
        assert [x.detail for x in r.all()] == ["/folder/?: no"]
    (found,) = imported(export([record(versions={"compiler": "\ud800"})]))
    assert found.versions == {"compiler": "?"}


def test_import_and_merge_add_nothing_twice(tmp_path: Path) -> None:
    with Records(tmp_path / "a") as a, Records(tmp_path / "b") as b:
        a.add([record(), record(kind="final")])
        lines = export(a.all())
        assert b.add(imported(lines)) == 2
        assert b.add(imported(lines)) == 0
        assert b.merge(tmp_path / "a") == 0
        assert b.add([record()]) == 1


def test_best_goes_by_kind_then_shape_then_time(tmp_path: Path) -> None:
    c = castile.parse(TEXT)
    with Records(tmp_path / "r") as r:
        shapes = {"n": 64, "k": 512}
        assert r.best(c, shapes, "a CPU", "cpu") is None
        r.add([record(time_s=2e-3), record(mapping=Mapping(tiles={"n": 8}))])
        found = r.best(c, shapes, "a CPU", "cpu")
        assert found is not None
        assert found.mapping.tiles["n"] == 8
        r.add([record(kind="final", time_s=5e-3, mapping=Mapping(tiles={"n": 16}))])
        found = r.best(c, shapes, "a CPU", "cpu")
        assert found is not None
        assert found.mapping.tiles["n"] == 16
        assert r.best(c, shapes, "another CPU", "cpu") is None
        assert r.best(c, {"n": 64, "k": 8192}, "a CPU", "cpu") is None
        r.add([record(kind="pinned", device="another", mapping=Mapping(tiles={"n": 32}))])
        found = r.best(c, shapes, "a CPU", "cpu")
        assert found is not None
        assert found.mapping.tiles["n"] == 32


def test_a_renamed_cascade_gets_its_own_rank_names(tmp_path: Path) -> None:
    with Records(tmp_path / "r") as r:
        r.add([record()])
        found = r.best(castile.parse(RENAMED), {"rows": 64, "k": 512}, "a CPU", "cpu")
    assert found is not None
    assert found.mapping == Mapping(tiles={"rows": 4})


def test_distance() -> None:
    assert distance({"n": 64}, {"n": 64}) == 0
    assert distance({"n": 64}, {"n": 256}) == 2
    assert distance({"n": 64}, {"n": 512}) is None


def test_t4_is_read_by_replay(tmp_path: Path) -> None:
    found = [record(uid=str(i), mapping=Mapping(tiles={"n": 2**i}), time_s=1e-3 * (i + 1)) for i in range(4)]
    path = tmp_path / "t4.json"
    path.write_text(json.dumps(t4([*found, record(status="crash", time_s=None, times=())])))
    table = read_table(path)
    assert len(table) == 4  # the crash has the mapping of another trial, and came last
    with pytest.raises(InputError):
        t4([record(), record(shapes={"n": 1, "k": 1})])


def test_lock_pins_the_best(tmp_path: Path) -> None:
    path = tmp_path / "castile.lock"
    with Records(tmp_path / "a") as a:
        a.add([record(), record(mapping=Mapping(tiles={"n": 8}), time_s=1e-4)])
        path.write_text(lock(a))
    with Records(tmp_path / "b") as b:
        assert b.add(unlocked(path)) == 1
        assert b.add(unlocked(path)) == 0
        found = b.best(castile.parse(TEXT), {"n": 64, "k": 512}, "any", "cpu")
    assert found is not None
    assert (found.kind, found.mapping.tiles["n"]) == ("pinned", 8)


def test_the_last_lock_that_was_replayed_counts(tmp_path: Path) -> None:
    """Also one that was replayed before another one; once more in a row it adds nothing."""
    locks = []
    for tile in (8, 16):
        with Records(tmp_path / str(tile)) as r:
            r.add([record(mapping=Mapping(tiles={"n": tile}))])
            locks.append(tmp_path / f"{tile}.lock")
            locks[-1].write_text(lock(r))
    with Records(tmp_path / "r") as r:
        for place, added in ((0, 1), (1, 1), (0, 1), (0, 0), (1, 1)):
            assert pin(r, unlocked(locks[place])) == added
            found = r.best(castile.parse(TEXT), {"n": 64, "k": 512}, "a CPU", "cpu")
            assert found is not None
            assert found.mapping.tiles["n"] == (8, 16)[place]


def test_a_device_takes_its_own_pin(tmp_path: Path) -> None:
    mine, other = (record(kind="pinned", device=d, mapping=Mapping(tiles={"n": n})) for d, n in (("a", 8), ("b", 16)))
    for number, pins in enumerate(((mine, other), (other, mine))):
        with Records(tmp_path / str(number)) as r:
            r.add(pins)
            found = r.best(castile.parse(TEXT), {"n": 64, "k": 512}, "a", "cpu")
        assert found is not None
        assert found.device == "a"


@pytest.mark.parametrize(
    "mapping",
    [{"knobs": {"novel": 1}}, {"knobs": {"resident": 3}}, {"form": "novel"}, {"gauge": "novel"}, {"novel": {}}],
    ids=json.dumps,
)
def test_mappings_of_another_castile_are_passed_over(tmp_path: Path, mapping: dict[str, object]) -> None:
    """Those beside them are read: a knob that came or went spoils no file."""
    path = tmp_path / "r"
    with Records(path) as r:
        r.add([record(), record(time_s=1e-4)])
    with sqlite3.connect(path) as db:
        db.execute("UPDATE trial SET mapping = ? WHERE id = 2", (json.dumps(mapping),))
    db.close()
    with Records(path, read_only=True) as r:
        assert [x.time_s for x in r.all()] == [1e-3]
        found = r.best(castile.parse(TEXT), {"n": 64, "k": 512}, "a CPU", "cpu")
    assert found is not None
    assert found.time_s == 1e-3


# What is not trusted


@pytest.mark.parametrize(
    "change",
    [
        {"status": "excellent"},
        {"kind": "x"},
        {"time_s": -1},
        {"time_s": None},
        {"time_s": "1"},
        {"times": [1, "x"]},
        {"mapping": {"tiles": {"zz": 4}}},
        {"mapping": {"tiles": {"n": 0}}},
        {"mapping": 3},
        {"shapes": {"n": -1}},
        {"shapes": {"zz": 1}},
        {"cascade": "import os"},
        {"cascade": 3},
        {"device": "\ud800"},
        {"extra": 1},
        {"versions": []},
    ],
)
def test_a_bad_record_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(InputError):
        imported(json.dumps({**record().to_dict(), **change}))


@pytest.mark.parametrize("line", ["{", "[]", "3", "[" * 10_000, '{"cascade": 1}'])
def test_lines_that_are_no_records(line: str) -> None:
    with pytest.raises(InputError, match="line 1"):
        imported(line)


def test_the_key_in_a_file_is_not_believed() -> None:
    (found,) = imported(json.dumps({**record().to_dict(), "key": "0" * 64, "name": "evil"}))
    assert found.name == "softmax"
    assert found.key != "0" * 64


@pytest.mark.parametrize(
    "text", ["", "{}", "[1]", '{"pins": [3], "castile.lock": 1}', '{"pins": [], "castile.lock": 9}']
)
def test_lock_files_that_are_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "l"
    path.write_text(text)
    with pytest.raises(InputError):
        unlocked(path)


def spoilt(tmp_path: Path) -> dict[str, Path]:
    """Files that must be refused, by what is wrong with them."""
    good = tmp_path / "good"
    with Records(good) as r:
        r.add([record(uid=str(i)) for i in range(50)])
    with sqlite3.connect(good) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    db.close()
    raw = good.read_bytes()
    found = {name: tmp_path / name for name in ("text", "cut", "torn", "foreign", "newer", "trigger", "noise")}
    found["text"].write_text("these are no records\n")
    found["noise"].write_bytes(bytes(range(256)) * 64)
    found["cut"].write_bytes(raw[: len(raw) // 2 + 100])
    found["torn"].write_bytes(raw[:100] + b"\xff" * (len(raw) - 100))
    with sqlite3.connect(found["foreign"]) as db:
        db.execute("CREATE TABLE bookmarks (url TEXT)")
    db.close()
    for name, statement in (("newer", "PRAGMA user_version=99"), ("trigger", "CREATE VIEW v AS SELECT 1")):
        found[name].write_bytes(raw)
        with sqlite3.connect(found[name]) as db:
            db.execute(statement)
        db.close()
    return found


@pytest.mark.parametrize("what", ["text", "cut", "torn", "foreign", "newer", "trigger", "noise"])
def test_spoilt_files_are_refused_and_left(tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = spoilt(tmp_path)[what]
    before = path.read_bytes()
    for read_only in (False, True):
        with pytest.raises(UsageError) as caught, Records(path, read_only=read_only) as r:
            r.all()
        assert str(path) in str(caught.value)
    assert path.read_bytes() == before
    monkeypatch.setenv("CASTILE_RECORDS", str(path))
    with pytest.warns(RuntimeWarning, match="tuned mappings are not used"):
        assert recorded(castile.parse(TEXT), {"n": 64, "k": 512}, "cpu", "a CPU") is None


def test_mutated_files_are_read_or_refused(tmp_path: Path) -> None:
    """Whatever bytes a file holds: records that are records, or one `UsageError` and the file as it was."""
    raw = spoilt(tmp_path)["newer"].with_name("good").read_bytes()
    rng, refused = random.Random(0), 0
    path = tmp_path / "mutated"
    for _ in range(250):
        bad = bytearray(raw)
        for _ in range(rng.choice((1, 4, 64))):
            bad[rng.randrange(len(bad))] = rng.randrange(256)
        bad = bad[: rng.choice((len(bad), len(bad), rng.randrange(len(bad))))]
        path.write_bytes(bad)
        for read_only in (True, False):
            try:
                with Records(path, read_only=read_only) as r:
                    assert all(x.status in STATUSES for x in r.all())
                    r.best(castile.parse(TEXT), {"n": 64, "k": 512}, "a CPU", "cpu")
            except UsageError as error:
                refused += str(path) in str(error)
                assert path.read_bytes() == bytes(bad)
        for beside in tmp_path.glob("mutated-*"):
            beside.unlink()
    assert refused > 50


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "shared"
    with Records(folder / "r") as r:
        r.add([record()])
    monkeypatch.setenv("CASTILE_RECORDS", str(folder / "r"))
    folder.chmod(0o555)
    try:
        found = recorded(castile.parse(TEXT), {"n": 64, "k": 512}, "cpu", "a CPU")
    finally:
        folder.chmod(0o755)
    assert found == Mapping(tiles={"n": 4})


@pytest.mark.parametrize(("numerics", "rank"), [("standard", "n"), ("strict", "k")])
def test_a_tuned_mapping_that_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, numerics: str, rank: str
) -> None:
    """Nobody asked for it, so it is a warning and the default runs; the same mapping given is an error."""
    monkeypatch.setenv("CASTILE_RECORDS", str(tmp_path / "r"))
    c = replace(castile.parse(TEXT), numerics=numerics)
    with Records() as r:
        r.add([record(cascade=str(c), device=device_name("cpu"), mapping=Mapping(splits={rank: 2}))])
    shapes = {"n": 64, "k": 512}
    kernel = castile.compile(c, "cpu", shapes)
    with pytest.warns(RuntimeWarning, match=f"a tuned mapping is not used: the mapping splits rank `{rank}`"):
        found = kernel.mapping
    assert found == castile.compile(c, "cpu", shapes, tuned=False).mapping
    assert [v.origin for v in kernel.variants] == ["default"]
    with pytest.warns(RuntimeWarning, match="a tuned mapping is not used"):
        assert castile.emit(c, "cpu", shapes) == castile.emit(c, "cpu", shapes, tuned=False)
    with pytest.raises(InputError):
        _ = castile.compile(c, "cpu", shapes, Mapping(splits={rank: 2})).mapping


def test_no_file_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CASTILE_RECORDS", str(tmp_path / "none" / "r"))
    assert records_path() == tmp_path / "none" / "r"
    assert recorded(castile.parse(TEXT), {"n": 64, "k": 512}, "cpu", "a CPU") is None
    with pytest.raises(UsageError):
        Records(read_only=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError):
        Records(tmp_path / "file" / "r")


def test_a_full_disk_is_one_error(tmp_path: Path) -> None:
    with Records(tmp_path / "r") as r:
        r.add([record()])
        (pages,) = r._db.execute("PRAGMA page_count").fetchone()
        r._db.execute(f"PRAGMA max_page_count={pages}")  # as SQLite sees a disk that ends here
        with pytest.raises(UsageError, match="full"):
            r.add([record(uid=str(i)) for i in range(2000)])
        assert len(r.all()) == 1


LIMITED = """
import resource, sys
from castile.autotune.record import Record
from castile.autotune.records import Records
from castile.ir.errors import UsageError
from castile.ir.mapping import Mapping
text = sys.stdin.read()
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), -1))  # a disk that ends here
done = 0
try:
    with Records(sys.argv[1]) as r:
        for done in range(100_000):
            r.add([Record(text, "cpu", "d", {"n": 1, "k": 1}, Mapping(), time_s=1.0, seed=done, detail="x" * 900)])
except UsageError as error:
    print(done, error.message)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit of a file's size is Linux's")
@pytest.mark.parametrize("size", [0, 3000, 40_000, 300_000])
def test_a_disk_that_ends(tmp_path: Path, size: int) -> None:
    """The error is one line, what was added before it is there, and the file goes on to be used."""
    path = tmp_path / "r"
    command = [sys.executable, "-c", LIMITED, str(path), str(size)]
    told = subprocess.run(command, input=TEXT, capture_output=True, text=True, check=True)
    assert told.stderr == ""
    (line,) = told.stdout.splitlines()
    assert re.search("full|disk I/O error", line)
    done = int(line.split()[0])
    with Records(path) as r:
        assert [x.seed for x in r.all()] == list(range(done))
        r.add([record()])
    assert (done > 10) == (size > 100_000)


WRITER = """
import sys
from castile.autotune.record import Record
from castile.autotune.records import Records
from castile.ir.mapping import Mapping
path, name, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
text = sys.stdin.read()
for i in range(count):
    with Records(path) as r:
        r.add([Record(text, "cpu", name, {"n": 1, "k": 1}, Mapping(), time_s=1.0, seed=i)])
    print(i, flush=True)
"""


def writer(path: Path, name: str, count: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(WRITER), str(path), name, str(count)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    process.stdin.write(TEXT)
    process.stdin.close()
    return process


def test_four_writers_on_one_new_file(tmp_path: Path) -> None:
    """They open it for each record: SQLite does not wait where one makes a file or is the last to close it."""
    path = tmp_path / "r"
    processes = [writer(path, f"w{i}", 25) for i in range(4)]
    for p in processes:
        assert p.stdout is not None
        p.stdout.read()
        assert p.wait(60) == 0
    with Records(path, read_only=True) as r:
        for i in range(4):
            assert [x.seed for x in r.all(device=f"w{i}")] == list(range(25))


def test_a_killed_writer_loses_nothing_that_it_reported(tmp_path: Path) -> None:
    path = tmp_path / "r"
    for attempt in range(3):
        p = writer(path, f"w{attempt}", 100_000)
        assert p.stdout is not None
        p.stdout.readline()
        time.sleep(0.03 * attempt)
        os.kill(p.pid, signal.SIGKILL)
        told = [int(line) for line in p.stdout.read().split("\n")[:-1]]
        p.wait()
        with Records(path) as r:
            kept = [x.seed for x in r.all(device=f"w{attempt}")]
        assert kept == list(range(len(kept)))
        assert len(kept) >= (max(told) + 1 if told else 1)


def test_every_error_is_castiles(tmp_path: Path) -> None:
    assert issubclass(UsageError, CastileError)
    assert len(module._MIGRATIONS) == module.VERSION
