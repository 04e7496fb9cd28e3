"""Imports point down only, and parts in one row never import each other."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "retrograd"

# DESIGN section 2, bottom row first; a row's position is its layer. Above layer 10, in this order: the public face
# (`retrograd` itself, which gathers names from everywhere), the demo, which is a user of it, and the command line, which
# imports demo and report inside its functions. Where an import stands makes no difference here: all of them count.
ROWS = (
    {"errors"},
    {"params", "progress", "citations", "optional", "files", "noise"},
    {"linalg", "distributed"},
    {"directions", "game", "measurements", "task", "update_rules"},
    {"trajectory", "optim", "cases"},
    {"adversarial", "curvature"},
    {"adjoint"},
    {"attribution", "hypergradients", "dynamics", "provenance"},
    {"evaluation"},
    {"selection"},
    {"report", "integrations"},
    {"retrograd"},
    {"demo"},
    {"cli"},
)
LAYER = {name: layer for layer, row in enumerate(ROWS) for name in row}


def imported_modules(node: ast.AST, package: list[str]) -> Iterator[str]:
    """Yield the absolute dotted names that an import statement, or ``import_module("…")``, asks for."""
    match node:
        case ast.Import(names=names):
            yield from (alias.name for alias in names)
        case ast.ImportFrom(module=module, names=names, level=level):
            base = package[: len(package) - level + 1] if level else []
            start = ".".join(base + ([module] if module else []))
            # `from retrograd import task` asks for a module, `from retrograd import record` for the public face.
            yield from (f"{start}.{alias.name}" for alias in names) if start == "retrograd" else (start,)
        case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name), args=[ast.Constant(value=str(module)), *_]):
            if name in {"import_module", "__import__"}:
                yield module


def violations(root: Path) -> list[str]:
    """Return ``file:line: what is wrong`` for every import under the package folder ``root`` that points up or sideways."""
    wrong = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if parts == ("__init__",):
            continue  # the public face may import anything
        own = parts[0]
        where = path.relative_to(root.parent)
        if own not in LAYER:
            wrong.append(f"{where}:1: unknown top-level module {own!r}; add it to the table ROWS in tests/test_layers.py")
            continue
        package = ["retrograd", *parts[:-1]]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for module in imported_modules(node, package):
                head, *rest = module.split(".")
                if head != "retrograd":
                    continue
                is_module = rest and (rest[0] in LAYER or (root / rest[0]).is_dir() or (root / f"{rest[0]}.py").exists())
                target = rest[0] if is_module else "retrograd"
                if target == own:
                    continue
                if target not in LAYER:
                    wrong.append(f"{where}:{node.lineno}: unknown top-level module {target!r}; add it to the table ROWS")
                elif LAYER[target] >= LAYER[own]:
                    wrong.append(f"{where}:{node.lineno}: {own} (layer {LAYER[own]}) imports {target} (layer {LAYER[target]})")
    return wrong


def test_imports_point_down():
    assert not (wrong := violations(PACKAGE)), "\n" + "\n".join(wrong)


def test_files_are_short_and_named_after_what_they_hold():
    for path in PACKAGE.rglob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 500, f"{path.name} has more than 500 lines; split it."
        assert path.stem not in {"utils", "common", "core", "helpers"}, f"{path} says nothing about what it holds."


@pytest.mark.parametrize(
    ("file", "source", "message"),
    [
        ("params.py", "import retrograd.errors", None),
        ("adjoint/unrolled.py", "from retrograd.adjoint.base import Adjoint", None),
        ("adjoint/unrolled.py", "from .base import Adjoint\nfrom . import base\nfrom ..params import inner", None),
        ("adjoint/__init__.py", "from .unrolled import Unrolled\nfrom .. import errors", None),
        ("cli.py", "def show():\n    from retrograd.report import page\n    from retrograd import demo, record", None),
        ("task.py", "import torch\nfrom retrogradient import task", None),
        ("__init__.py", "from retrograd.cli import app", None),
        ("errors.py", "\nimport retrograd.params", "errors.py:2: errors (layer 0) imports params (layer 1)"),
        ("errors.py", "import torch, retrograd.cli as c", "errors.py:1: errors (layer 0) imports cli (layer 13)"),
        ("linalg/cg.py", "from retrograd.distributed import mesh", "linalg/cg.py:1: linalg (layer 2) imports distributed"),
        ("linalg/cg.py", "from ..task import Task", "linalg/cg.py:1: linalg (layer 2) imports task (layer 3)"),
        ("linalg/__init__.py", "from .. import task", "linalg/__init__.py:1: linalg (layer 2) imports task (layer 3)"),
        ("task.py", "from retrograd import record", "task.py:1: task (layer 3) imports retrograd (layer 11)"),
        ("task.py", "def f():\n    from retrograd import adjoint", "task.py:2: task (layer 3) imports adjoint (layer 6)"),
        ("task.py", "import importlib\nimportlib.import_module('retrograd.cli')", "task.py:2: task (layer 3) imports cli"),
        ("task.py", "if TYPE_CHECKING:\n    from retrograd.optim import SGD", "task.py:2: task (layer 3) imports optim"),
        ("magic.py", "", "magic.py:1: unknown top-level module 'magic'; add it to the table"),
        ("task.py", "import retrograd.magic", "task.py:1: task (layer 3) imports retrograd (layer 11)"),
        ("task.py", "from retrograd.errors import *\nfrom retrograd.cli import *", "task.py:2: task (layer 3) imports cli"),
    ],
)
def test_the_test(tmp_path, file, source, message):
    path = tmp_path / "retrograd" / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)
    wrong = violations(tmp_path / "retrograd")
    assert [line.startswith(f"retrograd/{message}") for line in wrong] == ([] if message is None else [True])
