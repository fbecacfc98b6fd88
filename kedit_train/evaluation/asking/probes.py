"""Probes: the prompts on which an evaluation runs the model for each edit."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from kedit_train.data import Edit
from kedit_train.data.prompts import PromptFormat, switch_format
from kedit_train.data.tokenization import separator

# Neutral sentences that are put in front of a prompt. They should not change the answer to a learned edit.
PREFIXES = (
    "It had been raining since the early morning.",
    "Thank you for your letter of last week.",
    "The second chapter begins with a short overview.",
    "We went for a walk after lunch.",
    "Most of the shops are closed on Sundays.",
    "Here is another thing that came up yesterday.",
    "The train was a few minutes late again.",
    "My neighbour has repainted the fence.",
)
PREFIXES_PER_EDIT = 2


@dataclass(frozen=True, kw_only=True)
class ProbeRequest:
    """One evaluation prompt for the model, and the answers that count as right.

    Args:
        edit: the id of the edit that the prompt tests, or its number in the data if it has no id.
        question: what the prompt measures: "reliability", "generality", "portability", "locality", "resurgence",
            "fluency", "overlap" or "retrieval".
        kind: the kind of prompt within ``question``: "prompt", "rephrase", "prefix", "format", "negation", "choice",
            "continuation", or a kind that the data names. A "retrieval" prompt is the prompt of another probe, with the
            new fact of the edit written in front of it. Its ``kind`` is the ``question`` of the other probe.
        prompt: the prompt, before a chat template is applied.
        accepted: every answer that counts as right, starting with the preferred answer; may be empty.
        old_target: the right answer before the edit. None if this answer is unknown.
        new_target: the new answer of the edit if ``question`` is "locality", otherwise None. After a locality prompt,
            this answer must not become more probable than the right answer.
    """

    edit: str
    question: str
    kind: str
    prompt: str
    accepted: tuple[str, ...] = ()
    old_target: str | None = None
    new_target: str | None = None


def probe_requests(
    edit: Edit,
    name: str,
    *,
    metrics: Collection[str] = (),
    prefixes: Sequence[str] = PREFIXES,
    seed: int = 0,
    prompt_format: PromptFormat = "plain",
) -> Iterator[ProbeRequest]:
    """Yield the evaluation prompts (probes) of ``edit``, starting with the edit's own prompt.

    Args:
        edit: the edit.
        name: the name of the edit in the results.
        metrics: the extra metrics of :class:`~kedit_train.evaluation.EvaluationOptions`. Some of them add probes:

            - "prefixes" adds two probes. Each puts a random sentence from ``prefixes`` in front of the edit's prompt.
            - "format" adds one probe with the edit's prompt in another form: an incomplete sentence becomes a question,
              and a question becomes an incomplete sentence.
            - "resurgence" adds three probes if the old answer is known. One denies the old answer ("Built on Sand",
              arXiv 2510.00625). Two offer the old and the new answer as a choice, once in each order.
            - "fluency" adds one probe, which measures a long continuation of the edit's prompt.
            - "overlap" adds one probe for the edit's prompt and one for each rephrase. The model's answers to these
              probes may be as long as the target.
        prefixes: the sentences for the metric "prefixes".
        seed: seed of the random choice of prefixes. The choice also depends on ``name``.
        prompt_format: the format of the prompts. "question" already turns all prompts into questions. The metric
            "format" then always adds an incomplete sentence.
    """

    def new(question: str, kind: str, prompt: str) -> ProbeRequest:
        return ProbeRequest(
            edit=name,
            question=question,
            kind=kind,
            prompt=prompt,
            accepted=edit.answers,
            old_target=edit.old_target,
        )

    yield new("reliability", "prompt", edit.prompt)
    for rephrase in edit.rephrases:
        yield new("generality", "rephrase", rephrase)
    if "prefixes" in metrics:
        count = min(PREFIXES_PER_EDIT, len(prefixes))
        for prefix in random.Random(f"{seed} {name}").sample(list(prefixes), count):
            yield new("generality", "prefix", f"{prefix} {edit.prompt}")
    if "format" in metrics:
        yield new("generality", "format", switch_format(edit.prompt, prompt_format))
    for question, by_kind in (("portability", edit.portability), ("locality", edit.locality)):
        for kind, probes in by_kind.items():
            for probe in probes:
                yield ProbeRequest(
                    edit=name,
                    question=question,
                    kind=kind,
                    prompt=probe.prompt,
                    accepted=probe.answers,
                    new_target=edit.target if question == "locality" else None,
                )
    if "resurgence" in metrics and edit.old_target is not None:
        yield new("resurgence", "negation", negation_prompt(edit.prompt, edit.old_target))
        for letter, other, options in (
            ("A", "B", (edit.target, edit.old_target)),
            ("B", "A", (edit.old_target, edit.target)),
        ):
            yield ProbeRequest(
                edit=name,
                question="resurgence",
                kind="choice",
                prompt=choice_prompt(edit.prompt, options),
                accepted=(letter,),
                old_target=other,
            )
    if "fluency" in metrics:
        yield ProbeRequest(edit=name, question="fluency", kind="continuation", prompt=edit.prompt)
    if "overlap" in metrics:
        yield new("overlap", "prompt", edit.prompt)
        yield from (new("overlap", "rephrase", rephrase) for rephrase in edit.rephrases)


def negation_prompt(prompt: str, old_answer: str) -> str:
    """Put a sentence that denies the old answer in front of the prompt."""
    return f'It is false that "{prompt}{separator(prompt, old_answer)}{old_answer}". {prompt}'


def choice_prompt(prompt: str, options: Sequence[str]) -> str:
    """Return a multiple-choice prompt: the two answers are listed as A and B, and the model answers with one letter."""
    lines = [f"{letter}. {prompt}{separator(prompt, o)}{o}" for letter, o in zip("AB", options, strict=True)]
    return "\n".join(["Which one is right?", *lines, "Answer:"])
