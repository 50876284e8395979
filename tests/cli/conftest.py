"""What the tests of the commands share: a way to run them in this process, and files that they are given."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from castile.cli.main import app

GEMM = """def gemm(A: f32[m, k], B: f32[k, n]) -> C:
    C[m, n] = sum[k](A[m, k] * B[k, n])
"""


@dataclass(frozen=True)
class Outcome:
    """How a command ended and what it said."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def castile() -> Callable[..., Outcome]:
    """Run a command in this process."""

    def run(*words: object, input: str | None = None) -> Outcome:
        result = CliRunner().invoke(app, [str(word) for word in words], input=input, prog_name="castile")
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return Outcome(result.exit_code, result.stdout, result.stderr)

    return run


@pytest.fixture
def gemm(tmp_path: Path) -> Path:
    path = tmp_path / "gemm.cascade"
    path.write_text(GEMM, encoding="utf-8")
    return path
