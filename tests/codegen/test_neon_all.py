"""As `test_neon`: every example, and every operation of tile programs."""

from __future__ import annotations

from pathlib import Path

import pytest
import test_neon
from test_cpp import (  # noqa: F401
    test_a_zero_of_the_left_annihilates,
    test_batched,
    test_bounds,
    test_folds,
    test_gather,
    test_gemm,
    test_guarded,
    test_hostile_names,
    test_online,
    test_scan,
    test_softmax,
)
from test_cpp_values import test_casts, test_floats, test_functions, test_integers  # noqa: F401
from test_examples_cpu import NAMES
from test_neon import run  # noqa: F401

pytestmark = test_neon.pytestmark


@pytest.mark.parametrize("name", NAMES)
def test_every_example(name: str, tmp_path: Path) -> None:
    test_neon.example(name, tmp_path)
