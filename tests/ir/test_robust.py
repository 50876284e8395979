"""No text crashes, hangs or executes: it is a cascade or one error with its place, a caret and a hint."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from strategies import random_case

from castile.ir import source as gate
from castile.ir.cascade import MAX_DEPTH, Cascade
from castile.ir.errors import CastileError, ParseError, VerifyError
from castile.ir.parse import load, parse, parse_expr

EXAMPLES = sorted((Path(__file__).parents[2] / "examples" / "cascades").glob("*.cascade"))
CORPUS = [p.read_text(encoding="utf-8") for p in EXAMPLES] + [str(random_case(seed).cascade) for seed in range(60)]

TOKENS = r"""
( ) [ ] { } , : ; . ... = == != < <= > >= -> + - * / // % ** & | ^ ~ << >> @ := += *= ! ? $ ` # ' " '''
if else elif for while in is not and or lambda return yield await async def class with as try except finally raise
import from global nonlocal del pass break continue assert match case type None True False print exec eval __import__
sum max min prod any all argmax where exp log sqrt minimum maximum extent inf bf16 f32 f64 i64 u8 bool cascade monoid
0 1 -1 0.5 1e999 0x1f 0b101 0o7 1_000 1j 1if 0xe+0xe 99999999999999999999 9223372036854775808 1e-400 .5 5. 0777 1__0
Q K V S q k m n out _ x' f"{x}" b"x" rb'' u"" é ﬁ ſ K ∞ − × ≤ “ ” 𝐱 ｆｏｏ ｌａｍｂｄａ ｉｆ א עברית
@monoid(identity=0) @cascade(numerics="fast") def(X:f32)->Y: T[...] T[1:2] f(*a) f(**a) f(a=1)
""".split()
TOKENS += "\u202e \u200b \ufeff \xa0 \u2028 \x0c \x0b \x00 \ud800 \udfff \U0010ffff \r \t \r\n \\\n \n \n\t".split(" ")
TOKENS += ['"""', " ", "\n    "]


def parsed_within(text: str, seconds: float) -> Cascade | CastileError:
    """The cascade or the error; one of three runs must be in time, as a collection of garbage may fall into any."""
    times = []
    for _ in range(3):
        start = time.process_time()
        result: Cascade | CastileError
        try:
            result = parse(text)
        except CastileError as caught:
            result = caught
        times.append(time.process_time() - start)
        if times[-1] < seconds:
            return result
    raise AssertionError(f"took {times} s: {text[:1000]!a}")


def outcome(text: str) -> CastileError | None:
    """Parse within a fifth of a second; the error if there is one, checked for what every error has."""
    c = parsed_within(text, 0.2 + len(text) / 1e6)
    error = c if isinstance(c, CastileError) else None
    if error is None:
        assert len(text) % 4 or parse(str(c)) == c
        return None
    assert isinstance(error, ParseError | VerifyError)
    assert error.line is not None
    assert error.column is not None
    assert 1 <= error.line <= text.count("\n") + text.count("\r") + 1
    assert error.column >= 1
    assert error.hint, str(error)
    shown = str(error)
    assert shown.startswith("<cascade>:")
    assert len(shown) < 2000
    shown.encode()  # no half of a surrogate pair reaches a terminal
    _, line, carets, *_ = shown.split("\n")
    assert re.fullmatch(r" +\| *\^+", carets), shown
    assert len(line) >= carets.index("^"), shown
    return error


def mutated(text: str, rng: random.Random) -> str:
    """The text with a few changes: characters, tokens, lines, pieces of another text."""
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        words = re.findall(r"\w+|\s+|[^\w\s]", text) or [""]
        at, place = rng.randrange(len(words)), rng.randrange(len(text) + 1)
        match rng.randrange(12):
            case 0:
                text = text[:place] + text[place + 1 :]
            case 1:
                text = text[:place] + chr(rng.choice((rng.randrange(128), rng.randrange(0x110000)))) + text[place:]
            case 2:
                text = text[:place]
            case 3:
                other = rng.choice(CORPUS)
                start = rng.randrange(len(other))
                text = text[:place] + other[start : start + rng.randrange(80)] + text[place:]
            case 4:
                lines = text.split("\n")
                if rng.random() < 0.3:
                    rng.shuffle(lines)
                else:
                    lines.insert(rng.randrange(len(lines)), rng.choice(lines))
                text = "\n".join(lines)
            case 5:
                raw = bytearray(text.encode("utf-8", "surrogatepass"))
                raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
                text = raw.decode("utf-8", rng.choice(("replace", "surrogateescape", "ignore")))
            case 6:
                end = min(len(text), place + rng.randrange(40))
                text = text[:end] + text[place:end] * rng.randrange(1, 5) + text[end:]
            case 7:
                words[at] = ""
            case 8:
                words[at], words[-at] = words[-at], words[at]
            case 9:
                words[at] = rng.choice([w for w in words if w[:1].isalpha()] or ["x"])
            case _:
                words.insert(at, rng.choice(TOKENS)) if rng.random() < 0.5 else words.__setitem__(
                    at, rng.choice(TOKENS)
                )
        text = text or "x"
    return text


