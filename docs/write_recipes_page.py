"""Write docs/recipes.md from recipes/README.md and from the comment at the top of each recipe.

python docs/write_recipes_page.py
"""

from __future__ import annotations

import ast
import re
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "recipes.md"
INTRODUCTION = """# Recipes

A recipe is a complete run in one file. Each section of this page shows the comment at the top of one recipe: what it
does, the commands that run it, and the scores to expect. Unless the comment names another model, the scores and the
time were measured with 24 edits of the small model that comes with kedit-train, on 2 CPU cores.
[Choose a recipe](choose_a_recipe.md) helps you to pick a recipe. [Results](results.md) compares the recipes on the same
edits. [The README of the recipes](../recipes/README.md#change-a-recipe) explains how to change a recipe.
"""
FILE = re.compile(r"(?<![\w/`])((?:docs|recipes|callbacks)/[\w/]+\.(?:md|py|yaml))(?=[\s.,;)])")
OPTION = re.compile(r"(?<!`)(--[\w.]+)")
ROW = re.compile(r"^\| \[([\w.]+)\]\(\1\) \|", re.MULTILINE)


def comment(path: Path) -> str:
    """Return the comment at the top of a YAML file, or the docstring of a script."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return ast.get_docstring(ast.parse(text)) or ""
    lines = text[: re.search(r"^[^#]", text, re.MULTILINE).start()].splitlines()  # type: ignore[union-attr]
    return "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines)


def to_markdown(text: str) -> str:
    """Return a comment as Markdown: indented lines are commands, and the other lines are text."""
    text = re.sub(r"\n(?=Expected:|Measured:)", "\n\n", text.replace("``", "`"))
    parts = re.split(r"\n((?:(?: {2,}|python |fabric |lightning ).*\n)+)", f"\n{text}\n")
    commands = [f"```bash\n{textwrap.dedent(part).strip()}\n```" for part in parts[1::2]]
    texts = [OPTION.sub(r"`\1`", FILE.sub(link, part.strip())) for part in parts[0::2]]
    blocks = [texts[0], *(block for pair in zip(commands, texts[1:], strict=True) for block in pair)]
    return "\n\n".join(block for block in blocks if block)


def link(match: re.Match[str]) -> str:
    """Return a Markdown link to a file of the repository."""
    path = match[1]
    return f"[{path}]({path.removeprefix('docs/') if path.startswith('docs/') else f'../{path}'})"


def render() -> str:
    """Return the page as Markdown."""
    folder = ROOT / "recipes"
    parts = [INTRODUCTION]
    for name in ROW.findall((folder / "README.md").read_text(encoding="utf-8")):
        parts.append(f"## {name}\n\n[recipes/{name}](../recipes/{name})\n\n{to_markdown(comment(folder / name))}\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
