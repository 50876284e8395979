"""Names that are safe in C++, whatever a cascade calls its ranks and tensors."""

from __future__ import annotations

import re

# Words of the language, and lower-case macros that a standard header or a compiler may define.
_WORDS = frozenset(
    """alignas alignof and and_eq asm auto bitand bitor bool break case catch char char8_t char16_t char32_t class
    compl concept const consteval constexpr constinit const_cast continue co_await co_return co_yield decltype
    default delete do double dynamic_cast else enum explicit export extern false final float for friend goto if
    import inline int long module mutable namespace new noexcept not not_eq nullptr operator or or_eq override
    private protected public register reinterpret_cast requires restrict return short signed sizeof static
    static_assert static_cast struct switch template this thread_local throw true try typedef typeid typename typeof
    union unsigned using virtual void volatile wchar_t while xor xor_eq alloca assert complex errno far i386
    imaginary linux major makedev minor near offsetof pixel signbit M_E P_tmpdir L_tmpnam L_ctermid stderr stdin
    stdout unix vector isnan isinf isfinite isnormal isless isgreater noreturn""".split()
)

# What generated code itself refers to.
_OURS = frozenset(
    """args first last threads point points local outside fault std castile bits to select minimum maximum abs floormod
    floordiv shift_left shift_right power exp exp2 expm1 log log2 log1p tanh erf sin cos sigmoid sqrt rsqrt floor
    rint inf Sum Prod Max Min Any All fold fold_argmax at_most at_least tiles with_stride inside workspace
    parallel_for worth dot Matrix is_finite f16 bf16 f8e4m3 f8e5m2 int8_t int16_t int32_t int64_t uint8_t uint16_t
    uint32_t uint64_t size_t load store splat choose mask_of lanes_below lanes_from lane_numbers fold_vectors pack
    stream fence divide dot_packed dot_annihilating all_finite Vector Mask Words Halves LANES PANEL clamp copysign
    pair transpose rounded Into prefetch exp_alone Panels panels_before vectors_to between Span
    exp_rough exp_flushed Subnormals Underflow STRIP_ROWS ROWS_ACROSS packed in_panels
    prefetch_rows prefetch_next_rows prefetch_rows_to_write""".split()
)

LONGEST = 40


def safe(name: str) -> str:
    """An identifier that is no keyword, no macro, nothing reserved and nothing of ours; readable where it can be.

    ``q`` → ``q``, ``int`` → ``int_``, ``α`` → ``u3b1``, ``_x`` → ``v_x``, ``SIZE_MAX`` → ``SIZE_MAX_``.
    """
    text = "".join(c if c.isascii() and (c.isalnum() or c == "_") else f"u{ord(c):x}" for c in name)
    text = re.sub("__+", "_", text)[:LONGEST]
    if not text or not text[0].isalpha():
        text = f"v_{text.lstrip('_')}"
    # Macros are upper case, so such names of three letters or more get an end that no macro has.
    shouted = text == text.upper() and sum(c.isalpha() for c in text) > 2
    return text.rstrip("_") + "_" if text in _WORDS or text in _OURS or shouted or text.endswith("_") else text


class Names:
    """Hands out one name to each key, no name twice."""

    def __init__(self, taken: tuple[str, ...] = ()) -> None:
        self._taken = set(taken)
        self._given: dict[tuple[str, ...], str] = {}

    def __call__(self, kind: str, name: str, form: str = "{}") -> str:
        """The name of ``name`` as a ``kind`` of thing; ``form`` says how it looks, as in "{}_n"."""
        key = (kind, name)
        if key not in self._given:
            wanted = safe(form.format(safe(name).rstrip("_") if form != "{}" else name))
            found, count = wanted, 1
            while found in self._taken:
                count += 1
                found = f"{wanted.rstrip('_')}_{count}"
            self._taken.add(found)
            self._given[key] = found
        return self._given[key]


def comment(text: str) -> str:
    """A text as it may stand after ``//``: on one line, and nothing at its end that would join the next."""
    flat = "".join(c if c.isprintable() and c != "\\" else "?" for c in text)
    return "// " + flat.replace("??/", "?/")
