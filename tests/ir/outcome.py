"""What becomes of a text: a cascade in time, or an error that has all that an error has."""

from __future__ import annotations

import re
import time

from castile.ir.cascade import Cascade
from castile.ir.errors import CastileError, ParseError, VerifyError
from castile.ir.parse import parse


def parsed_within(text: str, seconds: float) -> Cascade | CastileError:
    """The cascade or the error; one of three runs must be in time, as a collection of garbage may fall into any."""
    times = []
    for _ in range(3):
        start = time.process_time()
        result: Cascade | CastileError
        try:
            result = parse(text)
        except CastileError as caught:
            result = caught
        times.append(time.process_time() - start)
        if times[-1] < seconds:
            return result
    raise AssertionError(f"took {times} s: {text[:1000]!a}")


def outcome(text: str) -> CastileError | None:
    """Parse within a fifth of a second; the error if there is one, checked for what every error has."""
    c = parsed_within(text, 0.2 + len(text) / 1e6)
    error = c if isinstance(c, CastileError) else None
    if error is None:
        assert len(text) % 4 or parse(str(c)) == c
        return None
    assert isinstance(error, ParseError | VerifyError)
    assert error.line is not None
    assert error.column is not None
    assert 1 <= error.line <= text.count("\n") + text.count("\r") + 1
    assert error.column >= 1
    assert error.hint, str(error)
    shown = str(error)
    assert shown.startswith("<cascade>:")
    assert len(shown) < 2000
    shown.encode()  # no half of a surrogate pair reaches a terminal
    _, line, carets, *_ = shown.split("\n")
    assert re.fullmatch(r" +\| *\^+", carets), shown
    assert len(line) >= carets.index("^"), shown
    return error
