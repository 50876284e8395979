"""Helpers that generated Triton calls: what the language defines and `tl` lacks, each a few lines of Triton.

A helper is printed into a module only if something in it needs it. Where Triton's interpreter means something else
by an operation than a GPU does, a helper has a second text for it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_EXP = """\
def exp(x):
    # x = n ln 2 + r: the reduction is exact, so the error does not grow with x.
    c = minimum(maximum(x, -104.0), 89.0)
    n = tl.floor(c * 1.4426950408889634 + 0.5)
    r = (c - n * 0.693359375) + n * 2.1219444005469057e-04
    half = tl.floor(n * 0.5)
    y = tl.exp2(r * 1.4426950408889634) * tl.exp2(half) * tl.exp2(n - half)
    return tl.where(x > 89.0, INF, tl.where(x < -104.0, 0.0, y))
"""

HELPERS = {
    "INF": "INF: tl.constexpr = tl.constexpr(float('inf'))\n",
    "LOG2_E": "LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)\n",
    "maximum": """\
def maximum(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
""",
    "minimum": """\
def minimum(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)
""",
    "reduce_max": """\
def reduce_max(x, axis: tl.constexpr):
    return tl.reduce(x, axis, maximum)
""",
    "reduce_min": """\
def reduce_min(x, axis: tl.constexpr):
    return tl.reduce(x, axis, minimum)
""",
    "multiply": """\
def multiply(a, b):
    return a * b
""",
    "reduce_prod": """\
def reduce_prod(x, axis: tl.constexpr):
    return tl.reduce(x, axis, multiply)
""",
    "exp": _EXP,
    "sigmoid": """\
def sigmoid(x):
    # The error of this exponential grows with x, as does that of an x which was rounded on the way.
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)
""",
    "sigmoid_exact": """\
def sigmoid_exact(x):
    e = exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)
""",
    "expm1": """\
def expm1(x):
    c = minimum(maximum(x, -20.0), 88.8)
    n = tl.floor(c * 1.4426950408889634 + 0.5)
    r = (c - n * 0.693359375) + n * 2.1219444005469057e-04
    p = (((0.0013951716 * r + 0.008369599) * r + 0.041666187) * r + 0.16666512) * r + 0.5
    half = tl.exp2(n - 1.0)
    return (half * (r + r * r * p) + (half - 0.5)) * 2.0
""",
    "expm1_f64": """\
def expm1_f64(x):
    # Kahan's: the error of exp(x) cancels in the quotient.
    u = tl.exp(x)
    near = tl.where((u == 1.0) | (u - 1.0 == -1.0) | (u == INF), 1.0, (u - 1.0) / tl.log(u))
    return tl.where(u == 1.0, x, tl.where(u - 1.0 == -1.0, -1.0, tl.where(u == INF, u, near * x)))
""",
    "log1p": """\
def log1p(x):
    # What rounding 1 + x loses is made up for by the quotient.
    u = 1.0 + x
    return tl.where((u == 1.0) | (u == INF), x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))
""",
    "tanh": """\
def tanh(x):
    e = expm1(-2.0 * tl.abs(x))
    y = -e / (e + 2.0)
    return tl.where(x < 0, -y, y)
""",
    "tanh_f64": """\
def tanh_f64(x):
    e = expm1_f64(-2.0 * tl.abs(x))
    y = -e / (e + 2.0)
    return tl.where(x < 0, -y, y)
""",
    "rint": """\
def rint(x):
    # Half to even, by an addition that leaves no bits below one.
    y = (tl.abs(x) + 8388608.0) - 8388608.0
    return tl.where(tl.abs(x) < 8388608.0, tl.where(x < 0, -y, y), x)
""",
    "rint_f64": """\
def rint_f64(x):
    y = (tl.abs(x) + 4503599627370496.0) - 4503599627370496.0
    return tl.where(tl.abs(x) < 4503599627370496.0, tl.where(x < 0, -y, y), x)
""",
    "floordiv": """\
def floordiv(a, b):
    d = tl.where(b == 0, 1, b)
    q = a // d
    return tl.where(b == 0, 0, tl.where((a - q * d != 0) & ((a < 0) != (d < 0)), q - 1, q))
""",
    "floormod": """\
