"""Text to cascade: a Python function definition, read with `ast` and never executed.

The grammar is Python's; this file says which of its sentences mean something. `parse` verifies what it read, so a
cascade that comes out of it is well formed.
"""

from __future__ import annotations

import ast
import inspect
import keyword
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from os import PathLike, fsdecode
from pathlib import Path
from typing import Any, NoReturn, overload

from .cascade import (
    MAX_DEPTH,
    NUMERICS,
    Access,
    Call,
    Cascade,
    Cast,
    Const,
    Einsum,
    Expr,
    Extent,
    Monoid,
    Output,
    Param,
    Rank,
    Reduce,
    walk,
)
from .dtypes import DTYPES
from .errors import CastileError, InputError, Loc, ParseError, Source, UsageError, attach, did_you_mean
from .ops import FUNCTIONS, OPS, REDUCTIONS, RESERVED
from .source import MAX_CHARS, Located, location, to_ast
from .verify import verify

_BINARY: dict[type[ast.operator], str] = {
    ast.Add: "add", ast.Sub: "sub", ast.Mult: "mul", ast.Div: "div", ast.FloorDiv: "floordiv", ast.Mod: "mod",
    ast.Pow: "pow", ast.BitAnd: "and", ast.BitOr: "or", ast.LShift: "lshift", ast.RShift: "rshift",
}  # fmt: skip
_COMPARE: dict[type[ast.cmpop], str] = {
    ast.Lt: "lt", ast.LtE: "le", ast.Gt: "gt", ast.GtE: "ge", ast.Eq: "eq", ast.NotEq: "ne",
}  # fmt: skip
_UNARY: dict[type[ast.unaryop], str] = {ast.USub: "neg", ast.Invert: "not"}

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
    "range": "a rank used as a value is its coordinate",
    "clip": "write minimum(maximum(x, low), high)",
    "float": "write f32(x)",
    "int": "write i32(x)",
}
_DTYPES_ELSEWHERE = {"float": "f32", "double": "f64", "half": "f16", "int": "i32", "long": "i64", "byte": "u8"}
_POINTWISE = {"max": "; the larger of two is maximum(a, b)", "min": "; the smaller of two is minimum(a, b)"}
_NO_IMPORTS = "all that the language has is there without an import"
_EXPRESSIONS = "it has numbers, T[i, j], + - * / // % **, comparisons, where(c, a, b), functions and op[k](…)"


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
            raise ParseError("one expression is expected", hint=_EXPRESSIONS, loc=Loc(1, 1, 2))
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


