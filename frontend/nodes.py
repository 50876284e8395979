"""What a node of an ATen graph is: its name, its results, and the kinds that its operation belongs to."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from ..ir.ops import OPS, RESERVED
from .aten_pointwise import LOGIC, POINTWISE
from .values import Size, Unsupported

# castile's names of dtypes.
DTYPES = {
    torch.float64: "f64", torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16",
    torch.int64: "i64", torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8",
    torch.bool: "bool",
}  # fmt: skip
FLEX = "flex_attention"

# Operations by what they are to a region.
VIEWS = frozenset(
    "view.default _unsafe_view.default squeeze.dim squeeze.dims squeeze.default unsqueeze.default permute.default "
    "transpose.int t.default expand.default select.int slice.Tensor split.Tensor split_with_sizes.default unbind.int "
    "detach.default alias.default getitem".split()
)
# Views in another shape, which not all strides allow.
RESHAPES = frozenset(("view.default", "_unsafe_view.default"))
# Views that a kernel takes from outside as they are: an offset into memory is free there, and shows its extent.
TAKEN = frozenset("select.int slice.Tensor split.Tensor split_with_sizes.default unbind.int getitem".split())
CREATION = frozenset(
    "full.default scalar_tensor.default full_like.default new_full.default zeros.default zeros_like.default "
    "new_zeros.default ones.default ones_like.default new_ones.default arange.default arange.start arange.start_step "
    "iota.default".split()
)
COPIES = frozenset(
    "clone.default lift_fresh_copy.default cat.default constant_pad_nd.default contiguous.default".split()
)
PRODUCTS = frozenset("mm.default bmm.default addmm.default baddbmm.default".split())
FLASH = "_scaled_dot_product_flash_attention_for_cpu.default"
ATTENTION = frozenset(
    (
        FLASH,
        "_scaled_dot_product_flash_attention_for_cpu_backward.default",
        FLEX,
    )
)
EXTREMES = frozenset("amax.default amin.default max.default min.default".split())
SOFTMAX = frozenset("_softmax.default _safe_softmax.default amax.default max.dim".split())
# What takes long enough to compute that nobody wants it twice.
DEAR = frozenset(
    name for name, text in POINTWISE.items() if any(f"{op}(" in text for op, o in OPS.items() if o.cost[0] == "special")
)
_OTHER_MAPS = (
    "_to_copy.default", "convert_element_type.default", "tril.default", "triu.default", "floor_divide.default",
    "remainder.Scalar", "elu_backward.default",
)  # fmt: skip
# What costs next to nothing to compute again.
ARITHMETIC = frozenset(
    "add sub mul neg abs rsub minimum maximum where masked_fill _to_copy convert_element_type floor_divide"
    " remainder".split()
)
# Head dimensions past which the two products of attention are better taken apart.
WIDEST_HEAD = 512


def op_name(node: Node) -> str:
    """`add.Tensor` for an operation of ATen or prims, the name of a higher-order operation, else ""."""
    target = node.target
    if node.op != "call_function":
        return ""
    if isinstance(target, torch._ops.OpOverload):
        return str(target).split(".", 1)[1] if target.namespace in ("aten", "prims") else ""
    if isinstance(target, torch._ops.HigherOrderOperator):
        return str(target.name())  # type: ignore[no-untyped-call]
    return "getitem" if target is operator.getitem else ""


def fakes(node: Node) -> tuple[Any, ...]:
    """The fake results of a node."""
    val = node.meta.get("val")
    return tuple(val) if isinstance(val, (tuple, list)) else (val,)


def tensors_of(node: Node) -> list[torch.Tensor]:
    """The tensors that stand for a node's results, without data."""
    return [f for f in fakes(node) if isinstance(f, torch.Tensor)]


def numel(node: Node) -> int:
    """The elements of a node's results, dynamic sizes by their hints."""
    found = 0
    for f in tensors_of(node):
        n = 1
        for s in f.shape:
            n *= hint(s)
        found += n
    return found


def size_bytes(node: Node) -> int:
    """The bytes of a node's results."""
    found = tensors_of(node)
    return numel(node) * found[0].element_size() if found else 0


