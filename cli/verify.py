"""`castile verify`: is a cascade what its writer thinks? Rules, round trip, monoid laws, small random runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .terminal import FAILED, File, Json, emit, out, read_cascade

if TYPE_CHECKING:
    from rich.text import Text

    from ..ir.cascade import Cascade

# States tried for each monoid; extents of the random cases; outputs that are computed once more, one by one.
STATES, SAMPLES = 400, 8
EXTENTS = (1, 2, 3, 5, 7)
MAX_CASE_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at; ``again`` is a command that shows a failure, "" where there is none."""

    name: str
    ok: bool
    detail: str
    notes: tuple[str, ...] = ()
    again: str = ""


def verify(
    file: File,
    cases: Annotated[int, typer.Option("--cases", metavar="N", min=0, help="Random runs with small extents.")] = 8,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the random runs.")] = 0,
    json: Json = False,
) -> None:
    """Check a cascade: rules, round trip, monoid laws, small random runs."""
    from ..ir.errors import CastileError

    try:
        c = read_cascade(file)
    except CastileError as error:
        if json:
            emit({"ok": False, "error": str(error), "checks": []})
        raise
    checks = (
        Check(
            "reads", True, f"{counted(len(c.params), 'parameter')}, {counted(len(c.einsums), 'Einsum')}, well formed"
        ),
        round_trip(c),
        key(c),
        *laws(c, file, seed),
        runs(c, file, cases, seed),
    )
    ok = all(check.ok for check in checks)
    if json:
        emit({"ok": ok, "name": c.name, "key": c.key, "checks": [asdict(check) for check in checks]})
    else:
        out().print(table(c.name, ok, checks))
    if not ok:
        raise typer.Exit(FAILED)


def counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def round_trip(c: Cascade) -> Check:
    """The text form parses back to the same cascade."""
    from ..ir.errors import CastileError
    from ..ir.parse import parse

    try:
        same = parse(str(c)) == c
    except CastileError as error:
        return Check("round trip", False, f"its own text does not parse: {error.message}")
    return Check("round trip", same, "its text parses back to it" if same else "its text parses to something else")


def key(c: Cascade) -> Check:
    """The content key does not change with names."""
    from ..ir.key import rename

    tensors = [p.name for p in c.params] + [o.name for e in c.einsums for o in e.outputs]
    other = rename(
        c,
        {name: f"renamed_{n}" for n, name in enumerate(tensors)},
        {name: f"rank_{n}" for n, name in enumerate(c.ranks)},
    )
    same = other.key == c.key
    return Check("key", same, f"{c.key[:16]}…" + ("" if same else " changes when tensors and ranks are renamed"))


def laws(c: Cascade, file: str, seed: int) -> list[Check]:
    """The laws of each monoid that the cascade defines, where it is used."""
    import numpy as np

    from ..passes.laws import breaches, monoid_uses

    found = []
    for e, use in monoid_uses(c):
        _, inputs = case(c, [seed, 1 << 10])
        broken = breaches(c, use, inputs, np.random.default_rng([seed, 1 << 11]), STATES)
        hard = [b for b in broken if not b.excused]
        notes = tuple(f"the laws do not hold where elements are infinite:\n{b}" for b in broken if b.excused)
        detail = str(hard[0]) if hard else f"associative, with its identity, on {STATES} states"
        repeat = f"castile verify {file} --seed {seed}" if hard else ""
        found.append(Check(f"monoid {use.op} in {e.name}", not hard, detail, notes[:1], repeat))
    return found


def case(c: Cascade, seed: list[int], equal: bool = False) -> tuple[dict[str, int], Mapping[str, Any]]:
    """Small extents, most of them odd, and inputs for them; smaller where the oracle would take long."""
    import numpy as np

    from ..ir.samples import random_inputs
    from .inputs import complete
    from .run import estimate

    rng = np.random.default_rng(seed)
    choice: Sequence[int] = EXTENTS
    while True:
        drawn = rng.choice(choice, size=len(bound(c)))
        extents = complete(c, {r: int(drawn[0 if equal else n]) for n, r in enumerate(bound(c))}, {})
        if len(choice) == 1 or estimate(c, extents, False)[1] < MAX_CASE_SECONDS:
            return extents, random_inputs(c, extents, seed[-1])
        choice = choice[:-1]


