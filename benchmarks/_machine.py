"""The machine a row was measured on: what it is, how fast it can go, and who else is using it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

ISA_FLAGS = frozenset((
    "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_fp16", "avx_vnni",
    "amx_tile", "amx_bf16", "amx_int8", "asimd", "asimdhp", "asimddp", "bf16", "i8mm", "sve", "sve2",
))  # fmt: skip
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
WINDOWS, WARM_S, WINDOW_S, GLANCE_S, GLANCE_LIMIT = 3, 0.001, 0.010, 0.003, 0.10


def retained_allocator() -> bool:
    """Whether this process's malloc was told, before it began, to keep freed memory in place of giving it back."""
    return platform.libc_ver()[0] == "glibc" and all(os.environ.get(k) == v for k, v in ALLOCATOR.items())


def usable_cpus() -> tuple[int, ...]:
    """The logical CPUs this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


@dataclass(frozen=True, slots=True)
class Device:
    """A CPU, as far as it bears on speed. Caches are bytes of one instance, 0 if unknown.

    `accelerator` names the GPU and its driver in rows that were measured on one.
    """

    cpu: str
    arch: str
    cores: int
    isa: tuple[str, ...]
    l1_bytes: int
    l2_bytes: int
    l3_bytes: int
    memory_bytes: int
    accelerator: str = ""

    @property
    def last_level_bytes(self) -> int:
        """Bytes of the largest cache; 32 MiB where the system does not tell."""
        return max(self.l1_bytes, self.l2_bytes, self.l3_bytes) or 32 << 20


def command_line(*argv: str) -> str:
    """First line that a command prints, or "" where there is no such command or it fails."""
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip().partition("\n")[0]


def _cpuinfo() -> Mapping[str, str]:
    """First processor's entries of /proc/cpuinfo; empty elsewhere than on Linux."""
    entries: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0].splitlines():
            key, _, value = line.partition(":")
            entries[key.strip()] = value.strip()
    return entries


def _cache_bytes(level: int) -> int:
    """Bytes of one data or unified cache of the given level, 0 if unknown."""
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        with contextlib.suppress(OSError, ValueError):
            if int((index / "level").read_text()) == level and (index / "type").read_text().strip() != "Instruction":
                size = (index / "size").read_text().strip()
                return int(size.rstrip("KMG")) << {"K": 10, "M": 20, "G": 30}.get(size[-1], 0)
    name = {1: "hw.l1dcachesize", 2: "hw.l2cachesize", 3: "hw.l3cachesize"}[level]
    digits = command_line("sysctl", "-n", name) if sys.platform == "darwin" else ""
    return int(digits) if digits.isdigit() else 0


def describe_device() -> Device:
    """The CPU that this process runs on."""
    info = _cpuinfo()
    brand = command_line("sysctl", "-n", "machdep.cpu.brand_string") if sys.platform == "darwin" else ""
    stepping = "/".join(info[key] for key in ("cpu family", "model", "stepping") if key in info)
    name = info.get("model name") or brand or platform.processor() or platform.machine()
    flags = (info.get("flags") or info.get("Features") or "").split()
    pages = os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    return Device(
        cpu=f"{name} ({stepping})" if stepping else name,
        arch=platform.machine(),
        cores=len(usable_cpus()),
        isa=tuple(sorted(ISA_FLAGS.intersection(flags))),
        l1_bytes=_cache_bytes(1),
        l2_bytes=_cache_bytes(2),
        l3_bytes=_cache_bytes(3),
        memory_bytes=pages * os.sysconf("SC_PAGE_SIZE") if pages > 0 else 0,
    )


@dataclass(frozen=True, slots=True)
class CpuTimes:
    """CPU seconds since some fixed moment: `busy_s` of everyone on this process's CPUs, `own_s` of this process alone.

    `busy_s` is counted in clock ticks and may be `error_s` off.
    """

    wall_s: float
    busy_s: float
    own_s: float
    error_s: float = 0.0

    def others_since(self, before: CpuTimes) -> float:
        """Cores that others surely held since `before`, on average: 1.0 is one core the whole time."""
        others_s = (self.busy_s - before.busy_s) - (self.own_s - before.own_s) - self.error_s
        return max(0.0, others_s) / max(self.wall_s - before.wall_s, 1e-9)


def read_cpu_times() -> CpuTimes | None:
    """CPU times now from /proc/stat, time stolen by a hypervisor included; None where the system has no such file."""
    try:
        lines = Path("/proc/stat").read_text().splitlines()
    except OSError:
        return None
    ticks = 0
    wanted = {f"cpu{cpu}" for cpu in usable_cpus()}
    for name, *counts in (line.split() for line in lines if line.startswith("cpu")):
        if name in wanted:
            ticks += sum(int(count) for count in counts[:8]) - int(counts[3]) - int(counts[4])  # less idle and iowait
    tick_s = 1 / os.sysconf("SC_CLK_TCK")
    return CpuTimes(time.monotonic(), ticks * tick_s, time.process_time(), len(wanted) * tick_s) if ticks else None


