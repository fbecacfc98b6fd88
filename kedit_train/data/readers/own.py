"""The data format of kedit-train: an ``Edit`` as a JSON object or as a row of a CSV file."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from kedit_train.data.readers.fields import Fields, describe, quoted
from kedit_train.data.readers.format import Format, field_names
from kedit_train.data.visible import is_visible
from kedit_train.edit import Edit, Probe
from kedit_train.errors import EditError

READS = field_names("prompt target subject old_target aliases rephrases locality portability id")


def one_probe(record: Fields, key: str, item: object) -> Probe:
    """Convert a question (a text, or a mapping with ``prompt`` and ``answers``) to a probe."""
    if isinstance(item, str) and is_visible(item):
        return Probe(item)
    if not isinstance(item, Mapping):
        raise record.error(key, 'text or {"prompt": ..., "answers": [...]}', describe(item))
    fields = Fields(item, record.where, f"{record.path}{key}.")
    check_names(fields, field_names("prompt answers"))
    return Probe(fields.text("prompt"), fields.texts("answers"))


def probes(record: Fields, key: str) -> dict[str, tuple[Probe, ...]]:
    """Read the probes in the field ``key``, and return a dict from kind to probes.

    If the field is a list instead of a mapping from kinds to lists, all probes get the kind "other".
    """
    value = record.values.get(key)
    if not record.has(key):
        return {}
    kinds: Mapping[str, Any] = value if isinstance(value, Mapping) else {"other": value}
    result: dict[str, tuple[Probe, ...]] = {}
    for kind, items in kinds.items():
        name = f"{key}.{kind}" if isinstance(value, Mapping) else key
        if items is None:
            continue
        if isinstance(items, str):
            items = [items]
        if not isinstance(items, (list, tuple)):
            raise record.error(name, "a list of questions, or a mapping from kinds to such lists", describe(items))
        result[str(kind)] = tuple(one_probe(record, f"{name}[{i}]", item) for i, item in enumerate(items))
    return result


def check_names(record: Fields, known: frozenset[str]) -> None:
    """Raise an error if a field has an unknown name, because the name may be misspelled."""
    others = sorted(str(key) for key in set(record.values) - known)
    if others:
        listed = quoted(record.path + key for key in others)
        similar = get_close_matches(others[0], known, n=1)
        hint = f", did you mean {similar[0]!r}?" if similar else ""
        if not others[0].strip():
            hint = ", where '' is a field or a CSV column without a name"
        plural = "s" if len(others) > 1 else ""
        raise EditError(
            f"{record.where}: unknown field{plural} {listed}{hint} (known fields: {', '.join(sorted(known))}); rename "
            f'or remove the field{plural}, or pass on_error="skip" to leave out records with errors'
        )


def read(record: Fields) -> list[Edit]:
    """Read a record in the format of kedit-train, without changing its texts.

    ``prompt`` and ``target`` are required. ``subject``, ``old_target``, ``aliases``, ``rephrases``, ``locality``,
    ``portability`` and ``id`` are optional. Locality and portability are a list of questions, or a mapping from kinds
    to lists of questions. A question is ``{"prompt": ..., "answers": [...]}``, or a text if it has no known answer.
    """
    check_names(record, READS)
    return [
        Edit(
            prompt=record.text("prompt"),
            target=record.text("target"),
            subject=record.optional_text("subject"),
            old_target=record.optional_text("old_target"),
            aliases=record.texts("aliases"),
            rephrases=record.texts("rephrases"),
            locality=probes(record, "locality"),
            portability=probes(record, "portability"),
            id=record.identifier("id"),
        )
    ]


def write(edit: Edit) -> dict[str, Any]:
    """Convert an edit to a dict of JSON values, without empty fields. ``read`` converts it back to an equal edit."""

    def kinds(probes: Mapping[str, tuple[Probe, ...]]) -> dict[str, Any]:
        return {kind: [{"prompt": p.prompt, "answers": list(p.answers)} for p in ps] for kind, ps in probes.items()}

    values = {
        "id": edit.id,
        "prompt": edit.prompt,
        "target": edit.target,
        "subject": edit.subject,
        "old_target": edit.old_target,
        "aliases": list(edit.aliases),
        "rephrases": list(edit.rephrases),
        "locality": kinds(edit.locality),
        "portability": kinds(edit.portability),
    }
    return {key: value for key, value in values.items() if value}


def recognize(record: Mapping[str, Any]) -> bool:
    """Return whether the keys are those of the kedit-train format.

    One of the keys ``rephrases``, ``old_target`` or ``aliases`` is enough. The key ``target`` is also enough, except in
    a record with ``rephrase`` or ``source``. Such a record is from QAEdit, which has the key ``target`` too.
    """
    keys = set(record)
    if keys & {"rephrases", "old_target", "aliases"}:
        return True
    return "target" in keys and not keys & {"rephrase", "source"}


OWN = Format(
    name="edits",
    recognize=recognize,
    read=read,
    reads=READS,
    structured=field_names("aliases rephrases locality portability"),
)
