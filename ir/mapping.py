"""Mappings as values: how a cascade is cut into tiles and run on a target, with a JSON form.

A mapping says which derived form runs, how large each rank's tile is, into how many pieces a streamed rank is split,
and what the target's own knobs are set to. What it does not say is the target's default. A mapping may come from a
stranger's file, so every field is checked here before anything is compiled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping as Dict
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from .errors import InputError, did_you_mean

FORMS = ("none", "defer", "full")
GAUGES = ("maximum", "exponent")

# The forms that differ, of fewest passes first: gauges tell apart what streams.
ALTERNATIVES = (("full", "maximum"), ("full", "exponent"), ("defer", "maximum"), ("none", "maximum"))

LARGEST_TILE = 1 << 16
LARGEST_SPLIT = 1 << 12


@dataclass(frozen=True, slots=True)
class Knob:
    """A choice: what it does, on which kind of target ("cpu", "gpu" or "all"), and the values it may take."""

    name: str
    target: str
    values: tuple[int, ...]
    default: int
    does: str


# "gpu" knobs are Triton's, "cpu" knobs the C++ printer's, the others the tile program's. Truth values are 0 and 1.
KNOBS: Dict[str, Knob] = MappingProxyType(
    {
        k.name: k
        for k in (
            Knob("warps", "gpu", (1, 2, 4, 8, 16), 4, "warps of a program"),
            Knob("stages", "gpu", (1, 2, 3, 4, 5, 6, 7, 8), 2, "tiles of a streamed rank that are in flight"),
            Knob("swizzle", "gpu", (1, 2, 4, 8, 16), 1, "rows of a product's tiles that programs near in time take"),
            Knob("heavy", "gpu", (0, 1, 2), 0, "tiles with the most work go first: of their row, or (2) of all"),
            Knob("persistent", "gpu", (0, 1, 2, 4), 0, "programs of a unit that stay and take tile after tile"),
            Knob("descriptors", "gpu", (0, 1), 0, "tiles are loaded by descriptors where strides allow"),
            Knob("specialize", "gpu", (0, 1), 0, "warps share out loading and computing where Triton can"),
            Knob("ahead", "gpu", (0, 1), 0, "all that loops load is in flight, not operands of matrix products alone"),
            Knob("tf32x3", "gpu", (0, 1), 0, "f32 products are made of three of tf32 each"),
            Knob("hold", "all", (0, 1), 0, "inner reductions that fit on chip are one tile, loaded outside the loop"),
            Knob("align", "all", (1, 16, 32, 64, 128), 1, "loops that need no mask end at a multiple of this"),
            Knob("resident", "cpu", (0, 1024, 4096, 16384), 0, "rows and depths of one tile stay whole up to this"),
            Knob("through", "cpu", (0, 1), 0, "outputs are stored past the caches"),
            Knob("apart", "cpu", (0, 1), 0, "what a tile of a contraction's summed ranks shares leaves its product"),
            Knob(
                "narrow", "cpu", (0, 1), 0, "products of bytes and 8-bit floats are made in types that just hold them"
            ),
            Knob("meet", "cpu", (0, 1), 0, "loops go from the first to the last of data that can be equal"),
            Knob(
                "stored", "cpu", (0, 1), 0, "what rows of a product are made of is stored once, not made by each tile"
            ),
            Knob("group", "all", (0, 1), 0, "what follows an Einsum row by row joins its kernel"),
            Knob("join", "all", (0, 1), 0, "sums over one rank that need the same inner reductions are one kernel"),
            Knob("scatter", "cpu", (0, 1), 0, "with join, sums over another rank add to their output from there"),
        )
    }
)


@dataclass(frozen=True, slots=True)
class Mapping:
    """How a cascade runs.

    ``form`` is how far passes are merged ("none" as written, "defer", "full"), ``gauge`` how a streamed exponential is
    kept in range ("maximum" or "exponent"). ``tiles`` gives the tile of a rank in elements, ``splits`` the number of
    pieces of a streamed rank that run apart and are merged, ``knobs`` the choices of the target (`KNOBS`).
    Raises `InputError` for values outside their limits.
    """

    form: str = "full"
    gauge: str = "maximum"
    tiles: Dict[str, int] = field(default_factory=dict)
    splits: Dict[str, int] = field(default_factory=dict)
    knobs: Dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _one_of("form", self.form, FORMS)
        _one_of("gauge", self.gauge, GAUGES)
        for name, largest in (("tiles", LARGEST_TILE), ("splits", LARGEST_SPLIT)):
            given = _dictionary(name, getattr(self, name))
            for rank, size in given.items():
                if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= largest:
                    raise InputError(
                        f"the mapping's {name}[{rank!r}] is out of range", expected=f"1 to {largest}", got=repr(size)
                    )
            object.__setattr__(self, name, MappingProxyType(dict(sorted(given.items()))))
        given = _dictionary("knobs", self.knobs)
        for name, value in given.items():
            if name not in KNOBS:
                hint = did_you_mean(name, KNOBS) or f"the knobs are {', '.join(KNOBS)}"
                raise InputError(f"the mapping has a knob `{name}`, which does not exist", hint=hint)
            if type(value) is not int or value not in KNOBS[name].values:
                values = ", ".join(map(str, KNOBS[name].values))
                raise InputError(f"the mapping's knob `{name}` is out of range", expected=values, got=repr(value))
        object.__setattr__(self, "knobs", MappingProxyType(dict(sorted(given.items()))))

    def __hash__(self) -> int:
        return hash(self.to_json())

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled and copied as what it says; read-only dictionaries are neither."""
        return Mapping.from_json, (self.to_json(),)

    def knob(self, name: str) -> int:
        """The value of a knob, its default where the mapping does not say."""
        return self.knobs.get(name, KNOBS[name].default)

    def to_dict(self) -> dict[str, Any]:
        return {
            "form": self.form,
            "gauge": self.gauge,
            "tiles": dict(self.tiles),
            "splits": dict(self.splits),
            "knobs": dict(self.knobs),
        }

    def to_json(self) -> str:
        """One line of JSON; the same mapping gives the same text. `from_json` reads it."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, given: str | Dict[str, Any]) -> Mapping:
        """A mapping from its JSON text or from the object that it holds; fields left out take their defaults.

        Raises `InputError` for what is no mapping.
        """
        data: Any = given
        if isinstance(given, str):
            try:
                data = json.loads(given)
            except (ValueError, RecursionError) as error:
                raise InputError(
                    f"the mapping is no JSON: {error}", hint="a kernel has its own: k.mapping.to_json()"
                ) from None
        data = _dictionary("mapping", data)
        fields = ("form", "gauge", "tiles", "splits", "knobs")
        for name in data:
            if name not in fields:
                hint = did_you_mean(name, fields) or f"its fields are {', '.join(fields)}"
                raise InputError(f"a mapping has no field `{name}`", hint=hint)
        return cls(**data)

    def __str__(self) -> str:
        parts = [self.form, self.gauge] if self.form == "full" else [self.form]
        parts += [f"{r}:{n}" for r, n in self.tiles.items()]
        parts += [f"split {r}/{n}" for r, n in self.splits.items()]
        parts += [f"{k}={v}" for k, v in self.knobs.items()]
        return " ".join(parts)


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(f"the mapping's {name} is unknown", expected=" or ".join(allowed), got=repr(value))


def _dictionary(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Dict) or not all(isinstance(k, str) for k in value):
        raise InputError(f"`{name}` is no dictionary", expected="names with values", got=type(value).__name__)
    return dict(value)
