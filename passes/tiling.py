"""How the tiles of kernels are cut."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Tiling:
    """Tile sizes: of the last output rank, of the next one along which an operand is shared, and of streamed ranks.
    All others are taken one by one.

    ``ranks`` names the tile of a rank, wherever it is iterated, and goes before these three; only kernels beside a
    contraction that share nothing have fewer rows (`few_rows`). With ``hold``, an inner reduction over ranks that fit
    on chip takes them as one tile, so that what it reads is loaded outside the loop; loops that need no mask end at a
    multiple of ``align``. With ``group``, what follows an Einsum over the same rows joins its kernel; with
    ``through``, outputs are stored past the caches; rows of at most ``resident`` elements are kept whole. With
    ``join``, sums that need the same inner reductions are one kernel, and with ``scatter`` those over another rank
    belong to it; with ``apart``, what is the same all over a tile of a contraction's summed ranks leaves its product;
    with ``narrow``, products of whole numbers of 8 bits and of floats of 8 bits are made in types that just hold them;
    with ``meet``, loops go from the first to the last tile in which data can be equal that have to be; with
    ``stored``, what rows of a product are made of is written down once. ``splits`` says in how many pieces a reduced
    rank runs.
    """

    inner: int = 64
    outer: int = 16
    stream: int = 64
    ranks: Mapping[str, int] = field(default_factory=dict)
    hold: bool = False
    align: int = 1
    group: bool = False
    through: bool = False
    resident: int = 0
    join: bool = False
    scatter: bool = False
    apart: bool = False
    narrow: bool = False
    meet: bool = False
    stored: bool = False
    splits: Mapping[str, int] = field(default_factory=dict)
