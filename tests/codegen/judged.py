"""What a program gave beside the oracle, within the oracle's bound."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import castile
from castile.ir.bound import judge


def within_bound(c: castile.Cascade, inputs: Mapping[str, Any], got: Any) -> None:
    """``got`` is one result, or a tuple with one for each output."""
    results = got if isinstance(got, tuple) else (got,)
    for judgement in judge(c, inputs, dict(zip(c.outputs, results, strict=True))):
        assert judgement.ok, str(judgement)
