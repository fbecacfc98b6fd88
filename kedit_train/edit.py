"""The records that everything else works with: an edit, and a question with its right answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Probe:
    """A question with every answer that counts as right, the preferred one first.

    Args:
        prompt: the question.
        answers: the right answers. If there are none, an evaluation can only check whether the answer of the model
            changed.

    Example:
        >>> Probe("Ben lives in", ("Basel", "Bâle")).answers[0]
        'Basel'
    """

    prompt: str
    answers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Edit:
    """A fact to write into a model, with the questions that the edited model is scored on.

    Only ``prompt`` and ``target`` are trained on.

    Args:
        prompt: what the model reads, up to where the answer begins.
        target: the new answer, without a leading space and without end-of-text.
        subject: the entity that the fact is about.
        old_target: the old answer: what was true, or what the model answered, before the edit.
        aliases: other spellings of ``target`` that count as right.
        rephrases: other wordings of ``prompt``, which measure generality.
        locality: kind -> questions whose answers must not change.
        portability: kind -> questions whose answers follow from the new fact.
        id: the identifier of the record, used in messages and reports.

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
        """Every spelling of the new answer that counts as right, the target first."""
        return (self.target, *self.aliases)
