"""The retrieval baseline: write the new fact in front of each prompt, and leave the weights unchanged.

The baseline shows the scores of the unedited model with a perfect retriever. The new fact of an edit is written in
front of every prompt that tests the edit, even if the prompt asks about another fact. If an edited model does not reach
higher scores than this baseline, the edit is not worth its cost ("Can We Edit Factual Knowledge by In-Context
Learning?", arXiv 2305.12740).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace

from kedit_train.data import Edit
from kedit_train.data.fact_in_context import prompt_with_fact
from kedit_train.evaluation.asking.probes import ProbeRequest
from kedit_train.evaluation.scoring.comparison import compare_answers
from kedit_train.evaluation.scoring.probe_results import Judge, ProbeResult
from kedit_train.evaluation.scoring.protocols import Protocols

# The kinds of probe that the main metrics count.
_QUESTIONS = ("reliability", "generality", "portability", "locality")


def retrieval_requests(edits: Mapping[str, Edit], results: Sequence[ProbeResult]) -> list[tuple[int, ProbeRequest]]:
    """Return the probes of the retrieval baseline.

    Args:
        edits: dict from ``ProbeResult.edit`` (the id of an edit) to the edit.
        results: the results of the unedited model.

    Returns:
        A list of pairs (index, probe). The probe asks the same as ``results[index]``, with the new fact in front of the
        prompt. Its ``question`` is "retrieval", and its ``kind`` is the ``question`` of ``results[index]``. The list
        contains only probes for reliability, generality (only rephrasings), portability and locality.
    """
    names = [field.name for field in fields(ProbeRequest)]
    requests = []
    for index, result in enumerate(results):
        if result.question in _QUESTIONS and (result.question != "generality" or result.kind == "rephrase"):
            own = {name: getattr(result, name) for name in names}
            own |= {"question": "retrieval", "kind": result.question}
            own["prompt"] = prompt_with_fact(edits[result.edit], result.prompt)
            requests.append((index, ProbeRequest(**own)))
    return requests


def compare_with_own_answers(
    base: Sequence[ProbeResult], with_fact: Sequence[ProbeResult], protocols: Protocols, judge: Judge
) -> list[ProbeResult]:
    """Add scores that say how the fact in front of a prompt changes the answer of the unedited model.

    Args:
        base: the unedited model's results for the prompts without the fact.
        with_fact: the unedited model's results for the same prompts with the fact, in the same order.
        protocols: the protocols of the evaluation.
        judge: function that decides under the protocol "exact" whether an answer is right.

    Returns:
        Copies of ``with_fact`` that also contain the answers without the fact and the added scores.
    """
    return [
        replace(compare_answers(before, after, protocols, judge), right_before=None)
        for before, after in zip(base, with_fact, strict=True)
    ]
