"""Compare the edited model's answers with the unedited model's answers, and compute the score of each probe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from kedit_train.data.tokenization import shorten
from kedit_train.errors import EditError
from kedit_train.evaluation.scoring.probe_results import OPEN, Judge, ProbeResult
from kedit_train.evaluation.scoring.protocols import (
    Protocols,
    agreement,
    is_right,
    is_unchanged,
    share_kept,
)


def compare_with_unedited(
    results: Sequence[ProbeResult], unedited: Sequence[ProbeResult], protocols: Protocols, judge: Judge
) -> list[ProbeResult]:
    """Add the unedited model's answers to the results.

    Args:
        results: the results of the edited model.
        unedited: the results of the unedited model on the same prompts.
        protocols: the protocols of both evaluations.
        judge: function that decides under the protocol "exact" whether an answer is right.

    Raises:
        EditError: the unedited model has no answer to one of the prompts.
    """
    answers = {(_open_question(result), result.prompt): result for result in unedited}
    answers |= {(r.question, r.prompt, r.accepted): r for r in unedited}  # type: ignore[misc]
    compared = []
    for result in results:
        own: Mapping[Any, ProbeResult] = answers
        before = own.get((result.question, result.prompt, result.accepted))
        before = before or own.get((_open_question(result), result.prompt))
        if before is None and not _is_extra(result):
            raise EditError(
                f"the report passed as unedited= has no answer to the prompt {shorten(result.prompt)!r}; evaluate the "
                "unedited model on the same edits, with the same limit and seed."
            )
        compared.append(result if before is None else compare_answers(before, result, protocols, judge))
    return compared


def _open_question(result: ProbeResult) -> str:
    # For "fluency" and "overlap", the model generates separate, longer answers. For all other questions, all probes
    # with the same prompt share one answer.
    return result.question if result.question in OPEN else ""


def compare_answers(before: ProbeResult, after: ProbeResult, protocols: Protocols, judge: Judge) -> ProbeResult:
    """Return a copy of ``after`` with the unedited model's answer and the scores that compare both models' answers.

    The field ``before`` contains the unedited model's answer, and ``right_before`` says whether this answer is right.
    The scores are ``tokens_kept``, ``choices_kept``, ``unchanged`` and ``same_answer``.
    """
    right_before = is_right(protocols.headline, replace(before, accepted=after.accepted), judge)
    compared = replace(
        after,
        before=before.answer,
        right_before=right_before,
        tokens_kept=share_kept(before.first_tokens, after.first_tokens),
        choices_kept=agreement(before.choices, after.choices),
    )
    return replace(
        compared,
        unchanged=is_unchanged(protocols.headline, compared),
        same_answer=is_unchanged("exact", compared) if protocols.whole_answers else None,
    )


def success(protocol: str, result: ProbeResult, *, headline: bool, against_unedited: bool) -> float | None:
    """Return the score of one probe under a protocol, between 0 and 1. None if the probe cannot be scored.

    Args:
        protocol: the name of the protocol.
        result: the result of the probe.
        headline: True if ``protocol`` is the report's first protocol. ``result`` then already says whether the answer
            is right or unchanged.
        against_unedited: True to compare the answers to locality probes with the unedited model's answers. The protocol
            "probability" ignores this argument and always uses the true answers, as in CounterFact.
    """
    is_locality = "locality" in (result.question, result.kind)
    if is_locality and against_unedited and protocol != "probability":
        if protocol == "teacher_forced":
            return result.choices_kept
        return result.unchanged if headline else None if result.before is None else is_unchanged(protocol, result)
    if protocol == "teacher_forced":
        return result.token_accuracy
    return result.right if headline else is_right(protocol, result)


def _is_extra(request: ProbeResult) -> bool:
    """Return True for a probe of an extra metric, which the unedited model's report may lack."""
    if request.question == "generality":
        return request.kind != "rephrase"
    return request.question in ("resurgence", "retrieval", *OPEN)
