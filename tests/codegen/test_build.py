"""The compiler and the cache of what it made: nothing breaks, and nothing foreign is loaded."""

from __future__ import annotations

import ctypes
import os
import stat
import subprocess
import sys
import tempfile
import threading
import warnings
from pathlib import Path

import pytest

from castile.autotune.places import records_path
from castile.codegen import build, compiler
from castile.codegen.cpp import END, INCLUDE, KERNEL, shares
from castile.ir.errors import UsageError

SOURCE = 'extern "C" int answer() { return %d; }\n'


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CASTILE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def answer(number: int) -> int:
    library: ctypes.CDLL = build.load(SOURCE % number)
    return int(library.answer())


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> bytes:
        raise AssertionError("the compiler ran")

    monkeypatch.setattr(build, "library", refuse)


def script(path: Path, text: str) -> str:
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return str(path)


def test_built_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert answer(1) == 1
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    (entry,) = build.entries()
    assert entry.bytes == entry.path.stat().st_size

    def refuse(*_: object) -> bytes:
        raise AssertionError("the compiler ran")

    monkeypatch.setattr(build, "library", refuse)
    assert build.build(SOURCE % 1) == entry.path
    with pytest.raises(AssertionError):
        build.build(SOURCE % 2)


def test_a_link_finds_the_entry(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the folder being listed; a link that is missing, dangles or points elsewhere is as if there were none."""
    path = build.build(SOURCE % 20)
    link = folder / f"{path.name.partition('-')[0]}.so"
    assert os.readlink(link) == path.name

    def refuse(*_: object) -> list[str]:
        raise AssertionError("the folder is listed")

    with monkeypatch.context() as no_list:
        no_list.setattr(build, "_entries", refuse)
        assert build.build(SOURCE % 20) == path
    outside = tmp_path / path.name
    outside.write_bytes(path.read_bytes())
    monkeypatch.setattr(build, "library", refuse)
    for target in (None, "nowhere", f"../{path.name}", str(outside), f"{'0' * 64}-{'0' * 64}.so"):
        link.unlink()
        if target is not None:
            link.symlink_to(target)
        assert build.build(SOURCE % 20) == path
        assert os.readlink(link) == path.name
    assert len(build.entries()) == 1
    assert build.clear() == 1
    assert list(folder.iterdir()) == []


def test_list_and_clear(folder: Path) -> None:
    build.build(SOURCE % 3)
    build.build(SOURCE % 4)
    (folder / ".new-left").write_bytes(b"half")
    (folder / "notes.txt").write_text("mine")
    assert len(build.entries()) == 2
    assert build.clear() == 2
    assert [p.name for p in folder.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("spoil", ["truncate", "change", "widen", "link", "folder", "empty"])
def test_a_spoilt_entry_is_built_again(folder: Path, tmp_path: Path, spoil: str) -> None:
    path = build.build(SOURCE % 5)
    data = path.read_bytes()
    if spoil == "truncate":
        path.write_bytes(data[: len(data) // 2])
    elif spoil == "empty":
        path.write_bytes(b"")
    elif spoil == "change":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif spoil == "widen":
        path.chmod(0o777)
    else:
        path.unlink()
        if spoil == "folder":
            path.mkdir()
        else:
            other = tmp_path / "other.so"
            other.write_bytes(data)
            path.symlink_to(other)
    assert not build._sound(path)
    assert answer(5) == 5


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give files away")
def test_another_users_entries_are_not_loaded(folder: Path) -> None:
    path = build.build(SOURCE % 6)
    os.chown(path, 12345, -1)
    assert not build._sound(path)
    os.chown(folder, 12345, -1)
    assert build.cache_folder() is None
    assert not str(build.build(SOURCE % 6)).startswith(str(folder))


def test_an_open_folder_is_closed(folder: Path) -> None:
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    build.build(SOURCE % 7)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_shared_folder_stays_open(folder: Path) -> None:
    """Others may read along; a place like /tmp is everybody's, and must not be closed to them."""
    folder.mkdir()
    for mode, used in ((0o755, True), (0o1777, False)):
        folder.chmod(mode)
        assert (build.cache_folder() is not None) is used
        assert build.build(SOURCE % 15).is_relative_to(folder) is used
        assert stat.S_IMODE(folder.stat().st_mode) == mode


@pytest.mark.parametrize("place", [".", "below/here"])
def test_a_relative_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CASTILE_CACHE_DIR", place)
    assert answer(16) == 16
    (entry,) = build.entries()
    assert entry.path.parent == tmp_path / place


def test_without_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A number that no user has, as containers give: what is kept lies beside what is temporary."""
    monkeypatch.delenv("CASTILE_CACHE_DIR", raising=False)
    for name in ("CASTILE_RECORDS", "XDG_DATA_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    own = tmp_path / f"castile-{os.getuid()}"
    assert build.wanted_folder() == own / ".cache" / "castile"
    assert records_path().is_relative_to(own)


def test_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    for place in ("file", "file/below"):
        monkeypatch.setenv("CASTILE_CACHE_DIR", str(tmp_path / place))
        assert build.cache_folder() is None
        assert answer(8) == 8
        assert build.entries() == ()
        assert build.clear() == 0
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    monkeypatch.setenv("CASTILE_CACHE_DIR", str(tmp_path / "link"))
    assert build.cache_folder() is None


def test_a_full_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep = build._keep

    def full(place: Path, key: str, data: bytes) -> Path:
        if place == folder:
            raise OSError(28, "No space left on device")
        return keep(place, key, data)

    monkeypatch.setattr(build, "_keep", full)
    assert answer(9) == 9
    assert list(folder.iterdir()) == []


def test_nowhere_to_write(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(build, "_keep", full)
    with pytest.raises(UsageError, match="written nowhere"):
        build.build(SOURCE % 10)


@pytest.mark.parametrize("named", ["", "no-such-compiler", "no-such-compiler -x", "'"])
def test_no_compiler(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", named)
    with pytest.raises(UsageError, match=r"no C\+\+ compiler|names no program"):
        build.build(SOURCE % 11)


def test_a_compiler_named_from_here(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs in a folder of its own all the same."""
    monkeypatch.chdir(tmp_path)
    script(tmp_path / "mine", 'exec c++ "$@"\n')
    monkeypatch.setenv("CXX", "./mine -DX=1")
    assert answer(17) == 17


def test_a_compiler_that_dies(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", script(tmp_path / "c++", "kill -9 $$\n"))
    with pytest.raises(UsageError, match="killed by signal 9"):
        build.build(SOURCE % 12)
    assert list(folder.iterdir()) == []


def test_a_compiler_that_fails(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", script(tmp_path / "c++", "echo kernel.cpp:1: error: no >&2\nexit 1\n"))
    with pytest.raises(UsageError, match="error: no"):
        build.build(SOURCE % 13)


# Compilers that refuse something


@pytest.fixture
def on_x86(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(compiler, "_refusals", {})


def refusing(path: Path, words: str, what: str) -> str:
    """The real compiler behind a script that does ``what`` first where the command has these words."""
    real = compiler.find_compiler().command[0]
    return script(path, f'case "$*" in *"{words}"*) {what};; esac\nexec {real} "$@"\n')


@pytest.mark.parametrize("flag", ["-fno-thread-jumps", "-fopenmp "])
def test_flags_that_matter_little(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_x86: None, flag: str
) -> None:
    monkeypatch.setenv("CXX", refusing(tmp_path / "c++", flag, "exit 1"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert answer(14) == 14


def test_a_processor_that_the_compiler_does_not_know(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_x86: None
) -> None:
    """One warning in each process, also where the libraries come from the cache."""
    said = 'echo "In file:" >&2; echo "c++: error: bad value for \\"march\\"" >&2; exit 1'
    monkeypatch.setenv("CXX", refusing(tmp_path / "c++", compiler.NATIVE, said))
    for _ in ("compiled", "cached"):
        with pytest.warns(RuntimeWarning, match="does not build for this processor") as caught:
            assert [answer(n) for n in (16, 17)] == [16, 17]
        (warning,) = caught
        told = str(warning.message).split("\n")
        assert told[0].startswith(f"castile: the C++ compiler `{tmp_path}/c++`")
        assert told[1] == 'expected: a build with -march=native; got: c++: error: bad value for "march"'
        assert told[2].startswith("hint: set CXX to a newer")
        monkeypatch.setattr(compiler, "_refusals", {})


def test_a_header_that_does_not_compile_for_a_processor(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_x86: None
) -> None:
    (tmp_path / "no.h").write_text("#error no such vectors\n")
    real = compiler.find_compiler().command[0]
    also = f'exec {real} "$@" -include {tmp_path}/no.h'
    monkeypatch.setenv("CXX", refusing(tmp_path / "c++", compiler.NATIVE, also))
    monkeypatch.setattr(compiler, "_cores", threading.Semaphore(2))
    monkeypatch.setattr(compiler, "cores", lambda: 2)
    with pytest.warns(RuntimeWarning, match="got: .*error: #error no such vectors"):
        assert [int(getattr(build.load(several(2)), name)()) for name in ("k0", "k1")] == [0, 1]


@pytest.mark.parametrize("case", ["named", "arm"])
def test_a_processor_that_is_not_missed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_x86: None, case: str
) -> None:
    monkeypatch.setenv("CXX", refusing(tmp_path / "c++", compiler.NATIVE, "exit 1"))
    if case == "named":
        named = {"x86_64": "-march=x86-64", "aarch64": "-march=armv8-a"}.get(os.uname().machine)
        monkeypatch.setenv("CASTILE_CXXFLAGS", named or pytest.skip("no name of a processor is known here"))
    else:
        monkeypatch.setattr(compiler.platform, "machine", lambda: "aarch64")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert answer(18) == 18


def test_the_key_knows_what_matters(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = compiler.find_compiler()
    keys = [compiler.key_of(SOURCE % 1, found), compiler.key_of(SOURCE % 2, found)]
    monkeypatch.setenv("CASTILE_CXXFLAGS", "-g")
    keys.append(compiler.key_of(SOURCE % 1, found))
    monkeypatch.delenv("CASTILE_CXXFLAGS")
    keys.append(compiler.key_of(SOURCE % 1, compiler.Compiler(found.command, "another")))
    monkeypatch.setattr(compiler, "cpu_identity", lambda: "another")
    keys.append(compiler.key_of(SOURCE % 1, found))
    assert len(set(keys)) == len(keys)


def several(count: int) -> str:
    """A unit of kernels k0, k1, …, each long enough for a compiler of its own."""
    texts = [f'k{i}\nextern "C" int k{i}() {{ return {i}; }}\n{"// more" * 400}\n' for i in range(count)]
    return f"// all\n{INCLUDE}\nnamespace castile {{\n" + "".join(KERNEL + t for t in texts) + END


def test_a_very_long_unit_is_not_optimised(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compilers take far longer over long functions than they are long."""
    real, told = compiler.find_compiler().command[0], tmp_path / "told"
    monkeypatch.setenv("CXX", script(tmp_path / "c++", f'echo "$*" >> {told}\nexec {real} "$@"\n'))
    monkeypatch.setattr(compiler, "_cores", threading.Semaphore(2))
    monkeypatch.setattr(compiler, "cores", lambda: 2)
    monkeypatch.setattr(compiler, "LONG", len(several(2)))
    assert build.load(several(5)).k4() == 4
    units = [line for line in told.read_text(encoding="utf-8").splitlines() if " -c " in line]
    assert sorted("-O0 kernel0.cpp" in line for line in units) == [False, True]
    assert all("-O0" not in line for line in units if "kernel0" not in line)
    assert build.load(several(1)).k0() == 0


def test_kernels_are_shared_out(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several compilers at once, each with some of the kernels, make what one makes."""
    names = [f"k{n}" for n in range(5)]
    source = several(5)
    assert shares(source, 1) == [source]
    units = shares(source, 2)
    assert len(units) == 2
    assert [sum(f"int {n}()" in u for u in units) for n in names] == [1] * 5
    monkeypatch.setattr(compiler, "_cores", threading.Semaphore(2))
    monkeypatch.setattr(compiler, "cores", lambda: 2)
    found = build.load(source)
    assert [getattr(found, n)() for n in names] == [0, 1, 2, 3, 4]
    # One of the compilers fails.
    real = compiler.find_compiler().command[0]
    text = f'case "$*" in *kernel1*) kill -9 $$;; esac\nexec {real} "$@"\n'
    monkeypatch.setenv("CXX", script(tmp_path / "c++", text))
    with pytest.raises(UsageError, match="killed by signal 9"):
        build.build(source)


def test_eight_processes_at_once(folder: Path) -> None:
    code = f"from castile.codegen import build\nassert build.load({SOURCE % 15!r}).answer() == 15"
    running = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) for _ in range(8)]
    for process in running:
        _, said = process.communicate()
        assert process.returncode == 0, said
    assert all(build._sound(e.path) for e in build.entries())
    assert not [p for p in folder.iterdir() if p.name.startswith(".new-")]


# The header, read ahead

ANSWER = 'extern "C" int answer() { return castile::to<int>(%d.0f); }\n'


def ahead(folder: Path) -> list[Path]:
    return sorted(folder.glob("*-*.gch"))


def kernel(number: int) -> int:
    found: ctypes.CDLL = build.load(INCLUDE + ANSWER % number)
    return int(found.answer())


def gcc() -> bool:
    command = compiler.find_compiler().command
    return "clang" not in subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(not gcc(), reason="only GCC's form of a header is used")
def test_the_header_is_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [kernel(n) for n in (1, 2)] == [1, 2]
    assert ahead(folder) == []
    assert kernel(3) == 3
    (made,) = ahead(folder)
    assert build._sound(made)
    assert len(build.entries()) == 3
    monkeypatch.setattr(build, "header_ahead", lambda _: pytest.fail("the header is read again"))
    assert kernel(4) == 4
    # Other flags want a header of their own; what is spoilt is not read, nor is it a reason to fail.
    monkeypatch.setattr(build, "header_ahead", compiler.header_ahead)
    monkeypatch.setenv("CASTILE_CXXFLAGS", "-DOTHER")
    assert kernel(5) == 5
    assert len(ahead(folder)) == 2
    monkeypatch.delenv("CASTILE_CXXFLAGS")
    made.write_bytes(made.read_bytes()[:1000])
    assert kernel(6) == 6
    assert made not in ahead(folder)
    assert build.clear() == 6
    assert list(folder.iterdir()) == []


def test_no_room_for_the_header(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "ROOM", 1 << 62)
    assert [kernel(n) for n in range(4)] == [0, 1, 2, 3]
    assert ahead(folder) == []


@pytest.mark.skipif(not gcc(), reason="only GCC's form of a header is used")
def test_a_compiler_that_keeps_no_header(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tries = tmp_path / "tries"
    real = compiler.find_compiler().command[0]
    text = f'case "$*" in *c++-header*) echo x >>{tries}; exit 1;; esac\nexec {real} "$@"\n'
    monkeypatch.setenv("CXX", script(tmp_path / "c++", text))
    assert [kernel(n) for n in range(5)] == [0, 1, 2, 3, 4]
    assert ahead(folder) == []
    assert tries.read_text() == "x\n"


def test_a_cache_named_from_a_folder_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    monkeypatch.setenv("CASTILE_CACHE_DIR", "here")
    assert build.cache_folder() is None
