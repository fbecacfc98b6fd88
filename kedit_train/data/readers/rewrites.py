"""The two benchmarks that nest their edits in ``requested_rewrite``: CounterFact as first published, and MQuAKE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kedit_train.data.readers.fields import Fields
from kedit_train.data.readers.format import Format, words
from kedit_train.edit import Edit, Probe


def filled_prompt(rewrite: Fields) -> str:
    """The prompt with the subject in place of ``{}``."""
    prompt, subject = rewrite.text("prompt"), rewrite.text("subject")
    if "{}" not in prompt:
        raise rewrite.error("prompt", "has no {} for the subject", 'text such as "The mother tongue of {} is"')
    return prompt.replace("{}", subject)


def old_target(rewrite: Fields) -> str | None:
    return rewrite.child("target_true").answer("str") if rewrite.has("target_true") else None


def read_counterfact(record: Fields) -> list[Edit]:
    """ "Locating and Editing Factual Associations in GPT" (arXiv 2202.05262).

    Paraphrases are rephrases. Neighbours (other subjects with the same true object) are locality of kind
    ``neighborhood``, with ``target_true`` as the right answer. Two lists are not read, as neither holds a question
    that this edit could answer rightly or wrongly: ``attribute_prompts`` are about other subjects whose true object
    already is the new target, so that an edit which leaks everywhere scores on them; ``generation_prompts`` are open
    beginnings without an answer.
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
            id=record.identity("case_id"),
        )
    ]


def read_mquake(record: Fields) -> list[Edit]:
    """ "MQuAKE: Assessing Knowledge Editing in Language Models via Multi-Hop Questions" (arXiv 2305.14795).

    One record gives 1 to 4 edits, with ids ``"case-1"``, ``"case-2"``, ... where there are several. The multi-hop
    questions hold only once all edits of the record are made, so they are attached to its *last* edit alone: asked
    once, and true by then in sequential editing. Their kind says how many edits they need: ``multi_hop_edits_1``
    to ``multi_hop_edits_4``; with more than 1 they mean nothing when edits are made one at a time on the unedited
    model. Each rewrite's own ``question`` is its rephrase. The old multi-hop answer and the lists of single hops
    (the chain in pieces) are not read.
    """
    rewrites = record.children("requested_rewrite", required=True)
    case = record.identity("case_id")
    right = (record.answer("new_answer"), *record.answers("new_answer_alias")) if record.has("questions") else ()
    hops = tuple(Probe(text, tuple(dict.fromkeys(right))) for text in record.texts("questions"))
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
    asks = bool(set(record) & {"questions", "new_answer"})
    return asks or ("requested_rewrite" in record and isinstance(record["requested_rewrite"], list))


COUNTERFACT_NESTED = Format(
    name="counterfact_nested",
    recognise=lambda record: "requested_rewrite" in record and not is_mquake(record),
    read=read_counterfact,
    reads=words("case_id requested_rewrite paraphrase_prompts neighborhood_prompts"),
    ignores=words("attribute_prompts generation_prompts pararel_idx"),
    structured=words("requested_rewrite paraphrase_prompts neighborhood_prompts"),
)
MQUAKE = Format(
    name="mquake",
    recognise=is_mquake,
    read=read_mquake,
    reads=words("case_id requested_rewrite questions new_answer new_answer_alias"),
    ignores=words("answer answer_alias answer_extended new_answer_extended single_hops new_single_hops orig"),
    structured=words("requested_rewrite questions new_answer_alias"),
)
