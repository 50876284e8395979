"""The gate before `ast.parse`: what a stranger's text may hold, and how deep it may nest.

CPython's parser and the builder of its tree recurse on the C stack, backtrack, and convert integers in quadratic time:
a text can crash or hang them. So the text is first cut into tokens. Words and signs that the language does not have are
refused here, with a hint; for the rest a bound on the depth of the syntax tree is kept, operator by operator, and a
text past the limits is refused too. They lie far above any cascade that a person or a pass writes.
"""

from __future__ import annotations

import ast
import keyword
import re
import unicodedata
import warnings

from .cascade import MAX_DEPTH
from .errors import Loc, ParseError, Source

MAX_CHARS = 1_000_000
MAX_TOKENS = 120_000
MAX_BRACKETS = MAX_DEPTH + 10
# The bound may be as many times the depth as there are levels of binding; a tree of that depth is no danger yet.
MAX_TREE = 9 * MAX_DEPTH
MAX_DIGITS = 40
MAX_NAME = 120

# Line joints and comments come first, as they hide what they hold; strings too, where they are closed.
_TOKEN = re.compile(
    r"""(?P<space>(?:[ \t\f]|\\\n)+|\#[^\n]*)
    |(?P<newline>\n)
    |(?P<string>[A-Za-z]{0,2}(?:
        '{3}[^'\\]*(?:(?:\\.|'(?!''))[^'\\]*)*'{3} | '[^'\\\n]*(?:\\.[^'\\\n]*)*'
        |"{3}[^"\\]*(?:(?:\\.|"(?!""))[^"\\]*)*"{3} | "[^"\\\n]*(?:\\.[^"\\\n]*)*" ))
    |(?P<number>0[xXoObB]\w*|(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)(?:[eE][+-]?\d[\d_]*)?\w*)
    |(?P<name>[A-Za-z_\u0080-\U0010ffff][\w\u0080-\U0010ffff]*)
    |(?P<sign>->|\.\.\.|:=|(?:\*\*|//|<<|>>|[-+*/%&|^@<>=!])=?|[~()\[\]{},:;.])
    |(?P<other>.)""",
    re.VERBOSE | re.DOTALL,
)
_HIDDEN = re.compile("[\0\ud800-\udfff]")
_NUMBER = re.compile(r"0[xX][\da-fA-F_]+|0[oObB][\d_]+|[\d_]*\.?[\d_]*(?:[eE][+-]?[\d_]+)?")

_LOOP = ("a cascade has no loops", "ranks iterate by themselves; a reduction is sum[k](…), a scan reads H[t - 1]")
_BRANCH = ("a cascade has no `{}`", "where(condition, a, b) chooses for each element")
_TRUTH = "`{}` stands for one truth value, not a tensor of them"
_WORDS = {
    "if": _BRANCH, "else": _BRANCH, "elif": _BRANCH, "for": _LOOP, "while": _LOOP, "break": _LOOP, "continue": _LOOP,
    "and": (_TRUTH, "write (a < b) & (c < d), with the parentheses"),
    "or": (_TRUTH, "write (a < b) | (c < d), with the parentheses"),
    "not": (_TRUTH, "write ~(condition)"),
    "return": ("a cascade has no `return`", "the results stand in the signature: `-> O:`"),
    "lambda": ("a cascade has no functions of its own", "a reduction of your own is written under @monoid"),
}  # fmt: skip
_ALLOWED_WORDS = frozenset(("def", "pass", "from", "import", "as", "True", "False"))
_SIGNS = {
    "^": ("the language has no `^`", "a power is `**`; exclusive or of two conditions is `!=`"),
    ":=": ("the language has no `:=`", "give the value a statement of its own"),
    "!": ("the language has no `!`", "write ~(condition)"),
    "...": ("the language has no `...`", "name every rank"),
    "{": ("the language has no braces", "brackets hold ranks, parentheses group"),
}  # fmt: skip
_MEANT = {
    "−": "-", "–": "-", "—": "-", "×": "*", "·": "*", "⋅": "*", "÷": "/", "≤": "<=", "≥": ">=", "≠": "!=", "∞": "inf",
    "‘": "'", "’": "'", "“": '"', "”": '"', "…": "every rank by its name", "→": "->", "√": "sqrt(x)", "∑": "sum[k](x)",
}  # fmt: skip

