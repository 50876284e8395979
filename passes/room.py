"""Depth: room for deep recursions here, none for deep expressions in the text."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import TypeVar

from ..ir.cascade import MAX_DEPTH, Cascade, children

T = TypeVar("T")


def with_room(f: Callable[[], T], size: int) -> T:
    """Run a recursion as deep as the cascade is long: on a thread with a larger stack, where it may be needed."""
    if size < 24:
        return f()
    result: list[T] = []
    failure: list[BaseException] = []

    def run() -> None:
        limit = sys.getrecursionlimit()
        sys.setrecursionlimit(max(limit, 20_000 + 200 * size))
        try:
            result.append(f())
        except BaseException as error:
            failure.append(error)
        finally:
            sys.setrecursionlimit(limit)

    old = threading.stack_size(min(1 << 30, (64 << 20) + size * (1 << 20)))
    try:
        thread = threading.Thread(target=run)
        thread.start()
    finally:
        threading.stack_size(old)
    thread.join()
    if failure:
        raise failure[0]
    return result[0]


def fits(c: Cascade) -> bool:
    """Whether no expression of a cascade nests deeper than the language allows."""
    roots = [e.expr for e in c.einsums] + [value for m in c.monoids for _, value in m.body]
    stack = [(e, 1) for e in roots]
    while stack:
        e, depth = stack.pop()
        if depth > MAX_DEPTH:
            return False
        stack.extend((k, depth + 1) for k in children(e))
    return True