def floormod(a, b):
    d = tl.where(b == 0, 1, b)
    r = a - (a // d) * d
    return tl.where((r != 0) & ((r < 0) != (d < 0)), r + d, r)
""",
    "floordiv_float": """\
def floordiv_float(a, b):
    r = a % b
    q = (a - r) / b - ((r != 0) & ((r < 0) != (b < 0))).to(a.dtype)
    down = tl.floor(q)
    whole = down + (q - down > 0.5).to(a.dtype)
    return tl.where(b == 0, a / b, tl.where(q == 0, a / b * 0.0, whole))
""",
    "floormod_float": """\
def floormod_float(a, b):
    r = a % b
    return tl.where((r != 0) & ((r < 0) != (b < 0)), r + b, r)
""",
    "shift_left": """\
def shift_left(x, n, LAST: tl.constexpr):
    within = tl.minimum(tl.maximum(n, 0), LAST)
    return tl.where(n > LAST, 0, x << within)
""",
    "shift_right": """\
def shift_right(x, n, LAST: tl.constexpr):
    return x >> tl.minimum(tl.maximum(n, 0), LAST)
""",
    "shift_right_u32": """\
def shift_right_u32(x, n, LAST: tl.constexpr):
    return tl.where(n > LAST, 0, x >> tl.minimum(tl.maximum(n, 0), LAST))
""",
    "to_integer": """\
def to_integer(x, LOW: tl.constexpr, HIGH: tl.constexpr, dtype: tl.constexpr):
    # Towards zero, within the type's limits; NaN gives 0.
    y = tl.where((x > LOW) & (x < HIGH), x, 0.0).to(dtype)
    return tl.where(x >= HIGH, HIGH, tl.where(x <= LOW, LOW, y))
""",
    "to_bf16": """\
def to_bf16(x):
    bits = x.to(tl.uint32, bitcast=True)
    even = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(x != x, 0x7FC0, even).to(tl.uint16).to(tl.bfloat16, bitcast=True)
""",
    "to_f8e4m3": """\
def to_f8e4m3(x):
    # To nearest, ties to even; what overflows becomes NaN. The result is the 8 bits.
    bits = x.to(tl.uint32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = (size + 0x7FFFF + ((size >> 20) & 1) - 0x3C000000) >> 20
    small = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
    code = tl.where(size < 0x3C800000, small, normal)
    code = tl.where((size >= 0x44000000) | (code > 0x7E), 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)
""",
    "from_f8e4m3": """\
def from_f8e4m3(bits):
    # Every 8-bit float is an f16.
    x = bits.to(tl.uint16)
    y = (((x & 0x80) << 8) | ((x & 0x7F) << 7)).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return tl.where((x & 0x7F) == 0x7F, float("nan"), y).to(tl.float16)
""",
    "to_f8e5m2": """\
def to_f8e5m2(x):
    # To nearest, ties to even; what overflows becomes infinite. The result is the 8 bits.
    bits = x.to(tl.uint32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = (size + 0xFFFFF + ((size >> 21) & 1) - 0x38000000) >> 21
    small = (size.to(tl.float32, bitcast=True) + 128.0).to(tl.uint32, bitcast=True) - 0x43000000
    code = tl.where(size < 0x38800000, small, normal)
    code = tl.where((size >= 0x48000000) | (code > 0x7C), 0x7C, code)
    code = tl.where(size > 0x7F800000, 0x7E, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)
""",
    "from_f8e5m2": """\
def from_f8e5m2(bits):
    return (bits.to(tl.uint16) << 8).to(tl.uint16).to(tl.float16, bitcast=True)
""",
}

HELPERS["finite_part"] = """\
def finite_part(x):
    # 1 and -1 stand for infinities, 0 for NaN.
    return tl.where((x - x) == 0, x, tl.where(x == INF, 1.0, tl.where(x == -INF, -1.0, 0.0)).to(x.dtype))
"""
HELPERS["infinite_part"] = """\
def infinite_part(left, right, total, DEPTH: tl.constexpr, FLIP: tl.constexpr):
    # What infinities and NaNs add to a product in which a weight of 0 gives 0 even against them: rare, so one by one.
    at = tl.arange(0, DEPTH)
    for i in range(DEPTH):
        a = tl.sum(tl.where(at[None, :] == i, left, 0.0), len(left.shape) - 1, True).to(tl.float32)
        b = tl.sum(tl.where(at[:, None] == i, right, 0.0), len(right.shape) - 2, True).to(tl.float32)
        finite = (a - a) == 0 if FLIP else (b - b) == 0
        total += tl.where(finite | (a == 0) | (b == 0), 0.0, a * b)
    return total
"""

# The interpreter's extremes pass over NaN, and its reductions by a function go element by element.
_INTERPRETED = {
    "reduce_max": """\
def reduce_max(x, axis: tl.constexpr):
    return tl.where(tl.max((x != x).to(tl.int32), axis) != 0, float("nan"), tl.max(x, axis))
""",
    "reduce_min": """\
def reduce_min(x, axis: tl.constexpr):
    return tl.where(tl.max((x != x).to(tl.int32), axis) != 0, float("nan"), tl.min(x, axis))
""",
}


def power_name(exponent: int) -> str:
    return f"power_{exponent}" if exponent >= 0 else f"power_minus_{-exponent}"


def _power(exponent: int) -> str:
    """``x ** exponent`` by squaring."""
    lines = [f"def {power_name(exponent)}(x):"]
    n, result, base = abs(exponent), "", "x"
    if n == 0:
        return "\n".join([*lines, "    return tl.where(x == x, 1, 1).to(x.dtype)  # 1 for infinities and NaN too", ""])
    while n:
        if n & 1:
            if not result:
                result = "y"
                lines.append(f"    y = {base}")
            else:
                lines.append(f"    y = y * {base}")
        n >>= 1
        if n:
            lines.append("    x = x * x")
    lines.append("    return y" if exponent > 0 else "    return 1.0 / y")
    return "\n".join([*lines, ""])


def prelude(used: Iterable[str], interpret: bool) -> str:
    """The text of the helpers in use and of those that they use, in a fixed order."""
    texts = {**HELPERS, **(_INTERPRETED if interpret else {})}
    wanted: set[str] = set()
    powers: set[int] = set()
    stack = list(used)
    while stack:
        name = stack.pop()
        if name.startswith("power_"):
            powers.add(int(name.removeprefix("power_").replace("minus_", "-")))
        elif name not in wanted:
            wanted.add(name)
            stack += [n for n in texts if n != name and re.search(rf"(?<![\w.]){n}\b", texts[name])]
    constants = [texts[n] for n in texts if n in wanted and n.isupper()]
    functions = [texts[n] for n in texts if n in wanted and not n.isupper()] + [_power(n) for n in sorted(powers)]
    parts = ["".join(constants)] if constants else []
    return "\n\n".join([*parts, *("@triton.jit\n" + f for f in functions)])
