"""Code blocks of the README and of docs/ run, and links between the pages lead to files."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest
from installed import older

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "recipes" / "README.md"]
PAGES += [ROOT / "callbacks" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Pages whose Python blocks are complete programs. The blocks of the other pages are excerpts.
COMPLETE = ("README.md", "docs/hosts.md")
SECTIONS = [
    "What it does", "When to use it", "How to use it", "Settings", "What it costs", "What it cannot do", "References",
]  # fmt: skip


def blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


PROGRAMS = [(name, number, code) for name in COMPLETE for number, code in enumerate(blocks(ROOT / name))]
EXCERPTS = [(page, code) for page in PAGES for code in blocks(page)]


@pytest.mark.parametrize(("name", "number", "code"), PROGRAMS, ids=[f"{name}-{n}" for name, n, _ in PROGRAMS])
def test_a_program_runs(name: str, number: int, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    if "trl.experimental.sdft" in code and older("trl", "1.16"):
        pytest.skip("needs trl 1.16 or later: SDFTTrainer")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "page"}
    exec(compile(code, name, "exec"), names)
    if "EditMetrics(" in code:
        trainer = names["trainer"]
        callbacks = getattr(trainer, "callbacks", None) or trainer.callback_handler.callbacks  # type: ignore[attr-defined]
        (metrics,) = [c for c in callbacks if type(c).__name__ == "EditMetrics"]
        assert metrics.report.metrics["reliability"]["generated"].value >= 0.95


@pytest.mark.parametrize(("page", "code"), EXCERPTS, ids=[f"{page.name}-{i}" for i, (page, _) in enumerate(EXCERPTS)])
def test_an_excerpt_parses_and_imports_names_that_exist(page: Path, code: str):
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kedit_train"):
            module = importlib.import_module(node.module or "")
            missing = [a.name for a in node.names if not hasattr(module, a.name)]
            assert not missing


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_links_lead_to_files(page: Path):
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


def test_the_readme_is_short_and_its_cells_hold_at_most_two_numbers():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    cells = [cell for line in lines if line.startswith("|") for cell in line.strip("|").split("|")]
    crowded = [cell for cell in cells if len(re.findall(r"(?<![\w`/.])\d+(?:\.\d+)?", cell)) > 2]
    assert not crowded


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "callbacks").glob("*.md")), ids=lambda page: page.stem)
def test_every_callback_page_has_the_same_sections(page: Path):
    titles = re.findall(r"^## (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert titles == SECTIONS


def test_every_callback_has_a_page_and_a_fragment():
    callbacks = {path.stem for path in (ROOT / "kedit_train" / "callbacks").glob("*.py")} - {"__init__", "base"}
    assert {path.stem for path in (ROOT / "docs" / "callbacks").glob("*.md")} == callbacks
    assert {path.stem for path in (ROOT / "callbacks").glob("*.yaml")} == callbacks
