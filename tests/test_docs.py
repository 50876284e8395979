"""The documents are true: their cascades parse, their errors are the ones shown, their tables and sessions hold."""

from __future__ import annotations

import ast
import contextlib
import doctest
import io
import math
import os
import re
import runpy
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import castile
from castile.cli.main import app
from castile.codegen.triton_process import LIMIT
from castile.ir.types import tensor_types
from castile.passes.draw import to_svg

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "examples" / "cascades" / "README.md"]
NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, the line on which it begins, and the block after it, if it follows."""

    kind: str
    text: str
    line: int
    next: str = ""


# A block below a mark is what castile prints; tests/test_golden_kernels.py compares it.
PRINTED = re.compile(r"^<!-- \w+: [^\n]* -->\n```\w*\n.*?^```$", re.M | re.S)


def blocks(text: str) -> list[Block]:
    text = PRINTED.sub(lambda match: "\n" * match[0].count("\n"), text)
    found = []
    for match in re.finditer(r"^```(\w*)\n(.*?)^```\n(?:\n```text\n(.*?)^```)?", text, re.M | re.S):
        line = text.count("\n", 0, match.start()) + 2
        found.append(Block(match[1], match[2], line, match[3] or ""))
    return found


def every(kind: str) -> list[Any]:
    return [
        pytest.param(block, id=f"{name}:{block.line}")
        for name, path in zip(NAMES, DOCUMENTS, strict=True)
        for block in blocks(path.read_text(encoding="utf-8"))
        if block.kind == kind
    ]


@pytest.mark.parametrize("name", NAMES)
def test_every_block_is_of_a_kind_that_is_tested(name: str) -> None:
    known = {"python", "pycon", "text", "console", ""}  # without a name: shown, not claimed
    assert {block.kind for block in blocks((ROOT / name).read_text(encoding="utf-8"))} <= known


@pytest.mark.parametrize("block", every("python"))
def test_python(block: Block, tmp_path: Path) -> None:
    """A script runs; a cascade parses, and prints and parses back, or fails with the error shown below it."""
    if re.search(r"^(import|from) ", block.text, re.M):
        script = tmp_path / "script.py"
        script.write_text(block.text, encoding="utf-8")
        with contextlib.redirect_stdout(io.StringIO()) as shown:
            runpy.run_path(str(script))
        if block.next:
            assert shown.getvalue() == block.next
    elif block.next.startswith("<cascade>:"):
        with pytest.raises(castile.CastileError) as caught:
            castile.parse(block.text)
        assert str(caught.value) + "\n" == block.next
    else:
        c = castile.parse(block.text)
        assert castile.parse(str(c)) == c
        castile.explain(c)


@pytest.mark.parametrize("name", NAMES)
def test_sessions(name: str) -> None:
    """The sessions of a document, one after another in one namespace."""
    text = (ROOT / name).read_text(encoding="utf-8")
    session = "\n".join(block.text for block in blocks(text) if block.kind == "pycon")
    test = doctest.DocTestParser().get_doctest(session, {}, name, name, 0)
    report: list[str] = []
    doctest.DocTestRunner().run(test, out=report.append)
    assert not report, "".join(report)


def table_rows() -> list[Any]:
    text = (ROOT / "docs" / "language.md").read_text(encoding="utf-8")
    found = []
    for table in re.findall(r"^\| expression \| value \| dtype \|\n\|[-|]+\n((?:\|.*\n)+)", text, re.M):
        for row in table.splitlines():
            expression, value, dtype = (cell.strip().strip("`") for cell in row.strip("|").split(" | "))
            found.append(pytest.param(expression, value, dtype, id=expression))
    assert len(found) > 50
    return found


@pytest.mark.parametrize(("expression", "value", "dtype"), table_rows())
def test_tables(expression: str, value: str, dtype: str) -> None:
    c = castile.parse(f"def f() -> y:\n    y = {expression}\n")
    assert tensor_types(c)["y"] == dtype
    got = castile.evaluate(c, {})["y"].item()
    wanted = float(value) if value in ("nan", "inf", "-inf") else ast.literal_eval(value)
    assert type(got) is type(wanted)
    assert got == wanted or (isinstance(got, float) and math.isnan(got) and math.isnan(wanted))


@pytest.mark.parametrize("block", every("console"))
def test_console(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """`$ cat FILE` shows a file, which then exists; `$ castile` prints what stands below it, where `…` is anything."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    for part in re.split(r"^\$ ", block.text, flags=re.M)[1:]:
        command, _, shown = part.partition("\n")
        words = shlex.split(command)
        if words[0] == "cat":
            Path(words[1]).write_text(shown, encoding="utf-8")
            continue
        if words[0] != "castile":
            pytest.fail(f"line {block.line}: only cat and castile are run")
        for option in words[1:]:
            if option.endswith(".npz") and not os.path.exists(option):
                np.savez(option, X=np.ones((2, 3)))
        with pytest.raises(SystemExit):
            app(words[1:], prog_name="castile")
        output = "".join(capsys.readouterr())
        assert re.fullmatch(re.escape(shown.rstrip("\n")).replace("…", ".*?"), output.rstrip("\n"), re.S), output


@pytest.mark.parametrize("name", NAMES)
def test_links(name: str) -> None:
    """Links to files lead to files, links to headings to headings."""
    path = ROOT / name
    text = path.read_text(encoding="utf-8")
    prose = re.sub(r"```.*?```|`[^`\n]*`", "code", text, flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        aim = path.parent / file if file else path
        assert aim.exists(), target
        if anchor:
            heads = re.findall(r"^#+ (.*)$", aim.read_text(encoding="utf-8"), re.M)
            assert anchor in {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}, target


def test_environment_variables_are_told() -> None:
    told = set(re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8"), re.M))
    folders = ("ir", "passes", "codegen", "costmodel", "autotune", "frontend", "cli")
    code = "".join(p.read_text(encoding="utf-8") for f in folders for p in (ROOT / f).glob("*.py"))
    read = set(re.findall(r"environ(?:\.get\(|\[)\"(CASTILE_\w+)\"", code)) | {LIMIT, "CASTILE_DUMP"}
    assert read <= told


def test_the_drawing_is_the_one_that_explain_draws() -> None:
    """To draw it again: castile explain examples/cascades/attention.cascade --svg docs/attention.svg"""
    c = castile.load(ROOT / "examples" / "cascades" / "attention.cascade")
    assert (ROOT / "docs" / "attention.svg").read_text(encoding="utf-8") == to_svg(c)
