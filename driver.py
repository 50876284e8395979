"""The pipeline on one screen: what the public functions do, from text to answer.

    parse → passes → map → emit → load          (today: parse → explain)

Imports everything but `frontend` and `cli`.
"""

from __future__ import annotations

from collections.abc import Mapping

from .ir.cascade import Cascade
from .ir.extents import resolve
from .passes import account
from .passes.count import count_passes
from .passes.derive import alternatives
from .passes.explain import Explanation, einsum_reports, rank_reports, tensor_reports


def explain(c: Cascade, shapes: Mapping[str, int] | None = None) -> Explanation:
    """What castile knows of a cascade: how often each rank is traversed, as written and as derived, and why.

    Beside passes: the rewrites that fired, the state that streams, what blocks and why, the forms that a tuner may
    choose among, the kernels; and types, iteration spaces, operations and bytes.

    ``shapes`` gives extents by rank, for numbers beside the formulas. ``print(castile.explain(c))`` is for people,
    `Explanation.to_json` for programs. Raises `InputError` where an extent is missing or does not fit.
    """
    before = count_passes(c)
    forms = alternatives(c)
    best = forms[0]
    extents = resolve(c, shapes) if shapes else {}
    return Explanation(
        cascade=c,
        passes={rank: (count, best.passes.get(rank, 0)) for rank, count in before.items()},
        ranks=rank_reports(c),
        tensors=tensor_reports(c),
        einsums=einsum_reports(c),
        extents=extents,
        rewrites=account.rewrites(best),
        barriers=account.barriers(best),
        states=account.states(best),
        alternatives=account.alternatives(forms[1:]),
        kernels=account.kernels(best.cascade, extents),
    )
