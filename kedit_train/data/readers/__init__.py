"""The readers of public data formats, and the function that recognizes the format of a file."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from kedit_train.arguments import check_arguments, integer_from, one_of, optional
from kedit_train.data.contradictions import duplicates
from kedit_train.data.readers.check_edit import check_edit
from kedit_train.data.readers.consequences import HALLUEDITBENCH, RIPPLE_EDITS, UNIEDIT
from kedit_train.data.readers.counterfact import COUNTERFACT
from kedit_train.data.readers.documents import DOCUMENTS
from kedit_train.data.readers.fields import REMEDY, Fields, describe, quoted
from kedit_train.data.readers.files import decode_cells
from kedit_train.data.readers.format import Format
from kedit_train.data.readers.knowedit import KNOWEDIT
from kedit_train.data.readers.long_answers import AKEW, LEME, UNKEBENCH
from kedit_train.data.readers.own import OWN
from kedit_train.data.readers.questions import QAEDIT, WIKIBIGEDIT, ZSRE
from kedit_train.data.readers.rewrites import COUNTERFACT_NESTED, MQUAKE
from kedit_train.edit import Edit
from kedit_train.errors import EditError

_ALL = (
    *(OWN, COUNTERFACT, COUNTERFACT_NESTED, ZSRE, KNOWEDIT, WIKIBIGEDIT, QAEDIT, MQUAKE, DOCUMENTS, UNKEBENCH, AKEW),
    *(LEME, RIPPLE_EDITS, UNIEDIT, HALLUEDITBENCH),
)
FORMATS: dict[str, Format] = {form.name: form for form in _ALL}


def formats_of(record: Mapping[str, Any]) -> list[Format]:
    """Return the formats that recognize a record. If one of them extends another, the other is left out."""
    recognized = [form for form in FORMATS.values() if form.recognize(record)]
    extended = {name for form in recognized for name in form.extends}
    return [form for form in recognized if form.name not in extended]


def recognize(records: Sequence[Any], name: str) -> str:
    """Return the name of the format that most records have. Formats are recognized from the keys of a record.

    Args:
        records: the records of a file.
        name: the beginning of every error message, for example the name of the file.

    Raises:
        EditError: no record has a known format, or two formats are equally frequent.
    """
    votes: Counter[str] = Counter()
    for record in records:
        if isinstance(record, Mapping):
            votes.update(form.name for form in formats_of(record))
    ranked = votes.most_common()
    best = [form for form, count in ranked if count == ranked[0][1]]
    if len(best) == 1:
        return best[0]
    mappings = [record for record in records if isinstance(record, Mapping)]
    if not mappings:
        # This call raises an error that names the type of the record.
        read_record(records[0], OWN, f"{name}, record 1", chosen=True, csv=False)
    shown = [record for record in mappings if not best or {form.name for form in formats_of(record)} & {*best}]
    keys = quoted(dict.fromkeys(key for record in shown for key in record))
    if best:
        raise EditError(
            f"{name}: the fields {keys} fit more than one format ({', '.join(best)}); pass the format of the records, "
            f'for example format="{best[0]}", or use one file per format'
        )
    hint = " (the first row of a CSV file must contain the names of the fields)" if name.endswith(".csv") else ""
    raise EditError(
        f"{name}: the fields {keys} match none of the formats {', '.join(FORMATS)}{hint}; rename the fields to prompt "
        "and target, or pass format=..."
    )


def read_record(record: Any, form: Format, where: str, *, chosen: bool, csv: bool) -> list[Edit]:
    """Return the edits of one record.

    Args:
        record: a mapping, or an ``EditError`` for a line that could not be read. The function raises this error.
        form: the format of the record.
        where: the beginning of every error message.
        chosen: True if the user passed the name of the format. Fields of other formats are then allowed.
        csv: True if the record is a row of a CSV file. In this case, cells with lists or mappings are decoded.

    Raises:
        EditError: the record is malformed, or has another format.
    """
    if isinstance(record, EditError):
        raise record
    if not isinstance(record, Mapping):
        raise EditError(f"{where}: the record must be a mapping of fields, got {describe(record)}; {REMEDY}")
    others = form.unknown(record)
    if others and not chosen:
        matches = [other.name for other in formats_of(record) if other is not form]
        if matches:
            raise EditError(
                f"{where}: field {quoted([min(map(str, others))])} belongs to the format {matches[0]}, but most "
                f"records have the format {form.name}; {REMEDY}, or pass "
                f'format="{form.name}" to read all records as {form.name}'
            )
    if csv:
        record = decode_cells(record, form.structured, where)
    return form.read(Fields(record, where))


def read_records(
    records: list[Any],
    name: str,
    *,
    places: Sequence[str] | None = None,
    format: str | None = None,
    on_error: str = "raise",
    limit: int | None = None,
    csv: bool = False,
) -> tuple[list[Edit], str, tuple[str, ...]]:
    """Convert records to edits.

    The function gives one warning for each of these problems: skipped records, fields that the format does not read,
    and edits that repeat earlier edits.

    Args:
        records: the records.
        name: the beginning of every error message, for example the name of the file.
        places: one text per record. Error messages about the record begin with this text. If ``places`` is None, they
            begin with ``name`` and the number of the record.
        format: the name of the format. If None, the format is recognized from the fields of the records.
        on_error: "raise" or "skip". With "skip", malformed records are left out.
        limit: stop after this many readable records. None reads all records.
        csv: True if the records are rows of a CSV file.

    Returns:
        The edits, the name of the format, and one message per skipped record.

    Raises:
        EditError: there are no records, or none of them can be read; ``on_error`` is "raise" and a record is
            malformed; an argument is invalid.
    """
    check_arguments(
        "EditDataset",
        on_error=(on_error, one_of(("raise", "skip"))),
        limit=(limit, optional(integer_from(1))),
        format=(format, optional(one_of(FORMATS))),
    )
    if not records:
        raise EditError(f"{name}: there are no records; give at least one record with a prompt and a target")
    form = FORMATS[format or recognize(records, name)]
    edits: list[Edit] = []
    skipped: list[str] = []
    unread: Counter[str] = Counter()
    done = 0
    for number, record in enumerate(records, start=1):
        if limit is not None and done == limit:
            break
        try:
            where = places[number - 1] if places else f"{name}, record {number}"
            made = read_record(record, form, where, chosen=format is not None, csv=csv)
            for edit in made:
                check_edit(edit, where)
        except EditError as error:
            if on_error == "raise":
                raise
            skipped.append(str(error))
            continue
        edits += made
        done += 1
        unread.update(str(key) for key in form.unknown(record))
    if unread:
        listed = ", ".join(f"{quoted([key])} ({count} records)" for key, count in sorted(unread.items())[:20])
        listed += f" and {len(unread) - 20} others" if len(unread) > 20 else ""
        warnings.warn(f"{name}: the format {form.name} does not read the fields {listed}", UserWarning, stacklevel=3)
    if skipped:
        if not edits:
            raise EditError(f"{name}: none of the {len(skipped)} records can be read; the first reason: {skipped[0]}")
        warnings.warn(
            f"{name}: skipped {len(skipped)} of {done + len(skipped)} records; the first reason: {skipped[0]}",
            UserWarning,
            stacklevel=3,
        )
    if repeated := duplicates(edits):
        first, again = repeated[0]
        warnings.warn(
            f"{name}: {len(repeated)} of {len(edits)} edits repeat an earlier edit (edit {again + 1} is the same as "
            f"edit {first + 1}); repeated edits are kept and count again in training and in scores; if this is not "
            "intended, remove the repeated edits",
            UserWarning,
            stacklevel=3,
        )
    return edits, form.name, tuple(skipped)