# How tight an operator binds, as far as the depth of the tree goes.
_BINDS = {
    "<": 0, "<=": 0, ">": 0, ">=": 0, "==": 0, "!=": 0, "|": 1, "&": 2, "<<": 3, ">>": 3, "+": 4, "-": 4,
    "*": 5, "/": 5, "//": 5, "%": 5, "@": 5, "**": 7, ".": 8,
}  # fmt: skip
_UNARY, _POSTFIX, _LEVELS = 6, 8, 9
_CLOSES = {")": "(", "]": "["}


_NAME_A_PART = "name a part of it as an Einsum of its own"

# The syntax nodes that know where they stand.
Located = ast.stmt | ast.expr | ast.arg | ast.keyword


class _Frame:
    """What stands inside one pair of brackets, or in one statement: a bound on its depth, and what would come next.

    ``operand`` says that a value stands last, ``waiting`` which sign lacks the value on its right.
    """

    __slots__ = ("chain", "deepest", "filled", "inner", "loc", "longest", "nested", "operand", "sign", "waiting")
    waiting: tuple[str, Loc] | None

    def __init__(self, sign: str = "", loc: Loc | None = None) -> None:
        self.sign, self.loc = sign, loc
        self.deepest = 0
        self.filled = False
        self.comma()

    def value(self) -> None:
        """A value stands last."""
        self.operand = self.filled = True
        self.waiting = None

    def comma(self) -> None:
        """Begin an expression beside the last one."""
        self.waiting = None
        self.operand = False
        self.inner = self.nested = 0
        self.chain = [0] * _LEVELS
        self.longest = [0] * _LEVELS

    def operator(self, level: int, prefix: bool = False) -> None:
        """One more operator; a looser one ends the chains of tighter ones, a prefix sign ends none."""
        if not prefix:
            self.operand = False
            for tighter in range(level + 1, _LEVELS):
                self.chain[tighter] = 0
        self.chain[level] += 1
        if self.chain[level] > self.longest[level]:
            self.longest[level] += 1
            self.nest(self.nested, self.inner + 1)

    def nest(self, nested: int, inner: int) -> None:
        """A tree nests at most the longest chain of each level, and its deepest operand below all of them."""
        self.nested, self.inner = nested, inner
        self.deepest = max(self.deepest, nested + inner)


