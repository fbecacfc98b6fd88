"""The two basic records of this package: an edit, and a question with its correct answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Probe:
    """An evaluation question and all answers that count as correct.

    Args:
        prompt: the question. It can also be the beginning of a sentence that the answer completes.
        answers: the correct answers, the preferred answer first. If there are none, an evaluation can only check
            whether the model's answer has changed.

    Example:
        >>> Probe("Ben lives in", ("Basel", "Bâle")).answers[0]
        'Basel'
    """

    prompt: str
    answers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Edit:
    """A fact to write into a model, with the questions that test the edited model.

    Training uses only ``prompt`` and ``target``.

    Args:
        prompt: the text that the model reads before the answer.
        target: the new answer, without a leading space and without end-of-text.
        subject: the entity that the fact is about.
        old_target: the answer before the edit, either the true answer or the model's answer.
        aliases: other spellings of ``target`` that count as correct.
        rephrases: other wordings of ``prompt``, used to measure generality.
        locality: dict from a kind of question, such as "neighborhood", to a tuple of questions of this kind. The
            answers to these questions must not change.
        portability: dict of the same form as ``locality``. The answers to its questions follow from the new fact.
        id: the identifier of the edit in messages and reports.

    Example:
        >>> edit = Edit("Ada lives in", "Bern", subject="Ada", old_target="Rome", aliases=("Berne",))
        >>> edit.answers
        ('Bern', 'Berne')
    """

    prompt: str
    target: str
    subject: str | None = None
    old_target: str | None = None
    aliases: tuple[str, ...] = ()
    rephrases: tuple[str, ...] = ()
    locality: Mapping[str, tuple[Probe, ...]] = field(default_factory=dict)
    portability: Mapping[str, tuple[Probe, ...]] = field(default_factory=dict)
    id: str = ""

    @property
    def answers(self) -> tuple[str, ...]:
        """All spellings of the new answer that count as correct, with ``target`` first."""
        return (self.target, *self.aliases)


def scored_prompts(edit: Edit) -> list[str]:
    """Return the rephrases of an edit, and the prompts of its locality and portability questions.

    An evaluation scores these prompts in addition to ``edit.prompt``.

    Example:
        >>> scored_prompts(Edit("The capital of France is", "Lyon", rephrases=("France's capital:",)))
        ["France's capital:"]
    """
    probes = [*edit.locality.values(), *edit.portability.values()]
    return [*edit.rephrases, *(probe.prompt for kind in probes for probe in kind)]
