"""Triton from tile programs: a module of readable text, with one `@triton.jit` function for each kernel.

The module needs torch and triton alone. Tensors keep their strides, ranks their extents as arguments; the mapping is
baked in.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from ..ir.cascade import Call, Cascade, Const, Expr, Extent, Param, Rank, ranks_named, substitute, walk
from ..ir.device import DEVICES, device_of
from ..ir.dtypes import DTYPES, numpy_dtype
from ..ir.errors import InputError, UsageError, VerifyError
from ..ir.extents import Use, bindings
from ..ir.footprint import largest_rank, staged_bytes, tile_shapes
from ..ir.mapping import Mapping as Knobs
from ..ir.ops import OPS
from ..ir.print import print_expr
from ..ir.tile import TileKernel
from .assembly import Program
from .cpp import bounded_ranks
from .names import Names, safe
from .triton_expr import NARROW_EXTENT
from .triton_kernel import TAKEN, Argument, KernelPrinter, Printed, power_of_two
from .triton_prelude import prelude

# The function that runs all kernels on given tensors, and what castile looks up in a module that it loads.
LAUNCH = "launch"

# Elements of the largest tile that Triton takes.
LARGEST_TILE = 1 << 20

# The extent of a rank that only its loops' own bounds limit.
UNBOUNDED = 1 << 30


def print_triton(program: Program, mapping: Knobs, target: str) -> str:
    """The text of a module: the kernels of a program, ``launch(…)`` on given tensors and extents, and ``NAME(…)``.

    ``target`` is a GPU's or "interpret". The same program and mapping give the same text. Raises `UsageError` for a
    target without Triton, `VerifyError` for kernels that mean nothing, `InputError` for tiles that no device can hold.
    """
    for k in program.kernels:
        _refuse(k, mapping, target)
    return _Module(program, mapping, target).text()


def standalone(program: Program, mapping: Knobs, target: str) -> str:
    """The module of `print_triton` as one file to run: under ``__main__`` it checks itself on a GPU.

    It needs torch and triton alone. Errors as `print_triton`.
    """
    module = _Module(program, mapping, target)
    return module.text() + "\n\n" + "\n".join(module.self_check()) + "\n"


def print_kernels(program: Program, target: str) -> tuple[Printed, ...]:
    """Each kernel of a program as a Triton function."""
    if target != "interpret" and not device_of(target).is_gpu:
        raise UsageError("Triton is for GPUs", expected=" ".join(t for t in DEVICES if t != "cpu"), got=target)
    names = Names((*TAKEN, LAUNCH, safe(program.cascade.name)))
    found = []
    for i, k in enumerate(program.kernels):
        name = names("kernel", str(i), f"{safe(k.name)}_kernel")
        by_value = frozenset(p.name for p in program.cascade.params if not p.indices)
        printer = KernelPrinter(
            k, name, by_value=by_value, numerics=program.cascade.numerics, interpret=target == "interpret"
        )
        found.append(printer.printed())
    return tuple(found)


def _refuse(k: TileKernel, mapping: Knobs, target: str) -> None:
    """Refuse what need not be compiled to know that it does not fit."""
    rank = largest_rank(k)
    most = max((math.prod(map(power_of_two, s)) for s in tile_shapes(k)), default=0)
    if most > LARGEST_TILE:
        raise InputError(
            f"an operation of kernel `{k.name}` goes over more elements than Triton takes",
            rank=rank,
            expected=f"at most {LARGEST_TILE}",
            got=str(most),
            hint=f"tile rank `{rank}` smaller",
        )
    device = device_of(target)
    # All stages but one are sure to be held at once.
    need = staged_bytes(k) * max(1, mapping.knob("stages") - 1)
    if target != "interpret" and need > device.shared_bytes:
        raise InputError(
            f"the operands of kernel `{k.name}` do not fit the shared memory of a block of {target}",
            rank=rank,
            expected=f"at most {device.shared_bytes} bytes",
            got=f"{need} bytes",
            hint=f"tile rank `{rank}` smaller, or take fewer stages",
        )


def fits_held(kernels: Sequence[TileKernel], extents: Mapping[str, int]) -> None:
    """Raise `InputError` where a rank that one tile is to hold has more coordinates than the tile."""
    for k in kernels:
        limits = [*k.whole.items(), *((h.of, h.size) for h in k.held)]
        for rank, size in limits:
            if extents.get(rank, 0) > size:
                raise InputError(
                    f"this kernel keeps rank `{rank}` on chip and was compiled for fewer elements of it",
                    rank=rank,
                    expected=f"at most {size}",
                    got=str(extents[rank]),
                    hint="compile it for these shapes",
                )


def torch_dtype(dtype: str) -> str:
    return f"torch.{numpy_dtype(dtype)}"


def entangled(e: Expr) -> bool:
    """Whether a rank occurs twice or under a ``%``, where the ends of an interval say too little."""
    times = Counter(n.name for n in walk(e) if isinstance(n, Rank))
    mod = any(isinstance(n, Call) and n.op == "mod" and ranks_named(n) for n in walk(e))
    return mod or any(count > 1 for count in times.values())


class _Module:
    """One program as a module."""

    def __init__(self, program: Program, mapping: Knobs, target: str) -> None:
        self.program = program
        self.mapping = mapping
        self.target = target
        self.c: Cascade = program.cascade
        self.kernels = print_kernels(program, target)
        self.names = Names((*TAKEN, LAUNCH, safe(self.c.name), *(k.name for k in self.kernels)))
        self.written = {p.name: p for k in program.kernels for p in k.tensors if p.name in k.outputs}
        self.outputs = tuple(self.written[name] for name in self.c.outputs)
        self.scratch = tuple(program.scratch)
        self.bindings = bindings(self.c)
        self.known = {b.rank for b in self.bindings}
        for p in (*self.c.params, *self.outputs, *self.scratch):
            self.names("tensor", p.name)
        for r in self.c.ranks:
            self.names("rank", r)

    def text(self) -> str:
        used = frozenset().union(*(k.helpers for k in self.kernels))
        helpers = prelude(used, self.target == "interpret")
        body = [k.text for k in self.kernels] + ["\n".join(self._launch()) + "\n", "\n".join(self._main()) + "\n"]
        return self._head() + "\n\n" + "\n\n".join([*([helpers] if helpers else []), *body])

    def _head(self) -> str:
        source = "".join(c if c.isprintable() or c == "\n" else "?" for c in str(self.c)).replace("\\", "?")
        source = source.replace('"""', "'''").rstrip()
        title = f"{safe(self.c.name)}: generated by castile for {self.target}, mapping {self.mapping}."
        return f'"""{title}\n\n{source}\n"""\n\nimport torch\nimport triton\nimport triton.language as tl\n'

    # Host

    def _tensor(self, name: str) -> str:
        return self.names("tensor", name)

    def _rank(self, rank: str) -> str:
        return self.names("rank", rank)

    def _launch(self) -> Iterator[str]:
        """``launch(parameters, outputs, *, extents)``: the kernels one after the other."""
        tensors = [*self.c.params, *self.outputs]
        ranks = ", ".join(self._rank(r) for r in self.c.ranks)
        tail = f", {ranks}" if ranks else ""
        yield f"def {LAUNCH}({', '.join(self._tensor(p.name) for p in tensors)}{tail}):"
        yield '    """Run the kernels on tensors of one device, given the extents of all ranks."""'
        device = self._tensor(next(p.name for p in (*self.outputs, *tensors) if p.indices or p in self.outputs))
        for p in self.scratch:
            shape = ", ".join(self._axis(i) for i in p.indices) + ("," if len(p.indices) == 1 else "")
            kind = f"dtype={torch_dtype(p.dtype)}, device={device}.device"
            yield f"    {self._tensor(p.name)} = torch.empty(({shape}), {kind})"
        yield from self._scalars(device)
        spans = [self._tensor(p.name) for p in (*tensors, *self.scratch) if p.indices]
        extents = ", ".join(["1", *(self._rank(r) for r in self.c.ranks)])
        yield f"    tensors = [{', '.join(spans)}]"
        yield "    spans = [sum((n - 1) * abs(s) for n, s in zip(t.shape, t.stride())) for t in tensors]"
        yield f"    narrow = max({extents}) < {NARROW_EXTENT} and max([0, *spans]) < 2**31"
        yield "    positions = tl.int32 if narrow else tl.int64"
        faults = [i for i, k in enumerate(self.kernels) if any(a.kind == "fault" for a in k.arguments)]
        if faults:
            yield f"    faults = torch.zeros({len(self.kernels)}, dtype=torch.int32, device={device}.device)"
        for i, k in enumerate(self.kernels):
            yield from self._call(i, k)
        if faults:
            yield "    for number, names in zip(faults.tolist(), ("
            for kernel in self.program.kernels:
                yield f"        {tuple(p.name for p in kernel.tensors)!r},"
            yield "    )):"
            yield "        if number:"
            yield "            raise IndexError(f'an index that was read from data lies outside `{names[number - 1]}`')"

    def _scalars(self, device: str) -> Iterator[str]:
        """Numbers in the form in which a kernel takes them: rounded to their type; f64 as a tensor."""
        for p in self.c.params:
            if p.indices:
                continue
            name = self._tensor(p.name)
            if p.dtype == "f64":
                yield f"    {name} = torch.tensor([{name}], dtype=torch.float64, device={device}.device)"
            elif DTYPES[p.dtype].is_float and DTYPES[p.dtype].bits < 32:
                yield f"    {name} = torch.tensor(float({name})).to({torch_dtype(p.dtype)}).float().item()"
            else:
                yield f"    {name} = {'float' if DTYPES[p.dtype].is_float else 'int'}({name})"

    def _call(self, at: int, k: Printed) -> Iterator[str]:
        counts = [self._rank(r) if n == 1 else f"triton.cdiv({self._rank(r)}, {n})" for r, n in k.grid]
        programs = " * ".join(counts) or "1"
        yield f"    programs = {programs}"
        yield "    if programs:"
        yield f"        {k.name}[(programs,)]("
        line: list[str] = []
        for a in k.arguments:
            if a.kind in ("pointer", "scalar") and line:
                yield f"            {', '.join(line)},"
                line = []
            line.append(self._passed(a, at))
        yield f"            {', '.join(line)},"
        stages = 1 if k.sequential else self.mapping.knob("stages")
        yield f"            num_warps={self.mapping.knob('warps')}, num_stages={stages},"
        yield "        )"

    def _passed(self, a: Argument, at: int) -> str:
        match a.kind:
            case "pointer":
                p = self._param(a.name)
                view = DTYPES[p.dtype].bits == 8 and not DTYPES[p.dtype].is_integer
                return self._tensor(a.name) + (".view(torch.uint8)" if view else "")
            case "scalar":
                return self._tensor(a.name)
            case "stride":
                return f"{self._tensor(a.name)}.stride({a.axis})"
            case "size":
                return f"{self._tensor(a.name)}.shape[{a.axis}]"
            case "extent":
                return self._extent(a.name)
            case "fault":
                return f"faults[{at}:]"
            case "index":
                return "INDEX=positions"
            case "even":
                return f"{a.text}={self._extent(a.name)} % {a.value} == 0"
        return f"{a.text}={a.value}"

    def _extent(self, rank: str) -> str:
        if rank in self.known:
            return self._rank(rank)
        if any(rank in bounded_ranks(k) for k in self.program.kernels):
            return str(UNBOUNDED)
        raise VerifyError(f"rank `{rank}` of a kernel has no extent")

    def _param(self, name: str) -> Param:
        return next(p for p in (*self.c.params, *self.outputs, *self.scratch) if p.name == name)

    def _main(self) -> Iterator[str]:
        """``NAME(parameters)``: extents from the tensors' shapes, new outputs, and the launch."""
        params = ", ".join(self._tensor(p.name) for p in self.c.params)
        yield f"def {safe(self.c.name)}({params}):"
        results = ", ".join(self._tensor(p.name) for p in self.outputs)
        yield f'    """Compute {", ".join(self.c.outputs)} of torch tensors of any strides."""'
        derived = [b for b in self.bindings if b.param is None]
        for b in self.bindings:
            if b.param is not None:
                yield f"    {self._rank(b.rank)} = {self._tensor(b.param[0])}.shape[{b.param[1]}]"
            else:
                yield from self._derived(b.rank, b.within)
        device = next((self._tensor(p.name) + ".device" for p in self.c.params if p.indices), "None")
        for p in self.outputs:
            shape = ", ".join(self._axis(i) for i in p.indices) + ("," if len(p.indices) == 1 else "")
            kind = f"dtype={torch_dtype(p.dtype)}, device={device}"
            yield f"    {self._tensor(p.name)} = torch.empty(({shape}), {kind})"
        words = [self._tensor(p.name) for p in (*self.c.params, *self.outputs)]
        words += [self._rank(r) for r in self.c.ranks]
        yield f"    {LAUNCH}({', '.join(words)})"
        yield f"    return {results}"
        if derived:
            yield ""
            yield ""
            yield "def largest(fits):"
            yield '    """The greatest number with which a test holds, if it holds for all below it; else 0."""'
            yield "    low, high = 0, 1"
            yield "    while high < 2**40 and fits(high):"
            yield "        low, high = high, 2 * high"
            yield "    while high - low > 1:"
            yield "        middle = (low + high) // 2"
            yield "        low, high = (middle, high) if fits(middle) else (low, middle)"
            yield "    return low"

    def self_check(self) -> Iterator[str]:
        """A ``__main__`` that draws inputs and compares runs: on new memory, and on tensors of other strides."""
        yield 'if __name__ == "__main__":'
        yield "    torch.manual_seed(0)"
        device = "cpu" if self.target == "interpret" else "cuda"
        size = 16 if self.target == "interpret" else 128
        for b in self.bindings:
            if b.param is not None:
                held = [h.size for k in self.program.kernels for h in k.held if h.of == b.rank]
                yield f"    {self._rank(b.rank)} = {min([size, *held])}"
        for p in self.c.params:
            yield f"    {self._tensor(p.name)} = {self._drawn(p, device)}"
        params = [self._tensor(p.name) for p in self.c.params]
        strided = [
            f"{n}.transpose(0, -1).contiguous().transpose(0, -1)" if p.indices else n
            for n, p in zip(params, self.c.params, strict=True)
        ]
        name = safe(self.c.name)
        yield f"    results = [{name}({', '.join(params)}), {name}({', '.join(params)})]"
        yield f"    results.append({name}({', '.join(strided)}))"
        yield "    first, again, strided = [r if isinstance(r, tuple) else (r,) for r in results]"
        yield "    for number, (x, y, z) in enumerate(zip(first, again, strided)):"
        yield "        x, y, z = x.double(), y.double(), z.double()"
        yield "        assert torch.equal(x.nan_to_num(), y.nan_to_num()), 'two runs differ'"
        yield "        assert torch.allclose(x, z, rtol=1e-2, atol=1e-2, equal_nan=True), 'strides change the result'"
        yield "        finite = 'finite' if x.isfinite().all() else 'not finite'"
        yield f"        print({self.c.outputs!r}[number], tuple(x.shape), finite)"
        yield '    print("the same twice, and for other strides")'

    def _drawn(self, p: Param, device: str) -> str:
        """Random values of a parameter's type; integers below 8, so that they may be indices."""
        row = DTYPES[p.dtype]
        if not p.indices:
            return "0.5" if row.is_float else "1"
        shape = ", ".join(self._axis(i) for i in p.indices) + ("," if len(p.indices) == 1 else "")
        most = 2 if row.kind == "bool" else 8
        drawn = f"randn(({shape})" if row.is_float else f"randint(0, {most}, ({shape})"
        return f"torch.{drawn}, device='{device}').to({torch_dtype(p.dtype)})"

    def _derived(self, rank: str, within: Sequence[Use]) -> Iterator[str]:
        """The greatest extent that keeps every index of a binding inside its axis."""
        tests = []
        for use in within:
            size = f"{self._tensor(use.tensor)}.shape[{use.axis}]" if use.tensor in self.c.param_of else None
            size = size or self._axis(self.c.indices_of(use.tensor)[use.axis])
            if entangled(use.index):
                # A rank that occurs twice: its coordinates are tried one by one.
                loops = "".join(f" for {self._rank(r)} in range({self._rank(r)})" for r in ranks_named(use.index))
                names = ", ".join(f"{self._rank(r)}={self._rank(r)}" for r in ranks_named(use.index))
                tests.append(f"max((lambda {names}: [{self._plain(use.index)}{loops}])(), default=0) < {size}")
                continue
            tests.append(f"{self._greatest(use.index)} < {size}")
            least = self._greatest(use.index, -1)
            if self._rank(rank) in re.findall(r"\w+", least):
                first = self._greatest(substitute(use.index, {rank: Const(0)}), -1)
                tests.append(f"{least} >= min(0, {first})")
        yield f"    {self._rank(rank)} = largest(lambda {self._rank(rank)}: {' and '.join(tests)})"

    def _plain(self, e: Expr) -> str:
        """An index as Python."""
        match e:
            case Const(value=value):
                return str(value)
            case Rank(name=name):
                return self._rank(name)
            case Call(op=op, args=(a, b)) if OPS[op].symbol:
                return f"({self._plain(a)} {OPS[op].symbol} {self._plain(b)})"
            case Call(op="neg", args=(a,)):
                return f"(-{self._plain(a)})"
            case Call(op="minimum" | "maximum" as op, args=(a, b)):
                return f"{op[:3]}({self._plain(a)}, {self._plain(b)})"
        raise VerifyError(f"the index `{print_expr(e)}` cannot be printed")

    def _axis(self, index: Expr) -> str:
        if isinstance(index, Const):
            return str(index.value)
        if isinstance(index, Rank):
            return self._rank(index.name)
        return f"{self._greatest(index)} + 1"

    def _greatest(self, e: Expr, sign: int = 1) -> str:
        """The greatest value of an affine index, the least for a negative sign; ranks run from 0 to their extents."""
        match e:
            case Const(value=value):
                return str(value)
            case Rank(name=name):
                return f"({self._rank(name)} - 1)" if sign > 0 else "0"
            case Extent(rank=rank):
                return self._rank(rank)
            case Call(op="add", args=(a, b)):
                return f"({self._greatest(a, sign)} + {self._greatest(b, sign)})"
            case Call(op="sub", args=(a, b)):
                return f"({self._greatest(a, sign)} - {self._greatest(b, -sign)})"
            case Call(op="neg", args=(a,)):
                return f"-{self._greatest(a, -sign)}"
            case Call(op="mul", args=(Const(value=value), a) | (a, Const(value=value))):
                return f"{value} * {self._greatest(a, sign)}"
            case Call(op="floordiv", args=(a, Const(value=value))):
                return f"({self._greatest(a, sign)} // {value})"
            case Call(op="mod", args=(_, Const(value=value))):
                return str(value - 1) if sign > 0 else "0"
            case Call(op="minimum" | "maximum" as op, args=(a, b)):
                return f"{op[:3]}({self._greatest(a, sign)}, {self._greatest(b, sign)})"
        raise VerifyError(f"the extent that `{print_expr(e)}` gives cannot be printed")
