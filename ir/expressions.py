"""Expressions of the language, read from Python's syntax nodes."""

from __future__ import annotations

import ast
import keyword
from typing import NoReturn

from .cascade import MAX_DEPTH, Access, Call, Cast, Const, Expr, Extent, Rank, Reduce
from .dtypes import DTYPES
from .errors import Loc, ParseError, Source, did_you_mean
from .ops import FUNCTIONS, OPS, REDUCTIONS, RESERVED
from .source import Located, location

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
_POINTWISE = {"max": "; the larger of two is maximum(a, b)", "min": "; the smaller of two is minimum(a, b)"}
# What there is, for errors.
EXPRESSIONS = "it has numbers, T[i, j], + - * / // % **, comparisons, where(c, a, b), functions and op[k](…)"


class ExpressionReader:
    """Turns the nodes of expressions into IR; holds the source for locations and the names that are tensors."""

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

    def name(self, node: Located, name: str, what: str, allowed: frozenset[str] = frozenset()) -> str:
        if name in RESERVED - allowed or keyword.iskeyword(name):
            hint = "its size is extent(k)" if name == "extent" else "choose another name"
            self.fail(node, f"`{name}` is a word of the language and cannot name {what}", hint)
        return name

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
                self.fail(node, f"{type(value).__name__} literals do not occur in a cascade", EXPRESSIONS)
            case ast.Slice():
                hint = "name the rank: a statement computes every element along it"
                self.fail(node, "the language has no slices", hint)
            case ast.Attribute(attr=attr):
                hint = did_you_mean(attr, FUNCTIONS) or "functions are written without a module or an object"
                self.fail(node, f"names have no attributes, such as `.{attr}`", hint)
            case _:
                self.fail(node, "not an expression of the language", EXPRESSIONS)

    def indices(self, index: ast.expr) -> tuple[Expr, ...]:
        return tuple([self.expr(i) for i in elements(index)])

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
        for element in elements(index):
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


def elements(index: ast.expr) -> list[ast.expr]:
    """What stands between brackets, one by one."""
    return list(index.elts) if isinstance(index, ast.Tuple) else [index]
