"""The retrieval baseline: write the new fact in front of each prompt, and leave the weights unchanged.

The new fact of an edit is written in front of all prompts of this edit, including the prompts about other facts, as if
a perfect retriever had found the fact. If the edited model does not have higher scores than this baseline, the
edit is not worth its cost ("Can We Edit Factual Knowledge by In-Context Learning?", arXiv 2305.12740).
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
        A list of pairs (index, probe). The probe is a copy of the probe of ``results[index]``, with the new fact in
        front of the prompt. The ``question`` of the copy is "retrieval". The ``kind`` of the copy is the ``question``
        of the original. Only results for reliability, generality (rephrasings), portability and locality get a pair.
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
    """Compare the answer to each prompt with the fact in front to the answer to the same prompt without the fact.

    Args:
        base: the unedited model's results for the prompts without the fact.
        with_fact: the unedited model's results for the same prompts with the fact, in the same order.
        protocols: the protocols of the evaluation.
        judge: function that decides under the protocol "exact" whether an answer is right.

    Returns:
        Copies of ``with_fact`` to which the answers without the fact and the scores of the comparison are added.
    """
    return [
        replace(compare_answers(before, after, protocols, judge), right_before=None)
        for before, after in zip(base, with_fact, strict=True)
    ]
