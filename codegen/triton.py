"""Triton from tile programs: a module of readable text, with one `@triton.jit` function for each kernel.

The module needs torch and triton alone. Tensors keep their strides, ranks their extents as arguments; the mapping is
baked in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

from ..ir.cascade import Cascade
from ..ir.device import DEVICES, device_of
from ..ir.errors import InputError, UsageError
from ..ir.footprint import staged_bytes
from ..ir.mapping import Mapping as Knobs
from ..ir.tile import TileKernel
from .assembly import Program
from .interface import check_held
from .names import Names, safe
from .triton_check import self_check
from .triton_kernel import TAKEN, KernelPrinter, Printed
from .triton_module import LAUNCH, Module
from .triton_scope import largest_operation

# Elements of the largest tile that Triton takes, and programs of one launch that 32 bits number.
LARGEST_TILE = 1 << 20
MOST_PROGRAMS = (1 << 31) - 1


def print_triton(program: Program, mapping: Knobs, target: str) -> str:
    """The text of a module: the kernels of a program, ``launch(…)`` on given tensors and extents, and ``NAME(…)``.

    ``target`` is a GPU's or "interpret". The same program and mapping give the same text. Raises `UsageError` for a
    target without Triton, `VerifyError` for kernels that mean nothing, `InputError` for tiles that no device can hold.
    """
    return Module(program, mapping, target, print_kernels(program, mapping, target)).text()


def standalone(program: Program, mapping: Knobs, target: str, written: Cascade) -> str:
    """The module of `print_triton` as one file to run: under ``__main__`` it compares itself with the cascade as it was
    ``written``, in float64.

    It needs torch and triton alone. Errors as `print_triton`.
    """
    module = Module(program, mapping, target, print_kernels(program, mapping, target))
    return module.text() + "\n\n" + "\n".join(self_check(module, written)) + "\n"


def print_kernels(program: Program, mapping: Knobs, target: str) -> tuple[Printed, ...]:
    """Each kernel of a program as a Triton function. Errors as `print_triton`."""
    if target != "interpret" and not device_of(target).is_gpu:
        raise UsageError("Triton is for GPUs", expected=" ".join(t for t in DEVICES if t != "cpu"), got=target)
    for k in program.kernels:
        _refuse(k, mapping, target)
    names = Names((*TAKEN, LAUNCH, safe(program.cascade.name)))
    found = []
    for i, k in enumerate(program.kernels):
        name = names("kernel", str(i), f"{safe(k.name)}_kernel")
        by_value = frozenset(p.name for p in program.cascade.params if not p.indices)
        numerics = program.cascade.numerics
        printer = KernelPrinter(k, name, mapping, by_value=by_value, numerics=numerics, target=target)
        found.append(printer.printed())
    return tuple(found)


def _refuse(k: TileKernel, mapping: Knobs, target: str) -> None:
    """Refuse what need not be compiled to know that it does not fit."""
    most, rank = largest_operation(k)
    if most > LARGEST_TILE:
        raise InputError(
            f"an operation of kernel `{k.name}` goes over more elements than Triton takes",
            rank=rank,
            expected=f"at most {LARGEST_TILE}",
            got=str(most),
            hint=f"tile rank `{rank}` smaller",
        )
    device = device_of(target)
    # All stages but one are sure to be held at once.
    need = staged_bytes(k) * max(1, mapping.knob("stages") - 1)
    if target != "interpret" and need > device.shared_bytes:
        raise InputError(
            f"the operands of kernel `{k.name}` do not fit the shared memory of a block of {target}",
            rank=rank,
            expected=f"at most {device.shared_bytes} bytes",
            got=f"{need} bytes",
            hint=f"tile rank `{rank}` smaller, or take fewer stages",
        )


def fits_held(kernels: Sequence[TileKernel], extents: Mapping[str, int]) -> None:
    """Raise `InputError` where a rank that one tile is to hold has more coordinates than the tile."""
    for k in kernels:
        check_held({h.of: h.size for h in k.held}, extents)


def fits_grid(kernels: Sequence[TileKernel], extents: Mapping[str, int]) -> None:
    """Raise `InputError` where a kernel's tiles are more than a GPU numbers."""
    for k in kernels:
        counts = {g.rank: -(-extents.get(g.rank, k.fixed.get(g.rank, 1)) // g.size) for g in k.grid}
        programs = prod(counts.values())
        if programs > MOST_PROGRAMS:
            rank = max(counts, key=lambda r: counts[r])
            raise InputError(
                f"kernel `{k.name}` has more tiles than a GPU takes in one launch",
                rank=rank,
                expected=f"at most {MOST_PROGRAMS}",
                got=str(programs),
                hint=f"tile rank `{rank}` larger, or call the kernel with parts of it",
            )
