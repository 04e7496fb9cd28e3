"""The public face: what it shows, documents and costs to import."""

import inspect
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import retrograd

API = Path(__file__).parents[1] / "docs" / "api.md"
OPTIONAL = ("typer", "rich", "plotly", "jinja2", "sklearn", "scipy", "pandas", "matplotlib", "transformers", "lightning", "ray")
LAZY = ("pyarrow", "safetensors")  # core, but loaded only by those who read or write a run folder


def ruff_order(name: str) -> tuple[bool, bool, str]:
    """Sort as ruff's RUF022 does: CONSTANTS, then Classes, then functions."""
    return not name.isupper(), not name[0].isupper(), name


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def test_all_is_sorted_without_repetition():
    assert retrograd.__all__ == sorted(set(retrograd.__all__), key=ruff_order)


@pytest.mark.parametrize("name", retrograd.__all__)
def test_exported_name_exists_and_is_documented(name):
    item = getattr(retrograd, name)
    assert not isinstance(item, ModuleType), f"retrograd.{name} is a module; export what is in it."
    # A dataclass without docstring gets its signature as one, and a subclass its parent's through inspect.getdoc.
    documentation = item.__doc__ or ""
    assert documentation.strip(), f"retrograd.{name} has no docstring."
    if inspect.isclass(item):
        assert not documentation.startswith(f"{item.__name__}("), f"retrograd.{name} has only the docstring of a dataclass."


def test_every_visible_name_is_exported():
    visible = {name for name, item in vars(retrograd).items() if not name.startswith("_") and not isinstance(item, ModuleType)}
    assert visible <= set(retrograd.__all__), f"Add to __all__, or begin with _: {sorted(visible - set(retrograd.__all__))}"


def test_api_page_lists_exactly_the_exported_names():
    listed = re.findall(r"^\.\. auto\w+:: retrograd\.(\w+)$", API.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(listed) == len(set(listed)), f"docs/api.md lists twice: {sorted({n for n in listed if listed.count(n) > 1})}"
    missing, unknown = set(retrograd.__all__) - set(listed), set(listed) - set(retrograd.__all__)
    lines = [
        f".. auto{'class' if inspect.isclass(getattr(retrograd, n)) else 'function'}:: retrograd.{n}" for n in sorted(missing)
    ]
    assert not missing, "Add to docs/api.md:\n" + "\n".join(lines)
    assert not unknown, f"docs/api.md lists names that retrograd does not export: {sorted(unknown)}"


@pytest.mark.parametrize("module", OPTIONAL + LAZY)
def test_import_leaves_out(module, modules_after_import):
    before, after = modules_after_import
    assert module not in after - before, f"`import retrograd` imports {module}; import it in the function that needs it."


@pytest.fixture(scope="module")
def modules_after_import() -> tuple[set[str], set[str]]:
    """The modules loaded by `import torch` (not ours to judge), and by `import retrograd` after it."""
    before, after = run(
        "import sys, torch; print(*sys.modules); import retrograd; print(*sys.modules)",
    ).splitlines()
    return set(before.split()), set(after.split())


def test_import_takes_little_beside_torch():
    # Both in one process, as processor time: whatever else the machine does meanwhile slows both. The best of five, as a burst
    # of other work may fall on one half; usually it is a quarter.
    code = "from time import process_time as t; a = t(); import torch; b = t(); import retrograd; print((t() - b) / (b - a))"
    assert min(float(run(code)) for _ in range(5)) <= 0.5
