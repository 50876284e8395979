"""The text of an explanation: lines of styled spans, joined plainly or, on a terminal, in colour.

One layout serves both, so a pipe shows what a terminal shows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from textwrap import wrap
from typing import TYPE_CHECKING

from ..ir.print import print_cascade
from .explain import Explanation, written_axis
from .work import Poly

if TYPE_CHECKING:
    from rich.text import Text

# A stretch of text and the name of its style.
Span = tuple[str, str]
Line = list[Span]

WIDTH, CODE_WIDTH = 110, 124
PREFIXES = "kMGTPEZY"
STYLES = {
    "": "",
    "title": "bold",
    "head": "bold blue",
    "tensor": "bold cyan",
    "rank": "green",
    "dim": "dim",
    "good": "bold green",
    "bar": "bold yellow",
}


def plain(r: Explanation) -> str:
    """The text without colour."""
    return "\n".join("".join(text for text, _ in line).rstrip() for line in lines(r))


def styled(r: Explanation) -> Text:
    """The text for a Rich console, which leaves the colours out in a pipe."""
    from rich.text import Text

    result = Text(no_wrap=True, overflow="ignore")
    for number, line in enumerate(lines(r)):
        result.append("\n" if number else "")
        for text, style in line:
            result.append(text, STYLES[style])
    return result


def lines(r: Explanation) -> list[Line]:
    """Every line, section by section; sections without content are left out."""
    sections = (
        _header(r),
        _passes(r),
        _rewrites(r),
        _barriers(r),
        _states(r),
        _alternatives(r),
        _kernels(r),
        _ranks(r),
        _tensors(r),
        _einsums(r),
        _together(r),
    )
    result: list[Line] = []
    for section in sections:
        if section:
            result += [*([[]] if result else []), *section]
    return result


def _header(r: Explanation) -> list[Line]:
    c = r.cascade
    count = len(c.einsums)
    title: Line = [(c.name, "title"), (f"   {count} Einsum{'s' * (count > 1)}, numerics {c.numerics}", "dim")]
    code = [part for line in print_cascade(c).splitlines() for part in _folded(line)]
    return [title, [], *([("    " + line if line else "", "")] for line in code)]


def _folded(line: str) -> list[str]:
    """A line of code as it is, or in several where it is very long."""
    indent = " " * (len(line) - len(line.lstrip()))
    if len(line) <= CODE_WIDTH:
        return [line]
    return wrap(
        line.strip(),
        CODE_WIDTH,
        initial_indent=indent,
        subsequent_indent=indent + "    ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _passes(r: Explanation) -> list[Line]:
    if not r.passes:
        return [[("Passes", "head"), ("   no rank is reduced", "dim")]]
    as_written = all(before == after for before, after in r.passes.values())
    found: list[Line] = [[("Passes over each rank", "head"), (", as written" if as_written else "", "dim")]]
    counts = {k: str(a) if as_written else f"{a} → {b}" for k, (a, b) in r.passes.items()}
    wide, tall = _longest(r.passes), _longest(counts.values())
    for rank, (before, after) in r.passes.items():
        stages: list[list[str]] = [[] for _ in range(before)]
        for e in r.einsums:
            if 0 < e.passes.get(rank, 0) <= before:
                stages[e.passes[rank] - 1] += e.outputs
        head: Line = [
            ("    ", ""),
            (rank.ljust(wide), "rank"),
            ("   " + counts[rank].ljust(tall) + "   ", "good" if after < before else ""),
        ]
        words: list[list[Span]] = []
        for number, names in enumerate(stages):
            words += [[("│", "bar")]] if number else []
            words += [[(name, "tensor")] for name in names]
        found += _filled(head, words)
    if any(before > 1 for before, _ in r.passes.values()):
        note = "    What stands right of a bar waits until everything left of it has seen the whole rank."
        found.append([(note, "dim")])
    return found


def _ranks(r: Explanation) -> list[Line]:
    wide = _longest(k.name for k in r.ranks)
    sizes = {k.name: f"{r.extents[k.name]} = " if r.extents else "" for k in r.ranks}
    found: list[Line] = [[("Ranks", "head")]]
    for k in r.ranks:
        line: Line = [("    ", ""), (k.name.ljust(wide), "rank"), (f"   {sizes[k.name]}{k.extent}", "")]
        found.append([*line, ("   " + ", ".join(k.traversed), "dim")] if k.traversed else line)
    return found


def _tensors(r: Explanation) -> list[Line]:
    shapes = {t.name: "[" + ", ".join(map(written_axis, t.axes)) + "]" if t.axes else "scalar" for t in r.tensors}
    names, types = _longest(shapes), _longest(t.dtype for t in r.tensors)
    axes, roles = _longest(shapes.values()), _longest(t.role for t in r.tensors)
    found: list[Line] = [[("Tensors", "head")]]
    for t in r.tensors:
        shape = f"   {t.dtype.ljust(types)}  {shapes[t.name].ljust(axes)}   "
        found.append(
            [
                ("    ", ""),
                (t.name.ljust(names), "tensor"),
                (shape, ""),
                (t.role.ljust(roles) + "   ", "dim"),
                *_bytes(r, t.bytes),
            ]
        )
    return found


def _einsums(r: Explanation) -> list[Line]:
    found: list[Line] = [[("Einsums", "head"), (", each on its own", "dim")]]
    for e in r.einsums:
        space: list[Span] = [(", ".join(e.work.space), "rank")] if e.work.space else [("one value", "dim")]
        over = " over " if e.work.space else " "
        found.append([("    ", ""), (", ".join(e.outputs), "tensor"), (over, "dim"), *space, (f"   {e.does}", "")])
        found += _filled([("        operations  ", "dim")], _operations(r, e.work.operations))
        read, written = _bytes(r, e.work.bytes_read, "read"), _bytes(r, e.work.bytes_written, "written")
        found += _filled([("        memory      ", "dim")], [[*read, (",", "")], written])
    return found


def _together(r: Explanation) -> list[Line]:
    found: list[Line] = [[("Together", "head")]]
    found += _filled([("        operations  ", "dim")], _operations(r, r.operations))
    found += _filled([("        memory      ", "dim")], [_bytes(r, r.bytes_alone, "if each Einsum runs alone")])
    least = _bytes(r, r.bytes_least, "if inputs are read and results written once")
    found += _filled([("                    ", "dim")], [least])
    if r.extents:
        done = sum(r.value(p) or 0 for p in r.operations.values())
        alone, once = r.value(r.bytes_alone) or 1, r.value(r.bytes_least) or 1
        text = f"{done / alone:.3g} to {done / once:.3g} operations a byte"
        found.append([("        intensity   ", "dim"), (text, "")])
    return found


def _wrapped(first: Line, text: str, style: str) -> list[Line]:
    """A line that goes on, indented, where an expression is long."""
    indent = sum(len(part) for part, _ in first)
    lines = wrap(text, max(40, WIDTH - indent), drop_whitespace=False, break_long_words=False) or [""]
    found: list[Line] = [[*first, (lines[0].rstrip(), style)]]
    return found + [[(" " * indent, ""), (line.strip(), style)] for line in lines[1:]]


def _rewrites(r: Explanation) -> list[Line]:
    found: list[Line] = [[("Rewrites", "head")]]
    for number, step in enumerate(r.rewrites, 1):
        found += _wrapped([(f"    {number}. ", "dim"), (step.name, "title"), ("   ", "")], step.reason, "")
        for line in step.before.splitlines():
            found += _wrapped([("        before  ", "dim")], line, "")
        for line in step.after.splitlines():
            found += _wrapped([("        after   ", "dim")], line, "good")
    return found if r.rewrites else []


def _barriers(r: Explanation) -> list[Line]:
    found: list[Line] = [[("Barriers that stand", "head")]]
    for b in r.barriers:
        found += _wrapped([("    ", ""), (b.rank, "rank"), ("   ", "")], b.reason, "")
        found += _wrapped([("        because of  ", "dim")], b.expression, "bar")
        if b.integrand != b.expression:
            found += _wrapped([("        in          ", "dim")], b.integrand, "tensor")
    return found if r.barriers else []


def _states(r: Explanation) -> list[Line]:
    found: list[Line] = [[("Streamed states", "head")]]
    for s in r.states:
        gauge = f"   {s.gauge}" if s.gauge != "none" else ""
        found.append([("    ", ""), (s.reduction, "tensor"), (" over ", "dim"), (s.rank, "rank"), (gauge, "")])
        wide = _longest(s.components)
        for name, identity, combine in zip(s.components, s.identity, s.combine, strict=True):
            found += _wrapped(
                [("        ", ""), (name.ljust(wide), "tensor")], f"   from {identity}, then {combine}", ""
            )
        if s.correction:
            found += _wrapped([("        where  ", "dim")], s.correction, "")
    found.append([("    States of two pieces, a_ and b_, combine so; a single element is such a state too.", "dim")])
    return found if r.states else []


def _alternatives(r: Explanation) -> list[Line]:
    found: list[Line] = [[("Alternatives for the tuner", "head")]]
    for a in r.alternatives:
        counts = ", ".join(f"{rank} {count}" for rank, count in a.passes.items())
        found.append([("    ", ""), (a.name, "title"), (f"   {counts}   ", "rank"), (a.reason, "")])
    return found if r.alternatives else []


def _kernels(r: Explanation) -> list[Line]:
    found: list[Line] = [[("Kernels", "head")]]
    for k in r.kernels:
        streams = f", streams {k.streamed}" if k.streamed else ""
        over = f"   parallel over {', '.join(k.parallel)}{streams}" if k.parallel else streams.replace(", ", "   ")
        head: Line = [("    ", ""), (k.name, "title"), (over, "rank")]
        found += _wrapped([*head, ("   ", "")], k.reason, "") if k.reason else [head]
        found += _filled([("        Einsums  ", "dim")], [[(name, "tensor")] for name in k.einsums])
    return found if r.kernels else []


def _operations(r: Explanation, spent: Mapping[str, Poly]) -> list[list[Span]]:
    named = [(unit, p) for unit, p in spent.items() if p.terms]
    words = [_formula(r, p, unit) for unit, p in named] or [[("none", "dim")]]
    return [[*word, (",", "")] for word in words[:-1]] + words[-1:]


def _formula(r: Explanation, p: Poly, what: str) -> list[Span]:
    return [(str(p), ""), *_value(r, p, ""), (f" {what}", "dim")]


def _bytes(r: Explanation, p: Poly, what: str = "") -> list[Span]:
    return [(str(p), ""), *(_value(r, p, "B") or [(" bytes", "dim")]), (f" {what}".rstrip(), "dim")]


def _value(r: Explanation, p: Poly, unit: str) -> list[Span]:
    value = r.value(p)
    return [] if value is None else [(f" = {si(value, unit)}", "good")]


def si(value: float, unit: str = "") -> str:
    """A count with a decimal prefix: ``9999``, ``8.59 G``, ``33.55 MB``."""
    if abs(value) < 10_000:
        return f"{value:.4g} {unit}".rstrip()
    power = min((len(str(int(abs(value)))) - 1) // 3, len(PREFIXES))
    return f"{value / 1000**power:.4g} {PREFIXES[power - 1]}{unit}"


def _longest(words: Iterable[str]) -> int:
    return max(map(len, words), default=0)


def _filled(head: Sequence[Span], words: Sequence[Sequence[Span]]) -> list[Line]:
    """Words one after another below a head, in as many lines as they need; a word is never cut."""
    indent = sum(len(text) for text, _ in head)
    found: list[Line] = [list(head)]
    used = indent
    for word in words:
        length = sum(len(text) for text, _ in word)
        if used > indent and used + 1 + length > WIDTH:
            found.append([(" " * indent, "")])
            used = indent
        if used > indent:
            found[-1].append((" ", ""))
        found[-1] += word
        used += length + 1
    return found
