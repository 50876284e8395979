"""What is read off the machine."""

from __future__ import annotations

import threading
import time
import zlib
from pathlib import Path
from typing import Any

import pytest

from castile.benchmarks._machine import (
    CpuTimes,
    ThisMachine,
    build_probe,
    describe_device,
    numpy_probe,
    own_threads_running,
    read_cpu_times,
    this_machine,
)


def test_others_are_whoever_is_busy_and_not_this_process() -> None:
    before = CpuTimes(wall_s=10.0, busy_s=100.0, own_s=50.0)
    assert CpuTimes(12.0, 103.0, 52.0).others_since(before) == pytest.approx(0.5)
    assert CpuTimes(12.0, 102.0, 52.01).others_since(before) == 0.0


def test_what_rounding_to_ticks_may_explain_is_held_against_no_one() -> None:
    before = CpuTimes(10.0, 100.0, 50.0, error_s=0.02)
    assert CpuTimes(11.0, 100.52, 50.5, error_s=0.02).others_since(before) == pytest.approx(0.0)
    assert CpuTimes(11.0, 101.02, 50.5, error_s=0.02).others_since(before) == pytest.approx(0.5)


@pytest.mark.skipif(read_cpu_times() is None, reason="this system does not tell")
def test_cpu_times_move_with_this_process() -> None:
    before, until = read_cpu_times(), time.monotonic() + 0.2
    while time.monotonic() < until:
        pass
    after = read_cpu_times()
    assert before is not None
    assert after is not None
    assert after.own_s > before.own_s
    assert after.busy_s - before.busy_s >= 0.5 * (after.own_s - before.own_s)


def test_the_device_is_described() -> None:
    device = describe_device()
    assert device.cpu
    assert device.cores >= 1
    assert device.last_level_bytes >= 1 << 14


def machine(readings: list[float], **changes: Any) -> ThisMachine:
    """A machine whose probe gives `readings`, in GFLOP/s, in turn."""
    given = iter(readings)
    return ThisMachine(2, lambda threads, window_s: 1e9 * next(given), "scripted", describe_device(), **changes)


def test_the_peak_is_the_best_of_three_windows_and_the_best_is_kept() -> None:
    probed = machine([90.0, 100.0, 80.0, 70.0, 60.0, 50.0])
    assert probed.peak_gflops() == pytest.approx(100.0)
    assert probed.peak_gflops() == pytest.approx(70.0)
    assert probed.best_gflops == pytest.approx(100.0)


def test_steady_is_within_a_tenth_of_the_best() -> None:
    probed = machine([91.0, 89.0], best_gflops=100.0)
    assert probed.steady()
    assert not probed.steady()


def test_scaling_compares_all_threads_with_one() -> None:
    assert machine([50.0, 60.0, 50.0, 90.0, 90.0, 90.0]).scaling() == pytest.approx(0.75)


def test_the_compiled_probe_reads_a_peak(tmp_path: Path) -> None:
    probe = build_probe(tmp_path)
    if probe is None:
        pytest.skip("no C compiler")
    assert 1e8 < probe(1, 0.005) < 1e12
    assert 1e8 < probe(2, 0.005) < 1e13


def test_without_a_compiler_the_probe_is_a_matrix_product(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    assert build_probe(tmp_path) is None
    with this_machine(threads=1) as found:
        assert found.probe_name == "numpy-matmul"
        assert found.best_gflops > 0
    assert numpy_probe(1, 0.001) > 0


def test_a_thread_that_works_in_the_background_is_seen() -> None:
    data, stop = bytes(1 << 22), threading.Event()

    def work() -> None:
        while not stop.is_set():
            zlib.crc32(data)  # without the interpreter's lock

    worker = threading.Thread(target=work)
    worker.start()
    try:
        until = time.monotonic() + 5.0
        while not own_threads_running() and time.monotonic() < until:
            time.sleep(0.001)
        assert time.monotonic() < until
    finally:
        stop.set()
        worker.join()
