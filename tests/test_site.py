"""The site of the documentation is built without warnings, and its pages agree with the code and with the recipes."""

from __future__ import annotations

import ast
import os
import re
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
SITE_PACKAGES = ("mkdocs", "material", "mkdocstrings_handlers.python")


def installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:
        return False


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    missing = [package for package in SITE_PACKAGES if not installed(package)]
    if missing:
        pytest.skip(f"{', '.join(missing)} is not installed; install it with: pip install '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    command = [
        "build",
        "--strict",
        "--quiet",
        "--config-file",
        str(DOCS / "site" / "mkdocs.yml"),
        "--site-dir",
        str(folder),
    ]
    result = subprocess.run(
        [sys.executable, "-m", "mkdocs", *command],
        capture_output=True,
        text=True,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


def test_the_site_loads_nothing_from_other_servers(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert {"index.html", "api.html", "recipes.html"} <= {page.name for page in pages}
    loads = re.compile(
        r"""<(?:script|img|iframe)[^>]+src="?(?:https?:)?//|<link[^>]+rel="?(?:stylesheet|icon)"?[^>]+//"""
    )
    loading = [page.name for page in pages if loads.search(page.read_text(encoding="utf-8"))]
    assert not loading


def test_a_link_to_a_recipe_leads_to_a_page_of_the_site(site: Path) -> None:
    page = (site / "choose_a_recipe.html").read_text(encoding="utf-8")
    assert 'href="repository/recipes/kedit_default.yaml.html"' in page
    assert "seed_everything" in (site / "repository" / "recipes" / "kedit_default.yaml.html").read_text(
        encoding="utf-8"
    )


def test_every_public_name_has_an_entry_in_the_reference(site: Path) -> None:
    names = re.findall(r"^\| `(\w+)` \|", (DOCS / "api.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    entries = "".join(page.read_text(encoding="utf-8") for page in (site / "reference").glob("*.html"))
    missing = [name for name in names if not re.search(rf'id="kedit_train\.(?:\w+\.)*{name}"', entries)]
    assert len(names) > 60
    assert not missing


def test_the_page_of_recipes_is_up_to_date_and_complete() -> None:
    rendered = runpy.run_path(str(DOCS / "write_recipes_page.py"))["render"]()
    assert (DOCS / "recipes.md").read_text(encoding="utf-8") == rendered, "run docs/write_recipes_page.py"
    recipes = {path.name for kind in ("*.yaml", "*.py") for path in (ROOT / "recipes").glob(kind)}
    assert set(re.findall(r"^## (.*)$", rendered, flags=re.MULTILINE)) == recipes


def test_every_message_in_troubleshooting_is_in_the_code() -> None:
    code = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "kedit_train").rglob("*.py")]
    texts = [node.value for tree in code for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    messages = "\n".join(text for text in texts if isinstance(text, str))
    items = re.split(r"\n(?=- )", (DOCS / "troubleshooting.md").read_text(encoding="utf-8"))
    quoted = [match[1] for item in items if (match := re.match(r"- ((?:`[^`]+`,?\s*)+):", item))]
    parts = [part for quotes in quoted for part in re.findall(r"`([^`]+)`", quotes)]
    assert len(parts) > 150
    assert not [part for part in parts if part not in messages]
