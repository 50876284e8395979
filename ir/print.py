"""The text form of a cascade: what `parse` reads back to the same value."""

from __future__ import annotations

from .cascade import Access, Call, Cascade, Cast, Const, Einsum, Expr, Extent, Monoid, Output, Param, Rank, Reduce
from .ops import ATOM, COMPARE, OPS, POWER, UNARY


def print_expr(e: Expr, floor: int = 0) -> str:
    """The text of an expression; parenthesised if it binds looser than ``floor``."""
    text, level = _expr(e)
    return f"({text})" if level < floor else text


def _expr(e: Expr) -> tuple[str, int]:
    match e:
        case Const(value=value):
            return repr(value), ATOM
        case Rank(name=name):
            return name, ATOM
        case Extent(rank=rank):
            return f"extent({rank})", ATOM
        case Access(tensor=tensor, indices=indices):
            return tensor + (f"[{_list(indices)}]" if indices else ""), ATOM
        case Cast(dtype=dtype, arg=arg):
            return f"{dtype}({print_expr(arg)})", ATOM
        case Reduce(op=op, ranks=ranks, args=args):
            return f"{op}[{', '.join(ranks)}]({_list(args)})", ATOM
        case Call(op=name, args=args):
            row = OPS[name]
            if not row.symbol:
                return f"{name}({_list(args)})", ATOM
            if row.arity == 1:
                return row.symbol + print_expr(args[0], UNARY), UNARY
            # Python's operators associate to the left, all but `**`; comparisons do not chain.
            left, right = row.binds, row.binds + 1
            if row.binds == COMPARE:
                left = right
            if row.binds == POWER:
                left, right = ATOM, UNARY
            return f"{print_expr(args[0], left)} {row.symbol} {print_expr(args[1], right)}", row.binds


def _list(exprs: tuple[Expr, ...]) -> str:
    return ", ".join(print_expr(e) for e in exprs)


def print_param(p: Param) -> str:
    return f"{p.name}: {p.dtype}" + (f"[{_list(p.indices)}]" if p.indices else "")


def _target(o: Output) -> str:
    return o.name + (f"[{', '.join(o.ranks)}]" if o.ranks else "")


def print_einsum(e: Einsum) -> str:
    """One statement, without indentation."""
    if len(e.outputs) > 1:
        return f"({', '.join(_target(o) for o in e.outputs)}) = {print_expr(e.expr)}"
    declared = f": {e.output.dtype}" if e.output.dtype else ""
    return f"{_target(e.output)}{declared} = {print_expr(e.expr)}"


def print_monoid(m: Monoid) -> str:
    results = m.results[0] if len(m.results) == 1 else f"({', '.join(m.results)})"
    identity = print_expr(m.identity[0]) if m.width == 1 else f"({_list(m.identity)})"
    lines = [f"@monoid(identity={identity})", f"def {m.name}({', '.join(m.params)}) -> {results}:"]
    lines += [f"    {name} = {print_expr(value)}" for name, value in m.body] or ["    pass"]
    return "\n".join(lines)


def signature(c: Cascade) -> str:
    """``def name(params) -> outputs:`` on one line, or one parameter a line where that is too long."""
    results = c.outputs[0] if len(c.outputs) == 1 else f"({', '.join(c.outputs)})"
    params = [print_param(p) for p in c.params]
    line = f"def {c.name}({', '.join(params)}) -> {results}:"
    if len(line) <= 120:
        return line
    return f"def {c.name}(\n" + "".join(f"    {p},\n" for p in params) + f") -> {results}:"


def print_cascade(c: Cascade) -> str:
    """The whole text: monoids, decorator where an option differs from its default, signature, doc, statements."""
    parts = [print_monoid(m) + "\n" for m in c.monoids]
    lines = [f'@cascade(numerics="{c.numerics}")'] if c.numerics != "standard" else []
    lines.append(signature(c))
    if c.doc:
        # A triple quote or backslash inside would end or change the string: such a doc is printed as a plain literal.
        plain = c.doc.isascii() and "\\" not in c.doc and '"""' not in c.doc and not c.doc.endswith('"')
        plain = plain and all(ch.isprintable() or ch == "\n" for ch in c.doc)
        body = '"""' + c.doc.replace("\n", "\n    ").replace("    \n", "\n") + '"""' if plain else repr(c.doc)
        lines.append(f"    {body}")
    lines += [f"    {print_einsum(e)}" for e in c.einsums] or ["    pass"]
    parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)