def noise(rng: random.Random) -> str:
    if rng.random() < 0.3:
        return "".join(chr(rng.randrange(0x110000)) for _ in range(rng.randrange(200)))
    body = " ".join(rng.choice(TOKENS) for _ in range(rng.randrange(40)))
    return rng.choice(("{}", "def f(X: f32[k]) -> Y:\n    Y = {}", "def f({}) -> Y:\n    Y = 1", "{}\n\n{}")).format(
        body, body
    )


@pytest.mark.parametrize("part", range(4))
def test_mutated_and_random_texts(part: int) -> None:
    rng = random.Random(part)
    valid = 0
    for _ in range(2500):
        text = noise(rng) if rng.random() < 0.15 else mutated(rng.choice(CORPUS), rng)
        valid += outcome(text) is None
    assert 50 < valid < 1500


@pytest.mark.nightly
def test_many_mutated_and_random_texts() -> None:
    rng = random.Random("nightly")
    for _ in range(200_000):
        outcome(noise(rng) if rng.random() < 0.15 else mutated(rng.choice(CORPUS), rng))


@pytest.mark.parametrize("text", TOKENS, ids=ascii)
def test_every_token_everywhere(text: str) -> None:
    head = "def f(X: f32[k]) -> Y"
    for around in (
        "{}",
        head + ":\n    Y[k] = X[k] {}",
        head + ":\n    Y[k] = {}",
        head + ":\n    {}\n    Y[k] = X[k]",
        head + " {}:\n    Y[k] = X[k]",
        "def f(X: f32[k]{}) -> Y:\n    Y[k] = X[k]",
        "{} " + head + ":\n    Y[k] = sum[{}](X[k])",
    ):
        outcome(around.replace("{}", text))


# Python that is no cascade

FOREIGN = """
Y[k] = f'{X}'
Y[k] = (a := X[k])
Y[k] = exp(*X[k])
Y[k] = exp(x=X[k])
Y[k] = (lambda: X[k])()
Y[k] = [X[k] for k in X]
Y[k] = {1: X[k]}
Y[k] = await X[k]
Y[k] = yield X[k]
Y[k] = X[k] if X[k] > 0 else 0
Y[k] = X[k] and 1
Y[k] = not X[k]
Y[k] = X[k] is 1
Y[k] = X[k] in X
Y[k] = where(0 < X[k] < 1, 1, 0)
Y[k] = X.sum()
Y[k] = X[1:2]
Y[k] = X[...]
Y[k] = None
Y[k] = b'x'
Y[k] = 'x'
Y[k] = 1j
Y[k] = X[k] @ X[k]
Y[k] = X[k] ^ X[k]
Y[k] = exec('raise SystemExit')
Y[k] += X[k]
Y[k]: f32
() = X[k]
Y[k] = Z[k] = X[k]
Y[k], *Z = X[k]
[Y] = X
Y[k + 1] = X[k]
X[k]
del X
return X[k]
raise X
assert X
global X
for k in X: Y[k] = X[k]
while X: pass
with X: pass
if X: Y[k] = X[k]
try: pass
class X: pass
import os
def g(): pass
async def g(): pass
type X = f32
match X:; case 1: pass
@f; def g(): pass
"""


@pytest.mark.parametrize("body", FOREIGN.strip().split("\n"))
def test_other_python_is_refused(body: str) -> None:
    lines = body.replace(":; ", ":\n        ").replace("@f; ", "@f\n    ")
    error = outcome(f"def f(X: f32[k]) -> Y:\n    {lines}\n    Z[k] = X[k]\n")
    assert error is not None
    assert error.line in (2, 2 + lines.count("\n"))


