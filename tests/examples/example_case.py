"""A case of an example cascade: small inputs of odd extents, and a reference in plain NumPy.

Each reference has the name of its cascade, takes its parameters by name and returns its results in order, in float64:

    @example(X="f32[3, 7]", eps=0.5)
    def norm(X, eps): ...

A string is an array of random values of that type, a number a scalar; a function of ``(rng, given)``, with the inputs
before it by name, makes anything else.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Maker = Callable[[np.random.Generator, dict[str, Any]], Any]

# NumPy's name of every type that can round an input.
TYPES = {
    "f64": np.float64,
    "f32": np.float32,
    "f16": np.float16,
    "bf16": ml_dtypes.bfloat16,
    "f8e4m3": ml_dtypes.float8_e4m3fn,
    "f8e5m2": ml_dtypes.float8_e5m2,
}


@dataclass(frozen=True)
class Case:
    """The inputs of one example, and the function that says what it must return."""

    inputs: dict[str, str | float | Maker]
    reference: Callable[..., Any]

    def draw(self) -> dict[str, Any]:
        """The inputs, the same in every run."""
        rng = np.random.default_rng(zlib.crc32(self.reference.__name__.encode()))
        given: dict[str, Any] = {}
        for name, wanted in self.inputs.items():
            given[name] = wanted(rng, given) if callable(wanted) else random(rng, wanted)
        return given

    def expected(self, given: dict[str, Any]) -> tuple[Array, ...]:
        with np.errstate(all="ignore"):
            result = self.reference(**given)
        return tuple(np.asarray(r, np.float64) for r in (result if isinstance(result, tuple) else (result,)))


CASES: dict[str, Case] = {}


def example(**inputs: str | float | Maker) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a reference under its name, with its inputs."""

    def register(reference: Callable[..., Any]) -> Callable[..., Any]:
        assert reference.__name__ not in CASES, reference.__name__
        CASES[reference.__name__] = Case(inputs, reference)
        return reference

    return register


def rounded(x: Array, dtype: str) -> Array:
    """The values of an array as they are in a narrower type."""
    return np.asarray(x, np.float64).astype(TYPES[dtype]).astype(np.float64)


def bf16(x: Array) -> Array:
    return rounded(x, "bf16")


def random(rng: np.random.Generator, wanted: str | float) -> Any:
    """``"f32[3, 5]"``: normal numbers, any integer of an integer type, True in two places of three."""
    if not isinstance(wanted, str):
        return wanted
    found = re.fullmatch(r"(\w+)\[([\d, ]+)\]", wanted)
    assert found, wanted
    dtype, shape = found[1], tuple(int(n) for n in found[2].split(","))
    if dtype in TYPES:
        return rounded(rng.normal(size=shape), dtype)
    if dtype == "bool":
        return rng.random(shape) < 2 / 3
    low, high = {"i8": (-127, 127), "u8": (0, 255), "u32": (0, 2**32 - 1)}[dtype]
    return rng.integers(low, high, shape, endpoint=True)


def integers(low: int, high: int, *shape: int) -> Maker:
    """Integers from low up to and without high."""
    return lambda rng, given: rng.integers(low, high, shape)


def uniform(low: float, high: float, *shape: int) -> Maker:
    return lambda rng, given: rng.uniform(low, high, shape).astype(np.float32).astype(np.float64)


def gradient(f: Callable[[Array], Any], x: Array) -> Array:
    """The gradient of a scalar function by complex steps, exact to rounding (Squire and Trapp 1998)."""
    result = np.empty(x.shape)
    for place in np.ndindex(*x.shape):
        moved = x.astype(np.complex128)
        moved[place] += 1e-100j
        result[place] = f(moved).imag / 1e-100
    return result
