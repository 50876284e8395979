"""Room for deep recursions."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import TypeVar

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
