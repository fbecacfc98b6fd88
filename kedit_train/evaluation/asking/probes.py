"""Everything that an edit is asked."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from kedit_train.data import Edit
from kedit_train.data.prompts import PromptFormat, switch_format
from kedit_train.data.tokenization import separator

# Sentences about nothing, put before a prompt: an edit that took does not depend on how a text begins.
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
PREFIXES_EACH = 2

# Asked on request, beside what the data itself brings.
EXTRAS = ("prefixes", "format", "kl", "resurgence", "fluency")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One question for the model.

    Args:
        edit: the id of the edit that it belongs to (its number in the data where it has none).
        question: ``reliability``, ``generality``, ``portability``, ``locality``, ``resurgence`` or ``fluency``.
        kind: the probe's kind (``prompt``, ``rephrase``, ``prefix``, ``format``, ``negation``, ``choice``, or the
            data's own).
        prompt: what the model reads, before any template.
        accepted: every answer that counts as right, the preferred one first; may be empty.
        old_target: what was right before the edit, where that is known.
    """

    edit: str
    question: str
    kind: str
    prompt: str
    accepted: tuple[str, ...] = ()
    old_target: str | None = None


def probes_of(
    edit: Edit,
    name: str,
    *,
    extras: Collection[str] = (),
    prefixes: Sequence[str] = PREFIXES,
    seed: int = 0,
    prompt_format: PromptFormat = "plain",
) -> Iterator[Asked]:
    """The questions to ``edit``, its own prompt first.

    Args:
        name: what the edit is called in results.
        extras: of :data:`EXTRAS`. ``prefixes`` asks after two of ``prefixes``, drawn by ``seed`` and ``name``;
            ``format`` asks a completion as a question and a question as a completion; ``resurgence`` asks again where
            the old answer has been denied ("Built on Sand", arXiv 2510.00625), and lets choose between the two, in both
            orders; ``fluency`` lets the model go on after the prompt.
    """

    def new(question: str, kind: str, prompt: str) -> Asked:
        return Asked(
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
    if "prefixes" in extras:
        for prefix in random.Random(f"{seed} {name}").sample(list(prefixes), min(PREFIXES_EACH, len(prefixes))):
            yield new("generality", "prefix", f"{prefix} {edit.prompt}")
    if "format" in extras:
        yield new("generality", "format", switch_format(edit.prompt, prompt_format))
    for question, by_kind in (("portability", edit.portability), ("locality", edit.locality)):
        for kind, probes in by_kind.items():
            for probe in probes:
                yield Asked(edit=name, question=question, kind=kind, prompt=probe.prompt, accepted=probe.answers)
    if "resurgence" in extras and edit.old_target is not None:
        yield new("resurgence", "negation", denied(edit.prompt, edit.old_target))
        for letter, other, options in (
            ("A", "B", (edit.target, edit.old_target)),
            ("B", "A", (edit.old_target, edit.target)),
        ):
            yield Asked(
                edit=name,
                question="resurgence",
                kind="choice",
                prompt=choice(edit.prompt, options),
                accepted=(letter,),
                old_target=other,
            )
    if "fluency" in extras:
        yield Asked(edit=name, question="fluency", kind="continuation", prompt=edit.prompt)


def denied(prompt: str, old: str) -> str:
    """The prompt after a sentence that denies the old answer."""
    return f'It is false that "{prompt}{separator(prompt, old)}{old}". {prompt}'


def choice(prompt: str, options: Sequence[str]) -> str:
    """The prompt as a choice between two answers, to be answered with a letter."""
    lines = [f"{letter}. {prompt}{separator(prompt, o)}{o}" for letter, o in zip("AB", options, strict=True)]
    return "\n".join(["Which one is right?", *lines, "Answer:"])