SIGNATURES = """
async def f(X: f32[k]) -> Y
def f[T](X: f32[k]) -> Y
def f(X: f32[k] = 1) -> Y
def f(*X) -> Y
def f(**X) -> Y
def f(X: f32[k], /) -> Y
def f(*, X: f32[k]) -> Y
def f(X) -> Y
def f(X: f32[k])
def f(X: f32[k]) -> 'Y'
def f(X: f32[k]) -> Y[k]
def f(X: f32[k]) -> ()
def f(X: f32[k]) -> (Y, Y)
def f(X: f32[k]) -> (Y, Z)
def f(X: f32[k]) -> (Y, X)
def f(X: float) -> Y
def f(X: f32[k][k]) -> Y
def f(X: f32[k, k]) -> Y
def f(X: f32[k:2]) -> Y
def f(X: f32[k], X: f32[k]) -> Y
def exp(X: f32[k]) -> X
def f(sum: f32[k]) -> Y
def f(out: f32[k]) -> Y
def f(X: f32[exp(k)]) -> Y
def f(X: f32[k / 2]) -> Y
def f(X: f32[2 * 4]) -> Y
def f(X: f32[extent(k)]) -> Y
def f(X: f32[-3]) -> Y
def f(X: f32[1.5]) -> Y
def f(X: f32[True]) -> Y
class f
@f;def f(X: f32[k]) -> Y
@cascade('strict');def f(X: f32[k]) -> Y
@cascade(**a);def f(X: f32[k]) -> Y
@cascade(numerics=1);def f(X: f32[k]) -> Y
@a.b.c[1];def f(X: f32[k]) -> Y
@monoid;def f(X: f32[k]) -> Y
@monoid(identity=X);def f(a, b) -> c
@monoid(identity=0);def f(a, b, c) -> c
@monoid(identity=0);def f(a: f32, b=1) -> c
@monoid(identity=());def f() -> ()
@monoid(identity=0);@monoid(identity=0);def f(a, b) -> a
"""


@pytest.mark.parametrize("signature", SIGNATURES.strip().split("\n"))
def test_odd_signatures_are_refused(signature: str) -> None:
    lines = signature.replace(";", "\n")
    assert outcome(f"{lines}:\n    Y[k] = X[k]\n") is not None


def test_nothing_is_executed(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    act = f"open({str(mark)!r}, 'w')"
    for text in [
        f"{act}\ndef f(X: f32[k]) -> Y:\n    Y[k] = X[k]",
        f"def f(X: {act}) -> Y:\n    Y[k] = X[k]",
        f"@{act}\ndef f(X: f32[k]) -> Y:\n    Y[k] = X[k]",
        f"def f(X: f32[k] = {act}) -> Y:\n    Y[k] = X[k]",
        f"@monoid(identity={act})\ndef m(a, b) -> c:\n    c = a\n\ndef f(X: f32[k]) -> Y:\n    Y[k] = X[k]",
        f"def f(X: f32[k]) -> Y:\n    Y[k] = {act}",
    ]:
        assert outcome(text) is not None
    assert not mark.exists()


# Names and characters


def test_names_are_pythons() -> None:
    c = parse("def f(ﬁ: f32[K], é: f32[K]) -> Y:\n    Y[K] = fi[\u212a] + e\u0301[K]")
    assert [p.name for p in c.params] == ["fi", "é"]
    assert c.ranks == ("K",)
    assert parse(str(c)) == c


@pytest.mark.parametrize("word", ["ｉｆ", "ｌａｍｂｄａ", "Ｎｏｎｅ", "𝐓𝐫𝐮𝐞", "ｄｅｆ"])
def test_keywords_in_disguise_are_refused(word: str) -> None:
    for text in (
        f"def f({word}: f32) -> Y:\n    Y = {word}",
        f"def f(x: f32[{word}]) -> Y:\n    Y[{word}] = x[{word}]",
    ):
        error = outcome(text)
        assert error is not None


def test_columns_count_characters() -> None:
    with pytest.raises(ParseError) as caught:
        parse("def f(é: f32[k]) -> Y:\n    Y[k] = é[k] + naïve[k] + 漢字(k)")
    assert (caught.value.line, caught.value.column) == (2, 19)
    assert str(caught.value).split("\n")[2] == "  | " + " " * 18 + "^" * 8


def test_long_lines_are_cut_around_the_caret() -> None:
    text = "def f(X: f32[k]) -> Y:\n    Y[k] = " + " + ".join(["X[k]"] * 90) + " + Z[k]" + " * 2" * 90
    error = outcome(text)
    assert error is not None
    lines = str(error).split("\n")
    assert all(len(line) < 150 for line in lines)
    start = lines[2].index("^")
    assert lines[1][start : start + 4] == "Z[k]"


# Limits


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