class _Reader:
    """Turns syntax nodes into IR; holds the source for locations and the names that are tensors."""

    def __init__(
        self, source: Source, tensors: frozenset[str] = frozenset(), monoids: frozenset[str] = frozenset()
    ) -> None:
        self.source = source
        self.tensors = tensors
        self.monoids = monoids
        self.depth = 0
        self.signature = Loc(1, 1, 2)

    def fail(self, node: Located, message: str, hint: str) -> NoReturn:
        raise ParseError(message, hint=hint, loc=location(node, self.source), source=self.source)

    # Definitions

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
        for element in _elements(returns):
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

    def name(self, node: Located, name: str, what: str, allowed: frozenset[str] = frozenset()) -> str:
        if name in RESERVED - allowed or keyword.iskeyword(name):
            hint = "its size is extent(k)" if name == "extent" else "choose another name"
            self.fail(node, f"`{name}` is a word of the language and cannot name {what}", hint)
        return name

    def monoid(self, node: ast.FunctionDef) -> Monoid:
        decorator = next(d for d in node.decorator_list if _decorator_name(d) == "monoid")
        words = decorator.keywords if isinstance(decorator, ast.Call) and not decorator.args else []
        if len(node.decorator_list) != 1 or len(words) != 1 or words[0].arg != "identity":
            hint = "write @monoid(identity=(-inf, 0.0)) above the function, and nothing else"
            self.fail(decorator, "a monoid says its identity", hint)
        self.plain(node)
        identity = tuple(self.expr(e) for e in _elements(words[0].value))
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
                for element in _elements(index):
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

    # Expressions

    def expr(self, node: ast.expr) -> Expr:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            hint = "name a part of it as an Einsum of its own"
            self.fail(node, f"an expression nests deeper than {MAX_DEPTH} levels", hint)
        read = self._expr(node)
        self.depth -= 1
        return read

    def _expr(self, node: ast.expr) -> Expr:
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
            case ast.BinOp(op=ast.MatMult()):
                self.fail(node, "the language has no `@`", "write sum[k](A[m, k] * B[k, n])")
            case ast.BinOp(left=left, op=op, right=right):
                return Call(_BINARY[type(op)], (self.expr(left), self.expr(right)), loc)
            case ast.UnaryOp(op=ast.UAdd(), operand=operand):
                return self.expr(operand)
            case ast.UnaryOp(op=op, operand=operand):
                return Call(_UNARY[type(op)], (self.expr(operand),), loc)
            case ast.Compare(left=left, ops=[op], comparators=[right]):
                return Call(_COMPARE[type(op)], (self.expr(left), self.expr(right)), loc)
            case ast.Compare():
                hint = "write (a <= b) & (b < c); comparisons joined by `&` or `|` need parentheses"
                self.fail(node, "comparisons do not chain", hint)
            case ast.Subscript(value=ast.Name(id=name), slice=index):
                return self.access(node, name, index)
            case ast.Call():
                return self.call(node)
            case ast.Constant(value=value):
                self.fail(node, f"{type(value).__name__} literals do not occur in a cascade", _EXPRESSIONS)
            case ast.Slice():
                hint = "name the rank: a statement computes every element along it"
                self.fail(node, "the language has no slices", hint)
            case ast.Attribute(attr=attr):
                hint = did_you_mean(attr, FUNCTIONS) or "functions are written without a module or an object"
                self.fail(node, f"names have no attributes, such as `.{attr}`", hint)
            case _:
                self.fail(node, "not an expression of the language", _EXPRESSIONS)

    def indices(self, index: ast.expr) -> tuple[Expr, ...]:
        return tuple([self.expr(i) for i in _elements(index)])

    def access(self, node: ast.expr, name: str, index: ast.expr) -> Expr:
        if name in self.tensors:
            return Access(name, self.indices(index), location(node, self.source))
        if name in REDUCTIONS or name in self.monoids:
            self.fail(node, f"`{name}[…]` lacks its argument", f"write {name}[k](expression)")
        hint = did_you_mean(name, self.tensors) or "a tensor is a parameter or stands on the left of a statement"
        self.fail(node, f"no tensor is called `{name}`", hint)

    def call(self, node: ast.Call) -> Expr:
        loc = location(node, self.source)
        for word in node.keywords:
            hint = "leave the name and `=` away"
            if isinstance(node.func, ast.Name) and node.func.id in REDUCTIONS:
                hint = f"a reduction names its ranks in brackets: {node.func.id}[k](expression)"
            self.fail(word.value, "functions take their arguments by position", hint)
        match node.func:
            case ast.Subscript(value=ast.Name(id=name), slice=index):
                return self.reduction(node, name, index)
            case ast.Name(id="extent"):
                if len(node.args) != 1 or not isinstance(node.args[0], ast.Name) or node.args[0].id in self.tensors:
                    self.fail(node, "extent takes one rank", "write extent(k)")
                return Extent(self.name(node.args[0], node.args[0].id, "a rank"), loc)
            case ast.Name(id=name) if name in DTYPES:
                if len(node.args) != 1:
                    self.fail(node, f"the cast {name} takes one argument", f"write {name}(x)")
                return Cast(name, self.expr(node.args[0]), loc)
            case ast.Name(id=name) if name in FUNCTIONS:
                arity = OPS[name].arity
                if len(node.args) != arity:
                    message = f"`{name}` takes {arity} argument{'s' * (arity > 1)}; {len(node.args)} came"
                    args = "condition, a, b" if name == "where" else ", ".join("ab"[:arity])
                    self.fail(node, message, f"write {name}({args})")
                return Call(name, tuple([self.expr(a) for a in node.args]), loc)
            case ast.Name(id=name):
                self.unknown_function(node, name)
            case ast.Attribute(attr=attr):
                hint = f"write {attr}(…)" if attr in FUNCTIONS else f"write {attr}[k](…)" if attr in REDUCTIONS else ""
                hint = hint or _INSTEAD.get(attr) or "functions are written without a module or an object"
                self.fail(node.func, f"names have no methods, such as `.{attr}`", hint)
            case func:
                hint = "the functions are " + " ".join(FUNCTIONS)
                self.fail(func, "only functions of the language are called", hint)

    def unknown_function(self, node: ast.Call, name: str) -> NoReturn:
        if name in self.tensors:
            self.fail(node, f"no function is called `{name}`", f"elements are read with brackets: {name}[…]")
        if name in REDUCTIONS or name in self.monoids:
            hint = f"write {name}[k](expression){_POINTWISE.get(name, '')}"
            self.fail(node, f"the reduction `{name}` does not say over which ranks", hint)
        hint = _INSTEAD.get(name) or did_you_mean(name, [*FUNCTIONS, *DTYPES, *REDUCTIONS, *self.monoids])
        self.fail(node.func, f"no function is called `{name}`", hint or "the functions are " + " ".join(FUNCTIONS))

    def reduction(self, node: ast.Call, name: str, index: ast.expr) -> Expr:
        if name not in REDUCTIONS and name not in self.monoids:
            every = [*REDUCTIONS, *self.monoids]
            hint = _INSTEAD.get(name) or did_you_mean(name, every) or "the reductions are " + " ".join(every)
            if name in self.tensors:
                hint = f"a tensor's element is {name}[…] alone, or write `*` between the two"
            elif name in FUNCTIONS:
                hint = f"{name} is a function: write {name}(…), without ranks"
            self.fail(node.func, f"no reduction is called `{name}`", hint)
        hint = f"write {name}[k](expression)"
        ranks: list[str] = []
        for element in _elements(index):
            if not isinstance(element, ast.Name) or element.id in self.tensors:
                if isinstance(element, ast.Name):
                    hint = f"one name is one thing: rename the tensor or the rank `{element.id}`"
                    self.fail(element, f"a reduction goes over ranks; `{element.id}` is a tensor", hint)
                self.fail(element, "a reduction goes over ranks; this is no rank", hint)
            if element.id in ranks:
                self.fail(element, f"rank `{element.id}` is reduced twice", hint)
            ranks.append(self.name(element, element.id, "a rank"))
        if not ranks:
            self.fail(node, f"`{name}[]` goes over no rank", hint)
        if name in REDUCTIONS and len(node.args) != 1:
            self.fail(node, f"`{name}` takes one argument; {len(node.args)} came", hint)
        return Reduce(name, tuple(ranks), tuple([self.expr(a) for a in node.args]), location(node, self.source))


def _elements(index: ast.expr) -> list[ast.expr]:
    return list(index.elts) if isinstance(index, ast.Tuple) else [index]


def _targets(statement: ast.stmt) -> list[str]:
    """The names that a statement writes."""
    match statement:
        case ast.Assign(targets=[target]) | ast.AnnAssign(target=target):
            named = [t.value if isinstance(t, ast.Subscript) else t for t in _elements(target)]
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
