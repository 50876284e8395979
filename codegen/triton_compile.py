"""Compiles generated Triton for any GPU, present or not, in a process of its own (`triton_guest.py`).

A request names a module, a target, and for each kernel its signature, constants and options; the answer is what the
binaries tell: shared memory, registers, spills, instructions.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# What counts as an instruction of each kind, in PTX and in AMD's assembly.
PTX = {
    "wgmma": r"wgmma\.mma_async",
    "tcgen05": r"tcgen05\.mma",
    "mma": r"(?<!w)(?<!wg)\bmma\.(?:sync|sp)",
    "ldgsts": r"cp\.async\.(?:ca|cg)\.shared",
    "tma": r"cp\.async\.bulk\.tensor",
    "mufu": r"\b(?:ex2|lg2|rcp|rsqrt|sqrt|sin|cos|tanh)\.approx",
}
AMD = {
    "mfma": r"\bv_mfma_",
    "wmma": r"\bv_wmma_",
    "ldgsts": r"\b(?:buffer|global)_load_\S+ .*\blds\b",
    "mufu": r"\bv_(?:exp|log|rcp|rsq|sqrt|sin|cos)_f",
}


def _tool(name: str) -> str | None:
    """A tool of the CUDA toolkit that comes with triton."""
    import triton

    found = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return str(found) if found.exists() else None


def _nvidia(asm: Any, warps: int) -> dict[str, Any]:
    found: dict[str, Any] = {"instructions": _count(asm["ptx"], PTX)}
    tool = _tool("cuobjdump")
    if tool is None:
        return found
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=False
        ).stdout
    # One line for each function; the greatest need counts.
    found["registers"] = max(map(int, re.findall(r"REG:(\d+)", text)), default=0)
    # What leaves registers free has a frame for other reasons than want of them.
    scarce = found["registers"] > min(255, 65536 // (32 * warps)) - 8
    found["spill_bytes"] = max(map(int, re.findall(r"STACK:(\d+)", text)), default=0) if scarce else 0
    return found


def _amd(asm: Any) -> dict[str, Any]:
    text = asm["amdgcn"]

    def number(name: str) -> int:
        match = re.search(rf"\.{name}:?\s+(\d+)", text)
        return int(match.group(1)) if match else 0

    return {
        "instructions": _count(text, AMD),
        "registers": number("vgpr_count"),
        "spill_bytes": number("private_segment_fixed_size"),
    }


def _count(text: str, kinds: dict[str, str]) -> dict[str, int]:
    counts = {name: len(re.findall(pattern, text)) for name, pattern in kinds.items()}
    return {name: n for name, n in counts.items() if n}


def _compile(request: dict[str, Any], load: Callable[[str], Any]) -> list[dict[str, Any]]:
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    backend, arch, warp = request["target"]
    module = load(request["source"])
    results = []
    for k in request["kernels"]:
        constants = {n: tl.int32 if v == "index" else v for n, v in k["constants"].items()}
        attributes = {(i,): [["tt.divisibility", 16]] for i in k["divisible"]}
        source = ASTSource(getattr(module, k["name"]), k["signature"], constants, attributes)
        started = time.process_time()
        made = triton.compile(source, target=GPUTarget(backend, arch, warp), options=k["options"])
        row = {"name": k["name"], "shared_bytes": int(made.metadata.shared)}
        row |= _nvidia(made.asm, k["options"]["num_warps"]) if backend == "cuda" else _amd(made.asm)
        row["compile_s"] = round(time.process_time() - started, 3)
        results.append(row)
    return results


def answer(request: dict[str, Any], load: Callable[[str], Any]) -> dict[str, Any]:
    try:
        return {"ok": True, "kernels": _compile(request, load)}
    except Exception as error:
        lines = [t for t in str(error).strip().split("\n") if t.strip()]
        what = f"{type(error).__name__}: {lines[-1] if lines else ''}"[:2000]
        return {"ok": False, "error": what, "detail": str(error)[-4000:]}
