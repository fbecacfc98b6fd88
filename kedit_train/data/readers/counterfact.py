"""Reader for flat CounterFact: records without inner mappings, as model-editing repositories publish them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kedit_train.data.readers.fields import Fields
from kedit_train.data.readers.format import Format, field_names
from kedit_train.data.readers.questions import WIKIBIGEDIT, one_probe
from kedit_train.edit import Edit


def recognize(record: Mapping[str, Any]) -> bool:
    """Return whether the keys are those of flat CounterFact, and not of nested CounterFact or a similar format."""
    keys = set(record)
    nested = keys & {"locality", "portability", "requested_rewrite"}
    return bool(keys & {"target_new", "locality_prompt"}) and not nested and not WIKIBIGEDIT.recognize(record)


def read(record: Fields) -> list[Edit]:
    """Read a record of flat CounterFact.

    ``ground_truth`` is the old answer. ``rephrase_prompt`` (a text) and ``rephrase_prompts`` (a list) become rephrases.
    ``locality_prompt`` asks about another subject, and ``locality_ground_truth`` is its right answer. They become a
    locality question of the kind ``neighborhood``. ``relation`` and ``relation_id`` only name the relation and are not
    read.

    References:
        "Locating and Editing Factual Associations in GPT", arXiv 2202.05262.
    """
    old = record.answers("ground_truth")
    return [
        Edit(
            prompt=record.text("prompt"),
            target=record.answer("target_new"),
            subject=record.optional_text("subject"),
            old_target=old[0] if old else None,
            rephrases=record.texts("rephrase_prompt") + record.texts("rephrase_prompts"),
            locality=one_probe(record, "neighborhood", ("locality_prompt",), ("locality_ground_truth",)),
            id=record.identifier("case_id", "id"),
        )
    ]


COUNTERFACT = Format(
    name="counterfact",
    recognize=recognize,
    read=read,
    reads=field_names(
        "case_id id prompt target_new subject ground_truth rephrase_prompt rephrase_prompts locality_prompt "
        "locality_ground_truth"
    ),
    ignores=field_names("relation relation_id"),
    structured=field_names("rephrase_prompts"),
)
