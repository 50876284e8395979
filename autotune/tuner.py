"""Tuning: the fastest mapping of a cascade at some extents on this machine, right by the oracle, within a budget.

The space is searched, each trial recorded as it ends, trials of earlier sessions taken up. At last the best meet the
default in a comparison of interleaved rounds, and only what is faster beyond doubt takes its place.
"""

from __future__ import annotations

import math
import os
import platform
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from time import monotonic
from typing import Any

import numpy as np

from ..codegen import targets
from ..codegen.compiler import find_compiler
from ..costmodel.model import CostModel
from ..costmodel.shipped import shipped_model
from ..ir.cascade import Cascade
from ..ir.errors import CastileError, UsageError
from ..ir.extents import resolve
from ..ir.key import content_key
from ..ir.machine import cores
from ..ir.mapping import Mapping as Tuned
from ..passes.inbounds import check_reads
from .dataset import row_of
from .measure import ROUNDS, Limits, Measurer, Outcome
from .places import model_path
from .probe import describe_cpu, device_name
from .record import Record
from .records import Records
from .search import Search
from .space import Space, space_of

# The share of a budget that is left at most for the final comparison, how many candidates enter it beside the default,
# and the seconds of a round for each of them at least.
FINAL, FINALISTS, SAMPLE_S = 0.2, 4, 3e-4

# How many of the cost model's first choices are measured first, and the share of the budget spent on choosing them.
FAVOURED, SCORED_SHARE = 4, 0.05

# A candidate is no longer timed once its first samples are slower than the best by this factor.
HOPELESS = 1.5

# What a winner must be sure of: the share of resampled medians in which it beats the default.
CERTAINTY = 0.975


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a search is: ``best_s`` and ``default_s`` in seconds, None before they are known; ``error`` is by what
    factor less one the surrogate's forecasts were off lately, the median."""

    trials: int
    space: int
    best_s: float | None
    default_s: float | None
    error: float | None
    left_s: float
    last: Record | None
    stage: str = "search"


@dataclass(frozen=True, slots=True)
class TuneResult:
    """What tuning found: ``best`` is the winner's record, ``records`` all trials of the session, ``ratio`` the
    winner's time over the default's, with an interval of 95%; ``kernel`` is the winner compiled."""

    best: Record
    default: Record | None
    records: tuple[Record, ...]
    ratio: float = 1.0
    interval: tuple[float, float] = (1.0, 1.0)
    space: int = 0
    seconds: float = 0.0
    recorded_in: str = ""
    kernel: Any = None


def tune(
    c: Cascade,
    shapes: Mapping[str, int],
    target: str = "cpu",
    budget_s: float = 60.0,
    trials: int | None = None,
    seed: int = 0,
    *,
    path: str | Path | None = None,
    progress: Callable[[Progress], None] = lambda _: None,
    measurer: Measurer | None = None,
) -> TuneResult:
    """Search the mappings of a cascade for ``budget_s`` seconds or ``trials`` trials, whichever ends first.

    Trials go to the records at ``path`` (the user's, if None) as they end. Raises `UsageError` where no candidate
    runs or nothing can be compiled, `InputError` for shapes that do not fit, `EvaluationError` for reads outside their
    tensor.
    """
    began = monotonic()
    if target != "cpu":
        target = targets.named(target)
        offline = "castile tune --offline compiles for it all the same, and ranks what fits"
        hint = offline if target != "interpret" else ""
        raise UsageError(f"`{target}` cannot be measured here", expected="cpu", got=target, hint=hint)
    if not budget_s > 0:
        raise UsageError("a budget is a time above 0", expected="seconds", got=repr(budget_s))
    if measurer is None:
        find_compiler()
    extents = resolve(c, shapes)
    check_reads(c, extents)
    device = describe_cpu()
    space = space_of(c, extents, target, device)
    builders = min(8, cores())
    limits = Limits(run_s=max(2.0, min(20.0, budget_s / 3)))
    with (
        Records(path) as records,
        measurer or Measurer(c, extents, target, seed, limits, builders=builders) as bench,
    ):
        session = _Session(c, extents, target, seed, space, records, bench, began + budget_s, trials, progress)
        session.take_up()
        session.search()
        result = session.conclude()
    return replace(result, seconds=monotonic() - began, recorded_in=str(records.path))


