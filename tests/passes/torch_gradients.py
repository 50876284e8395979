"""Gradients of cascades beside those of torch.autograd, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch_cascade

import castile
from castile.ir.cascade import Cascade, Cast, Expr, transform
from castile.ir.dtypes import DTYPES
from castile.ir.evaluate import evaluate
from castile.passes.grad import forward, grad

Given = dict[str, Any]


@cache
def exact(c: Cascade) -> Cascade:
    """The cascade without roundings, as torch differentiates it: casts pass gradients on unchanged."""

    def wide(dtype: str) -> str:
        return "f64" if DTYPES[dtype].is_float else dtype

    def uncast(e: Expr) -> Expr:
        return e.arg if isinstance(e, Cast) and DTYPES[e.dtype].is_float and e.dtype not in ("f32", "f64") else e

    einsums = tuple(
        replace(
            e,
            outputs=tuple(replace(o, dtype=None if o.dtype is None else wide(o.dtype)) for o in e.outputs),
            expr=transform(e.expr, uncast),
        )
        for e in c.einsums
    )
    return replace(c, params=tuple(replace(p, dtype=wide(p.dtype)) for p in c.params), einsums=einsums)


def given(c: Cascade, values: Given) -> Given:
    return {n: np.asarray(v, np.float64 if DTYPES[c.param_of[n].dtype].is_float else None) for n, v in values.items()}


def wanted(c: Cascade, g: Cascade) -> list[str]:
    """The parameters that a cascade of gradients is about, in order."""
    about = g.doc.split("with respect to ")[1].split(".")[0]
    return [name for name in about.split(", ") if name in c.param_of]


def prepared(c: Cascade, g: Cascade, values: Given, seed: int = 0) -> tuple[Given, Given]:
    """The inputs of a cascade and random adjoints as its gradient takes them; and the adjoints by output."""
    rng = np.random.default_rng(seed)
    outputs = evaluate(c, values)
    adjoints = {o: rng.standard_normal(outputs[o].shape) for o in c.outputs if outputs[o].dtype == np.float64}
    named = {p.name for p in g.params} - set(values)
    extra = {}
    for o, d in adjoints.items():
        # The adjoint of O is dO, or dO2 where the cascade has a dO of its own.
        name = next((n for n in (f"d{o}", f"d{o}2") if n in named and n not in c.einsum_of), None)
        if name is not None:
            extra[name] = d
    return {**values, **extra}, adjoints


def agree(got: Given, want: Given, names: Sequence[str], what: str) -> None:
    scale = max((float(np.abs(w).max(initial=0.0)) for w in want.values()), default=1.0)
    for (output, x), name in zip(got.items(), names, strict=True):
        w = want[name]
        assert x.shape == w.shape, (what, output)
        largest = float(np.abs(w).max(initial=0.0))
        slack = 1e-9 * largest + 1e-13 * scale + 1e-14
        np.testing.assert_allclose(x, w, rtol=0, atol=slack, err_msg=f"{what} {output}")


def check(c: Cascade, values: Given, saved: Sequence[str] = (), wrt: Sequence[str] | None = None) -> Cascade:
    """The gradient agrees with torch's; what is saved is what `forward` computes."""
    g = grad(c, wrt, saved)
    assert castile.parse(str(g)) == g
    names = wanted(c, g)
    full, adjoints = prepared(c, g, values)
    full |= evaluate(forward(c, wrt, saved), values)
    want = torch_cascade.gradients(c, values, names, adjoints)
    agree(evaluate(g, {p.name: full[p.name] for p in g.params}), want, names, c.name)
    return g
