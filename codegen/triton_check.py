"""What a generated file of Triton checks of itself when it is run."""

from __future__ import annotations

from collections.abc import Iterator

from ..ir.cascade import Param
from ..ir.dtypes import DTYPES
from .names import safe
from .triton_module import Module, torch_dtype


def self_check(m: Module) -> Iterator[str]:
    """A ``__main__`` that draws inputs and compares runs: on new memory, and on tensors of other strides."""
    yield 'if __name__ == "__main__":'
    yield "    torch.manual_seed(0)"
    device = "cpu" if m.target == "interpret" else "cuda"
    size = 16 if m.target == "interpret" else 128
    for b in m.bindings:
        if b.param is not None:
            held = [h.size for k in m.program.kernels for h in k.held if h.of == b.rank]
            yield f"    {m._rank(b.rank)} = {min([size, *held])}"
    for p in m.c.params:
        yield f"    {m._tensor(p.name)} = {_drawn(m, p, device)}"
    params = [m._tensor(p.name) for p in m.c.params]
    strided = [
        f"{n}.transpose(0, -1).contiguous().transpose(0, -1)" if p.indices else n
        for n, p in zip(params, m.c.params, strict=True)
    ]
    name = safe(m.c.name)
    yield f"    results = [{name}({', '.join(params)}), {name}({', '.join(params)})]"
    yield f"    results.append({name}({', '.join(strided)}))"
    yield "    first, again, strided = [r if isinstance(r, tuple) else (r,) for r in results]"
    yield "    for number, (x, y, z) in enumerate(zip(first, again, strided)):"
    yield "        x, y, z = x.double(), y.double(), z.double()"
    yield "        assert torch.equal(x.nan_to_num(), y.nan_to_num()), 'two runs differ'"
    yield "        assert torch.allclose(x, z, rtol=1e-2, atol=1e-2, equal_nan=True), 'strides change the result'"
    yield "        finite = 'finite' if x.isfinite().all() else 'not finite'"
    yield f"        print({m.c.outputs!r}[number], tuple(x.shape), finite)"
    yield '    print("the same twice, and for other strides")'


def _drawn(m: Module, p: Param, device: str) -> str:
    """Random values of a parameter's type; integers below 8, so that they may be indices."""
    row = DTYPES[p.dtype]
    if not p.indices:
        return "0.5" if row.is_float else "1"
    shape = ", ".join(m._axis(i) for i in p.indices) + ("," if len(p.indices) == 1 else "")
    most = 2 if row.kind == "bool" else 8
    drawn = f"randn(({shape})" if row.is_float else f"randint(0, {most}, ({shape})"
    return f"torch.{drawn}, device='{device}').to({torch_dtype(p.dtype)})"
