"""Readers for benchmarks whose targets are long texts (UnKEBench, AKEW) or that ask for essays (LEME)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from kedit_train.data.readers.fields import Fields
from kedit_train.data.readers.format import Format, field_names
from kedit_train.data.readers.questions import read_zsre
from kedit_train.data.readers.rewrites import filled_prompt, old_target, read_counterfact
from kedit_train.edit import Edit, Probe

# The fields with which LEME extends records of CounterFact and ZsRE. They differ between its files.
_ENTITIES = ("dependancies", "coupled_prompts_and_properties")
# The names of the essay prompts in the files and in the scripts of LEME.
_ESSAY = ("dependant_prompt", "coupled_prompt")


def read_unkebench(record: Fields) -> list[Edit]:
    """Read a record of UnKEBench: ``answer`` is a text of several sentences.

    ``para_question`` becomes the rephrase. Each ``sub_question`` becomes a portability question of the kind
    ``sub_questions``, with the ``sub_answer`` at the same position.

    References:
        "Everything is Editable: Extend Knowledge Editing to Unstructured Data in Large Language Models",
        arXiv 2405.15349.
    """
    questions, answers = record.texts("sub_question"), record.texts("sub_answer")
    if len(questions) != len(answers):
        expected = f"a list as long as the list sub_question (length {len(questions)})"
        raise record.error("sub_answer", expected, f"a list of length {len(answers)}")
    parts = tuple(Probe(q, (a.strip(),)) for q, a in zip(questions, answers, strict=True))
    return [
        Edit(
            prompt=record.text("question"),
            target=record.answer("answer"),
            rephrases=record.texts("para_question"),
            portability={"sub_questions": parts} if parts else {},
            id=record.identifier("id"),
        )
    ]


def read_akew(record: Fields) -> list[Edit]:
    """Read a record of AKEW for the benchmark's setting "unstructured": the target is the text ``fact_new_uns``.

    AKEW has three files: CounterFact, WikiUpdate and MQuAKE-CF. A record of MQuAKE-CF contains one to three facts. A
    record of the other files contains one fact. Each fact becomes an edit. The prompt of the edit is ``question`` or
    ``prompt_full``, or ``prompt`` if both are missing.

    Three kinds of portability questions ask about single facts in the text:

    - ``structured_fact``: the question is ``prompt``, and the answer is ``target_new``. This question is left out if
      ``prompt`` is already the prompt of the edit.
    - ``paraphrases``: the questions are ``paraphrase_prompts``, and the answer is ``target_new``.
    - ``extracted_triplets``: the questions and answers are in ``unsfact_triplets_GPT``.

    Multi-hop questions are read as in MQuAKE, and neighborhood prompts are read as in CounterFact.

    References:
        "AKEW: Assessing Knowledge Editing in the Wild", arXiv 2402.18909.
    """
    several = isinstance(record.values.get("requested_rewrite"), (list, tuple))
    rewrites = record.children("requested_rewrite") if several else [record.child("requested_rewrite")]
    case = record.identifier("case_id")
    edits = [_akew_edit(record, rewrite) for rewrite in rewrites]
    edits = [replace(e, id=f"{case}-{i}" if case and len(edits) > 1 else case) for i, e in enumerate(edits, start=1)]
    if several and record.has("questions") and record.has("new_answer"):
        answers = tuple(dict.fromkeys((record.answer("new_answer"), *record.answers("new_answer_alias"))))
        hops = tuple(Probe(question, answers) for question in record.texts("questions"))
        kinds = {**edits[-1].portability, f"multi_hop_edits_{len(edits)}": hops}
        edits[-1] = replace(edits[-1], portability=kinds)
    return edits


def _akew_edit(record: Fields, rewrite: Fields) -> Edit:
    fact, new, truth = filled_prompt(rewrite), rewrite.child("target_new").answer("str"), old_target(rewrite)
    prompt = rewrite.text("question", "prompt_full") if rewrite.has("question", "prompt_full") else fact
    neighbours = tuple(Probe(text, (truth,) if truth else ()) for text in record.texts("neighborhood_prompts"))
    triplets = rewrite.children("unsfact_triplets_GPT")
    kinds = {
        "structured_fact": (Probe(fact, (new,)),) if fact != prompt else (),
        "paraphrases": tuple(Probe(text, (new,)) for text in record.texts("paraphrase_prompts")),
        "extracted_triplets": tuple(Probe(_triplet_prompt(t), (t.answer("target"),)) for t in triplets),
    }
    return Edit(
        prompt=prompt,
        target=rewrite.answer("fact_new_uns"),
        subject=rewrite.text("subject"),
        locality={"neighborhood": neighbours} if neighbours else {},
        portability={kind: probes for kind, probes in kinds.items() if probes},
    )


def _triplet_prompt(triplet: Fields) -> str:
    """Replace ``{}`` in the prompt by the subject. A few prompts have no ``{}`` and stay unchanged."""
    prompt = triplet.text("prompt")
    return prompt.replace("{}", triplet.text("subject")) if "{}" in prompt else prompt


def read_leme(record: Fields) -> list[Edit]:
    """Read a record of LEME: a record of CounterFact or ZsRE, with additional prompts that ask for essays.

    One prompt asks for an essay about the subject. It becomes a portability question of the kind ``essay_subject``. Its
    answer is the new target, because the essay should state the new fact. Evaluate this question with the protocol
    "contains", and let the model generate several hundred tokens.

    Other prompts ask for essays about entities that are related to the subject (``coupled_entities``). They become
    portability questions of the kind ``essay_coupled_entity``. These questions have no answer, because the benchmark
    rates the essays with a survey. The properties that a record lists for its entities are not read.

    References:
        "Long-form evaluation of model editing", arXiv 2402.09394.
    """
    [edit] = read_zsre(record) if record.has("src") else read_counterfact(record)
    entities = record.child(next((key for key in _ENTITIES if record.has(key)), _ENTITIES[0]))
    subject = entities.child("subject_entity")
    coupled = [entity for entity in entities.children("coupled_entities") if entity.has(*_ESSAY)]
    kinds = {
        "essay_subject": (Probe(subject.text(*_ESSAY), edit.answers),) if subject.has(*_ESSAY) else (),
        "essay_coupled_entity": tuple(Probe(entity.text(*_ESSAY)) for entity in coupled),
    }
    return [replace(edit, portability={kind: probes for kind, probes in kinds.items() if probes})]


def has_unstructured_fact(record: Mapping[str, Any]) -> bool:
    """Return whether ``requested_rewrite`` contains the text ``fact_new_uns``, which only AKEW has."""
    rewrites = record.get("requested_rewrite")
    rewrites = rewrites if isinstance(rewrites, (list, tuple)) else [rewrites]
    return any(isinstance(rewrite, Mapping) and "fact_new_uns" in rewrite for rewrite in rewrites)


UNKEBENCH = Format(
    name="unkebench",
    recognize=lambda record: bool(set(record) & {"para_question", "sub_question", "sub_answer"}),
    read=read_unkebench,
    reads=field_names("id question para_question answer sub_question sub_answer"),
    structured=field_names("sub_question sub_answer"),
)
AKEW = Format(
    name="akew",
    recognize=has_unstructured_fact,
    read=read_akew,
    reads=field_names(
        "case_id requested_rewrite paraphrase_prompts neighborhood_prompts questions new_answer new_answer_alias"
    ),
    ignores=field_names(
        "attribute_prompts generation_prompts pararel_idx answer answer_alias single_hops new_single_hops orig"
    ),
    structured=field_names("requested_rewrite paraphrase_prompts neighborhood_prompts questions new_answer_alias"),
    extends=field_names("counterfact_nested mquake"),
)
LEME = Format(
    name="leme",
    recognize=lambda record: bool(set(record) & set(_ENTITIES)),
    read=read_leme,
    reads=field_names(
        "case_id requested_rewrite paraphrase_prompts neighborhood_prompts subject src rephrase alt answers loc loc_ans"
    )
    | set(_ENTITIES),
    ignores=field_names("attribute_prompts generation_prompts pararel_idx pred cond"),
    structured=field_names("requested_rewrite paraphrase_prompts neighborhood_prompts answers") | set(_ENTITIES),
    extends=field_names("counterfact_nested zsre"),
)
