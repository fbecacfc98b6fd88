"""CounterFact, one level deep (one rephrase, one neighbour), as the later editing repositories publish it.

Data: "Locating and Editing Factual Associations in GPT" (arXiv 2202.05262). The variant with a list of
``rephrase_prompts`` reads the same way. ``ground_truth`` is the old truth; the neighbour's right answer is
``locality_ground_truth``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kedit_train.data.readers.fields import Fields
from kedit_train.data.readers.format import Format, words
from kedit_train.data.readers.questions import WIKIBIGEDIT, one_probe
from kedit_train.edit import Edit, Probe


def recognise(record: Mapping[str, Any]) -> bool:
    keys = set(record)
    nested = keys & {"locality", "portability", "requested_rewrite"}
    return bool(keys & {"target_new", "locality_prompt"}) and not nested and not WIKIBIGEDIT.recognise(record)


def read(record: Fields) -> list[Edit]:
    old = record.answers("ground_truth")
    neighbour: dict[str, tuple[Probe, ...]] = one_probe(
        record, "neighborhood", ("locality_prompt",), ("locality_ground_truth",)
    )
    return [
        Edit(
            prompt=record.text("prompt"),
            target=record.answer("target_new"),
            subject=record.optional_text("subject"),
            old_target=old[0] if old else None,
            rephrases=record.texts("rephrase_prompt") + record.texts("rephrase_prompts"),
            locality=neighbour,
            id=record.identity("case_id", "id"),
        )
    ]


COUNTERFACT = Format(
    name="counterfact",
    recognise=recognise,
    read=read,
    reads=words(
        "case_id id prompt target_new subject ground_truth rephrase_prompt rephrase_prompts locality_prompt "
        "locality_ground_truth"
    ),
    ignores=words("relation relation_id"),
    structured=words("rephrase_prompts"),
)