@dataclass(slots=True)
class _Session:
    cascade: Cascade
    extents: Mapping[str, int]
    target: str
    seed: int
    space: Space
    records: Records
    bench: Measurer
    end: float
    trials: int | None
    progress: Callable[[Progress], None]
    name: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    done: list[Record] = field(default_factory=list)
    mappings: list[Tuned] = field(default_factory=list)
    outcomes: dict[int, float] = field(default_factory=dict)
    sources: dict[str, float | None] = field(default_factory=dict)
    searcher: Search = field(init=False)

    def __post_init__(self) -> None:
        combinations = self.space.combinations(self.seed)
        self.mappings = [self.space.mapping(*one) for one in combinations]
        first = [0, *promising(self.cascade, self.mappings, self.extents, SCORED_SHARE * self.left)]
        self.searcher = Search(self.space.points(combinations), self.seed, first=first)

    @property
    def left(self) -> float:
        return self.end - monotonic()

    def take_up(self) -> None:
        """Tell the search what earlier sessions measured here. A default that failed is tried again: what killed it
        may be gone, and without it nothing is known to be faster."""
        places = {m: i for i, m in enumerate(self.mappings)}
        known = self.records.all(key=content_key(self.cascade), target=self.target, device=device_name(self.target))
        for r in known:
            place = places.get(r.mapping)
            if place is None or r.cascade != str(self.cascade) or dict(r.shapes) != dict(self.extents):
                continue
            if r.versions != versions():
                continue  # another castile or compiler makes another kernel
            time = Outcome(r.status, times=r.times).quiet_s
            if place == 0 and time is None:
                continue
            self.outcomes[place] = time if time is not None else math.inf
            self.searcher.tell(place, time)

    def search(self) -> None:
        """Measure what the search asks for, until the time or the trials are spent."""
        most = FINAL * self.left
        width = max(1, self.bench.builders)
        self._report(None)
        while self.left > self._reserved(most) and (self.trials is None or len(self.done) < self.trials):
            count = width if self.trials is None else min(width, self.trials - len(self.done))
            asked = self.searcher.ask(count)
            if not asked:
                return
            built = self.bench.compile([self.mappings[i] for i in asked], max(1.0, self.left))
            for i, outcome in zip(asked, built, strict=True):
                spent = self.left <= 0.5
                if spent and (outcome.status == "compile_timeout" or len(self.done) > 0):
                    return  # the budget ended it, not the candidate
                source = outcome.told.get("source", "")
                if source in self.sources:  # another spelling of what was measured
                    self.searcher.tell(i, self.sources[source])
                    continue
                if outcome.status == "ok":
                    outcome = self._measured(self.mappings[i])
                    if outcome is None:
                        return
                self._tell(i, outcome)
                if source:
                    self.sources[source] = outcome.quiet_s

    def _reserved(self, most: float) -> float:
        """Seconds to leave for the final comparison: kernels that are quick need few."""
        best = min((t for t in self.outcomes.values()), default=math.inf)
        return max(1.0, min(most, 1.0 + 2 * ROUNDS * (FINALISTS + 1) * max(SAMPLE_S, best)))

    def _measured(self, mapping: Tuned) -> Any:
        best = min((t for t in self.outcomes.values()), default=math.inf)
        # The first candidate may take its time: without it there is nothing to tell.
        limit = max(0.5, self.left) if self.done else self.bench.limits.run_s
        outcome = self.bench.measure(mapping, HOPELESS * best, seconds=limit)
        cut_short = outcome.status == "hang" and limit < self.bench.limits.run_s
        return None if cut_short else outcome

    def _tell(self, place: int, outcome: Outcome) -> None:
        record = self._record(self.mappings[place], outcome, "trial")
        self.records.add([record])
        self.done.append(record)
        self.outcomes[place] = outcome.quiet_s if outcome.quiet_s is not None else math.inf
        self.searcher.tell(place, outcome.quiet_s)
        self._report(record)

    def _record(self, mapping: Tuned, outcome: Outcome, kind: str) -> Record:
        return Record(
            cascade=str(self.cascade),
            target=self.target,
            device=device_name(self.target),
            shapes=dict(self.extents),
            mapping=mapping,
            status=outcome.status,
            detail=outcome.detail,
            time_s=outcome.time_s,
            times=outcome.times,
            kind=kind,
            session=self.name,
            seed=self.seed,
            versions=versions(),
            uid=uuid.uuid4().hex,
        )

    def _report(self, last: Record | None, stage: str = "search") -> None:
        good = [t for t in self.outcomes.values() if math.isfinite(t)]
        pairs = [
            (self.searcher.forecasts[i], t)
            for i, t in self.outcomes.items()
            if i in self.searcher.forecasts and math.isfinite(t)
        ]
        error = median(max(a / b, b / a) - 1 for a, b in pairs[-12:]) if pairs else None
        default = self.outcomes.get(0)
        self.progress(
            Progress(
                len(self.done),
                len(self.mappings),
                min(good, default=None),
                default if default is not None and math.isfinite(default) else None,
                error,
                max(0.0, self.left),
                last,
                stage,
            )
        )

    def conclude(self) -> TuneResult:
        """The final comparison, and its winner."""
        good = sorted((t, i) for i, t in self.outcomes.items() if math.isfinite(t))
        if not good:
            kinds = sorted({r.status for r in self.done})
            raise UsageError(
                f"no mapping of `{self.cascade.name}` ran within the budget",
                hint="give it more time: --budget 120s" if not kinds else "castile records show tells of each failure",
                got=", ".join(kinds) or "nothing was measured",
            )
        places = [i for _, i in good[:FINALISTS]]
        if 0 in self.outcomes and math.isfinite(self.outcomes[0]) and 0 not in places:
            places.append(0)
        self._report(None, "final")
        # What an earlier session measured may have to be compiled again.
        built = self.bench.compile([self.mappings[i] for i in places], max(1.0, self.left - 1.0))
        places = [i for i, outcome in zip(places, built, strict=True) if outcome.status == "ok"] or places[:1]
        times = self.bench.compete([self.mappings[i] for i in places], max(0.5, self.left - 0.5))
        if times is None:  # something died only now: what is left is the order of the search
            times = [(self.outcomes[i],) for i in places]
        chosen, ratio, interval = verdict(times, places.index(0) if 0 in places else None)
        found = Outcome("ok", "", times[chosen])
        best = self._record(self.mappings[places[chosen]], found, "final")
        self.records.add([best])
        default = None
        if 0 in places:
            default = self._record(self.mappings[0], Outcome("ok", "", times[places.index(0)]), "trial")
        return TuneResult(best, default, (*self.done, best), ratio, interval, len(self.mappings))


