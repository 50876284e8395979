"""Generated kernels as goldens, and docs/tile-programs.md as what castile prints today.

Both are rewritten by ``pytest tests/test_golden_kernels.py --update-golden``; read the difference before you accept it.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import castile
from castile.codegen import targets
from castile.ir.cascade import Cascade
from castile.passes.defaults import default_mapping
from castile.passes.mapped import Mapped, bucket, mapped, nominal

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "tile-programs.md"
SUFFIX = {"cpu": "cpp"}
NAMES = ("attention_causal", "softmax", "gemm")
HEADS = 16
pytestmark = pytest.mark.usefixtures("usual")
BLOCK = re.compile(r"(<!-- (\w+): (\w+)(?: (\S+))? -->\n```\w*\n)(.*?)(^```$)", re.M | re.S)


def example(name: str) -> Cascade:
    return castile.load(ROOT / "examples" / "cascades" / f"{name}.cascade")


def program(name: str, target: str) -> Mapped:
    c = example(name)
    # Heads enough to fill a GPU, so that keys need not run in pieces.
    extents = bucket(c, {r: HEADS if r in ("b", "h") and target != "cpu" else n for r, n in nominal(c).items()})
    return mapped(c, default_mapping(c, target, extents), extents)


def source(name: str, target: str) -> str:
    m = program(name, target)
    return targets.print_source(m.program, m.mapping, target)


@pytest.mark.parametrize("target", ["cpu", "cuda:90"])
@pytest.mark.parametrize("name", NAMES)
def test_generated_source(name: str, target: str, golden: Callable[[str, str], None]) -> None:
    golden(f"{name}.{SUFFIX.get(target, 'py')}", source(name, target))


def stage(kind: str, name: str, target: str) -> str:
    """What a marked block of the page is to hold."""
    match kind:
        case "text":
            return str(example(name))
        case "derived":
            return str(program(name, target).derivation.cascade)
        case "tiles":
            return "\n".join(map(str, program(name, target).kernels))
        case "source":
            return source(name, target)
    raise AssertionError(kind)


def test_the_page_shows_what_is_printed(request: pytest.FixtureRequest) -> None:
    text = PAGE.read_text(encoding="utf-8")
    found = BLOCK.findall(text)
    assert {kind for _, kind, *_ in found} == {"text", "derived", "tiles", "source"}

    def fresh(m: re.Match[str]) -> str:
        return m[1] + stage(m[2], m[3], m[4] or "cpu").rstrip("\n") + "\n" + m[6]

    wanted = BLOCK.sub(fresh, text)
    if request.config.getoption("--update-golden"):
        PAGE.write_text(wanted, encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == wanted, "the page is old; --update-golden renews it"


@pytest.mark.parametrize("name", NAMES)
def test_clang_warns_of_nothing(name: str) -> None:
    clang = next(filter(None, map(shutil.which, ("clang++", *(f"clang++-{n}" for n in range(20, 12, -1))))), None)
    if clang is None:
        pytest.skip("no clang++ here")
    text = ROOT / "tests" / "golden" / f"{name}.cpp"
    flags = ("-std=c++17", "-Wall", "-Werror", "-fsyntax-only", f"-I{ROOT / 'codegen'}")
    done = subprocess.run([clang, *flags, str(text)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
