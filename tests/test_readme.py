"""The Python blocks of the README run, in order, as one session."""

from __future__ import annotations

import doctest
import importlib.util
import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def python_blocks() -> list[tuple[int, str]]:
    """First line number and source of every block fenced as python."""
    if not README.is_file():
        return []
    text = README.read_text(encoding="utf-8")
    return [(text.count("\n", 0, m.start(1)) + 1, m.group(1)) for m in BLOCK.finditer(text)]


def test_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    if not python_blocks():
        pytest.skip("README.md has no python block")
    monkeypatch.chdir(tmp_path)  # what an example writes does not stay
    session: dict[str, object] = {"__name__": "readme"}
    for line, source in python_blocks():
        for framework in re.findall(r"^\W*(?:import|from) (\w+)", source, re.MULTILINE):
            if importlib.util.find_spec(framework) is None:
                pytest.skip(f"README.md, line {line}: {framework} is not installed")
        if ">>>" not in source:
            exec(compile("\n" * (line - 1) + source, str(README), "exec"), session)
            continue
        # A fence right after the expected output is no part of it, as it would be for doctest.
        test = doctest.DocTestParser().get_doctest(source, {}, "README", str(README), line - 1)
        test.globs = session
        report: list[str] = []
        doctest.DocTestRunner(optionflags=OPTIONS).run(test, out=report.append, clear_globs=False)
        assert not report, "".join(report)
