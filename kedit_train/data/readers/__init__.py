"""Records -> edits: one reader for each public format, and the choice between them."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from kedit_train.data.readers.counterfact import COUNTERFACT
from kedit_train.data.readers.fields import REMEDY, Fields, describe
from kedit_train.data.readers.files import decode_cells
from kedit_train.data.readers.format import Format
from kedit_train.data.readers.knowedit import KNOWEDIT
from kedit_train.data.readers.own import OWN
from kedit_train.data.readers.questions import QAEDIT, WIKIBIGEDIT, ZSRE
from kedit_train.data.readers.rewrites import COUNTERFACT_NESTED, MQUAKE
from kedit_train.edit import Edit
from kedit_train.errors import EditError

FORMATS: dict[str, Format] = {
    form.name: form for form in (OWN, COUNTERFACT, COUNTERFACT_NESTED, ZSRE, KNOWEDIT, WIKIBIGEDIT, QAEDIT, MQUAKE)
}


def recognise(records: Sequence[Any], name: str) -> str:
    """The format that most records have, by their keys.

    Raises:
        EditError: no record has a known one, or two formats are equally frequent.
    """
    votes: Counter[str] = Counter()
    for record in records:
        if isinstance(record, Mapping):
            votes.update(form.name for form in FORMATS.values() if form.recognise(record))
    ranked = votes.most_common()
    best = [form for form, count in ranked if count == ranked[0][1]]
    if len(best) == 1:
        return best[0]
    mappings = [record for record in records if isinstance(record, Mapping)]
    if not mappings:
        read_record(records[0], OWN, f"{name}, record 1", chosen=True, csv=False)  # says what it is instead
    shown = [record for record in mappings if not best or any(FORMATS[form].recognise(record) for form in best)]
    keys = ", ".join(map(repr, dict.fromkeys(key for record in shown for key in record)))
    if best:
        raise EditError(
            f"{name}: the fields {keys} fit several formats equally well ({', '.join(best)}): pass "
            f'format="{best[0]}" or another of them, or split the file'
        )
    raise EditError(
        f"{name}: the fields {keys} fit none of the formats {', '.join(FORMATS)}: rename them to prompt and target, "
        "or pass format=..."
    )


def read_record(record: Any, form: Format, where: str, *, chosen: bool, csv: bool) -> list[Edit]:
    """The edits of one record. ``chosen``: the user named the format, so no second guess is made."""
    if isinstance(record, EditError):
        raise record
    if not isinstance(record, Mapping):
        raise EditError(f"{where}: the record is {describe(record)} (expected a mapping of fields): {REMEDY}")
    others = set(record) - form.reads - form.ignores
    if others and not chosen:
        looks = [other.name for other in FORMATS.values() if other is not form and other.recognise(record)]
        if looks:
            raise EditError(
                f"{where}: field '{min(map(str, others))}' belongs to {looks[0]}, the records here are {form.name} "
                f'(expected one format in a file): {REMEDY}, or pass format="{form.name}"'
            )
    if csv:
        record = decode_cells(record, form.structured, where)
    return form.read(Fields(record, where))


def read_records(
    records: list[Any],
    name: str,
    *,
    format: str | None = None,
    on_error: str = "raise",
    limit: int | None = None,
    csv: bool = False,
) -> tuple[list[Edit], str, tuple[str, ...]]:
    """All edits of the records, the format's name, and one line for each record that was skipped.

    Warns once where records were skipped, and once where a public format's records have fields that nothing reads.
    """
    if on_error not in ("raise", "skip"):
        raise EditError(f"on_error={on_error!r} is not known: use 'raise' or 'skip'")
    if limit is not None and limit < 1:
        raise EditError(f"limit={limit} leaves no edits: use 1 or more, or None for all")
    if format is not None and format not in FORMATS:
        raise EditError(f"format={format!r} is not known: use one of {', '.join(FORMATS)}")
    if not records:
        raise EditError(f"{name}: there are no records: an edit needs at least a prompt and a target")
    form = FORMATS[format or recognise(records, name)]
    edits: list[Edit] = []
    skipped: list[str] = []
    unread: Counter[str] = Counter()
    done = 0
    for number, record in enumerate(records, start=1):
        if limit is not None and done == limit:
            break
        try:
            edits += read_record(record, form, f"{name}, record {number}", chosen=format is not None, csv=csv)
        except EditError as error:
            if on_error == "raise":
                raise
            skipped.append(str(error))
            continue
        done += 1
        unread.update(str(key) for key in set(record) - form.reads - form.ignores)
    if unread:
        listed = ", ".join(f"'{key}' ({count} records)" for key, count in sorted(unread.items()))
        warnings.warn(f"{name}: format {form.name} does not read the fields {listed}", UserWarning, stacklevel=3)
    if skipped:
        message = f"{name}: skipped {len(skipped)} of {done + len(skipped)} records; first: {skipped[0]}"
        if not edits:
            raise EditError(f"{name}: none of the {len(skipped)} records can be read; first: {skipped[0]}")
        warnings.warn(message, UserWarning, stacklevel=3)
    return edits, form.name, tuple(skipped)
