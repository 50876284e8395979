"""The pipeline on one screen: what the public functions do, from text to answer.

    parse → passes → map → emit → load          (today: parse → explain)

Imports everything but `frontend` and `cli`.
"""

from __future__ import annotations

from collections.abc import Mapping

from .ir.cascade import Cascade
from .ir.extents import resolve
from .passes.count import count_passes
from .passes.explain import Explanation, einsum_reports, rank_reports, tensor_reports


def explain(c: Cascade, shapes: Mapping[str, int] | None = None) -> Explanation:
    """What castile knows of a cascade: passes over each rank, types, iteration spaces, operations and bytes.

    ``shapes`` gives extents by rank, for numbers beside the formulas. ``print(castile.explain(c))`` is for people,
    `Explanation.to_json` for programs. Raises `InputError` where an extent is missing or does not fit.
    """
    before = count_passes(c)
    after = before
    return Explanation(
        cascade=c,
        passes={rank: (before[rank], after.get(rank, 0)) for rank in before},
        ranks=rank_reports(c),
        tensors=tensor_reports(c),
        einsums=einsum_reports(c),
        extents=resolve(c, shapes) if shapes else {},
    )
