"""Reader for KnowEdit. Its locality and portability questions are grouped by kind and have lists of right answers."""

from __future__ import annotations

from kedit_train.data.readers.fields import Fields
from kedit_train.data.readers.format import Format, field_names
from kedit_train.edit import Edit, Probe


def probes(record: Fields, key: str) -> dict[str, tuple[Probe, ...]]:
    """Read the probes in the field ``key`` of a record, and return a dict from kind to probes."""
    return {
        kind: tuple(Probe(item.text("prompt"), item.answers("ground_truth")) for item in items)
        for kind, items in record.kinds(key).items()
    }


def read(record: Fields) -> list[Edit]:
    """Read a record of KnowEdit.

    Locality and portability questions keep the names of their kinds. Kinds without questions are left out. The right
    answers to a question are a text, a list of texts, or a list of lists. In a list of lists, each inner list contains
    the aliases of one answer. Every one of these texts is accepted as a right answer. Some published locality
    questions have no answer (``[[]]``). They become probes without answers.

    The top-level field ``ground_truth`` contains the old answers. Its first text becomes the old answer of the edit.
    ``cond`` repeats the contents of other fields and is not read.

    References:
        "A Comprehensive Study of Knowledge Editing for Large Language Models", arXiv 2401.01286.
    """
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
            id=record.identifier("case_id", "id"),
        )
    ]


KNOWEDIT = Format(
    name="knowedit",
    recognize=lambda record: "target_new" in record and bool(set(record) & {"locality", "portability"}),
    read=read,
    reads=field_names(
        "case_id id subject prompt target_new ground_truth rephrase_prompt rephrase locality portability"
    ),
    ignores=field_names("cond"),
    structured=field_names("ground_truth locality portability"),
)
