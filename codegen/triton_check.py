"""What a generated file of Triton checks of itself when it is run."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from ..ir.cascade import Cascade, Param
from ..ir.dtypes import DTYPES
from ..ir.extents import bindings
from .names import safe
from .triton_module import Module, torch_dtype
from .triton_reference import has_reference, reference

# Points of an Einsum's iteration space that the reference goes through, and the extent of a rank where these allow.
POINTS, EXTENT = 1 << 22, 128


def self_check(m: Module, c: Cascade) -> Iterator[str]:
    """A ``__main__`` that draws inputs and compares results with the cascade ``c`` as written, in float64, and with
    those of tensors of other strides."""
    known = has_reference(c)
    ranks = {r: m.names("rank", r) for r in c.ranks}
    names = {p.name: m.names("tensor", p.name) for p in c.params}
    if known:
        yield from reference(c, names, ranks)
        yield ""
        yield ""
    yield 'if __name__ == "__main__":'
    yield "    torch.manual_seed(0)"
    device = "cpu" if m.target == "interpret" else "cuda"
    sizes = _sizes(m, c)
    for b in bindings(c):
        if b.param is not None:
            yield f"    {ranks[b.rank]} = {sizes[b.rank]}"
    for p in c.params:
        yield f"    {names[p.name]} = {_drawn(m, p, device)}"
    if known:
        for b in bindings(c):
            if b.param is None:
                yield from m.derived(b.rank, b.within)
    params = [names[p.name] for p in c.params]
    strided = [
        f"{n}.transpose(0, -1).contiguous().transpose(0, -1)" if p.indices else n
        for n, p in zip(params, c.params, strict=True)
    ]
    name = safe(c.name)
    yield f"    results = [{name}({', '.join(params)}), {name}({', '.join(strided)})]"
    yield "    got, strided = [r if isinstance(r, tuple) else (r,) for r in results]"
    wanted = f"reference({', '.join([*params, *(ranks[r] for r in c.ranks)])})" if known else "got"
    yield f"    wanted = {wanted}"
    yield f"    for name, x, y, z in zip({c.outputs!r}, got, strided, wanted):"
    yield "        x, y, z = (t.double().nan_to_num(nan=7e77) for t in (x, y, z))"
    narrow = any(DTYPES[p.dtype].bits < 32 and DTYPES[p.dtype].is_float for p in c.params) or any(
        o.dtype is not None and DTYPES[o.dtype].bits < 32 for e in c.einsums for o in e.outputs
    )
    yield f"        # Errors against the greatest element: sums of {'16-bit' if narrow else 'f32'} values, rounded."
    yield "        finite = z[z.abs() < 1e77].abs()"
    yield f"        allowed = {2e-2 if narrow else 1e-3} * (finite.max().item() if finite.numel() else 1.0)"
    yield "        for what, t in (('the result', x), ('the result for other strides', y)):"
    yield "            worst = (t - z).abs().nan_to_num(nan=0.0).max().item() if t.numel() else 0.0"
    yield "            assert worst <= allowed, f'{what} of {name} is off by {worst}'"
    yield "        print(name, tuple(x.shape), 'off by', worst, 'of', allowed, 'allowed')"
    against = "the cascade in float64" if known else "itself, for other strides"
    yield f'    print("agrees with {against}")'


def _sizes(m: Module, c: Cascade) -> dict[str, int]:
    """Extents for which the reference is not too slow, and which tiles do not divide."""
    most = 16 if m.target == "interpret" else EXTENT
    held = {h.of: h.size for k in m.program.kernels for h in k.held}
    sizes = {r: min(most, held.get(r, most)) for r in c.ranks}
    for e in c.einsums:
        ranks = list(dict.fromkeys([*e.output.ranks, *(r for n in e.reductions for r in n.ranks)]))
        while prod(sizes[r] for r in ranks) > POINTS:
            largest = max(ranks, key=lambda r: (sizes[r], -ranks.index(r)))
            sizes[largest] = sizes[largest] * 2 // 3
    return sizes


def _drawn(m: Module, p: Param, device: str) -> str:
    """Random values of a parameter's type; integers below 8, so that they may be indices."""
    row = DTYPES[p.dtype]
    if not p.indices:
        return "0.5" if row.is_float else "1"
    shape = ", ".join(m.axis(i) for i in p.indices) + ("," if len(p.indices) == 1 else "")
    most = 2 if row.kind == "bool" else 8
    drawn = f"randn(({shape})" if row.is_float else f"randint(0, {most}, ({shape})"
    return f"torch.{drawn}, device='{device}').to({torch_dtype(p.dtype)})"
