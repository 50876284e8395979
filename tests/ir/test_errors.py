"""What users read when they make a mistake: the exact text of typical errors, kept in a golden file."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from castile.ir.errors import CastileError, InputError, Loc, ParseError, Source, VerifyError, attach, did_you_mean
from castile.ir.evaluate import evaluate
from castile.ir.parse import cascade, load, monoid, parse

# The statements of a cascade `f(X: f32[m, k], W: f32[k, n], scale: f32, idx: i32[m])`, one mistake in each.
BODIES = """
Y[m] = scal * sum[k](X[m, k])
Y[m] = sum[k](Xs[m, k])
Y[m] = sum[k](X[m])
Y[m] = sum[k](X[m, k, k])
Y[m] = X[m, k]
Y[m] = sum[k](X[m, j])
Y = sum[k](X[m, k])
Y[m] = sum[k](X[m, k]) / k
Y[m] = scale[m] * X[m, 0]
Y[m] = where(m > 0, Y[m - 1], 0) + where(m < 5, Y[m + 1], 0)
Y[m] = sum(X, axis=1)
Y[m] = sum(X[m, k])
Y[m] = sum[k]
Y[m] = sum[k](X[m, k], 0)
Y[m] = sum[W](X[m, k])
Y[m] = summ[k](X[m, k])
Y[m] = mean[k](X[m, k])
Y[m] = max(X[m, 0], 0)
Y[m] = relu(scale)
Y[m] = expp(scale)
Y[m] = exp(scale, scale)
Y[m] = where(scale, 1, 0)
Y[m] = where(scale > 0, 1)
Y[m] = scale > 0 & m > 0
Y[m] = 0 < scale < 1
Y[m] = (scale > 0) and (m > 0)
Y[m] = not scale
Y[m] = scale if scale > 0 else 0
Y[m] = scale ^ 2
Y[m] = scale ** 0.5
Y[m] = scale ** scale
Y[m] = idx[m] ** -1
Y[m] = scale << 1
Y[m] = X[m, scale]
Y[m] = X[m, 0.5]
Y[m] = X[m, :]
Y[m] = X[m, 1:3]
Y[m] = X.sum()
Y[m] = X @ W
Y[m] = float16(scale)
Y[m]: half = scale
Y[m] = scale(m)
Y[m] = [scale]
Y[m] = "s"
Y[m] = 1j
Y[m] = (scale
Y[m] = scale)
Y[m] = scale scale
Y[m] = scale +
Y[m] = 3 × scale
Y[m] = 99999999999999999999 * scale
Y[m, m] = scale
Y[m + 1] = scale
Y[m] += scale
Y[m] == scale
Y[m]: f32
sum[k](X[m, k])
return sum[k](X[m, k])
for i in m: Y[m] = scale
if scale: Y[m] = scale
X[m, k] = scale
m[k] = scale
Y[m] = Z[m]; Z[m] = scale
Y[m] = scale; Y[m] = scale
Z[m] = scale
Y[sum] = scale
Y[m] = any[k](X[m, k])
Y[m] = argmax[k, n](W[k, n])
(Y[m], Z[m]) = sum[k](X[m, k])
(Y, Z) = scale
Y[m] = where(m > 0, Y[m], 0)
Y[m] = where(m > 0, Y[m - 1], 0) + sum[m](X[m, 0])
Y[q] = scale
Y[m] = extent(X)
Y[m] = exp(x=scale)
Y[m] = f32(scale, scale)
import numpy
"""

WHOLE = {
    "no cascade": "",
    "statements alone": "Y[m] = sum[k](X[m, k])",
    "no colon": "def f(X: f32[m]) -> Y\n    Y[m] = X[m]",
    "no result": "def f(X: f32[m]):\n    Y[m] = X[m]",
    "no type": "def f(X) -> Y:\n    Y = X",
    "unknown type": "def f(X: float32[m]) -> Y:\n    Y[m] = X[m]",
    "python type": "def f(X: float) -> Y:\n    Y = X",
    "array type": "def f(X: np.ndarray) -> Y:\n    Y = X",
    "a default": "def f(x: f32 = 1.0) -> Y:\n    Y = x",
    "an extent that is no rank": "def f(X: f32[2 * 4]) -> Y:\n    Y = X[0]",
    "a repeated rank": "def f(X: f32[m, m]) -> Y:\n    Y[m] = X[m, m]",
    "a reserved name": "def f(max: f32[m]) -> Y:\n    Y[m] = max[m]",
    "the name out": "def f(out: f32[m]) -> Y:\n    Y[m] = out[m]",
    "two of one name": "def f(x: f32, x: f32) -> Y:\n    Y = x",
    "a result that is not written": "def f(x: f32) -> Output:\n    Outputs = x",
    "a parameter as result": "def f(x: f32) -> x:\n    Y = x",
    "no statement": "def f(x: f32) -> Y:\n    pass",
    "nothing below def": "def f(x: f32) -> Y:",
    "no indentation": "def f(x: f32) -> Y:\nY = x",
    "uneven indentation": "def f(x: f32) -> Y:\n    Z = x\n      Y = Z",
    "two cascades": "def f(x: f32) -> Y:\n    Y = x\n\ndef g(x: f32) -> Y:\n    Y = x",
    "an option that is none": '@cascade(numeric="fast")\ndef f(x: f32) -> Y:\n    Y = x',
    "a value that is none": '@cascade(numerics="loose")\ndef f(x: f32) -> Y:\n    Y = x',
    "another decorator": "@torch.compile\ndef f(x: f32) -> Y:\n    Y = x",
    "a monoid without identity": "@monoid\ndef m(a, b) -> c:\n    c = a + b\n\n"
    "def f(X: f32[k]) -> Y:\n    Y = m[k](X[k])",
    "a monoid with too few parameters": "@monoid(identity=(0, 0))\ndef m(a, b) -> (c, d):\n    c = a\n    d = b",
    "a monoid without its result": "@monoid(identity=0.0)\ndef m(a, b) -> total:\n    totl = a + b\n\n"
    "def f(X: f32[k]) -> Y:\n    Y = m[k](X[k])",
    "a monoid over ranks": "@monoid(identity=0.0)\ndef m(a, b) -> c:\n    c = a + k\n\n"
    "def f(X: f32[k]) -> Y:\n    Y = m[k](X[k])",
    "a state as a value": "@monoid(identity=(0.0, 0.0))\ndef m(a, b, p, q) -> (c, d):\n    c = a + p\n    d = b + q\n\n"
    "def f(X: f32[k]) -> Y:\n    Y = m[k](X[k], X[k])",
    "a dash": "def f(x: f32) – > Y:\n    Y = x",
    "quotes": "def f(x: f32) -> Y:\n    “what it does”\n    Y = x",
    "an extent that nothing gives": "def f(x: f32) -> Y:\n    Y[row] = x",
    "a tensor and a rank of one name": "def f(X: f32[m, k]) -> m:\n    m[k] = X[0, k]",
    "a monoid and a tensor of one name": "@monoid(identity=0)\ndef m(a, b) -> c:\n    c = a\n\n"
    "def f(m: f32) -> Y:\n    Y = m",
    "a rank of one letter too many": "def f(X: f32[rows]) -> Y:\n    Y[rows] = X[row]",
}


def texts() -> dict[str, str]:
    signature = "def f(X: f32[m, k], W: f32[k, n], scale: f32, idx: i32[m]) -> Y:\n"
    bodies = {b: signature + "".join(f"    {line}\n" for line in b.split("; ")) for b in BODIES.strip().split("\n")}
    return {**bodies, **WHOLE}


def message(act: Callable[[], Any]) -> str:
    with pytest.raises(CastileError) as caught:
        act()
    return str(caught.value)


def test_errors_of_texts(golden: Callable[[str, str], None]) -> None:
    shown = []
    for name, text in texts().items():
        with pytest.raises((ParseError, VerifyError)) as caught:
            parse(text, "f.cascade")
        error = caught.value
        assert error.hint, name
        assert error.loc is not None, name
        shown.append(f"## {name}\n\n{error}\n")
    golden("errors.txt", "\n".join(shown))


# What is said of inputs, when a cascade runs.

GEMV = "def gemv(A: bf16[m, k], x: f32[k], W: u32[k // 8], t: i64[p]) -> Y:\n    Y[m] = sum[k](A[m, k] * x[k])"
INPUTS: dict[str, Any] = {"A": np.ones((2, 16)), "x": np.ones(16), "W": np.ones(2, int), "t": [3]}


def test_errors_of_inputs(golden: Callable[[str, str], None]) -> None:
    c = parse(GEMV)
    gather = parse("def pick(X: f32[k], t: i64[n]) -> Y:\n    Y[n] = X[t[n]]", "pick.cascade")
    ratio = parse("def ratio(a: i32, b: i32) -> Y:\n    Y = a // b")
    first = parse("def first(X: f32[k]) -> Y:\n    Y = argmax[k](X[k])")
    acts = {
        "a missing input": lambda: evaluate(c, {"A": INPUTS["A"]}),
        "an input too many": lambda: evaluate(c, {**INPUTS, "y": 1}),
        "two extents of a rank": lambda: evaluate(c, {**INPUTS, "x": np.ones(15)}),
        "axes too few": lambda: evaluate(c, {**INPUTS, "A": np.ones(16)}),
        "a derived axis": lambda: evaluate(c, {**INPUTS, "W": [1, 2, 3]}),
        "words for numbers": lambda: evaluate(c, {**INPUTS, "x": ["a"] * 16}),
        "fractions for integers": lambda: evaluate(c, {**INPUTS, "W": [0.5, 1]}),
        "integers out of range": lambda: evaluate(c, {**INPUTS, "W": [-1, 1]}),
        "a list for a dict": lambda: evaluate(c, [1, 2]),  # type: ignore[arg-type]
        "samples without a rank": lambda: evaluate(c, INPUTS, at={}),
        "samples out of range": lambda: evaluate(c, INPUTS, at={"m": [2]}),
        "a read out of bounds": lambda: evaluate(gather, {"X": [1.0, 2.0], "t": [0, 2]}),
        "a division by zero": lambda: evaluate(ratio, {"a": 1, "b": 0}),
        "an argmax of nothing": lambda: evaluate(first, {"X": []}),
        "a text that is none": lambda: parse(3),  # type: ignore[arg-type]
        "a path that is none": lambda: load(3),  # type: ignore[arg-type]
        "a file that is not there": lambda: load("no/such.cascade"),
    }
    golden("errors_inputs.txt", "\n".join(f"## {name}\n\n{message(act)}\n" for name, act in acts.items()))


# How errors are made


def test_an_error_without_a_text_names_its_einsum() -> None:
    from castile.ir.cascade import Access, Cascade, Einsum, Output, Param
    from castile.ir.verify import verify

    c = Cascade("f", (Param("x", "f32"),), (Einsum((Output("Y"),), Access("z")),), ("Y",))
    assert message(lambda: verify(c)).startswith("in `Y`: no tensor is called `z`\nhint: ")


def test_fields_are_there_for_tools() -> None:
    with pytest.raises(VerifyError) as caught:
        parse("\n\ndef f(X: f32[k]) -> Y:\n    Y = X[k]", "file.cascade")
    error = caught.value
    assert (error.line, error.column, error.stage) == (4, 11, "verify")
    assert (error.einsum, error.rank) == ("Y", "k")
    assert error.message == "rank `k` is neither on the left nor reduced"
    assert error.loc == Loc(4, 11, 12)
    assert InputError("a", expected="b", got="c").line is None


def test_expected_and_got_are_shown() -> None:
    assert str(InputError("a", expected="b", got="c")) == "a\nexpected: b; got: c"
    assert str(InputError("a", expected="b")) == "a\nexpected: b"
    assert str(InputError("a", got="c", hint="d")) == "a\ngot: c\nhint: d"


def test_a_source_is_attached_once() -> None:
    first, second = Source("a"), Source("b")
    assert attach(attach(ParseError("x"), first), second).source is first


def test_near_words_are_found() -> None:
    assert did_you_mean("scal", ["scale", "mask"]) == "did you mean `scale`?"
    assert did_you_mean("zzz", ["scale", "mask"]) == ""
    assert did_you_mean("", []) == ""
    assert did_you_mean("x" * 10_000, ["y" * 10_000] * 100) == ""


# Decorated functions: errors carry the line and column of the module's file.

MODULE = """
from __future__ import annotations