def own_threads_running() -> bool:
    """Whether another thread of this process runs at this moment.

    The states in /proc tell at once, which CPU times, brought up to date only at each tick, do not. Elsewhere a look at
    the CPU time of 10 ms must do.
    """
    tasks = Path("/proc/self/task")
    if not tasks.is_dir():
        wall_s, cpu_s = time.monotonic(), time.process_time()
        time.sleep(0.010)
        return time.process_time() - cpu_s > 0.25 * (time.monotonic() - wall_s)
    for task in tasks.iterdir():
        if int(task.name) != threading.get_native_id():
            with contextlib.suppress(OSError):  # the thread may just have ended
                if (task / "stat").read_text().rpartition(")")[2].split()[0] == "R":
                    return True
    return False


Probe = Callable[[int, float], float]


def build_probe(folder: Path) -> Probe | None:
    """Compile `peak.c` into `folder`. The probe takes a thread count and a window in seconds and gives FLOP/s.

    None without a C compiler.
    """
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        return None
    source, target = Path(__file__).with_name("peak.c"), folder / "peak.so"
    for native in ("-march=native", "-mcpu=native"):
        command = (compiler, "-O3", native, "-shared", "-fPIC", "-pthread", "-o", str(target), str(source))
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            subprocess.run(command, capture_output=True, timeout=60, check=True)
            break
    try:
        function = ctypes.CDLL(str(target)).castile_fma_peak
    except OSError:
        return None
    function.restype = ctypes.c_double
    function.argtypes = (ctypes.c_int, ctypes.POINTER(ctypes.c_int), ctypes.c_double, ctypes.c_double)

    def probe(threads: int, window_s: float) -> float:
        # Pinned only where every CPU gets a thread: fresh threads may share a core for a while, which reads as a busy
        # machine. With CPUs to spare the scheduler must stay free to avoid one that is taken.
        cpus = usable_cpus()
        places = cpus if threads == len(cpus) else (-1,) * threads
        return float(function(threads, (ctypes.c_int * threads)(*places), WARM_S, window_s))

    return probe


def numpy_probe(threads: int, window_s: float) -> float:
    """FLOP/s of a NumPy float32 matrix product. Its library chose how many threads it uses when it was loaded."""
    del threads
    n = 384
    a = np.full((n, n), 0.5, np.float32)
    out = np.empty_like(a)
    done, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < window_s or done == 0:
        np.matmul(a, a, out=out)
        done += 1
    return 2.0 * n**3 * done / elapsed


class Machine(Protocol):
    """What `compare` asks of the machine; tests put a simulated one in its place."""

    @property
    def device(self) -> Device:
        """The CPU."""

    @property
    def threads(self) -> int:
        """Threads that candidates may use."""

    @property
    def probe_name(self) -> str:
        """How the peak is read."""

    @property
    def best_gflops(self) -> float:
        """Highest peak known of this machine, in GFLOP/s."""

    def peak_gflops(self) -> float:
        """The machine's peak now, in GFLOP/s."""

    def steady(self) -> bool:
        """Whether the machine, at a short glance, is near its best."""

    def cpu_times(self) -> CpuTimes | None:
        """CPU times now; None where they cannot be had."""


@dataclass(slots=True)
class ThisMachine:
    """The real machine. `best_gflops` starts at what earlier rows measured and rises with every higher reading."""

    threads: int
    probe: Probe
    probe_name: str
    device: Device = field(default_factory=describe_device)
    best_gflops: float = 0.0

    def peak_gflops(self) -> float:
        """Best of three windows of 10 ms, in GFLOP/s: a hiccup does not show, a process that holds a core does."""
        reading = max(self.probe(self.threads, WINDOW_S) for _ in range(WINDOWS)) / 1e9
        self.best_gflops = max(self.best_gflops, reading)
        return reading

    def steady(self) -> bool:
        """Whether one window of 3 ms reads at most 10% below the best."""
        return self.probe(self.threads, GLANCE_S) / 1e9 > (1 - GLANCE_LIMIT) * self.best_gflops

    def scaling(self) -> float:
        """Peak of all threads over threads × the peak of one: 1 on an idle machine with fixed clocks.

        Near (threads - 1/2) / threads while one foreign process spins. Machines that clock one core higher than all
        read below 1 when idle too, so this is a hint for people and voids nothing.
        """
        one = max(self.probe(1, WINDOW_S) for _ in range(WINDOWS)) / 1e9
        return self.peak_gflops() / (self.threads * one)

    def cpu_times(self) -> CpuTimes | None:
        """CPU times now; None where the system does not give them."""
        return read_cpu_times()


@contextlib.contextmanager
def this_machine(threads: int | None = None) -> Iterator[ThisMachine]:
    """The machine with its peak probe, compiled into a private temporary folder: 0.2 s, and nothing kept to go stale.

    `threads` defaults to the number of usable CPUs. Without a C compiler the probe is a NumPy matrix product.
    """
    with tempfile.TemporaryDirectory(prefix="castile-peak-") as folder:
        compiled = build_probe(Path(folder))
        count = threads or len(usable_cpus())
        machine = ThisMachine(count, compiled or numpy_probe, "fma" if compiled else "numpy-matmul")
        for _ in range(5):
            machine.peak_gflops()
        yield machine
