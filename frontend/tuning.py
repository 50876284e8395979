"""`tune="quick"` and `"full"`: a graph's kernels tuned for a time before they are built, and kept on record."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from time import monotonic

from .. import driver
from ..ir.cascade import Cascade
from ..ir.errors import CastileError
from .partition import Region
from .region import RegionCall

# Seconds for all kernels of a graph, and the least that is of use to one.
BUDGET_S: Mapping[str, float] = {"quick": 20.0, "full": 240.0}
LEAST_S = 4.0


def tune_calls(calls: Sequence[tuple[Region, RegionCall]], target: str, how: str) -> None:
    """Tune the kernels of a graph for `BUDGET_S` in all, dearest first; those on record are left as they are.

    What cannot be tuned keeps its default; one warning says which and why.
    """
    if how not in BUDGET_S:
        return
    costs: dict[tuple[Cascade, tuple[tuple[str, int], ...]], float] = {}
    for region, call in calls:
        key = call.kernel.cascade, tuple(call.lowered.hints.items())
        costs[key] = costs.get(key, 0.0) + region.castile_us
    todo = [k for k in sorted(costs, key=lambda k: -costs[k]) if not driver.is_tuned(k[0], dict(k[1]), target)]
    end = monotonic() + BUDGET_S[how]
    failed: dict[str, str] = {}
    for done, (cascade, extents) in enumerate(todo):
        left = end - monotonic()
        if left < LEAST_S:
            break
        try:
            driver.tune(cascade, dict(extents), target, max(LEAST_S, left / (len(todo) - done)))
        except (CastileError, ImportError, OSError) as error:
            failed.setdefault(str(error).splitlines()[0], cascade.name)
    for why, name in failed.items():
        warnings.warn(f"castile: `{name}` and what fails alike are not tuned: {why}", RuntimeWarning, stacklevel=2)
