"""The pipeline: passes as a flat list of named functions, each run recorded.

A pass is a pure function from a cascade to a cascade. The verifier runs after each; with ``CASTILE_DUMP=dir`` the text
after each is written to ``dir``, and a pass that did nothing says "(unchanged)".
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..ir.cascade import Cascade
from ..ir.verify import verify


@dataclass(frozen=True, slots=True)
class Pass:
    """A named rewrite of a whole cascade."""

    name: str
    run: Callable[[Cascade], Cascade]


@dataclass(frozen=True, slots=True)
class Record:
    """One run of a pass: what it was given, what it made, and why."""

    name: str
    before: Cascade
    after: Cascade
    reason: str = ""

    @property
    def changed(self) -> bool:
        return self.before != self.after


def run_pipeline(c: Cascade, passes: Sequence[Pass]) -> tuple[Cascade, tuple[Record, ...]]:
    """Run passes in order; returns the last cascade and one record for each pass."""
    dump(c.name, 0, "input.cascade", str(c))
    records = []
    for number, step in enumerate(passes, 1):
        after = step.run(c)
        verify(after)
        records.append(Record(step.name, c, after))
        dump(c.name, number, f"{step.name}.cascade", str(after) if after != c else "(unchanged)\n")
        c = after
    return c, tuple(records)


def dump(cascade: str, number: int, stage: str, text: str) -> None:
    """With ``CASTILE_DUMP=dir``, write a stage of a cascade's way to the file ``dir/<cascade>.<number>.<stage>``."""
    folder = os.environ.get("CASTILE_DUMP")
    if not folder:
        return
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    (path / f"{cascade}.{number:02d}.{stage}").write_text(text, encoding="utf-8")