def hint(n: Size) -> int:
    """A number that stands for a size."""
    if isinstance(n, int):
        return n
    found = n.node.hint
    return int(found) if found is not None else 1024


def dtype_of(fake: torch.Tensor) -> str:
    """castile's name of a tensor's dtype. Raises `Unsupported` for what castile does not hold."""
    found = DTYPES.get(fake.dtype)
    if found is None or fake.layout is not torch.strided or fake.is_conj() or fake.is_neg():
        raise Unsupported(f"a tensor of {fake.dtype}, {fake.layout}")
    return found


def base_name(node: Node) -> str:
    """What an operation's result is called: `relu` for `aten.relu.default`."""
    name = op_name(node).split(".")[0].strip("_") or "t"
    if op_name(node).split(".")[0] == "view":
        return "view"
    return f"{name}_" if name in RESERVED or not name.isidentifier() else name


def is_view(node: Node) -> bool:
    """Whether a node gives a view of its argument."""
    return op_name(node) in VIEWS


def weight_of(product: Node) -> Node | None:
    """The matrix among the graph's inputs that a product of two is by, as it lies or transposed; None for others."""
    b = product.args[-1]
    if isinstance(b, Node) and is_transposed(b):
        b = b.args[0]
    return b if isinstance(b, Node) and b.op == "placeholder" else None


def is_transposed(node: Node) -> bool:
    """Whether a node is the transpose of a matrix."""
    source = node.args[0] if node.args else None
    if not isinstance(source, Node) or fakes(source)[0].ndim != 2:
        return False
    match op_name(node):
        case "t.default":
            return True
        case "permute.default":
            return list(node.args[1]) == [1, 0]  # type: ignore[arg-type]
        case "transpose.int":
            return node.args[1] % 2 != node.args[2] % 2  # type: ignore[operator]
    return False


def is_narrow(first: Node, last: Node) -> bool:
    """Whether two products are attention's: what they contract and produce stays on chip."""
    widths = [hint(tensors_of(n)[0].shape[-1]) for n in (first.args[0], last) if isinstance(n, Node)]
    return max(widths, default=0) <= WIDEST_HEAD


def is_map(name: str) -> bool:
    return name in POINTWISE or name in LOGIC or name in _OTHER_MAPS


def is_mask(node: Node) -> bool:
    """Whether a node chooses among literals by a condition."""
    return op_name(node) in ("where.self", "masked_fill.Scalar", "where.ScalarOther", "where.Scalar")


def repeats(node: Node) -> bool:
    """Whether a node copies a smaller tensor several times over, such as heads that are shared: no copy is needed."""
    source: Any = node
    while op_name(source) == "clone.default" or (is_view(source) and op_name(source) not in TAKEN):
        source = source.args[0]
    return op_name(node) == "clone.default" and 0 < numel(source) < numel(node)


def is_impure(node: Node) -> bool:
    """Whether a node draws random numbers, writes memory, or does what nobody knows."""
    target = node.target
    if op_name(node) == FLASH and not _dropout_of(node):
        return False  # it is tagged as random for its dropout
    if isinstance(target, torch._ops.OpOverload):
        return torch.Tag.nondeterministic_seeded in target.tags or target._schema.is_mutable
    return isinstance(target, torch._ops.HigherOrderOperator) and op_name(node) != FLEX


def _dropout_of(node: Node) -> Any:
    """The probability with which an attention call drops."""
    return node.args[3] if len(node.args) > 3 else node.kwargs.get("dropout_p", 0.0)


def jumps(node: Node) -> bool:
    """Whether a small change of a float operand may change the result by a whole."""
    name = op_name(node)
    of_floats = any(f.is_floating_point() for a in node.all_input_nodes for f in tensors_of(a))
    if name in ("floor.default", "ceil.default", "round.default", "trunc.default"):
        return of_floats
    to_whole = any(not f.is_floating_point() and f.dtype is not torch.bool for f in tensors_of(node))
    return of_floats and to_whole and name in ("_to_copy.default", "convert_element_type.default")
