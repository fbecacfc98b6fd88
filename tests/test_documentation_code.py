"""The Python blocks of docs/ run, in their order on the page.

The HTML comment ``<!-- not run: reason -->`` before a block marks a block that needs what a test does not have: a large
model, a GPU, another package or much time. Such a block has to compile, and all its names have to exist.
"""

from __future__ import annotations

import ast
import builtins
import re
from pathlib import Path
from typing import Any

import pytest
from documentation_names import PROGRAMS, language_model, stand_in, write_files

DOCS = Path(__file__).resolve().parents[1] / "docs"
BLOCK = re.compile(r"(?:^<!-- not run: ([^\n]+) -->\n\n)?^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
# test_documentation.py runs the blocks of this page as they are.
COMPLETE = {"hosts.md"}
PAGES = [
    page for page in sorted(DOCS.rglob("*.md")) if page.name not in COMPLETE and "```python" in page.read_text("utf-8")
]


def defined_names(code: str) -> set[str]:
    """Return the names that a block defines or imports."""
    nodes = list(ast.walk(ast.parse(code)))
    names = {node.id for node in nodes if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
    names |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    names |= {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    imported = [name for node in nodes if isinstance(node, ast.Import | ast.ImportFrom) for name in node.names]
    return names | {(name.asname or name.name).partition(".")[0] for name in imported}


def unknown_names(code: str, known: set[str]) -> set[str]:
    """Return the names that a block reads, and that neither the block nor the program around it defines."""
    read = {node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)}
    return read - defined_names(code) - known - set(dir(builtins))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(DOCS)) for page in PAGES])
def test_the_blocks_of_a_page_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path)
    own: dict[str, Any] = {}  # What earlier blocks of the page have defined.
    not_run: set[str] = set()  # The names that earlier blocks would have defined.
    for reason, code in BLOCK.findall(page.read_text(encoding="utf-8")):
        program = PROGRAMS.get(page.name, language_model)()
        names = {**program, **own, "__name__": "page"}
        if reason:
            assert not unknown_names(code, set(names) | not_run)
            not_run |= defined_names(code)
            continue
        exec(compile(stand_in(code), str(page), "exec"), names)
        own |= {name: value for name, value in names.items() if name not in program}


def test_a_name_that_nobody_defines_is_found() -> None:
    assert unknown_names("from torch import nn\nx = [y for y in z]\nprint(nn, missing, lambda a: a)", {"z"}) == {
        "missing"
    }
