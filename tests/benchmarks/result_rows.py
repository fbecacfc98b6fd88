"""Results of long benchmarks: one JSON object per line, added as soon as it is measured."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any

import torch
from paired import processor


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file, or no rows if the file does not exist."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def add_row(path: Path, row: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def add_measurement(path: Path, row: dict[str, Any]) -> None:
    """Add a row with the date and the machine."""
    add_row(path, row | {"date": str(date.today()), "machine": f"{processor()}, torch {torch.__version__}"})
