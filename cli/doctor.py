"""`castile doctor`: what is installed, which machine this is, and what each missing thing costs."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..codegen.build import cache_folder, wanted_folder
from ..codegen.compiler import find_compiler
from ..ir.errors import UsageError
from ..ir.machine import cores
from .terminal import Json, emit, out

if TYPE_CHECKING:
    from rich.text import Text

# Each package, the distributions that bring it, what its absence costs, and how to get it.
PACKAGES = (
    ("numpy", ("numpy",), "nothing works", "pip install numpy"),
    ("ml_dtypes", ("ml_dtypes",), "no bf16 and no 8-bit floats in arrays", "pip install ml_dtypes"),
    ("torch", ("torch",), "no torch.compile(backend='castile'), no tensors as arguments", "pip install torch"),
    (
        "triton",
        ("triton",),
        "no GPU kernels (with it they compile for any GPU, also where there is none)",
        "pip install triton",
    ),
    ("scipy", ("scipy",), "no castile tune", "pip install scipy"),
    ("xgboost", ("xgboost-cpu", "xgboost"), "no learned cost model", "pip install xgboost-cpu"),
    ("ray", ("ray",), "nothing yet: measuring on many machines is not built", "pip install ray"),
)

# Instruction sets that the C++ target can use, as the kernel spells them: flag -> name.
FLAGS = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_bf16": "AVX-512 BF16",
    "avx512_vnni": "AVX-512 VNNI",
    "amx_bf16": "AMX BF16",
    "asimd": "NEON",
    "bf16": "NEON BF16",
    "sve": "SVE",
}
_OPENMP = "#include <omp.h>\nint main() { return omp_get_max_threads() > 0 ? 0 : 1; }\n"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report: "ok", "missing" (with what that costs and a remedy) or "info"."""

    group: str
    name: str
    state: str
    detail: str
    costs: str = ""
    remedy: str = ""


def doctor(json: Json = False) -> None:
    """What is installed, which CPU and GPU there are, what each missing thing costs."""
    findings = [*machine(), *packages(), *compilers(), gpu(), cache()]
    if json:
        emit({"findings": [asdict(f) for f in findings]})
    else:
        out().print(table(findings))


def machine() -> list[Finding]:
    """Python and the processor."""
    python = f"{platform.python_version()} ({platform.python_implementation()}), {sys.executable}"
    good = sys.version_info >= (3, 10)
    cpu = cpu_facts()
    threads = f", OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']}" if "OMP_NUM_THREADS" in os.environ else ""
    return [
        Finding("machine", "castile", "ok", _version(("castile",)) or "not installed: run from a checkout"),
        Finding("machine", "Python", "ok" if good else "missing", python, *(() if good else ("castile needs 3.10",))),
        Finding("machine", "platform", "info", platform.platform()),
        Finding("machine", "CPU", "info", f"{cpu['model']}, {cores()} of {os.cpu_count()} cores usable{threads}"),
        Finding("machine", "vectors", "info", ", ".join(cpu["isa"]) or "unknown"),
        Finding("machine", "caches", "info", ", ".join(cpu["caches"]) or "unknown"),
    ]


def cpu_facts() -> dict[str, Any]:
    """Model, instruction sets and caches, as the system tells them; what it does not tell is left out."""
    if sys.platform == "darwin":
        model = _output(["sysctl", "-n", "machdep.cpu.brand_string"]) or platform.processor()
        isa = ["NEON"] if platform.machine() == "arm64" else ["AVX2"]
        sizes = [(n, _output(["sysctl", "-n", f"hw.{k}"])) for n, k in (("L1d", "l1dcachesize"), ("L2", "l2cachesize"))]
        return {"model": model, "isa": isa, "caches": [f"{n} {int(s) // 1024} KiB" for n, s in sizes if s.isdigit()]}
    info = _read(Path("/proc/cpuinfo")).splitlines()
    fields = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in info)}
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    return {
        "model": fields.get("model name") or platform.processor() or platform.machine(),
        "isa": [name for flag, name in FLAGS.items() if flag in flags],
        "caches": _caches(Path("/sys/devices/system/cpu/cpu0/cache")),
    }


def _caches(folder: Path) -> list[str]:
    found = []
    for index in sorted(folder.glob("index*")) if folder.is_dir() else []:
        kind, level, size = (_read(index / name).strip() for name in ("type", "level", "size"))
        if kind in ("Data", "Unified") and size:
            found.append(f"L{level}{'d' if kind == 'Data' else ''} {size.replace('K', ' KiB').replace('M', ' MiB')}")
    return found


def packages() -> list[Finding]:
    """Versions of what castile can use, without importing any of it."""
    found = []
    for name, distributions, costs, remedy in PACKAGES:
        version = _version(distributions)
        if name == "xgboost" and sys.platform == "darwin":
            remedy = "pip install xgboost"
        if name == "triton" and not version and sys.platform != "linux":
            remedy = "Triton has wheels for Linux only"
        if version:
            found.append(Finding("packages", name, "ok", version))
        else:
            found.append(Finding("packages", name, "missing", "not installed", f"without it, {costs}", remedy))
    return found


