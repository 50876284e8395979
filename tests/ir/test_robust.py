"""No text crashes, hangs or executes: it is a cascade or one error with its place, a caret and a hint."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
from outcome import outcome
from strategies import random_case

from castile.ir.errors import ParseError
from castile.ir.parse import parse

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
