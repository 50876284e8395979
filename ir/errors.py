"""Every error a user can meet, in one hierarchy.

An error says where it happened (stage, Einsum, rank, line and column), what was expected, what came and what to do.
``str(error)`` is the whole message; the fields are there for tools.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

E = TypeVar("E", bound="CastileError")


@dataclass(frozen=True, slots=True)
class Loc:
    """A span of the source text: 1-based line, 1-based columns in characters, end exclusive."""

    line: int
    column: int
    end_column: int


@dataclass(frozen=True)
class Source:
    """A text and the name under which errors show it.

    ``first_line`` is the line of the file on which it starts; ``indented`` says that it was cut out of a block.
    """

    text: str
    filename: str = "<cascade>"
    first_line: int = 1
    indented: bool = False

    @cached_property
    def lines(self) -> list[str]:
        return self.text.split("\n")

    def line(self, number: int) -> str:
        return self.lines[number - 1] if 0 < number <= len(self.lines) else ""


class CastileError(Exception):
    """Base of all errors that castile raises on purpose.

    Fields: ``message`` (one line), ``hint`` (what to do, or ""), ``stage``, ``einsum``, ``rank``, ``expected``, ``got``
    (each "" where it does not apply), ``loc`` (a `Loc` or None) and ``source`` (a `Source` or None).
    """

    stage = ""

    def __init__(
        self,
        message: str,
        *,
        hint: str = "",
        einsum: str = "",
        rank: str = "",
        expected: str = "",
        got: str = "",
        loc: Loc | None = None,
        source: Source | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.einsum = einsum
        self.rank = rank
        self.expected = expected
        self.got = got
        self.loc = loc
        self.source = source

    @property
    def line(self) -> int | None:
        """Line in the user's file, 1-based, or None where the error has no place in a text."""
        if self.loc is None:
            return None
        return self.loc.line + (self.source.first_line - 1 if self.source else 0)

    @property
    def column(self) -> int | None:
        """Column in the user's file, 1-based, or None."""
        return None if self.loc is None else self.loc.column

    def __str__(self) -> str:
        lines = []
        if self.loc is not None and self.source is not None:
            lines.append(f"{self.source.filename}:{self.line}:{self.column}: {self.message}")
            lines.extend(_excerpt(self.source.line(self.loc.line), self.loc))
        else:
            lines.append(f"in `{self.einsum}`: {self.message}" if self.einsum else self.message)
        told = [f"{name}: {text}" for name, text in (("expected", self.expected), ("got", self.got)) if text]
        if told:
            lines.append("; ".join(told))
        if self.hint:
            lines.append(f"hint: {self.hint}")
        return "\n".join(lines)


def _excerpt(line: str, loc: Loc, width: int = 140) -> list[str]:
    """The source line and a caret under the span; long lines are cut around the caret, odd characters replaced."""
    start = max(0, loc.column - 1)
    end = max(start + 1, min(loc.end_column - 1, len(line)))
    left = max(0, start - width // 2) if len(line) > width else 0
    cut = line[left : left + width].replace("\t", " ")
    shown = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in cut)
    carets = "^" * max(1, min(end, left + width) - start)
    return ["  | " + shown, "  | " + " " * (start - left) + carets]


class ParseError(CastileError):
    """The text is no cascade: a syntax error, a word that the language does not have, or a text past its limits."""

    stage = "parse"


class VerifyError(CastileError):
    """The cascade reads well but means nothing: an unbound rank, a type that does not fit, a cycle."""

    stage = "verify"


class InputError(CastileError):
    """Arrays, scalars or extents that do not fit the cascade: missing, of another shape, out of range."""

    stage = "input"


class EvaluationError(CastileError):
    """The cascade reads outside a tensor, divides an integer by zero or takes argmax of nothing."""

    stage = "evaluate"


class UsageError(CastileError):
    """A wrong word on the command line or a wrong argument of a public function."""

    stage = "usage"


def attach(error: E, source: Source) -> E:
    """The same error, told from which text it comes."""
    if error.source is None:
        error.source = source
    return error


def did_you_mean(name: str, known: Iterable[str], likeness: float = 0.6) -> str:
    """The hint that names the closest of the known words, or "" where none is close."""
    close = difflib.get_close_matches(name[:40], list(known), n=1, cutoff=likeness)
    return f"did you mean `{close[0]}`?" if close else ""
