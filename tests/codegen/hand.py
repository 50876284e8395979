"""Tile programs written by hand in few words."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import castile
from castile.codegen.runtime import CpuProgram
from castile.ir.cascade import Access, Cascade, Expr, Param, Rank
from castile.ir.tile import GridRank, HeldRank, Load, Op, Store, Tile, TileKernel


@dataclass(frozen=True)
class Written:
    """Kernels behind the signature of a cascade."""

    cascade: Cascade
    kernels: tuple[TileKernel, ...]
    scratch: tuple[Param, ...] = ()


def expr(text: str, tiles: str = "") -> Expr:
    """An expression of the language over named tiles, each a name or ``name:dtype``; other letters are ranks."""
    named = [(*word.split(":"), "f32")[:2] for word in tiles.split()]
    letters = dict.fromkeys(re.findall(r"\b[a-z]\b(?!\()", text + " z"))
    ranks = ", ".join(c for c in letters if c not in dict(named))
    params = "".join(f", {name}: {dtype}" for name, dtype in named)
    return castile.parse(f"def f(X_: f32[{ranks}]{params}) -> Y_:\n    Y_[{ranks}] = {text}\n").einsums[0].expr


def tile(name: str, axes: str = "", dtype: str = "f32") -> Tile:
    return Tile(name, tuple(axes.split()), dtype)


def access(name: str, axes: str = "") -> Access:
    return Access(name, tuple(Rank(r) for r in axes.split()))


def load(name: str, source: str, axes: str = "", dtype: str = "f32") -> Load:
    """Load a tensor whose indices are the tile's axes."""
    return Load(tile(name, axes, dtype), access(source, axes))


def store(target: str, axes: str, value: Expr | str) -> Store:
    return Store(access(target, axes), tuple(axes.split()), Access(value) if isinstance(value, str) else value)


def written(
    signature: str,
    outputs: Mapping[str, str],
    grid: Mapping[str, int],
    body: Sequence[Op],
    held: Mapping[str, int] | None = None,
) -> Written:
    """``signature`` lists parameters as the language does; ``outputs`` gives "dtype" or "dtype[ranks]" by name."""
    lines, made = [], []
    for name, kind in outputs.items():
        dtype, _, ranks = kind.rstrip("]").partition("[")
        value = "True" if dtype == "bool" else "1"
        lines.append(f"    {name}[{ranks}]: {dtype} = {value}" if ranks else f"    {name}: {dtype} = {value}")
        made.append(Param(name, dtype, tuple(Rank(r.strip()) for r in ranks.split(",") if r.strip())))
    results = ", ".join(outputs)
    c = castile.parse(
        f"def f({signature}) -> {f'({results})' if len(outputs) > 1 else results}:\n" + "\n".join(lines) + "\n"
    )
    tiles = tuple(GridRank(r, n) for r, n in grid.items())
    kept = tuple(HeldRank(r, n, r) for r, n in (held or {}).items())
    return Written(c, (TileKernel("f", (*c.params, *made), tuple(outputs), tiles, tuple(body), held=kept),))


def built(every: Mapping[str, Written]) -> dict[str, CpuProgram]:
    """Every program for the CPU, compiled in two goes at once."""
    programs = list(every.values())
    with ThreadPoolExecutor(2) as pool:
        halves = list(pool.map(CpuProgram.build_all, (programs[::2], programs[1::2])))
    return dict(zip([*list(every)[::2], *list(every)[1::2]], (*halves[0], *halves[1]), strict=True))
