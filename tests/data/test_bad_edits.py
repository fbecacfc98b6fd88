"""Edits that are created in code are checked like the records of a file."""

from __future__ import annotations

from typing import Any

import pytest

from kedit_train.data import Edit, EditDataset, Probe
from kedit_train.errors import EditError


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ("text", "the item must be an Edit, got text; use EditDataset.from_records to read dicts"),
        (Edit("", "t"), "prompt must be text, got an empty string."),
        (Edit("p", " "), "target must be text, got only white space."),
        (Edit("p", 3), "target must be text, got a number."),  # pyright: ignore[reportArgumentType]
        (Edit("p", "t", ""), "subject must be text, got an empty string."),
        (Edit("p", "t", aliases=["a"]), "aliases must be a tuple of texts, got a list; use tuple(...)"),  # pyright: ignore[reportArgumentType]
        (Edit("p", "t", rephrases="abc"), "rephrases must be a tuple of texts, got text; use tuple(...)"),  # pyright: ignore[reportArgumentType]
        (
            Edit("p", "t", locality=()),  # pyright: ignore[reportArgumentType]
            "locality must be a dict with a tuple of Probe objects for each kind of probe, got ().",
        ),
        (Edit("p", "t", locality={"k": ("q",)}), "locality['k'] must be a tuple of Probe objects, got ('q',)."),  # pyright: ignore[reportArgumentType]
        (
            Edit("p", "t", portability={"k": (Probe(""),)}),
            "portability['k'][0].prompt must be text, got an empty string.",
        ),
        (Edit("p", "t", id=4), "id must be text, got a number."),  # pyright: ignore[reportArgumentType]
        (Edit("p", "\ud800"), "target must be valid Unicode, got a lone surrogate at character 0; correct the encoding"),  # noqa: E501
    ],
)  # fmt: skip
def test_edits_created_in_code_are_checked_too(edit: Any, message: str) -> None:
    with pytest.raises(EditError) as caught:
        EditDataset([Edit("p", "t"), edit], name="mine")
    assert str(caught.value) == f"mine, edit 2: {message}"


def test_a_dataset_without_edits_is_an_error() -> None:
    with pytest.raises(EditError, match=r"^mine: the dataset must contain at least one edit, got none; give"):
        EditDataset([], name="mine")
