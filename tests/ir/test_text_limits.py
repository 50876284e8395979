"""Texts that are too deep, too long or no texts at all: limits are exact, and nothing crashes the interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from outcome import outcome, parsed_within

from castile.ir import source as gate
from castile.ir.cascade import MAX_DEPTH
from castile.ir.errors import CastileError, ParseError
from castile.ir.parse import load, parse, parse_expr


def test_the_limits_are_exact() -> None:
    def text(body: str) -> str:
        return f"def f(X: f32[k]) -> Y:\n    Y[k] = {body}"

    for wrap in (lambda n: "exp(" * n + "X[k]" + ")" * n, lambda n: "-" * n + "X[k]", lambda n: "X[k]" + "+1" * n):
        # X[k] is two levels.
        assert outcome(text(wrap(MAX_DEPTH - 2))) is None
        error = outcome(text(wrap(MAX_DEPTH - 1)))
        assert error is not None
        assert f"deeper than {MAX_DEPTH} levels" in error.message
    assert outcome(text("(" * 100 + "X[k]" + ")" * 100)) is None
    assert outcome(text("(" * 120 + "X[k]" + ")" * 120)) is not None
    name = "x" * gate.MAX_NAME
    assert outcome(text(f"X[k]\n    {name} = 1")) is None
    assert outcome(text(f"X[k]\n    {name}x = 1")) is not None
    assert outcome(text("X[k] + " + "0" * 0 + "1" * 18)) is None
    for number in ("9" * 41, "0x" + "f" * 40, "1e" + "0" * 40, "0." + "1" * 40, "1_" * 21 + "1", "9223372036854775808"):
        assert outcome(text(number)) is not None
    assert outcome(text("9223372036854775807")) is None
    assert outcome(text("X[k]") + "\n#" + "x" * gate.MAX_CHARS) is not None
    assert outcome(text("X[k]") + "\n#" + "x" * (gate.MAX_CHARS - 100)) is None


def test_what_prints_parses_up_to_the_limits() -> None:
    """The gate's bound on the tree never refuses what the verifier lets through."""
    n = MAX_DEPTH - 3
    sums, products, powers = " + 1" * n, " * 2" * n, " - 3 ** 2" * (n // 2)
    tests = " | ".join(["(k < 2)"] * (n - 1))
    for body in (
        f"X[k]{sums}",
        f"X[k]{products}",
        f"X[k]{powers}",
        f"max[k](X[k]{sums[:-4]}) * exp(X[k]{products[:-4]})",
        f"where({tests}, {'-' * (n - 1)}X[k], X[k]{' // 2' * (n - 1)})",
        f"-{'X[k] * 2 + ' * 80}{'-' * 80}X[k] + 2 ** 3{' * 3' * 80}",
    ):
        assert outcome(f"def f(X: f32[k]) -> Y:\n    Y[k] = {body}") is None, body


UNITS = r"""
+ - ( [ { a 1 ' " a+ a. a() a[1] a, X[k], 0xe+ 1if\s not\s -~ 2** 2**- f( f(- a[ a: a= 'a' # ; _ ... := == a< \\n \n (\n
lambda: a\sif\sa\selse\s [a\sfor\sa\sin\s {a: f'{ (- é @a\n elif\sa:\spass\n def\sf():\n\s match\sa:\n\scase\s( ''' """


def huge() -> Iterator[str]:
    head = "def f(X: f32[k]) -> Y:\n    Y[k] = "
    for number, unit in enumerate([*UNITS.split(), '"""']):
        unit = unit.replace("\\s", " ").replace("\\n", "\n")
        size = gate.MAX_CHARS - 100 if number % 4 == 0 else 200_000
        yield (head if number % 3 else "") + unit * (size // len(unit))
    yield head + "(" * 100 + "\n" * 500_000
    yield head + "'''" + "(" * 500_000
    yield head + "\u202e" * 500_000
    yield head + " \t\x0c" * 300_000
    yield "\n".join(f"def f{i}(): pass" for i in range(40_000))
    yield "x" * 10_000_000


def test_megabytes_are_refused_at_once() -> None:
    for text in huge():
        error = parsed_within(text, 1)
        assert isinstance(error, CastileError)
        assert len(str(error)) < 1000
        assert error.hint
        assert error.line is not None


# What could crash CPython: tried in a child, where a crash is seen and a small stack can be had. Each is what stands
# before and after the middle, again and again; `|` is the end of a line.

NESTS = r"""
( … )
a[ … ]
f( … )
[ … ]
- …
~ …
-~ …
2** …
2**- …
a+ …
a<< …
a&a+ …
a< …
… .b
… ()
… [1]
a+\| …
-\| …
( … +a)
( … +a+a+a+a)
( … *a-a)
f(')',  … )
(')]' + … )
(''')''' +  … )
( # )| … )
(a,  … )
f(a= … )
f(* … )
a[1: … ]
not  …
lambda: …
1 if 1 else  …
{ … }
{1: … }
[a for a in  … ]
(a for a in  … )
(a:= … )
(yield  … )
f"{ … }"
0xe+0xe+ …
1if 1else  …
"""
PROGRAM = """
import sys, threading, time
from castile.ir.errors import CastileError
from castile.ir.parse import parse
def run():
    for text in sys.stdin.buffer.read().decode("utf-8").split("\\0"):
        start = time.perf_counter()
        try:
            parse(text)
        except CastileError as error:
            assert error.hint and error.line
        took = time.perf_counter() - start
        assert took < 3, (took, text[:60])
    print("done")
threading.stack_size(int(sys.argv[1]))
thread = threading.Thread(target=run)
thread.start()
thread.join()
"""


def nests() -> Iterator[str]:
    for line in NESTS.strip().split("\n"):
        opened, closed = line.replace("|", "\n").split("…")
        opened, closed = opened.removesuffix(" "), closed.removeprefix(" ")
        for n in (gate.MAX_DEPTH - 3, gate.MAX_BRACKETS, 1000, 90_000):
            for suffix in ("", ")", " 1"):
                body = opened * n + "a" + closed * n + suffix
                yield f"def f(X: f32[k]) -> Y:\n    Y[k] = {body}\n"
                if n < 200:
                    yield f"def f(X: f32[k]) -> Y:\n    Y[k] = {body[: len(body) * 2 // 3]}\n"
                    yield f"def f(X: f32[{body}]) -> Y:\n    Y[k] = X[k]\n"
                    yield f"{body}\n    {body} = {body}\n"
    for n in (20, 99, 101, 5000):
        yield "".join(" " * i + "def f():\n" for i in range(n)) + " " * n + "pass"
        yield "if a: pass\n" + "elif a: pass\n" * n
        yield "match a:\n" + "".join(" " * i + " case 1:\n" + " " * i + "  match a:\n" for i in range(min(n, 60)))
        yield "@f\n" * n + "def f(): pass"
        yield "def f(" + "X: f32[" * n + "k" + "]" * n + ") -> Y: pass"


@pytest.mark.parametrize("stack", [256 * 1024, 0], ids=["small stack", "usual stack"])
def test_nothing_crashes_the_interpreter(stack: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(stack)],
        input="\0".join(nests()).encode(),
        env={**os.environ, "PYTHONFAULTHANDLER": "1"},
        capture_output=True,
        timeout=300,
    )
    assert done.stdout.strip() == b"done", done.stderr.decode()[-2000:]


def test_a_full_stack_is_no_crash() -> None:
    text = "def f(X: f32[k]) -> Y:\n    Y[k] = " + "exp(" * 90 + "X[k]" + ")" * 90

    def deeper(n: int) -> str:
        if n:
            return deeper(n - 1)
        try:
            return parse(text).name
        except ParseError as error:
            return error.message

    limit = sys.getrecursionlimit()
    found = {deeper(n) for n in range(0, limit - 150, 10)}
    assert found == {"f", "the text nests too deep for the stack that is left"}


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for name, content in {
        "latin": b"def f(\xe9",
        "cut": b"\xc3",
        "zero": b"\0",
        "utf16": "def f".encode("utf-16"),
    }.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(CastileError) as caught:
            load(path)
        assert caught.value.hint
    big = tmp_path / "big"
    big.write_bytes("é".encode() * 3_000_000)
    with pytest.raises(ParseError, match="characters; at most"):
        load(big)
    for path in (tmp_path, tmp_path / "none", tmp_path / "a" / "b", "\0", "x" * 5000):
        with pytest.raises(CastileError, match="cannot read"):
            load(path)
    for odd in (None, 3, 1.5, ["x"]):
        with pytest.raises(CastileError):
            load(odd)  # type: ignore[arg-type]
        with pytest.raises(CastileError):
            parse(odd)  # type: ignore[arg-type]


def test_expressions_are_read_as_safely() -> None:
    for text in ("", "1 +", "a b", "x = 1", "(" * 500, "-" * 5000 + "1", "\0", "exp(", "f'{x}'", "k\nk"):
        with pytest.raises(ParseError) as caught:
            parse_expr(text, ["x"])
        assert caught.value.hint
