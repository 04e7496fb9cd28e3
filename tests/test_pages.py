"""What the pages show is run: every ```pycon block is executed, every ```python block must at least compile."""

import doctest
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted(path for pattern in ("*.md", "docs/**/*.md") for path in ROOT.glob(pattern) if "_build" not in path.parts)
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """The fenced blocks in ``language``, each with the number of lines above it."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, block.start(1)), block[1]) for block in found]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a page may record a run
    for line, source in blocks(page, "python"):
        compile("\n" * line + source, str(page), "exec")
    names: dict = {"__name__": "__main__"}  # a page is read from top to bottom, so its blocks share their names
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    for line, source in blocks(page, "pycon"):
        report: list[str] = []
        test = doctest.DocTestParser().get_doctest(source, names, page.name, str(page), line)
        runner.run(test, out=report.append, clear_globs=False)
        names = test.globs
        assert not report, "".join(report)
