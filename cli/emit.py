"""`castile emit`: the generated kernel as a file of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import terminal
from .terminal import File, Json, MappingOption, More, Shape, Target, extents, note, read_cascade, sorted_out


def emit(
    file: File,
    more: More = None,
    target: Target = None,
    shape: Shape = None,
    mapping: MappingOption = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="OUT", help="Write it here.", show_default=False)
    ] = None,
    json: Json = False,
) -> None:
    """Print a cascade as one C++ or Triton file with no castile in it.

    For example: castile emit attention.cascade --target cuda:90 -o attention.py
    """
    from .. import driver

    file, words = sorted_out(file, more)
    c = read_cascade(file)
    shapes = extents([*(shape or ()), *words])
    given = terminal.read_mapping(mapping)
    source = driver.emit(c, target, shapes or None, given)
    if output is not None:
        terminal.write_file(output, source)
        note(f"wrote {output}")
    if json:
        kernel = driver.compile(c, target, shapes or None, given)
        document = {"name": c.name, "key": c.key, "target": kernel.target, "mapping": kernel.mapping.to_dict()}
        terminal.emit({**document, "source": source})
    elif output is None:
        print(source, end="")
