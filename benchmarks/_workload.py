"""What a kernel benchmark is made of: a cascade, the extents at which it runs, and how its peers say the same.

Outputs of all are judged by the cascade's own oracle, on a sample of their elements.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import castile
from castile.benchmarks._command import Options
from castile.benchmarks.harness import Candidate, Case, WrongOutput
from castile.ir.bound import judge
from castile.ir.extents import resolve, shape_of
from castile.ir.inputs import read_inputs
from castile.passes.work import operations, sizes_of, tensor_bytes, work

CASCADES = Path(__file__).resolve().parent.parent / "examples" / "cascades"

# Elements of each output that are compared with the oracle.
SAMPLE = 24

# Peers round where they like: they are only to compute the same thing; castile holds the bound itself.
PEER_SLACK, OWN_SLACK = 8.0, 1.0

Tensors = Mapping[str, Any]


@dataclass(frozen=True)
class Workload:
    """A cascade at given extents, and its peers: each builds, from the inputs, a call that returns the outputs.

    ``outs`` says whether the peers write into memory of their own (``out=``); then castile does too. ``scalars`` are
    the values of scalar parameters other than 0.125, and ``prepare`` makes of inputs drawn at random those that are
    wanted (ids in order, what a forward pass saves). ``others`` are cascades of the same inputs that castile itself is
    raced against, each judged by its own oracle. ``slack`` is how many bounds a peer may be off, more where it stores
    in between what the cascade does not. ``memory`` names a tensor that no call should need the room of: on stderr
    each candidate's peak is told beside its size.
    """

    name: str
    cascade: castile.Cascade
    extents: Mapping[str, int]
    peers: Mapping[str, Callable[[Tensors], Callable[[], object]]]
    outs: bool = False
    flops: float | None = None
    small: Mapping[str, int] = field(default_factory=dict)
    scalars: Mapping[str, float] = field(default_factory=dict)
    prepare: Callable[[dict[str, Any]], Tensors] | None = None
    others: Mapping[str, castile.Cascade] = field(default_factory=dict)
    slack: float = PEER_SLACK
    memory: str | None = None


def text_of(name: str, **types: str) -> str:
    """The text of an example with dtypes replaced, as in ``bf16="f32"``."""
    text = (CASCADES / f"{name}.cascade").read_text(encoding="utf-8")
    for old, new in types.items():
        text = text.replace(f": {old}", f": {new}").replace(f"{old}(", f"{new}(")
    return text


def draw(w: Workload, extents: Mapping[str, int], rng: np.random.Generator) -> Tensors:
    """Inputs as torch tensors of the declared types; scalars are what makes scores of unit variance."""
    import torch

    c = w.cascade

    found: dict[str, Any] = {}
    for p in c.params:
        shape = shape_of(c, p.name, extents)
        if not p.indices:
            found[p.name] = w.scalars.get(p.name, 0.125)
            continue
        seed = int(rng.integers(1 << 62))
        generator = torch.Generator().manual_seed(seed)
        kinds = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "f8e4m3": torch.float8_e4m3fn}
        kind = kinds.get(p.dtype)
        if kind is not None:
            found[p.name] = torch.randn(shape, generator=generator, dtype=torch.float32).to(kind)
        elif p.dtype == "u32":
            found[p.name] = torch.randint(-(2**31), 2**31, shape, generator=generator, dtype=torch.int32).view(
                torch.uint32
            )
        else:
            high = min(extents.values()) if p.dtype.startswith("i") else 15
            kinds = {"i64": torch.int64, "i32": torch.int32, "u8": torch.uint8, "i8": torch.int8}
            low, high = (-127, 128) if p.dtype == "i8" else (0, high)
            found[p.name] = torch.randint(low, high, shape, generator=generator, dtype=kinds[p.dtype])
    return w.prepare(found) if w.prepare else found


def numbers(x: Any) -> Any:
    """A tensor as NumPy knows it, narrow floats widened."""
    import torch

    if not isinstance(x, torch.Tensor):
        return x
    return x.double().numpy() if x.is_floating_point() else x.numpy()


def verify(
    c: castile.Cascade, extents: Mapping[str, int], inputs: Tensors, outputs: object, slack: float = PEER_SLACK
) -> None:
    """Compare a sample of the outputs with the oracle; raises `AssertionError` where one is off by ``slack`` bounds."""
    given = outputs if isinstance(outputs, tuple | list) else (outputs,)
    rng = np.random.default_rng(0)
    arrays = {p.name: numbers(inputs[p.name]) for p in c.params}
    read_inputs(c, arrays)
    for name, output in zip(c.outputs, given, strict=True):
        ranks = [i.name for i in c.indices_of(name)]  # type: ignore[union-attr]
        at = {r: rng.integers(0, extents[r], SAMPLE) for r in ranks}
        got = numbers(output)[tuple(at[r] for r in ranks)]
        one = castile.parse(str(c).replace(_outputs_of(c), name, 1)) if len(c.outputs) > 1 else c
        for judgement in judge(one, arrays, {name: got}, at or None):
            if judgement.worst > slack:
                raise AssertionError(str(judgement))


def _outputs_of(c: castile.Cascade) -> str:
    return f"({', '.join(c.outputs)})"


def peak_bytes(call: Callable[[], object]) -> int | None:
    """How far the memory of this process rises above where it stood, during a call; None where Linux does not tell."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def read(what: str) -> int:
        return next(int(line.split()[1]) << 10 for line in status.read_text().splitlines() if line.startswith(what))

    try:
        trim = ctypes.CDLL(None).malloc_trim
        trim(0)
        reset.write_text("5")
        before = read("VmRSS:")
        call()
        return max(0, read("VmHWM:") - before)
    except (OSError, AttributeError, StopIteration):
        return None


