"""The pipeline on one screen: what the public functions do, from text to answer.

    parse → derive → map → print → build → run

Imports everything but `frontend` and `cli`.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from collections.abc import Mapping as Dict
from dataclasses import replace
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .codegen import targets
from .codegen.assembly import assemble
from .codegen.kernel import Kernel, Variant
from .codegen.memo import recall
from .ir.cascade import NUMERICS, Cascade
from .ir.errors import InputError, UsageError
from .ir.extents import resolve
from .ir.machine import cores, second_cache
from .ir.mapping import Mapping
from .passes import account
from .passes.count import count_passes
from .passes.defaults import default_mapping
from .passes.derive import alternatives
from .passes.explain import Explanation, einsum_reports, rank_reports, tensor_reports
from .passes.inbounds import check_reads
from .passes.mapped import Mapped, bucket, check_mapping, mapped, nominal, small_ranks
from .passes.vacant import vacated

if TYPE_CHECKING:
    from .autotune.tuner import TuneResult

T = TypeVar("T")


def compile(
    c: Cascade,
    target: str | None = None,
    shapes: Dict[str, int] | None = None,
    mapping: Mapping | None = None,
    numerics: str | None = None,
    *,
    tuned: bool = True,
) -> Kernel:
    """Compile a cascade: a kernel that is called with its parameters by name.

    ``target`` is "cpu", "interpret", "cuda", "cuda:90", …; None is the GPU that is present, else the CPU. ``shapes``
    gives extents by rank and is a hint: the kernel runs for any, choosing among variants. ``mapping`` fixes how it
    runs; None takes what was tuned for the nearest shapes (unless ``tuned`` is False), else the default. Shapes with an
    empty rank take the default whatever is given. ``numerics`` overrides the cascade's own.
    Nothing is built before the first call or before `Kernel.resources` is read.

    Raises `UsageError` for an unknown target or numerics, `InputError` for shapes or a mapping that do not fit.
    """
    target = targets.named(target)
    c = _with_numerics(c, numerics)
    if mapping is not None:
        check_mapping(c, mapping)
    small = recall(("on-chip ranks", str(c)), lambda: sorted(small_ranks(c)))
    extents = nominal(c, small) if shapes is None else resolve(c, shapes)
    choose = partial(_choose, c, target, mapping, tuned)
    return Kernel(c, target, choose, partial(bucket, c, small=small), partial(check_reads, c), extents)


def _choose(c: Cascade, target: str, mapping: Mapping | None, tuned: bool, extents: Dict[str, int]) -> Variant:
    """The variant for the extents of a bucket: parse → derive → map → print; it is built when it first runs."""
    find = _variant.__wrapped__ if os.environ.get("CASTILE_DUMP") else _variant
    left = vacated(c, {r for r, n in extents.items() if n == 0})
    if left != c:
        # A mapping was made for work, of which there is little here.
        return find(left, target, None, tuple((r, n) for r, n in extents.items() if r in left.ranks), "default")
    mapping, origin = _mapping(c, target, mapping, tuned, extents)
    return _fitting(lambda m, o: find(c, target, m, tuple(extents.items()), o), mapping, origin)


def _mapping(
    c: Cascade, target: str, given: Mapping | None, tuned: bool, extents: Dict[str, int]
) -> tuple[Mapping | None, str]:
    """What was given, else what is on record, and which of both; None for the default."""
    if given is not None:
        return given, "given"
    found = _tuned(c, target, extents) if tuned else None
    return found, "tuned" if found is not None else "default"


def _fitting(make: Callable[[Mapping | None, str], T], mapping: Mapping | None, origin: str) -> T:
    """What is made under a mapping. One on record may be of another castile or a stranger's: where it does not fit, a
    warning, and the default."""
    try:
        return make(mapping, origin)
    except InputError as error:
        if origin != "tuned":
            raise
        said = str(error).splitlines()[0]
        warnings.warn(f"castile: a tuned mapping is not used: {said}", RuntimeWarning, stacklevel=2)
    return make(None, "default")


def _tuned(c: Cascade, target: str, extents: Dict[str, int]) -> Mapping | None:
    """The mapping on record for these extents or near ones; None where nothing was tuned."""
    from .autotune.places import have_records, records_path

    if not have_records(records_path()):
        return None
    from .autotune.records import recorded

    return recorded(c, extents, target)


def is_tuned(c: Cascade, extents: Dict[str, int], target: str) -> bool:
    """Whether a mapping is on record for these extents or near ones."""
    return _tuned(c, target, extents) is not None


def tune(
    c: Cascade,
    shapes: Dict[str, int],
    target: str = "cpu",
    budget_s: float = 60.0,
    trials: int | None = None,
    seed: int = 0,
) -> TuneResult:
    """Find the fastest mapping of a cascade at some extents, for ``budget_s`` seconds or ``trials`` mappings at most.

    Every candidate runs in a process of its own and is checked against the oracle; each trial is recorded as it ends,
    and `compile` uses the winner from then on. ``best`` of the result is the winner's record, ``kernel`` it compiled.
    Raises `UsageError` where nothing runs or the target cannot be measured here, `InputError` for wrong shapes.
    """
    from .autotune.tuner import tune as search

    found = search(c, shapes, target, budget_s, trials, seed)
    return replace(found, kernel=compile(c, target, dict(found.best.shapes), found.best.mapping))


@lru_cache(maxsize=512)
def _variant(
    c: Cascade, target: str, mapping: Mapping | None, pairs: tuple[tuple[str, int], ...], origin: str
) -> Variant:
    """`_choose`, remembered: kernels of one cascade share their variants, and what these have built."""
    extents = dict(pairs)

    def made() -> tuple[Mapping, Mapped, str]:
        chosen = mapping if mapping is not None else default_mapping(c, target, extents)
        program = mapped(c, chosen, extents)
        source = targets.print_source(program.program, chosen, target)
        _dump(c, program, source, target)
        return chosen, program, source

    def written() -> dict[str, Any]:
        chosen, program, source = made()
        return {"mapping": chosen.to_dict(), **assemble(program.program, source).to_dict(c)}

    if target != "cpu" or os.environ.get("CASTILE_DUMP"):
        chosen, program, source = made()
        return Variant(extents, chosen, source, cache(partial(targets.build, program.program, chosen, target)), origin)
    # The default mapping follows the machine.
    words = (str(c), mapping.to_json() if mapping else f"{cores()} {second_cache()}", json.dumps(dict(extents)))
    found = recall(("variant", *words), written)
    chosen = Mapping.from_json(found["mapping"])
    return Variant(extents, chosen, found["source"], cache(partial(targets.load, found, c)), origin)


def emit(
    c: Cascade,
    target: str | None = None,
    shapes: Dict[str, int] | None = None,
    mapping: Mapping | None = None,
    numerics: str | None = None,
    *,
    tuned: bool = True,
) -> str:
    """The text of one file that computes a cascade with no castile in it: C++ with a C entry point, or Triton.

    Arguments and errors are those of `compile`; without ``shapes`` it is written for nominal extents.
    """
    target = targets.named(target)
    c = _with_numerics(c, numerics)
    if mapping is not None:
        check_mapping(c, mapping)
    extents = bucket(c, nominal(c) if shapes is None else resolve(c, shapes))

    def written(found: Mapping | None, _: str) -> str:
        chosen = found if found is not None else default_mapping(c, target, extents)
        return targets.standalone(mapped(c, chosen, extents).program, chosen, target, c)

    return _fitting(written, *_mapping(c, target, mapping, tuned, extents))


def _with_numerics(c: Cascade, numerics: str | None) -> Cascade:
    given: Any = c
    if not isinstance(given, Cascade):
        hint = "parse the text first: castile.parse(text)" if isinstance(given, str) else "see castile.parse"
        raise UsageError("what is compiled is a cascade", expected="a Cascade", got=type(given).__name__, hint=hint)
    if numerics is None:
        return c
    if numerics not in NUMERICS:
        raise UsageError("no numerics of that name", expected=", ".join(NUMERICS), got=repr(numerics))
    return replace(c, numerics=numerics)


def _dump(c: Cascade, program: Mapped, source: str, target: str) -> None:
    """With ``CASTILE_DUMP=dir``: every stage as text, in the files ``dir/<cascade>.<number>.<stage>``."""
    folder = os.environ.get("CASTILE_DUMP")
    if not folder:
        return
    d, mapping = program.derivation, program.mapping
    stages = {
        "input.cascade": str(c),
        f"derive-{mapping.form}-{mapping.gauge}.cascade": str(d.cascade) if d.cascade != c else "(unchanged)\n",
        "rewrites.txt": "".join(f"{s}\n" for s in d.steps),
        "mapping.json": mapping.to_json() + "\n",
        "tiles.txt": "\n".join(map(str, program.kernels)),
        f"source.{'cpp' if target == 'cpu' else 'py'}": source,
    }
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        for number, (stage, text) in enumerate(stages.items()):
            Path(folder, f"{c.name}.{number:02d}.{stage}").write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(
            f"`CASTILE_DUMP` names no folder that can be written: {folder} ({error.strerror or error})",
            hint="name another one, or unset it",
        ) from None


def explain(c: Cascade, shapes: Dict[str, int] | None = None) -> Explanation:
    """What castile knows of a cascade: how often each rank is traversed, as written and as derived, and why.

    Beside passes: the rewrites that fired, the state that streams, what blocks and why, the forms that a tuner may
    choose among, the kernels; and types, iteration spaces, operations and bytes.

    ``shapes`` gives extents by rank, for numbers beside the formulas. ``print(castile.explain(c))`` is for people,
    `Explanation.to_json` for programs. Raises `InputError` where an extent is missing or does not fit.
    """
    before = count_passes(c)
    forms = alternatives(c)
    best = forms[0]
    extents = resolve(c, shapes) if shapes else {}
    return Explanation(
        cascade=c,
        passes={rank: (count, best.passes.get(rank, 0)) for rank, count in before.items()},
        ranks=rank_reports(c),
        tensors=tensor_reports(c),
        einsums=einsum_reports(c),
        extents=extents,
        rewrites=account.rewrites(best),
        barriers=account.barriers(best),
        states=account.states(best),
        alternatives=account.alternatives(forms[1:]),
        kernels=account.kernels(best.cascade, extents),
    )
