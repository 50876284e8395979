"""The layering of the package, read off its imports."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Folder (or module at the root) -> what of castile it may import besides itself.
BELOW_FRONTEND = {"ir", "passes", "codegen", "costmodel", "autotune", "driver"}
LAYERS: dict[str, set[str]] = {
    "ir": set(),
    "passes": {"ir"},
    "codegen": {"ir"},
    "costmodel": {"ir"},
    "autotune": {"ir", "passes", "codegen", "costmodel"},
    "driver": BELOW_FRONTEND - {"driver"},
    "frontend": BELOW_FRONTEND,
    "cli": {*BELOW_FRONTEND, "frontend", ""},
    "": {*BELOW_FRONTEND, "frontend", "cli"},
}
FOLDERS = [name for name in LAYERS if name not in ("", "driver")]

# These two are met by other tools under the name of the checkout's folder, so their imports are absolute.
ABSOLUTE = ("__init__.py", "__main__.py")

HEAVY = {"torch", "triton", "xgboost", "networkx", "sympy"}  # imported where used: each costs 0.1 s or more
UNSAFE_CALLS = {"eval", "exec", "__import__"}
UNSAFE_MODULES = {"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}


def package_files() -> list[Path]:
    files = list(ROOT.glob("*.py"))
    for folder in FOLDERS:
        files += (ROOT / folder).rglob("*.py")
    return sorted(path.relative_to(ROOT) for path in files)


def layer_of(path: Path) -> str:
    if len(path.parts) > 1:
        return path.parts[0]
    return path.stem if path.stem in LAYERS else ""


def imported(node: ast.AST, path: Path) -> Iterator[tuple[str, bool]]:
    """(dotted module, written relatively) for each module a statement imports; `castile` in front of our own."""
    if isinstance(node, ast.Import):
        yield from ((alias.name, False) for alias in node.names)
    if not isinstance(node, ast.ImportFrom):
        return
    relative = node.level > 0
    base: list[str] = []
    if relative:
        here = ["castile", *path.parent.parts]
        base = here[: len(here) - node.level + 1]
        if not base:
            yield "<beyond the package>", True
            return
    stem = ".".join([*base, *([node.module] if node.module else [])])
    # `from .. import ir` and `from castile import ir` name the module among the names.
    if stem == "castile":
        yield from ((f"castile.{alias.name}", relative) for alias in node.names)
    else:
        yield stem, relative


def at_import(tree: ast.Module) -> Iterator[ast.AST]:
    """The nodes that run when the module is imported: function bodies and `if TYPE_CHECKING:` are left out."""
    todo: list[ast.AST] = [tree]
    while todo:
        node = todo.pop()
        yield node
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            todo += node.orelse
            continue
        todo += ast.iter_child_nodes(node)


def faults(path: Path, source: str) -> list[str]:
    """What is wrong with the imports and calls of one package file."""
    tree = ast.parse(source)
    layer = layer_of(path)
    found = []

    def fault(node: ast.AST, text: str) -> None:
        found.append(f"{path}:{getattr(node, 'lineno', 0)}: {text}")

    for node in ast.walk(tree):
        for module, relative in imported(node, path):
            top, *rest = module.split(".")
            if module == "<beyond the package>":
                fault(node, "a relative import that leaves the package")
            if top in UNSAFE_MODULES:
                fault(node, f"imports {top}: nothing is unpickled")
            if top != "castile":
                continue
            if relative == (str(path) in ABSOLUTE):
                fault(node, f"imports {module} {'relatively' if relative else 'absolutely'}")
            target = rest[0] if rest and rest[0] in LAYERS else ""
            if target not in {layer, *LAYERS[layer]}:
                fault(node, f"{layer or 'the root'} may not import {module}")
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in UNSAFE_CALLS:
                fault(node, f"calls {node.func.id}: nothing a file says is executed")
            if any(keyword.arg == "allow_pickle" for keyword in node.keywords):
                fault(node, "passes allow_pickle: nothing is unpickled, which is NumPy's default")
    if layer in ("ir", "passes"):
        for node in at_import(tree):
            for module, _ in imported(node, path):
                if module.split(".")[0] in HEAVY:
                    fault(node, f"imports {module} at its top level")
    return found


@pytest.mark.parametrize("path", package_files(), ids=str)
def test_layering(path: Path) -> None:
    assert faults(path, (ROOT / path).read_text(encoding="utf-8")) == []


def test_every_package_is_in_the_table() -> None:
    not_shipped = {"tests", "examples", "benchmarks", "docs", "build", "dist", "tmp"}
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")} - not_shipped
    assert folders == set(FOLDERS)


def test_modules_at_the_root() -> None:
    """Every .py file at the root is shipped as a module of castile, so no script or conftest may lie there."""
    assert {path.name for path in ROOT.glob("*.py")} <= {"__init__.py", "__main__.py", "driver.py"}


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("ir/a.py", "from ..passes.count import count"),
        ("ir/a.py", "from .. import passes"),
        ("ir/a.py", "from .. import parse"),
        ("ir/a.py", "from castile.ir.cascade import Cascade"),
        ("ir/a.py", "import castile.ir.cascade"),
        ("ir/a.py", "def f():\n    from ..passes import count"),
        ("ir/a.py", "import torch.nn"),
        ("ir/a.py", "try:\n    import triton\nexcept ImportError:\n    pass"),
        ("ir/a.py", "from ...other import x"),
        ("passes/a.py", "import networkx as nx"),
        ("passes/a.py", "class A:\n    from sympy import Symbol"),
        ("passes/a.py", "from ..codegen import cpp"),
        ("codegen/a.py", "from ..passes import count"),
        ("costmodel/a.py", "from ..autotune.records import Record"),
        ("autotune/a.py", "from ..driver import compile"),
        ("driver.py", "from .frontend import fx"),
        ("driver.py", "from .cli import main"),
        ("frontend/a.py", "from ..cli.main import main"),
        ("cli/a.py", "eval('1')"),
        ("cli/a.py", "exec('1')"),
        ("cli/a.py", "import pickle"),
        ("cli/a.py", "from pickle import loads"),
        ("cli/a.py", "np.load(path, allow_pickle=True)"),
        ("__init__.py", "from .ir.parse import parse"),
        ("__main__.py", "from .cli.main import main"),
    ],
)
def test_a_planted_fault_is_found(path: str, source: str) -> None:
    assert faults(Path(path), source)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("ir/a.py", "from .cascade import Cascade\nfrom . import ops"),
        ("ir/a.py", "if TYPE_CHECKING:\n    import torch"),
        ("passes/a.py", "from ..ir.cascade import Cascade\n\ndef f():\n    import networkx"),
        ("driver.py", "from .passes.count import count"),
        ("cli/a.py", "from ..frontend import fx\nfrom ..driver import explain\nfrom .. import __version__"),
        ("__init__.py", "from castile.ir.parse import parse"),
    ],
)
def test_a_good_import_passes(path: str, source: str) -> None:
    assert faults(Path(path), source) == []


def test_the_index_of_passes_is_whole() -> None:
    """`passes/__init__.py` names every file of its folder, and no other."""
    told = (ROOT / "passes" / "__init__.py").read_text(encoding="utf-8")
    listed = {name for line in told.splitlines() if line.startswith("    ") for name in line[4:40].split()}
    files = {p.stem for p in (ROOT / "passes").glob("*.py")} - {"__init__"}
    layers = {f for f in files if f.startswith("tile_")}
    assert listed == (files - layers) | {"tile_*"}