def _tell_memory(w: Workload, extents: Mapping[str, int], name: str, call: Callable[[], object]) -> None:
    """Says on stderr what a call needs, and what the tensor would that it is to do without."""
    if not w.memory:
        return
    call()
    peak = peak_bytes(call)
    full = tensor_bytes(w.cascade)[w.memory].at(sizes_of(w.cascade, extents))
    if peak is not None:
        print(f"memory {w.name}: {name} {peak / 1e6:.1f} MB, {w.memory} has {full / 1e6:.1f} MB", file=sys.stderr)


def _own(
    w: Workload, c: castile.Cascade, extents: Mapping[str, int], mapping: castile.Mapping | None
) -> Candidate[Any]:
    """castile's candidate for a cascade: the workload's own, or another one that it is raced against."""
    kernel = castile.compile(c, "cpu", extents, mapping)
    name = next((n for n, other in w.others.items() if other is c), "castile")
    held: list[bool] = []

    def build(inputs: Tensors) -> Callable[[], object]:
        given = {p.name: inputs[p.name] for p in c.params}
        made = kernel(**given)
        if not held:
            try:
                verify(c, extents, given, made, OWN_SLACK)
            except AssertionError as error:
                raise WrongOutput(f"{w.name}: {name}: {error}") from error
            _tell_memory(w, extents, name, partial(kernel, **given))
            held.append(True)
        return partial(kernel, **given, out=made) if w.outs else partial(kernel, **given)

    return Candidate(name, build, not w.outs, None if c is w.cascade else partial(verify, c, extents))


def compiled(act: Callable[[Tensors], Any]) -> Callable[[Tensors], Callable[[], object]]:
    """A peer that is Inductor's code of a function of the inputs."""
    import torch

    made = torch.compile(act)

    def build(x: Tensors) -> Callable[[], object]:
        given = {name: value for name, value in x.items() if isinstance(value, torch.Tensor)}
        made(given)
        return lambda: made(given)

    return build


def _peer(w: Workload, name: str, extents: Mapping[str, int]) -> Candidate[Any]:
    told: list[bool] = []

    def build(inputs: Tensors) -> Callable[[], object]:
        call = w.peers[name](inputs)
        if not told:
            _tell_memory(w, extents, name, call)
            told.append(True)
        return call

    return Candidate(name, build, allocates=not w.outs)


def case_of(w: Workload, options: Options, mapping: castile.Mapping | None = None) -> Case[Tensors]:
    """The harness's case of a workload. The harness checks all candidates alike; castile is held to the bound first."""
    c = w.cascade
    extents = resolve(c, {**w.extents, **(w.small if options.quick else {})})
    sizes = sizes_of(c, extents)
    done = {unit: p.at(sizes) for unit, p in operations(work(c)).items()}
    moved = tensor_bytes(c)
    touched = sum(moved[n].at(sizes) for n in [*c.param_of, *c.outputs])
    candidates = [_peer(w, name, extents) for name in w.peers]
    candidates += [_own(w, other, extents, None) for other in w.others.values()]
    return Case(
        name=w.name,
        inputs=partial(draw, w, extents),
        candidates=(*candidates, _own(w, c, extents, mapping)),
        baseline=candidates[0].name,
        check=partial(verify, c, extents, slack=w.slack),
        flops=w.flops or float(sum(done.values())),
        bytes=float(touched),
        cache="out" if touched > 1 << 16 else "in",
    )
