"""The Python blocks of the README and of each page of the docs run, in order, as one session."""

from __future__ import annotations

import doctest
import importlib.util
import re
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def python_blocks(page: Path) -> list[tuple[int, str]]:
    """First line number and source of every block fenced as python."""
    text = page.read_text(encoding="utf-8")
    return [(text.count("\n", 0, m.start(1)) + 1, m.group(1)) for m in BLOCK.finditer(text)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    blocks = python_blocks(page)
    assert blocks, f"{page.name} has no python block"
    monkeypatch.chdir(tmp_path)  # what an example writes does not stay
    # Dataclasses look their module up by name.
    module = types.ModuleType("page_session")
    monkeypatch.setitem(sys.modules, "page_session", module)
    session = vars(module)
    for line, source in blocks:
        for framework in re.findall(r"^\W*(?:import|from) (\w+)", source, re.MULTILINE):
            if importlib.util.find_spec(framework) is None:
                pytest.skip(f"{page.name}, line {line}: {framework} is not installed")
        if ">>>" not in source:
            exec(compile("\n" * (line - 1) + source, str(page), "exec"), session)
            continue
        # A fence right after the expected output is no part of it, as it would be for doctest.
        test = doctest.DocTestParser().get_doctest(source, {}, page.name, str(page), line - 1)
        test.globs = session
        report: list[str] = []
        doctest.DocTestRunner(optionflags=OPTIONS).run(test, out=report.append, clear_globs=False)
        assert not report, "".join(report)
