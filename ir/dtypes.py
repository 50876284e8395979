"""The element types: one row each, and what rounding to a floating format means.

Float formats follow IEEE 754 (f64, f32, f16), bfloat16 and the OCP 8-bit formats (arXiv 2209.05433).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class DType:
    """One element type.

    ``kind`` is "float", "int", "uint" or "bool"; ``bits`` its size in memory. For floats ``precision`` counts the
    significand's bits with the hidden one, ``min_exponent`` is the exponent of the smallest normal number,
    ``largest`` the greatest finite value, ``overflow`` what a greater one becomes. ``compute`` names the type in
    which arithmetic on it is done; ``numpy``, ``triton`` and ``cpp`` are the spellings elsewhere.
    """

    name: str
    kind: str
    bits: int
    compute: str
    numpy: str
    triton: str
    cpp: str
    precision: int = 0
    min_exponent: int = 0
    largest: float = 0.0
    overflow: float = float("inf")

    @property
    def is_float(self) -> bool:
        return self.kind == "float"

    @property
    def is_integer(self) -> bool:
        return self.kind in ("int", "uint")

    @property
    def unit_roundoff(self) -> float:
        """Largest relative error of rounding to nearest: 2^-precision; 0 for integers."""
        return 2.0**-self.precision if self.is_float else 0.0

    @property
    def lowest(self) -> int:
        """Least integer of an integer type."""
        return -(1 << (self.bits - 1)) if self.kind == "int" else 0

    @property
    def highest(self) -> int:
        """Greatest integer of an integer type."""
        if self.kind == "bool":
            return 1
        return (1 << (self.bits - 1 if self.kind == "int" else self.bits)) - 1


_nan = float("nan")
_ROWS = (
    #      name      kind    bits compute numpy            triton          C++         p   emin  largest
    DType("f64", "float", 64, "f64", "float64", "tl.float64", "double", 53, -1022, 1.7976931348623157e308),
    DType("f32", "float", 32, "f32", "float32", "tl.float32", "float", 24, -126, 3.4028234663852886e38),
    DType("f16", "float", 16, "f32", "float16", "tl.float16", "f16", 11, -14, 65504.0),
    DType("bf16", "float", 16, "f32", "bfloat16", "tl.bfloat16", "bf16", 8, -126, 3.3895313892515355e38),
    DType("f8e4m3", "float", 8, "f32", "float8_e4m3fn", "tl.float8e4nv", "f8e4m3", 4, -6, 448.0, _nan),
    DType("f8e5m2", "float", 8, "f32", "float8_e5m2", "tl.float8e5", "f8e5m2", 3, -14, 57344.0),
    DType("i64", "int", 64, "i64", "int64", "tl.int64", "int64_t"),
    DType("i32", "int", 32, "i32", "int32", "tl.int32", "int32_t"),
    DType("i16", "int", 16, "i32", "int16", "tl.int16", "int16_t"),
    DType("i8", "int", 8, "i32", "int8", "tl.int8", "int8_t"),
    DType("u8", "uint", 8, "i32", "uint8", "tl.uint8", "uint8_t"),
    DType("u32", "uint", 32, "u32", "uint32", "tl.uint32", "uint32_t"),
    DType("bool", "bool", 8, "bool", "bool", "tl.int1", "bool"),
)

DTYPES: Mapping[str, DType] = MappingProxyType({row.name: row for row in _ROWS})


# Values that are rounded at once, so that the temporaries of a large array stay small.
PIECE = 1 << 18


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The NumPy dtype of a castile type; bf16 and the 8-bit floats come from ml_dtypes."""
    spelled = DTYPES[name].numpy
    if name in ("bf16", "f8e4m3", "f8e5m2"):
        import ml_dtypes

        spelled = getattr(ml_dtypes, spelled)
    return np.dtype(spelled)


def rounds(name: str) -> bool:
    """Whether a cast to this type is a rounding point of the oracle: f64 and f32 are not (design, section 2)."""
    return DTYPES[name].is_float and name not in ("f64", "f32")


def round_to(x: Array, name: str) -> Array:
    """Round float64 values to a float format: nearest, ties to even, subnormals kept, overflow as the format has it."""
    if x.size > PIECE and x.ndim:
        whole = np.empty(x.shape)
        flat, given = whole.reshape(-1), np.ascontiguousarray(x).reshape(-1)
        for start in range(0, x.size, PIECE):
            flat[start : start + PIECE] = round_to(given[start : start + PIECE], name)
        return whole
    row = DTYPES[name]
    with np.errstate(all="ignore"):
        _, exponent = np.frexp(x)
        quantum = np.ldexp(1.0, np.maximum(exponent - 1, row.min_exponent) - (row.precision - 1))
        rounded = np.rint(x / quantum) * quantum
    overflow = np.copysign(row.overflow, x)
    rounded = np.where(np.abs(rounded) > row.largest, overflow, rounded)
    nonfinite = np.where(np.isinf(x), overflow, x)
    return np.where(np.isfinite(x), rounded, nonfinite)


def wrap(x: Array, name: str) -> Array:
    """Reduce int64 values modulo 2^bits into an integer type, as two's complement arithmetic does."""
    row = DTYPES[name]
    if row.kind == "bool":
        return np.asarray(x != 0)
    if row.bits == 64:
        return x
    low = x & ((1 << row.bits) - 1)
    return low - ((low >> (row.bits - 1)) << row.bits) if row.kind == "int" else low
