"""The gate before `ast.parse`: limits on a stranger's text.

CPython's parser recurses on the C stack and converts integers in quadratic time, so depth, length and digits are
bounded before it sees the text. The limits lie far above any cascade that a person or a pass writes.
"""

from __future__ import annotations

import ast
import re
import warnings

from .errors import Loc, ParseError, Source

MAX_CHARS = 1_000_000
MAX_BRACKETS = 90
MAX_LINE_TOKENS = 4_000
MAX_DIGITS = 40
MAX_DEPTH = 180
MAX_NAME = 120

_token = re.compile(r"[A-Za-z_0-9.\u0080-\U0010ffff]+|[^\sA-Za-z_0-9.]")
_digits = re.compile(rf"[0-9a-fA-FxXoO_]{{{MAX_DIGITS + 1},}}")


def _fail(source: Source, message: str, hint: str, line: int, column: int, width: int = 1) -> ParseError:
    return ParseError(message, hint=hint, loc=Loc(line, column, column + width), source=source)


def guard(source: Source) -> None:
    """Raise `ParseError` where the text is past a limit or holds what no text may hold."""
    text = source.text
    if len(text) > MAX_CHARS:
        raise _fail(
            source, f"the text has {len(text)} characters; at most {MAX_CHARS} are read", "split the cascade", 1, 1
        )
    depth = tokens = 0
    for number, line in enumerate(text.split("\n"), 1):
        bad = next((i for i, c in enumerate(line) if c == "\0" or "\ud800" <= c <= "\udfff"), None)
        if bad is not None:
            what = "a NUL byte" if line[bad] == "\0" else "half of a surrogate pair"
            raise _fail(source, f"the text holds {what}", "save the file as plain UTF-8 text", number, bad + 1)
        if "#" in line or '"' in line or "'" in line:
            # Comments and strings may hold brackets; they are counted all the same, on the safe side of the limits.
            code = line.split("#", 1)[0] if '"' not in line and "'" not in line else line
        else:
            code = line
        if depth <= 0:
            tokens = 0
        for match in _token.finditer(code):
            token = match.group()
            tokens += 1 + token.count(".")
            if token in "([{":
                depth += 1
            elif token in ")]}":
                depth = max(0, depth - 1)
            elif len(token) > MAX_DIGITS and token[0].isdigit() and _digits.match(token):
                raise _fail(
                    source,
                    f"a number of {len(token)} digits",
                    "numbers have at most 40 digits",
                    number,
                    match.start() + 1,
                )
            elif len(token) > MAX_NAME and not token[0].isdigit() and '"' not in line and "'" not in line:
                raise _fail(
                    source,
                    f"a name of {len(token)} characters",
                    f"names have at most {MAX_NAME}",
                    number,
                    match.start() + 1,
                )
            if depth > MAX_BRACKETS or tokens > MAX_LINE_TOKENS:
                what = (
                    f"brackets nest deeper than {MAX_BRACKETS}" if depth > MAX_BRACKETS else "a statement is too long"
                )
                raise _fail(source, what, "name a part of it as an Einsum of its own", number, match.start() + 1)


def to_ast(source: Source) -> ast.Module:
    """The syntax tree of a text within the limits; every way in which Python refuses it becomes a `ParseError`."""
    guard(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source.text)
    except SyntaxError as error:
        line = error.lineno or 1
        column = min(max(1, error.offset or 1), len(source.line(line)) + 1)
        end = error.end_offset if error.end_lineno == line and error.end_offset else column + 1
        message = (error.msg or "invalid syntax").split("\n")[0]
        hint = "a cascade is one Python function definition whose statements are `T[ranks] = expression`"
        raise ParseError(message, hint=hint, loc=Loc(line, column, max(column + 1, end)), source=source) from None
    except (ValueError, RecursionError, MemoryError, OverflowError) as error:
        message = "the text is nested too deep" if isinstance(error, RecursionError | MemoryError) else str(error)
        raise _fail(source, message, "name parts of it as Einsums of their own", 1, 1) from None
    _check_depth(tree, source)
    return tree


def _check_depth(tree: ast.Module, source: Source) -> None:
    stack: list[tuple[ast.AST, int]] = [(tree, 0)]
    while stack:
        node, depth = stack.pop()
        if depth > MAX_DEPTH:
            hint = "name a part of it as an Einsum of its own"
            loc = location(node, source)
            raise ParseError(f"an expression nests deeper than {MAX_DEPTH} levels", hint=hint, loc=loc, source=source)
        stack.extend((child, depth + 1) for child in ast.iter_child_nodes(node))


def location(node: ast.AST, source: Source) -> Loc:
    """Where a syntax node stands; columns count characters where Python counts UTF-8 bytes."""
    line = getattr(node, "lineno", 1)
    start = getattr(node, "col_offset", 0)
    end = getattr(node, "end_col_offset", None) if getattr(node, "end_lineno", line) == line else None
    text = source.line(line)
    if end is None:
        end = len(text.encode()) if not text.isascii() else len(text)
    if not text.isascii():
        raw = text.encode()
        start = len(raw[:start].decode(errors="replace"))
        end = len(raw[:end].decode(errors="replace"))
    return Loc(line, start + 1, max(end, start + 1) + 1)