def verdict(times: Sequence[Sequence[float]], default: int | None) -> tuple[int, float, tuple[float, float]]:
    """The winner of a comparison, its time over the default's, and the interval of 95% around that.

    ``times`` holds one sequence for each candidate, sampled in turn. A candidate wins over the default if the median
    of their ratios, round by round, is below 1 in nearly all of the resampled ones.
    """
    middles = [median(t) for t in times]
    if default is None:
        return min(range(len(times)), key=middles.__getitem__), 1.0, (1.0, 1.0)
    rng = np.random.default_rng(0)
    base = np.asarray(times[default])
    best = (default, 1.0, (1.0, 1.0))
    for i, t in enumerate(times):
        if i == default:
            continue
        ratios = np.asarray(t) / base
        drawn = np.median(rng.choice(ratios, (1000, len(ratios))), axis=1)
        low, high = (float(x) for x in np.quantile(drawn, [1 - CERTAINTY, CERTAINTY]))
        ratio = float(np.median(ratios))
        if high < 1.0 and ratio < best[1]:
            best = (i, ratio, (low, high))
    return best


def promising(c: Cascade, mappings: Sequence[Tuned], extents: Mapping[str, int], seconds: float) -> list[int]:
    """The mappings that the cost model likes best among as many as it can judge in some seconds.

    None without a model. The search goes on from measurements alone, so a model that is wrong costs these few trials.
    """
    model = leader()
    if model is None:
        return []
    end, device = monotonic() + seconds, describe_cpu()
    places, rows, rooflines = [], [], []
    for i in np.random.default_rng(0).permutation(len(mappings)):
        if monotonic() > end:
            break
        with suppress(CastileError):
            row, roofline = row_of(c, mappings[i], extents, device)
            places.append(int(i))
            rows.append(row)
            rooflines.append(roofline)
    if not rows:
        return []
    order = model.order(np.array(rows), np.array(rooflines))
    return [places[i] for i in np.argsort(order, kind="stable")[:FAVOURED]]


def leader() -> CostModel | None:
    """The user's cost model, else the one that came with castile; None, and a warning, where neither can be used."""
    try:
        if os.path.isfile(model_path() / "model.json"):
            return CostModel.load(model_path())
        return shipped_model()
    except CastileError as error:
        said = str(error).splitlines()[0]
        warnings.warn(f"castile: the cost model is not used: {said}", RuntimeWarning, stacklevel=2)
        return None


def versions() -> dict[str, str]:
    """What made a kernel: castile, Python, NumPy and the compiler."""
    try:
        own = version("castile")
    except PackageNotFoundError:
        own = "unknown"
    try:
        compiler = find_compiler().identity.split("\n")[0][:120]
    except UsageError:
        compiler = "none"
    return {"castile": own, "python": platform.python_version(), "numpy": np.__version__, "compiler": compiler}
