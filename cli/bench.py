"""`castile bench`: castile's kernels beside their peers, measured by the project's harness."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Annotated

import typer

from ..ir.errors import UsageError
from .terminal import Json, emit


def bench(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME ...]", help="Cases, as words or globs: softmax 'attention bf16*'."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes, outputs checked, nothing timed.")] = False,
    seconds: Annotated[float, typer.Option("--seconds", min=0.1, help="Time spent on each case, about.")] = 4.0,
    threads: Annotated[int | None, typer.Option("--threads", min=1, show_default=False)] = None,
    list_cases: Annotated[bool, typer.Option("--list", help="Name the cases and stop.")] = False,
    json: Json = False,
) -> None:
    """Measure kernels on the CPU against PyTorch, Inductor and FlexAttention, outputs checked.

    For example: castile bench softmax gemm. A row that a busy machine spoilt is marked void and exits with 3.
    """
    try:
        from ..benchmarks import bench_kernels
        from ..benchmarks._command import main, wanted
    except ImportError as error:
        missing = (error.name or "").split(".")[-1]
        raise UsageError(
            f"the benchmarks cannot run: `{missing}` is missing",
            hint="run them from a clone of castile's repository, with torch installed",
        ) from error
    known = [w.name for w in bench_kernels.workloads()]
    if list_cases:
        if json:
            emit(known)
        else:
            print("\n".join(known))
        return
    for name in names or ():
        if not any(wanted(case, name) for case in known):
            near = get_close_matches(name, {k for case in known for k in (case, case.split()[0])}, n=3)
            instead = f"did you mean {' or '.join(f'`{k}`' for k in near)}? " if near else ""
            raise UsageError(f"no case of the benchmarks is called {name!r}", hint=f"{instead}--list names all")
    words = ["--only", "|".join(names or ["*"]), "--seconds", str(seconds)]
    words += ["--quick"] * quick + ["--json"] * json + (["--threads", str(threads)] if threads else [])
    raise typer.Exit(main("kernels", bench_kernels.cases, words, restart=True))
