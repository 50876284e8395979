"""The element types: rounding to narrow floats against ml_dtypes and exact arithmetic, integers against NumPy."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from naive import rounded

from castile.ir.dtypes import DTYPES, numpy_dtype, round_to, rounds, wrap
from castile.ir.scalar import convert

NARROW = [name for name in DTYPES if rounds(name)]
INTEGERS = [name for name, row in DTYPES.items() if row.is_integer]


def patterns(name: str) -> np.ndarray:
    """Every value of a format, from its bit patterns."""
    bits = DTYPES[name].bits
    raw = np.arange(1 << bits, dtype=np.uint16 if bits == 16 else np.uint8)
    with np.errstate(invalid="ignore"):
        return raw.view(numpy_dtype(name)).astype(np.float64)


def same(a: np.ndarray, b: np.ndarray) -> None:
    """Equal values, the sign of zeros included; NaN equals NaN."""
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(np.signbit(a[~np.isnan(a)]), np.signbit(b[~np.isnan(b)]))


@pytest.mark.parametrize("name", NARROW)
def test_every_value_of_a_format_stays(name: str) -> None:
    values = patterns(name)
    kept = np.isfinite(values) | (DTYPES[name].overflow == np.inf)
    same(round_to(values, name)[kept], values[kept])


@pytest.mark.parametrize("name", NARROW)
def test_the_format_is_the_one_of_ml_dtypes(name: str) -> None:
    row = DTYPES[name]
    values = patterns(name)
    finite = values[np.isfinite(values)]
    assert finite.max() == row.largest
    smallest = finite[finite > 0].min()
    assert smallest == 2.0 ** (row.min_exponent - row.precision + 1)
    assert 1 + 2 * row.unit_roundoff == finite[finite > 1].min()
    assert np.isinf(values).any() == np.isinf(row.overflow)


@pytest.mark.parametrize("name", NARROW)
def test_ties_go_to_even_and_all_else_to_the_nearest(name: str) -> None:
    """Halfway between every two neighbours, and a hair to either side."""
    finite = np.unique(patterns(name)[np.isfinite(patterns(name))])
    low, high = finite[:-1], finite[1:]
    middle = low + (high - low) / 2
    assert np.all(middle - low == high - middle)
    below, above = np.nextafter(middle, -np.inf), np.nextafter(middle, np.inf)
    np.testing.assert_array_equal(round_to(below, name), low)
    np.testing.assert_array_equal(round_to(above, name), high)
    quantum = np.maximum(np.abs(low), np.abs(high))
    even = [rounded(float(x), name) for x in middle]
    np.testing.assert_array_equal(round_to(middle, name), even)
    assert np.all(quantum[1:] > 0)


@pytest.mark.parametrize("name", NARROW)
def test_rounds_f32_as_ml_dtypes_does(name: str) -> None:
    """From f32, so that ml_dtypes, which goes through f32, rounds once."""
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 1 << 32, 200_000, dtype=np.uint32)
    x = np.concatenate([raw.view(np.float32), rng.standard_normal(50_000).astype(np.float32)])
    with np.errstate(all="ignore"):
        want = x.astype(numpy_dtype(name)).astype(np.float64)
        same(round_to(x.astype(np.float64), name), want)


@pytest.mark.parametrize("name", NARROW)
@given(x=st.floats(allow_nan=False))
def test_rounds_f64_once(name: str, x: float) -> None:
    """Rounding through f32 first would err: 1 + 2^-8 + 2^-40 is above the tie of bf16, and f32 puts it on the tie."""
    got = float(round_to(np.array(x), name))
    want = rounded(x, name)
    assert got == want or (np.isnan(got) and np.isnan(want))


def test_double_rounding_is_avoided() -> None:
    x = 1 + 2.0**-8 + 2.0**-40
    assert round_to(np.array(x), "bf16") == 1 + 2.0**-7
    assert np.float32(x).astype(numpy_dtype("bf16")) == 1


def test_what_does_not_fit_overflows_as_the_format_has_it() -> None:
    for name in NARROW:
        row = DTYPES[name]
        step = row.largest - np.nextafter(row.largest, 0)
        half = Fraction(row.largest) + Fraction(2) ** (int(np.log2(row.largest)) - row.precision)
        assert round_to(np.array(float(half) - step), name) == row.largest
        beyond = round_to(np.array([float(half) * 1.01, np.inf]), name)
        assert np.all(np.isnan(beyond) if np.isnan(row.overflow) else beyond == np.inf)
        assert np.isnan(round_to(np.array(np.nan), name))


def test_large_arrays_are_rounded_in_pieces() -> None:
    x = np.random.default_rng(0).standard_normal((3, 1 << 18))
    for view in (x, x.T, x[:, ::2]):
        np.testing.assert_array_equal(round_to(view, "bf16")[-1], round_to(view[-1].copy(), "bf16"))
    assert round_to(x.T, "f16").shape == x.T.shape


@pytest.mark.parametrize("name", INTEGERS)
@given(x=st.integers(-(2**63), 2**63 - 1))
def test_integers_wrap_as_numpys_do(name: str, x: int) -> None:
    assert int(wrap(np.array(x), name)) == int(np.array(x).astype(numpy_dtype(name)))


@pytest.mark.parametrize("name", INTEGERS)
@given(x=st.floats())
def test_floats_saturate_into_integers(name: str, x: float) -> None:
    row = DTYPES[name]
    want = 0 if np.isnan(x) else row.highest if x >= row.highest else row.lowest if x <= row.lowest else int(x)
    assert int(convert(np.array(x), name)) == want


def test_the_table_is_consistent() -> None:
    for name, row in DTYPES.items():
        assert row.name == name
        assert numpy_dtype(name).itemsize * 8 == row.bits
        assert row.compute in DTYPES
        assert DTYPES[row.compute].compute == row.compute
        assert row.is_float + row.is_integer + (row.kind == "bool") == 1
        if row.is_integer:
            info = np.iinfo(numpy_dtype(name))
            assert (row.lowest, row.highest) == (info.min, info.max)
