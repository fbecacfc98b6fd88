"""What verbs print: a table for the eye, or JSON for a program; and files that are there whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kedit_train.atomic_write import writing
from kedit_train.errors import EditError


def json_option(parser: Any) -> None:
    """``--json`` in place of text."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def print_json(value: Any) -> None:
    """``value`` on standard output, for a program to read."""
    print(json.dumps(value, ensure_ascii=False, indent=1, allow_nan=False))


def print_table(columns: Sequence[tuple[str, bool]], rows: Sequence[Sequence[str]], title: str | None = None) -> None:
    """Rows in columns of (name, whether numbers); as wide as the terminal, and in a pipe as wide as needed."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from kedit_train.cli.console import plain

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, title=title, title_justify="left")
    for name, numbers in columns:
        table.add_column(name, justify="right" if numbers else "left", no_wrap=numbers, overflow="fold")
    for row in rows:
        table.add_row(*(Text(plain(value)) for value in row))
    console = Console(highlight=False)
    if not console.is_terminal:
        # A pipe has no width: whatever reads it gets each row on one line.
        wanted = Console(width=10_000).measure(table).maximum
        console = Console(highlight=False, width=max(console.width, wanted))
    console.print(table)


def new_path(path: str, force: bool = False) -> Path:
    """A file that is to be written, unless something is there already.

    Raises:
        EditError: it is, and ``force`` was not given; or it is a folder.
    """
    found = Path(path)
    if found.is_dir():
        raise EditError(f"{path} is a folder; give the name of a file in it")
    if found.exists() and not force:
        raise EditError(f"{path} is there already; give another name, or --force")
    return found


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write a file whole or not at all; parent folders are made."""
    path = Path(path)
    with writing(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")
    return path


def size(nbytes: int) -> str:
    """``1.5 MB``."""
    value = float(nbytes)
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"
