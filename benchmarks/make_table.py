"""A brute-forced table of castile's own CPU kernels, made in slices that resume where the last one ended.

    python benchmarks/make_table.py plan
    python benchmarks/make_table.py compile --seconds 200     # again, until nothing is left; beside other work
    python benchmarks/make_table.py check --seconds 200       # each kernel against the oracle; beside other work
    python benchmarks/make_table.py measure --seconds 110     # alone on the machine
    python benchmarks/make_table.py export costmodel/data

A workload is a cascade at some extents. Its mappings are drawn from the space that `castile tune` searches: the
default, what differs from it in one choice, and random ones. Mappings that print the same source count once; a source
that serves several extents is compiled once. All mappings of a workload are timed in turn, round after round in an
order that changes, so that what the machine does meanwhile meets all alike.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import subprocess
import tempfile
import time
from pathlib import Path
from statistics import median

for _name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

import numpy as np  # noqa: E402

from castile.autotune.measure import Limits, Measurer  # noqa: E402
from castile.autotune.probe import describe_cpu  # noqa: E402
from castile.autotune.space import space_of  # noqa: E402
from castile.benchmarks._table import ROOT, WORKLOADS, Entry, State, Workload, cascade, draw, printed  # noqa: E402
from castile.benchmarks._table_build import built_alone, compile_all, precompiled  # noqa: E402
from castile.benchmarks._table_export import HOPELESS, HOPELESS_ROUNDS, ROUNDS, apart, export  # noqa: E402
from castile.codegen import build  # noqa: E402
from castile.codegen.compiler import find_compiler, key_of  # noqa: E402
from castile.codegen.cpp import standalone  # noqa: E402
from castile.ir.mapping import Mapping as Tuned  # noqa: E402

# Mappings of a workload.
MAPPINGS = 208

# Seconds that the rounds of samples may take for one workload.
ROUNDS_S = 25.0

# A workload is not believed where a tenth of its mappings have halves of their samples further apart than this.
STEADY = 0.25


def plan(state: State, count: int) -> None:
    """Draw the mappings of every workload that has none yet."""
    known = {w.key for w in state.workloads()}
    device = describe_cpu()
    for place, (name, shapes) in enumerate(WORKLOADS.items()):
        chosen: dict[str, Tuned] = {}  # a mapping that serves several extents is taken for all of them
        for turn, extents in enumerate(shapes):
            drawn = draw(name, extents, space_of(cascade(name), extents, "cpu", device), count, chosen)
            w = Workload(name, extents, tuple(drawn))
            if w.key not in known:
                entries = [[e.mapping.to_dict(), e.source] for e in drawn]
                state.append("plan", {"place": [turn, place], "name": name, "shapes": extents, "entries": entries})
            print(f"{w.key}: {len(drawn)} mappings", flush=True)


def _measurer(w: Workload, threads: int | None) -> Measurer:
    return Measurer(cascade(w.name), w.shapes, "cpu", 0, Limits(run_s=60.0), threads=threads)


def check_all(state: State, seconds: float) -> int:
    """Check every built kernel against the oracle for some seconds; how many are left."""
    end, left = time.monotonic() + seconds, 0
    built = {row["source"]: row["failed"] for row in state.rows("built")}
    checked = {(row["key"], row["source"]) for row in state.rows("checked")}
    for w in state.workloads():
        todo = [e for e in w.entries if e.source in built and (w.key, e.source) not in checked]
        if not todo:
            continue
        if time.monotonic() > end:
            left += len(todo)
            continue
        os.environ["CASTILE_CACHE_DIR"] = str(state.cache(w.name))
        with _measurer(w, 1) as bench:
            for e in todo:
                if time.monotonic() > end:
                    left += 1
                    continue
                began = time.monotonic()
                if built[e.source]:
                    status, detail = "compile_error", "the compiler refuses it"
                else:
                    outcome = bench.check(e.mapping)
                    status, detail = outcome.status, outcome.detail[:300]
                took = round(time.monotonic() - began, 4)
                state.append(
                    "checked",
                    {"key": w.key, "source": e.source, "status": status, "detail": detail, "seconds": took},
                )
    print(f"{left} left to check")
    return left


def measure_all(state: State, seconds: float) -> int:
    """Time workloads whose mappings are all checked, for some seconds; how many workloads are left."""
    end, left = time.monotonic() + seconds, 0
    checks = {(row["key"], row["source"]): row for row in state.rows("checked")}
    measured = {row["key"] for row in state.rows("measured")}
    for w in state.workloads():
        if w.key in measured or any((w.key, e.source) not in checks for e in w.entries):
            left += w.key not in measured
            continue
        if time.monotonic() + 12 > end:
            left += 1
            continue
        good = [e for e in w.entries if checks[w.key, e.source]["status"] == "ok"]
        os.environ["CASTILE_CACHE_DIR"] = str(state.cache(w.name))
        began = time.monotonic()
        with _measurer(w, None) as bench:
            times = _timed(bench, w, good, min(ROUNDS_S, end - began))
        if times is None:
            print(f"{w.key}: the worker died")
            continue
        noise = float(np.quantile(apart(times.values()), 0.9))
        if noise > STEADY:
            print(f"{w.key}: disturbed, {noise:.0%} between halves of the samples; it is measured again")
            left += 1
            continue
        row = {
            "key": w.key,
            "times": {s: [float(f"{t:.5g}") for t in samples] for s, samples in times.items()},
            "at": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - began, 2),
            "versions": _versions(),
        }
        state.append("measured", row)
        best = min(times, key=lambda s: median(times[s]))
        usual = median(times[w.entries[0].source])
        print(
            f"{w.key}: {len(times)} timed in {row['seconds']} s; best {median(times[best]) * 1e6:.0f} us, "
            f"default {usual / median(times[best]):.3f}x that",
            flush=True,
        )
    print(f"{left} workloads left to measure")
    return left


def compare(state: State, names: list[str], count: int) -> None:
    """Time kernels that were compiled in packs beside the same compiled alone, in turn."""
    from castile.autotune.worker import Workload as Timed
    from castile.autotune.worker import built, calls, once

    compiler = find_compiler()
    done = {row["source"] for row in state.rows("built")}
    for w in [w for w in state.workloads() if w.name in names]:
        entries = [e for e in w.entries if e.source in done][:count]
        timed = Timed(cascade(w.name), w.shapes, "cpu", built, 0)
        outputs, pairs = timed.outputs(trap=False), []
        with tempfile.TemporaryDirectory() as folder:
            place, alone = precompiled(compiler, Path(folder)), Path(folder) / "alone"
            alone.mkdir(mode=0o700)
            for e in entries:
                source = printed(w.name, e.mapping, w.shapes)
                library = built_alone(compiler, place, source)
                if library is None:
                    continue
                build._keep(alone, key_of(standalone(source), compiler), library)
                kernels = []
                for cached in (state.cache(w.name), alone):
                    os.environ["CASTILE_CACHE_DIR"] = str(cached)
                    kernels.append(built(cascade(w.name), e.mapping, w.shapes, "cpu"))
                pairs.append(kernels)
        ratios = []
        for kernels in pairs:
            counts = [calls(timed, k, outputs) for k in kernels]
            rounds = [[once(timed, k, outputs, n) for k, n in zip(kernels, counts, strict=True)] for _ in range(15)]
            ratios.append(median(a for a, _ in rounds) / median(b for _, b in rounds))
        if ratios:
            low, middle, high = np.quantile(ratios, [0.1, 0.5, 0.9])
            print(
                f"{w.key}: packed over alone, {len(ratios)} kernels: {middle:.3f} (10 to 90%: {low:.3f} to {high:.3f})"
            )


def _timed(bench: Measurer, w: Workload, entries: list[Entry], seconds: float) -> dict[str, tuple[float, ...]] | None:
    """Samples of each source: two rounds of all, then more of those that are not far behind."""
    first = bench.compete([e.mapping for e in entries], seconds, 2)
    if first is None:
        return None
    found = {e.source: t for e, t in zip(entries, first, strict=True)}
    fastest = min(min(t) for t in first)
    near = [e for e in entries if min(found[e.source]) < HOPELESS * fastest]
    far = [e for e in entries if min(found[e.source]) >= HOPELESS * fastest]
    for group, rounds in ((near, ROUNDS), (far, HOPELESS_ROUNDS - 2)):
        more = bench.compete([e.mapping for e in group], seconds, rounds) if group else []
        if more is None:
            return None
        for e, t in zip(group, more, strict=True):
            # The first rounds met cold pages; where there are enough others, they are left out.
            found[e.source] = t if len(t) >= 5 else (*found[e.source], *t)
    return found


def _versions() -> dict[str, str]:
    from castile.autotune.tuner import versions

    done = subprocess.run(["c++", "--version"], capture_output=True, text=True, check=False)
    commit = os.environ.get("CASTILE_COMMIT", "")
    return {**versions(), "compiler": done.stdout.split("\n")[0][:120], "commit": commit, "system": platform.system()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("step", choices=("plan", "compile", "check", "measure", "export", "compare"))
    parser.add_argument("folder", nargs="?", type=Path, help="where export writes")
    parser.add_argument("--state", type=Path, default=ROOT / "build" / "table")
    parser.add_argument("--seconds", type=float, default=110.0, help="how long a slice may take, about")
    parser.add_argument("--only", default="gemm,attention", help="cascades to compare")
    parser.add_argument("--mappings", type=int, default=MAPPINGS)
    given = parser.parse_args()
    state = State(given.state)
    if given.step == "plan":
        plan(state, given.mappings)
    elif given.step == "compile":
        compile_all(state, given.seconds)
    elif given.step == "check":
        check_all(state, given.seconds)
    elif given.step == "export":
        export(state, given.folder or ROOT / "costmodel" / "data")
    elif given.step == "compare":
        compare(state, given.only.split(","), 16)
    elif given.step == "measure":
        measure_all(state, given.seconds)


if __name__ == "__main__":
    main()
