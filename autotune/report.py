"""A report of what was measured: one HTML file that needs nothing else, with its charts drawn as SVG.

Whatever comes from records is escaped: names and mappings may be a stranger's.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from html import escape

from ..ir.device import Device
from .dataset import Judged
from .record import Record, foremost

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --dim: #6b7178; --line: #d7dbe0; --mark: #1f6feb; --bad: #c4452f; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8ea; --dim: #9aa1a9; --line: #3a4047; --mark: #6ea8ff; --bad: #ff8a70; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; }
h2 { font-size: 1.15rem; margin-top: 2.5rem; border-top: 1px solid var(--line); padding-top: 1rem; }
p.dim, text { color: var(--dim); fill: var(--dim); } code { font-size: .9em; overflow-wrap: anywhere; }
table { border-collapse: collapse; margin: .5rem 0; } td, th { text-align: left; padding: .2rem .8rem .2rem 0; }
th { font-weight: 600; color: var(--dim); } td.n { text-align: right; font-variant-numeric: tabular-nums; }
svg { width: 100%; height: auto; max-width: 46rem; display: block; } svg text { font: 12px system-ui, sans-serif; }
.axis { stroke: var(--line); } .best { stroke: var(--mark); fill: none; stroke-width: 2; }
.trial { fill: var(--mark); opacity: .45; } .failed { fill: var(--bad); } .bar { fill: var(--bad); opacity: .8; }
"""

_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 640, 280, 70, 28, 36

# The types whose products the roofline shows, where they differ.
_TYPES = ("f32", "bf16")

# A name, and points to be joined.
Line = tuple[str, list[tuple[float, float]]]


def html(
    records: Sequence[Record],
    title: str = "castile: what was tuned",
    judged: Sequence[Judged] = (),
    device: Device | None = None,
) -> str:
    """The whole page. ``judged`` are trials to set against the roofline of ``device``, on which they ran, and against
    the model."""
    groups: dict[tuple[str, ...], list[Record]] = {}
    for r in records:
        place = (r.name, r.target, r.device, json.dumps(dict(sorted(r.shapes.items()))), r.key)
        groups.setdefault(place, []).append(r)
    parts = _charts(judged, device) if judged else []
    parts += [_workload(group) for group in groups.values()]
    count = f"{len(records)} records of {len(groups)} workloads"
    body = "\n".join(parts) or "<p>Nothing is on record yet.</p>"
    return (
        f'<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8"><title>{escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{_STYLE}</style></head>\n'
        f'<body>\n<h1>{escape(title)}</h1>\n<p class="dim">{count}</p>\n{body}\n</body>\n</html>\n'
    )


def spelled(seconds: float | None) -> str:
    """A time as people read it."""
    if seconds is None:
        return "–"
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def _workload(group: list[Record]) -> str:
    r = group[0]
    sizes = " ".join(f"{k}={v}" for k, v in r.shapes.items())
    trials = [x for x in group if x.kind == "trial"]
    parts = [
        f"<section>\n<h2>{escape(r.name)} <code>{escape(sizes)}</code></h2>",
        f'<p class="dim">{escape(r.target)} on {escape(r.device)}</p>',
        _table(group),
    ]
    if any(x.time_s for x in trials):
        parts += ["<h3>Best so far</h3>", _progress(trials)]
    failures = Counter(x.status for x in trials if x.status != "ok")
    if failures:
        parts += ["<h3>Failures by kind</h3>", _bars(failures)]
    return "\n".join([*parts, "</section>"])


def _table(group: Iterable[Record]) -> str:
    good = [r for r in group if r.status == "ok" and r.time_s is not None]
    first = foremost(r for r in good if r.kind != "trial")
    rows = ([first] if first else []) + sorted(
        (r for r in good if r.kind == "trial"), key=lambda r: r.time_s or math.inf
    )[:8]
    lines = ["<table><tr><th></th><th>time</th><th>mapping</th></tr>"]
    for r in rows:
        kind = "winner" if r.kind == "final" else escape(r.kind)
        mapping = escape(str(r.mapping))
        lines.append(f'<tr><td>{kind}</td><td class="n">{spelled(r.time_s)}</td><td><code>{mapping}</code></td></tr>')
    return "\n".join([*lines, "</table>"])


