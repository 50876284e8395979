"""The process in which Triton works for castile. It imports nothing of castile.

It is started with a script, reads one JSON request a line, and answers each with a line: what the script's
``answer(request, load)`` gives, where ``load`` makes a module of a file of generated Triton.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import threading
import time
import warnings
from functools import cache
from typing import Any


@cache
def load(path: str) -> Any:
    """The module of a file, loaded once."""
    name = "castile_" + os.path.basename(path).removesuffix(".py")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _end_with(parent: int) -> None:
    """End with the parent, even while a kernel is compiled or runs."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def main() -> None:
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    # What a kernel or a compiler prints must not be taken for an answer.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    warnings.filterwarnings("ignore")
    script = load(sys.argv[2])
    for line in sys.stdin:
        answers.write(json.dumps(script.answer(json.loads(line), load)) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
