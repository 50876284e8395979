"""What random cascades are made of: the parts of the language that they may use, types, ranks, monoids, tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from castile.ir.cascade import (
    Call,
    Const,
    Expr,
)
from castile.ir.dtypes import DTYPES
from castile.ir.parse import parse

# A choice of an integer between two, both included.
Choose = Callable[[int, int], int]


@dataclass(frozen=True)
class Features:
    """Which parts of the language a random cascade may use."""

    masks: bool = True
    gathers: bool = True
    affine: bool = True
    scans: bool = True
    monoids: bool = True
    nested: bool = True
    casts: bool = True
    integers: bool = True
    bools: bool = True
    scalars: bool = True
    special: bool = True  # exp, log, tanh and other functions that round
    literal_extents: bool = True
    derived: bool = True  # parameters such as W: u32[k // 2], and ranks bounded by x[2 * p + r]
    empty: bool = True  # extents of 0
    shadowing: bool = True


ALL = Features()
# What tensor programs are made of: no scans, monoids, integers or functions.
PLAIN = Features(
    masks=False, gathers=False, affine=False, scans=False, monoids=False, nested=False, casts=False, integers=False,
    bools=False, special=False, literal_extents=False, derived=False, empty=False, shadowing=False,
)  # fmt: skip

FLOATS = ("f32", "f64", "bf16", "f16", "f8e4m3", "f8e5m2")
INTEGERS = ("i64", "i32", "i16", "i8", "u8", "u32")
RANKS = ("i", "j", "k", "m", "n")
MINUS_INFINITY = Call("neg", (Const(float("inf")),))

MONOIDS = {
    m.name: m
    for m in parse(
        """
@monoid(identity=(-inf, 0.0))
def lse(m, l, n, s) -> (M, L):
    M = maximum(m, n)
    L = l * exp(m - M) + s * exp(n - M)

@monoid(identity=(0, 0.0))
def tally(c, t, d, u) -> (C, T):
    C = c + d
    T = t + u

@monoid(identity=(1.0, 0.0))
def affine(a, b, p, q) -> (A, B):
    A = a * p
    B = b * p + q

@monoid(identity=(-inf, 0))
def best(v, at, w, here) -> (V, At):
    V = maximum(v, w)
    At = where(w > v, here, at)

@monoid(identity=0)
def alternate(a, b) -> c:
    c = b - a

@monoid(identity=False)
def parity(a, b) -> c:
    c = (a | b) & ~(a & b)

def nothing(x: f32) -> Y:
    Y = x
"""
    ).monoids
}


@dataclass(frozen=True)
class Tensor:
    """What a statement may read: a tensor's axes, each with the rank or index that spans it and its size."""

    name: str
    dtype: str
    axes: tuple[tuple[Expr, int], ...]


def kind_of(dtype: str) -> str:
    return "float" if DTYPES[dtype].is_float else "bool" if dtype == "bool" else "int"
