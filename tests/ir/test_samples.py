"""Random inputs that a cascade can take."""

from __future__ import annotations

import numpy as np

from castile.ir.evaluate import evaluate
from castile.ir.parse import parse
from castile.ir.samples import integer_spans, random_inputs


def test_random_integers_stay_inside_what_they_index() -> None:
    c = parse(
        "def f(T: f32[v, d], page: i32[n], length: i32[n], by: i32) -> Y:\n"
        "    Y[n, d] = where(d < length[n], T[2 * page[n] + 1, d], 0) * (7 // by)\n"
    )
    extents = {"v": 10, "d": 5, "n": 100}
    spans = integer_spans(c, extents)
    assert spans == {"page": (0, 4), "length": (1, 5), "by": (1, 7)}
    inputs = random_inputs(c, extents, 0)
    assert set(np.unique(inputs["page"])) == {0, 1, 2, 3, 4}
    evaluate(c, inputs)
