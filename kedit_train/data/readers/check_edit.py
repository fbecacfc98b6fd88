"""Check the types and the texts of an edit."""

from __future__ import annotations

from collections.abc import Mapping

from kedit_train.data.readers.fields import describe
from kedit_train.data.visible import is_visible
from kedit_train.edit import Edit, Probe
from kedit_train.errors import EditError


def check_edit(edit: object, where: str) -> None:
    """Check the types and texts of an edit.

    Args:
        edit: the value to check.
        where: the beginning of every error message, for example ``"edits.jsonl, edit 3"``.

    Raises:
        EditError: ``edit`` is not an :class:`Edit`; a text is blank or has only invisible characters; a field has a
            wrong type; a text is not valid Unicode.
    """

    def text(value: object, field: str) -> None:
        if not isinstance(value, str) or not is_visible(value):
            raise EditError(f"{where}: {field} must be text, got {describe(value)}.")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise EditError(
                f"{where}: {field} must be valid Unicode, got a lone surrogate at character {error.start}; "
                "correct the encoding"
            ) from error

    def texts(values: object, field: str) -> None:
        if not isinstance(values, tuple):
            raise EditError(f"{where}: {field} must be a tuple of texts, got {describe(values)}; use tuple(...)")
        for i, value in enumerate(values):
            text(value, f"{field}[{i}]")

    if not isinstance(edit, Edit):
        raise EditError(
            f"{where}: the item must be an Edit, got {describe(edit)}; use EditDataset.from_records to read dicts"
        )
    text(edit.prompt, "prompt")
    text(edit.target, "target")
    for field, value in (("subject", edit.subject), ("old_target", edit.old_target)):
        if value is not None:
            text(value, field)
    if edit.id != "":
        text(edit.id, "id")
    texts(edit.aliases, "aliases")
    texts(edit.rephrases, "rephrases")
    for field, kinds in (("locality", edit.locality), ("portability", edit.portability)):
        if not isinstance(kinds, Mapping):
            raise EditError(
                f"{where}: {field} must be a dict with a tuple of Probe objects for each kind of probe, got {kinds!r}."
            )
        for kind, probes in kinds.items():
            text(kind, f"every kind (key) of {field}")
            if not isinstance(probes, tuple) or not all(isinstance(probe, Probe) for probe in probes):
                raise EditError(f"{where}: {field}[{kind!r}] must be a tuple of Probe objects, got {probes!r}.")
            for i, probe in enumerate(probes):
                text(probe.prompt, f"{field}[{kind!r}][{i}].prompt")
                texts(probe.answers, f"{field}[{kind!r}][{i}].answers")
