"""The docs tell the truth: made pages are as the code makes them, links lead somewhere, examples parse and run."""

from __future__ import annotations

import ast
import doctest
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import utilityvm

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(utilityvm.__path__, "utilityvm.")
    if not module.name.endswith("__main__")
)


def test_made_pages_are_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "docs/generate.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_in_pages_uses_names_that_exist(page: Path) -> None:
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("utilityvm"):
                module = importlib.import_module(node.module or "")
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{node.module}.{alias.name}"


def test_the_tests_that_pages_name_exist() -> None:
    for page in PAGES:
        for path, name in re.findall(r"`((?:tests|src)/[\w/]+\.py)::(\w+)`", page.read_text()):
            assert f"def {name}(" in (ROOT / path).read_text(), f"{page.name}: {path}::{name}"


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/architecture.md"])
def test_the_files_that_a_page_names_exist(page: str) -> None:
    for name in re.findall(r"`([\w/]+\.(?:py|sql|md))`", (ROOT / page).read_text()):
        assert any((folder / name).exists() for folder in (ROOT, ROOT / "src/utilityvm")), name


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_work(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_no_page_and_no_docstring_shows_async_with_await() -> None:
    shown = [*PAGES, *(ROOT / "examples").rglob("*.py"), *(ROOT / "src").rglob("*.py")]
    assert [page.name for page in shown if "async with await " in page.read_text()] == []


def test_the_page_of_the_environment_has_every_variable() -> None:
    used = {
        name
        for file in (ROOT / "src").rglob("*.py")
        for name in re.findall(r"\b(?:UTILITYVM|XDG)_[A-Z_]*[A-Z]\b|\bNO_COLOR\b", file.read_text())
    }
    page = (ROOT / "docs/reference/environment.md").read_text()
    assert used == set(re.findall(r"\b(?:UTILITYVM|XDG)_[A-Z_]*[A-Z]\b|\bNO_COLOR\b", page))
