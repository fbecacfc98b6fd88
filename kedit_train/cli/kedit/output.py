"""Functions that all verbs of ``kedit`` use: print tables and JSON, and check paths of files to write."""

from __future__ import annotations

import json
import math
import os
from argparse import ArgumentTypeError
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kedit_train.atomic_write import writing
from kedit_train.errors import EditError


def json_option(parser: Any) -> None:
    """Add ``--json``, which prints JSON instead of text."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def prompt_format_option(parser: Any) -> None:
    """Add ``--prompt-format``."""
    parser.add_argument(
        "--prompt-format",
        choices=("plain", "chat", "question"),
        default="plain",
        help="format of the prompts (default: plain)",
    )


def evaluation_options(parser: Any) -> None:
    """Add the options for evaluations: number of edits, batch size, length of answers, and prompt format."""
    parser.add_argument("--limit", type=int, metavar="N", help="evaluate a random sample of N edits")
    parser.add_argument(
        "--batch-size",
        type=int,
        default=64,
        metavar="N",
        help="prompts per batch (default: 64); does not affect the scores",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=32,
        metavar="N",
        help="maximum number of tokens of an answer (default: 32)",
    )
    prompt_format_option(parser)


def loading_options(parser: Any) -> None:
    """Add ``--device`` and ``--trust-remote-code``, which say how a model is loaded."""
    parser.add_argument("--device", help="cpu, cuda, ... (default: the accelerator if there is one, otherwise cpu)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the model")


def print_json(value: Any) -> None:
    """Print ``value`` as JSON on standard output."""
    print(json.dumps(value, ensure_ascii=False, indent=1, allow_nan=False))


def print_table(columns: Sequence[tuple[str, bool]], rows: Sequence[Sequence[str]], title: str | None = None) -> None:
    """Print a table that fits the terminal. In a pipe, each row is one line.

    Args:
        columns: one pair for each column: the header, and True if the column contains numbers.
        rows: one list of cells for each row.
        title: a text to print above the table.
    """
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
        # A program that reads the pipe gets each row on one line.
        width = Console(width=10_000).measure(table).maximum
        console = Console(highlight=False, width=max(console.width, width))
    console.print(table)


def new_path(path: str, *, force: bool = False, ending: str | None = None) -> Path:
    """Check the path of a file to write, and return the path.

    Args:
        path: the path from the command line.
        force: whether the file may exist already. If it exists, the caller replaces the file.
        ending: the required ending of the file name, such as ".png". None (default) allows any ending.

    Raises:
        EditError: the path is a folder, the file exists already and ``force`` is False, or the ending is wrong.
    """
    file = Path(path)
    if ending is not None and file.suffix != ending:
        raise EditError(f"the file name must end with {ending}, got {path}.")
    if file.is_dir():
        raise EditError(f"{path} is a folder; give the name of a file in this folder.")
    if file.exists() and not force:
        raise EditError(f"{path} already exists; choose another name, or add --force.")
    return file


def check_new_folder(path: str) -> None:
    """Check that a folder to write does not exist yet.

    Raises:
        EditError: the folder, or a file of this name, exists already.
    """
    if Path(path).exists():
        raise EditError(f"the output path {path!r} already exists; choose the name of a new folder.")


@contextmanager
def naming_models(path: str, meta: Mapping[str, Any], model: str) -> Iterator[None]:
    """Context manager: begin every error message with the delta and the model that cannot be used together.

    Args:
        path: the path of the delta.
        meta: the metadata of the delta. If it contains the name of the base model, this name is added, too.
        model: the name of the model with which the delta is used.
    """
    try:
        yield
    except EditError as error:
        base = meta["base"].get("name")
        made_for = f" (made for the model {base!r})" if base else ""
        raise EditError(f"{path}{made_for} cannot be applied to the model {model!r}: {error}") from error


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write a text file atomically, and create its parent folders."""
    path = Path(path)
    with writing(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")
    return path


def finite(text: str) -> float:
    """Parse a finite number from the command line."""
    value = float(text)
    if not math.isfinite(value):
        raise ArgumentTypeError(f"expected a finite number, got {text}")
    return value


def size(nbytes: int) -> str:
    """Return a readable size, for example ``1.5 MB``."""
    value = float(nbytes)
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"
