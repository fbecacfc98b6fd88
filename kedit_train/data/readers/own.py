"""This package's own format: an ``Edit`` as a JSON object, or as a row of a CSV file.

``prompt`` and ``target`` are required; ``subject``, ``old_target``, ``aliases``, ``rephrases``, ``locality``,
``portability`` and ``id`` are optional. Locality and portability map a kind to a list of questions; a bare list
counts as the kind ``other``. A question is ``{"prompt": ..., "answers": [...]}``, or only its text, where it has no
known answer. Texts are kept exactly as written. A field of any other name is an error: a misspelt ``rephrases``
must not go unnoticed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kedit_train.data.readers.fields import REMEDY, Fields, describe
from kedit_train.data.readers.format import Format, words
from kedit_train.edit import Edit, Probe
from kedit_train.errors import EditError

READS = words("prompt target subject old_target aliases rephrases locality portability id")


def one_probe(record: Fields, key: str, item: object) -> Probe:
    if isinstance(item, str) and item.strip():
        return Probe(item)
    if not isinstance(item, Mapping):
        raise record.error(key, f"is {describe(item)}", 'text or {"prompt": ..., "answers": [...]}')
    inside = Fields(item, record.where, f"{record.path}{key}.")
    refuse_others(inside, words("prompt answers"))
    return Probe(inside.text("prompt"), inside.texts("answers"))


def probes(record: Fields, key: str) -> dict[str, tuple[Probe, ...]]:
    value = record.values.get(key)
    if not record.has(key):
        return {}
    kinds: Mapping[str, Any] = value if isinstance(value, Mapping) else {"other": value}
    found: dict[str, tuple[Probe, ...]] = {}
    for kind, items in kinds.items():
        name = f"{key}.{kind}" if isinstance(value, Mapping) else key
        if items is None:
            continue
        if isinstance(items, str):
            items = [items]
        if not isinstance(items, (list, tuple)):
            raise record.error(
                name, f"is {describe(items)}", "a list of questions, or a mapping of kinds to such lists"
            )
        found[str(kind)] = tuple(one_probe(record, f"{name}[{i}]", item) for i, item in enumerate(items))
    return found


def refuse_others(record: Fields, known: frozenset[str]) -> None:
    others = sorted(str(key) for key in set(record.values) - known)
    if others:
        listed = ", ".join(f"'{record.path}{key}'" for key in others)
        raise EditError(
            f"{record.where}: nothing reads the field {listed} (known: {', '.join(sorted(known))}): "
            f"rename or remove it; {REMEDY}"
        )


def read(record: Fields) -> list[Edit]:
    refuse_others(record, READS)
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
            id=record.identity("id"),
        )
    ]


def write(edit: Edit) -> dict[str, Any]:
    """The edit as JSON values, without the fields that are empty; ``read`` gives an equal edit back."""

    def kinds(found: Mapping[str, tuple[Probe, ...]]) -> dict[str, Any]:
        return {kind: [{"prompt": p.prompt, "answers": list(p.answers)} for p in ps] for kind, ps in found.items()}

    every = {
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
    return {key: value for key, value in every.items() if value}


def recognise(record: Mapping[str, Any]) -> bool:
    keys = set(record)
    if keys & {"rephrases", "old_target", "aliases"}:
        return True
    return "target" in keys and not keys & {"rephrase", "source"}


OWN = Format(
    name="edits",
    recognise=recognise,
    read=read,
    reads=READS,
    structured=words("aliases rephrases locality portability"),
)
