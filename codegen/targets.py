"""The targets behind one door: what each prints, builds and emits from the same tile programs.

A GPU's modules are loaded when one is asked for, so the CPU needs neither torch nor Triton.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import Any

from ..ir.cascade import Cascade
from ..ir.device import device_of
from ..ir.errors import UsageError
from ..ir.mapping import Mapping
from .assembly import Assembly, Program
from .cpp import print_cpp
from .runtime import CpuProgram

# What a GPU's driver leaves in the file system, before torch is asked.
_SIGNS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")


def named(target: str | None) -> str:
    """The full spelling of a target: None is the GPU that is present, else the CPU; "cuda" is the GPU present.

    Raises `UsageError` for a target that does not exist, or for "cuda" where there is no GPU.
    """
    if target is None:
        return present() or "cpu"
    if target == "cuda":
        found = present()
        if found is None:
            raise UsageError(
                "there is no GPU here that torch can use",
                expected="a GPU and torch with CUDA or ROCm",
                got="none",
                hint="name an architecture to compile for it all the same, as in cuda:90; or use cpu",
            )
        return found
    if target != "interpret":
        device_of(target)
    return target


def present() -> str | None:
    """The target of this machine's GPU, None where there is none."""
    if "torch" not in sys.modules and not any(map(os.path.exists, _SIGNS)):
        return None
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    if torch.version.hip:
        return "hip:" + str(torch.cuda.get_device_properties(0).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability()
    return f"cuda:{major}{minor}"


def print_source(program: Program, mapping: Mapping, target: str) -> str:
    """The generated text of a program's kernels."""
    if target == "cpu":
        return print_cpp(program.kernels, program.cascade.name)
    return str(_module("triton").print_triton(program, mapping, target))


def build(program: Program, mapping: Mapping, target: str) -> Any:
    """What runs a program's kernels: called with the parameters by name."""
    if target == "cpu":
        return CpuProgram.build(program)
    if target == "interpret":
        return _module("triton_interpret").InterpretProgram.build(program, mapping)
    return _module("triton_build").CudaProgram.build(program, mapping, target)


def load(assembly: dict[str, Any], written: Cascade) -> Any:
    """As `build` for the CPU, from the JSON form of the `Assembly` of a cascade as it was written."""
    return CpuProgram.of(Assembly.from_dict(assembly, written))


def standalone(program: Program, mapping: Mapping, target: str, written: Cascade) -> str:
    """One file with no castile in it, for a cascade as it was written."""
    if target == "cpu":
        from .standalone import standalone_cpp

        return standalone_cpp(program)
    return str(_module("triton").standalone(program, mapping, target, written))


def _module(name: str) -> Any:
    """A module of the Triton printer."""
    try:
        return import_module(f".{name}", __package__)
    except ModuleNotFoundError as error:
        raise UsageError(
            f"this target needs `{error.name}`, which is not installed", hint="pip install 'castile[triton]'"
        ) from error
