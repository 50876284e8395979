"""The process in which generated Triton runs under Triton's interpreter. It imports nothing of castile.

The interpreter must be chosen before triton is first imported, so this is a process of its own: it reads one JSON
request a line, runs a module's ``launch`` on tensors that lie in a shared file, and answers with a line.
"""

from __future__ import annotations

import importlib.util
import json
import mmap
import os
import sys
import threading
import time
import traceback
import warnings
from typing import Any


def _watch(parent: int) -> None:
    """End with the parent, even while a kernel runs."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _module(path: str, loaded: dict[str, Any]) -> Any:
    if path not in loaded:
        spec = importlib.util.spec_from_file_location(f"castile_generated_{len(loaded)}", path)
        assert spec is not None
        assert spec.loader is not None
        loaded[path] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded[path])
    return loaded[path]


def _run(request: dict[str, Any], loaded: dict[str, Any]) -> None:
    import torch

    with open(request["data"], "r+b") as file:
        memory = mmap.mmap(file.fileno(), 0)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    arguments: list[Any] = []
    for a in request["arguments"]:
        if "value" in a:
            arguments.append(a["value"])
            continue
        flat = whole[a["start"] : a["start"] + a["bytes"]].view(getattr(torch, a["dtype"]))
        arguments.append(flat.as_strided(a["shape"], a["strides"]))
    _module(request["source"], loaded).launch(*arguments, *request["extents"])


def main() -> None:
    parent = os.getppid()
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    # What a kernel prints must not be taken for an answer.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    warnings.filterwarnings("ignore")
    import torch

    torch.set_num_threads(1)
    loaded: dict[str, Any] = {}
    for line in sys.stdin:
        try:
            _run(json.loads(line), loaded)
            answer: dict[str, Any] = {"ok": True}
        except IndexError as error:
            answer = {"ok": False, "outside": str(error)}
        except BaseException as error:
            answer = {"ok": False, "error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()[-4000:]}
            if isinstance(error, KeyboardInterrupt | SystemExit):
                return
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
