"""The command as a process: start-up, signals, pipes, exit codes."""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

import castile

CASCADES = Path(__file__).resolve().parents[2] / "examples" / "cascades"

COMMAND = [sys.executable, "-m", "castile"]
QUICK = 0.5


def run(*words: object, **options: object) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, *(str(word) for word in words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)  # type: ignore[call-overload, no-any-return]


def test_help_and_version() -> None:
    assert run("--version").stdout == f"castile {castile.__version__}\n"
    bare, asked = run(), run("--help")
    assert bare.returncode == asked.returncode == 0
    assert bare.stdout == asked.stdout
    for command in ("explain", "run", "verify", "doctor"):
        assert command in asked.stdout
        assert run(command, "--help").returncode == 0


def test_a_mistake(tmp_path: Path) -> None:
    done = run("explain", tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: cannot read")


def test_json_alone_is_on_stdout(tmp_path: Path) -> None:
    done = run("explain", CASCADES / "gemm.cascade", "--json", "--svg", tmp_path / "x.svg")
    assert json.loads(done.stdout)["name"] == "gemm"
    assert done.stderr.startswith("drew ")


def test_the_list_of_benchmarks() -> None:
    assert "softmax f32 4096x4096" in json.loads(run("bench", "--list", "--json").stdout)


@pytest.mark.skipif(platform.machine() in ("aarch64", "arm64"), reason="every processor has the vectors there")
def test_a_warning_is_shown_as_an_error_is(tmp_path: Path) -> None:
    """What a compiler refuses is told once, without a place in castile's own text; beside JSON it is on stderr."""
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\ncase "$*" in *march=native*) echo error: no >&2; exit 1;; esac\nexec c++ "$@"\n')
    compiler.chmod(0o755)
    named = {"CXX": str(compiler), "CASTILE_CACHE_DIR": str(tmp_path / "cache"), "PYTHONWARNINGS": ""}
    extents = ("--shape", "n=16", "k=32", "--json")
    records = ("--records", tmp_path / "records.sqlite", "--trials", 2, "--budget", "30s")
    for words in (("run", CASCADES / "softmax.cascade", "--random"), ("tune", "softmax", *records)):
        done = run(*words, *extents, env={**os.environ, **named})
        assert json.loads(done.stdout)
        assert done.stderr.startswith(f"warning: the C++ compiler `{compiler}` does not build for this processor"), done
        assert "got: error: no\nhint: " in done.stderr
        assert done.stderr.count("warning: ") == 1


def test_a_narrow_terminal_does_not_break_lines() -> None:
    narrow = run("explain", CASCADES / "attention.cascade", env={**os.environ, "COLUMNS": "20"})
    assert narrow.stdout == run("explain", CASCADES / "attention.cascade").stdout


def test_a_plain_locale() -> None:
    done = run(
        "explain",
        CASCADES / "gemm.cascade",
        env={**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "2?m?n?k matrix" in done.stdout


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_ctrl_c(tmp_path: Path) -> None:
    """The file is a pipe in which nothing comes: once it can be opened for writing, the command waits at its end."""
    pipe = tmp_path / "c.cascade"
    os.mkfifo(pipe)

    def heard() -> None:  # what a shell starts in the background ignores Ctrl-C
        signal.signal(signal.SIGINT, signal.default_int_handler)

    child = subprocess.Popen(
        [*COMMAND, "run", str(pipe), "--random"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=heard,
    )
    writer = -1
    while writer < 0 and child.poll() is None:
        with suppress(OSError):  # no reader yet
            writer = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=300)
    os.close(writer)
    assert child.returncode == 130
    assert (out, err) == ("", "")


@pytest.mark.skipif(os.name == "nt", reason="POSIX pipes")
@pytest.mark.parametrize("words", [["explain", str(CASCADES / "attention_backward.cascade")], ["--help"]])
def test_a_closed_pipe_is_quiet(words: list[str]) -> None:
    child = subprocess.Popen([*COMMAND, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stderr is not None
    child.stdout.close()
    assert child.stderr.read() == b""
    child.wait(timeout=300)


def test_a_folder_that_may_not_be_entered(tmp_path: Path) -> None:
    """Neither what is asked for nor what is looked for beside it ends in a traceback."""
    locked = tmp_path / "locked" / "in"
    locked.mkdir(parents=True)
    named = {"CASTILE_CACHE_DIR": "cache", "CASTILE_MODEL": "model", "CASTILE_RECORDS": "records"}
    environment = {**os.environ, **{name: str(locked / place) for name, place in named.items()}}
    bare = (
        [] if os.geteuid() else ["capsh", "--drop=cap_dac_override,cap_dac_read_search", "--", "-c", 'exec "$@"', "-"]
    )
    if bare and shutil.which("capsh") is None:
        pytest.skip("root enters every folder")
    locked.parent.chmod(0)
    try:
        for words, code in (
            (["doctor"], 0),
            (["costmodel", "info"], 0),
            (["explain", str(locked / "x.cascade")], 2),
            (["tune", "softmax", "--shape", "n=8", "k=8", "--trials", "1", "--records", str(tmp_path / "r")], 0),
        ):
            done = subprocess.run(
                [*bare, *COMMAND, *words], capture_output=True, text=True, timeout=300, env=environment
            )
            assert (done.returncode, "Traceback" in done.stderr) == (code, False), done.stderr
    finally:
        locked.parent.chmod(0o700)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device that is always full")
@pytest.mark.parametrize("words", [["explain", CASCADES / "gemm.cascade"], ["cache", "list", "--json"], ["--help"]])
def test_a_full_disk_is_one_line(words: list[object]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([*COMMAND, *map(str, words)], stdout=full, stderr=subprocess.PIPE, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (1, "error: cannot write the output: No space left on device\n")


@pytest.mark.skipif(os.name == "nt", reason="POSIX shells")
@pytest.mark.parametrize(
    ("closed", "code"), [("<&-", 2), (">&-", 0), (">&- --json", 0), ("2>&-", 0), ("<&- >&- 2>&-", 2)]
)
def test_closed_streams(closed: str, code: int) -> None:
    """As of a service that was started with none: nothing to read is an empty cascade, and nobody misses the output."""
    what = "-" if "<&-" in closed else f"'{CASCADES / 'gemm.cascade'}'"
    command = f"'{sys.executable}' -m castile explain {what} {closed}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=300)
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    assert ("holds no cascade" in done.stderr) == (closed == "<&-")


@pytest.mark.timing
def test_help_is_quick() -> None:
    def seconds() -> float:
        began = time.perf_counter()
        run("--help")
        return time.perf_counter() - began

    assert min(seconds() for _ in range(5)) < QUICK
