"""`castile run`: compute a cascade by its compiled kernel, or by the oracle."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated

import typer

from ..ir.errors import UsageError
from .terminal import (
    File,
    Json,
    MappingOption,
    More,
    Shape,
    emit,
    extents,
    fail,
    note,
    of_file,
    out,
    pairs,
    read_cascade,
    read_mapping,
    sorted_out,
    write_file,
)

if TYPE_CHECKING:
    from ..ir.cascade import Cascade
    from ..ir.mapping import Mapping as Mapping_
    from .inputs import Array, Given

# The oracle on one core, in operations and steps a second: an estimate for "seconds or hours".
CONTRACTED, MAPPED, STEPS = 4e9, 4e7, 2.5e3
MAX_SECONDS, MAX_BYTES = 60.0, 4_000_000_000


def run(
    file: File,
    more: More = None,
    input: Annotated[
        Path | None, typer.Option("--input", metavar="NPZ", help="Arrays by parameter name.", show_default=False)
    ] = None,
    random: Annotated[bool, typer.Option("--random", help="Draw the inputs that are not given.")] = False,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the random inputs.")] = 0,
    shape: Shape = None,
    set: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=X", help="A scalar, such as --set scale=0.125.", show_default=False),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            "--target", metavar="T", help="Where it runs: cpu, cuda, interpret, or oracle.", show_default=False
        ),
    ] = None,
    mapping: MappingOption = None,
    sample: Annotated[
        int | None,
        typer.Option("--sample", metavar="N", min=1, help="Compute N random outputs, by oracle.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="NPZ", help="Write the results here.", show_default=False)
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Run whatever it may take.")] = False,
    json: Json = False,
) -> None:
    """Compute a cascade on given or random inputs, by a kernel compiled for this machine.

    For example: castile run attention.cascade --random --shape b=1 h=2 q=64 k=64
    """
    from .inputs import gather, number
    from .result import Result

    file, words = sorted_out(file, more)
    c = read_cascade(file)
    shapes = extents([*(shape or ()), *words])
    scalars = {name: number(value) for name, value in pairs(set or (), "--set", "scale=0.125")}
    given = gather(c, shapes, input, scalars, random)
    engine = engine_of(target, sample is not None)
    if engine == "oracle" and not force:
        check_size(c, given.extents, sample is not None)
    given = given.filled(c, seed)
    at = None if sample is None else points(c, given.extents, sample, seed)
    with of_file(file):
        if engine == "oracle":
            results, seconds = by_oracle(c, given, at)
        else:
            results, seconds = by_kernel(c, given, engine, read_mapping(mapping))
    result = Result(c, given, results, seconds, at, engine)
    if output is not None:
        write_file(output, result.packed())
        note(f"wrote {output}")
    if json:
        emit(result.document())
    else:
        out().print(result)


def engine_of(target: str | None, sampled: bool) -> str:
    """What computes: the target named, else the GPU or CPU here; the oracle for a sample and without a compiler."""
    from ..codegen import targets
    from ..codegen.compiler import find_compiler

    if target == "oracle" or sampled:
        if target not in (None, "oracle"):
            fail("a sample is computed by the oracle", "leave out --target, or --sample")
        return "oracle"
    found = targets.named(target)
    if target is None and found == "cpu":
        try:
            find_compiler()
        except UsageError as error:
            note(f"{str(error).splitlines()[0]}: computed by the oracle")
            return "oracle"
    return found


def by_oracle(c: Cascade, given: Given, at: Mapping[str, Array] | None) -> tuple[dict[str, Array], float]:
    """The results in float64, and the seconds that they took."""
    from ..ir.evaluate import evaluate

    began = perf_counter()
    return dict(evaluate(c, given.values, at)), perf_counter() - began


def by_kernel(c: Cascade, given: Given, target: str, mapping: Mapping_ | None) -> tuple[dict[str, Array], float]:
    """The results of the compiled kernel, and the seconds of a call after the first one."""
    import numpy as np

    from .. import driver
    from ..ir.dtypes import numpy_dtype
    from ..ir.inputs import read_inputs

    checked = read_inputs(c, given.values)
    values = {p.name: checked[p.name].astype(numpy_dtype(p.dtype))[... if p.indices else ()] for p in c.params}
    kernel = driver.compile(c, target, given.extents, mapping)
    kernel(**values)  # builds it
    began = perf_counter()
    got = kernel(**values)
    seconds = perf_counter() - began
    arrays = got if isinstance(got, tuple) else (got,)
    wide = [x if x.dtype.kind in "iub" else x.astype(np.float64) for x in map(np.asarray, arrays)]
    return dict(zip(c.outputs, wide, strict=True)), seconds


def check_size(c: Cascade, extents: Mapping[str, int], sampled: bool) -> None:
    """Refuse what the oracle cannot do in reasonable time or memory, and say what can be done instead."""
    from ..ir.dtypes import DTYPES
    from ..ir.types import tensor_types
    from ..passes.report import si
    from ..passes.work import sizes_of, tensor_bytes

    types, formulas, sizes = tensor_types(c), tensor_bytes(c), sizes_of(c, extents)
    names = list(c.param_of) if sampled else list(types)
    # The oracle holds 8 bytes for each value, and as much again while it makes or reads them.
    held = sum(formulas[name].at(sizes) * 8 // DTYPES[types[name]].bits * 16 for name in names)
    if held > MAX_BYTES:
        hint = "give smaller extents" if sampled else "compute some outputs only: --sample 64; or give smaller extents"
        fail(f"the oracle would hold {si(held, 'B')}; without --force it takes {si(MAX_BYTES, 'B')} at most", hint)
    operations, seconds = estimate(c, extents, sampled)
    if seconds > MAX_SECONDS:
        long = f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.3g} hours"
        hint = (
            "give smaller extents; or wait: --force"
            if sampled
            else "compute some outputs only: --sample 64; or wait: --force"
        )
        fail(f"the oracle would take some {long}, for {si(operations)} operations", hint)


def estimate(c: Cascade, extents: Mapping[str, int], sampled: bool) -> tuple[int, float]:
    """Operations of a run, and the seconds that the oracle may take. A sample computes only scans whole."""
    from ..ir.verify import scan_step
    from ..passes.work import operations, sizes_of, work

    sizes = sizes_of(c, extents)
    count, seconds = 0, 0.0
    for e, done in zip(c.einsums, work(c), strict=True):
        scan = scan_step(e)
        if sampled and scan is None:
            continue
        spent = {unit: p.at(sizes) for unit, p in operations([done]).items()}
        count += sum(spent.values())
        seconds += spent["matrix"] / CONTRACTED + (spent["vector"] + spent["special"]) / MAPPED
        steps = extents[scan.rank] if scan else 0
        for reduction in e.reductions:
            if reduction.op in c.monoid_of:
                folded = 1
                for r in reduction.ranks:
                    folded *= extents[r]
                steps += folded
        seconds += steps / STEPS
    return count, seconds


def points(c: Cascade, extents: Mapping[str, int], count: int, seed: int) -> dict[str, Array]:
    """Random coordinates of the outputs. Raises `UsageError` where there is nothing to sample."""
    import numpy as np

    rng = np.random.default_rng([seed, 1 << 20])
    ranks = dict.fromkeys(r for name in c.outputs for o in c.einsum_of[name].outputs if o.name == name for r in o.ranks)
    empty = [r for r in ranks if extents[r] == 0]
    if empty:
        fail(f"rank `{empty[0]}` is empty, so there is no output to sample")
    return {r: rng.integers(0, extents[r], count) for r in ranks}
