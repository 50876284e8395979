"""Runs generated Triton under Triton's interpreter, in a process of its own (`triton_guest.py`).

The interpreter must be chosen before triton is first imported. A request names a module and the tensors of its
``launch``, which lie in a shared file.
"""

from __future__ import annotations

import mmap
import traceback
from collections.abc import Callable
from typing import Any

import torch

torch.set_num_threads(1)


def answer(request: dict[str, Any], load: Callable[[str], Any]) -> dict[str, Any]:
    try:
        _run(request, load)
    except IndexError as error:
        return {"ok": False, "outside": str(error)}
    except Exception as error:
        return {"ok": False, "error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()[-4000:]}
    return {"ok": True}


def _run(request: dict[str, Any], load: Callable[[str], Any]) -> None:
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
    load(request["source"]).launch(*arguments, *request["extents"])