class _Gate:
    """Reads a text token by token and raises `ParseError` at the first that cannot stand."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.line, self.line_start = 1, 0
        self.frames = [_Frame()]

    def fail(self, message: str, hint: str, start: int, width: int = 1) -> ParseError:
        column = start - self.line_start + 1
        return ParseError(message, hint=hint, loc=Loc(self.line, column, column + width), source=self.source)

    def run(self) -> None:
        text = self.source.text
        if len(text) > MAX_CHARS:
            raise self.fail(
                f"the text has {len(text)} characters; at most {MAX_CHARS} are read", "split the cascade", 0
            )
        if (hidden := _HIDDEN.search(text)) is not None:
            self.advance(text[: hidden.start()], 0)
            what = "a NUL byte" if hidden.group() == "\0" else "half of a surrogate pair"
            raise self.fail(f"the text holds {what}", "save the file as plain UTF-8 text", hidden.start())
        count = 0
        for match in _TOKEN.finditer(text):
            kind, token, start = match.lastgroup, match.group(), match.start()
            if kind == "space":
                self.advance(token, start)
                continue
            count += 1
            if count > MAX_TOKENS:
                raise self.fail(f"the text has more than {MAX_TOKENS} words and signs", "split the cascade", start)
            if kind == "sign":
                self.sign(token, start)
            elif kind == "newline":
                if len(self.frames) == 1:
                    self.settled()
                    self.frames[0] = _Frame()
                self.advance(token, start)
            elif kind == "name":
                self.name(token, start)
            elif kind == "number":
                self.number(token, start)
            elif kind == "string":
                self.string(token, start)
            else:
                raise self.strange(token, start)
        self.settled()
        if len(self.frames) > 1:
            opened = self.frames[-1]
            raise ParseError(
                f"`{opened.sign}` is never closed",
                hint=f"close it with `{')' if opened.sign == '(' else ']'}`",
                loc=opened.loc,
                source=self.source,
            )

    def advance(self, token: str, start: int) -> None:
        """Keep the line number over a token that may hold line ends."""
        if "\n" in token:
            self.line += token.count("\n")
            self.line_start = start + token.rindex("\n") + 1

    def settled(self) -> None:
        """Nothing waits for a value."""
        if (waiting := self.frames[-1].waiting) is not None:
            message, hint = f"`{waiting[0]}` has nothing on its right", "write a value there, or leave it away"
            raise ParseError(message, hint=hint, loc=waiting[1], source=self.source)

    def value(self, token: str, start: int) -> None:
        """A value, which does not stand right after another."""
        if self.frames[-1].operand:
            hint = "an operator, a comma or `=` is missing before it"
            raise self.fail("two values stand side by side", hint, start, min(len(token), MAX_NAME))
        self.frames[-1].value()

    def wait(self, token: str, start: int) -> None:
        column = start - self.line_start + 1
        self.frames[-1].filled = True
        self.frames[-1].waiting = token, Loc(self.line, column, column + len(token))

    def name(self, token: str, start: int) -> None:
        plain = token if token.isascii() else unicodedata.normalize("NFKC", token)
        if not token.isascii() and not (token.isidentifier() and plain.isidentifier()):
            at, char = next(
                ((i, c) for i, c in enumerate(token) if c in _MEANT or not ("a" + c).isidentifier()), (0, token[0])
            )
            raise self.strange(char, start + at)
        if len(token) > MAX_NAME:
            raise self.fail(f"a name of {len(token)} characters", f"names have at most {MAX_NAME}", start, MAX_NAME)
        if token in _ALLOWED_WORDS:
            self.frames[-1].value()
            self.frames[-1].operand = token in ("True", "False")
            return
        if not keyword.iskeyword(plain):
            self.value(token, start)
            return
        message, hint = _WORDS.get(plain, ("`{}` is no word of the language", "statements are `T[ranks] = expression`"))
        raise self.fail(message.format(plain), hint, start, len(token))

    def number(self, token: str, start: int) -> None:
        if not _NUMBER.fullmatch(token):
            raise self.fail("a number ends in letters", "numbers are written 2, 0x1f, 0.5 or 1e-6", start, len(token))
        if len(token) > MAX_DIGITS:
            hint = f"numbers have at most {MAX_DIGITS} digits"
            raise self.fail(f"a number of {len(token)} digits", hint, start, len(token))
        self.value(token, start)

    def string(self, token: str, start: int) -> None:
        prefix = token[: min(token.find("'") % len(token), token.find('"') % len(token))]
        if prefix.lower() not in ("", "r", "u"):
            hint = "plain strings are docstrings and options"
            raise self.fail(f"the language has no {prefix}-strings", hint, start, len(prefix) + 1)
        self.value('"', start)
        self.advance(token, start)

    def strange(self, char: str, start: int) -> ParseError:
        if char in "'\"":
            return self.fail("a string is never closed", f"close it with {char}", start)
        if char == "\\":
            return self.fail(
                "a stray backslash", "a line goes on inside brackets; a backslash must end its line", start
            )
        what = f"`{char}`" if char.isprintable() else "a character"
        name = unicodedata.name(char, "").lower()
        known = f"U+{ord(char):04X}" + (f", {name}" if name else "")
        hint = f"write {_MEANT[char]}" if char in _MEANT else "names are letters, digits and underscores"
        return self.fail(f"{what} ({known}) does not belong to the language", hint, start)

    def sign(self, token: str, start: int) -> None:
        frame = self.frames[-1]
        if token in "([":
            self.open(token, start)
            return
        if token in ")]":
            self.close(token, start)
        elif token in "+-~" and not frame.operand:
            frame.operator(_UNARY, prefix=True)
            self.wait(token, start)
        elif token == "@" and not frame.filled:
            frame.filled = True
        elif token in _BINDS or token == "=":
            if not frame.operand:
                raise self.fail(f"`{token}` has nothing on its left", "write a value there", start, len(token))
            frame.comma() if token == "=" else frame.operator(_BINDS[token])
            self.wait(token, start)
        elif token in (",", ":", "->", ";"):
            self.settled()
            frame.filled = True
            frame.comma()
            if token == ";" and len(self.frames) == 1:
                self.frames[0] = _Frame()
        else:
            word = "{" if token == "}" else token
            written_once = ("tensors are written once, so there is no `" + token + "`", "sum[k](…) accumulates")
            message, hint = _SIGNS.get(word, written_once)
            raise self.fail(message, hint, start, len(token))
        if self.frames[-1].deepest > MAX_TREE:
            raise self.fail(f"an expression nests deeper than {MAX_DEPTH} levels", _NAME_A_PART, start)

    def open(self, token: str, start: int) -> None:
        frame = self.frames[-1]
        if frame.operand:
            frame.operator(_POSTFIX)
        frame.value()
        if len(self.frames) > MAX_BRACKETS:
            raise self.fail(f"brackets nest deeper than {MAX_BRACKETS}", _NAME_A_PART, start)
        column = start - self.line_start + 1
        self.frames.append(_Frame(token, Loc(self.line, column, column + 1)))

    def close(self, token: str, start: int) -> None:
        inner = self.frames[-1]
        if inner.sign != _CLOSES[token]:
            hint = f"it stands against `{inner.sign}`" if inner.sign else "no bracket is open here"
            raise self.fail(f"`{token}` closes nothing", hint, start)
        self.settled()
        if token == "]" and not inner.filled:
            raise self.fail("the brackets are empty", "a scalar has no brackets; a reduction names its ranks", start)
        self.frames.pop()
        outer = self.frames[-1]
        outer.nest(max(outer.nested, inner.deepest + 1), outer.inner)


def guard(source: Source) -> None:
    """Raise `ParseError` where the text is past a limit or holds what no cascade holds."""
    _Gate(source).run()


def to_ast(source: Source) -> list[ast.stmt]:
    """The statements of a text within the limits; every way in which Python refuses it becomes a `ParseError`."""
    guard(source)
    text = "if 1:\n" + source.text if source.indented else source.text
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            body = ast.parse(text).body
    except SyntaxError as error:
        raise _syntax_error(error, source) from None
    except (ValueError, RecursionError, MemoryError, OverflowError) as error:
        message = "the text nests too deep" if isinstance(error, RecursionError | MemoryError) else str(error)
        raise ParseError(message, hint=_NAME_A_PART, loc=Loc(1, 1, 2), source=source) from None
    if source.indented and isinstance(body[0], ast.If):
        body = [ast.increment_lineno(statement, -1) for statement in body[0].body]
    return body


def _syntax_error(error: SyntaxError, source: Source) -> ParseError:
    line = (error.lineno or 1) - source.indented
    text = source.line(line)
    if not text.strip() and line > 1:
        # Python points past the end; the last line with something on it is where the eye should go.
        line = max((n for n in range(1, line) if source.line(n).strip()), default=1)
        text = source.line(line)
        start = end = len(text) + 1
    else:
        start = min(max(1, error.offset or 1), len(text) + 1)
        end = error.end_offset or 0 if error.end_lineno == error.lineno else len(text) + 1
    message = (error.msg or "invalid syntax").split("\n")[0].split(" (<unknown>")[0]
    hint = "a cascade is one Python function definition whose statements are `T[ranks] = expression`"
    if isinstance(error, IndentationError):
        hint = "the statements stand below `def`, all with the same four spaces before them"
    elif message == "expected ':'":
        message, hint = "`:` is missing", "the line of `def` ends in `-> result:`"
    elif message.startswith("cannot assign"):
        message, hint = "the left side is a tensor with its ranks", "write `T[q, k] = …`"
    return ParseError(message, hint=hint, loc=Loc(line, start, max(start + 1, end)), source=source)


def location(node: Located, source: Source) -> Loc:
    """Where a syntax node stands; columns count characters where Python counts UTF-8 bytes."""
    line, start, end = node.lineno, node.col_offset, node.end_col_offset
    text = source.line(line)
    if isinstance(node, ast.arg):
        end = start + len(node.arg.encode())  # the name alone, without its type
    elif node.end_lineno != line or end is None:
        end = len(text.encode(errors="replace"))
    if not text.isascii():
        raw = text.encode()
        start, end = len(raw[:start].decode(errors="replace")), len(raw[:end].decode(errors="replace"))
    return Loc(line, start + 1, max(end, start + 1) + 1)
