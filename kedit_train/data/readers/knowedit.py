"""KnowEdit ("A Comprehensive Study of Knowledge Editing for Large Language Models", arXiv 2401.01286).

Locality and portability keep the names of their kinds. A right answer is a text, a list, or a list with one list of
aliases for every correct value (a person with three occupations has three): any text in it counts as right. Some
published locality questions have no answer at all (``[[]]``): they become probes without answers, of which only
"did the answer change?" can be asked. A kind without any question is left out.
"""

from __future__ import annotations

from kedit_train.data.readers.fields import Fields
from kedit_train.data.readers.format import Format, words
from kedit_train.edit import Edit, Probe


def probes(record: Fields, key: str) -> dict[str, tuple[Probe, ...]]:
    return {
        kind: tuple(Probe(item.text("prompt"), item.answers("ground_truth")) for item in items)
        for kind, items in record.kinds(key).items()
    }


def read(record: Fields) -> list[Edit]:
    """``ground_truth`` is the old truth (the first of several is kept); ``cond`` repeats the record and is not read."""
    old = record.answers("ground_truth")
    return [
        Edit(
            prompt=record.text("prompt"),
            target=record.answer("target_new"),
            subject=record.optional_text("subject"),
            old_target=old[0] if old else None,
            rephrases=record.texts("rephrase_prompt", "rephrase"),
            locality=probes(record, "locality"),
            portability=probes(record, "portability"),
            id=record.identity("case_id", "id"),
        )
    ]


KNOWEDIT = Format(
    name="knowedit",
    recognise=lambda record: "target_new" in record and bool(set(record) & {"locality", "portability"}),
    read=read,
    reads=words("case_id id subject prompt target_new ground_truth rephrase_prompt rephrase locality portability"),
    ignores=words("cond"),
    structured=words("ground_truth locality portability"),
)
