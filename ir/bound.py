"""The error that a correct kernel may have: the one tolerance of tests and tuner.

A kernel is right if every output lies within `error_bound` of the oracle. The bound follows the data, so cancellation
is judged fairly and nothing hides behind a loose constant.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .cascade import Cascade
from .evaluate import evaluate_values
from .extents import resolve
from .samples import random_inputs
from .scalar import Array


@dataclass(frozen=True, slots=True)
class Judgement:
    """How one output compares with the oracle: ``worst`` is the greatest error as a multiple of its bound."""

    output: str
    ok: bool
    worst: float
    where: tuple[int, ...]
    got: float
    want: float
    bound: float

    def __str__(self) -> str:
        place = f"{self.output}[{', '.join(map(str, self.where))}]"
        verdict = "within" if self.ok else "outside"
        values = f"{place} = {self.got:.9g}, oracle {self.want:.9g}"
        return f"{values}: {verdict} the bound {self.bound:.3g} ({self.worst:.2g} of it)"


def error_bound(
    c: Cascade, inputs: Mapping[str, Any], at: Any = None, *, numerics: str | None = None
) -> dict[str, Array]:
    """The absolute error, element by element, that a correct kernel may have on these inputs.

    Arguments as `evaluate`; ``numerics`` overrides the cascade's own. 0 where the result must be exact, as for NaN and
    infinities; infinite where the compute type overflows or a discontinuity lies within the error of its argument.
    """
    return {
        name: value.slack() for name, value in evaluate_values(c, inputs, at, track=True, numerics=numerics).items()
    }


def judge(
    c: Cascade, inputs: Mapping[str, Any], got: Mapping[str, Any], at: Any = None, *, numerics: str | None = None
) -> tuple[Judgement, ...]:
    """Compare results with the oracle, one `Judgement` for each output. NaN matches NaN, an infinity itself."""
    return compare(reference(c, inputs, at, numerics=numerics), got)


def reference(
    c: Cascade, inputs: Mapping[str, Any], at: Any = None, *, numerics: str | None = None
) -> dict[str, tuple[Array, Array]]:
    """For each output what the oracle says and the bound around it: for `compare`, where many results are judged."""
    wanted = evaluate_values(c, inputs, at, track=True, numerics=numerics)
    return {name: (value.array, value.slack()) for name, value in wanted.items()}


def compare(wanted: Mapping[str, tuple[Array, Array]], got: Mapping[str, Any]) -> tuple[Judgement, ...]:
    """As `judge`, against a `reference` made before."""
    return tuple(_judge(name, want, bound, np.asarray(got[name])) for name, (want, bound) in wanted.items())


def _judge(name: str, want: Array, bound: Array, got: Array) -> Judgement:
    want, got = want.astype(np.float64), got.astype(np.float64)
    if got.shape != want.shape:
        return Judgement(name, False, float("inf"), (), float("nan"), float("nan"), 0.0)
    if want.size == 0:
        return Judgement(name, True, 0.0, (), 0.0, 0.0, 0.0)
    bound = np.broadcast_to(bound, want.shape)
    with np.errstate(all="ignore"):
        off = np.abs(got - want)
        same = (got == want) | (np.isnan(got) & np.isnan(want)) | np.isinf(bound)
        ratio = np.where(same, 0.0, np.where(np.isnan(off), np.inf, off / bound))
    where = np.unravel_index(int(np.argmax(ratio)), want.shape)
    worst = float(ratio[where])
    place = tuple(int(i) for i in where)
    return Judgement(name, worst <= 1.0, worst, place, float(got[where]), float(want[where]), float(bound[where]))


def relative_error(c: Cascade, extents: Mapping[str, int], *, seed: int = 0, samples: int = 32) -> dict[str, float]:
    """The error that a correct kernel may have at these extents, relative to the largest output: for ordinary inputs.

    Found for `random_inputs` at a sample of outputs, so it is an estimate where `error_bound` is the rule.
    """
    rng = np.random.default_rng(seed)
    sizes = resolve(c, extents)
    inputs = random_inputs(c, sizes, seed)
    ranks = {r for name in c.outputs for e in c.einsums for o in e.outputs if o.name == name for r in o.ranks}
    if any(sizes[r] == 0 for r in ranks):
        return dict.fromkeys(c.outputs, 0.0)
    at = {r: rng.integers(0, sizes[r], samples) for r in ranks}
    found = evaluate_values(c, inputs, at, track=True)
    result = {}
    for name, value in found.items():
        scale = float(np.max(np.abs(value.array), initial=0.0)) or 1.0
        result[name] = float(np.max(value.slack(), initial=0.0)) / scale
    return result
