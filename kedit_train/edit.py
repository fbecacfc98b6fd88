"""An edit, and the questions that tell whether it took."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Probe:
    """A question with every answer that counts as right, the preferred one first.

    ``answers`` may be empty: then only "did the answer change?" can be asked of it.
    """

    prompt: str
    answers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Edit:
    """One fact to write into a model, and what it is scored on. Only ``prompt`` and ``target`` are ever trained on.

    Args:
        prompt: what the model reads, up to where the answer begins.
        target: what it shall answer from now on (without leading space, without end-of-text).
        subject: the entity that the fact is about.
        old_target: what was true, or what the model believed, before.
        aliases: further spellings of ``target`` that count as right.
        rephrases: other wordings of ``prompt`` (generality).
        locality: kind -> questions whose answers must stay as they were.
        portability: kind -> questions whose answers follow from the new fact.
        id: the record's own identifier, for messages and reports.
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