def _progress(trials: Sequence[Record]) -> str:
    """Times of all trials against seconds since the first, with the best so far."""
    began = _seconds(trials[0])
    points = [(max(0.0, _seconds(r) - began), r.time_s) for r in trials]
    times = [t for _, t in points if t]
    low, high = math.log10(min(times)), math.log10(max(times))
    span, wide = max(high - low, 0.1), max(points[-1][0], 1.0)

    def x(seconds: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - 10) * min(1.0, seconds / wide)

    def y(time: float) -> float:
        return 10 + (_HEIGHT - _BOTTOM - 10) * (1 - (math.log10(time) - low) / span)

    floor = _HEIGHT - _BOTTOM
    marks, line, best = [], [], math.inf
    for seconds, time in points:
        if time is None:
            marks.append(f'<rect class="failed" x="{x(seconds) - 2:.1f}" y="{floor - 4}" width="4" height="4"/>')
            continue
        marks.append(f'<circle class="trial" cx="{x(seconds):.1f}" cy="{y(time):.1f}" r="3"/>')
        if time < best:
            line += [(x(seconds), y(best))] if best < math.inf else []
            best = time
            line.append((x(seconds), y(time)))
    line.append((x(wide), y(best)))
    path = " ".join(f"{a:.1f},{b:.1f}" for a, b in line)
    labels = [
        f'<text x="{_LEFT - 8}" y="{y(10**high) + 4:.1f}" text-anchor="end">{spelled(10**high)}</text>',
        f'<text x="{_LEFT - 8}" y="{y(10**low) + 4:.1f}" text-anchor="end">{spelled(10**low)}</text>',
        f'<text x="{_LEFT}" y="{_HEIGHT - 12}">0 s</text>',
        f'<text x="{_WIDTH - 10}" y="{_HEIGHT - 12}" text-anchor="end">{wide:.0f} s since the first trial</text>',
    ]
    axis = f'<path class="axis" d="M{_LEFT} 10V{floor}H{_WIDTH - 10}" fill="none"/>'
    shapes = "\n".join([axis, *marks, f'<polyline class="best" points="{path}"/>', *labels])
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="best time so far">\n{shapes}\n</svg>'


def _charts(judged: Sequence[Judged], device: Device | None) -> list[str]:
    """All trials against the roofline, where it is known, and measured against predicted times."""
    points = [
        (j.work / j.memory_bytes, j.work / j.record.time_s)
        for j in judged
        if j.work > 0 and j.memory_bytes > 0 and j.record.time_s
    ]
    parts = ["<section>"]
    if points and device is not None:
        low, high = min(x for x, _ in points) / 2, max(x for x, _ in points) * 2
        words = "operations for each byte of memory", "operations per second"
        parts.append("<h2>Against the roofline</h2>")
        parts.append(_scatter(points, _roofs(device, low, high), words, _rate, lambda x: f"{x:.3g}"))
        parts.append(
            f'<p class="dim">The lines are what {escape(device.name)} can do: at most so many products of a type, and '
            f"from each level of memory as many as its rate feeds. What fits a cache may lie above the line of the "
            f"memory beyond it.</p>"
        )
    pairs = [(j.predicted_s, j.record.time_s) for j in judged if j.predicted_s and j.record.time_s]
    if pairs:
        every = [t for pair in pairs for t in pair]
        same = [(min(every), min(every)), (max(every), max(every))]
        parts.append("<h2>Measured against predicted</h2>")
        parts.append(_scatter(pairs, [("", same)], ("predicted", "measured"), spelled, spelled))
    return ["\n".join([*parts, "</section>"])]


def _roofs(device: Device, low: float, high: float) -> list[Line]:
    """The rates of products of each type, and what the levels of memory let through, between two intensities."""
    peak = max(device.flops_of(dtype) for dtype in _TYPES)
    lines: list[Line] = []
    for dtype in _TYPES:
        if dtype == "f32" or device.flops_of(dtype) != device.flops_of("f32"):
            lines.append((dtype, [(high, device.flops_of(dtype)), (low, device.flops_of(dtype))]))
    for level in device.memory[1:]:
        ridge = peak / level.bytes_per_s
        if low < ridge:
            top = min(ridge, high)
            lines.append((level.name, [(low, low * level.bytes_per_s), (top, top * level.bytes_per_s)]))
    return lines


