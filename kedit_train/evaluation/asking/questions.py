"""Questions put to a model, and what came back, one result for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import nn

from kedit_train.data.prompts import PromptFormat
from kedit_train.evaluation.asking.batching import unwrapped
from kedit_train.evaluation.asking.generate import Answer, Ending, generate_answers
from kedit_train.evaluation.asking.probes import Asked
from kedit_train.evaluation.asking.teacher_forced import TeacherForced, teacher_forced
from kedit_train.evaluation.scoring.metrics import ProbeResult
from kedit_train.evaluation.scoring.normalize import contains

Judge = Callable[[str, Sequence[str]], bool]


@dataclass(frozen=True)
class Settings:
    """How questions are put; the same for the unedited model and the edited one.

    Args:
        batch_size: rows at a time.
        max_new_tokens: where an answer that never ends is cut; fluency_tokens: the same for a continuation.
        prompt_format: see :mod:`~kedit_train.data.prompts`.
        judge: ``judge(answer, accepted) -> bool``.
        progress: bars in a terminal.
    """

    batch_size: int
    max_new_tokens: int
    fluency_tokens: int
    prompt_format: PromptFormat
    judge: Judge
    progress: bool


def ask(
    model: nn.Module, tokenizer: Any, asked: Sequence[Asked], settings: Settings, *, old: bool
) -> tuple[list[ProbeResult], dict[str, Answer]]:
    """Put every question: under teacher forcing where there is an accepted answer, and to be answered freely.

    The pass under teacher forcing already says how the free answer begins (all of it, where the model is right), so
    only the rest is generated.

    Args:
        old: whether to score old answers, too.

    Returns:
        One result a question, and the answers by prompt (continuations left out).
    """
    common: dict[str, Any] = {"batch_size": settings.batch_size, "progress": settings.progress}
    common["prompt_format"] = settings.prompt_format
    pairs = [(a.prompt, a.accepted[0]) for a in asked if a.accepted]
    if old:
        pairs += [(a.prompt, a.old_target) for a in asked if a.old_target is not None]
    forced = dict(zip(pairs, teacher_forced(model, tokenizer, pairs, **common), strict=True))
    stops = Ending(unwrapped(model), tokenizer, prompt_format=settings.prompt_format)
    begun: dict[str, tuple[list[int], float]] = {}
    for (prompt, _), scored in forced.items():
        ids, margin = scored.begins(stops)
        if prompt not in begun or len(ids) > len(begun[prompt][0]):
            begun[prompt] = (ids, margin)
    short = [a.prompt for a in asked if a.question != "fluency"]
    most = settings.max_new_tokens
    said = generate_answers(model, tokenizer, short, max_new_tokens=most, begun=begun, **common)
    answers = dict(zip(short, said, strict=True))
    long = [a.prompt for a in asked if a.question == "fluency"]
    most = settings.fluency_tokens
    told = generate_answers(model, tokenizer, long, max_new_tokens=most, lines=False, **common) if long else []
    written = dict(zip(long, told, strict=True))
    results = []
    for one in asked:
        answer = written[one.prompt] if one.question == "fluency" else answers[one.prompt]
        results.append(_result(one, answer, forced, settings.judge, old))
    return results, answers


def _result(
    one: Asked, answer: Answer, forced: dict[tuple[str, str], TeacherForced], judge: Judge, old: bool
) -> ProbeResult:
    tokens = forced[one.prompt, one.accepted[0]] if one.accepted else None
    former = forced[one.prompt, one.old_target].mean_log_prob if old and one.old_target is not None else None
    return ProbeResult(
        **{field.name: getattr(one, field.name) for field in fields(one)},
        answer=answer.text,
        ended=answer.ended,
        margin=answer.margin if answer.margin != float("inf") else None,
        right=bool(judge(answer.text, one.accepted)) if one.accepted else None,
        contained=contains(answer.text, one.accepted) if one.accepted else None,
        tokens_right=tokens.correct if tokens else (),
        token_log_probs=tokens.log_probs if tokens else (),
        old_log_prob=former,
    )