import castile
from castile.ir.parse import cascade, monoid


@monoid(identity=0.0)
def total(a, b) -> c:
    c = a + b


@castile.cascade
def good(X: f32[m, k]) -> Y:
    '''Row sums.'''
    Y[m] = total[k](X[m, k])


@cascade(numerics="strict")
def strict(X: f32[m, k]) -> Y:
    Y[m] = sum[k](X[m, k])


def inside():
    @monoid(identity=1.0)
    def product(a, b) -> c:
        c = a * b

    renamed = product

    @cascade
    def nested(X: f32[m, k], late: f32) -> Y:
        # a comment
# and one that stands at the margin
        Y[m] = renamed[k](X[m, k]) * late

    late = 1
    return nested


def bad():
        @cascade
        def wrong(X: f32[m, k]) -> Y:
            Z[m] = sum[k](X[m, k])
            Y[m] = Zz[m]
"""


@pytest.fixture
def module(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    import importlib

    (tmp_path / "decorated_module.py").write_text(MODULE, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    return importlib.import_module("decorated_module")


def test_decorated_functions(module: Any) -> None:
    assert module.good == parse(
        "@monoid(identity=0.0)\ndef total(a, b) -> c:\n    c = a + b\n"
        "def good(X: f32[m, k]) -> Y:\n    Y[m] = total[k](X[m, k])"
    )
    assert module.good.doc == "Row sums."
    assert module.strict.numerics == "strict"
    nested = module.inside()
    assert nested.name == "nested"
    assert [m.name for m in nested.monoids] == ["renamed"]
    assert parse(str(nested)) == nested


def test_errors_of_decorated_functions_stand_in_their_file(module: Any) -> None:
    with pytest.raises(ParseError) as caught:
        module.bad()
    error = caught.value
    lines = MODULE.split("\n")
    assert error.line is not None
    assert error.column is not None
    assert lines[error.line - 1][error.column - 1 :].startswith("Zz[m]")
    assert str(error).startswith(f"{module.__file__}:{error.line}:{error.column}: no tensor is called `Zz`")
    assert "hint: did you mean `Z`?" in str(error)


def test_what_cannot_be_decorated() -> None:
    for odd in (print, lambda x: x, 3, int, eval("lambda: 0")):
        with pytest.raises(CastileError):
            cascade(odd)  # type: ignore[call-overload]
    with pytest.raises(CastileError, match="`class` is no word"):

        @monoid(identity=0)
        class Wrong:
            pass


def test_a_class_is_no_cascade() -> None:
    with pytest.raises(CastileError):

        @cascade
        class Wrong:
            x = 1


def test_texts_of_every_length_are_shown_whole() -> None:
    error = ParseError(
        "here",
        loc=Loc(2, 5, 8),
        source=Source(
            textwrap.dedent("""\
        one
        \ttwo\x07\u202ethree
        """)
        ),
    )
    assert str(error) == "<cascade>:2:5: here\n  |  two\ufffd\ufffdthree\n  |     ^^^"
