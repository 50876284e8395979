"""What a run gave: for people, as JSON and as a file."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..ir.cascade import Cascade
from ..ir.types import tensor_types
from .inputs import Array, Given

if TYPE_CHECKING:
    from rich.text import Text

# How much of a result is shown.
ROWS, COLUMNS, POINTS = 4, 6, 8


@dataclass(frozen=True, slots=True)
class Result:
    """The outputs of a run and how they came about; ``at`` holds the coordinates of a sample, None for all of it."""

    cascade: Cascade
    given: Given
    outputs: Mapping[str, Array]
    seconds: float
    at: Mapping[str, Array] | None
    engine: str = "oracle"

    def packed(self) -> bytes:
        """An .npz file: outputs by name, a sample's coordinates as ``at_<rank>``."""
        buffer = io.BytesIO()
        arrays = {**self.outputs, **{f"at_{rank}": values for rank, values in (self.at or {}).items()}}
        np.savez(buffer, **arrays)  # type: ignore[arg-type]
        return buffer.getvalue()

    def document(self) -> dict[str, Any]:
        """What ``--json`` prints."""
        types = tensor_types(self.cascade)
        return {
            "name": self.cascade.name,
            "key": self.cascade.key,
            "engine": self.engine,
            "seconds": self.seconds,
            "extents": dict(self.given.extents),
            "inputs": {
                name: {
                    "dtype": types[name],
                    "shape": list(np.shape(self.given.values[name])),
                    "origin": self.given.origin[name],
                }
                for name in self.cascade.param_of
            },
            "at": None if self.at is None else {rank: values.tolist() for rank, values in self.at.items()},
            "outputs": {
                name: {
                    "dtype": types[name],
                    "shape": list(array.shape),
                    **summary(array),
                    **({"corner": corner(array).tolist()} if self.at is None else {"values": array.tolist()}),
                }
                for name, array in self.outputs.items()
            },
        }

    def __rich__(self) -> Text:
        from rich.text import Text

        c, types = self.cascade, tensor_types(self.cascade)
        text = Text(no_wrap=True, overflow="ignore")
        text.append(c.name, "bold")
        engine = "the float64 oracle" if self.engine == "oracle" else f"its kernel for {self.engine}"
        text.append(f"   by {engine} in {_time(self.seconds)}\n", "dim")
        for origin in ("file", "command line", "random"):
            names = [name for name, source in self.given.origin.items() if source == origin]
            if names:
                text.append(f"inputs    {origin}: {', '.join(names)}\n", "dim")
        text.append("extents   " + " ".join(f"{r}={n}" for r, n in self.given.extents.items()) + "\n", "dim")
        for name, array in self.outputs.items():
            ranks = next(o.ranks for o in c.einsum_of[name].outputs if o.name == name)
            if self.at is not None:
                shape = f"{len(array)} values of [{', '.join(ranks)}]"
            elif ranks:
                shape = "[" + ", ".join(f"{r}={n}" for r, n in zip(ranks, array.shape, strict=True)) + "]"
            else:
                shape = "scalar"
            text.append("\n" + name, "bold cyan")
            text.append(f"   {types[name]} {shape}   {_stated(summary(array))}\n")
            text.append(_grid(array) if self.at is None else self._sampled(name, ranks, array))
        text.right_crop(1)
        return text

    def _sampled(self, name: str, ranks: tuple[str, ...], array: Array) -> str:
        assert self.at is not None
        lines = []
        for n, value in enumerate(array[:POINTS]):
            place = ", ".join(f"{r}={self.at[r][n]}" for r in ranks)
            lines.append(f"    {name}[{place}] = {_number(value)}\n")
        return "".join(lines) + _more(len(array) - len(lines))


def summary(array: Array) -> dict[str, Any]:
    """Least, mean and greatest of the finite values, and how many are not finite."""
    values = array.astype(np.float64)
    finite = values[np.isfinite(values)]
    stated: dict[str, Any] = {"min": None, "mean": None, "max": None}
    if finite.size:
        stated = {"min": float(finite.min()), "mean": float(finite.mean()), "max": float(finite.max())}
    return {**stated, "nan": int(np.isnan(values).sum()), "infinite": int(np.isinf(values).sum())}


def corner(array: Array) -> Array:
    """The first rows and columns along the last two axes, the first entry along the others."""
    inner = array[(0,) * max(0, array.ndim - 2)] if array.size else array
    return inner[tuple(slice(0, n) for n in (ROWS, COLUMNS)[2 - min(2, inner.ndim) :])]


def _stated(found: Mapping[str, Any]) -> str:
    known = [f"{key} {_number(found[key])}" for key in ("min", "mean", "max") if found[key] is not None]
    odd = [f"{found[key]} {label}" for key, label in (("nan", "NaN"), ("infinite", "infinite")) if found[key]]
    return "   ".join([*(known or ["no finite value"]), *odd])


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _number(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float | np.floating) else str(value)


def _grid(array: Array) -> str:
    part = np.atleast_2d(corner(array))
    cells = [[_number(value) for value in row] for row in part] if part.ndim == 2 else []
    wide = max((len(cell) for row in cells for cell in row), default=0)
    lines = ["    " + "  ".join(cell.rjust(wide) for cell in row) + "\n" for row in cells if row]
    return "".join(lines) + _more(array.size - sum(map(len, cells)))


def _more(count: int) -> str:
    return f"    … and {count} more\n" if count > 0 else ""
