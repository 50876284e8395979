"""`castile device`: what castile knows of a device, and what this machine can do when measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from .terminal import Json, emit, out

if TYPE_CHECKING:
    from ..ir.device import Device

app = typer.Typer(invoke_without_command=True, help="Show a device, or measure this machine.")


@app.callback()
def device(
    context: typer.Context,
    target: Annotated[str, typer.Option("--target", metavar="T", help="cpu, cuda:90, hip:gfx942, …")] = "cpu",
    json: Json = False,
) -> None:
    """Show what castile takes a device to be: units, rates, memory levels, limits."""
    if context.invoked_subcommand is not None:
        return
    from ..autotune.probe import describe_cpu
    from ..ir.device import device_of

    _show(describe_cpu() if target == "cpu" else device_of(target), {}, json)


@app.command()
def measure(
    seconds: Annotated[float, typer.Option("--seconds", min=0.01, max=10.0, help="Time for each rate.")] = 0.15,
    json: Json = False,
) -> None:
    """Measure one core of this CPU: FMA and exponential rates, and how fast each level of memory is read."""
    from ..autotune.probe import measure_copy, measure_cpu

    _show(measure_cpu(seconds), {"copy_bytes_per_s": measure_copy(seconds)}, json)


def document(d: Device) -> dict[str, Any]:
    return {
        "name": d.name,
        "target": d.target,
        "units": d.units,
        "flops_per_s": dict(d.flops),
        "special_per_s": d.special_per_s,
        "memory": [
            {"name": m.name, "bytes": m.bytes, "shared_by": m.shared_by, "bytes_per_s": m.bytes_per_s} for m in d.memory
        ],
        "vector_bits": d.vector_bits,
        "warp": d.warp,
        "shared_bytes": d.shared_bytes,
        "registers_per_thread": d.registers_per_thread,
        "features": sorted(d.features),
    }


def _show(d: Device, more: dict[str, float], json: bool) -> None:
    if json:
        emit({**document(d), **more})
        return
    from rich.table import Table

    from ..passes.report import si

    table = Table(title=d.name, show_header=False)
    table.add_row("target", d.target)
    table.add_row("units", str(d.units))
    for dtype, rate in d.flops.items():
        table.add_row(f"products of {dtype}", f"{si(int(rate), 'FLOP/s')}")
    table.add_row("exponentials", f"{si(int(d.special_per_s), '/s')}")
    for m in d.memory:
        table.add_row(m.name, f"{si(m.bytes, 'B')}, {si(int(m.bytes_per_s), 'B/s')}")
    for name, rate in more.items():
        table.add_row(name.removesuffix("_bytes_per_s"), si(int(rate), "B/s"))
    table.add_row("vectors", f"{d.vector_bits} bits")
    out().print(table)
