"""Text to cascade: a Python function definition, read with `ast` and never executed.

The grammar is Python's; this file says which of its sentences mean something. `parse` verifies what it read, so a
cascade that comes out of it is well formed.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from os import PathLike, fsdecode
from pathlib import Path
from typing import Any, overload

from .cascade import (
    NUMERICS,
    Cascade,
    Einsum,
    Expr,
    Monoid,
    Output,
    Param,
    Reduce,
    walk,
)
from .dtypes import DTYPES
from .errors import CastileError, InputError, Loc, ParseError, Source, UsageError, attach, did_you_mean
from .expressions import EXPRESSIONS, ExpressionReader, elements
from .ops import FUNCTIONS, REDUCTIONS
from .source import MAX_CHARS, location, to_ast
from .verify import verify

_DTYPES_ELSEWHERE = {"float": "f32", "double": "f64", "half": "f16", "int": "i32", "long": "i64", "byte": "u8"}
_NO_IMPORTS = "all that the language has is there without an import"


def parse(text: str, filename: str = "<cascade>", *, monoids: Iterable[Monoid] = ()) -> Cascade:
    """Read a cascade from its text.

    It may be indented as a whole. ``monoids`` are reductions defined elsewhere that the text may use. Raises
    `ParseError` or `VerifyError`, with line, column and a hint. Nothing of the text is executed.
    """
    if not isinstance(text, str):
        raise UsageError(f"parse takes a text, not {type(text).__name__}", hint="castile.load(path) reads a file")
    text = text.replace("\r\n", "\n").replace("\r", "\n").removeprefix("\ufeff")
    first = next((line for line in text.split("\n") if line.strip()), "")
    # A text that stands in a function of Python's may be indented as a whole.
    return _parse(Source(text, filename, indented=first[:1].isspace()), {m.name: m for m in monoids})


def load(path: str | PathLike[str]) -> Cascade:
    """Read a cascade from a UTF-8 file. Raises `InputError` where the file cannot be read, else as `parse` does."""
    try:
        name = fsdecode(path)
    except TypeError:
        raise UsageError(
            f"load takes a path, not {type(path).__name__}", hint="castile.parse(text) reads a text"
        ) from None
    try:
        with Path(name).open("rb") as file:
            raw = file.read(4 * MAX_CHARS + 4)
        text = raw.decode("utf-8", errors="strict" if len(raw) <= 4 * MAX_CHARS else "replace")
    except OSError as error:
        message = f"cannot read {name}: {error.strerror or error}"
        raise InputError(message, hint="give the path of a .cascade file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is not UTF-8 text (byte {error.start})", hint="save the file as UTF-8") from None
    except ValueError as error:
        raise InputError(f"cannot read {name!r}: {error}", hint="give the path of a .cascade file") from None
    return parse(text, name)


@overload
def cascade(function: Callable[..., Any], /) -> Cascade: ...
@overload
def cascade(*, numerics: str = ...) -> Callable[[Callable[..., Any]], Cascade]: ...
def cascade(function: Callable[..., Any] | None = None, /, *, numerics: str | None = None) -> Any:
    """Decorator: the cascade that a Python function spells, read from its source and never called.

    Monoids that the function's module or an enclosing function defines with `monoid` may be used by name, and options
    are read from the source like everything else. Raises as `parse` does, with line and column of the module's file.
    """
    if function is None:
        return cascade
    names = dict(getattr(function, "__globals__", {}))
    code = getattr(function, "__code__", None)
    for name, cell in zip(getattr(code, "co_freevars", ()), getattr(function, "__closure__", None) or (), strict=False):
        try:
            names[name] = cell.cell_contents
        except ValueError:  # the enclosing function has not assigned it yet
            names.pop(name, None)
    known = {name: replace(v, name=name) for name, v in names.items() if isinstance(v, Monoid)}
    return _parse(_source_of(function), known)


def monoid(*, identity: Any) -> Callable[[Callable[..., Any]], Monoid]:
    """Decorator: the reduction that a Python function spells; ``identity`` is read from the source, like the rest."""

    def read(function: Callable[..., Any]) -> Monoid:
        source = _source_of(function)
        try:
            body = to_ast(source)
            if len(body) != 1 or not isinstance(body[0], ast.FunctionDef):
                raise ParseError(
                    "@monoid stands above one function", hint="write `def name(…) -> (…):`", loc=Loc(1, 1, 2)
                )
            return _Reader(source).monoid(body[0])
        except CastileError as error:
            raise attach(error, source) from None

    return read


def parse_expr(text: str, tensors: Iterable[str]) -> Expr:
    """Read one expression over the given tensor and scalar names; every other bare name is a rank."""
    source = Source(text.strip())
    try:
        body = to_ast(source)
        if len(body) != 1 or not isinstance(body[0], ast.Expr):
            raise ParseError("one expression is expected", hint=EXPRESSIONS, loc=Loc(1, 1, 2))
        return _Reader(source, tensors=frozenset(tensors)).expr(body[0].value)
    except CastileError as error:
        raise attach(error, source) from None


def _source_of(function: Callable[..., Any]) -> Source:
    try:
        lines, first = inspect.getsourcelines(function)
    except (OSError, TypeError, SyntaxError):
        name = getattr(function, "__name__", str(function))
        message = f"the source of `{name}` cannot be found"
        raise ParseError(message, hint="give its text to castile.parse") from None
    indented = lines[0][:1].isspace()
    return Source("".join(lines), inspect.getsourcefile(function) or "<cascade>", first, indented)


def _parse(source: Source, monoids: Mapping[str, Monoid]) -> Cascade:
    reader = _Reader(source)
    try:
        c = reader.module(to_ast(source), monoids)
        verify(c)
        object.__setattr__(c, "source", source)
        return c
    except RecursionError:
        # The caller's own stack is nearly full: what is left holds no expression of the depth that is allowed.
        message = "the text nests too deep for the stack that is left"
        raise ParseError(message, hint="parse it higher up", loc=reader.signature, source=source) from None
    except CastileError as error:
        # What has no place of its own is wrong with what the signature promises.
        error.loc = error.loc or reader.signature
        raise attach(error, source) from None


class _Reader(ExpressionReader):
    """Turns definitions and statements into IR."""

    def module(self, body: list[ast.stmt], known: Mapping[str, Monoid]) -> Cascade:
        monoids: dict[str, Monoid] = {}
        found: ast.FunctionDef | None = None
        for index, node in enumerate(body):
            if isinstance(node, ast.Import | ast.ImportFrom):
                if not _harmless_import(node):
                    self.fail(node, "a cascade imports nothing", _NO_IMPORTS)
            elif index == 0 and _is_docstring(node):
                continue
            elif not isinstance(node, ast.FunctionDef):
                hint = "put the statements inside `def name(…) -> result:`"
                self.fail(node, "only function definitions stand in a cascade's text", hint)
            elif any(_decorator_name(d) == "monoid" for d in node.decorator_list):
                m = self.monoid(node)
                if m.name in monoids:
                    self.fail(node, f"the monoid `{m.name}` is defined twice", "give the second its own name")
                monoids[m.name] = m
            elif found is None:
                found = node
            else:
                hint = "one text holds one cascade; monoids stand before it under @monoid"
                self.fail(node, f"a second cascade, `{node.name}`, stands in the text", hint)
        if found is None:
            hint = "write `def name(X: f32[m, k]) -> Y:` and below it `Y[m] = sum[k](X[m, k])`"
            raise ParseError("the text holds no cascade", hint=hint, loc=Loc(1, 1, 2), source=self.source)
        available = {**known, **monoids}
        c = self.definition(found, frozenset(available))
        used = {n.op for e in c.einsums for n in walk(e.expr) if isinstance(n, Reduce)}
        kept = [*monoids, *(n for n in known if n in used and n not in monoids)]
        return replace(c, monoids=tuple(available[n] for n in kept))

    def definition(self, node: ast.FunctionDef, monoids: frozenset[str]) -> Cascade:
        numerics = self.options(node)
        self.plain(node)
        self.signature = location(node.returns or node, self.source)
        names = [a.arg for a in node.args.args]
        for statement in node.body:
            names += _targets(statement)
        reader = _Reader(self.source, frozenset(names), monoids)
        params = reader.params(node.args)
        doc, einsums = "", []
        for index, statement in enumerate(node.body):
            if index == 0 and _is_docstring(statement):
                doc = inspect.cleandoc(statement.value.value).strip()  # type: ignore[attr-defined]
            elif not isinstance(statement, ast.Pass):
                einsums.append(reader.statement(statement))
        words = frozenset(DTYPES) | frozenset(FUNCTIONS) | frozenset(REDUCTIONS)
        name = self.name(node, node.name, "a cascade", allowed=words)
        return Cascade(name, params, tuple(einsums), self.results(node), numerics=numerics, doc=doc)

    def plain(self, node: ast.FunctionDef) -> None:
        """Refuse what Python's functions have beyond plain parameters."""
        if generic := getattr(node, "type_params", None):
            self.fail(generic[0], f"`{node.name}` has type parameters", "ranks need no declaration")
        args = node.args
        for odd in (args.vararg, args.kwarg, *args.kwonlyargs, *args.posonlyargs, *args.defaults):
            if odd is not None:
                message = "parameters are plain names, without defaults or stars"
                self.fail(odd, message, "write `X: f32[m, k]`, or in a monoid `m`")

    def options(self, node: ast.FunctionDef) -> str:
        numerics = "standard"
        for decorator in node.decorator_list:
            if _decorator_name(decorator) != "cascade":
                self.fail(decorator, "an unknown decorator", 'write @cascade, or @cascade(numerics="strict")')
            if not isinstance(decorator, ast.Call):
                continue
            if decorator.args:
                hint = 'write @cascade(numerics="strict")'
                self.fail(decorator.args[0], "@cascade takes its options by keyword", hint)
            for word in decorator.keywords:
                value = word.value.value if isinstance(word.value, ast.Constant) else None
                if word.arg != "numerics":
                    self.fail(word.value, f"@cascade has no option `{word.arg or '**'}`", "its option is numerics")
                if value not in NUMERICS:
                    hint = "it is one of " + ", ".join(f'"{n}"' for n in NUMERICS)
                    self.fail(word.value, "an unknown value of numerics", hint)
                numerics = str(value)
        return numerics

    def results(self, node: ast.FunctionDef) -> tuple[str, ...]:
        returns = node.returns
        hint = "write `-> O:` or `-> (O, L):` after the parameters"
        if returns is None:
            self.fail(node, f"`{node.name}` does not say what it returns", hint)
        names: list[str] = []
        for element in elements(returns):
            if not isinstance(element, ast.Name):
                self.fail(element, "a result is the name of something that is written below", hint)
            if element.id in names:
                self.fail(element, f"`{element.id}` is returned twice", "name each result once")
            names.append(element.id)
        if not names:
            self.fail(returns, f"`{node.name}` returns nothing", hint)
        return tuple(names)

    def params(self, args: ast.arguments) -> tuple[Param, ...]:
        params = []
        for arg in args.args:
            name = self.name(arg, arg.arg, "a parameter")
            if name == "out":
                hint = "kernels take `out=` for their results; choose another name"
                self.fail(arg, "a parameter cannot be called `out`", hint)
            loc = location(arg, self.source)
            hint = f"write `{name}: f32[m, k]`, or `{name}: f32` for a scalar"
            match arg.annotation:
                case None:
                    self.fail(arg, f"`{name}` has no type", hint)
                case ast.Subscript(value=ast.Name() as dtype, slice=index):
                    params.append(Param(name, self.dtype(dtype), self.indices(index), loc))
                case ast.Name() as dtype:
                    params.append(Param(name, self.dtype(dtype), (), loc))
                case other:
                    self.fail(other, f"`{name}` has no type that castile knows", hint)
        return tuple(params)

    def dtype(self, node: ast.expr) -> str:
        if not isinstance(node, ast.Name):
            self.fail(node, "a dtype is a plain name", "the dtypes are " + " ".join(DTYPES))
        if node.id not in DTYPES:
            meant = _DTYPES_ELSEWHERE.get(node.id)
            hint = f"write {meant}" if meant else did_you_mean(node.id, DTYPES) or "the dtypes are " + " ".join(DTYPES)
            self.fail(node, f"`{node.id}` is no dtype", hint)
        return node.id

    def monoid(self, node: ast.FunctionDef) -> Monoid:
        decorator = next(d for d in node.decorator_list if _decorator_name(d) == "monoid")
        words = decorator.keywords if isinstance(decorator, ast.Call) and not decorator.args else []
        if len(node.decorator_list) != 1 or len(words) != 1 or words[0].arg != "identity":
            hint = "write @monoid(identity=(-inf, 0.0)) above the function, and nothing else"
            self.fail(decorator, "a monoid says its identity", hint)
        self.plain(node)
        identity = tuple(self.expr(e) for e in elements(words[0].value))
        params = tuple(self.name(a, a.arg, "a monoid's parameter") for a in node.args.args)
        if len(params) != 2 * len(identity) or len(set(params)) != len(params):
            message = (
                f"a state of {len(identity)} takes {2 * len(identity)} parameters; `{node.name}` has {len(params)}"
            )
            self.fail(node, message, "first the accumulated state, then the new element, with one name a component")
        self.name(node, node.name, "a monoid")
        values = set(params)
        body: list[tuple[str, Expr]] = []
        for index, statement in enumerate(node.body):
            match statement:
                case ast.Pass():
                    continue
                case ast.Expr() if index == 0 and _is_docstring(statement):
                    continue
                case ast.Assign(targets=[ast.Name(id=target) as place], value=value):
                    if target in values:
                        self.fail(place, f"`{target}` is assigned twice", "give the second value its own name")
                    read = _Reader(self.source, frozenset(values)).expr(value)
                    body.append((self.name(place, target, "a value"), read))
                    values.add(target)
                case _:
                    self.fail(statement, "a monoid's statements assign scalars", "write `M = maximum(m, n)`")
        return Monoid(node.name, identity, params, self.results(node), tuple(body), location(node, self.source))

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
            case ast.Import() | ast.ImportFrom():
                self.fail(node, "a cascade imports nothing", _NO_IMPORTS)
            case ast.Expr(value=ast.Compare(ops=[ast.Eq()])):
                self.fail(node, "`==` compares and writes nothing", "write `T[ranks] = expression`")
            case ast.Expr():
                self.fail(node, "the value is given to nothing", "statements are `T[ranks] = expression`")
            case _:
                self.fail(node, "not a statement of the language", "statements are `T[ranks] = expression`")
        if not outputs:
            self.fail(node, "nothing stands on the left", "statements are `T[ranks] = expression`")
        return Einsum(outputs, self.expr(value), loc)

    def output(self, node: ast.expr) -> Output:
        loc = location(node, self.source)
        match node:
            case ast.Name(id=name):
                return Output(self.name(node, name, "a tensor"), (), None, loc)
            case ast.Subscript(value=ast.Name(id=name), slice=index):
                ranks: list[str] = []
                for element in elements(index):
                    if not isinstance(element, ast.Name) or element.id in self.tensors:
                        hint = "move arithmetic on indices to the right side"
                        self.fail(element, "the left side's indices are plain ranks", hint)
                    if element.id in ranks:
                        hint = "a diagonal is written with where(i == j, …, 0)"
                        self.fail(element, f"rank `{element.id}` stands twice on the left", hint)
                    ranks.append(self.name(element, element.id, "a rank"))
                return Output(self.name(node, name, "a tensor"), tuple(ranks), None, loc)
            case _:
                self.fail(node, "the left side is a tensor with its ranks", "write `T[q, k] = …`")


def _targets(statement: ast.stmt) -> list[str]:
    """The names that a statement writes."""
    match statement:
        case ast.Assign(targets=[target]) | ast.AnnAssign(target=target):
            named = [t.value if isinstance(t, ast.Subscript) else t for t in elements(target)]
            return [t.id for t in named if isinstance(t, ast.Name)]
        case _:
            return []


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _harmless_import(node: ast.Import | ast.ImportFrom) -> bool:
    """`from __future__ import annotations` and imports of castile may stand in a file that is also a Python module."""
    if isinstance(node, ast.ImportFrom):
        return node.module in ("__future__", "castile") and not node.level
    return all(a.name == "castile" for a in node.names)


def _decorator_name(node: ast.expr) -> str:
    if isinstance(node, ast.Call):
        node = node.func
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
