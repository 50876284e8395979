"""A cascade as one C++ file for others to build: its kernels behind one C function of arrays and extents.

The function takes contiguous arrays in row-major order, so a caller passes addresses and extents and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from ..ir.cascade import Call, Cascade, Const, Expr, Extent, Param, Rank, free_ranks
from ..ir.dtypes import DTYPES
from ..ir.errors import VerifyError
from ..ir.extents import Use, bindings, given_ranks
from ..ir.interval import entangled
from ..ir.print import print_expr
from .assembly import Program
from .cpp import print_cpp, standalone
from .cpp_scope import stored
from .interface import arguments, bounded_ranks, checked_axes, entry_names
from .names import Names, comment, safe

LARGEST = """// The greatest number with which a test holds that holds for all below it; 0 if it holds for none.
template <class Test>
static int64_t castile_largest(Test test) {
  int64_t low = 0, high = 1;
  while (high < (int64_t(1) << 40) && test(high)) low = high, high *= 2;
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    if (test(middle)) low = middle; else high = middle;
  }
  return low;
}
"""

GREATEST = """// The greatest value over 0 <= i < n, n at least 1.
template <class Value>
static int64_t castile_greatest(int64_t n, Value value) {
  int64_t found = value(int64_t(0));
  for (int64_t i = 1; i < n; ++i) found = castile::at_least(found, value(i));
  return found;
}
"""

# Names that the function uses beside those of tensors and ranks.
LOCALS = ("words", "nothing", "nowhere", "castile_largest", "castile_greatest")


def standalone_cpp(program: Program) -> str:
    """The translation unit, `tile.h` in it, and below the kernels ``extern "C" int64_t NAME(…)``.

    Its arguments are the parameters in order (addresses of arrays, scalars by value), the outputs' addresses, the
    extents that the arrays bind, and the number of threads. It returns 0; n if data index the n-th argument outside
    its bounds; -1 without memory.
    """
    text = standalone(print_cpp(program.kernels, program.cascade.name))
    text = text.replace("#include <limits>\n", "#include <limits>\n#include <memory>\n#include <new>\n", 1)
    return text + "\n" + "\n".join(_Entry(program).lines()) + "\n"


class _Entry:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.c: Cascade = program.cascade
        entries = entry_names(program.kernels)
        self.names = Names((*LOCALS, *entries, *(f"{e}_args" for e in entries)))
        self.name = safe(self.c.name)
        written = {p.name: p for k in program.kernels for p in k.tensors if p.name in k.outputs}
        self.outputs = tuple(written[name] for name in self.c.outputs)
        self.scratch = tuple(program.scratch)
        self.indexed = {name for k in program.kernels for name, _ in checked_axes(k)}
        self.bindings = bindings(self.c)
        self.free = given_ranks(self.c)

    def lines(self) -> Iterator[str]:
        """The function, its kernels one after the other."""
        body = list(self._body())
        helpers = {"castile_largest": LARGEST, "castile_greatest": GREATEST}
        yield from (text for name, text in helpers.items() if any(name in line for line in body))
        yield from body

    def _body(self) -> Iterator[str]:
        """The function's own lines."""
        arguments_ = [self._argument(p, "const ") for p in self.c.params]
        arguments_ += [self._argument(p, "") for p in self.outputs]
        arguments_ += [f"int64_t {self._extent(r)}" for r in self.free]
        yield comment(f"{self.c.name}: contiguous arrays in row-major order; narrow floats by their bits.")
        yield 'extern "C"'
        yield f"int64_t {self.name}({', '.join([*arguments_, 'int64_t threads'])}) {{"
        yield "  using namespace castile;"
        for b in self.bindings:
            if b.rank not in self.free:
                yield from self._derived(b.rank, b.within)
        for p in self.scratch:
            name = self._tensor(p)
            kind = stored(p.dtype)
            yield f"  std::unique_ptr<{kind}[]> {name}(new (std::nothrow) {kind}[{self._size(p)} + 1]);"
            yield f"  if (!{name}) return -1;"
        if self.indexed:
            yield "  int64_t fault = 0, nothing[8] = {}, nowhere = reinterpret_cast<int64_t>(nothing);"
        for k, entry in zip(self.program.kernels, entry_names(self.program.kernels), strict=True):
            yield "  {"
            yield f"    {entry}_args args{{}};"
            words = ", ".join(self._word(f.kind, f.name, f.axis, bounded_ranks(k)) for f in arguments(k))
            yield f"    const int64_t words[] = {{{words}}};"
            yield "    std::memcpy(&args, words, sizeof words);"
            yield f"    {entry}(&args, 0, -1, threads);"
            if any(f.kind == "fault" for f in arguments(k)):
                yield f"    if (fault) return {self._faulted([p.name for p in k.tensors])};"
            yield "  }"
        yield "  return 0;"
        yield "}"

    def _argument(self, p: Param, const: str) -> str:
        # The narrow floats of `tile.h` have no linkage, so none may stand in the function's type.
        kind = {16: "uint16_t", 8: "uint8_t"}.get(DTYPES[p.dtype].bits, "") if DTYPES[p.dtype].is_float else ""
        kind = kind or stored(p.dtype)
        pointer = "" if not p.indices and p.name in self.c.param_of else "*"
        return f"{const}{kind}{pointer} {self._tensor(p)}"

    def _tensor(self, p: Param) -> str:
        return self.names("tensor", p.name)

    def _extent(self, rank: str) -> str:
        return self.names("extent", rank, "{}_extent")

    def _tensors(self) -> Mapping[str, Param]:
        return {p.name: p for p in (*self.c.params, *self.outputs, *self.scratch)}

    def _word(self, kind: str, name: str, axis: int, bounded: frozenset[str]) -> str:
        """One word of a kernel's argument struct."""
        if kind == "fault":
            return "reinterpret_cast<int64_t>(&fault)"
        if kind == "extent":
            known = name in {b.rank for b in self.bindings}
            if not known and name not in bounded:
                raise VerifyError(f"rank `{name}` of a kernel has no extent")
            return self._extent(name) if known else "INT64_MAX / 4"
        p = self._tensors()[name]
        if kind == "pointer":
            text = self._tensor(p)
            scalar = not p.indices and p.name in self.c.param_of
            text = f"&{text}" if scalar else f"{text}.get()" if p in self.scratch else text
            text = f"reinterpret_cast<int64_t>({text})"
            # A clamped index must meet memory, also where the array has none.
            return f"({self._size(p)} ? {text} : nowhere)" if name in self.indexed else text
        if kind == "size":
            return self._axis(p.indices[axis])
        return " * ".join(self._axis(i) for i in p.indices[axis + 1 :]) or "1"

    def _size(self, p: Param) -> str:
        return " * ".join(self._axis(i) for i in p.indices) or "1"

    def _axis(self, index: Expr) -> str:
        """The size of an axis: the number of values from 0 to the greatest that its index takes."""
        if isinstance(index, Const):
            return str(index.value)
        if isinstance(index, Rank):
            return self._extent(index.name)
        some = " && ".join(self._extent(r) for r in dict.fromkeys(sorted(free_ranks(index))))
        return f"({some} ? {self._end(index)} + 1 : 0)"

    def _end(self, e: Expr, sign: int = 1) -> str:
        """The greatest value of an index, the least for a negative sign; ranks run from 0 to their extents.

        A rank that occurs twice or under a remainder is tried value by value.
        """
        tangled = [r for r in entangled(e) if r in free_ranks(e)]
        text = self._bound(e, sign, frozenset(tangled))
        minus = "-" if sign < 0 else ""
        text = f"{minus}({text})" if tangled and minus else text
        for r in tangled:
            text = f"castile_greatest({self._extent(r)}, [&](int64_t {self.names('rank', r)}) {{ return {text}; }})"
        return f"{minus}{text}" if tangled else text

    def _bound(self, e: Expr, sign: int, tried: frozenset[str]) -> str:
        match e:
            case Const(value=value):
                return str(value)
            case Rank(name=name) if name in tried:
                return self.names("rank", name)
            case Rank(name=name):
                return f"(at_least({self._extent(name)}, 1) - 1)" if sign > 0 else "0"
            case Extent(rank=rank):
                return self._extent(rank)
            case Call(op="neg", args=(a,)):
                return f"(-{self._bound(a, -sign, tried)})"
            case Call(op="add", args=(a, b)):
                return f"({self._bound(a, sign, tried)} + {self._bound(b, sign, tried)})"
            case Call(op="sub", args=(a, b)):
                return f"({self._bound(a, sign, tried)} - {self._bound(b, -sign, tried)})"
            case Call(op="mul", args=(Const(value=int() as n), b) | (b, Const(value=int() as n))):
                return f"({n} * {self._bound(b, sign if n >= 0 else -sign, tried)})"
            case Call(op="minimum" | "maximum" as op, args=(a, b)):
                name = "at_most" if op == "minimum" else "at_least"
                return f"{name}({self._bound(a, sign, tried)}, {self._bound(b, sign, tried)})"
            case Call(op="floordiv", args=(a, Const(value=int() as n))) if n > 0:
                return f"floordiv<int64_t>({self._bound(a, sign, tried)}, {n})"
            case Call(op="mod", args=(a, Const(value=int() as n))) if n > 0:
                return f"floormod<int64_t>({self._bound(a, sign, tried)}, {n})"
        raise VerifyError(f"the size of an axis by `{print_expr(e)}` cannot be written as an expression")

    def _derived(self, rank: str, within: Sequence[Use]) -> Iterator[str]:
        """The extent of a rank that indices bound: the largest with which each stays in its axis."""
        name = self._extent(rank)
        tests = []
        for use in within:
            index = self.c.indices_of(use.tensor)[use.axis]
            tests.append(f"{self._end(use.index)} < {self._axis(index)}")
            least = self._end(use.index, -1)
            if name in least:
                at_one = f"[&](int64_t {name}) {{ return {least}; }}(1)"
                tests.append(f"{least} >= at_most(0, {at_one})")
        yield f"  const int64_t {name} = castile_largest([&](int64_t {name}) {{ return {' && '.join(tests)}; }});"

    def _faulted(self, tensors: Sequence[str]) -> str:
        order = [p.name for p in (*self.c.params, *self.outputs)]
        table = ", ".join(str(order.index(t) + 1) if t in order else "0" for t in tensors)
        return f"(const int64_t[]){{{table}}}[fault - 1]"
