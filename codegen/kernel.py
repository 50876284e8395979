"""A compiled cascade as users hold it: one callable, with a variant for each bucket of shapes that it has met."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from collections.abc import Mapping as Dict
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

from ..ir.cascade import Cascade
from ..ir.errors import InputError, UsageError
from ..ir.extents import resolve
from ..ir.mapping import Mapping
from .arguments import ANEW

# Shapes of which the variant is remembered.
SHAPES = 4096


class Runner(Protocol):
    """A program of a target, called with its parameters by name."""

    @property
    def source(self) -> str: ...

    def run(self, inputs: Dict[str, Any], out: Any) -> Any: ...

    def again(self, inputs: Dict[str, Any], out: Any) -> Any:
        """As `run` where the arguments are like those of the last call; else `ANEW`, and nothing is done."""


@dataclass(frozen=True, slots=True)
class Variant:
    """What runs for one bucket of shapes. ``extents`` stand for all of the bucket; ``run`` builds on its first use."""

    extents: Dict[str, int]
    mapping: Mapping
    source: str
    build: Callable[[], Runner]
    origin: str = "default"

    def __str__(self) -> str:
        shapes = " ".join(f"{r}={n}" for r, n in self.extents.items())
        return f"{shapes}: {self.mapping} ({self.origin})"


class _Locks:
    """Locks by name, all new after a fork: the thread that held one is not in the child, and would never let it go."""

    def __init__(self) -> None:
        self._process, self._held = os.getpid(), dict[str, threading.RLock]()

    def of(self, name: str) -> threading.RLock:
        if self._process != os.getpid():
            self._held = {}
            self._process = os.getpid()
        return self._held.setdefault(name, threading.RLock())


class Kernel:
    """A cascade compiled for a target; `castile.compile` makes it.

    ``k(Q=q, K=k, scale=0.125)`` takes NumPy arrays or torch tensors of any strides, and Python numbers for scalars; it
    returns the same kind, a tuple for several outputs, in the order of ``-> (…)``. ``out=`` takes one array or a tuple
    of them to write into. A call of shapes that no variant serves yet builds one. Raises `InputError` for arguments
    that do not fit, `EvaluationError` for reads outside their tensor (``check`` finds them), `UsageError` where the
    target cannot run here.
    """

    def __init__(
        self,
        cascade: Cascade,
        target: str,
        choose: Callable[[Dict[str, int]], Variant],
        bucket: Callable[[Dict[str, int]], Dict[str, int]],
        check: Callable[[Dict[str, int]], None],
        extents: Dict[str, int],
    ) -> None:
        self.cascade = cascade
        self.target = target
        self._choose = choose
        self._bucket = bucket
        self._check = check
        self._extents = extents
        self._tensors = tuple(p.name for p in cascade.params if p.indices)
        self._variants: dict[tuple[int, ...], Variant] = {}
        self._built: dict[str, Runner] = {}
        self._runs: dict[Any, Runner] = {}
        # Most calls are like the one before: to compare is quicker than to look up.
        self._latest: Runner | None = None
        self._locks = _Locks()

    def __copy__(self) -> Kernel:
        return self

    def __deepcopy__(self, memo: Dict[int, Any]) -> Kernel:
        """Itself: calls change nothing that a copy could tell."""
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("a kernel is not pickled: keep its cascade, str(kernel.cascade), and compile that again")

    # What was generated

    @property
    def source(self) -> str:
        """The generated text for the shapes that were given to `compile`, else for nominal extents."""
        return self.variant(self._extents).source

    @property
    def mapping(self) -> Mapping:
        """The mapping for those shapes."""
        return self.variant(self._extents).mapping

    @property
    def variants(self) -> tuple[Variant, ...]:
        """The variants chosen so far, one for each bucket of shapes."""
        return tuple(self._variants.values())

    @property
    def resources(self) -> Any:
        """What the kernel takes of a GPU, known without one: shared memory, registers, spills, instructions.

        Raises `UsageError` for the CPU, and `InputError` where the mapping cannot fit.
        """
        runner: Any = self.runner(self._extents)
        if not hasattr(runner, "resources"):
            raise UsageError(
                f"a kernel for {self.target} has no resources to tell", hint="those of a GPU have: target='cuda:90'"
            )
        return runner.resources

    def variant(self, extents: Dict[str, int]) -> Variant:
        """The variant that serves the given extents."""
        stands_for = self._bucket(extents)
        key = tuple(stands_for[r] for r in self.cascade.ranks)
        found = self._variants.get(key)
        if found is None:
            with self._locks.of("variants"):
                found = self._variants.get(key) or self._choose(stands_for)
                self._variants[key] = found
        return found

    def serve(self, extents: Dict[str, int], like: Dict[str, int]) -> None:
        """Let other extents be served by the variant of these, unless they have one; what that keeps on chip must be
        as large for both."""
        key = tuple(self._bucket(extents)[r] for r in self.cascade.ranks)
        if key not in self._variants:
            self._variants[key] = self.variant(like)

    def runner(self, extents: Dict[str, int]) -> Runner:
        """The program that serves the given extents, built if need be. Variants of one source share a program."""
        variant = self.variant(extents)
        found = self._built.get(variant.source)
        if found is None:
            with self._locks.of(variant.source):
                found = self._built.get(variant.source)
                if found is None:
                    found = self._built[variant.source] = variant.build()
        return found

    # Calls

    def __call__(self, *unnamed: Any, out: Any = None, **inputs: Any) -> Any:
        if unnamed:
            raise InputError(
                f"arguments of `{self.cascade.name}` have names, and {len(unnamed)} came without one",
                hint=f"call it with {', '.join(f'{p.name}=…' for p in self.cascade.params)}",
            )
        latest = self._latest
        if latest is not None and (done := latest.again(inputs, out)) is not ANEW:
            return done
        try:
            program = self._runs[tuple([inputs[name].shape for name in self._tensors])]
        except (KeyError, AttributeError, TypeError):
            program = self._meet(inputs)
        done = program.run(inputs, out)
        self._latest = program
        return done

    def launcher(self, inputs: Dict[str, Any], out: Sequence[Any]) -> Callable[[Sequence[Any], list[int]], None] | None:
        """The program for tensors that lie as these do, called with numbers and addresses and nothing checked again.

        None where the target has no such thing. Raises what a call raises for arguments that do not fit.
        """
        made: Any = getattr(self._meet(inputs), "launcher", None)
        return None if made is None else made(inputs, out)

    def bind(self, inputs: Dict[str, Any], out: Sequence[Any]) -> Any:
        """The program for tensors that lie as these do, with their addresses filled in (`runtime.Bound`).

        None where the target or the program has no such thing. Raises what a call raises for arguments that do not fit.
        """
        made: Any = getattr(self._meet(inputs), "bind", None)
        return None if made is None else made(inputs, out)

    def _meet(self, inputs: Dict[str, Any]) -> Runner:
        """The program for arguments of new shapes. What is no array is for the program itself to refuse."""
        shapes: dict[str, tuple[int, ...]] = {}
        for p in self.cascade.params:
            shape = getattr(inputs.get(p.name), "shape", None)
            if not p.indices:
                shapes[p.name] = ()
            elif shape is None:
                return self.runner(self._extents)
            else:
                shapes[p.name] = tuple(map(int, shape))
        extents = resolve(self.cascade, {}, shapes)
        self._check(extents)
        run = self.runner(extents)
        while len(self._runs) >= SHAPES:
            self._runs.pop(next(iter(self._runs)), None)
        self._runs[tuple(inputs[name].shape for name in self._tensors)] = run
        return run

    def __repr__(self) -> str:
        return f"<castile kernel {self.cascade.name} for {self.target}, {len(self._variants)} variants>"