def runs(c: Cascade, file: str, cases: int, seed: int) -> Check:
    """Random runs: they read only what is there, and whole tensors agree with outputs computed one by one."""
    strange: dict[str, str] = {}
    for number in range(seed, seed + cases):
        extents, inputs = case(c, [seed, number])
        fault, odd = one_run(c, extents, inputs, number)
        if fault:
            # Some cascades ask that ranks agree (more keys than positions, a state that is as long as its input).
            strange.setdefault(
                "extents", f"not every choice of extents works: {fault}\n{again(c, file, number, extents)}"
            )
            extents, inputs = case(c, [seed, number], equal=True)
            fault, odd = one_run(c, extents, inputs, number)
        if fault:
            return Check("runs", False, fault, (), again(c, file, number, extents))
        if odd:
            strange.setdefault("values", f"{odd}\n{again(c, file, number, extents)}")
    detail = f"{cases} random cases, extents {EXTENTS[0]} to {EXTENTS[-1]}, whole and sampled outputs agree"
    return Check("runs", True, detail if cases else "none asked for", tuple(strange.values()))


def again(c: Cascade, file: str, seed: int, extents: Mapping[str, int]) -> str:
    """The command that repeats a case."""
    shown = " ".join(f"{r}={extents[r]}" for r in bound(c))
    return f"castile run {file} --random --target oracle --seed {seed}" + (f" --shape {shown}" if shown else "")


def one_run(c: Cascade, extents: Mapping[str, int], inputs: Mapping[str, Any], seed: int) -> tuple[str, str]:
    """What is wrong with a case, and what is only strange about it: values that are no numbers."""
    from ..ir.errors import CastileError
    from ..ir.evaluate import evaluate

    try:
        results = evaluate(c, inputs)
        fault = disagreement(c, inputs, extents, results, seed)
    except CastileError as error:
        return error.message, ""
    odd = [f"{n} has {words}" for n, v in results.items() if v.dtype.kind == "f" and (words := nonfinite(v))]
    return fault, ", ".join(odd)


def bound(c: Cascade) -> list[str]:
    """Ranks whose extent is an axis of a parameter."""
    from ..ir.extents import bindings

    return [b.rank for b in bindings(c) if b.param is not None]


def disagreement(
    c: Cascade, inputs: Mapping[str, Any], extents: Mapping[str, int], results: Mapping[str, Any], seed: int
) -> str:
    """Where an output computed alone differs from the whole tensor; "" if nowhere."""
    import numpy as np

    from ..ir.evaluate import evaluate

    rng = np.random.default_rng(seed)
    ranks = {name: next(o.ranks for o in c.einsum_of[name].outputs if o.name == name) for name in results}
    used = list(dict.fromkeys(r for own in ranks.values() for r in own))
    if any(extents[r] == 0 for r in used):
        return ""
    at = {r: rng.integers(0, extents[r], SAMPLES) for r in used}
    alone = evaluate(c, inputs, at)
    for name, whole in results.items():
        picked = whole[tuple(at[r] for r in ranks[name])]
        if not np.allclose(alone[name], picked, rtol=1e-9, atol=1e-12, equal_nan=True):
            return f"{name} computed whole and computed at single coordinates differ"
    return ""


def nonfinite(values: Any) -> str:
    """How many values are no numbers, in words."""
    import numpy as np

    counts = {"NaN": int(np.isnan(values).sum()), "infinite": int(np.isinf(values).sum())}
    return " and ".join(f"{n} {what}" for what, n in counts.items() if n)


def table(name: str, ok: bool, checks: tuple[Check, ...]) -> Text:
    """What a person reads."""
    from rich.text import Text

    text = Text(no_wrap=True, overflow="ignore")
    text.append(name, "bold")
    text.append("   OK" if ok else "   FAILED", "bold green" if ok else "bold red")
    wide = max(len(check.name) for check in checks)
    for check in checks:
        text.append("\n  " + ("ok  " if check.ok else "FAIL"), "green" if check.ok else "bold red")
        text.append(f"  {check.name.ljust(wide)}  {check.detail}")
        for remark in check.notes:
            for number, line in enumerate(remark.split("\n")):
                text.append(f"\n  {'    ' if number else 'note'}  {' ' * wide}  {line}", "dim")
        if check.again:
            text.append(f"\n        {' ' * wide}  again: ", "dim")
            text.append(check.again)
    return text
