"""The text form: what is printed parses back to the same cascade, and the content key sees structure alone."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from strategies import cascades, random_case

from castile.ir.cascade import Access, Call, Cascade, Cast, Const, Expr, Rank, Reduce, children, negative, rebuild, walk
from castile.ir.dtypes import DTYPES
from castile.ir.errors import CastileError
from castile.ir.key import canonical, rename
from castile.ir.ops import OPS
from castile.ir.parse import load, parse, parse_expr
from castile.ir.print import print_expr
from castile.ir.types import tensor_types
from castile.ir.verify import verify

EXAMPLES = sorted((Path(__file__).parents[2] / "examples" / "cascades").glob("*.cascade"))


@settings(max_examples=200)
@given(cascades())
def test_parse_inverts_print(c: Cascade) -> None:
    verify(c)
    again = parse(str(c))
    assert again == c
    assert str(again) == str(c)
    assert again.key == c.key


def test_parse_inverts_print_on_larger_cascades() -> None:
    for seed in range(300):
        c = random_case(seed).cascade
        assert parse(str(c)) == c


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_examples_keep_their_docstrings(path: Path) -> None:
    c = load(path)
    again = parse(str(c))
    assert again == c
    assert again.doc == c.doc
    assert str(again) == str(c)


@pytest.mark.parametrize(
    "doc",
    [
        "one line",
        "two\nlines",
        "a gap\n\nbetween\n    indented\nback",
        "naïve × ∑ 漢字",
        'quotes " and \' and """ three',
        'ends in a quote"',
        "a \\ backslash\\n",
        "a\ttab, a\rreturn and \x00 and \ud800",
        "trailing    \n    spaces",
        "  starts with spaces",
        "",
    ],
)
def test_docstrings_come_back(doc: str) -> None:
    c = replace(parse("def f(x: f32) -> Y:\n    Y = x"), doc=doc)
    again = parse(str(c))
    assert again == c
    assert parse(str(again)).doc == again.doc
    assert again.doc.split() == doc.split() or "\x00" in doc or "\r" in doc


# Every pair of operations, one inside the other, on either side.


def infix() -> list[str]:
    return [name for name, op in OPS.items() if op.symbol]


def operands(name: str, inner: Expr) -> Iterator[Expr]:
    x = Access("x")
    if OPS[name].arity == 1:
        yield Call(name, (inner,))
        return
    yield Call(name, (inner, x))
    yield Call(name, (x, inner))


@pytest.mark.parametrize("outer", infix())
def test_precedence_survives(outer: str) -> None:
    x, atoms = Access("x"), [Const(2), negative(2), Access("x"), Rank("k"), Cast("f32", Access("x"))]
    inside = [Call(name, (x,) * OPS[name].arity) for name in OPS]
    inside += [Call(name, (negative(1), x)[: OPS[name].arity]) for name in infix()]
    for inner in [*atoms, *inside, Reduce("sum", ("k",), (Rank("k"),))]:
        for e in operands(outer, inner):
            assert parse_expr(print_expr(e), ["x"]) == e, print_expr(e)


@pytest.mark.parametrize("value", [0, 1, 2**63 - 1, 0.0, 0.1, 1e16, 1e-300, 5e-324, float("inf"), True, False])
def test_literals_survive(value: float) -> None:
    e = Const(value)
    again = parse_expr(print_expr(e), [])
    assert again == e
    assert isinstance(again, Const)
    assert type(again.value) is type(value)


def test_other_spellings_of_the_same_text() -> None:
    plain = parse("def f(X: f32[m, k], s: f32) -> Y:\n    Y[m] = s * sum[k](X[m, k])\n")
    for text in [
        "\ufeffdef f(X: f32[m, k], s: f32) -> Y:\r\n    Y[m] = s * sum[k](X[m, k])\r\n",
        "def f(X: f32[m, k], s: f32) -> Y:\r\tY[m] = s * sum[k](X[m, k])",
        "def f(X: f32[(m, k)], s: f32) -> (Y):\n    Y[m] = +s * sum[k](X[m, k]);",
        "# a comment ( [\nfrom __future__ import annotations\nimport castile\n\n"
        "@castile.cascade\ndef f(\n    X: f32[m, k],  # with a (\n    s: f32,\n) -> (\n    Y\n):\n\n    pass\n"
        "    Y[m] = \\\n        s * sum[k](X[m, k])  # )",
    ]:
        assert parse(text) == plain, text


# The content key


def disguised(c: Cascade) -> Cascade:
    """The same cascade under other names."""
    tensors = [p.name for p in c.params] + [o.name for e in c.einsums for o in e.outputs]
    renamed = rename(
        c,
        {n: f"other_{i * 7 % 101}_{n}" for i, n in enumerate(tensors)},
        {r: f"rank{len(c.ranks) - i}" for i, r in enumerate(c.ranks)},
        {m.name: m.name + "_" for m in c.monoids},
    )
    return replace(renamed, name="someone_else", doc="and documented")


