"""``kedit ls``: list the recipes and the callback fragments."""

from __future__ import annotations

import ast
import re
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import get_args

from kedit_train import catalog
from kedit_train.cli.kedit.output import json_option, print_json, print_table

HELP = "list the recipes (complete runs) and the callback fragments (to add to your own run)"
EPILOG = """\
examples:
  kedit ls
  kedit ls callbacks
  kedit ls recipes --json
"""


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "kind", nargs="?", choices=get_args(catalog.Kind), help="list only recipes or only callback fragments"
    )
    json_option(parser)


def run(args: Namespace) -> int:
    kinds = (args.kind,) if args.kind else get_args(catalog.Kind)
    files = [(kind, catalog.find(kind, f"{kind}/{name}")) for kind in kinds for name in catalog.names(kind)]
    rows = [{"kind": k, "name": path.stem, "about": about(path), "path": str(path)} for k, path in files]
    if args.json:
        print_json(rows)
        return 0
    print_table((("kind", False), ("name", False), ("", False)), [(r["kind"], r["name"], r["about"]) for r in rows])
    return 0


def about(path: Path) -> str:
    """Return the first line of a script's docstring, or the first sentence of the comment at the top of a YAML file."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0].replace("``", "")
    lines = []
    for line in text.splitlines():
        if not line.startswith("# ") or line.startswith("#  "):
            break
        lines.append(line[2:].strip())
    return re.split(r"(?<=[.])\s", " ".join(lines), maxsplit=1)[0]
