"""The tests of generated code have a cache of their own; the helper beside them is importable by its name."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))


# Files that every run of the tests takes: they compile little, or what everybody gets who tunes nothing.
SAMPLE = (
    "test_brackets_cpu.py",
    "test_build.py",
    "test_cpp.py",
    "test_cpp_values.py",
    "test_examples_cpu.py",
    "test_found_cpu.py",
    "test_gradients_cpu.py",
    "test_made.py",
    "test_neon.py",
    "test_random_gradients_cpu.py",
    "test_rows_cpu.py",
    "test_runtime.py",
    "test_sanitized.py",
    "test_vectors.py",
)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache that lasts as long as the tests; one that the environment names is used as it is."""
    before = os.environ.get("CASTILE_CACHE_DIR")
    folder = Path(before) if before else tmp_path_factory.mktemp("cache")
    os.environ["CASTILE_CACHE_DIR"] = str(folder)
    yield folder
    if before is None:
        del os.environ["CASTILE_CACHE_DIR"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Each of these compiles C++, some of them for minutes: `make test-all` runs them. Triton's mark their own."""
    here = Path(__file__).resolve().parent
    for item in items:
        if here in item.path.parents and not item.path.name.startswith(("test_triton", *SAMPLE)):
            item.add_marker(pytest.mark.slow)
