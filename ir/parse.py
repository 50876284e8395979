"""Text to cascade: a Python function definition, read with `ast` and never executed.

The grammar is Python's; this file says which of its sentences mean something. `parse` verifies what it read, so a
cascade that comes out of it is well formed.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from os import PathLike, fspath
from pathlib import Path
from typing import Any, NoReturn, overload

from .cascade import Access, Call, Cascade, Cast, Const, Einsum, Expr, Extent, Monoid, Output, Param, Rank, Reduce, walk
from .dtypes import DTYPES
from .errors import CastileError, InputError, ParseError, Source, UsageError, attach
from .ops import FUNCTIONS, OPS, REDUCTIONS
from .source import MAX_CHARS, location, to_ast
from .verify import verify

NUMERICS = ("standard", "strict", "fast")

_BINARY: dict[type[ast.operator], str] = {
    ast.Add: "add", ast.Sub: "sub", ast.Mult: "mul", ast.Div: "div", ast.FloorDiv: "floordiv", ast.Mod: "mod",
    ast.Pow: "pow", ast.BitAnd: "and", ast.BitOr: "or", ast.LShift: "lshift", ast.RShift: "rshift",
}  # fmt: skip
_COMPARE: dict[type[ast.cmpop], str] = {
    ast.Lt: "lt", ast.LtE: "le", ast.Gt: "gt", ast.GtE: "ge", ast.Eq: "eq", ast.NotEq: "ne",
}  # fmt: skip
_UNARY: dict[type[ast.unaryop], str] = {ast.USub: "neg", ast.Invert: "not"}
_RESERVED = frozenset(DTYPES) | frozenset(FUNCTIONS) | frozenset(REDUCTIONS) | {"inf", "extent", "cascade", "monoid"}

# What people write by habit from elsewhere, and what the language has instead.
_INSTEAD = {
    "pow": "write x ** 2 for an integer power",
    "mean": "write sum[k](x) / extent(k)",
    "softmax": "write its Einsums: a max, an exp, a sum and a division",
    "logsumexp": "write log(sum[k](exp(x - M))) + M with M = max[k](x)",
    "relu": "write maximum(x, 0)",
    "silu": "write x * sigmoid(x)",
    "gelu": "write x * 0.5 * (1 + erf(x * 0.7071067811865476))",
    "len": "write extent(k)",
    "clip": "write minimum(maximum(x, low), high)",
    "float": "write f32(x)",
    "int": "write i32(x)",
}


def parse(text: str, filename: str = "<cascade>", *, monoids: Iterable[Monoid] = ()) -> Cascade:
    """Read a cascade from its text.

    ``monoids`` are reductions defined elsewhere that the text may use. Raises `ParseError` or `VerifyError`, with line,
    column and a hint. Nothing of the text is executed.
    """
    if not isinstance(text, str):
        raise UsageError(f"parse takes a text, not {type(text).__name__}", hint="castile.load(path) reads a file")
    return _parse(Source(text.replace("\r\n", "\n").replace("\r", "\n").removeprefix("\ufeff"), filename), monoids)


def load(path: str | PathLike[str]) -> Cascade:
    """Read a cascade from a UTF-8 file. Raises `InputError` where the file cannot be read, else as `parse` does."""
    name = fspath(path)
    try:
        with Path(name).open("rb") as file:
            raw = file.read(4 * MAX_CHARS + 1)
        return parse(raw.decode("utf-8"), name)
    except OSError as error:
        raise InputError(
            f"cannot read {name}: {error.strerror or error}", hint="give the path of a .cascade file"
        ) from None
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is not UTF-8 text (byte {error.start})", hint="save the file as UTF-8") from None
    except ValueError as error:
        raise InputError(f"cannot read {name!r}: {error}") from None


@overload
def cascade(function: Callable[..., Any], /) -> Cascade: ...
@overload
def cascade(*, numerics: str = ...) -> Callable[[Callable[..., Any]], Cascade]: ...
def cascade(function: Callable[..., Any] | None = None, /, *, numerics: str | None = None) -> Any:
    """Decorator: the cascade that a Python function spells, read from its source and never called.

    Monoids that the function's module defines with `monoid` may be used by name. Raises as `parse` does, with the line
    and column of the module's file.
    """
    if function is None:
        return cascade
    source = _source_of(function)
    known = inspect.getclosurevars(function) if inspect.isfunction(function) else None
    scope: Mapping[str, Any] = {**function.__globals__, **(known.nonlocals if known else {})}
    return _parse(source, [v for v in scope.values() if isinstance(v, Monoid)])


def monoid(*, identity: Any) -> Callable[[Callable[..., Any]], Monoid]:
    """Decorator: the reduction that a Python function spells; ``identity`` is read from the source, like the rest."""

    def read(function: Callable[..., Any]) -> Monoid:
        source = _source_of(function)
        try:
            tree = to_ast(source)
            if len(tree.body) == 1 and isinstance(tree.body[0], ast.FunctionDef):
                return _Reader(source).monoid(tree.body[0])
        except CastileError as error:
            raise attach(error, source) from None
        raise ParseError("@monoid stands above one function", source=source)

    return read


def parse_expr(text: str, tensors: Iterable[str]) -> Expr:
    """Read one expression over the given tensor and scalar names; every other bare name is a rank."""
    source = Source(text.strip())
    try:
        body = to_ast(source).body
        if len(body) != 1 or not isinstance(body[0], ast.Expr):
            raise ParseError("one expression is expected")
        return _Reader(source, tensors=frozenset(tensors)).expr(body[0].value)
    except CastileError as error:
        raise attach(error, source) from None


def _source_of(function: Callable[..., Any]) -> Source:
    try:
        lines, first = inspect.getsourcelines(function)
    except (OSError, TypeError):
        raise ParseError(
            f"the source of `{getattr(function, '__name__', function)}` cannot be found",
            hint="give its text to castile.parse",
        ) from None
    text = "".join(lines)
    dedented = textwrap.dedent(text)
    indent = len(lines[0]) - len(lines[0].lstrip())
    return Source(dedented, inspect.getsourcefile(function) or "<cascade>", first, indent)


def _parse(source: Source, monoids: Iterable[Monoid]) -> Cascade:
    try:
        c = _Reader(source).module(to_ast(source), {m.name: m for m in monoids})
        verify(c)
        return c
    except CastileError as error:
        raise attach(error, source) from None


class _Reader:
    """Turns syntax nodes into IR; holds the source for locations and the names that are tensors."""

    def __init__(
        self, source: Source, tensors: frozenset[str] = frozenset(), monoids: frozenset[str] = frozenset()
    ) -> None:
        self.source = source
        self.tensors = tensors
        self.monoids = monoids

    def fail(self, node: ast.AST, message: str, hint: str = "") -> NoReturn:
        raise ParseError(message, hint=hint, loc=location(node, self.source), source=self.source)

    # Definitions

    def module(self, tree: ast.Module, known: Mapping[str, Monoid]) -> Cascade:
        monoids: dict[str, Monoid] = {}
        found: ast.FunctionDef | None = None
        for index, node in enumerate(tree.body):
            if isinstance(node, ast.Import | ast.ImportFrom) and _harmless_import(node):
                continue
            if index == 0 and _is_docstring(node):
                continue
            if not isinstance(node, ast.FunctionDef):
                self.fail(
                    node,
                    "only function definitions stand in a cascade's text",
                    "put the statements inside `def name(…) -> result:`",
                )
            if any(_decorator_name(d) == "monoid" for d in node.decorator_list):
                m = self.monoid(node)
                if m.name in monoids:
                    self.fail(node, f"the monoid `{m.name}` is defined twice")
                monoids[m.name] = m
            elif found is None:
                found = node
            else:
                self.fail(
                    node,
                    f"a second cascade, `{node.name}`, stands in the text",
                    "one text holds one cascade; monoids stand before it under @monoid",
                )
        if found is None:
            raise ParseError(
                "the text holds no cascade",
                hint="write `def name(X: f32[m, k]) -> Y:` and below it `Y[m] = sum[k](X[m, k])`",
                loc=location(tree, self.source),
            )
        available = {**known, **monoids}
        c = self.definition(found, frozenset(available))
        used = {n.op for e in c.einsums for n in walk(e.expr) if isinstance(n, Reduce)}
        kept = [*monoids, *(n for n in known if n in used and n not in monoids)]
        return replace(c, monoids=tuple(available[n] for n in kept))

    def definition(self, node: ast.FunctionDef, monoids: frozenset[str]) -> Cascade:
        numerics = self.options(node)
        names = [a.arg for a in node.args.args]
        for statement in node.body:
            names += [t.id for t in _targets(statement)]
        reader = _Reader(self.source, frozenset(names), monoids)
        params = reader.params(node.args)
        doc, einsums = "", []
        for index, statement in enumerate(node.body):
            if index == 0 and isinstance(statement, ast.Expr) and _is_docstring(statement):
                doc = inspect.cleandoc(statement.value.value)  # type: ignore[attr-defined]
            elif not isinstance(statement, ast.Pass):
                einsums.append(reader.statement(statement))
        self.name(node, node.name, "a cascade", allow=frozenset(DTYPES) | frozenset(FUNCTIONS) | frozenset(REDUCTIONS))
        return Cascade(node.name, params, tuple(einsums), self.results(node), numerics=numerics, doc=doc)

    def options(self, node: ast.FunctionDef) -> str:
        numerics = "standard"
        for decorator in node.decorator_list:
            if _decorator_name(decorator) != "cascade":
                self.fail(decorator, "an unknown decorator", '@cascade, or @cascade(numerics="strict")')
            if not isinstance(decorator, ast.Call):
                continue
            if decorator.args:
                self.fail(
                    decorator.args[0], "@cascade takes its options by keyword", 'write @cascade(numerics="strict")'
                )
            for keyword in decorator.keywords:
                value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
                if keyword.arg != "numerics":
                    self.fail(keyword, f"@cascade has no option `{keyword.arg}`", "its option is numerics")
                if value not in NUMERICS:
                    self.fail(keyword.value, "numerics is one of " + ", ".join(f'"{n}"' for n in NUMERICS))
                numerics = str(value)
        return numerics

    def results(self, node: ast.FunctionDef) -> tuple[str, ...]:
        returns = node.returns
        if returns is None:
            self.fail(
                node,
                f"`{node.name}` does not say what it returns",
                "write `-> O:` or `-> (O, L):` after the parameters",
            )
        elements = returns.elts if isinstance(returns, ast.Tuple) else [returns]
        names = []
        for element in elements:
            if not isinstance(element, ast.Name):
                self.fail(
                    element, "a result is the name of a tensor that the cascade writes", "write `-> O:` or `-> (O, L):`"
                )
            if element.id in names:
                self.fail(element, f"`{element.id}` is returned twice")
            names.append(element.id)
        if not names:
            self.fail(returns, "a cascade returns at least one tensor")
        return tuple(names)

    def params(self, args: ast.arguments) -> tuple[Param, ...]:
        for odd in (args.vararg, args.kwarg, *args.kwonlyargs, *args.posonlyargs, *args.defaults):
            if odd is not None:
                self.fail(
                    odd,
                    "a cascade's parameters are plain names with a type, without defaults or stars",
                    "write `X: f32[m, k]`",
                )
        params = []
        for arg in args.args:
            self.name(arg, arg.arg, "a parameter")
            if arg.arg == "out":
                self.fail(
                    arg,
                    "a parameter cannot be called `out`",
                    "kernels take `out=` for their results; choose another name",
                )
            loc = location(arg, self.source)
            match arg.annotation:
                case None:
                    self.fail(
                        arg,
                        f"`{arg.arg}` has no type",
                        f"write `{arg.arg}: f32[m, k]`, or `{arg.arg}: f32` for a scalar",
                    )
                case ast.Subscript(value=ast.Name() as dtype, slice=index):
                    indices = tuple(self.expr(i) for i in _elements(index))
                    params.append(Param(arg.arg, self.dtype(dtype), indices, loc))
                case ast.Name() as dtype:
                    params.append(Param(arg.arg, self.dtype(dtype), (), loc))
                case other:
                    self.fail(
                        other,
                        f"`{arg.arg}` has no type that castile knows",
                        "write `X: f32[m, k]`, or `x: f32` for a scalar",
                    )
        return tuple(params)

    def dtype(self, node: ast.expr) -> str:
        if not isinstance(node, ast.Name) or node.id not in DTYPES:
            name = node.id if isinstance(node, ast.Name) else "this"
            self.fail(node, f"`{name}` is no dtype", _meant(name, DTYPES) or "the dtypes are " + " ".join(DTYPES))
        return node.id

    def name(self, node: ast.AST, name: str, what: str, allow: frozenset[str] = frozenset()) -> str:
        if name in _RESERVED - allow:
            self.fail(node, f"`{name}` is a word of the language and cannot name {what}", "choose another name")
        return name

    def monoid(self, node: ast.FunctionDef) -> Monoid:
        decorator = next(d for d in node.decorator_list if _decorator_name(d) == "monoid")
        keywords = decorator.keywords if isinstance(decorator, ast.Call) else []
        if len(node.decorator_list) != 1 or len(keywords) != 1 or keywords[0].arg != "identity":
            self.fail(decorator, "a monoid says its identity", "write @monoid(identity=(-inf, 0.0)) above the function")
        identity = tuple(self.expr(e) for e in _elements(keywords[0].value))
        params = tuple(self.name(a, a.arg, "a monoid's parameter") for a in node.args.args)
        if len(params) != 2 * len(identity) or len(set(params)) != len(params):
            self.fail(
                node,
                f"a state of {len(identity)} takes {2 * len(identity)} parameters; `{node.name}` has {len(params)}",
                "first the accumulated state, then the new element, each with one name a component",
            )
        self.name(node, node.name, "a monoid")
        reader = _Reader(self.source, frozenset(params))
        body: list[tuple[str, Expr]] = []
        for index, statement in enumerate(node.body):
            if isinstance(statement, ast.Pass) or (index == 0 and _is_docstring(statement)):
                continue
            if (
                not isinstance(statement, ast.Assign)
                or len(statement.targets) != 1
                or not isinstance(statement.targets[0], ast.Name)
            ):
                self.fail(statement, "a monoid's statements assign scalars", "write `M = maximum(m, n)`")
            target = statement.targets[0].id
            if target in reader.tensors:
                self.fail(statement, f"`{target}` is assigned twice")
            body.append((self.name(statement, target, "a value"), reader.expr(statement.value)))
            reader = _Reader(self.source, reader.tensors | {target})
        results = self.results(node)
        return Monoid(node.name, identity, params, results, tuple(body), location(node, self.source))

    # Statements

    def statement(self, node: ast.stmt) -> Einsum:
        loc = location(node, self.source)
        match node:
            case ast.Assign(targets=[ast.Tuple(elts=targets)], value=value):
                outputs = tuple(self.output(t) for t in targets)
            case ast.Assign(targets=[target], value=value):
                outputs = (self.output(target),)
            case ast.AnnAssign(target=target, annotation=annotation, value=ast.expr() as value):
                outputs = (replace(self.output(target), dtype=self.dtype(annotation)),)
            case ast.AnnAssign():
                self.fail(node, "a declaration without a value", "write `X[q]: bf16 = expression`")
            case ast.AugAssign():
                self.fail(node, "tensors are written once, so there is no `+=`", "write sum[k](…) for an accumulation")
            case ast.Return():
                self.fail(node, "a cascade has no `return`", "the results stand in the signature: `-> O:`")
            case ast.For() | ast.While():
                self.fail(
                    node,
                    "a cascade has no loops",
                    "ranks iterate by themselves; a reduction is sum[k](…), a scan reads H[t - 1]",
                )
            case ast.If():
                self.fail(node, "a cascade has no `if`", "write where(condition, a, b)")
            case _:
                self.fail(node, "not a statement of the language", "statements are `T[ranks] = expression`")
        if not outputs:
            self.fail(node, "nothing stands on the left")
        return Einsum(outputs, self.expr(value), loc)

    def output(self, node: ast.expr) -> Output:
        loc = location(node, self.source)
        match node:
            case ast.Name(id=name):
                return Output(self.name(node, name, "a tensor"), (), None, loc)
            case ast.Subscript(value=ast.Name(id=name), slice=index):
                ranks: list[str] = []
                for element in _elements(index):
                    if not isinstance(element, ast.Name) or element.id in self.tensors:
                        self.fail(
                            element,
                            "the left side's indices are plain ranks",
                            "move arithmetic on indices to the right side",
                        )
                    if element.id in ranks:
                        self.fail(
                            element,
                            f"rank `{element.id}` stands twice on the left",
                            "a diagonal is written with where(i == j, …, 0)",
                        )
                    ranks.append(self.name(element, element.id, "a rank"))
                return Output(self.name(node, name, "a tensor"), tuple(ranks), None, loc)
            case _:
                self.fail(node, "the left side is a tensor with its ranks", "write `T[q, k] = …`")

    # Expressions

    def expr(self, node: ast.expr) -> Expr:
        loc = location(node, self.source)
        match node:
            case ast.Constant(value=bool() | int() | float() as value):
                if isinstance(value, int) and value >= 1 << 63:
                    self.fail(node, "an integer past 2^63 - 1 fits no type", "write it as a float")
                return Const(value, loc)
            case ast.Name(id="inf"):
                return Const(float("inf"), loc)
            case ast.Name(id=name):
                if name in self.tensors:
                    return Access(name, (), loc)
                return Rank(self.name(node, name, "a rank"), loc)
            case ast.BinOp(left=left, op=op, right=right):
                if type(op) not in _BINARY:
                    self.fail(node, "an operator that the language does not have", "it has + - * / // % ** & | << >>")
                return Call(_BINARY[type(op)], (self.expr(left), self.expr(right)), loc)
            case ast.UnaryOp(op=ast.UAdd(), operand=operand):
                return self.expr(operand)
            case ast.UnaryOp(op=ast.Not()):
                self.fail(node, "`not` stands for one truth value, not a tensor of them", "write ~(condition)")
            case ast.UnaryOp(op=op, operand=operand):
                return Call(_UNARY[type(op)], (self.expr(operand),), loc)
            case ast.Compare(left=left, ops=[op], comparators=[right]):
                if type(op) not in _COMPARE:
                    self.fail(node, "a comparison that the language does not have", "it has < <= > >= == !=")
                return Call(_COMPARE[type(op)], (self.expr(left), self.expr(right)), loc)
            case ast.Compare():
                self.fail(node, "comparisons do not chain", "write (a <= b) & (b < c)")
            case ast.BoolOp():
                word = "and" if isinstance(node.op, ast.And) else "or"
                sign = "&" if word == "and" else "|"
                self.fail(
                    node, f"`{word}` stands for one truth value, not a tensor of them", f"write (a < b) {sign} (c < d)"
                )
            case ast.IfExp():
                self.fail(node, "`a if c else b` chooses once, not for each element", "write where(c, a, b)")
            case ast.Subscript(value=ast.Name(id=name), slice=index):
                return self.access(node, name, index)
            case ast.Call():
                return self.call(node)
            case ast.Constant(value=value):
                self.fail(node, f"{type(value).__name__} literals do not occur in a cascade")
            case _:
                self.fail(
                    node,
                    "not an expression of the language",
                    "it has numbers, T[i, j], + - * / // % **, comparisons, where(c, a, b), functions and op[k](…)",
                )

    def access(self, node: ast.expr, name: str, index: ast.expr) -> Expr:
        if name in REDUCTIONS or name in self.monoids:
            self.fail(node, f"`{name}[…]` lacks its argument", f"write {name}[k](expression)")
        if name not in self.tensors:
            hint = _meant(name, self.tensors) or "a tensor is a parameter or stands on the left of a statement"
            self.fail(node, f"no tensor is called `{name}`", hint)
        indices = tuple(self.expr(i) for i in _elements(index))
        return Access(name, indices, location(node, self.source))

    def call(self, node: ast.Call) -> Expr:
        loc = location(node, self.source)
        for keyword in node.keywords:
            self.fail(keyword.value, "functions take their arguments by position")
        match node.func:
            case ast.Subscript(value=ast.Name(id=name), slice=index):
                return self.reduction(node, name, index)
            case ast.Name(id="extent"):
                if len(node.args) != 1 or not isinstance(node.args[0], ast.Name) or node.args[0].id in self.tensors:
                    self.fail(node, "extent takes one rank", "write extent(k)")
                return Extent(node.args[0].id, loc)
            case ast.Name(id=name) if name in DTYPES:
                if len(node.args) != 1:
                    self.fail(node, f"the cast {name}(x) takes one argument")
                return Cast(name, self.expr(node.args[0]), loc)
            case ast.Name(id=name) if name in FUNCTIONS:
                arity = OPS[name].arity
                if len(node.args) != arity:
                    self.fail(node, f"`{name}` takes {arity} argument{'s' * (arity > 1)}; {len(node.args)} came")
                return Call(name, tuple(self.expr(a) for a in node.args), loc)
            case ast.Name(id=name):
                if name in REDUCTIONS or name in self.monoids:
                    pointwise = {
                        "max": "; the larger of two is maximum(a, b)",
                        "min": "; the smaller of two is minimum(a, b)",
                    }
                    hint = f"write {name}[k](expression){pointwise.get(name, '')}"
                    self.fail(node, f"the reduction `{name}` does not say over which ranks", hint)
                hint = (
                    _INSTEAD.get(name)
                    or _meant(name, [*FUNCTIONS, *DTYPES])
                    or "the functions are " + " ".join(FUNCTIONS)
                )
                if name in self.tensors:
                    hint = f"elements are read with brackets: {name}[…]"
                self.fail(node, f"no function is called `{name}`", hint)
            case func:
                self.fail(func, "only functions of the language are called", "the functions are " + " ".join(FUNCTIONS))

    def reduction(self, node: ast.Call, name: str, index: ast.expr) -> Expr:
        if name not in REDUCTIONS and name not in self.monoids:
            hint = _meant(name, [*REDUCTIONS, *self.monoids]) or "the reductions are " + " ".join(
                [*REDUCTIONS, *self.monoids]
            )
            self.fail(node.func, f"no reduction is called `{name}`", _INSTEAD.get(name) or hint)
        ranks: list[str] = []
        for element in _elements(index):
            if not isinstance(element, ast.Name) or element.id in self.tensors:
                what = f"`{element.id}` is a tensor" if isinstance(element, ast.Name) else "this is no rank"
                self.fail(element, f"a reduction goes over ranks; {what}", f"write {name}[k](expression)")
            if element.id in ranks:
                self.fail(element, f"rank `{element.id}` is reduced twice")
            ranks.append(self.name(element, element.id, "a rank"))
        if not ranks:
            self.fail(node, f"`{name}[]` goes over no rank")
        if name in REDUCTIONS and len(node.args) != 1:
            self.fail(node, f"`{name}` takes one argument; {len(node.args)} came")
        return Reduce(name, tuple(ranks), tuple(self.expr(a) for a in node.args), location(node, self.source))


def _elements(index: ast.expr) -> list[ast.expr]:
    return list(index.elts) if isinstance(index, ast.Tuple) else [index]


def _targets(statement: ast.stmt) -> list[ast.Name]:
    """The names that a statement writes."""
    match statement:
        case ast.Assign(targets=[target]) | ast.AnnAssign(target=target):
            named = [t.value if isinstance(t, ast.Subscript) else t for t in _elements(target)]
            return [t for t in named if isinstance(t, ast.Name)]
        case _:
            return []


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _harmless_import(node: ast.Import | ast.ImportFrom) -> bool:
    """`from __future__ import annotations` and imports of castile may stand in a file that is also a Python module."""
    if isinstance(node, ast.ImportFrom):
        return node.module in ("__future__", "castile")
    return all(a.name == "castile" for a in node.names)


def _decorator_name(node: ast.expr) -> str:
    if isinstance(node, ast.Call):
        node = node.func
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _meant(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name[:40], list(known), n=1, cutoff=0.6)
    return f"did you mean `{close[0]}`?" if close else ""
