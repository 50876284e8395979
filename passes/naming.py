"""Names for what a derivation makes: after the user's tensor that needs it.

Attention's state is ``M``, ``L`` and ``O_sum``: the maximum and the normaliser are tensors of the user's, the third is
the sum that O is made of. The sums with lower powers that a centred one moves with end in their powers: ``var_1``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from .centred import count_of, lower_powers
from .emptiness import is_mask
from .forms import Atom, Form, Monomial, Value, values_inside
from .plan import Plan

# Names of what no tensor of the user's needs by itself.
_PLAIN = {"max": "top", "min": "bottom", "argmax": "place", "exponent": "exponent", "sum": "part"}


def wanted_names(forms: Mapping[str, Value], plan: Plan, groups: Iterable[list[Atom]]) -> dict[bytes, str]:
    """A name for each reduction that needs a tensor, not yet told apart from other tensors' names."""
    holders = _holders(forms)
    tensors = {v.digest: n for n, v in reversed(list(forms.items())) if isinstance(v, Form) and v.constant is None}
    names = {d: f"{holder}_{op}" for d, (holder, op) in holders.items()}
    for group in groups:
        for a in group:
            gauge = plan.gauge(a)
            if gauge is None:
                continue
            base = tensors.get(gauge.exponent.digest) or holders.get(a.digest, ("", ""))[0]
            for e in gauge.extremes:
                kind = "exponent" if plan.kind == "exponent" and not gauge.power else e.name
                names.setdefault(e.digest, _body_name(e, tensors) or (f"{base}_{kind}" if base else _PLAIN[kind]))
        for a in sorted((a for a in group if a.digest in plan.reductions.centred), key=_size, reverse=True):
            base = names.get(a.digest, "").removesuffix("_sum")
            for powers, lower in lower_powers(a):
                if base and lower != count_of(a.ranks):
                    names.setdefault(lower.digest, f"{base}_{''.join(map(str, powers))}")
        for a in group:
            if a == count_of(a.ranks):
                names[a.digest] = "count"
            names.setdefault(a.digest, _body_name(a, tensors) or _PLAIN.get(a.name, "part"))
    return names


def _holders(forms: Mapping[str, Value]) -> dict[bytes, tuple[str, str]]:
    """For each reduction the first tensor of the user's that is made of it, directly or inside another reduction."""
    found: dict[bytes, tuple[str, str]] = {}
    for name, value in forms.items():
        for x in values_inside(value, into=lambda x: not _is_reduction(x)):
            if isinstance(x, Atom) and _is_reduction(x):
                found.setdefault(x.digest, (name, x.name))
    for name, value in forms.items():
        for x in values_inside(value):
            if isinstance(x, Atom) and _is_reduction(x):
                found.setdefault(x.digest, (name, x.name))
    return found


def _is_reduction(x: Value) -> bool:
    return isinstance(x, Atom) and x.kind == "red"


def _body_name(a: Atom, tensors: Mapping[bytes, str]) -> str | None:
    """``S_max`` for the maximum of S, masks aside."""
    body = a.args[0]
    if not isinstance(body, Form):
        return None
    bare = Form({Monomial(m.factors, m.exponent): q for m, q in body.terms.items() if not is_mask(m)})
    held = tensors.get(body.digest) or tensors.get(bare.digest)
    return f"{held}_{a.name}" if held is not None else None


def _size(a: Atom) -> tuple[int, bytes]:
    return len(lower_powers(a)), a.digest
