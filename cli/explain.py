"""`castile explain`: what a cascade is made of and what it costs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .terminal import File, Json, More, Shape, emit, extents, note, out, read_cascade, sorted_out, write_file


def explain(
    file: File,
    more: More = None,
    shape: Shape = None,
    svg: Annotated[
        Path | None, typer.Option("--svg", metavar="OUT", help="Also draw it, to this file.", show_default=False)
    ] = None,
    json: Json = False,
) -> None:
    """What a cascade costs: passes over each rank, types, spaces, operations, bytes.

    With extents the formulas get numbers: castile explain gemm.cascade --shape m=4096 n=4096 k=4096
    """
    from .. import driver

    file, words = sorted_out(file, more)
    c = read_cascade(file)
    report = driver.explain(c, extents([*(shape or ()), *words]))
    if svg is not None:
        from ..passes.draw import to_svg

        write_file(svg, to_svg(c))
        note(f"drew {svg}")
    if json:
        emit(report.to_dict())
    else:
        out().print(report)
