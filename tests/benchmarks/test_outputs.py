"""Finding, comparing and spoiling the arrays that a candidate returns."""

from __future__ import annotations

import numpy as np
import pytest

from castile.benchmarks._outputs import addresses, allocates, arrays, spoil


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.complex64, np.int8, np.uint32, np.int64, np.bool_])
def test_spoilt_values_equal_none_of_the_old_ones(dtype: type) -> None:
    array = np.arange(8).astype(dtype)
    before = array.copy()
    spoil((array, {"a": None}))
    assert not np.any(array == before)


def test_packed_floats_are_spoilt_too() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    array = np.ones(4, ml_dtypes.bfloat16)
    spoil([array])
    assert np.isnan(array.astype(np.float32)).all()


def test_torch_tensors_are_found_and_spoilt() -> None:
    torch = pytest.importorskip("torch")
    real, whole, truth = torch.ones(3, dtype=torch.bfloat16), torch.arange(3), torch.tensor([True, False])
    assert [a.shape for a in arrays({"x": (real, [whole]), "y": truth})] == [(3,), (3,), (2,)]
    spoil((real, whole, truth))
    assert torch.isnan(real).all()
    assert whole.tolist() == [-1, -2, -3]
    assert truth.tolist() == [False, True]


def test_what_may_not_be_written_is_left_alone() -> None:
    array = np.ones(3)
    array.flags.writeable = False
    spoil(array)
    assert array.tolist() == [1, 1, 1]


def test_allocation_is_seen_by_address() -> None:
    kept = np.zeros(3)
    assert allocates(lambda: np.zeros(3)) is True
    assert allocates(lambda: kept) is False
    assert allocates(lambda: 1.0) is None
    assert addresses(np.zeros((0, 3))) == ()
