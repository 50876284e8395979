"""Tables of measured kernels: their workloads, how mappings are drawn, and the folder that tells how far one came."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

import castile
from castile.autotune.space import Space
from castile.codegen import targets
from castile.ir.mapping import Mapping as Tuned
from castile.passes.mapped import mapped

ROOT = Path(__file__).resolve().parent.parent
CASCADES = ROOT / "examples" / "cascades"

Shapes = dict[str, int]


def _attention(*rows: tuple[int, int, int, int]) -> tuple[Shapes, ...]:
    return tuple({"b": 1, "h": h, "q": q, "k": k, "d": d, "f": d} for h, q, k, d in rows)


def _two(*rows: tuple[int, int]) -> tuple[Shapes, ...]:
    return tuple({"n": n, "k": k} for n, k in rows)


def _three(*rows: tuple[int, int, int]) -> tuple[Shapes, ...]:
    return tuple({"m": m, "n": n, "k": k} for m, n, k in rows)


# The cascades, each at several extents.
WORKLOADS: Mapping[str, tuple[Shapes, ...]] = {
    "gemm": _three((512, 512, 512), (64, 1024, 1024), (16, 2048, 1024), (1024, 384, 768)),
    "softmax": _two((1024, 1024), (4096, 320), (256, 8192), (48, 40000)),
    "attention": _attention((8, 512, 512, 64), (4, 1024, 1024, 64), (4, 256, 256, 128), (8, 96, 1500, 64)),
    "layernorm": _two((1024, 1024), (4096, 320), (256, 8192), (48, 40000)),
    "gemm_int4": _three((16, 1024, 1024), (128, 1024, 512), (1, 4096, 2048), (512, 512, 512)),
    "attention_causal": _attention((8, 512, 512, 64), (4, 1024, 1024, 64), (4, 256, 256, 128), (8, 640, 640, 80)),
    "rmsnorm": _two((1024, 1024), (4096, 320), (256, 8192), (48, 40000)),
    "gemm_bias_gelu": _three((512, 512, 512), (64, 1024, 1024), (16, 2048, 1024), (1024, 384, 768)),
    "softmax_backward": _two((1024, 1024), (4096, 320), (256, 8192), (48, 40000)),
    "log_softmax": _two((1024, 1024), (4096, 320), (256, 8192), (48, 40000)),
    "rmsnorm_gemm": _three((512, 512, 512), (64, 1024, 1024), (16, 2048, 1024)),
    "attention_gqa": _attention((8, 512, 512, 64), (16, 128, 1024, 64), (4, 256, 256, 128)),
    "gemm_nt": _three((512, 512, 512), (64, 1024, 1024), (16, 2048, 1024)),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Entry:
    """One mapping of a workload, and the hash of the source that it prints."""

    mapping: Tuned
    source: str


@dataclass(frozen=True, slots=True)
class Workload:
    """A cascade at some extents with the mappings to measure, the default first."""

    name: str
    shapes: Shapes
    entries: tuple[Entry, ...]

    @property
    def key(self) -> str:
        return " ".join([self.name, *(f"{r}={n}" for r, n in self.shapes.items())])


class State:
    """The folder that holds what was planned, built, checked and measured: lines of JSON, only ever appended."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def append(self, what: str, row: Mapping[str, Any]) -> None:
        with (self.folder / f"{what}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def rows(self, what: str) -> Iterator[dict[str, Any]]:
        path = self.folder / f"{what}.jsonl"
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                yield json.loads(line)

    def workloads(self) -> list[Workload]:
        """What was planned: the first extents of every cascade, then the second, …"""
        found = []
        for row in self.rows("plan"):
            entries = tuple(Entry(Tuned.from_json(m), s) for m, s in row["entries"])
            found.append((row["place"], Workload(row["name"], row["shapes"], entries)))
        return [w for _, w in sorted(found, key=lambda pair: pair[0])]

    def cache(self, name: str) -> Path:
        """The build cache of a cascade: small folders are quick to look things up in."""
        path = self.folder / "cache" / name
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        return path


@cache
def cascade(name: str) -> castile.Cascade:
    return castile.load(CASCADES / f"{name}.cascade")


def printed(name: str, mapping: Tuned, shapes: Shapes) -> str:
    """The source of a mapping, without the header."""
    return targets.print_source(mapped(cascade(name), mapping, shapes).program, mapping, "cpu")


def digest(source: str) -> str:
    return hashlib.sha256(source.encode()).hexdigest()[:24]


def draw(name: str, extents: Shapes, space: Space, count: int, chosen: dict[str, Tuned]) -> list[Entry]:
    """The default, its neighbours, mappings that other extents have too, and random ones; each source once."""
    combinations = space.combinations()
    every = [space.mapping(*one) for one in combinations]
    usual = space.usual
    near = [
        m
        for m, (form, values) in zip(every, combinations, strict=True)
        if (form != 0) + sum(a != b for a, b in zip(values, usual, strict=True)) == 1
    ]
    shared = [m for m in chosen.values() if _belongs(m, space)]
    rng = np.random.default_rng(0)
    others = [every[i] for i in rng.permutation(len(every))]
    found: dict[str, Tuned] = {}
    for m in (every[0], *near, *shared, *others):
        found.setdefault(digest(printed(name, m, extents)), m)
        if len(found) >= count:
            break
    chosen.update({m.to_json(): m for m in found.values()})
    return [Entry(m, s) for s, m in found.items()]


def _belongs(m: Tuned, space: Space) -> bool:
    """Whether a space has a mapping."""
    parts = {"tiles": m.tiles, "splits": m.splits, "knobs": m.knobs}
    values = tuple(int(parts[c.part].get(c.name, c.default)) for c in space.choices)
    if (m.form, m.gauge) not in space.forms or any(
        v not in c.values for v, c in zip(values, space.choices, strict=True)
    ):
        return False
    form = space.forms.index((m.form, m.gauge))
    return space.mapping(form, values) == m and space.fits(form, values)
