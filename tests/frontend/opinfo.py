"""Every operator of PyTorch's own table, on its first f32 sample: what passes with `aot_eager` passes with castile.

    python tests/frontend/opinfo.py [--every N] [--offset K] [NAME …]     # make opinfo

Prints one line for each operator that fails, and the counts. Exits 1 if an operator fails with castile only.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils._pytree import tree_flatten

from castile.frontend.backend import Options, backend

# Random operators: eager's numbers are its own, but what follows from the seed must be the same.
SEED = 1234

# What these return is whatever lay in memory: only its layout is compared.
UNSET = frozenset("empty empty_like empty_permuted empty_strided new_empty new_empty_strided".split())


def cases(names: list[str], every: int = 1, offset: int = 0) -> Iterator[tuple[str, Any, Any]]:
    """Operators with their first f32 sample, sorted by name."""
    table = sorted(op_db, key=lambda o: (o.name, o.variant_test_name))
    chosen = [o for o in table if o.name in names] if names else table[offset::every]
    for op in chosen:
        if torch.float32 not in op.supported_dtypes("cpu"):
            continue
        torch.manual_seed(SEED)
        try:
            sample = next(iter(op.sample_inputs("cpu", torch.float32, requires_grad=False)))
        except StopIteration:
            continue
        yield f"{op.name}{'.' if op.variant_test_name else ''}{op.variant_test_name}", op, sample


def run(op: Any, sample: Any, how: Any) -> Any:
    torch._dynamo.reset()

    def f(first: Any, *args: Any, **kwargs: Any) -> Any:
        return op.op(first, *args, **kwargs)

    call: Callable[..., Any] = torch.compile(f, backend=how) if how is not None else f
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # a kernel that does not build is a failure here
        for _ in range(1 if how is None else 2):  # castile records the first call for the others
            torch.manual_seed(SEED)
            results = call(sample.input, *sample.args, **sample.kwargs)
    return results


def disagreement(mine: Any, theirs: Any, values: bool = True) -> str:
    """Why two results are not the same; "" if they are. Without ``values`` only their layout counts."""
    a, b = tree_flatten(mine)[0], tree_flatten(theirs)[0]
    if len(a) != len(b):
        return f"{len(a)} results, not {len(b)}"
    for x, y in zip(a, b, strict=True):
        if isinstance(y, torch.Tensor) and y.layout is torch.strided:
            if x.stride() != y.stride() and y.numel():
                return f"strides {x.stride()}, not {y.stride()}"
            if not values:
                if (x.shape, x.dtype) != (y.shape, y.dtype):
                    return f"{x.dtype} {tuple(x.shape)}, not {y.dtype} {tuple(y.shape)}"
                continue
            try:
                torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5, equal_nan=True)
            except AssertionError as error:
                return str(error).splitlines()[0] + " " + " ".join(str(error).splitlines()[2:5])
    return ""


def verdict(op: Any, sample: Any, when: str = "always") -> tuple[str, str]:
    """("passes" | "skipped" | "fails", why): skipped where eager or `aot_eager` itself does not pass."""
    try:
        theirs = run(op, sample, None)
        if disagreement(run(op, sample, "aot_eager"), theirs, op.name not in UNSET):
            return "skipped", "aot_eager differs from eager"
    except Exception as error:
        return "skipped", f"aot_eager: {type(error).__name__}"
    try:
        why = disagreement(run(op, sample, backend(Options(when=when))), theirs, op.name not in UNSET)
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
    return ("fails", why) if why else ("passes", "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--offset", type=int, default=0)
    options = parser.parse_args()
    counts = {"passes": 0, "skipped": 0, "fails": 0}
    for name, op, sample in cases(options.names, options.every, options.offset):
        found, why = verdict(op, sample)
        counts[found] += 1
        if found == "fails":
            print(f"{name}: {why[:600]}", flush=True)
    print(", ".join(f"{n} {word}" for word, n in counts.items()))
    return 1 if counts["fails"] else 0


if __name__ == "__main__":
    sys.exit(main())