def _version(distributions: Iterable[str]) -> str:
    for name in distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return ""


def compilers() -> list[Finding]:
    """The C++ compiler that CPU kernels are built with, and whether it has OpenMP."""
    try:
        command = find_compiler().command
    except UsageError as error:
        costs = "without it, no CPU kernels; parsing, explaining and the oracle work"
        return [Finding("compiler", "C++", "missing", f"{error.message}: {error.got}", costs, error.hint)]
    name = " ".join([Path(command[0]).name, *command[1:]])
    version = _output([*command, "--version"]).partition("\n")[0]
    if not version:
        costs, remedy = "no CPU kernel can be built", "repair it, or set CXX to another one"
        return [Finding("compiler", name, "missing", f"{command[0]} does not tell its version", costs, remedy)]
    return [
        Finding("compiler", name, "ok", f"{version} ({command[0]})"),
        Finding("compiler", "OpenMP", "ok", "works")
        if has_openmp(command)
        else Finding(
            "compiler",
            "OpenMP",
            "missing",
            f"{name} -fopenmp does not build or run",
            "without it, CPU kernels start their threads at each call",
            "install libgomp (GCC) or libomp (Clang)",
        ),
    ]


def has_openmp(compiler: Sequence[str]) -> bool:
    """Whether a program with OpenMP builds and runs."""
    try:
        with tempfile.TemporaryDirectory(prefix="castile-doctor-") as folder:
            source, program = Path(folder, "openmp.cpp"), Path(folder, "openmp")
            source.write_text(_OPENMP)
            for command in ([*compiler, "-fopenmp", str(source), "-o", str(program)], [str(program)]):
                if subprocess.run(command, capture_output=True, timeout=30, check=False).returncode != 0:
                    return False
    except (OSError, subprocess.TimeoutExpired):
        return False
    return True


def gpu() -> Finding:
    """The GPU, as torch sees it; torch is asked in a process of its own, so a broken install breaks nothing here."""
    if not _version(("torch",)):
        return Finding("GPU", "GPU", "info", "not asked: that takes torch")
    code = (
        "import torch\n"
        "print(torch.__version__, torch.version.cuda or torch.version.hip or '(CPU build)')\n"
        "for i in range(torch.cuda.device_count()):\n"
        "    p = torch.cuda.get_device_properties(i)\n"
        "    print(f'{p.name}, {p.total_memory / 2**30:.0f} GiB, compute {p.major}.{p.minor}')\n"
    )
    answer = _output([sys.executable, "-c", code], timeout=60).splitlines()
    if not answer:
        return Finding(
            "GPU", "GPU", "missing", "torch is installed but does not import", "", "python -c 'import torch'"
        )
    if not answer[1:]:
        return Finding("GPU", "GPU", "info", f"none that torch {answer[0]} sees; Triton still compiles for any target")
    return Finding("GPU", "GPU", "ok", "; ".join(answer[1:]))


def cache() -> Finding:
    """Where built kernels are kept."""
    folder = wanted_folder()
    parent = next(p for p in (folder, *folder.parents) if os.path.lexists(p))
    made = parent == folder
    if (cache_folder() is not None if made else parent.is_dir()) and os.access(parent, os.W_OK | os.X_OK):
        return Finding("cache", "folder", "ok", f"{folder}{'' if made else ' (not yet made)'}")
    return Finding(
        "cache", "folder", "missing", f"{folder} cannot be written, or is not yours alone",
        "kernels would be built anew in each process",
        "set CASTILE_CACHE_DIR to a folder of yours",
    )  # fmt: skip


def _output(command: list[str], timeout: float = 10) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=timeout, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def table(findings: list[Finding]) -> Text:
    """What a person reads: findings by group, below each missing thing what it costs and what helps."""
    from rich.text import Text

    styles = {"ok": "green", "missing": "yellow", "info": "dim"}
    text = Text(no_wrap=True, overflow="ignore")
    wide = max(len(f.name) for f in findings)
    group = ""
    for f in findings:
        if f.group != group:
            text.append(("\n\n" if group else "") + f.group, "bold")
            group = f.group
        mark = {"ok": "ok", "missing": "--", "info": "  "}[f.state]
        text.append(f"\n  {mark}  ", styles[f.state])
        text.append(f"{f.name.ljust(wide)}  {f.detail}")
        if f.costs or f.remedy:
            text.append(f"\n      {' ' * wide}  {f.costs}{'; ' if f.costs and f.remedy else ''}", "dim")
            text.append(f.remedy)
    missing = sum(f.state == "missing" for f in findings)
    ending = (
        "nothing is missing"
        if not missing
        else f"{missing} missing; parsing, explaining and the oracle need none of them"
    )
    text.append("\n\n" + ending, "dim")
    return text