def _rate(per_s: float) -> str:
    """Operations per second as people read them."""
    unit, scale = next(((u, x) for u, x in (("T", 1e12), ("G", 1e9)) if per_s >= x), ("M", 1e6))
    return f"{per_s / scale:.3g} {unit}/s"


def _scatter(
    points: Sequence[tuple[float, float]],
    lines: Sequence[Line],
    words: tuple[str, str],
    spell_y: Callable[[float], str],
    spell_x: Callable[[float], str],
) -> str:
    """Points and lines on two logarithmic axes; a line's name stands where it begins."""
    every = [*points, *(p for _, line in lines for p in line)]
    xs, ys = ([math.log10(p[i]) for p in every] for i in (0, 1))
    floor, right = _HEIGHT - _BOTTOM, _WIDTH - 10

    def x(value: float) -> float:
        return _LEFT + (right - _LEFT) * (math.log10(value) - min(xs)) / max(max(xs) - min(xs), 0.1)

    def y(value: float) -> float:
        return _TOP + (floor - _TOP) * (1 - (math.log10(value) - min(ys)) / max(max(ys) - min(ys), 0.1))

    marks = [f'<circle class="trial" cx="{x(a):.1f}" cy="{y(b):.1f}" r="2.5"/>' for a, b in points]
    for name, line in lines:
        path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in line)
        marks.append(f'<polyline class="best" points="{path}"/>')
        if name:
            (a, b), (_, end) = line[0], line[-1]
            beside, anchor = (x(a) - 4, "end") if x(a) > (_LEFT + right) / 2 else (x(a) + 6, "start")
            under = y(b) + (12 if end > b else -4)  # a line that rises leaves its name room below
            marks.append(f'<text x="{beside:.1f}" y="{under:.1f}" text-anchor="{anchor}">{escape(name)}</text>')
    labels = [
        f'<text x="{_LEFT - 8}" y="{_TOP + 4}" text-anchor="end">{spell_y(10 ** max(ys))}</text>',
        f'<text x="{_LEFT - 8}" y="{floor}" text-anchor="end">{spell_y(10 ** min(ys))}</text>',
        f'<text x="{_LEFT}" y="{_HEIGHT - 12}">{spell_x(10 ** min(xs))}</text>',
        f'<text x="{right}" y="{_HEIGHT - 12}" text-anchor="end">{spell_x(10 ** max(xs))}</text>',
        f'<text x="{(_LEFT + _WIDTH) // 2}" y="{_HEIGHT - 12}" text-anchor="middle">{words[0]}</text>',
        f'<text x="{_LEFT}" y="10">{words[1]}</text>',
    ]
    axis = f'<path class="axis" d="M{_LEFT} {_TOP}V{floor}H{right}" fill="none"/>'
    shapes = "\n".join([axis, *marks, *labels])
    name = f"{words[1]} against {words[0]}"
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{name}">\n{shapes}\n</svg>'


def _seconds(r: Record) -> float:
    try:
        return datetime.fromisoformat(r.at.replace("Z", "+00:00")).timestamp()
    except ValueError:
        return 0.0


def _bars(counts: Counter[str]) -> str:
    most, rows = max(counts.values()), []
    for i, (kind, count) in enumerate(counts.most_common()):
        top, wide = 4 + 24 * i, 380 * count / most
        rows.append(f'<text x="120" y="{top + 13}" text-anchor="end">{escape(kind)}</text>')
        rows.append(f'<rect class="bar" x="130" y="{top}" width="{wide:.1f}" height="16"/>')
        rows.append(f'<text x="{138 + wide:.1f}" y="{top + 13}">{count}</text>')
    inner, high = "\n".join(rows), 8 + 24 * len(counts)
    return f'<svg viewBox="0 0 {_WIDTH} {high}" role="img" aria-label="failures by kind">\n{inner}\n</svg>'
