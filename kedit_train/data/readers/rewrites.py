"""Readers for benchmarks with edits under ``requested_rewrite``: CounterFact as first published, and MQuAKE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kedit_train.data.readers.fields import Fields
from kedit_train.data.readers.format import Format, field_names
from kedit_train.data.tokenization import shorten
from kedit_train.edit import Edit, Probe


def filled_prompt(rewrite: Fields) -> str:
    """Return the prompt, with ``{}`` replaced by the subject."""
    prompt, subject = rewrite.text("prompt"), rewrite.text("subject")
    if "{}" not in prompt:
        expected = 'text with {} in the place of the subject, such as "The mother tongue of {} is"'
        raise rewrite.error("prompt", expected, f'"{shorten(prompt)}"')
    return prompt.replace("{}", subject)


def old_target(rewrite: Fields) -> str | None:
    """Return the old answer, or None if it is not known."""
    return rewrite.child("target_true").answer("str") if rewrite.has("target_true") else None


def read_counterfact(record: Fields) -> list[Edit]:
    """Read a record of CounterFact.

    ``paraphrase_prompts`` become rephrases. ``neighborhood_prompts`` become locality questions of the kind
    ``neighborhood``. They ask about other subjects, and their right answer is also ``target_true``.

    Two fields are not read:

    - ``attribute_prompts`` ask about other subjects. The right answer is the new target even without the edit, so the
      answers do not show whether the edit succeeded.
    - ``generation_prompts`` are beginnings of free text and have no expected answer.

    References:
        "Locating and Editing Factual Associations in GPT", arXiv 2202.05262.
    """
    rewrite = record.child("requested_rewrite")
    truth = old_target(rewrite)
    neighbours = tuple(Probe(text, (truth,) if truth else ()) for text in record.texts("neighborhood_prompts"))
    return [
        Edit(
            prompt=filled_prompt(rewrite),
            target=rewrite.child("target_new").answer("str"),
            subject=rewrite.text("subject"),
            old_target=truth,
            rephrases=record.texts("paraphrase_prompts"),
            locality={"neighborhood": neighbours} if neighbours else {},
            id=record.identifier("case_id"),
        )
    ]


def read_mquake(record: Fields) -> list[Edit]:
    """Read a record of MQuAKE, which contains 1 to 4 edits.

    Each item of ``requested_rewrite`` becomes an edit, and the ``question`` of the item becomes the rephrase. If a
    record contains several edits, their ids are ``"17-1"``, ``"17-2"`` and so on, where ``17`` is the ``case_id``.

    The new answers to the multi-hop questions are right only after all edits of the record have been made. So these
    questions become portability probes of the last edit. Their kind is ``multi_hop_edits_1`` to ``multi_hop_edits_4``.
    The last digit is the number of edits in the record. If you make each edit alone on the unedited model, ignore the
    multi-hop scores of records with several edits.

    The old multi-hop answer and the lists of single hops are not read.

    References:
        "MQuAKE: Assessing Knowledge Editing in Language Models via Multi-Hop Questions", arXiv 2305.14795.
    """
    rewrites = record.children("requested_rewrite", required=True)
    case = record.identifier("case_id")
    answers = (record.answer("new_answer"), *record.answers("new_answer_alias")) if record.has("questions") else ()
    hops = tuple(Probe(text, tuple(dict.fromkeys(answers))) for text in record.texts("questions"))
    edits = []
    for i, rewrite in enumerate(rewrites, start=1):
        last = i == len(rewrites)
        edits.append(
            Edit(
                prompt=filled_prompt(rewrite),
                target=rewrite.child("target_new").answer("str"),
                subject=rewrite.text("subject"),
                old_target=old_target(rewrite),
                rephrases=rewrite.texts("question"),
                portability={f"multi_hop_edits_{len(rewrites)}": hops} if last and hops else {},
                id=case if len(rewrites) == 1 or not case else f"{case}-{i}",
            )
        )
    return edits


def is_mquake(record: Mapping[str, Any]) -> bool:
    """Return whether the keys are those of MQuAKE. CounterFact also has ``requested_rewrite``, but not as a list."""
    has_questions = bool(set(record) & {"questions", "new_answer"})
    return has_questions or ("requested_rewrite" in record and isinstance(record["requested_rewrite"], list))


COUNTERFACT_NESTED = Format(
    name="counterfact_nested",
    recognize=lambda record: "requested_rewrite" in record and not is_mquake(record),
    read=read_counterfact,
    reads=field_names("case_id requested_rewrite paraphrase_prompts neighborhood_prompts"),
    ignores=field_names("attribute_prompts generation_prompts pararel_idx"),
    structured=field_names("requested_rewrite paraphrase_prompts neighborhood_prompts"),
)
MQUAKE = Format(
    name="mquake",
    recognize=is_mquake,
    read=read_mquake,
    reads=field_names("case_id requested_rewrite questions new_answer new_answer_alias"),
    ignores=field_names("answer answer_alias answer_extended new_answer_extended single_hops new_single_hops orig"),
    structured=field_names("requested_rewrite questions new_answer_alias"),
)