def mutations(c: Cascade) -> Iterator[Cascade]:
    """Cascades that differ from this one in one place, well formed or not."""

    def changed(e: Expr) -> Iterator[Expr]:
        match e:
            case Const(value=bool() as value):
                yield Const(not value)
            case Const(value=value):
                yield Const(value + 1)
                yield Const(float(value)) if isinstance(value, int) else Const(2.0 * value + 1)
            case Call(op=op, args=args):
                yield from (Call(n, args) for n in OPS if n != op and OPS[n].arity == len(args))
                if args[0] != args[-1]:
                    yield Call(op, args[::-1])
            case Cast(dtype=dtype, arg=arg):
                yield from (Cast(d, arg) for d in DTYPES if d != dtype)
            case Reduce(op=op, ranks=ranks, args=args):
                yield from (replace(e, op=o) for o in ("sum", "prod", "max", "min", "any") if o != op)
                if len(ranks) > 1:
                    yield replace(e, ranks=ranks[::-1])
            case Rank(name=name):
                yield from (Rank(r) for r in c.ranks if r != name)
            case Access(tensor=tensor, indices=indices):
                yield from (replace(e, tensor=t) for t in (*c.param_of, *c.einsum_of) if t != tensor)
                if len(set(indices)) > 1:
                    yield replace(e, indices=indices[::-1])
        kids = children(e)
        for i, kid in enumerate(kids):
            yield from (rebuild(e, (*kids[:i], k, *kids[i + 1 :])) for k in changed(kid))

    for i, e in enumerate(c.einsums):
        for expr in changed(e.expr):
            yield replace(c, einsums=(*c.einsums[:i], replace(e, expr=expr), *c.einsums[i + 1 :]))
    for i, p in enumerate(c.params):
        for dtype in DTYPES:
            if dtype != p.dtype:
                yield replace(c, params=(*c.params[:i], replace(p, dtype=dtype), *c.params[i + 1 :]))
    if len(c.outputs) > 1:
        yield replace(c, outputs=c.outputs[::-1])
    yield replace(c, numerics="fast" if c.numerics != "fast" else "strict")


@settings(max_examples=60)
@given(cascades())
def test_the_key_sees_no_names(c: Cascade) -> None:
    other = disguised(c)
    verify(other)
    assert other != c
    assert other.key == c.key
    assert canonical(other) == canonical(c)


def test_the_key_sees_everything_else() -> None:
    compared = 0
    for seed in range(60):
        c = random_case(seed, einsums=2).cascade
        keys = {c.key: c}
        for n, other in enumerate(mutations(c)):
            if n % 7 != seed % 7 and n > 20:
                continue
            try:
                verify(other)
            except CastileError:
                continue
            known = keys.setdefault(other.key, other)
            same = known == other or rename_of(known) == rename_of(other)
            assert same, f"{known}\n{other}"
            compared += 1
    assert compared > 1000


def rename_of(c: Cascade) -> str:
    """A normal form by another road than the key's: names replaced in the text, in order of appearance."""
    names = [p.name for p in c.params] + [o.name for e in c.einsums for o in e.outputs]
    text = str(
        rename(c, {n: f"tensor{i}" for i, n in enumerate(names)}, {r: f"rank{i}" for i, r in enumerate(c.ranks)})
    )
    return text + repr(list(tensor_types(c).values()))


def test_a_written_dtype_that_would_be_inferred_is_no_difference() -> None:
    a = parse("def f(X: f32[k]) -> Y:\n    Y = sum[k](X[k])")
    b = parse("def f(X: f32[k]) -> Y:\n    Y: f32 = sum[k](X[k])")
    c = parse("def f(X: f32[k]) -> Y:\n    Y: bf16 = sum[k](X[k])")
    assert a.key == b.key != c.key


def test_the_key_is_the_same_in_another_process() -> None:
    chosen = [random_case(seed).cascade for seed in range(10)] + [load(p) for p in EXAMPLES[:10]]
    program = (
        "import sys\nfrom castile.ir.parse import parse\nfor t in sys.stdin.read().split('\\0'): print(parse(t).key)"
    )
    for hashseed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", program],
            input="\0".join(map(str, chosen)),
            env={**os.environ, "PYTHONHASHSEED": hashseed},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.split() == [c.key for c in chosen]


def test_a_key_that_is_known() -> None:
    """A change of this key makes every record of tuned kernels worthless, so it is made on purpose or not at all."""
    c = parse("def f(X: bf16[m, k], W: bf16[k, n]) -> Y:\n    Y[m, n]: bf16 = sum[k](X[m, k] * W[k, n])")
    assert c.key == "cac8374a9f80536602d05f4712e78ac82c3a94d2cfc768a9a45b79ec0f03c439"


def test_walk_is_in_order_and_iterative() -> None:
    e: Expr = Const(0)
    for _ in range(50_000):
        e = Call("neg", (e,))
    assert sum(1 for _ in walk(e)) == 50_001


def test_a_text_may_be_indented_as_a_whole() -> None:
    text = "def f(X: f32[n]) -> Y:\n    Y[n] = 2 * X[n]\n"
    indented = "\n\n        def f(X: f32[n]) -> Y:\n            Y[n] = 2 * X[n]\n    "
    assert parse(indented) == parse(text)
    with pytest.raises(CastileError, match="3:20"):
        parse("\n    def f(X: f32[n]) -> Y:\n        Y[n] = 2 * Z[n]\n")
