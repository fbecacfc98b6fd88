"""What the verbs of kedit share: tables, sizes and checks of output paths."""

from __future__ import annotations

from argparse import ArgumentTypeError
from pathlib import Path

import pytest

from kedit_train.cli.kedit.output import check_new_folder, finite, new_path, print_table, size
from kedit_train.errors import EditError


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1500, "1.5 kB"), (2_000_000, "2.0 MB"), (3 * 10**12, "3.0 TB")],
)
def test_sizes_are_readable(nbytes: int, text: str) -> None:
    assert size(nbytes) == text


def test_output_paths_are_checked(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    assert new_path(str(file), ending=".png") == file
    file.touch()
    assert new_path(str(file), force=True) == file
    for call, message in [
        (lambda: new_path(str(file)), "already exists; choose another name, or add --force"),
        (lambda: new_path(str(tmp_path)), "is a folder"),
        (lambda: new_path("a.jpg", ending=".png"), "must end with .png"),
        (lambda: check_new_folder(str(tmp_path)), "already exists; choose the name of a new folder"),
    ]:
        with pytest.raises(EditError, match=message):
            call()


def test_only_finite_numbers_are_accepted() -> None:
    assert finite("-0.5") == -0.5
    for text in ("nan", "inf"):
        with pytest.raises(ArgumentTypeError, match=f"expected a finite number, got {text}"):
            finite(text)


def test_a_table_in_a_pipe_is_as_wide_as_needed(capsys: pytest.CaptureFixture[str]) -> None:
    print_table((("name", False), ("n", True)), [["x" * 300, "1"], ["\x1b[2J", "2"]])
    lines = capsys.readouterr().out.splitlines()
    assert any("x" * 300 in line and line.rstrip().endswith("1") for line in lines)
    assert any(r"\x1b[2J" in line for line in lines)
